"""Losses over classes that lie innermost in memory, and products that leave out the transposition in front of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import influence_ext as ie
from influence_ext import reference
from influence_ext.losses import resolve
from influence_ext.losses.hessian import SOFTMAX, SOFTMAX_LAST
from influence_ext.testing import assert_close
from tests.cases.losses import ROWS, LossCase

F64 = torch.float64
AT_POSITIONS = [row for row in ROWS if row.loss == "cross_entropy" and row.sample()[0].dim() > 2]


def turned(z: Tensor) -> Tensor:
    """The same numbers, the second axis innermost in memory."""
    return z.movedim(1, -1).contiguous().movedim(-1, 1)


@pytest.mark.parametrize("row", AT_POSITIONS, ids=lambda row: row.id)
def test_losses_do_not_see_how_outputs_lie_in_memory(row: LossCase) -> None:
    (z, t), (other, _) = row.sample(), row.sample("elsewhere")
    z, other = turned(z.to(F64)), other.to(F64)
    t = t.to(F64) if t.is_floating_point() else t
    assert not z.is_contiguous()
    loss, oracle, C = resolve(row.make()), row.oracle(), z[0].numel()
    assert_close(loss.value(z, t), reference.loss_values(oracle, z, t), scope="layer")
    gradient = loss.gradient(z, t)
    assert_close(gradient, reference.loss_gradient(oracle, z, t), scope="layer")
    assert gradient.stride() == z.stride()  # nothing was turned on the way
    for z_s in (other, turned(other)):
        assert_close(loss.bregman(z, z_s, t), reference.bregman_divergence(oracle, z, z_s, t), scope="layer")
    U = torch.randn(3, len(z), C, generator=torch.Generator().manual_seed(1), dtype=F64)
    weights = torch.linspace(0, 2, len(z), dtype=F64)
    H = reference.loss_hessian(oracle, z, t)
    hessian = loss.hessian(z, t, weights)
    assert hessian.classes_innermost
    expected = weights[:, None] * torch.einsum("ncd,vnd->vnc", H, U)
    assert_close(hessian.matmat(U.view(3, *z.shape)).reshape(U.shape), expected, scope="layer")
    assert_close(hessian.root_matmat(hessian.root_rmatmat(U.view(3, *z.shape))).reshape(U.shape), expected, scope="layer")


@pytest.mark.parametrize("row", AT_POSITIONS, ids=lambda row: row.id)
def test_one_example_is_a_batch_like_any_other(row: LossCase) -> None:
    z, t = row.sample()
    z, t = turned(z[:1].to(F64)), t[:1].to(F64) if t.is_floating_point() else t[:1]
    loss, oracle = resolve(row.make()), row.oracle()
    assert_close(loss.value(z, t), reference.loss_values(oracle, z, t), scope="layer")
    assert_close(loss.gradient(z, t), reference.loss_gradient(oracle, z, t), scope="layer")
    assert loss.hessian(z, t).classes_innermost


class Places(nn.Module):
    """A layer at every place, and classes wherever ``end`` puts them."""

    def __init__(self, end: Callable[[Tensor], Tensor], activation: Callable[[Tensor], Tensor] = torch.tanh) -> None:
        super().__init__()
        self.first, self.head, self.end, self.activation = nn.Linear(3, 6), nn.Linear(6, 5), end, activation

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.head(self.activation(self.first(x))))


def flattened(z: Tensor, t: Tensor, weight: Tensor | None = None) -> Tensor:
    """The usual way to write it for outputs ``[N, ..., K]``."""
    return F.cross_entropy(z.flatten(0, -2), t.flatten(), weight=None if weight is None else weight.to(z.dtype))


WEIGHT = torch.tensor([1.0, 0.5, 2.0, 0.0, 1.5])
# name, the model's end, shape of the places, loss, is a transposition at the outputs, form of the Hessian's state
# fmt: off
CASES: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...], Any, bool, int]] = {
    "transposed": (lambda z: z.transpose(1, 2), (4,), nn.CrossEntropyLoss(), True, SOFTMAX),
    "images": (lambda z: z.permute(0, 3, 1, 2), (2, 3), nn.CrossEntropyLoss(label_smoothing=0.1), True, SOFTMAX),
    "activated": (lambda z: torch.tanh(z).mT, (4,), nn.CrossEntropyLoss(weight=WEIGHT.double(), reduction="sum"), True, SOFTMAX),
    "turned back": (lambda z: z.mT, (4,), lambda z, t: F.cross_entropy(z.mT.flatten(0, 1), t.flatten()), True, SOFTMAX),
    "another turn": (lambda z: z.permute(0, 3, 2, 1), (2, 3), nn.CrossEntropyLoss(), False, SOFTMAX),
    "classes last": (lambda z: z, (4,), flattened, False, SOFTMAX_LAST),
    "images, classes last": (lambda z: z, (2, 3), partial(flattened, weight=WEIGHT), False, SOFTMAX_LAST),
    "one place": (lambda z: z.mT, (1,), nn.CrossEntropyLoss(), False, SOFTMAX),
}
# fmt: on


@pytest.mark.parametrize("name", CASES)
def test_products_leave_the_transposition_out(name: str) -> None:
    end, places, loss, is_transposed, shape = CASES[name]
    torch.manual_seed(3)
    model = Places(end).double()
    X, t = torch.randn(6, *places, 3, dtype=F64), torch.randint(0, 3, (6, *(reversed(places) if name == "another turn" else places)))
    resolved = resolve(loss)
    tape = ie.plan.Plan.of(model, X).linearize(X)
    resolved.check(tape.outputs, t, "test")
    assert tape.plan.output_is_transposed == is_transposed
    assert resolved.hessian(tape.outputs, t).shape == shape
    num_parameters = sum(p.numel() for p in model.parameters())
    V = torch.randn(9, num_parameters, dtype=F64)

    def total(theta: Tensor) -> Tensor:
        return loss(torch.func.functional_call(model, named(model, theta), (X,)), t)

    z = model(X).detach()
    theta = torch.cat([p.detach().flatten() for p in model.parameters()])
    J = torch.func.jacfwd(lambda theta: torch.func.functional_call(model, named(model, theta), (X,)))(theta).flatten(0, -2)
    H = torch.func.hessian(lambda z: loss(z, t))(z).reshape(z.numel(), z.numel())
    expected = V @ J.T @ H @ J
    stated = {} if isinstance(loss, nn.Module) else {"reduction": "mean"}
    G, full = ie.GGN(model, loss, (X, t), **stated), ie.Hessian(model, loss, (X, t), **stated)
    before = torch.get_num_threads()
    try:
        for num_threads in (1, 2):
            torch.set_num_threads(num_threads)
            for schedule in ("auto", "by_example", "by_operator"):
                G._tape.set_schedule(schedule)
                assert_close(G.matmat(V), expected)
                assert_close(G.matmat(V[:1]), expected[:1])
    finally:
        torch.set_num_threads(before)
    assert_close(G.diagonal(), (J.T @ H @ J).diagonal())
    assert_close(G._tape.jvp(V).flatten(1), V @ J.T)  # which has it
    assert_close(full.matmat(V), V @ torch.func.hessian(total)(theta))


def named(model: nn.Module, theta: Tensor) -> dict[str, Tensor]:
    """θ as the model's parameters."""
    sizes = [p.numel() for p in model.parameters()]
    pieces = zip(model.named_parameters(), theta.split(sizes), strict=True)
    return {name: piece.view(p.shape) for (name, p), piece in pieces}


