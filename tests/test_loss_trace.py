"""Callables that are a loss of rearranged outputs: recognised exactly where nothing else happens, and right either way.

The oracle is the callable itself, differentiated by PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import influence_ext as ie
from influence_ext import reference
from influence_ext.adapters.opacus import GradSampleModule
from influence_ext.errors import ArgumentError, UnsupportedLossError
from influence_ext.losses import resolve
from influence_ext.losses.generic import CallableLoss
from influence_ext.testing import assert_close

F64 = torch.float64
WEIGHT = torch.tensor([0.3, 1.0, 2.0, 0.0, 0.7], dtype=F64)


@dataclass(frozen=True)
class Row:
    id: str
    loss: Callable[[Tensor, Tensor], Tensor]
    found: str | None = "cross_entropy"
    outputs: tuple[int, ...] = (4, 5)
    targets: Callable[[], Tensor] = lambda: torch.tensor([[0, 4, 2, 1], [1, 1, -100, 0], [2, 0, 4, 4]])


class Shifted(nn.Module):
    """Hugging Face's loss of causal models."""

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        shifted, wanted = logits[..., :-1, :].contiguous(), labels[..., 1:].contiguous()
        return F.cross_entropy(shifted.view(-1, shifted.size(-1)), wanted.view(-1).to(shifted.device), ignore_index=-100, reduction="mean")


def numbers(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(3, *shape, generator=torch.Generator().manual_seed(1), dtype=F64)


def labels(*shape: int) -> Callable[[], Tensor]:
    return lambda: (torch.arange(3 * torch.Size(shape).numel()).reshape(3, *shape) * 7) % 2


def kept(z: Tensor, t: Tensor) -> Tensor:
    chosen = t.flatten() >= 0
    return F.cross_entropy(z.flatten(0, 1)[chosen], t.flatten()[chosen], reduction="sum")


# fmt: off
RECOGNISED = [
    Row("flattened", lambda z, t: F.cross_entropy(z.flatten(0, 1), t.flatten())),
    Row("viewed", lambda z, t: F.cross_entropy(z.view(-1, z.shape[-1]), t.view(-1), ignore_index=4),
        targets=lambda: torch.tensor([[0, 4, 2, 1], [1, 1, 3, 0], [2, 0, 4, 4]])),
    Row("transposed", lambda z, t: F.cross_entropy(z.transpose(1, 2), t, label_smoothing=0.1)),
    Row("transposed-sum", lambda z, t: F.cross_entropy(z.mT, t, reduction="sum", weight=WEIGHT)),
    Row("module", lambda z, t: nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.2)(z.permute(0, 2, 1), t)),
    Row("shifted", Shifted()),
    Row("positions-first", lambda z, t: F.cross_entropy(z.transpose(0, 1).reshape(-1, 5), t.T.reshape(-1))),
    Row("last-position", lambda z, t: F.cross_entropy(z[:, -1], t[:, -1])),
    Row("probabilities", lambda z, p: F.cross_entropy(z.flatten(0, 1), p.flatten(0, 1)), targets=lambda: numbers(4, 5)().softmax(-1)),
    Row("grid", lambda z, t: F.cross_entropy(z.flatten(2), t.flatten(1)), outputs=(5, 2, 2), targets=lambda: labels(2, 2)()),
    Row("as-it-is", lambda z, t: F.cross_entropy(z, t.long()), outputs=(5,), targets=lambda: torch.tensor([1.0, 4.0, 0.0])),
    Row("log-likelihood", lambda z, t: F.nll_loss(z.flatten(0, 1), t.flatten()), "nll_loss"),
    Row("squeezed", lambda z, t: F.mse_loss(z.squeeze(-1), t), "mse_loss", (1,), numbers()),
    Row("columns", lambda z, t: F.huber_loss(z[:, 1:], t, delta=0.5), "huber_loss", (3,), numbers(2)),
    Row("logits", lambda z, t: F.binary_cross_entropy_with_logits(z[:, 0], t.to(z.dtype)), "binary_cross_entropy_with_logits", (1,),
        labels()),
    Row("turned", lambda z, t: F.mse_loss(z.mT, t, reduction="sum"), "mse_loss", (2, 3), numbers(3, 2)),
]
OTHERS = [
    Row("scaled", lambda z, t: 0.5 * F.cross_entropy(z.flatten(0, 1), t.flatten(), reduction="sum"), None),
    Row("temperature", lambda z, t: F.cross_entropy(z.flatten(0, 1) / 2, t.flatten(), reduction="sum"), None),
    Row("two-losses", lambda z, t: F.cross_entropy(z.mT, t, reduction="sum") + F.cross_entropy(z.mT, t, reduction="sum"), None),
    Row("chosen-by-value", kept, None),
    Row("same-twice", lambda z, t: F.cross_entropy(z[:, :1].expand(-1, 4, -1).flatten(0, 1), t.flatten(), reduction="sum"), None),
    Row("swapped", lambda z, t: F.mse_loss(t, z[:, 0], reduction="sum"), None, (1,), numbers()),
    Row("weighted-elements", lambda z, t: F.mse_loss(z, t, reduction="none").mul(2).sum(), None, (2,), numbers(2)),
    Row("written-out", lambda z, t: (z - t).square().sum(), None, (2,), numbers(2)),
]
# fmt: on


