"""What each solver promises beyond the answer: steps and products taken, the recursion, reuse, the choice."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from influence_ext.errors import ArgumentError, ShapeError, SolverFailure
from influence_ext.solvers import CG, Direct, Dual, LiSSA, Neumann, Status
from tests.cases.solvers import (
    SYSTEMS,
    DenseOperator,
    RootOperator,
    diagonal,
    error,
    exact,
    matrix,
    rhs,
    rotated,
)

F64 = torch.float64


def naive_lissa(
    operator: RootOperator, b: Tensor, scale: float, num_steps: int, num_repeats: int, batch_size: int | None, seed: int
) -> Tensor:
    """The recursion of the notation page, one vector, one step at a time, with explicit matrices."""
    draws = torch.Generator().manual_seed(seed)
    total = torch.zeros_like(b)
    for _ in range(num_repeats):
        h = b.clone()
        for _ in range(num_steps):
            A = matrix(operator if batch_size is None else operator.sample(draws, batch_size))
            h = b + h - A @ h / scale
        total = total + h / scale
    return total / num_repeats


# CG


def test_cg_drops_finished_columns_from_the_products() -> None:
    operator = diagonal(1.0, 2.0, 3.0, 4.0, 5.0)
    B = torch.eye(5, dtype=F64)[[0, 1, 2, 0]]
    B[1, 2:4] = 1  # three eigenvectors: three steps
    B[2] = 1  # five of them
    solution = CG(rtol=1e-10).solve(operator, B)
    assert solution.stats["iterations"] == [1, 3, 5, 1]
    assert operator.blocks == [4, 2, 2, 1, 1, 4]  # the last block verifies all residuals
    assert solution.stats["num_calls"] == 6
    assert solution.num_products == 14


def test_cg_is_the_minimiser_over_the_krylov_space() -> None:
    operator = SYSTEMS[0].make()
    A, b = matrix(operator), rhs(1, operator)[0]
    for steps in (1, 3, 6):
        krylov = torch.stack([torch.linalg.matrix_power(A, k) @ b for k in range(steps)], dim=1)
        Q, _ = torch.linalg.qr(krylov)
        oracle = Q @ torch.linalg.solve(Q.T @ A @ Q, Q.T @ b)
        solution = CG(rtol=None, max_steps=steps).solve(operator, b)
        assert solution.status == [Status.TRUNCATED]
        assert solution.stats["iterations"] == [steps]
        assert error(solution.value, oracle) <= 1e-9


def test_truncated_cg_may_be_given_more_steps_than_it_needs() -> None:
    operator = diagonal(1.0, 2.0)
    solution = CG(rtol=None, max_steps=500).solve(operator, torch.ones(2, dtype=F64))
    assert solution.status == [Status.TRUNCATED]
    assert solution.stats["iterations"][0] < 10
    assert error(solution.value, torch.tensor([1.0, 0.5], dtype=F64)) <= 1e-14


def test_cg_stops_each_column_at_its_own_tolerance() -> None:
    operator = SYSTEMS[2].make()
    B = rhs(8, operator) @ matrix(operator).matrix_power(2)
    solution = CG(rtol=1e-4).solve(operator, B)
    assert bool((solution.residual_norm <= 1e-4).all())
    shorter = [CG(rtol=None, max_steps=k - 1).solve(operator, b) for k, b in zip(solution.stats["iterations"], B, strict=True)]
    assert all(float(one.residual_norm) > 1e-4 for one in shorter)


def test_warm_start() -> None:
    operator = SYSTEMS[0].make()
    B = rhs(3, operator)
    x = exact(operator, B)
    solver = CG(rtol=1e-8)
    cold = solver.solve(operator, B)
    x0 = x + 1e-5 * rhs(3, operator, "x0")
    x0[1] = x[1]
    before = x0.clone()
    warm = solver.solve(operator, B, x0=x0)
    assert torch.equal(x0, before)
    assert warm.converged
    assert error(warm.value, x) <= 1e-7
    assert warm.stats["iterations"][1] == 0
    assert max(warm.stats["iterations"]) < min(cold.stats["iterations"])
    single = solver.solve(operator, B[0], x0=x0[0])
    assert error(single.value, x[0]) <= 1e-7
    with pytest.raises(ShapeError, match=r"CG: expected x0 of the shape of B, \[3, 30\], got \[30\]"):
        solver.solve(operator, B, x0=x0[0])


def test_preconditioners() -> None:
    operator = SYSTEMS[3].make()
    B = rhs(3, operator)
    inverse = torch.linalg.inv(matrix(operator))
    rows: list[int] = []

    def precondition(R: Tensor) -> Tensor:
        rows.append(R.shape[0])
        return R @ inverse

    plain, jacobi, perfect = (CG(preconditioner=preconditioner).solve(operator, B) for preconditioner in (None, "jacobi", precondition))
    assert max(jacobi.stats["iterations"]) < min(plain.stats["iterations"])
    assert perfect.stats["iterations"] == [1, 1, 1]
    assert rows == [3]
    with pytest.raises(ShapeError, match=r"like its argument, \[3, 20\] of torch.float64, got \[20\] of torch.float64"):
        CG(preconditioner=lambda R: R[0]).solve(operator, B)
    with pytest.raises(ShapeError, match=r"got NoneType; the rows are the columns still running"):
        CG(preconditioner=lambda R: None).solve(operator, B)  # type: ignore[arg-type, return-value]


class Settling(DenseOperator):
    """Rounds its first products to float32, so that the recurrence and the true residual part."""

    def _matmat(self, V: Tensor) -> Tensor:
        product = super()._matmat(V)
        return product.float().double() if len(self.blocks) <= 10 else product


def test_cg_starts_again_where_the_recurrence_claims_too_much() -> None:
    operator = Settling(rotated(torch.logspace(0, 2, 40, dtype=F64), "settling"))
    B = rhs(4, operator)
    solution = CG(rtol=1e-10).solve(operator, B)
    assert solution.converged
    assert solution.stats["restarts"] == [1] * 4
    assert error(solution.value, exact(operator, B)) <= 1e-8
    assert solution.num_products == sum(operator.blocks) == sum(solution.stats["iterations"]) + 8


def test_cg_keeps_to_its_steps_when_it_starts_again() -> None:
    operator = Settling(rotated(torch.logspace(0, 2, 40, dtype=F64), "settling"))
    B = rhs(4, operator)
    enough = max(CG(rtol=1e-10).solve(operator, B).stats["iterations"])
    for max_steps in range(60, enough):
        solution = CG(rtol=1e-10, max_steps=max_steps, on_failure="return").solve(Settling(operator.A), B)
        assert max(solution.stats["iterations"]) == max_steps
        assert set(solution.status) <= {Status.MAX_STEPS, Status.CONVERGED}
        residual = (B - solution.value @ operator.A).norm(dim=1) / B.norm(dim=1)
        # a second descent aims below the tolerance, and may have met it when its steps end
        assert [status is Status.CONVERGED for status in solution.status] == (residual <= 1e-10).tolist()
    assert Status.MAX_STEPS in CG(rtol=1e-10, max_steps=enough - 5, on_failure="return").solve(Settling(operator.A), B).status


class Scripted(DenseOperator):
    """Multiplies its k-th product by the k-th factor."""

    def __init__(self, A: Tensor, factors: list[float]):
        super().__init__(A)
        self.factors = factors

    def _matmat(self, V: Tensor) -> Tensor:
        return super()._matmat(V) * self.factors[len(self.blocks) - 1]


def test_cg_believes_the_residual_not_the_recurrence() -> None:
    A, b = torch.diag(torch.tensor([1.0, 2.0], dtype=F64)), torch.ones(2, dtype=F64)
    solver = CG(on_failure="return")
    assert solver.solve(Scripted(A, [1, 1, math.nan]), b).status == [Status.NON_FINITE]  # two steps and a check
    # the check finds 1.4 A, two more steps solve for that, and a second check finds 3 A: the first solution is better
    solution = solver.solve(Scripted(A, [1, 1, 1.4, 1.4, 1.4, 3]), b)
    assert solution.status == [Status.STALLED]
    assert solution.stats == {"num_calls": 6, "iterations": [4], "restarts": [1]}
    assert solution.residual_norm.tolist() == pytest.approx([0.4])
    assert solution.value.tolist() == pytest.approx([1.0, 0.5])


def test_float32_says_when_rounding_is_in_the_way() -> None:
    A = rotated(torch.logspace(0, 4, 40, dtype=F64), "f32")
    operator = DenseOperator(A.float())
    B = rhs(3, operator)
    with pytest.raises(SolverFailure, match="STALLED: The residual stopped falling above rtol: the solution is as precise") as caught:
        CG(rtol=1e-6).solve(operator, B)
    solution = caught.value.solution
    assert solution.status == [Status.STALLED] * 3
    assert bool((solution.residual_norm > 1e-6).all())
    assert error(solution.value, exact(operator, B)) <= 1e-3
    assert max(solution.stats["restarts"]) <= 3


# LiSSA


@pytest.mark.parametrize(("num_repeats", "batch_size"), [(1, None), (1, 5), (3, 5)])
def test_lissa_is_the_recursion(num_repeats: int, batch_size: int | None) -> None:
    operator = SYSTEMS[0].make()
    B = rhs(3, operator)
    solver = LiSSA(num_steps=40, scale=12.0, num_repeats=num_repeats, batch_size=batch_size, seed=7)
    solution = solver.solve(operator, B)
    oracle = torch.stack([naive_lissa(operator, b, 12.0, 40, num_repeats, batch_size, 7) for b in B])
    assert error(solution.value, oracle) <= 1e-12
    assert solution.status == [Status.TRUNCATED] * 3
    assert not solution.converged
    assert solution.success
    assert solution.stats["iterations"] == [40 * num_repeats] * 3
    assert solution.num_products == 3 * (40 * num_repeats + 1)
    assert solution.stats["extra_damping"] == pytest.approx(12.0 / 40)
    assert math.isnan(solution.stats["top_eigenvalue"])


def test_lissa_is_a_truncated_filter_of_the_spectrum() -> None:
    entries = torch.tensor([0.01, 0.5, 3.0, 7.9], dtype=F64)
    solution = LiSSA(num_steps=25, scale=4.0).solve(diagonal(*entries.tolist()), torch.ones(4, dtype=F64))
    oracle = (1 - (1 - entries / 4.0) ** 26) / entries
    assert error(solution.value, oracle) <= 1e-13


def test_lissa_seed_decides_the_batches() -> None:
    operator = SYSTEMS[0].make()
    b = rhs(1, operator)[0]
    first, again, other = (LiSSA(num_steps=20, scale=12.0, batch_size=5, seed=seed).solve(operator, b) for seed in (1, 1, 2))
    assert torch.equal(first.value, again.value)
    assert error(first.value, other.value) > 1e-3


def test_lissa_chooses_its_scale() -> None:
    operator = SYSTEMS[0].make()
    top = float(torch.linalg.eigvalsh(matrix(operator))[-1])
    full = LiSSA(num_steps=10).solve(operator, rhs(1, operator))
    assert 0.9 * top <= full.stats["top_eigenvalue"] <= top * (1 + 1e-12)
    assert full.stats["scale"] == pytest.approx(1.25 * full.stats["top_eigenvalue"])
    assert full.num_products == 20 + 10 + 1
    # a batch has a larger top eigenvalue than the whole, and the choice must not move the batches of the recursion
    sampled = LiSSA(num_steps=10, batch_size=5, seed=3).solve(operator, rhs(1, operator)[0])
    assert sampled.stats["scale"] > full.stats["scale"]
    oracle = naive_lissa(operator, rhs(1, operator)[0], sampled.stats["scale"], 10, 1, 5, 3)
    assert error(sampled.value, oracle) <= 1e-12
    assert sampled.num_products == 100 + 10 + 1


def test_lissa_with_batches_nears_the_answer_as_repeats_are_averaged() -> None:
    operator = RootOperator(SYSTEMS[0].make().U, 5.0)
    b = rhs(1, operator)[0]
    one, many = (LiSSA(num_steps=60, num_repeats=r, batch_size=20, rtol=0.5).solve(operator, b) for r in (1, 64))
    assert one.status == many.status == [Status.CONVERGED]
    assert error(many.value, exact(operator, b)) < 0.5 * error(one.value, exact(operator, b))


def test_lissa_divergence_ends_only_the_column_it_concerns() -> None:
    operator = diagonal(1.0, 2.0, 5.0)
    B = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1e-6], [0.0, 1.0, 0.0]], dtype=F64)
    solution = LiSSA(num_steps=200, scale=2.0, on_failure="return").solve(operator, B)
    assert solution.status == [Status.TRUNCATED, Status.DIVERGED, Status.TRUNCATED]
    assert solution.stats["iterations"][1] < 20  # long before the residual is that of zero again
    assert error(solution.value[[0, 2]], exact(operator, B[[0, 2]])) <= 1e-12
    assert bool(solution.value.isfinite().all())
    with pytest.raises(SolverFailure, match=r"column 1 DIVERGED.*at most half the top eigenvalue.*Raise scale"):
        LiSSA(num_steps=200, scale=2.0).solve(operator, B)
    assert LiSSA(num_steps=200, scale=2.51).solve(operator, B).success


def test_lissa_at_its_rounding_level_has_not_diverged() -> None:
    reference = SYSTEMS[2].make()
    operator = RootOperator(reference.U.float(), reference.damping)
    top = float(torch.linalg.eigvalsh(matrix(operator))[-1])
    solution = LiSSA(num_steps=1500, scale=0.505 * top).solve(operator, rhs(6, operator))
    assert bool((solution.residual_norm <= 1e-4).all())


def test_lissa_divergence_with_batches() -> None:
    operator = SYSTEMS[0].make()
    solver = LiSSA(num_steps=500, scale=0.5, batch_size=5, num_repeats=2, on_failure="return")
    solution = solver.solve(operator, rhs(2, operator))
    assert solution.status == [Status.DIVERGED] * 2
    assert max(solution.stats["iterations"]) < 6
    assert bool(solution.value.isfinite().all())


def test_lissa_stops_at_its_tolerance() -> None:
    operator = SYSTEMS[0].make()
    B = rhs(3, operator)
    solution = LiSSA(num_steps=5000, rtol=1e-3).solve(operator, B)
    assert solution.converged
    assert bool((solution.residual_norm <= 1e-3).all())
    assert max(solution.stats["iterations"]) < 500
    assert solution.num_products == 20 + sum(solution.stats["iterations"]) + 3


def test_neumann_is_the_series() -> None:
    operator = SYSTEMS[0].make()
    A, b = matrix(operator), rhs(1, operator)[0]
    alpha = 0.9 / float(torch.linalg.eigvalsh(A)[-1])
    solution = Neumann(num_terms=12, scale=alpha).solve(operator, b)
    step = torch.eye(len(A), dtype=F64) - alpha * A
    oracle = alpha * sum(torch.linalg.matrix_power(step, k) @ b for k in range(13))
    assert error(solution.value, oracle) <= 1e-13
    assert solution.status == [Status.TRUNCATED]
    assert solution.stats["scale"] == pytest.approx(alpha)
    assert solution.num_products == 13
    top = float(torch.linalg.eigvalsh(A)[-1])
    assert Neumann().solve(operator, b).stats["scale"] == pytest.approx(0.8 / top, rel=0.1)


# Direct and Dual


class Counting(RootOperator):
    """Counts what a factorisation is made of, and keeps its Gram matrix as a real operator may."""

    assembled = 0
    grams = 0
    kept: Tensor | None = None

    def to_dense(self, block_size: int = 64) -> Tensor:
        self.assembled += 1
        return matrix(self)

    def root_gram(self) -> Tensor:
        self.grams += 1
        if self.kept is None:
            self.kept = super().root_gram()
        return self.kept


@pytest.mark.parametrize("solver", [Direct(), Dual(), Dual(spectral=True)], ids=["Direct", "Dual", "spectral"])
def test_one_factorisation_serves_every_right_hand_side(solver: Direct | Dual) -> None:
    operator = Counting(SYSTEMS[1].make().U, 0.2)
    factorisation = solver.factorise(operator)
    assert factorisation.status is Status.CONVERGED
    for key in ("first", "second"):
        B = rhs(5, operator, key)
        solution = factorisation.solve(B)
        assert error(solution.value, exact(operator, B)) <= 1e-11
        assert 5 <= solution.num_products <= 15
    assert operator.assembled + operator.grams == 1
    assert error(factorisation.solve(B[0]).value, exact(operator, B[0])) <= 1e-11
    solution = solver.solve(operator, B)
    assert solution.num_products >= factorisation.num_products + 5
    if isinstance(solver, Dual):
        assert torch.equal(operator.root_gram(), operator.U @ operator.U.T)
    assert repr(factorisation).startswith(type(factorisation).__name__ + "(")
    assert "tensor" not in repr(factorisation)


def test_one_eigendecomposition_serves_every_damping() -> None:
    operator = Counting(SYSTEMS[1].make().U, 0.2)
    B = rhs(4, operator)
    spectral = Dual(spectral=True).factorise(operator)
    for damping in (1e-4, 1e-2, 1.0, 100.0):
        factorisation = spectral.damped(damping)
        assert factorisation.damping == damping
        assert error(factorisation.solve(B).value, exact(RootOperator(operator.U, damping), B)) <= 1e-9
    assert operator.grams == 1
    assert spectral.damping == 0.2
    with pytest.raises(ArgumentError, match="expected a damping > 0, as the formula divides by it, got 0"):
        spectral.damped(0.0)
    with pytest.raises(ArgumentError, match=r"got a Cholesky factor, which belongs to one damping; make it with Dual\(spec"):
        Dual().factorise(operator).damped(1.0)


@pytest.mark.parametrize("spectral", [False, True])
def test_dual_undoes_the_cancellation_of_small_damping(spectral: bool) -> None:
    operator = SYSTEMS[2].make().damped(1e-5)  # 1e-7 of the top eigenvalue
    B = rhs(4, operator)
    solution = Dual(spectral=spectral).solve(operator, B)
    assert error(solution.value, exact(operator, B)) <= 1e-9
    assert bool((solution.residual_norm <= 1e-8).all())
    assert max(solution.stats["refinements"]) >= 1


def test_refinement_repairs_a_factor_of_lower_precision() -> None:
    operator = SYSTEMS[0].make()
    B = rhs(3, operator)
    factorisation = Dual().factorise(operator)
    rounded = dataclasses.replace(factorisation, factor=factorisation.factor.half().double())
    solution = rounded.solve(B)
    assert solution.converged
    assert error(solution.value, exact(operator, B)) <= 1e-11
    assert min(solution.stats["refinements"]) >= 2


@pytest.mark.parametrize("solver", [Direct(), Dual(), Dual(spectral=True)], ids=["Direct", "Dual", "spectral"])
def test_factorisations_in_float32(solver: Direct | Dual) -> None:
    operator = SYSTEMS[1].make().damped(1e-2)
    single = RootOperator(operator.U.float(), 1e-2)
    B = rhs(4, single)
    solution = solver.solve(single, B)
    assert solution.value.dtype == torch.float32
    assert solution.converged
    assert error(solution.value, exact(single, B)) <= 1e-4


def test_refinement_keeps_the_better_solution() -> None:
    operator = SYSTEMS[0].make()
    factorisation = Direct(on_failure="return").factorise(operator)
    wrong = dataclasses.replace(factorisation, factor=factorisation.factor / 2)  # x = 4 A⁻¹b, and refined −8 A⁻¹b
    solution = wrong.solve(rhs(2, operator))
    assert solution.status == [Status.STALLED] * 2
    assert solution.residual_norm.tolist() == pytest.approx([3.0, 3.0])
    assert error(solution.value, 4 * exact(operator, rhs(2, operator))) <= 1e-10


def test_direct_does_not_take_rounding_for_a_pivot() -> None:
    u = torch.tensor([1.9, 2.6], dtype=F64)
    A = torch.outer(u, u)
    assert torch.linalg.cholesky_ex(A).info == 0  # although the matrix has rank one
    assert Direct().factorise(DenseOperator(A)).status is Status.NOT_PSD


def test_factorisation_that_failed_says_so_before_and_at_the_solve() -> None:
    operator = diagonal(1.0, -1.0)
    factorisation = Direct(on_failure="return").factorise(operator)
    assert factorisation.status is Status.NOT_PSD
    solution = factorisation.solve(torch.ones(2, 2, dtype=F64))
    assert solution.status == [Status.NOT_PSD] * 2
    assert solution.residual_norm.tolist() == [1.0, 1.0]
    with pytest.raises(SolverFailure, match=r"Direct: .*NOT_PSD: The matrix is not positive definite.*Raise the damping"):
        Direct().factorise(operator).solve(torch.ones(2, dtype=F64))
