"""The choice of a solver by counted costs."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from influence_ext.checks import check_budget, is_count
from influence_ext.errors import ArgumentError
from influence_ext.operators.base import CurvatureOperator, LinearOperator
from influence_ext.solvers.base import CountedOperator, OnFailure, Outcome, Solver, check_operator
from influence_ext.solvers.block_cg import BlockCG
from influence_ext.solvers.cg import CG
from influence_ext.solvers.direct import Direct
from influence_ext.solvers.dual import Dual
from influence_ext.solvers.past import KEPT_BYTES, orthogonalisation_operations, worth_keeping

STEPS_AT, STEPS_EXPONENT = 14.0, 0.38
"""Steps that CG is taken to need per right-hand side without its past: ``14 (0.1 / λ)^0.38``; half to twice that was seen on most trained
networks with mean losses at dampings of 1e-1 to 1e-5 (to 1e-4), a quarter where they fit their data so well that G nearly vanishes."""
ORTHOGONAL_STEPS_AT, ORTHOGONAL_STEPS_EXPONENT = 12.0, 0.25
"""The same where that many past residuals are kept."""
LEAST_DAMPING, UNKNOWN_DAMPING = 1e-6, 1e-3
"""What a smaller damping is taken for, since beyond it the eigenvalues above zero tell the number of steps; and that of any operator that
has none."""
BLOCK_EXPONENT = 0.4
"""BlockCG is taken to need ``V^-0.4`` of them for V right-hand sides; exponents of 0.3 to 0.6 were seen on the same networks."""
STEP_CALLS, PAST_CALLS, BLOCK_CALLS = 2e6, 1.5e6, 1e7
"""What calls from Python take, in operations' time: a step of CG; its past, for each column; a step of BlockCG. A
factorisation and its solve take about as many calls as CG before its first step, so on the smallest systems the exact solvers win."""
STEP_VECTORS, PAST_VECTORS = 12.0, 200.0
"""Operations' time that a step of CG takes beside the product, for each parameter and column; and keeping a past, whatever its length."""
FACTORISATION = 2.5
"""What Cholesky's n³/3 operations take beside as many of a product."""
BLOCK_VECTORS, BLOCK_SQUARES = 600.0, 45.0
"""The same of BlockCG, and for each pair of columns: a QR factorisation and products of tall matrices."""


@dataclass(frozen=True, kw_only=True)
class AutoChoice(Solver):
    """A solver that was chosen, and why.

    Attributes:
        solver: The one that does the work.
        reason: One sentence with the counted costs.
        costs: Solver name to its estimated cost in products with one vector; solvers that cannot be used are absent.
        memory: Solver name to the bytes that it keeps beside the operator.
    """

    solver: Solver
    reason: str
    costs: dict[str, float] = field(hash=False)
    memory: dict[str, int] = field(hash=False)

    @property
    def _refines(self) -> bool:
        """Can it use products at reduced precision and still solve the exact system? Others are given the exact operator."""
        return self.solver._refines

    @property
    def name(self) -> str:
        """That of the chosen solver."""
        return self.solver.name

    def _solve(self, operator: CountedOperator, B: Tensor) -> Outcome:
        return self.solver._solve(operator, B)