def outputs_of(row: Row) -> Tensor:
    return torch.randn(3, *row.outputs, generator=torch.Generator().manual_seed(0), dtype=F64)


@pytest.mark.parametrize("row", RECOGNISED + OTHERS, ids=lambda row: row.id)
def test_value_gradient_and_hessian_are_the_callables(row: Row) -> None:
    z, t = outputs_of(row), row.targets()
    loss = resolve(row.loss)
    loss.check(z, t, "test")
    expected = "callable" if row.found is None else f"{row.found} (found in"
    assert expected in loss.name or (row.found is None and "found in" not in loss.name)
    c, shape = loss.factor(t), z.shape
    assert_close(c * loss.value(z, t).sum(), row.loss(z, t), scope="layer")
    assert_close(c * loss.gradient(z, t), torch.func.grad(row.loss)(z, t), scope="layer")
    if loss.is_linear:
        return
    dense = torch.func.hessian(row.loss)(z, t).reshape(z.numel(), z.numel())
    hessian = loss.hessian(z, t).scaled(c)
    U = torch.randn(2, *shape, generator=torch.Generator().manual_seed(2), dtype=F64)
    assert_close(hessian.matmat(U).reshape(2, -1), U.reshape(2, -1) @ dense, scope="layer")
    again = hessian.root_matmat(hessian.root_rmatmat(U))
    assert_close(again.reshape(2, -1), U.reshape(2, -1) @ dense, scope="layer")


def test_bregman_divergences_are_those_of_the_recognised_loss() -> None:
    row = RECOGNISED[5]
    z, t = outputs_of(row), row.targets()
    loss = resolve(row.loss)
    loss.check(z, t, "test")
    other = z + 0.3 * numbers(4, 5)()
    slope = (torch.func.grad(row.loss)(z, t) * (other - z)).sum()
    expected = row.loss(other, t) - row.loss(z, t) - slope
    assert_close(loss.factor(t) * loss.bregman(other, z, t).sum(), expected)


def test_a_language_models_own_loss() -> None:
    """Ignored positions and an unequal last batch included."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 5)).double()
    X, y = torch.randint(6, (3, 4)), RECOGNISED[0].targets()
    G = ie.GGN(model, Shifted(), [(X[:2], y[:2]), (X[2:], y[2:])])
    assert "cross_entropy (found in Shifted) (mean)" in G.report()
    J = reference.jacobian(model, X).flatten(0, 1)
    z = model(X).detach()
    H = torch.func.hessian(Shifted())(z, y).reshape(z.numel(), z.numel())
    assert_close(G.to_dense(), J.T @ H @ J)


def test_a_stated_reduction_must_be_the_callables() -> None:
    z, t = outputs_of(RECOGNISED[0]), RECOGNISED[0].targets()
    with pytest.raises(ArgumentError, match="got a mean"):
        resolve(RECOGNISED[0].loss, "sum").check(z, t, "test")


def test_targets_that_do_not_fit_are_reported_as_usual() -> None:
    z, t = outputs_of(RECOGNISED[0]), RECOGNISED[0].targets()
    with pytest.raises(ValueError, match=r"expected class indices in \[0, 5\), got 7 in example 1"):
        resolve(RECOGNISED[0].loss).check(z, t.masked_fill(t == -100, 7), "test")


def test_a_callable_that_changes_its_mind_is_not_trusted() -> None:
    """Numbers decide after all: what was recognised is compared with the callable on the data."""
    calls: list[Any] = []

    def loss(z: Tensor, t: Tensor) -> Tensor:
        calls.append(z)
        return F.cross_entropy(z, t, reduction="sum", label_smoothing=0.0 if len(calls) <= 2 else 0.5)

    z, t = torch.randn(4, 3, dtype=F64), torch.tensor([0, 1, 2, 0])
    found = resolve(loss)
    found.check(z, t, "test")
    assert found.name == "loss"
    assert_close(found.value(z, t).sum(), F.cross_entropy(z, t, reduction="sum", label_smoothing=0.5))


class Reversed(torch.autograd.Function):
    """The identity, with the opposite derivative."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        return z.view_as(z)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return -g


