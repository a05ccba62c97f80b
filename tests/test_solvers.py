"""Solvers against dense algebra in float64: values, outcome per column, counts, refusals."""

from __future__ import annotations

import dataclasses
import inspect
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import influence_ext.solvers as solvers
from influence_ext.errors import ArgumentError, DataError, DeviceError, DTypeError, ShapeError, SolverFailure
from influence_ext.operators.base import LinearOperator
from influence_ext.solvers import CG, BlockCG, Direct, Dual, LiSSA, Neumann, Nystrom, Solver, Status, auto, top_eigenvalue
from tests.cases import generator
from tests.cases.solvers import (
    SOLVERS,
    SYSTEMS,
    DenseOperator,
    RootOperator,
    SolverCase,
    SystemCase,
    diagonal,
    error,
    exact,
    matrix,
    rhs,
    rotated,
)

F64 = torch.float64
each_solver = pytest.mark.parametrize("case", SOLVERS, ids=lambda case: case.id)
each_system = pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system.id)


# every solver on every system


@each_solver
@each_system
def test_value_is_the_dense_solution(case: SolverCase, system: SystemCase) -> None:
    operator = system.make()
    B = rhs(4, operator)
    solution = case.make(operator).solve(operator, B)
    assert solution.status == [Status.CONVERGED] * 4
    assert solution.converged
    assert solution.success
    assert error(solution.value, exact(operator, B)) <= case.tolerance


@each_solver
@each_system
def test_residual_and_count_are_true(case: SolverCase, system: SystemCase) -> None:
    operator = system.make()
    B = rhs(4, operator)
    solution = case.make(operator).solve(operator, B)
    residual = (B - solution.value @ matrix(operator)).norm(dim=1) / B.norm(dim=1)
    assert solution.residual_norm.shape == (4,)
    assert torch.allclose(solution.residual_norm, residual, rtol=1e-3, atol=1e-13)
    assert solution.num_products == sum(operator.blocks)


@each_solver
@each_system
def test_columns_at_once_equal_single_columns(case: SolverCase, system: SystemCase) -> None:
    operator = system.make()
    B = rhs(3, operator)
    solver = case.make(operator)
    together = solver.solve(operator, B)
    for column in range(3):
        alone = solver.solve(operator, B[column])
        assert alone.value.shape == B[column].shape
        assert alone.status == [together.status[column]]
        assert alone.residual_norm.shape == (1,)
        assert error(alone.value, together.value[column]) <= 2 * case.tolerance
        if "iterations" in together.stats:  # rounding alone may move the last steps of CG
            steps, steps_alone = together.stats["iterations"][column], alone.stats["iterations"][0]
            if isinstance(solver, BlockCG):  # which is there to need fewer together
                assert steps <= steps_alone + 1
            else:
                assert abs(steps - steps_alone) <= 1 + steps // 10


@each_solver
def test_zero_columns_are_solved_by_zero(case: SolverCase) -> None:
    operator = SYSTEMS[0].make()
    B = rhs(3, operator)
    B[1] = 0
    solution = case.make(operator).solve(operator, B)
    assert solution.status == [Status.CONVERGED] * 2 + [solution.status[2]]
    assert torch.equal(solution.value[1], torch.zeros_like(B[1]))
    assert solution.residual_norm[1] == 0
    assert error(solution.value[[0, 2]], exact(operator, B[[0, 2]])) <= case.tolerance


@each_solver
def test_no_columns(case: SolverCase) -> None:
    operator = SYSTEMS[0].make()
    solution = case.make(operator).solve(operator, rhs(0, operator))
    assert solution.value.shape == (0, operator.num_parameters)
    assert solution.status == []
    assert solution.converged
    assert "worst_residual=-" in repr(solution)


@each_solver
def test_repeat_is_identical_and_leaves_no_trace(case: SolverCase) -> None:
    operator = SYSTEMS[1].make()
    wide = torch.randn(3, 2 * operator.num_parameters, dtype=F64, generator=generator("strided"))
    B = wide[:, ::2].requires_grad_()
    before, state = B.detach().clone(), torch.get_rng_state()
    solver = case.make(operator)
    first, second = solver.solve(operator, B), solver.solve(operator, B)
    assert torch.equal(first.value, second.value)
    assert not first.value.requires_grad
    assert torch.equal(B.detach(), before)
    assert torch.equal(torch.get_rng_state(), state)
    assert error(first.value, exact(operator, before)) <= case.tolerance


