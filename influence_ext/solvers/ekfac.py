"""EK-FAC: an approximate inverse, layer by layer, from Kronecker factors with corrected eigenvalues."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from influence_ext.checks import check_damping
from influence_ext.context import standalone
from influence_ext.errors import ArgumentError
from influence_ext.operators.base import KroneckerFactors, LinearOperator, Rotation
from influence_ext.solvers.base import Status
from influence_ext.solvers.factorisation import Factorisation, FactorisingSolver


@runtime_checkable
class KroneckerOperator(Protocol):
    """An operator ``G + damping·I`` that knows Kronecker factors of its diagonal blocks."""

    damping: float

    def kronecker_factors(self, num_samples: int | None = None, seed: int = 0) -> list[KroneckerFactors]:
        """``G ≈ B ⊗ A`` of each block."""

    def rotated_diagonal(self, rotations: list[Rotation], num_samples: int | None = None, seed: int = 0) -> Tensor:
        """``diag(Qᵀ G Q)``, ``[P]``."""


@dataclass(frozen=True)
class EKFAC(FactorisingSolver):
    r"""Eigenvalue-corrected Kronecker factorisation: approximate, one factorisation for every right-hand side and damping.

    .. math:: G \approx Q\, \mathrm{diag}(s)\, Q^T, \qquad x = Q\, \frac{Q^T b}{s + \lambda}

    Q is block-diagonal. The block of a linear layer or a convolution is ``Q_B ⊗ Q_A``, the eigenvectors of the covariances of its
    output cotangents, ``B = Σ g gᵀ``, and of its inputs with a one for the bias, ``A = E[a aᵀ]``; every other parameter
    (norms, embeddings, grouped and transposed convolutions, biases by themselves) stands alone. ``s = diag(Qᵀ G Q)``, the second
    moments of the projected per-example gradients, is what is nearest to G in Frobenius norm in this basis. Exact where G is
    ``B ⊗ A`` or diagonal: one linear layer under a squared error, for instance.

    The status is APPROXIMATE, and ``residual_norm`` tells how good the answer is; with ``rtol``, CONVERGED or STALLED. The error bound of a
    score is that of every solver, ``‖u‖ ‖r‖ / λ``, from the recomputed residual. To go on from here: ``CG(preconditioner=EKFAC())``.

    Attributes:
        num_samples: Gaussian draws an example in place of all C columns of the output Hessian's root (one is usual where C is large);
            None takes them all, without sampling error. An operator that is made of samples (``EmpiricalFisher``,
            ``MonteCarloFisher``) has its own rows and ignores it.
        seed: Of the draws.
        rtol: Relative residual that a column must meet; None to have none judged.

    Raises:
        ArgumentError: an option makes no sense; on solving, an operator that knows no Kronecker factors.

    Cost: two forward passes and 2 C (or ``2 num_samples``) cotangent sweeps; eigendecompositions ``[I, I]`` and ``[O, O]`` for each
    layer, which is what is kept, beside P eigenvalues; per column 4 O I (O + I) operations a layer, and one product to verify.
    ``num_products`` counts products alone.

    Reference: George, Laurent, Bouthillier, Ballas and Vincent, "Fast approximate natural gradient descent in a Kronecker-factored
    eigenbasis", NeurIPS 2018; Grosse et al., "Studying large language model generalization with influence functions" (2023); for
    positions that share a weight, Eschenhagen et al., "Kronecker-factored approximate curvature for modern neural network
    architectures", NeurIPS 2023 ("expand").
    """

    num_samples: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_samples is not None:
            self._require_count("num_samples", self.num_samples)
        self._require_seed(self.seed)

    @standalone
    def factorise(self, operator: LinearOperator) -> EKFACFactorisation:
        """Bases and eigenvalues, to solve with again and again, also with another damping.

        Raises:
            ArgumentError: the operator knows no Kronecker factors.
        """
        if not isinstance(operator, KroneckerOperator):
            raise ArgumentError(
                f"EKFAC: expected a curvature made of a network's per-example gradients (GGN, EmpiricalFisher, MonteCarloFisher), got "
                f"{type(operator).__name__}; use CG."
            )
        factors = operator.kronecker_factors(self.num_samples, self.seed)
        status = Status.CONVERGED
        rotations: list[Rotation] = []
        finite = all(bool(f.A.isfinite().all()) and bool(f.B.isfinite().all()) for f in factors)
        if finite:
            rotations = [Rotation(f.block, *(torch.linalg.eigh(M)[1].to(operator.dtype) for M in (f.B, f.A))) for f in factors]
        eigenvalues = operator.rotated_diagonal(rotations, self.num_samples, self.seed)
        if not bool((eigenvalues + operator.damping > 0).all()):
            status = Status.NOT_PSD
        if not (finite and bool(eigenvalues.isfinite().all())):
            status = Status.NON_FINITE
        return EKFACFactorisation(
            operator=operator,
            solver=self,
            status=status,
            num_products=0,
            num_calls=0,
            rotations=rotations,
            eigenvalues=eigenvalues,
            damping=operator.damping,
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class EKFACFactorisation(Factorisation):
    """``Q diag(s + λ) Qᵀ``: the bases of the blocks, and s in the places of the parameters, ``eigenvalues [P]``, without λ."""

    rotations: list[Rotation] = field(repr=False)
    eigenvalues: Tensor = field(repr=False)
    damping: float

    max_refinements = 0

    def damped(self, damping: float) -> EKFACFactorisation:
        """The same factorisation for another λ; solutions are verified with that λ, too.

        Raises:
            ArgumentError: negative damping.
        """
        damping = check_damping(damping, "EKFAC")
        operator = self.operator.damped(damping)  # type: ignore[attr-defined]
        definite = bool((self.eigenvalues + damping > 0).all())
        status = self.status if self.status is Status.NON_FINITE else Status.CONVERGED if definite else Status.NOT_PSD
        return replace(self, operator=operator, damping=damping, status=status)

    def judge(self, residual: float, dtype: torch.dtype) -> Status:
        """APPROXIMATE unless the solver has an ``rtol`` to be judged by."""
        status = super().judge(residual, dtype)
        return Status.APPROXIMATE if self.solver.rtol is None and status is not Status.NON_FINITE else status

    def _inverse(self, B: Tensor) -> Tensor:
        return self._turned(self._turned(B, back=False) / (self.eigenvalues + self.damping), back=True)

    def _turned(self, V: Tensor, back: bool) -> Tensor:
        """``Qᵀ v``, or ``Q v``, of every row."""
        turned = V.clone()
        for rotation in self.rotations:
            left, right = (rotation.outputs, rotation.inputs.T) if back else (rotation.outputs.T, rotation.inputs)
            rotation.block.put(left @ rotation.block.take(V) @ right, turned)
        return turned
