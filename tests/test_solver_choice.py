"""The choice of a solver by counted costs, and the eigenvalue estimate."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Generator, Tensor

from influence_ext.errors import ArgumentError, SolverFailure
from influence_ext.operators import GGN
from influence_ext.operators.base import CurvatureOperator
from influence_ext.solvers import CG, AutoChoice, BlockCG, Direct, Status, auto, top_eigenvalue
from tests.cases.solvers import SYSTEMS, DenseOperator, diagonal, error, matrix, rotated

F64 = torch.float64


class Sized(CurvatureOperator):
    """Only its sizes are looked at."""

    dtype, device = F64, torch.device("cpu")

    def __init__(self, P: int, R: int, damping: float):
        self.num_parameters, self.num_roots, self.damping = P, R, damping

    def _matmat(self, V: Tensor) -> Tensor:
        raise AssertionError("auto may not multiply")

    damped = root_matmat = root_rmatmat = root_gram = _matmat  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("P", "R", "damping", "V", "name", "reason"),
    [
        (100_000, 1000, 1e-3, 100, "Dual", "CG about 8,349 (Direct takes at most 20000 parameters)."),
        (100_000, 30_000, 1e-3, 100, "BlockCG", "Direct takes at most 20000 parameters; Dual takes at most 20000 roots"),
        (100_000, 5000, 1e-3, 1, "CG", "CG: for P = 100000 parameters, R = 5000 roots and V = 1 right-hand sides"),
        (200, 50_000, 1e-3, 20, "Direct", "Dual takes at most 20000 roots"),
        (100_000, 200_000, 0.0, 100, "BlockCG", "Dual needs damping"),
        (100_000, 1000, 0.0, 1, "CG", "Dual needs damping"),
        (10_000, 50_000, 1e-3, 2, "BlockCG", "against CG about 78, Direct about"),
        (500, 100, 0.0, 50, "CG", "Direct and BlockCG would meet a singular matrix without damping; Dual needs damping"),
        (100, 500, 0.0, 50, "Direct", "Dual needs damping"),
        (100_000, 60, 1e-1, 1, "CG", "Dual about"),  # few steps beat a Gram matrix of the roots, many do not
        (100_000, 60, 1e-4, 1, "Dual", "CG about"),
        (62, 800, 1e-4, 1, "Direct", "CG about"),  # what Python's calls take decides where a product is short
    ],
)
def test_auto_counts_costs(P: int, R: int, damping: float, V: int, name: str, reason: str) -> None:
    choice = auto(Sized(P, R, damping), V)
    assert isinstance(choice, AutoChoice)
    assert type(choice.solver).__name__ == choice.name == name
    assert choice.reason.startswith(f"{name}: ")
    assert reason in choice.reason
    assert choice.costs[name] == min(choice.costs.values())


def test_auto_measures_the_damping_against_what_the_targets_weigh() -> None:
    g = Generator().manual_seed(0)
    X, y = torch.randn(40, 5, generator=g), torch.randint(3, (40,), generator=g)
    model = torch.nn.Sequential(torch.nn.Linear(5, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3))

    def costs(loss: torch.nn.Module, damping: float, y: Tensor = y, weights: Tensor | None = None) -> dict[str, float]:
        return auto(GGN(model, loss, (X, y), damping, weights=weights), 4).costs

    expected = costs(torch.nn.CrossEntropyLoss(), 1e-3)
    # Each matrix is that of a mean up to a factor, damping included, or a mean over fewer examples.
    assert costs(torch.nn.CrossEntropyLoss(weight=torch.full((3,), 0.01)), 1e-3) == pytest.approx(expected, rel=1e-4)
    assert costs(torch.nn.CrossEntropyLoss(), 1e-5, weights=torch.full((40,), 0.01)) == pytest.approx(expected, rel=1e-4)
    assert costs(torch.nn.CrossEntropyLoss(reduction="sum"), 4e-2) == pytest.approx(expected, rel=1e-4)
    ignored = torch.where(torch.arange(40) < 30, -100, y)
    assert costs(torch.nn.CrossEntropyLoss(), 1e-3, ignored) == pytest.approx(expected, rel=1e-4)
    assert costs(torch.nn.CrossEntropyLoss(reduction="sum"), 1e-2, ignored) == pytest.approx(expected, rel=1e-4)
    assert costs(torch.nn.CrossEntropyLoss(), 1e-3, weights=torch.zeros(40)).keys() == expected.keys()


def test_auto_knows_parts_and_memory() -> None:
    operator = Sized(100_000, 30_000, 1e-3)
    whole, parts = auto(operator, 100), auto(operator, 100, at_once=10)
    assert parts.costs["BlockCG"] > 1.5 * whole.costs["BlockCG"]  # a smaller block needs more steps
    assert parts.memory["BlockCG"] == (7 + 15) * 10 * 100_000 * 8  # 12 · 100^0.25 / 10^0.4 blocks of the past
    tight = auto(operator, 10, memory_budget=10 * 10 * 100_000 * 8)
    assert isinstance(tight.solver, BlockCG)
    assert tight.solver.reorthogonalise == 3
    assert tight.memory["BlockCG"] == 10 * 10 * 100_000 * 8
    assert "with up to 3 past residuals kept" in tight.reason
    small = auto(operator, 100, memory_budget=10_000_000)
    assert small.name == "CG"
    assert "BlockCG would take 534 MiB" in small.reason
    with pytest.raises(ArgumentError, match=r"expected at_once, a whole number in \[1, 10\], got 11"):
        auto(operator, 10, at_once=11)


def test_auto_measures_damping_against_the_objective() -> None:
    """The mean of a loss with λ and its sum over N examples with N λ are one system."""
    model, data = torch.nn.Linear(3, 2), (torch.randn(50, 3), torch.randint(2, (50,)))
    mean = auto(GGN(model, torch.nn.CrossEntropyLoss(), data, 1e-2), 1)
    total = auto(GGN(model, torch.nn.CrossEntropyLoss(reduction="sum"), data, 50 * 1e-2), 1)
    assert total.costs == pytest.approx(mean.costs)
    assert auto(GGN(model, torch.nn.CrossEntropyLoss(), data, 1e-1), 1).costs["CG"] < mean.costs["CG"]


def test_auto_knows_what_vectors_share() -> None:
    class Shared(Sized):
        def product_operations(self, V: int) -> float:
            return 1e9 * (V + 9)

    # ten times the first vector's cost for a hundred more: blocks are cheap, single columns are not
    assert auto(Shared(100_000, 30_000, 1e-3), 100).costs["CG"] < 0.2 * auto(Sized(100_000, 30_000, 1e-3), 100).costs["CG"]


def test_auto_hands_its_options_on() -> None:
    operator = DenseOperator(rotated(torch.linspace(1, 2, 300, dtype=F64), "auto"))
    large = DenseOperator(torch.eye(800, dtype=F64))
    assert auto(large, 1).solver == CG()
    bounded = auto(large, 1, memory_budget=2**20).solver
    assert bounded == CG(reorthogonalise=100)  # at 16 P operations each as much as a product, 2 P²; more would fit
    assert "Dual needs an operator with a root" in auto(large, 1).reason
    assert auto(large, 1, rtol=1e-3).solver == CG(rtol=1e-3)
    assert auto(operator, 100, rtol=1e-3, on_failure="return").solver == Direct(rtol=1e-3, on_failure="return")
    single = auto(DenseOperator(large.A.float()), 1).solver
    assert isinstance(single, CG)
    assert single.rtol == pytest.approx(1000 * torch.finfo(torch.float32).eps)
    negative = DenseOperator(-large.A)
    failing = auto(negative, 1, on_failure="return")
    assert failing.solve(negative, torch.ones(800, dtype=F64)).status == [Status.NOT_PSD]
    with pytest.raises(SolverFailure, match=r"^CG: "):
        auto(large, 1).solve(negative, torch.ones(800, dtype=F64))


def test_top_eigenvalue_is_a_lower_bound_that_rises() -> None:
    operator = DenseOperator(rotated(torch.linspace(0, 1, 80, dtype=F64), "top"))
    estimates = [top_eigenvalue(operator, num_steps=k) for k in (1, 5, 20, 300)]
    assert estimates == sorted(estimates)
    assert 0.8 <= estimates[2] <= estimates[3] <= 1 + 1e-12
    assert estimates[3] >= 0.99
    assert sum(operator.blocks) == 326
    assert top_eigenvalue(operator, seed=1) != top_eigenvalue(operator, seed=2)
    assert top_eigenvalue(diagonal(0.0, 0.0)) == 0.0
    assert top_eigenvalue(diagonal(-3.0, 1.0)) == pytest.approx(3.0)
    assert not math.isfinite(top_eigenvalue(diagonal(torch.nan, 1.0)))


def test_sample_of_the_test_operator_has_the_right_mean() -> None:
    operator = SYSTEMS[1].make()
    draws = Generator().manual_seed(0)
    mean = sum(matrix(operator.sample(draws, 6)) for _ in range(2000)) / 2000
    assert error(mean, matrix(operator)) <= 0.05  # some 1/√2000 per batch
