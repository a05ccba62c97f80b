"""What the exact solvers share: one factorisation for all right-hand sides, refined against the operator."""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from influence_ext.context import standalone
from influence_ext.operators.base import LinearOperator
from influence_ext.solvers.base import CountedOperator, Outcome, Solution, Solver, Status, norm, run
from influence_ext.solvers.preconditioners import Inverse, Preconditioner


@dataclass(frozen=True)
class FactorisingSolver(Solver, Preconditioner):
    """A solver that does its work once per matrix; ``factorise`` gives that work to keep, ``solve`` uses it once.

    As a preconditioner, of CG or BlockCG, it makes sense where the factorisation is of another matrix or precision.

    Attributes:
        rtol: The recomputed relative residual that a column must meet; otherwise it is STALLED. ``None`` means the
            cube root of the dtype's ε, 6e-6 in float64 and 5e-3 in float32. Refinement does not stop there but goes on
            for as long as it helps: rounding alone leaves about ε times the condition number.
    """

    rtol: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_tolerance(self.rtol)

    @abc.abstractmethod
    def factorise(self, operator: LinearOperator) -> Factorisation:
        """Factorise once for many solves."""

    def _solve(self, operator: CountedOperator, B: Tensor) -> Outcome:
        factorisation = self.factorise(operator.operator)
        operator.absorb(factorisation)
        return factorisation.refined(operator, B)


@dataclass(frozen=True, eq=False, kw_only=True)
class Factorisation(Inverse):
    """A factorised matrix.

    Attributes:
        operator: The matrix; its products refine and check each solution.
        solver: The options it was made with.
        status: CONVERGED if the factorisation exists, otherwise why not (NOT_PSD, NON_FINITE); a solve then fails for
            every column.
        num_products: Operator applications the factorisation cost.
        num_calls: Block applications it cost.
    """

    operator: LinearOperator = field(repr=False)
    solver: FactorisingSolver

    max_refinements = 1

    @standalone
    def solve(self, B: Tensor) -> Solution:
        """As :meth:`Solver.solve` with the matrix at hand; counts only what this solve costs.

        Cost: one application of the factors and one product per column and round of refinement.
        """
        return run(self.solver, self.operator, B, self.refined)

    def judge(self, residual: float, dtype: torch.dtype) -> Status:
        """How a column ended that was brought to this relative residual."""
        if not math.isfinite(residual):
            return Status.NON_FINITE
        return Status.CONVERGED if residual <= (self.solver.rtol or torch.finfo(dtype).eps ** (1 / 3)) else Status.STALLED

    def refined(self, operator: CountedOperator, B: Tensor) -> Outcome:
        """``x ← x + A⁻¹(b − A x)`` for the columns it still improves by half, keeping the better of old and new."""
        num_columns = B.shape[0]
        if self.status is not Status.CONVERGED:
            return Outcome.failed(B, self.status, counts=("refinements",))
        eps = torch.finfo(B.dtype).eps
        enough = 8 * eps  # what is left below this is rounding of the residual itself
        refinements = [0] * num_columns
        B_norm = norm(B)
        X = self._inverse(B)
        R = operator.residual(X, B)
        R_norm = norm(R) / B_norm
        active = [column for column, residual in enumerate(R_norm.tolist()) if residual > enough]
        for _ in range(self.max_refinements):
            if not active:
                break
            X_new = X[active] + self._inverse(R[active])
            R_new = operator.residual(X_new, B[active])
            new, old = norm(R_new) / B_norm[active], R_norm[active]
            better = new < old
            X[active] = torch.where(better[:, None], X_new, X[active])
            R[active] = torch.where(better[:, None], R_new, R[active])
            R_norm[active] = torch.where(better, new, old)
            go_on = ((new <= old / 2) & (new > enough)).tolist()
            for column in active:
                refinements[column] += 1
            active = [column for column, useful in zip(active, go_on, strict=True) if useful]
        status = [self.judge(residual, B.dtype) for residual in R_norm.tolist()]
        return Outcome(X, status, R_norm, columns={"refinements": refinements})


def cholesky(A: Tensor, rounding: float = 0.0) -> tuple[Tensor, Status]:
    """The lower factor of ``A = L Lᵀ``, and NOT_PSD or NON_FINITE instead of CONVERGED where there is none.

    Pivots up to ``rounding`` times the largest diagonal entry count as zero.
    """
    if not bool(A.isfinite().all()):
        return A, Status.NON_FINITE
    if A.shape[0] == 0:
        return A, Status.CONVERGED
    factor, info = torch.linalg.cholesky_ex(A)
    definite = (info == 0) & (factor.diagonal().square().min() > rounding * A.diagonal().max())
    return factor, Status.CONVERGED if bool(definite) else Status.NOT_PSD
