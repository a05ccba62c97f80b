"""The minimiser behind the responses: known minima of small functions, and a true word about every way to fail."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from influence_ext.bregman import ResponseStatus
from influence_ext.bregman.minimise import minimise
from influence_ext.bregman.objective import Evaluation
from influence_ext.testing import assert_close

F64 = torch.float64


class Literal:
    """A function of few variables for the minimiser, with its Hessian by autograd."""

    def __init__(self, function: Callable[[Tensor], Tensor]):
        self.function = function

    def evaluate(self, delta: Tensor) -> Evaluation:
        at = delta.clone().requires_grad_()
        value = self.function(at)
        (gradient,) = torch.autograd.grad(value, at)
        return Evaluation(delta, value.item(), gradient, 0.0, delta)

    def curvature_product(self, v: Tensor, at: Evaluation) -> Tensor:
        return v.clone()

    def hessian_product(self, v: Tensor, at: Evaluation, length: float, full: bool) -> Tensor:
        return torch.autograd.functional.hessian(self.function, at.delta) @ v


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=F64)


MINIMA: dict[str, tuple[Callable[[Tensor], Tensor], Sequence[float], Sequence[float]]] = {
    "quadratic": (lambda x: 3 * x[0] ** 2 + 0.5 * x[1] ** 2 - x[0], (1.0, -2.0), (1 / 6, 0.0)),
    "rosenbrock": (lambda x: (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2, (-1.2, 1.0), (1.0, 1.0)),
    "saddle-first": (lambda x: x[0] ** 4 / 4 - x[0] ** 2 / 2 + x[1] ** 2, (1e-3, 0.5), (1.0, 0.0)),
}


@pytest.mark.parametrize("row", MINIMA)
def test_the_minimiser_finds_known_minima(row: str) -> None:
    function, start, minimum = MINIMA[row]
    found = minimise(Literal(function), vector(*start), rtol=1e-10, max_steps=200)
    assert found.status is ResponseStatus.CONVERGED
    assert_close(found.delta, vector(*minimum), scale=1.0, factor=1e3, because="the gradient is brought down to 1e-10")
    assert found.value == pytest.approx(float(function(vector(*minimum))), abs=1e-12)


@pytest.mark.parametrize(
    ("function", "status"),
    [
        (lambda x: -(x**2).sum() + x.sum(), ResponseStatus.DIVERGED),
        (lambda x: (x - 0.3).abs().sum(), ResponseStatus.STALLED),
        (lambda x: torch.where(x.sum() < 0.15, math.nan, x.sum()), ResponseStatus.NON_FINITE),
    ],
    ids=["unbounded", "kink", "nowhere-finite"],
)
def test_the_minimiser_says_how_it_failed(function: Callable[[Tensor], Tensor], status: ResponseStatus) -> None:
    found = minimise(Literal(function), vector(0.05, 0.1), rtol=1e-8, max_steps=300, local=True)
    assert found.status is status
    assert all(s.explanation for s in ResponseStatus)
