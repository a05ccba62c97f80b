"""The truncated Neumann series under its own name and scale."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from influence_ext.solvers.base import CountedOperator, Outcome, Solver
from influence_ext.solvers.lissa import LiSSA


@dataclass(frozen=True)
class Neumann(Solver):
    r"""The truncated Neumann series of the inverse, with the full matrix.

    .. math:: x = \alpha \sum_{k=0}^{K} (I - \alpha A)^k b

    tends to ``A⁻¹ b`` if all eigenvalues of A lie between 0 and ``2/α``. It is :class:`LiSSA` without sampling, with α the reciprocal
    of its scale σ; status, divergence and counts are as there.

    Attributes:
        num_terms: K; the term k = 0 needs no product.
        scale: α. None takes the reciprocal of 1.25 times the estimated top eigenvalue.
        rtol: Relative residual to stop at or to judge the result by; None: TRUNCATED.

    Statistics: ``scale`` (α), ``top_eigenvalue`` (NaN where ``scale`` was given), ``extra_damping`` = 1/(α K); ``iterations`` per column.

    Raises:
        ArgumentError: an option makes no sense.

    Cost: K products per column, 20 for the automatic scale, one per column for the residual.

    Reference: Lorraine, Vicol and Duvenaud, "Optimizing millions of hyperparameters by implicit differentiation", AISTATS 2020.
    """

    num_terms: int = 100
    scale: float | None = None
    rtol: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_count("num_terms", self.num_terms)
        self._require_positive("scale", self.scale, "leave it None to have it estimated")
        self._require_tolerance(self.rtol)

    def _solve(self, operator: CountedOperator, B: Tensor) -> Outcome:
        series = LiSSA(num_steps=self.num_terms, scale=None if self.scale is None else 1 / self.scale, rtol=self.rtol)
        outcome = series._solve(operator, B)
        sigma = outcome.stats["scale"]
        outcome.stats["scale"] = 1 / sigma if sigma else float("inf")
        return outcome
