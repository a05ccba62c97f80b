"""What every solver shares: checks at the entry, the outcome per column, the true residual, the count of products."""

from __future__ import annotations

import abc
import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor

from influence_ext.checks import is_count, is_number, is_one_of, is_seed
from influence_ext.context import standalone
from influence_ext.errors import ArgumentError, DataError, DeviceError, DTypeError, ShapeError, SolverFailure
from influence_ext.operators.base import CurvatureOperator, LinearOperator

if TYPE_CHECKING:
    from influence_ext.graphs import RecordableProduct

OnFailure = Literal["raise", "return"]


class Status(enum.Enum):
    """How the solve of one right-hand side ended; ``explanation`` gives the cause and the remedy."""

    CONVERGED = "converged"
    TRUNCATED = "truncated"
    APPROXIMATE = "approximate"
    MAX_STEPS = "max_steps"
    STALLED = "stalled"
    BREAKDOWN = "breakdown"
    NON_FINITE = "non_finite"
    NOT_PSD = "not_psd"
    DIVERGED = "diverged"

    @property
    def success(self) -> bool:
        """Whether the solver did what it was asked to do: CONVERGED, or TRUNCATED or APPROXIMATE because no ``rtol`` was set."""
        return self in (Status.CONVERGED, Status.TRUNCATED, Status.APPROXIMATE)

    @property
    def explanation(self) -> str:
        """A paragraph for people: what happened, why, and what helps."""
        return _EXPLANATIONS[self]


_EXPLANATIONS = {
    Status.CONVERGED: (
        "The relative residual, recomputed from the operator, is at most rtol. There is nothing to do; the error "
        "of a score uᵀx is bounded by ‖u‖ ‖r‖ / damping."
    ),
    Status.TRUNCATED: (
        "The iteration ran the steps it was given, and no rtol was set to measure it by. Truncation acts as extra "
        "damping: look at residual_norm, and set rtol or more steps where it is too large."
    ),
    Status.APPROXIMATE: (
        "The inverse of an approximation of the matrix was applied, and no rtol was set to measure it by. Look at "
        "residual_norm, recomputed from the operator, and use the approximation as the preconditioner of CG where it "
        "is too large."
    ),
    Status.MAX_STEPS: (
        "The steps ran out before the residual reached rtol, because the matrix is too ill-conditioned for so "
        "few. Allow more steps, raise the damping or rtol, keep more past residuals (reorthogonalise), use a "
        "preconditioner, or solve exactly with Dual or Direct."
    ),
    Status.STALLED: (
        "The residual stopped falling above rtol: the solution is as precise as products rounded to this dtype "
        "allow on so ill-conditioned a matrix, or for EKFAC as its approximation is. Use float64, raise the damping "
        "or rtol, or go on from EKFAC with CG(preconditioner=EKFAC())."
    ),
    Status.BREAKDOWN: (
        "A residual has no positive length in the preconditioner, which is therefore not symmetric positive definite. "
        "Use another preconditioner or none, or in float32 one with more damping."
    ),
    Status.NON_FINITE: (
        "A product with the operator, or the solution itself, holds NaN or infinity although the right-hand side "
        "is finite. Check the model's parameters and data for overflow, and use float64 if they are merely large."
    ),
    Status.NOT_PSD: (
        "The matrix is not positive definite to working precision: it is singular (a Gauss-Newton matrix without "
        "damping usually is) or has negative eigenvalues (a Hessian away from a minimum). Raise the damping, use "
        "the Gauss-Newton matrix, or use float64."
    ),
    Status.DIVERGED: (
        "The iterates grew instead of settling: the scale is at most half the top eigenvalue of the matrix (for "
        "sampled batches, of the worst batch; Neumann's is at least 2 over it), or an eigenvalue is negative. Raise scale "
        "(lower that of Neumann) or leave it to be estimated, use larger batches, or use CG."
    ),
}


