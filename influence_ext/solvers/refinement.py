"""Conjugate gradients on products at reduced precision, held to the exact residual.

The recurrence is not that of ``krylov.CGVectors``: a residual that was replaced is no longer orthogonal to the direction before, so the
step is ``rᵀp / pᵀÃp`` here, where the fused kernels take ``rᵀz / pᵀAp`` and end a column for good; and every step is looked at.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from influence_ext.solvers.base import CountedOperator, Outcome, Status, norm

if TYPE_CHECKING:
    from influence_ext.solvers.cg import CG

REPLACED_AT = 0.1
"""A residual that has fallen by this much since it was last exact is replaced by the exact one."""


def refined(
    solver: CG, operator: CountedOperator, precondition: Callable[[Tensor], Tensor] | None, B: Tensor, x0: Tensor | None = None
) -> Outcome:
    r"""Solve ``A x = b`` where products with ``Ã ≈ A`` are cheap: steps of conjugate gradients on Ã, whose residual is replaced by the
    exact ``b − A x`` whenever it has fallen tenfold or to the tolerance, and whose search directions go on.

    So the rounding of Ã acts on each tenfold by itself and cannot accumulate, and the Krylov space is not begun anew. A column whose exact
    residual has not halved by a replacement (its rounding is as large as the small eigenvalues that its residual is left in) takes the
    best x so far and is finished by ``solver`` on A itself.

    Args:
        solver: its ``rtol`` is what the exact residual is held to; ``max_steps`` bounds all steps.
        operator: ``Ã``; ``operator.exact`` is ``A``.
        precondition: ``M⁻¹``; None: without.
        B: ``[V, P]``.
        x0: ``[V, P]``, default zero.

    Returns:
        The outcome, its residuals exact. Statistics beyond those of CG: ``replacements`` per column, and ``exact_products``.

    Cost: the cheap products of CG's steps, some tenth to third more of them than exact ones would need, and an exact one for each tenfold.

    Reference: van der Vorst and Ye, "Residual replacement strategies for Krylov subspace iterative methods for the convergence of true
    residuals" (2000); Clark et al., "Solving lattice QCD systems of equations using mixed precision solvers on GPUs" (2010).
    """
    run = _Refinement(solver, operator, precondition, B, x0)
    run.iterate()
    return run.finish()


class _Refinement:
    """The recurrences of the columns that are still running, ``x, r, p [A, P]``, and the best solution of every column so far."""

    def __init__(
        self, solver: CG, operator: CountedOperator, precondition: Callable[[Tensor], Tensor] | None, B: Tensor, x0: Tensor | None
    ) -> None:
        self.solver, self.operator, self.exact, self.precondition, self.B = solver, operator, operator.exact, precondition, B
        self.B_norm = norm(B)
        # without a tolerance, steps below the rounding level of b would only divide zero by zero
        self.target = (solver.rtol or torch.finfo(B.dtype).eps) * self.B_norm
        self.X = torch.zeros_like(B) if x0 is None else x0.clone()
        R = B if x0 is None else self.exact.residual(self.X, B)
        self.level = norm(R)  # of the exact residuals at X
        self.iterations, self.replacements = [0] * B.shape[0], [0] * B.shape[0]
        self.status = [Status.CONVERGED if done else Status.MAX_STEPS for done in (self.level <= self.target).tolist()]
        self.left = [column for column, found in enumerate(self.status) if found is Status.MAX_STEPS]
        self.stopped: list[int] = []  # columns that products with Ã take no further
        self.x, self.r = self.X[self.left], R[self.left]
        self.p, self.rz = torch.empty_like(self.r), torch.zeros_like(self.target[self.left])

    def iterate(self) -> None:
        """Steps on Ã until every column has converged, stopped or run out of them."""
        for step in range(1, self.solver.max_steps + 1):
            if not self.left:
                return
            usable = self._step(first=step == 1)
            index = torch.tensor(self.left, device=self.B.device)
            due = ~usable | ~(norm(self.r) > torch.maximum(REPLACED_AT * self.level[index], self.target[index]))
            positions = (due if step < self.solver.max_steps else torch.ones_like(due)).nonzero().squeeze(1)
            if len(positions):
                self._leave(self._replace(positions, index[positions], usable[positions], step))

    def _step(self, first: bool) -> Tensor:
        """One step of conjugate gradients on Ã; ``[A]``: whether the direction had a curvature to divide by, without which x stays."""
        z = self.r if self.precondition is None else self.precondition(self.r)
        rz = torch.linalg.vecdot(self.r, z)
        self.p = z.clone() if first else torch.addcmul(z, self.p, (rz / self.rz)[:, None])
        self.rz = rz
        q = self.operator.matmat(self.p)
        curvature = torch.linalg.vecdot(self.p, q)
        usable = (curvature > 0) & curvature.isfinite()
        # after a replacement r and the direction before it are no longer orthogonal, so r, not rz, tells the step
        alpha = torch.where(usable, torch.linalg.vecdot(self.r, self.p) / curvature, 0.0)[:, None]
        self.x.addcmul_(self.p, alpha)
        self.r.addcmul_(q, alpha, value=-1.0)
        return usable

    def _replace(self, positions: Tensor, columns: Tensor, usable: Tensor, step: int) -> set[int]:
        """Put exact residuals in the place of those of the recurrence, and keep what is better; the positions that are to leave."""
        self.r[positions] = self.exact.residual(self.x[positions], self.B[columns])
        new, old, target = norm(self.r[positions]), self.level[columns], self.target[columns]
        finite = new.isfinite()
        # CG lowers the energy error at every step, the residual not always; after the first replacement it is the residual that counts
        fresh = torch.tensor([self.replacements[column] == 0 for column in columns.tolist()], device=self.B.device)
        better = finite & (fresh | (new < old))
        self.X[columns] = torch.where(better[:, None], self.x[positions], self.X[columns])
        self.level[columns] = torch.where(better, new, old)
        # close to the tolerance there is no room for halving
        goes_on = usable & better & ((new <= old / 2) | (new <= 2 * target))
        facts = torch.stack([new <= target, goes_on, finite]).T.tolist()
        leaving = set()
        for position, column, (reached, good, sound) in zip(positions.tolist(), columns.tolist(), facts, strict=True):
            self.replacements[column] += 1
            self.iterations[column] = step
            if reached:
                self.status[column] = Status.CONVERGED
            elif not good and step < self.solver.max_steps:
                self.stopped.append(column)
            elif not sound:
                self.status[column] = Status.NON_FINITE
            if reached or not good:
                leaving.add(position)
        return leaving

    def _leave(self, leaving: set[int]) -> None:
        if leaving:
            keep = [position for position in range(len(self.left)) if position not in leaving]
            self.left = [self.left[position] for position in keep]
            self.x, self.r, self.p, self.rz = self.x[keep], self.r[keep], self.p[keep], self.rz[keep]

    def finish(self) -> Outcome:
        """The columns that stopped by exact products, and the outcome of all."""
        if self.solver.rtol is None:
            self.status = [found if found is Status.NON_FINITE else Status.TRUNCATED for found in self.status]
        restarts = [0] * self.B.shape[0]
        if stopped := self.stopped:
            spent = [self.iterations[column] for column in stopped]
            plain = dataclasses.replace(self.solver, preconditioner=self.precondition)
            last = plain._solve(self.exact, self.B[stopped], self.X[stopped], spent)
            self.X[stopped], self.level[stopped] = last.value, last.residual_norm * self.B_norm[stopped]
            for position, column in enumerate(stopped):
                self.status[column] = last.status[position]
                self.iterations[column] = last.columns["iterations"][position]
                restarts[column] = last.columns["restarts"][position]
        self.operator.absorb(self.exact)
        counts = {"iterations": self.iterations, "restarts": restarts, "replacements": self.replacements}
        return Outcome(self.X, self.status, self.level / self.B_norm, {"exact_products": self.exact.num_products}, counts)
