"""Conjugate gradients, one recurrence per right-hand side, one block product per step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from influence_ext.errors import ShapeError
from influence_ext.operators.base import LinearOperator
from influence_ext.solvers.base import CountedOperator, Outcome, Solution, Solver, Status, norm, run
from influence_ext.solvers.refinement import refined

Preconditioner = Callable[[Tensor], Tensor]

MAX_RESTARTS = 3
"""How often a column whose recurrence says "converged" starts again from its true residual."""


@dataclass(frozen=True)
class CG(Solver):
    """Conjugate gradients with stopping per column.

    ``x += α p,  r −= α A p,  α = rᵀM⁻¹r / pᵀA p,  p ← M⁻¹r + β p`` for each column by itself; all columns still
    running share one call of ``operator.matmat`` a step, and a finished column takes no further part. When the
    recurrence says that a column has converged, its true residual is computed; where rounding has let the two drift
    apart, the column starts again from the true residual, at most three times and only while that at least halves it,
    and is a BREAKDOWN after that.

    A direction with ``pᵀA p ≤ ε ‖A‖ ‖p‖²`` (ε of the dtype, ``‖A‖`` as far as seen) ends its column as NOT_PSD.

    On an operator at reduced precision it solves the exact system by cheap steps and a few exact products
    (``solvers/refinement.py``); statistics are then also ``replacements`` per column and ``exact_products``.

    Attributes:
        rtol: Stop a column when ``‖b − A x‖ ≤ rtol ‖b‖``. ``None`` runs ``max_steps`` steps (truncated CG; the status
            is TRUNCATED).
        max_steps: Steps a column may take, restarts included.
        preconditioner: ``M⁻¹`` as a function ``[A, P] -> [A, P]`` that treats rows independently (``A ≤ V`` columns
            are still running) and is symmetric positive definite; or ``"jacobi"`` for the inverse of
            ``operator.diagonal()``.

    Statistics: ``iterations`` and ``restarts`` per column.

    Raises:
        ArgumentError: an option makes no sense.

    Cost: per step one product for each running column, at most one host synchronisation; six ``[V, P]`` buffers, one
    more with a preconditioner; one product per column to verify.

    Reference: Hestenes and Stiefel, "Methods of conjugate gradients for solving linear systems" (1952).
    """

    rtol: float | None = 1e-5
    max_steps: int = 1000
    preconditioner: Preconditioner | Literal["jacobi"] | None = None

    _refines: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_tolerance(self.rtol)
        self._require_count("max_steps", self.max_steps)
        known = self.preconditioner is None or self.preconditioner == "jacobi" or callable(self.preconditioner)
        self._require(known, "preconditioner to be None, 'jacobi' or a function [V, P] -> [V, P]", self.preconditioner)

    def solve(self, operator: LinearOperator, B: Tensor, x0: Tensor | None = None) -> Solution:
        """As :meth:`Solver.solve`, from ``x0`` of the shape of ``B`` (default: zero); one more product per column."""
        return run(self, operator, B, self._solve, x0)

    def _solve(self, operator: CountedOperator, B: Tensor, x0: Tensor | None = None) -> Outcome:
        num_columns = B.shape[0]
        precondition = self._preconditioner(operator)
        iterations, restarts = [0] * num_columns, [0] * num_columns
        if isinstance(precondition, Status):
            return Outcome.failed(B, precondition, counts=("iterations", "restarts"))
        if operator.exact is not operator:
            return refined(self, operator, precondition, B, x0)
        B_norm = norm(B)
        # without a tolerance, steps below the rounding level of b would only divide zero by zero
        target = (self.rtol or torch.finfo(B.dtype).eps) * B_norm
        X = torch.zeros_like(B) if x0 is None else x0.clone()
        R = B if x0 is None else operator.residual(X, B)
        R_norm = norm(R)
        status = [Status.MAX_STEPS] * num_columns
        pending = list(range(num_columns))
        for attempt in range(MAX_RESTARTS + 1):
            index = torch.tensor(pending, dtype=torch.long, device=B.device)
            budget = [self.max_steps - iterations[column] for column in pending]
            descent = _Descent(operator, precondition, X[index], R[index], target[index], budget)
            ended = descent.run()
            R_new = operator.residual(descent.X, B[index])
            R_new_norm, old = norm(R_new), R_norm[index]
            finite = R_new_norm.isfinite()
            # CG lowers the energy error at every step, the residual not always; a restart is there for the residual
            better = finite if attempt == 0 else R_new_norm < old
            X[index] = torch.where(better[:, None], descent.X, X[index])
            R_norm[index] = torch.where(better, R_new_norm, old)
            facts = torch.stack([finite, R_new_norm <= target[index], R_new_norm <= old / 2]).T.tolist()
            again = []
            for position, (column, (usable, reached, halved)) in enumerate(zip(pending, facts, strict=True)):
                iterations[column] += descent.steps[position]
                status[column] = ended[position]
                if ended[position] not in (Status.CONVERGED, Status.MAX_STEPS):
                    continue
                if not usable:
                    status[column] = Status.NON_FINITE
                elif self.rtol is None:
                    status[column] = Status.TRUNCATED
                elif reached:
                    status[column] = Status.CONVERGED
                elif ended[position] is Status.CONVERGED:
                    status[column] = Status.BREAKDOWN
                    if halved and attempt < MAX_RESTARTS:
                        again.append(position)
                        restarts[column] += 1
            if not again:
                break
            pending = [pending[position] for position in again]
            R = torch.zeros_like(B).index_copy_(0, index[again], R_new[again])
        return Outcome(X, status, R_norm / B_norm, columns={"iterations": iterations, "restarts": restarts})

    def _preconditioner(self, operator: CountedOperator) -> Preconditioner | Status:
        """``M⁻¹`` as a function, or what the diagonal proves to be wrong with ``A``."""
        if self.preconditioner is None:
            return lambda R: R
        if self.preconditioner == "jacobi":
            diagonal = operator.diagonal()
            if not bool(diagonal.isfinite().all()):
                return Status.NON_FINITE
            if not bool((diagonal > 0).all()):
                return Status.NOT_PSD
            return lambda R: R / diagonal
        custom = self.preconditioner

        def checked(R: Tensor) -> Tensor:
            Z = custom(R)
            if not isinstance(Z, Tensor) or Z.shape != R.shape or Z.dtype != R.dtype:
                got = f"{list(Z.shape)} of {Z.dtype}" if isinstance(Z, Tensor) else type(Z).__name__
                raise ShapeError(
                    "CG: expected the preconditioner to return a tensor like its argument, "
                    f"{list(R.shape)} of {R.dtype}, got {got}; "
                    "the rows are the columns still running, not all V."
                )
            return Z.detach()

        return checked


class _Descent:
    """One run of the recurrence from ``X`` with residual ``R``, both overwritten: ``X`` by where each column ended."""

    def __init__(
        self,
        operator: CountedOperator,
        precondition: Preconditioner,
        X: Tensor,
        R: Tensor,
        target: Tensor,
        budget: list[int],
    ):
        self.operator = operator
        self.precondition = precondition
        self.X = X
        self.R = R
        self.target = target
        self.budget = budget
        self.steps = [0] * len(budget)
        self.ended = [Status.MAX_STEPS] * len(budget)

    def run(self) -> list[Status]:
        """Iterate until every column has ended, and say how."""
        eps = torch.finfo(self.X.dtype).eps
        columns, x, r, target = self._start()
        p = torch.empty_like(r)
        rz = top = torch.zeros_like(target)
        for step in range(1, max(self.budget, default=0) + 1):
            if not columns:
                break
            z = self.precondition(r)
            rz_new = torch.linalg.vecdot(r, z)
            p = z.clone() if step == 1 else torch.addcmul(z, p, (rz_new / rz)[:, None])
            rz = rz_new
            q = self.operator.matmat(p)
            curvature = torch.linalg.vecdot(p, q)
            p_squared = torch.linalg.vecdot(p, p)
            top = torch.maximum(top, curvature / p_squared)
            floor = eps * top * p_squared
            # a column that breaks down keeps the x it had: α = 0 there, also where a comparison meets NaN
            alpha = torch.where(curvature > floor, rz / curvature, 0.0)[:, None]
            x.addcmul_(p, alpha)
            r.addcmul_(q, alpha, value=-1.0)
            keep = self._sort_out(columns, step, torch.stack([norm(r), target, curvature, floor, rz]).tolist())
            if len(keep) < len(columns):
                if x is not self.X:  # as long as every column is running, the two are one
                    self.X[columns] = x
                columns = [columns[k] for k in keep]
                x, r, p, target, rz, top = x[keep], r[keep], p[keep], target[keep], rz[keep], top[keep]
        return self.ended

    def _start(self) -> tuple[list[int], Tensor, Tensor, Tensor]:
        """The columns that rows of x, r, p stand for: all but those that a warm start has already solved."""
        columns = []
        for column, done in enumerate((norm(self.R) <= self.target).tolist()):
            if done:
                self.ended[column] = Status.CONVERGED
            elif self.budget[column] > 0:
                columns.append(column)
        if len(columns) == len(self.budget):
            return columns, self.X, self.R, self.target
        return columns, self.X[columns], self.R[columns], self.target[columns]

    def _sort_out(self, columns: list[int], step: int, table: list[list[float]]) -> list[int]:
        """Record which columns ended with this step; the positions of the others."""
        keep = []
        for k, (column, r_norm, target, curvature, floor, rz) in enumerate(zip(columns, *table, strict=True)):
            self.steps[column] = step
            if not (abs(r_norm) < float("inf") and abs(curvature) < float("inf")):
                self.ended[column] = Status.NON_FINITE
            elif rz <= 0:
                self.ended[column] = Status.BREAKDOWN
            elif curvature <= floor:
                self.ended[column] = Status.NOT_PSD
            elif r_norm <= target:
                self.ended[column] = Status.CONVERGED
            elif step == self.budget[column]:
                self.ended[column] = Status.MAX_STEPS
            else:
                keep.append(k)
        return keep