@pytest.mark.parametrize("shape", [(2, 10), (10, 2), (4, 5), (5, 2, 2), (1, 5, 4), (20,)], ids=str)
def test_a_reshape_behind_the_transposition_makes_other_classes(shape: tuple[int, ...]) -> None:
    torch.manual_seed(4)
    model = Places(lambda z: z.mT.reshape(z.shape[0], *shape)).double()
    X, t = torch.randn(3, 4, 3, dtype=F64), torch.randint(0, shape[0], (3, *shape[1:]))
    J = torch.func.jacrev(lambda theta: torch.func.functional_call(model, theta, (X,)))(dict(model.named_parameters()))
    J = torch.cat([j.reshape(60, -1) for j in J.values()], dim=1).detach()
    H = torch.func.hessian(lambda z: F.cross_entropy(z, t))(model(X).detach()).reshape(60, 60)
    V = torch.randn(3, J.shape[1], dtype=F64)
    assert_close(ie.GGN(model, nn.CrossEntropyLoss(), (X, t)).matmat(V), V @ J.T @ H @ J)


def test_states_of_either_order_fit_every_network() -> None:
    torch.manual_seed(0)
    X, t = torch.randn(5, 4, 3, dtype=F64), torch.randint(0, 5, (5, 4))
    loss, V = resolve(nn.CrossEntropyLoss()), torch.randn(2, 59, dtype=F64)
    ended, other = (ie.plan.Plan.of(Places(end).double(), X).linearize(X) for end in (lambda z: z.mT, lambda z: z.mT * 1.5))
    for tape in (ended, other):
        z = tape.outputs
        products = [tape.ggn(V, loss.hessian(order(z), t)) for order in (turned, Tensor.contiguous)]
        assert_close(products[0], products[1])


def test_chunks_take_it_too() -> None:
    torch.manual_seed(0)
    model, X, t = Places(lambda z: z.mT).double(), torch.randn(40, 4, 3, dtype=F64), torch.randint(0, 5, (40, 4))
    whole = ie.GGN(model, nn.CrossEntropyLoss(), (X, t))
    budget = whole._tape.cached_bytes // 3 + 2 * whole._tape.workspace_bytes(1)
    parts = ie.GGN(model, nn.CrossEntropyLoss(), (X, t), memory_budget=budget)
    V = torch.randn(3, whole.shape[0], dtype=F64)
    assert parts._tape.chunk is not None
    assert parts._hessian.classes_innermost
    assert_close(parts.matmat(V), whole.matmat(V))
