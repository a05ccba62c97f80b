"""Block conjugate gradients: all right-hand sides search the sum of their Krylov spaces."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from influence_ext.solvers.base import CountedOperator, Outcome, Status, norm
from influence_ext.solvers.past import Past, worth_keeping
from influence_ext.solvers.preconditioners import InverseFunction, PreconditionedSolver, Preconditioner, inverse_of


@dataclass(frozen=True)
class BlockCG(PreconditionedSolver):
    """Block conjugate gradients with orthonormalised residuals (BCGrQ).

    With the residuals as columns ``R = Q C``, ``QᵀM⁻¹Q = I``, and ``T = (DᵀA D)⁻¹``: ``X += D T C``, ``Q S = Q − A D T`` by QR
    (and, with a preconditioner, a Cholesky factor of M⁻¹ in the basis that it gives), ``C ← S C``, ``D ← M⁻¹Q + D Sᵀ``. Each
    step minimises the energy error of every column over the Krylov spaces of all of them, so many related right-hand sides
    need far fewer steps than CG takes for one. Directions that differ by rounding alone (repeated or dependent right-hand
    sides, more of them than parameters) are taken out at the start.

    A block ends when the recurrence says that all its columns have converged. Their true residuals are then computed;
    the columns where rounding has let the two drift apart start again from the true residual, for as long as that at
    least halves it, and are STALLED after that: as precise as products in this dtype allow. Where ``DᵀA D`` has no Cholesky
    factor, the columns still above their tolerance are NOT_PSD; a matrix that is positive definite by construction,
    ``UᵀU + λI`` with λ > 0, shows no more than rounding there, and they start again from the true residual.

    Attributes:
        rtol: Stop when ``‖b − A x‖ ≤ rtol ‖b‖`` for every column.
        max_steps: Steps of the block, restarts included.
        check_every: Steps between two looks at the residuals. More than 1 saves host synchronisations on a device, and
            takes up to ``check_every − 1`` steps too many.
        preconditioner: As in :class:`CG`; a function gets all V rows.
        reorthogonalise: Blocks of past residuals that are kept, and to which every later one is made orthogonal again; see :class:`CG`.

    Statistics: ``iterations`` (steps until the column had converged) and ``restarts`` per column; ``rank``, the
    directions of the first block.

    Raises:
        ArgumentError: an option makes no sense.

    Cost: per step one product for each direction and about 10 P V² operations; seven ``[V, P]`` buffers; one product per
    column to verify; with a preconditioner two ``[V, P]`` buffers and about 6 P V² operations a step more. Worth it where V is
    well below the number of roots; a column that converges early goes on to cost its product. ``reorthogonalise = m``: up to
    m ``[V, P]`` buffers, 2 m with a preconditioner, and up to 4 m P V² operations a step.

    Reference: Dubrulle, "Retooling the method of block conjugate gradients", ETNA 12 (2001); O'Leary, "The block
    conjugate gradient algorithm and related methods", Linear Algebra and its Applications 29 (1980).
    """

    rtol: float = 1e-5
    max_steps: int = 1000
    check_every: int = 1
    preconditioner: Preconditioner | InverseFunction | Literal["jacobi"] | None = None
    reorthogonalise: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.rtol is not None, "rtol to be between 0 and 1", self.rtol)
        self._require_tolerance(self.rtol)
        self._require_count("max_steps", self.max_steps)
        self._require_count("check_every", self.check_every)
        self._require_kept(self.reorthogonalise)

    def _solve(self, operator: CountedOperator, B: Tensor, x0: Tensor | None = None) -> Outcome:
        num_columns = B.shape[0]
        precondition = None if self.preconditioner is None else inverse_of(self.preconditioner, operator, self.name)
        iterations, restarts = [0] * num_columns, [0] * num_columns
        if isinstance(precondition, Status):
            return Outcome.failed(B, precondition, {"rank": 0}, ("iterations", "restarts"))
        B_norm = norm(B)
        target = self.rtol * B_norm
        X = torch.zeros_like(B) if x0 is None else x0.clone()
        R = B if x0 is None else operator.residual(X, B)
        R_norm = norm(R)
        status = [_judge(*facts) for facts in zip(R_norm.tolist(), target.tolist(), strict=True)]
        pending = [column for column in range(num_columns) if status[column] is Status.MAX_STEPS]
        vectors = 1 if precondition is None else 2
        kept = worth_keeping(operator, num_columns, True, vectors=vectors) if self.reorthogonalise is None else self.reorthogonalise
        steps_left, rank, first = self.max_steps, 0, True
        while pending:
            index = torch.tensor(pending, dtype=torch.long, device=B.device)
            # close above its tolerance a residual has no room to halve, and rounding would take what the recurrence reaches just so
            aims = target if first else torch.minimum(target / 2, R_norm / 4)
            descent = _BlockDescent(operator, precondition, R[index], aims[index], kept)
            if first:
                rank, first = descent.rank, False
            ended = descent.run(steps_left, self.check_every)
            steps_left -= descent.steps
            X_new = X[index] + descent.change
            R_new = operator.residual(X_new, B[index])
            R_new_norm, old = norm(R_new), R_norm[index]
            # the energy error falls at every step, the residual not always; a restart is there for the residual
            better = R_new_norm.isfinite() & ((R_new_norm < old) | (not any(restarts)))
            X[index] = torch.where(better[:, None], X_new, X[index])
            R_norm[index] = torch.where(better, R_new_norm, old)
            again = []
            table = torch.stack([R_new_norm, target[index], old, descent.count.to(B.dtype)]).T.tolist()
            for position, (column, (new, goal, before, count)) in enumerate(zip(pending, table, strict=True)):
                iterations[column] += int(count)
                verdict = _judge(new, goal)
                status[column] = ended if verdict is Status.MAX_STEPS else verdict
                if ended in (Status.CONVERGED, Status.STALLED) and verdict is Status.MAX_STEPS:
                    status[column] = Status.STALLED
                    if new <= before / 2:
                        if steps_left > 0:
                            again.append(position)
                        else:
                            status[column] = Status.MAX_STEPS
            R = torch.zeros_like(B).index_copy_(0, index[again], R_new[again])
            pending = [pending[position] for position in again]
            for column in pending:
                restarts[column] += 1
        return Outcome(X, status, R_norm / B_norm, {"rank": rank}, {"iterations": iterations, "restarts": restarts})


def _judge(residual: float, target: float) -> Status:
    """CONVERGED or NON_FINITE where the residual says so; otherwise there are steps to be taken."""
    if not residual < float("inf"):
        return Status.NON_FINITE
    return Status.CONVERGED if residual <= target else Status.MAX_STEPS


class _BlockDescent:
    """The recurrence from residuals ``R [V, P]``; columns are vectors here, ``[P, V]``, as in the formulas."""

    def __init__(self, operator: CountedOperator, precondition: InverseFunction | None, R: Tensor, target: Tensor, kept: int):
        self.operator = operator
        self.precondition = precondition
        self.target = target
        self.change = torch.zeros_like(R)
        self.count = torch.zeros(R.shape[0], dtype=torch.long, device=R.device)
        self.steps = 0
        size = norm(R)
        Q, factor = torch.linalg.qr((R / size[:, None]).T)
        U, singular, Wh = torch.linalg.svd(factor, full_matrices=False)
        # residuals of unit length: what is dropped here is rounding of the right-hand sides themselves
        keep = singular > torch.finfo(R.dtype).eps * max(factor.shape) * singular[0]
        self.Q = Q @ U[:, keep]
        self.C = (singular[:, None] * Wh)[keep] * size  # in the Euclidean basis Q, until run() changes to that of M⁻¹
        self.rank = self.Q.shape[1]
        self.past = Past(min(kept * self.rank, R.shape[1]))

    def run(self, max_steps: int, check_every: int) -> Status:
        """Iterate until all columns have converged or none can go on, and say which."""
        Q, Z, change_of_basis, definite = self._conjugate(self.Q)
        D = Z
        C = change_of_basis.double() @ self.C.double()
        finite = torch.ones_like(definite)
        lower = self.operator.lower_bound
        eps = torch.finfo(Q.dtype).eps
        top = torch.zeros((), dtype=Q.dtype, device=Q.device)
        is_above = torch.ones_like(self.target, dtype=torch.bool)
        counted, symmetric = is_above, definite
        for step in range(1, max_steps + 1):
            self.steps = step
            AD = self.operator.matmat(D.T).T
            M = D.T @ AD
            M = (M + M.T) / 2
            # small systems in float64, whatever the operator's dtype
            factor, info = torch.linalg.cholesky_ex(M.double())
            quotient = M.diagonal() / D.square().sum(dim=0)
            top = torch.maximum(top, quotient.max())
            finite = finite & M.isfinite().all()
            definite = definite & (info == 0) & (quotient > (0.5 * lower if lower > 0 else eps * top)).all()
            usable = finite & definite
            unit = torch.eye(self.rank, dtype=factor.dtype, device=factor.device)
            T = torch.cholesky_inverse(torch.where(usable, factor, unit))  # which raises on a factor that is none
            # a block that fails keeps the X it had, also between two checks
            self.change += torch.where(usable, (D @ (T @ C).to(D.dtype)).T, 0.0)
            self.past.add(Q.T, None if self.precondition is None else Z.T)
            basis, S = torch.linalg.qr(torch.where(usable, self.past.removed_from((Q - AD @ T.to(AD.dtype)).T).T, Q))
            if self.past and bool((S.diagonal().abs() < 1e-2).any()):
                # what is left of an exhausted direction is rounding, which one pass leaves in the past's span: twice is enough
                basis, again = torch.linalg.qr(torch.where(usable, self.past.removed_from(basis.T).T, basis))
                S = again @ S
            is_above = torch.where(usable, torch.linalg.vector_norm(S.double() @ C, dim=0) > self.target, is_above)
            self.count += counted
            counted = is_above
            Q, Z, change_of_basis, still = self._conjugate(basis)
            S = change_of_basis @ S
            C = S.double() @ C
            D = Z + D @ S.T
            symmetric = symmetric & (still | ~usable)
            definite = definite & still
            if step % check_every and step < max_steps:
                continue
            is_finite, is_symmetric, is_definite, is_open = torch.stack([finite, symmetric, definite, is_above.any()]).tolist()
            if not is_finite:
                return Status.NON_FINITE
            if not is_open:
                return Status.CONVERGED
            if not is_symmetric:
                return Status.BREAKDOWN
            if not is_definite:
                return Status.STALLED if lower > 0 and float(quotient.min()) > -1000 * eps * float(top) else Status.NOT_PSD
        return Status.MAX_STEPS

    def _conjugate(self, basis: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``Q, M⁻¹Q, S, definite`` with ``QᵀM⁻¹Q = I`` and ``Q S`` the orthonormal ``basis``; ``definite`` tells whether M⁻¹ allows it."""
        if self.precondition is None:
            unit = torch.eye(self.rank, dtype=basis.dtype, device=basis.device)
            return basis, basis, unit, torch.ones((), dtype=torch.bool, device=basis.device)
        Z = self.precondition(basis.T.contiguous()).T
        gram = (basis.T @ Z).double()
        factor, info = torch.linalg.cholesky_ex((gram + gram.T) / 2)
        definite = info == 0
        factor = torch.where(definite, factor, torch.eye(self.rank, dtype=factor.dtype, device=factor.device))
        inverse = torch.linalg.solve_triangular(factor, torch.eye(self.rank, dtype=factor.dtype, device=factor.device), upper=False).T
        inverse = inverse.to(basis.dtype)
        return basis @ inverse, Z @ inverse, factor.T.to(basis.dtype), definite
