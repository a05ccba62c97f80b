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
from influence_ext.errors import ArgumentError
from influence_ext.losses import resolve
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