def swallowing(z: Tensor, t: Tensor) -> Tensor:
    """Catches what the trace raises at a look at values."""
    try:
        if z.max() > 10:
            return F.cross_entropy(2 * z, t)
    except Exception:
        pass
    return F.cross_entropy(z, t)


def unseen(z: Tensor, t: Tensor) -> Tensor:
    """Looks at values where no mode sees it, as scripted functions do; and decides for each example."""
    with torch._C.DisableTorchFunction():
        factor = 1 + (z.amax(1, keepdim=True) > 100) if bool(z.max() > 100) and bool(t.max() < 6) else None
    return F.cross_entropy(z if factor is None else factor * z, t)


@pytest.mark.parametrize(
    ("function", "largest"),
    [
        (lambda z, t: F.cross_entropy(Reversed.apply(z), t), 1.0),
        (swallowing, 1.0),
        (swallowing, 20.0),
        (unseen, 200.0),
        (lambda z, t: F.cross_entropy(z.to(torch.float16).to(z.dtype), t), 1.0),
        (lambda z, t: F.cross_entropy(z, t.to(torch.float16).long()), 1.0),
    ],
    ids=["reversed-gradient", "caught", "caught-and-branched", "unseen-branch", "rounded-outputs", "rounded-targets"],
)
def test_what_looks_like_a_loss_and_is_none_keeps_its_own_numbers(function: Callable[[Tensor, Tensor], Tensor], largest: float) -> None:
    """All rows, or none of them, take a branch; float32, whose tolerances are the widest."""
    z = torch.randn(60, 5, generator=torch.Generator().manual_seed(0)).clamp(max=0.9)
    z[:, 0] = largest
    t = torch.arange(60) % 5
    loss = resolve(function)
    loss.check(z, t, "test")
    assert "found in" not in loss.name
    expected = torch.cat([_grad(function, z[n : n + 1].double(), t[n : n + 1]) for n in range(len(z))])
    assert_close(loss.gradient(z, t), expected, scope="layer")


def _grad(function: Callable[[Tensor, Tensor], Tensor], z: Tensor, t: Tensor) -> Tensor:
    leaf = z.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(leaf, t), leaf)
    return gradient


def test_a_branch_that_later_data_take_ends_the_replacement(caplog: pytest.LogCaptureFixture) -> None:
    """One row of 2000 far from the first ones decides."""
    z, t = torch.randn(2000, 5, generator=torch.Generator().manual_seed(0), dtype=F64), torch.arange(2000) % 5
    loss = resolve(unseen)
    loss.check(z, t, "test")
    assert "found in" in loss.name
    z[1234, 2] = 200.0
    loss.check(z, t, "test")
    assert loss.name == "unseen"
    assert "unseen is not cross_entropy (found in unseen); PyTorch differentiates it" in caplog.text
    assert_close(loss.gradient(z, t) / len(z), _grad(unseen, z, t), scope="layer")


def test_training_looks_at_every_batch_again() -> None:
    """The branch is taken in the second batch only, and the trained parameters are those of the callable itself."""
    X = torch.randn(40, 5, generator=torch.Generator().manual_seed(0), dtype=F64)
    recipe = ie.Recipe(lambda: nn.Linear(5, 5), unseen, lr=0.01, epochs=2, batch_size=20, dtype=F64)
    X[recipe.batch_order(0, 40)[30]] *= 1000
    y = torch.arange(40) % 5
    run = ie.train(recipe, (X, y))
    torch.manual_seed(0)
    expected = ie.train(ie.Recipe(**{**recipe.__dict__, "loss": lambda z, t: 1.0 * unseen(z, t)}), (X, y))
    assert run.loss.name == "unseen"
    assert_close(run.params, expected.params, scope="layer")