def loosened(solver: Solver, rtol: float) -> Solver:
    """The solver with a tolerance of at least ``rtol``, which float32 can give; itself where it has none."""
    own = getattr(solver, "rtol", None)
    return solver if own is None or own >= rtol else dataclasses.replace(solver, rtol=rtol)


@each_solver
@pytest.mark.parametrize("magnitude", [1e-30, 1e30], ids=["tiny", "huge"])
def test_float32_columns_whose_squares_leave_the_range(case: SolverCase, magnitude: float) -> None:
    reference = SYSTEMS[0].make()
    operator = RootOperator(reference.U.float(), reference.damping)
    solver = dataclasses.replace(auto(operator, 2)) if case.id == "AutoChoice" else case.make(operator)
    B = rhs(2, operator) * magnitude
    solution = loosened(solver, 1e-5).solve(operator, B)
    assert solution.converged
    assert error(solution.value, exact(operator, B)) <= 1e-3


@each_solver
def test_products_that_are_not_finite(case: SolverCase) -> None:
    broken = SYSTEMS[0].make()
    solver = dataclasses.replace(case.make(broken), on_failure="return")
    broken.U = broken.U.clone()
    broken.U[0, 0] = torch.nan
    if case.id == "AutoChoice":
        solver = auto(broken, 4, on_failure="return")
    solution = solver.solve(broken, rhs(2, broken))
    assert solution.status == [Status.NON_FINITE] * 2
    assert not solution.success


@each_solver
def test_solution_that_overflows(case: SolverCase) -> None:
    operator = RootOperator(torch.full((1, 3), 1e-3, dtype=torch.float32), 1e-2)
    solver = dataclasses.replace(case.make(operator), on_failure="return")
    B = torch.full((1, 3), 1e38)
    solution = loosened(solver, 1e-4).solve(operator, B)
    assert solution.status == [Status.NON_FINITE]


@each_solver
def test_repr_names_the_options(case: SolverCase) -> None:
    solver = case.make(SYSTEMS[0].make())
    assert repr(solver).startswith(type(solver).__name__ + "(")
    assert "on_failure='raise'" in repr(solver)


def test_every_exported_solver_has_a_row() -> None:
    classes = {value for value in vars(solvers).values() if isinstance(value, type) and issubclass(value, Solver)}
    exported = {value for value in classes if not inspect.isabstract(value)}
    operator = SYSTEMS[0].make()
    assert exported == {type(case.make(operator)) for case in SOLVERS}
    assert {value.__name__ for value in exported} <= set(solvers.__all__)


# bad input


@each_solver
@pytest.mark.parametrize(
    ("B", "kind", "text"),
    [
        (
            torch.zeros(2, 29, dtype=F64),
            ShapeError,
            r"expected B of shape \[P\] or \[V, P\] with P = 30, got \[2, 29\]",
        ),
        (torch.zeros(30, 2, dtype=F64), ShapeError, r"vectors are rows, so pass B.T"),
        (torch.zeros(1, 1, 30, dtype=F64), ShapeError, r"got \[1, 1, 30\]"),
        (
            torch.zeros(2, 30),
            DTypeError,
            r"dtype torch.float64, got torch.float32; convert it with B.to\(torch.float64\)",
        ),
        (
            torch.zeros(2, 30, dtype=F64, device="meta"),
            DeviceError,
            r"device cpu, got meta; move it with B.to\('cpu'\)",
        ),
        ([0.0] * 30, DTypeError, r"expected B to be a tensor, got list"),
        (torch.tensor([[0.0], [torch.nan], [-torch.inf]], dtype=F64).expand(3, 30), DataError, r"rows 1, 2 \(of 3\)"),
    ],
    ids=["length", "columns", "rank", "dtype", "device", "list", "nan"],
)
def test_bad_right_hand_sides(case: SolverCase, B: Any, kind: type[Exception], text: str) -> None:
    operator = SYSTEMS[0].make()
    solver = case.make(operator)
    name = "Direct" if case.id == "AutoChoice" else type(solver).__name__
    with pytest.raises(kind, match=f"^{name}: .*{text}"):
        solver.solve(operator, B)
    assert operator.blocks == []