@dataclass(frozen=True, eq=False)
class Solution:
    """What a solve of ``A x = b`` reached, column by column (a column is one right-hand side, one row of ``B``).

    Attributes:
        value: ``[V, P]``, or ``[P]`` if the right-hand side was ``[P]``.
        status: One :class:`Status` per column, ``V`` of them.
        residual_norm: ``[V]``, ``‖b − A x‖ / ‖b‖`` recomputed from the operator; 0 where ``b = 0``.
        num_products: Applications of the operator counted per column (a block of V vectors counts V), checks and
            set-up included.
        stats: ``num_calls`` (block applications) and what the solver adds; lists have one entry per column.
    """

    value: Tensor
    status: list[Status]
    residual_norm: Tensor
    num_products: int
    stats: dict[str, Any] = field(default_factory=dict)

    @property
    def converged(self) -> bool:
        """Whether every column is CONVERGED: its recomputed residual met the tolerance."""
        return all(status is Status.CONVERGED for status in self.status)

    @property
    def success(self) -> bool:
        """Whether no column failed: each is CONVERGED, or TRUNCATED or APPROXIMATE on request."""
        return all(status.success for status in self.status)

    def __repr__(self) -> str:
        counts = {status: self.status.count(status) for status in Status if status in self.status}
        worst = f"{self.residual_norm.max().item():.2e}" if self.status else "-"
        listed = ", ".join(f"{status.name}: {count}" for status, count in counts.items())
        return f"Solution(value={list(self.value.shape)}, status={{{listed}}}, worst_residual={worst}, num_products={self.num_products})"


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a solver's own method returns for the ``V`` columns it was given; ``columns`` are per-column statistics."""

    value: Tensor
    status: list[Status]
    residual_norm: Tensor
    stats: dict[str, Any] = field(default_factory=dict)
    columns: dict[str, list[int]] = field(default_factory=dict)

    @classmethod
    def failed(cls, B: Tensor, status: Status, stats: dict[str, Any] | None = None, counts: tuple[str, ...] = ()) -> Outcome:
        """Nothing could be computed: ``x = 0`` with relative residual 1; ``counts`` names statistics to be 0."""
        num_columns = B.shape[0]
        columns = {name: [0] * num_columns for name in counts}
        return cls(torch.zeros_like(B), [status] * num_columns, B.new_ones(num_columns), stats or {}, columns)


class Counted(Protocol):
    """What has cost products."""

    @property
    def num_products(self) -> int:
        """Applications of the operator, a block of V vectors counting V."""

    @property
    def num_calls(self) -> int:
        """Block applications."""


class CountedOperator(LinearOperator):
    """The operator as one solve sees it: every application is counted, and a block without vectors costs nothing."""

    def __init__(self, operator: LinearOperator):
        self.operator = operator
        self.num_parameters = operator.num_parameters
        self.dtype = operator.dtype
        self.device = operator.device
        self.num_products = 0
        self.num_calls = 0

    @property
    def exact(self) -> CountedOperator:
        """The operator whose system is solved, counted apart; itself unless products are made at reduced precision."""
        exact = self.operator.exact
        return self if exact is self.operator else CountedOperator(exact)

    @property
    def lower_bound(self) -> float:
        """What no eigenvalue is below by the operator's construction: the damping of ``UᵀU + λI``, else 0 (nothing is known)."""
        return self.operator.damping if isinstance(self.operator, CurvatureOperator) else 0.0

    def _matmat(self, V: Tensor) -> Tensor:
        return self.apply(self.operator, V)

    def apply(self, operator: LinearOperator, V: Tensor) -> Tensor:
        """``operator.matmat(V)``, counted; ``operator`` is this one or a sample of it."""
        if V.shape[0] == 0:
            return torch.zeros_like(V)
        self.num_products += V.shape[0]
        self.num_calls += 1
        return operator.matmat(V).detach()

    def recordable(self) -> RecordableProduct | None:
        """Of the operator; what replays it calls :meth:`replayed`."""
        return self.operator.recordable()

    def product_operations(self, V: int) -> float:
        """Of the operator."""
        return self.operator.product_operations(V)

    def replayed(self, num_vectors: int, times: int) -> None:
        """Count products that were made by replays."""
        self.num_products += num_vectors * times
        self.num_calls += times

    def absorb(self, other: Counted) -> None:
        """Add what ``other`` has counted to one's own."""
        self.num_products += other.num_products
        self.num_calls += other.num_calls

    def to_dense(self, block_size: int = 64) -> Tensor:
        """``[P, P]``, counted as P products in one call, however the operator goes about it."""
        self.num_products += self.num_parameters
        self.num_calls += 1
        return self.operator.to_dense(block_size).detach()

    def diagonal(self) -> Tensor:
        """``[P]``; counted as P products unless the operator has a way of its own."""
        if type(self.operator).diagonal is LinearOperator.diagonal:
            return super().diagonal()
        return self.operator.diagonal().detach()

    def residual(self, X: Tensor, B: Tensor) -> Tensor:
        """``B − A X``, ``[V, P]``, in full precision whatever products are made at."""
        return B - self.apply(self.operator.exact, X)


def norm(X: Tensor) -> Tensor:
    """Euclidean norm of each row, ``[V, P] -> [V]``."""
    return torch.linalg.vector_norm(X, dim=1)


