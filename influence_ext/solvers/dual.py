"""The exact solve in the space of outputs."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from influence_ext.checks import check_damping, is_answer
from influence_ext.context import standalone
from influence_ext.errors import ArgumentError
from influence_ext.operators.base import CurvatureOperator, LinearOperator
from influence_ext.solvers.base import Status, check_operator
from influence_ext.solvers.factorisation import Factorisation, FactorisingSolver, cholesky


@dataclass(frozen=True)
class Dual(FactorisingSolver):
    """Exact through the R×R Gram matrix of the curvature's root: ``G = UᵀU``, ``U [R, P]``.

    ``(G + λI)⁻¹ b = (b − Uᵀ (UUᵀ + λI)⁻¹ U b) / λ`` (Woodbury). The subtraction cancels when λ is small beside the
    spectrum, so the result is refined against the operator's own residual until that stops halving, at most five
    times.

    Attributes:
        max_roots: Refuse larger R, as the Gram matrix takes R² numbers twice over.
        spectral: Use an eigendecomposition of UUᵀ in place of a Cholesky factor of UUᵀ + λI: some twenty times the
            work, in float64 always, but ``factorise(G).damped(λ)`` then serves every λ for free.
        rtol: See :class:`FactorisingSolver`.

    Statistics: ``refinements`` per column.

    Raises:
        ArgumentError: an option makes no sense; on solving: an operator without a root, damping that is not above
            zero, more than ``max_roots`` roots.

    Cost: ``operator.root_gram()``, R³/3 operations and 2 R² numbers of memory once; then per column and round (one and
    those of refinement) 2 R² operations, one application of U, one of Uᵀ and one product. ``num_products`` counts
    products alone.

    Reference: Hager, "Updating the inverse of a matrix", SIAM Review 31 (1989); math of the notation page, "Dual".
    """

    max_roots: int = 20_000
    spectral: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_count("max_roots", self.max_roots)
        self._require(is_answer(self.spectral), "spectral to be True or False", self.spectral)

    @standalone
    def factorise(self, operator: LinearOperator) -> DualFactorisation:
        """The factorised Gram matrix, to solve with again and again.

        Raises:
            ArgumentError: an operator without a root, damping that is not above zero, or more than ``max_roots`` roots.
        """
        operator = check_operator(operator, "Dual").exact
        if not isinstance(operator, CurvatureOperator):
            raise ArgumentError(
                f"Dual: expected a CurvatureOperator, whose root U gives G = UᵀU, got {type(operator).__name__}; use CG or Direct."
            )
        _positive(operator.damping)
        R = operator.num_roots
        if self.max_roots < R:
            size = R * R * operator.dtype.itemsize / 2**30
            raise ArgumentError(
                f"Dual: expected at most max_roots = {self.max_roots} roots (examples times outputs), got {R}, "
                f"whose Gram matrix takes {size:.1f} GiB; use CG, or raise max_roots."
            )
        gram = operator.root_gram().detach().clone()  # the operator may keep its own
        eigenvalues = None
        if not self.spectral:
            gram.diagonal().add_(operator.damping)
            factor, status = cholesky(gram)
        elif bool(gram.isfinite().all()):
            # eigh errs by ε of the largest eigenvalue, which in float32 is often more than the damping
            eigenvalues, factor = torch.linalg.eigh(gram.double())
            status = Status.CONVERGED
        else:
            factor, status = gram, Status.NON_FINITE
        return DualFactorisation(
            operator=operator,
            solver=self,
            status=status,
            num_products=0,
            num_calls=0,
            curvature=operator,
            factor=factor,
            eigenvalues=eigenvalues,
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class DualFactorisation(Factorisation):
    """``UUᵀ + λI = L Lᵀ``, or ``UUᵀ = Q Λ Qᵀ`` where ``eigenvalues`` is set; ``factor`` is L or Q, ``[R, R]``."""

    curvature: CurvatureOperator = field(repr=False)
    factor: Tensor = field(repr=False)
    eigenvalues: Tensor | None = field(repr=False)

    max_refinements = 5

    @property
    def damping(self) -> float:
        """λ of the solves."""
        return self.curvature.damping

    def damped(self, damping: float) -> DualFactorisation:
        """The same eigendecomposition with another λ.

        Raises:
            ArgumentError: λ is not above zero, or the factorisation is not spectral.
        """
        damping = _positive(damping)
        if self.eigenvalues is None:
            raise ArgumentError(
                "DualFactorisation.damped: expected an eigendecomposition, got a Cholesky factor, which belongs to one "
                "damping; make it with Dual(spectral=True)."
            )
        curvature = self.curvature.damped(damping)
        return replace(self, operator=curvature, curvature=curvature)

    def _inverse(self, B: Tensor) -> Tensor:
        Y = self.curvature.root_matmat(B).detach()
        if self.eigenvalues is None:
            Y = torch.cholesky_solve(Y.T, self.factor).T.contiguous()
        else:
            Y = ((Y.double() @ self.factor / (self.eigenvalues + self.damping)) @ self.factor.T).to(B.dtype)
        return (B - self.curvature.root_rmatmat(Y).detach()) / self.damping


def _positive(damping: float) -> float:
    value = check_damping(damping, "Dual")
    if value == 0:
        raise ArgumentError(
            f"Dual: expected a damping > 0, as the formula divides by it, got {damping}; give the operator a damping, for instance 1e-3."
        )
    return value