@each_solver
def test_bad_operator(case: SolverCase) -> None:
    with pytest.raises(ArgumentError, match="expected a LinearOperator, got Tensor"):
        case.make(SYSTEMS[0].make()).solve(torch.eye(3), torch.ones(3))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: CG(rtol=0.0), "CG: expected rtol to be between 0 and 1, got 0.0"),
        (lambda: CG(rtol=-1e-3), "got -0.001"),
        (lambda: CG(rtol=math.nan), "got nan"),
        (lambda: CG(rtol=1.0), "the relative residual of x = 0 is 1"),
        (lambda: CG(max_steps=0), "CG: expected max_steps to be an integer of at least 1, got 0"),
        (lambda: CG(rtol=None, max_steps=None), "expected max_steps to be an integer of at least 1, got None"),
        (lambda: CG(preconditioner="ilu"), "expected preconditioner to be None, 'jacobi', a Preconditioner or a function"),
        (lambda: BlockCG(preconditioner=3), "BlockCG: expected preconditioner to be None, .* got 3"),
        (lambda: Neumann(num_terms=0), "Neumann: expected num_terms to be an integer of at least 1, got 0"),
        (lambda: Neumann(scale=-1.0), "Neumann: expected scale to be a finite number > 0, got -1.0"),
        (lambda: Nystrom(rank=0), "Nystrom: expected rank to be an integer of at least 1, got 0"),
        (lambda: CG(on_failure="ignore"), "CG: expected on_failure to be 'raise' or 'return', got 'ignore'"),
        (lambda: BlockCG(rtol=0.0), "BlockCG: expected rtol to be between 0 and 1, got 0.0"),
        (lambda: BlockCG(check_every=0), "expected check_every to be an integer of at least 1, got 0"),
        (lambda: LiSSA(num_steps=0), "LiSSA: expected num_steps to be an integer of at least 1, got 0"),
        (lambda: LiSSA(num_steps=1.5), "got 1.5"),
        (lambda: LiSSA(scale=0.0), "expected scale to be a finite number > 0, got 0.0; leave it None"),
        (lambda: LiSSA(scale=math.inf), "got inf"),
        (lambda: LiSSA(num_repeats=3), "expected num_repeats = 1 without batch_size.*got 3; set batch_size"),
        (lambda: LiSSA(num_repeats=0, batch_size=2), "expected num_repeats to be an integer of at least 1"),
        (lambda: LiSSA(batch_size=0), "expected batch_size to be an integer of at least 1, got 0"),
        (lambda: LiSSA(rtol=2.0), "LiSSA: expected rtol to be between 0 and 1, got 2.0"),
        (lambda: Direct(max_parameters=0), "Direct: expected max_parameters to be an integer of at least 1"),
        (lambda: Direct(rtol=0.0), "Direct: expected rtol to be between 0 and 1"),
        (lambda: Dual(max_roots=-1), "Dual: expected max_roots to be an integer of at least 1, got -1"),
        (lambda: auto(diagonal(1.0), 0), "auto: expected num_rhs, a whole number of at least 1, got 0"),
        (lambda: auto(diagonal(1.0), 2.5), "auto: expected num_rhs, a whole number of at least 1, got 2.5"),
        (lambda: auto(diagonal(1.0), "3"), "auto: expected num_rhs, a whole number of at least 1, got '3'"),
        (lambda: auto(torch.eye(2), 1), "auto: expected a LinearOperator, got Tensor"),
        (lambda: top_eigenvalue(diagonal(1.0), num_steps=0), "top_eigenvalue: expected num_steps of at least 1, got 0"),
    ],
)
def test_bad_options(make: Any, text: str) -> None:
    with pytest.raises(ArgumentError, match=text):
        make()


TWO_ROOTS = RootOperator(torch.ones(2, 10, dtype=F64), 1.0)