@dataclass(frozen=True)
class Solver(abc.ABC):
    """Solves ``A x = b`` for a symmetric positive definite operator and many right-hand sides.

    Attributes:
        on_failure: ``"raise"`` raises :class:`~influence_ext.errors.SolverFailure` when a column fails; ``"return"``
            hands the solution back.
    """

    on_failure: OnFailure = field(default="raise", kw_only=True)

    @property
    def _refines(self) -> bool:
        """Can it use products at reduced precision and still solve the exact system? Others are given the exact operator."""
        return False

    def __post_init__(self) -> None:
        self._require(is_one_of(self.on_failure, ("raise", "return")), "on_failure to be 'raise' or 'return'", self.on_failure)

    def solve(self, operator: LinearOperator, B: Tensor) -> Solution:
        """Solve for every row of ``B``.

        Args:
            operator: ``A``, symmetric positive definite.
            B: ``[V, P]`` or ``[P]``, finite, of the operator's dtype and device. Not modified.

        Returns:
            A :class:`Solution` whose value has the shape of ``B``.

        Raises:
            SolverFailure: a column failed and ``on_failure`` is ``"raise"``; its ``.solution`` holds every column.
            ShapeError: ``B`` has another shape.
            DTypeError: ``B`` has another dtype than the operator.
            DeviceError: ``B`` is on another device than the operator.
            DataError: ``B`` holds NaN or infinity.
            ArgumentError: the operator does not fit the solver.
        """
        return run(self, operator, B, self._solve)

    @property
    def name(self) -> str:
        """Who speaks in error messages."""
        return type(self).__name__

    @abc.abstractmethod
    def _solve(self, operator: CountedOperator, B: Tensor) -> Outcome:
        """Solve for ``B [V, P]``: finite, rows of magnitude 1 to 2, perhaps ``V = 0``; not to be modified."""

    def _require(self, condition: bool, expected: str, got: Any, fix: str = "") -> None:
        if not condition:
            raise ArgumentError(f"{self.name}: expected {expected}, got {got!r}{'; ' + fix if fix else ''}.")

    def _keep(self, name: str, value: Any) -> None:
        """Python's own number in place of one of NumPy, which would round or overflow in arithmetic with others."""
        object.__setattr__(self, name, value)

    def _require_count(self, name: str, value: int) -> None:
        self._require(is_count(value), f"{name} to be an integer of at least 1", value)
        self._keep(name, int(value))

    def _require_seed(self, value: int) -> None:
        self._require(is_seed(value), "seed to be a whole number of 64 bits", value)
        self._keep("seed", int(value))

    def _require_positive(self, name: str, value: float | None, fix: str = "") -> None:
        """``value`` may be None; otherwise it has to be a finite number above zero."""
        self._require(value is None or (is_number(value) and value > 0), f"{name} to be a finite number > 0", value, fix)
        self._keep(name, None if value is None else float(value))

    def _require_tolerance(self, rtol: float | None) -> None:
        fix = "the relative residual of x = 0 is 1, so useful values lie well below"
        self._require(rtol is None or (is_number(rtol) and 0 < rtol < 1), "rtol to be between 0 and 1", rtol, fix)
        self._keep("rtol", None if rtol is None else float(rtol))


def check_solver(solver: Any, who: str) -> None:
    """Refuse what is neither None nor one of this package's solvers.

    Raises:
        ArgumentError: the name of a solver, its class, or something else.
    """
    if solver is not None and not isinstance(solver, Solver):
        found = f"the class {solver.__name__}" if isinstance(solver, type) else repr(solver)
        raise ArgumentError(f"{who}: expected solver to be one of influence_ext.solvers, got {found}; pass an instance, for example CG().")


def check_operator(operator: Any, who: str) -> LinearOperator:
    """Refuse what is no operator.

    Raises:
        ArgumentError: a class, a network, a matrix.
    """
    if not isinstance(operator, LinearOperator):
        raise ArgumentError(
            f"{who}: expected a LinearOperator, got {type(operator).__name__}; pass a curvature such as GGN(model, loss, data)."
        )
    return operator


