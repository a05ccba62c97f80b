"""The choice of a solver by counted costs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from influence_ext.errors import ArgumentError
from influence_ext.operators.base import CurvatureOperator, LinearOperator
from influence_ext.solvers.base import CountedOperator, OnFailure, Outcome, Solver
from influence_ext.solvers.cg import CG
from influence_ext.solvers.direct import Direct
from influence_ext.solvers.dual import Dual

EXPECTED_CG_STEPS = 100
"""Steps CG is taken to need per right-hand side; 65 to 90 were seen on small trained networks at usual dampings."""


@dataclass(frozen=True, kw_only=True)
class AutoChoice(Solver):
    """A solver that was chosen, and why.

    Attributes:
        solver: The one that does the work.
        reason: One sentence with the counted costs.
        costs: Solver name to its estimated cost in products per column; solvers that cannot be used are absent.
    """

    solver: Solver
    reason: str
    costs: dict[str, float] = field(hash=False)

    _refines: ClassVar[bool] = True

    @property
    def name(self) -> str:
        """That of the chosen solver."""
        return self.solver.name

    def _solve(self, operator: CountedOperator, B: Tensor) -> Outcome:
        return self.solver._solve(operator, B)


def auto(operator: LinearOperator, num_rhs: int, *, rtol: float | None = None, on_failure: OnFailure = "raise") -> AutoChoice:
    """Choose between Direct, Dual and CG for ``num_rhs`` right-hand sides.

    Costs are counted in products with one vector, taken as 4 R P operations (one application of U and of Uᵀ; 2 P²
    without a root):

    - Direct: P to assemble, P³/3 operations to factorise, 4 products' and 4 P² operations' worth per right-hand side;
    - Dual: R for the Gram matrix, R³/3 operations to factorise, 4 per right-hand side with one round of refinement;
    - CG: 100, or 2 P if that is less, per right-hand side.

    Direct is out beyond its ``max_parameters``, Dual beyond its ``max_roots``, without a root or without damping;
    Direct is also out without damping where R < P, as the matrix is singular then.

    Args:
        operator: ``A``.
        num_rhs: Right-hand sides to be solved for.
        rtol: Handed to the chosen solver; ``None`` leaves its default, but asks of CG no more than 1000 ε of the dtype
            (1.2e-4 in float32), since its default is more than float32 can give on an ill-conditioned matrix.
        on_failure: As in every solver.

    Returns:
        An :class:`AutoChoice`, itself a solver.

    Raises:
        ArgumentError: ``num_rhs`` is below 1 or the operator is not one.
    """
    if not isinstance(operator, LinearOperator):
        raise ArgumentError(f"auto: expected a LinearOperator, got {type(operator).__name__}; pass a curvature such as GGN(...).")
    if num_rhs < 1:
        raise ArgumentError(f"auto: expected num_rhs of at least 1, got {num_rhs}; pass the number of right-hand sides.")
    P = operator.num_parameters
    root = operator if isinstance(operator, CurvatureOperator) else None
    product = 4.0 * max(root.num_roots, 1) * P if root else 2.0 * P * P
    cg_rtol = max(CG.rtol or 0.0, 1000 * torch.finfo(operator.dtype).eps) if rtol is None else rtol
    options: dict[str, Solver] = {"CG": CG(rtol=cg_rtol, on_failure=on_failure)}
    costs: dict[str, float] = {"CG": float(num_rhs * min(2 * P, EXPECTED_CG_STEPS))}
    ruled_out = []

    direct = Direct(rtol=rtol, on_failure=on_failure)
    if direct.max_parameters < P:
        ruled_out.append(f"Direct takes at most {direct.max_parameters} parameters")
    elif root and root.damping == 0 and root.num_roots < P:
        ruled_out.append("Direct would meet a singular matrix without damping")
    else:
        options["Direct"] = direct
        costs["Direct"] = P + num_rhs * 4 + (P**3 / 3 + num_rhs * 4.0 * P**2) / product

    dual = Dual(rtol=rtol, on_failure=on_failure)
    if root is None:
        ruled_out.append("Dual needs an operator with a root")
    elif root.damping <= 0:
        ruled_out.append("Dual needs damping")
    elif dual.max_roots < root.num_roots:
        ruled_out.append(f"Dual takes at most {dual.max_roots} roots")
    else:
        R = root.num_roots
        options["Dual"] = dual
        costs["Dual"] = R + num_rhs * 4 + (R**3 / 3 + num_rhs * 4.0 * R**2) / product

    name = min(costs, key=lambda key: costs[key])
    size = f"P = {P} parameters" + (f", R = {root.num_roots} roots" if root else "") + f" and V = {num_rhs} right-hand sides"
    others = [f"{other} about {cost:,.0f}" for other, cost in costs.items() if other != name]
    reason = f"{name}: for {size} it costs about {costs[name]:,.0f} products"
    reason += f", against {' and '.join(others)}" if others else ""
    reason += f" ({'; '.join(ruled_out)})." if ruled_out else "."
    return AutoChoice(solver=options[name], reason=reason, costs=costs, on_failure=on_failure)
