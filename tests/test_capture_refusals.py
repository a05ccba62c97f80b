"""What capture refuses: every problem of a model in one message, each with its place and a remedy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from influence_ext.capture import capture
from influence_ext.testing import assert_close
from tests.cases.capture import Net, dense, interpret, normal, par, weights


def raises(run: Callable[..., Any], X: Any = None, trainable: Any = None, **members: Any) -> str:
    model = Net(run, **members)
    with pytest.raises(NotImplementedError) as caught:
        capture(model, normal(3, 4) if X is None else X, trainable)
    assert type(caught.value).__name__ == "UnsupportedModelError"
    return str(caught.value)


@dataclass(frozen=True)
class Refusal:
    id: str
    run: Callable[..., Any]
    texts: tuple[str, ...]
    members: Callable[[], dict[str, Any]] = weights
    X: Callable[[], Any] = lambda: normal(3, 4)


class Doubling(torch.autograd.Function):
    """A forward pass that torch can trace, whose backward pass is something else."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return 100 * grads[0]


def under_no_grad(net: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        gate = torch.sigmoid(x @ net.W)
    return x @ net.W + gate


def half_regions(net: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return x @ net.W


REFUSALS = [
    Refusal(
        "hard-wired dropout",
        lambda n, x: F.dropout(x @ n.W, 0.3, training=True),
        ("dropout: dropout is active", "training=self.training"),
    ),
    Refusal("random noise", lambda n, x: x @ n.W + torch.randn(4, dtype=x.dtype), ("changes from call to call",)),
    Refusal("random activation", lambda n, x: torch.bernoulli(torch.sigmoid(x @ n.W)), ("bernoulli: draws random numbers",)),
    Refusal("random rrelu", lambda n, x: F.rrelu(x @ n.W, training=True), ("draws random numbers",)),
    Refusal(
        "batch statistics",
        lambda n, x: F.batch_norm(x @ n.W, None, None, training=True),
        ("batch norm with batch statistics", "running statistics"),
    ),
    Refusal(
        "batch norm that tracks nothing",
        lambda n, x: n.bn(x).double(),
        ("batch norm with batch statistics", "bn (BatchNorm1d)"),
        lambda: {"bn": nn.BatchNorm1d(4, track_running_stats=False, dtype=torch.float64).eval()},
    ),
    Refusal(
        "view that mixes", lambda n, x: x.view(2, -1, 2) @ n.W[:2, :2], ("first axis does not count the examples",), X=lambda: normal(3, 4)
    ),
    Refusal("length of the batch", lambda n, x: (x @ n.W).view(len(x), 2, 2), ("input X: the forward pass fixes", "instead of len(X)")),
    Refusal("batch mean", lambda n, x: (x - x.mean(0)) @ n.W, ("sub: mixes the examples of a batch", "first axis")),
    Refusal("output without examples", lambda n, x: (x @ n.W).unsqueeze(0), ("output's first axis does not count the examples",)),
    Refusal("folded output", lambda n, x: (x @ n.W).view(-1, 2), ("output's first axis does not count the examples",)),
    Refusal("constant output", lambda n, x: n.b * 2, ("does not depend on the inputs",)),
    Refusal("fixed number of examples", lambda n, x: x.reshape(7, 4) @ n.W, ("fixes the number of examples",)),
    Refusal("divides by N", lambda n, x: x @ n.W / x.shape[0], ("div: mixes the examples",)),
    Refusal("several outputs", lambda n, x: (x @ n.W, x), ("returns 2 tensors",)),
    Refusal(
        "detach",
        lambda n, x: (x @ n.W).detach() + x @ n.V,
        ("detach cuts off the derivatives with respect to W",),
        lambda: {**weights(), "V": par(4, 4)},
    ),
    Refusal("no_grad", under_no_grad, ("computed under torch.no_grad() from W", "no_grad block")),
    Refusal("custom function", lambda n, x: Doubling.apply(x @ n.W), ("autograd function Doubling",)),
    Refusal("cast", lambda n, x: (x @ n.W).float(), ("gives torch.float32 where the parameters are torch.float64",)),
    Refusal(
        "autocast",
        half_regions,
        ("gives torch.bfloat16 where the parameters are torch.float32",),
        lambda: {"W": nn.Parameter(torch.randn(4, 4))},
        lambda: torch.randn(3, 4),
    ),
    Refusal(
        "promotion by a constant",
        lambda n, x: x @ n.W * n.c,
        ("gives torch.float64 where the parameters are torch.float32",),
        lambda: {"W": nn.Parameter(torch.randn(4, 4)), "c": normal(4)},
        lambda: torch.randn(3, 4),
    ),
    Refusal(
        "branch on values",
        lambda n, x: x @ n.W if x.sum() > 0 else x,
        ("torch.export can trace", "data-dependent", "branch on tensor values"),
    ),
    Refusal(
        "wrong number of features",
        lambda n, x: x @ n.W,
        ("runs on this data, X [N, 5] of torch.float64, got RuntimeError from Net (in <lambda>, ", "x @ n.W", "try model(X) alone"),
        X=lambda: normal(3, 5),
    ),
]


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda r: r.id)
def test_what_cannot_be_right_is_refused_with_a_remedy(refusal: Refusal) -> None:
    message = raises(refusal.run, refusal.X(), **refusal.members())
    for text in refusal.texts:
        assert text in message
    assert message.startswith("capture: expected ")


def test_one_message_lists_all_problems() -> None:
    def run(n: Any, x: Tensor) -> Tensor:
        h = F.batch_norm(x @ n.W, None, None, training=True)
        return F.dropout(torch.bernoulli(torch.sigmoid(h)) + h.detach(), training=True)

    message = raises(run, **weights())
    for text in ("batch norm with batch statistics", "bernoulli: draws random numbers", "dropout is active"):
        assert text in message
    lines = [line for line in message.splitlines() if line.startswith("  - ")]
    assert f"{len(lines)} problems in Net; each is listed with its remedy.\n" in message
    assert len(lines) == len(set(lines)) >= 3


def test_problems_of_parameters_vanish_when_these_are_not_trained() -> None:
    model = Net(lambda n, x: (x @ n.W).detach() * n.b, **weights())
    with pytest.raises(NotImplementedError, match="detach cuts off the derivatives with respect to W"):
        capture(model, normal(3, 4))
    graph = capture(model, normal(3, 4), trainable=["b"])
    X = normal(5, 4)
    assert_close(interpret(graph, model, [X]), model(X).detach())
    with pytest.raises(NotImplementedError, match="detach cuts off"):
        capture(model, normal(3, 4))


def test_batch_norm_found_in_training_mode_is_named() -> None:
    model = nn.Sequential(dense(4, 4), nn.BatchNorm1d(4, dtype=torch.float64))
    with pytest.raises(NotImplementedError) as caught:
        capture(model, normal(3, 4))
    assert "batch norm 1 is in training mode" in str(caught.value)
    assert "model.eval()" in str(caught.value)
    X = normal(5, 4)
    assert_close(interpret(capture(model.eval(), normal(3, 4)), model, [X]), model(X).detach())


def test_unused_batch_norm_in_training_mode_is_refused_from_the_cache_too() -> None:
    model = Net(lambda n, x: n.fc(x), fc=dense(4, 2), bn=nn.BatchNorm1d(4, dtype=torch.float64))
    capture(model.eval(), normal(3, 4))
    with pytest.raises(NotImplementedError, match="batch norm bn is in training mode"):
        capture(model.train(), normal(3, 4))


@pytest.mark.parametrize(
    ("X", "error", "text"),
    [
        (torch.zeros(3, 4), TypeError, "expected X of the parameters' dtype torch.float64, got torch.float32"),
        (torch.zeros(0, 4).double(), ValueError, r"expected X of shape \[N, ...\] with N >= 1"),
        (torch.zeros(3, 4, device="meta").double(), ValueError, "device cpu, got meta"),
        ((normal(3, 4), normal(2, 4)), ValueError, r"same number of examples in all inputs, got X\[0\] 3, X\[1\] 2"),
    ],
)
def test_inputs_that_do_not_fit(X: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        capture(dense(4, 2), X)
