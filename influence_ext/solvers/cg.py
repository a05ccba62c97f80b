"""Conjugate gradients, one recurrence per right-hand side, one block product per step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from influence_ext.krylov import CGVectors
from influence_ext.solvers.base import CountedOperator, Outcome, Status, norm
from influence_ext.solvers.past import Past, worth_keeping
from influence_ext.solvers.preconditioners import InverseFunction, PreconditionedSolver, Preconditioner, inverse_of
from influence_ext.solvers.refinement import refined

CHECK_EVERY_ON_A_DEVICE = 8
"""Steps of CG between two looks that wait for a device."""


@dataclass(frozen=True)
class CG(PreconditionedSolver):
    """Conjugate gradients with stopping per column.

    ``x += α p,  r −= α A p,  α = rᵀM⁻¹r / pᵀA p,  p ← M⁻¹r + β p`` for each column by itself; all columns still
    running share one call of ``operator.matmat`` a step, and a finished column takes no further part.

    The recurrence's residual and the true one drift apart by rounding. When the recurrence says that a column has converged,
    its true residual is computed; if that is above the tolerance, the column starts again from it, with a correction that is
    summed up by itself and added to x once, for as long as that at least halves the residual. What cannot be halved any more
    is as precise as products in this dtype allow: STALLED, with the residual attained. Inner products are summed in float64.

    A direction with ``pᵀA p ≤ ε ‖A‖ ‖p‖²`` (ε of the dtype, ``‖A‖`` as far as seen) ends its column as NOT_PSD. A matrix that
    is positive definite by construction, ``UᵀU + λI`` with λ > 0, has ``pᵀA p ≥ λ ‖p‖²``: half of that tells that rounding has
    taken over, and the column goes on from its true residual.

    On an operator at reduced precision it solves the exact system by cheap steps and a few exact products
    (``solvers/refinement.py``), looking at every step and summing in the operator's dtype; statistics are then also
    ``replacements`` per column and ``exact_products``.

    Attributes:
        rtol: Stop a column when ``‖b − A x‖ ≤ rtol ‖b‖``. ``None`` runs ``max_steps`` steps (truncated CG; the status
            is TRUNCATED).
        max_steps: Steps a column may take, restarts included.
        preconditioner: :class:`Jacobi` (or ``"jacobi"``), :class:`Nystrom`, :class:`EKFAC` or another, made for the operator at
            each solve; what its ``factorise`` returned, made once for many solves; or any function ``M⁻¹``,
            ``[A, P] -> [A, P]``, that treats rows independently (``A ≤ V`` columns are still running) and is symmetric
            positive definite.
        check_every: Steps between two looks at which columns have ended. A look waits for the device and takes ended columns out
            of the products; until then they stand still, so solutions, statuses and iterations are the same, and up to
            ``check_every − 1`` products a column are spent on nothing. ``None``: 1 on the CPU, where a look costs nothing, 8 on a
            device.
        reorthogonalise: Past residuals that are kept for each column, and to which every later residual is made orthogonal again.
            Rounding loses that orthogonality towards the large eigenvalues, which are then found again and again: on trained networks
            at λ of 1e-3 to 1e-5 a half to nine tenths of the steps, in float32 more than in float64. 0 keeps none, more than the steps
            that are taken makes no difference. ``None``: as many as fit into 256 MiB and take no longer than the product, by counted
            arithmetic; none on a device, where steps with a past cannot be recorded. Cheap steps at reduced precision keep none.

    Statistics: ``iterations`` and ``restarts`` per column.

    Raises:
        ArgumentError: an option makes no sense.

    Cost: per step one product for each running column and three fused passes over the vectors, whose scalars stay on their
    device; a host synchronisation every ``check_every`` steps; six ``[V, P]`` buffers, one more with a preconditioner; one
    product per column to verify. ``reorthogonalise = m``: up to m vectors a column, 2 m with a preconditioner, and 4 m P operations
    a column and step, which are bound by memory.

    Reference: Hestenes and Stiefel, "Methods of conjugate gradients for solving linear systems" (1952).
    """

    rtol: float | None = 1e-5
    max_steps: int = 1000
    preconditioner: Preconditioner | InverseFunction | Literal["jacobi"] | None = None
    check_every: int | None = None
    reorthogonalise: int | None = None

    @property
    def _refines(self) -> bool:
        """Can it use products at reduced precision and still solve the exact system? Others are given the exact operator."""
        return True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_tolerance(self.rtol)
        self._require_count("max_steps", self.max_steps)
        if self.check_every is not None:
            self._require_count("check_every", self.check_every)
        self._require_kept(self.reorthogonalise)

    def _solve(self, operator: CountedOperator, B: Tensor, x0: Tensor | None = None, spent: Sequence[int] | None = None) -> Outcome:
        """``spent``: steps that each column has taken already, of ``max_steps``."""
        num_columns = B.shape[0]
        precondition = None if self.preconditioner is None else inverse_of(self.preconditioner, operator, self.name)
        iterations, restarts = [0] * num_columns if spent is None else list(spent), [0] * num_columns
        if isinstance(precondition, Status):
            return Outcome.failed(B, precondition, counts=("iterations", "restarts"))
        if operator.exact is not operator:
            return refined(self, operator, precondition, B, x0)
        check_every = self.check_every or (1 if B.is_cpu else CHECK_EVERY_ON_A_DEVICE)
        B_norm = norm(B)
        # without a tolerance, steps below the rounding level of b would only divide zero by zero
        target = (self.rtol or torch.finfo(B.dtype).eps) * B_norm
        X = torch.zeros_like(B) if x0 is None else x0.clone()
        R = B if x0 is None else operator.residual(X, B)
        R_norm = norm(R)
        status = [Status.MAX_STEPS] * num_columns
        vectors = 1 if precondition is None else 2
        kept = worth_keeping(operator, num_columns, False, vectors=vectors) if self.reorthogonalise is None else self.reorthogonalise
        pending, first = list(range(num_columns)), True
        while first or pending:
            index = torch.tensor(pending, dtype=torch.long, device=B.device)
            budget = [self.max_steps - iterations[column] for column in pending]
            # close above its tolerance a residual has no room to halve, and rounding would take what the recurrence reaches just so
            goal = target if first else torch.minimum(target / 2, R_norm / 4)
            descent = _Descent(operator, precondition, R[index], goal[index], budget, check_every, kept)
            ended = descent.run()
            X_new = X[index] + descent.change
            R_new = operator.residual(X_new, B[index])
            R_new_norm, old = norm(R_new), R_norm[index]
            finite = R_new_norm.isfinite()
            # CG lowers the energy error at every step, the residual not always; a restart is there for the residual
            better = finite if first else R_new_norm < old
            X[index] = torch.where(better[:, None], X_new, X[index])
            R_norm[index] = torch.where(better, R_new_norm, old)
            facts = torch.stack([finite, R_new_norm <= target[index], R_new_norm <= old / 2]).T.tolist()
            again = []
            for position, (column, (usable, reached, halved)) in enumerate(zip(pending, facts, strict=True)):
                iterations[column] += descent.steps[position]
                status[column] = ended[position]
                if usable and reached and self.rtol is not None:
                    status[column] = Status.CONVERGED
                    continue
                if ended[position] not in (Status.CONVERGED, Status.MAX_STEPS, Status.STALLED):
                    continue
                if not usable:
                    status[column] = Status.NON_FINITE
                elif self.rtol is None:
                    status[column] = Status.TRUNCATED
                elif ended[position] is not Status.MAX_STEPS:
                    status[column] = Status.STALLED
                    if halved:
                        again.append(position)
                        restarts[column] += 1
            R = torch.zeros_like(B).index_copy_(0, index[again], R_new[again])
            pending, first = [pending[position] for position in again], False
        return Outcome(X, status, R_norm / B_norm, columns={"iterations": iterations, "restarts": restarts})


class _Descent:
    """One run of the recurrence from residuals ``R``, overwritten; ``change`` is by how much each column's x moved."""

    def __init__(
        self,
        operator: CountedOperator,
        precondition: InverseFunction | None,
        R: Tensor,
        target: Tensor,
        budget: list[int],
        check_every: int,
        kept: int,
    ):
        self.operator = operator
        self.precondition = precondition
        self.vectors = CGVectors(R, target, budget, operator.lower_bound)
        self.product = None if kept else operator.recordable()  # a recorded step has no past
        self.pasts = [Past(kept) for _ in budget] if kept else []
        self.change = self.vectors.x
        self.check_every = check_every
        self.max_steps = max(budget, default=0)
        self.steps = [0] * len(budget)
        self.ended = [Status.MAX_STEPS] * len(budget)

    def run(self) -> list[Status]:
        """Iterate until every column has ended, and say how."""
        columns = self._sort_out(list(range(len(self.ended))))
        step = 0
        while columns and step < self.max_steps:
            step += self._advance(min(self.check_every - step % self.check_every, self.max_steps - step))
            if step % self.check_every == 0 or step == self.max_steps:
                columns = self._sort_out(columns)
        return self.ended

    def _advance(self, most: int) -> int:
        """Take a step, or up to ``most`` of them by replays; how many."""
        vectors = self.vectors
        z = None if self.precondition is None else self.precondition(vectors.r)
        times = most if z is None else 1
        if self.product is not None and vectors.replay(self.product, z, times):
            self.operator.replayed(len(vectors.x), times)
            return times
        p = vectors.direction(z)
        if self.pasts:
            scale = vectors.squares().rsqrt().to(p.dtype)
            for k, past in enumerate(self.pasts):
                past.add(vectors.r[k] * scale[k], None if z is None else z[k] * scale[k])
        vectors.step(self.operator.matmat(p))
        if self.pasts:
            vectors.replace_residuals(torch.stack([past.removed_from(r) for past, r in zip(self.pasts, vectors.r, strict=True)]))
        return 1

    def _sort_out(self, columns: list[int]) -> list[int]:
        """Record which columns have ended; the others go on."""
        keep = []
        for k, (column, (end, steps)) in enumerate(zip(columns, self.vectors.look(), strict=True)):
            self.steps[column] = steps
            if end == "running":
                keep.append(k)
            else:
                self.ended[column] = Status(end)
        if len(keep) < len(columns):
            if self.vectors.x is not self.change:  # as long as every column is running, the two are one
                self.change[columns] = self.vectors.x
            self.vectors.select(keep)
            self.pasts = [self.pasts[k] for k in keep] if self.pasts else []
        return [columns[k] for k in keep]