@pytest.mark.parametrize(
    ("solver", "operator", "text"),
    [
        (
            Direct(max_parameters=9),
            TWO_ROOTS,
            r"= 9 parameters, got 10, .* GiB; use Dual",
        ),
        (Dual(max_roots=1), TWO_ROOTS, r"= 1 roots .*, got 2, whose Gram matrix takes .* GiB; use CG"),
        (Dual(), TWO_ROOTS.damped(0.0), r"expected a damping > 0, as the formula divides by it, got 0.0; give the operator"),
        (Dual(spectral=True), TWO_ROOTS.damped(-1.0), r"expected damping >= 0 and finite, got -1.0"),
        (Dual(), diagonal(*[1.0] * 10), r"expected a CurvatureOperator, .* got DenseOperator; use CG or Direct"),
        (
            LiSSA(batch_size=2),
            diagonal(*[1.0] * 10),
            r"sample\(generator, batch_size\), as batch_size = 2, got DenseOperator",
        ),
    ],
)
def test_operator_that_does_not_fit(solver: Solver, operator: LinearOperator, text: str) -> None:
    with pytest.raises(ArgumentError, match=text):
        solver.solve(operator, torch.ones(10, dtype=F64))


# outcomes


@pytest.mark.parametrize("status", Status)
def test_every_status_explains_itself(status: Status) -> None:
    cause, remedy = status.explanation.split(". ", 1)
    assert len(cause) > 40
    assert len(remedy) > 20
    assert status.success == (status in (Status.CONVERGED, Status.TRUNCATED, Status.APPROXIMATE))


INDEFINITE = (1.0, -0.5, 2.0)
SINGULAR = (1.0, 0.0, 2.0)
STEEP = tuple(10.0**k for k in range(-5, 6))


@pytest.mark.parametrize(
    ("solver", "operator", "status"),
    [
        (CG(), diagonal(*INDEFINITE), Status.NOT_PSD),
        (CG(), diagonal(*SINGULAR), Status.NOT_PSD),
        (CG(), diagonal(0.0, 0.0), Status.NOT_PSD),
        (CG(preconditioner="jacobi"), diagonal(*INDEFINITE), Status.NOT_PSD),
        (CG(preconditioner="jacobi"), diagonal(*SINGULAR), Status.NOT_PSD),
        (CG(max_steps=3), diagonal(*STEEP), Status.MAX_STEPS),
        (CG(preconditioner=torch.neg), diagonal(1.0, 2.0), Status.BREAKDOWN),
        (CG(rtol=1e-15, max_steps=5000), DenseOperator(rotated(torch.logspace(0, 7, 40, dtype=F64), "steep")), Status.STALLED),
        (CG(preconditioner=lambda R: R * torch.nan), diagonal(1.0, 2.0), Status.NON_FINITE),
        (CG(rtol=None, max_steps=2), diagonal(*STEEP), Status.TRUNCATED),
        (BlockCG(), diagonal(*INDEFINITE), Status.NOT_PSD),
        (BlockCG(), diagonal(*SINGULAR), Status.NOT_PSD),
        (BlockCG(), diagonal(0.0, 0.0), Status.NOT_PSD),
        (BlockCG(preconditioner="jacobi"), diagonal(*INDEFINITE), Status.NOT_PSD),
        (BlockCG(preconditioner=torch.neg), diagonal(1.0, 2.0), Status.BREAKDOWN),
        (CG(preconditioner=Nystrom(3)), diagonal(*INDEFINITE), Status.NOT_PSD),
        (BlockCG(preconditioner=Nystrom(3)), diagonal(*INDEFINITE), Status.NOT_PSD),
        (BlockCG(max_steps=3), diagonal(*STEEP), Status.MAX_STEPS),
        (BlockCG(rtol=1e-15), DenseOperator(rotated(torch.logspace(0, 7, 40, dtype=F64), "steep")), Status.STALLED),
        (LiSSA(num_steps=5), diagonal(*STEEP), Status.TRUNCATED),
        (LiSSA(num_steps=5, rtol=1e-3), diagonal(*STEEP), Status.MAX_STEPS),
        (LiSSA(num_steps=50, scale=1.0), diagonal(3.0, 1.0), Status.DIVERGED),
        (LiSSA(num_steps=50), diagonal(*INDEFINITE), Status.DIVERGED),
        (LiSSA(), diagonal(0.0, 0.0), Status.NOT_PSD),
        (Neumann(num_terms=50, scale=1.0), diagonal(3.0, 1.0), Status.DIVERGED),
        (LiSSA(num_steps=400, scale=1e-300), diagonal(1e100, 1.0), Status.NON_FINITE),
        (Direct(), diagonal(*INDEFINITE), Status.NOT_PSD),
        (Direct(), diagonal(*SINGULAR), Status.NOT_PSD),
        (Direct(rtol=1e-15), DenseOperator(rotated(torch.logspace(0, 7, 40, dtype=F64), "steep")), Status.STALLED),
    ],
)
def test_each_failure_is_named(solver: Solver, operator: DenseOperator, status: Status) -> None:
    B = torch.ones(2, operator.num_parameters, dtype=F64)
    B[0, 0] = 0.5
    solution = dataclasses.replace(solver, on_failure="return").solve(operator, B)
    assert solution.status == [status] * 2
    residual = (B - solution.value @ operator.A).norm(dim=1) / B.norm(dim=1)
    if status is not Status.NON_FINITE:
        assert torch.allclose(solution.residual_norm, residual, rtol=1e-3, atol=1e-12)
    assert not solution.converged
    if status is Status.TRUNCATED:
        assert solver.solve(operator, B).success
        return
    with pytest.raises(SolverFailure, match=rf"2 of 2 failed \(column 0 {status.name}.*: ") as caught:
        solver.solve(operator, B)
    assert status.explanation in str(caught.value)
    assert caught.value.solution.status == solution.status