def auto(
    operator: LinearOperator,
    num_rhs: int,
    *,
    rtol: float | None = None,
    on_failure: OnFailure = "raise",
    at_once: int | None = None,
    memory_budget: int | None = None,
) -> AutoChoice:
    """Choose between Direct, Dual, CG and BlockCG for ``num_rhs`` right-hand sides, ``V`` of them at a time.

    Arithmetic is counted: of products by the operator (``product_operations(V)``, which for a network knows what V vectors share), of
    the dense algebra here. It is told in products with one vector.

    - Direct: P products, 2.5 P³/3 operations' time to factorise, 2 products' and 4 P² operations' worth per right-hand side;
    - Dual: the operator's ``gram_operations()``, 2.5 R³/3 to factorise, 4 products' and 4 R² operations' worth per right-hand side, with
      one round of refinement;
    - CG: ``12 (0.1/λ)^0.25`` steps where as many past residuals can be kept, ``14 (0.1/λ)^0.38`` where none can, and no more than P or
      R + 1 (2 P without the past), of a product with V vectors, 12 P V operations, with a past 200 P V more and those that make residuals
      orthogonal to the ones before; λ is measured against what the objective's terms weigh together, 1 for a mean;
    - BlockCG: ``V^-0.4`` of these steps, of a product with V vectors, 600 P V + 45 P V² operations and the same; no more than R/V + 2 of
      them.

    Calls from Python count as operations that take as long: 2e6 a step of CG and 1.5e6 for each column that keeps its past, 1e7 a step of
    BlockCG. All depends on the number of steps, which λ alone tells within a factor of two on most networks. Steps are those
    to a tolerance of 1e-4, whatever ``rtol``, and all constants were measured on CPUs (``bench/notes/solves.md``): for smaller tolerances
    CG and BlockCG cost more than is said here, and on a device another solver may be the fastest. Where it matters, time the solvers on a
    few right-hand sides.

    Direct is out beyond its ``max_parameters``, Dual beyond its ``max_roots``, without a root or without damping; Direct and BlockCG
    are also out without damping where R < P, as the matrix is singular then; whatever takes more than ``memory_budget`` is out,
    but CG stays, with fewer past residuals. LiSSA, Neumann and EKFAC are approximations by choice and never chosen for you. Nor is a
    preconditioner: a Krylov space that is kept orthogonal holds what a sketch of as many products would find, and more.

    Args:
        operator: ``A``.
        num_rhs: Right-hand sides to be solved for.
        rtol: Handed to the chosen solver; ``None`` leaves its default, but asks of CG no more than 1000 ε of the dtype
            (1.2e-4 in float32), since its default is more than float32 can give on an ill-conditioned matrix.
        on_failure: As in every solver.
        at_once: V, where they come in parts; None: all.
        memory_budget: Bytes that the solver may keep beside the operator; None: no limit.

    Returns:
        An :class:`AutoChoice`, itself a solver.

    Raises:
        ArgumentError: ``num_rhs`` is no whole number of at least 1, ``at_once`` none in between, ``memory_budget`` no number of bytes, or
            the operator is not one.
    """
    check_operator(operator, "auto")
    if not is_count(num_rhs):
        raise ArgumentError(f"auto: expected num_rhs, a whole number of at least 1, got {num_rhs!r}; pass the number of right-hand sides.")
    memory_budget = check_budget(memory_budget, "auto")
    V = num_rhs if at_once is None else at_once
    if not is_count(V) or num_rhs < V:
        raise ArgumentError(f"auto: expected at_once, a whole number in [1, {num_rhs}], got {at_once!r}; a part of the right-hand sides.")
    num_rhs, V = int(num_rhs), int(V)
    P = operator.num_parameters
    itemsize = operator.dtype.itemsize
    root = operator if isinstance(operator, CurvatureOperator) else None
    product = operator.product_operations(1)
    together = operator.product_operations(V) * num_rhs / V / product  # all right-hand sides once
    cg_rtol = max(CG.rtol or 0.0, 1000 * torch.finfo(operator.dtype).eps) if rtol is None else rtol
    ruled_out = []
    vectors = V * P * itemsize  # bytes of one for each column

    damping = max(LEAST_DAMPING, getattr(operator, "damping", UNKNOWN_DAMPING) / (operator.objective_weight or 1.0))  # weightless: G = 0
    plain_steps = max(1.0, STEPS_AT * (0.1 / damping) ** STEPS_EXPONENT)
    orthogonal_steps = min(plain_steps, max(1.0, ORTHOGONAL_STEPS_AT * (0.1 / damping) ** ORTHOGONAL_STEPS_EXPONENT))

    def past(buffers: int, shared: bool) -> tuple[int, float]:
        """Residuals to keep a column, beside so many buffers; steps that CG then takes."""
        room = KEPT_BYTES if memory_budget is None else min(KEPT_BYTES, max(0, memory_budget - buffers * vectors))
        kept = worth_keeping(operator, V, shared, room)
        share = min(1.0, kept * (V if shared else 1) / orthogonal_steps)
        most = min(P, root.num_roots + 1 if root and root.num_roots else P) if share == 1.0 else 2 * P
        return kept, min(most, plain_steps - share * (plain_steps - orthogonal_steps))

    def removing(kept: int, steps: float, at_once: int) -> float:
        """Operations' time to take the past, k residuals at step k, out of a column's residual, on average over the steps."""
        rows = kept - kept**2 / (2 * steps) if kept < steps else steps / 2
        return rows * at_once * orthogonalisation_operations(P, at_once)

    kept, steps = past(6, shared=False)
    kept = min(kept, CG.max_steps)
    keeps = {"CG": kept}
    options: dict[str, Solver] = {"CG": CG(rtol=cg_rtol, on_failure=on_failure, reorthogonalise=None if memory_budget is None else kept)}
    a_column = STEP_VECTORS * P + (PAST_CALLS + PAST_VECTORS * P + removing(kept, steps, 1) if kept else 0.0)
    if operator.exact is not operator:  # steps by products at reduced precision keep no past
        steps, a_column = min(2.0 * P, plain_steps), STEP_VECTORS * P
    costs: dict[str, float] = {"CG": (steps + 1) * together + steps * num_rhs * (STEP_CALLS / V + a_column) / product}
    memory = {"CG": int(6 + min(kept, steps)) * vectors}

    singular = root is not None and root.damping == 0 and root.num_roots < P
    if V > 1 and not singular:
        kept, steps = past(7, shared=True)
        rank = min(P, root.num_roots + 1) if root and root.num_roots else P
        steps = min(steps * V**-BLOCK_EXPONENT, rank / V + 2)
        keeps["BlockCG"] = kept
        options["BlockCG"] = BlockCG(rtol=cg_rtol, on_failure=on_failure, reorthogonalise=None if memory_budget is None else kept)
        a_column = BLOCK_CALLS / V + (BLOCK_VECTORS + BLOCK_SQUARES * V) * P  # of which the first QR factorisation is one
        costs["BlockCG"] = (steps + 1) * together + num_rhs * ((steps + 1) * a_column + steps * removing(kept, steps, V)) / product
        memory["BlockCG"] = int(7 + min(kept, steps)) * vectors

    direct = Direct(rtol=rtol, on_failure=on_failure)
    if direct.max_parameters < P:
        ruled_out.append(f"Direct takes at most {direct.max_parameters} parameters")
    elif singular:
        ruled_out.append("Direct and BlockCG would meet a singular matrix without damping")
    else:
        options["Direct"] = direct
        factorisation = FACTORISATION * P**3 / 3 + num_rhs * 4.0 * P**2
        costs["Direct"] = 2 * together + (P * operator.product_operations(64) / 64 + factorisation) / product
        memory["Direct"] = 2 * P * P * itemsize

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
        factorisation = FACTORISATION * R**3 / 3 + num_rhs * 4.0 * R**2
        costs["Dual"] = 4 * together + (root.gram_operations() + factorisation) / product
        memory["Dual"] = 2 * R * R * itemsize

    for name in [name for name in options if name != "CG" and memory_budget is not None and memory[name] > memory_budget]:
        del options[name], costs[name]
        ruled_out.append(f"{name} would take {memory[name] / 2**20:,.0f} MiB")
    name = min(costs, key=lambda key: costs[key])
    size = f"P = {P} parameters" + (f", R = {root.num_roots} roots" if root else "") + f" and V = {num_rhs} right-hand sides"
    others = [f"{other} about {cost:,.0f}" for other, cost in sorted(costs.items(), key=lambda item: item[1]) if other != name]
    reason = f"{name}: for {size} it costs about {costs[name]:,.0f} products and {memory[name] / 2**20:,.0f} MiB"
    if name in keeps:
        reason += f", with up to {keeps[name]} past residuals kept a right-hand side"
    reason += f", against {', '.join(others)}" if others else ""
    reason += f" ({'; '.join(ruled_out)})." if ruled_out else "."
    return AutoChoice(solver=options[name], reason=reason, costs=costs, memory=memory, on_failure=on_failure)
