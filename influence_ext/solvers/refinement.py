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
    exact = operator.exact
    B_norm = norm(B)
    # without a tolerance, steps below the rounding level of b would only divide zero by zero
    target = (solver.rtol or torch.finfo(B.dtype).eps) * B_norm
    X = torch.zeros_like(B) if x0 is None else x0.clone()
    R = B if x0 is None else exact.residual(X, B)
    level = norm(R)  # of the exact residuals at X
    iterations, replacements = [0] * B.shape[0], [0] * B.shape[0]
    status = [Status.CONVERGED if done else Status.MAX_STEPS for done in (level <= target).tolist()]
    left = [column for column, found in enumerate(status) if found is Status.MAX_STEPS]
    stopped: list[int] = []
    x, r = X[left], R[left]
    p, rz = torch.empty_like(r), torch.zeros_like(target[left])
    for step in range(1, solver.max_steps + 1):
        if not left:
            break
        z = r if precondition is None else precondition(r)
        rz_new = torch.linalg.vecdot(r, z)
        p = z.clone() if step == 1 else torch.addcmul(z, p, (rz_new / rz)[:, None])
        rz = rz_new
        q = operator.matmat(p)
        curvature = torch.linalg.vecdot(p, q)
        usable = (curvature > 0) & curvature.isfinite()
        # after a replacement r and the direction before it are no longer orthogonal, so r, not rz, tells the step
        alpha = torch.where(usable, torch.linalg.vecdot(r, p) / curvature, 0.0)[:, None]
        x.addcmul_(p, alpha)
        r.addcmul_(q, alpha, value=-1.0)
        index = torch.tensor(left, device=B.device)
        due = ~usable | ~(norm(r) > torch.maximum(REPLACED_AT * level[index], target[index]))
        if step == solver.max_steps:
            due = torch.ones_like(due)
        positions = due.nonzero().squeeze(1)
        leaving: set[int] = set()
        if len(positions):
            columns = index[positions]
            r[positions] = exact.residual(x[positions], B[columns])
            new, old = norm(r[positions]), level[columns]
            # CG lowers the energy error at every step, the residual not always; after the first replacement it is the residual that counts
            finite = new.isfinite()
            fresh = torch.tensor([replacements[column] == 0 for column in columns.tolist()], device=B.device)
            better = finite & (fresh | (new < old))
            X[columns] = torch.where(better[:, None], x[positions], X[columns])
            level[columns] = torch.where(better, new, old)
            # close to the tolerance there is no room for halving
            goes_on = usable[positions] & better & ((new <= old / 2) | (new <= 2 * target[columns]))
            facts = torch.stack([new <= target[columns], goes_on, finite]).T.tolist()
            for position, column, (reached, good, sound) in zip(positions.tolist(), columns.tolist(), facts, strict=True):
                replacements[column] += 1
                iterations[column] = step
                if reached:
                    status[column] = Status.CONVERGED
                elif not good and step < solver.max_steps:
                    stopped.append(column)
                elif not sound:
                    status[column] = Status.NON_FINITE
                if reached or not good:
                    leaving.add(position)
        if leaving:
            keep = [position for position in range(len(left)) if position not in leaving]
            left = [left[position] for position in keep]
            x, r, p, rz = x[keep], r[keep], p[keep], rz[keep]
    if solver.rtol is None:
        status = [found if found is Status.NON_FINITE else Status.TRUNCATED for found in status]
    restarts = [0] * B.shape[0]
    if stopped:
        spent = [iterations[column] for column in stopped]
        last = dataclasses.replace(solver, preconditioner=precondition)._solve(exact, B[stopped], X[stopped], spent)
        X[stopped], level[stopped] = last.value, last.residual_norm * B_norm[stopped]
        for position, column in enumerate(stopped):
            status[column] = last.status[position]
            iterations[column] = last.columns["iterations"][position]
            restarts[column] = last.columns["restarts"][position]
    operator.absorb(exact)
    counts = {"iterations": iterations, "restarts": restarts, "replacements": replacements}
    return Outcome(X, status, level / B_norm, {"exact_products": exact.num_products}, counts)