@standalone
def run(solver: Solver, operator: LinearOperator, B: Tensor, method: Callable[..., Outcome], x0: Tensor | None = None) -> Solution:
    """Check the input, call ``method(operator, B)`` (or ``B, x0``) on the non-zero rows, put the answer together.

    Each row is divided by the power of two below its largest entry, which loses no digit and keeps the squared norms of
    tiny or huge gradients inside the range of float32.
    """
    who = solver.name
    _check(who, "B", check_operator(operator, who), B)
    rows = B.detach().reshape(-1, operator.num_parameters)
    largest = rows.abs().amax(dim=1)
    nonzero = largest.nonzero().squeeze(1)
    scale = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent - 1)[nonzero, None]
    arguments = [rows[nonzero] / scale]
    if x0 is not None:
        _check(who, "x0", operator, x0, B.shape)
        arguments.append(x0.detach().reshape(rows.shape)[nonzero] / scale)
    counted = CountedOperator(operator if solver._refines else operator.exact)
    outcome = method(counted, *arguments)
    solution = _assemble(outcome, rows, nonzero, scale, counted, rank=B.dim())
    if solver.on_failure == "raise" and not solution.success:
        raise SolverFailure(_failure_message(who, solution), solution)
    return solution


def _check(who: str, name: str, operator: LinearOperator, B: Tensor, shape: torch.Size | None = None) -> None:
    P = operator.num_parameters
    if not isinstance(B, Tensor):
        raise DTypeError(f"{who}: expected {name} to be a tensor, got {type(B).__name__}; convert it with torch.as_tensor.")
    if shape is not None and B.shape != shape:
        raise ShapeError(f"{who}: expected {name} of the shape of B, {list(shape)}, got {list(B.shape)}.")
    if B.dim() not in (1, 2) or B.shape[-1] != P:
        fix = f"; vectors are rows, so pass {name}.T" if B.dim() == 2 and B.shape[0] == P else ""
        raise ShapeError(f"{who}: expected {name} of shape [P] or [V, P] with P = {P}, got {list(B.shape)}{fix}.")
    if B.dtype != operator.dtype:
        raise DTypeError(
            f"{who}: expected {name} of the operator's dtype {operator.dtype}, got {B.dtype}; convert it with {name}.to({operator.dtype})."
        )
    if B.device != operator.device:
        raise DeviceError(
            f"{who}: expected {name} on the operator's device {operator.device}, got {B.device}; "
            f"move it with {name}.to('{operator.device}')."
        )
    bad = (~B.detach().reshape(-1, P).isfinite().all(dim=1)).nonzero().squeeze(1).tolist()
    if bad:
        raise DataError(
            f"{who}: expected finite entries in {name}, got NaN or infinity in {_listing(bad)} (of {B.numel() // P}); "
            "check the gradients it was made of."
        )


def _assemble(outcome: Outcome, rows: Tensor, nonzero: Tensor, scale: Tensor, counted: CountedOperator, rank: int) -> Solution:
    num_columns = rows.shape[0]
    value = torch.zeros_like(rows)
    value[nonzero] = outcome.value * scale
    finite = value.isfinite().all(dim=1).tolist()
    residual_norm = rows.new_zeros(num_columns)
    residual_norm[nonzero] = outcome.residual_norm
    status = [Status.CONVERGED] * num_columns
    columns = {name: [0] * num_columns for name in outcome.columns}
    for position, column in enumerate(nonzero.tolist()):
        ended = outcome.status[position]
        status[column] = Status.NON_FINITE if ended.success and not finite[column] else ended
        for name, entries in outcome.columns.items():
            columns[name][column] = entries[position]
    return Solution(
        value=value if rank == 2 else value[0],
        status=status,
        residual_norm=residual_norm,
        num_products=counted.num_products,
        stats={"num_calls": counted.num_calls, **outcome.stats, **columns},
    )


def _failure_message(who: str, solution: Solution) -> str:
    failed = [column for column, status in enumerate(solution.status) if not status.success]
    iterations = solution.stats.get("iterations")
    shown = []
    for column in failed[:5]:
        steps = f" after {iterations[column]} steps" if iterations else ""
        residual = solution.residual_norm[column].item()
        shown.append(f"column {column} {solution.status[column].name}{steps}, relative residual {residual:.1e}")
    if len(failed) > len(shown):
        shown.append(f"and {len(failed) - len(shown)} more")
    causes = dict.fromkeys(solution.status[column] for column in failed)
    return (
        f"{who}: expected every column to be solved, got {len(failed)} of {len(solution.status)} failed "
        f"({'; '.join(shown)}). "
        + " ".join(f"{status.name}: {status.explanation}" for status in causes)
        + " The exception's .solution holds what was reached; on_failure='return' returns it instead."
    )


def _listing(numbers: list[int]) -> str:
    shown = ", ".join(str(number) for number in numbers[:5])
    return f"row{'s' if len(numbers) > 1 else ''} {shown}{', ...' if len(numbers) > 5 else ''}"