def flattened(z: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(z.flatten(0, 1), t.flatten())


@pytest.mark.parametrize("margin", [5.0, 12.0, 16.0, 60.0, 200.0])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_networks_that_fit_their_data_keep_the_loss_recognised(dtype: torch.dtype, margin: float) -> None:
    """Where PyTorch's own value has lost its digits in float32."""
    z = torch.randn(300, 4, 10, generator=torch.Generator().manual_seed(0), dtype=dtype)
    t = torch.arange(1200).view(300, 4) % 10
    z.scatter_(2, t[..., None], margin + z.gather(2, t[..., None]))
    loss = resolve(flattened)
    loss.check(z, t, "test")
    assert "found in" in loss.name
    assert isinstance(loss, CallableLoss)
    assert loss.confirm(z, t, "test")


def test_outputs_that_are_not_finite_say_nothing_of_the_loss() -> None:
    z, t = torch.randn(6, 4, 10), torch.arange(24).view(6, 4) % 10
    loss = resolve(flattened)
    loss.check(z, t, "test")
    assert isinstance(loss, CallableLoss)
    assert loss.confirm(torch.full_like(z, float("nan")), t, "test")
    assert "found in" in loss.name


class ChannelsFirst(nn.Module):
    """Its outputs are contiguous; those of its tape lie as before the transposition."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.head(x).transpose(1, 2).contiguous()
        return z


@pytest.mark.parametrize(
    "loss",
    [
        lambda z, t: F.mse_loss(z.view(len(z), -1), t.view(len(t), -1)),
        lambda z, t: ((z.view(len(z), -1) - t.view(len(t), -1)).square() + 1).logsumexp(1).mean(),
    ],
    ids=["recognised", "differentiated"],
)
def test_callables_may_view_what_the_network_made_contiguous(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model, X, t = ChannelsFirst().double(), torch.randn(6, 3, 4, dtype=F64), torch.randn(6, 5, 3, dtype=F64)
    v = torch.randn(1, 25, dtype=F64)
    assert_close(ie.GGN(model, loss, (X, t)).matmat(v), reference.ggn_products(model, loss, X, t, v))
    output = GradSampleModule(model)(X)
    assert output.is_contiguous()
    assert_close(output.detach(), model(X).detach())


@pytest.mark.parametrize("is_random", [True, False], ids=["random", "counting"])
def test_a_callable_that_is_no_function_is_refused(is_random: bool) -> None:
    numbers = iter(range(10**6))
    draws = torch.Generator().manual_seed(0)

    def function(z: Tensor, t: Tensor) -> Tensor:
        size = float(torch.rand((), generator=draws)) if is_random else 0.1 * (next(numbers) % 3)
        return F.cross_entropy(z, t, label_smoothing=size)

    with pytest.raises(UnsupportedLossError, match=r"expected function to give one value .* draws random numbers or counts its calls"):
        resolve(function).check(torch.randn(6, 5, dtype=F64), torch.arange(6) % 5, "test")


def test_every_call_compares_the_callable_with_few_evaluations() -> None:
    """One without a gradient and one with, of a small set; and what the callable became since is seen on the very same data."""
    seen, state = [0], {"smoothing": 0.0}

    def function(z: Tensor, t: Tensor) -> Tensor:
        seen[0] += 1
        return F.cross_entropy(z, t, label_smoothing=state["smoothing"])

    torch.manual_seed(0)
    model, data = nn.Linear(3, 4).double(), (torch.randn(6, 3, dtype=F64), torch.arange(6) % 4)
    loss = resolve(function)
    for smoothing in (0.0, 0.0, 0.25, 0.25):
        known = loss.name
        seen[0], state["smoothing"] = 0, smoothing
        found = ie.per_example_norms(model, loss, data)
        if known == loss.name == "cross_entropy (found in function)":
            assert seen[0] == 2
        exact = nn.CrossEntropyLoss(label_smoothing=smoothing)
        assert_close(found, reference.per_example_grads(model, exact, *data).norm(dim=1))
    assert loss.name == "function"