def test_failure_names_the_failed_columns_only() -> None:
    operator = diagonal(*STEEP)
    B = torch.eye(11, dtype=F64)[:3].repeat(3, 1)
    B[1::3] = 1
    with pytest.raises(SolverFailure) as caught:
        CG(max_steps=2).solve(operator, B)
    text = str(caught.value)
    assert text.startswith("CG: expected every column to be solved, got 3 of 9 failed (column 1 MAX_STEPS after 2 steps, ")
    assert "column 4" in text
    assert "column 7" in text
    assert "column 0" not in text
    assert "on_failure='return'" in text
    solution = caught.value.solution
    assert [status is Status.MAX_STEPS for status in solution.status] == [k % 3 == 1 for k in range(9)]
    assert torch.allclose(solution.value[[0, 2]], exact(operator, B[[0, 2]]))
    assert "status={CONVERGED: 6, MAX_STEPS: 3}" in repr(solution)
    with pytest.raises(SolverFailure, match="; and 4 more"):
        CG(max_steps=2).solve(operator, torch.ones(9, 11, dtype=F64))


@pytest.mark.parametrize("solver", [CG(max_steps=20_000), BlockCG(max_steps=20_000)], ids=["CG", "BlockCG"])
@pytest.mark.parametrize("damping", [1e-3, 1e-5, 1e-7])
def test_float32_with_little_damping_is_solved_as_far_as_its_products_go(solver: CG | BlockCG, damping: float) -> None:
    # a top eigenvalue of about 1: the damping goes down to the rounding of the products
    U = torch.randn(60, 200, dtype=F64, generator=generator("small damping")) * torch.logspace(0, -3, 60, dtype=F64)[:, None] / 20
    operator = RootOperator(U.float(), damping)
    B = rhs(4, operator)
    solution = dataclasses.replace(solver, rtol=1e-6, on_failure="return").solve(operator, B)
    assert set(solution.status) <= {Status.CONVERGED, Status.STALLED}
    top = float(torch.linalg.eigvalsh(matrix(operator))[-1])
    # what rounding x and one product may change the residual by
    attainable = 4 * torch.finfo(torch.float32).eps * (1 + top * solution.value.norm(dim=1) / B.norm(dim=1))
    residual = (B.double() - solution.value.double() @ matrix(operator)).norm(dim=1) / B.norm(dim=1)
    assert bool((residual <= torch.maximum(torch.tensor(2e-6), attainable)).all())


def test_a_matrix_that_claims_to_be_definite_and_is_not() -> None:
    class Wrong(RootOperator):
        def _matmat(self, V: Tensor) -> Tensor:
            return V * torch.tensor([1.0, -0.5, 2.0], dtype=F64)

    operator = Wrong(torch.ones(1, 3, dtype=F64), 0.1)
    for solver in (CG(on_failure="return"), BlockCG(on_failure="return")):
        assert solver.solve(operator, torch.ones(3, dtype=F64)).status == [Status.NOT_PSD]
