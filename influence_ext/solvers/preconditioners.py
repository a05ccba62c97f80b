"""Preconditioners: approximate inverses that make conjugate gradients take fewer steps."""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self

import torch
from torch import Tensor

from influence_ext.checks import is_count, is_one_of, is_seed, is_whole
from influence_ext.context import standalone
from influence_ext.errors import ArgumentError, ShapeError
from influence_ext.operators.base import LinearOperator
from influence_ext.solvers.base import CountedOperator, Outcome, Solution, Solver, Status, check_operator, run

InverseFunction = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False, kw_only=True)
class Inverse(abc.ABC):
    """``M⁻¹``, exact or approximate, made for one matrix: called with rows ``[V, P]``, it gives ``[V, P]``.

    Attributes:
        status: CONVERGED if it exists, otherwise why not (NOT_PSD, NON_FINITE).
        num_products: Operator applications it cost.
        num_calls: Block applications it cost.
    """

    status: Status
    num_products: int
    num_calls: int

    def __call__(self, R: Tensor) -> Tensor:
        """``M⁻¹ r`` for every row."""
        return self._inverse(R)

    @abc.abstractmethod
    def _inverse(self, B: Tensor) -> Tensor:
        """``A⁻¹ B`` up to rounding or approximation, ``[V, P] -> [V, P]``."""


class Preconditioner(abc.ABC):
    """A way to make an approximate inverse of an operator; an option of CG and BlockCG. Every factorising solver is one."""

    @abc.abstractmethod
    def factorise(self, operator: LinearOperator) -> Inverse:
        """The inverse for this operator, for as many solves as wanted."""


@dataclass(frozen=True)
class Jacobi(Preconditioner):
    """``M = diag A``.

    Cost: ``operator.diagonal()``, which a GGN takes from per-example factors (C cotangent sweeps) and an operator without a
    way of its own from P products; P operations a step.

    Reference: Golub and Van Loan, "Matrix Computations", 11.5.
    """

    @standalone
    def factorise(self, operator: LinearOperator) -> JacobiInverse:
        """The inverse diagonal; NOT_PSD where an entry is not positive."""
        counted = CountedOperator(check_operator(operator, "Jacobi"))
        diagonal = counted.diagonal()
        status = Status.CONVERGED if bool((diagonal > 0).all()) else Status.NOT_PSD
        if not bool(diagonal.isfinite().all()):
            status = Status.NON_FINITE
        return JacobiInverse(status=status, num_products=counted.num_products, num_calls=counted.num_calls, diagonal=diagonal)


@dataclass(frozen=True, eq=False, kw_only=True)
class JacobiInverse(Inverse):
    """``diagonal [P]`` of the matrix."""

    diagonal: Tensor = field(repr=False)

    def _inverse(self, B: Tensor) -> Tensor:
        return B / self.diagonal


@dataclass(frozen=True)
class Nystrom(Preconditioner):
    r"""The top of the spectrum by a random sketch: for a matrix of few large eigenvalues, as curvature matrices are.

    With Ω ``[P, rank]`` orthonormal, the Nyström approximation ``(AΩ)(ΩᵀAΩ)⁻¹(AΩ)ᵀ = U Λ Uᵀ`` of the undamped matrix and its
    damping λ,

    .. math:: M^{-1} = (\Lambda_{rank} + \lambda)\, U (\Lambda + \lambda I)^{-1} U^T + (I - U U^T)

    brings the eigenvalues found down to the last of them. The condition number of what remains is below about 28 on average
    where ``rank`` is twice the effective dimension ``tr G (G + λI)⁻¹``, plus one half.

    Attributes:
        rank: Columns of the sketch; P where it is more.
        seed: Of the sketch; the global random state is neither read nor changed.

    The damping is the operator's own (``operator.damping``); an operator without one is sketched as it is, with λ = 0.

    Raises:
        ArgumentError: ``rank`` is no positive integer, or ``seed`` no whole number.

    Cost: ``rank`` products in one call, about 6 P rank² operations and ``rank`` vectors of memory once; 4 P rank operations a
    step and column.

    Reference: Frangella, Tropp and Udell, "Randomized Nyström preconditioning", SIAM J. Matrix Anal. Appl. 44 (2023), algorithms
    2.1 and 5.1.
    """

    rank: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        if not is_count(self.rank):
            raise ArgumentError(f"Nystrom: expected rank to be an integer of at least 1, got {self.rank!r}; 50 is a good start.")
        if not is_seed(self.seed):
            raise ArgumentError(f"Nystrom: expected seed to be a whole number of 64 bits, got {self.seed!r}; correct it.")

    @standalone
    def factorise(self, operator: LinearOperator) -> NystromInverse:
        """The sketch, multiplied and decomposed; NOT_PSD where the sketched matrix is not positive semi-definite."""
        check_operator(operator, "Nystrom")
        P, dtype = operator.num_parameters, operator.dtype
        damping = float(getattr(operator, "damping", 0.0))
        counted = CountedOperator(operator)
        # drawn on the CPU so that every device starts from the same sketch
        draws = torch.randn(P, min(self.rank, P), dtype=torch.float64, generator=torch.Generator().manual_seed(int(self.seed)))
        sketch = torch.linalg.qr(draws.to(dtype=dtype, device=operator.device))[0]
        product = counted.matmat(sketch.T.contiguous()).T
        status, U, eigenvalues = _nystrom(sketch, product, damping)
        return NystromInverse(
            status=status, num_products=counted.num_products, num_calls=counted.num_calls, U=U, eigenvalues=eigenvalues, damping=damping
        )


def _nystrom(sketch: Tensor, product: Tensor, damping: float) -> tuple[Status, Tensor, Tensor]:
    """``U [P, k]`` and Λ ``[k]`` from ``product = AΩ``, k at most the sketch's columns; small systems in float64."""
    eps = torch.finfo(sketch.dtype).eps
    nothing = sketch[:, :0], sketch.new_empty(0)
    rounding = eps * float(torch.linalg.vector_norm(product))
    if not rounding < float("inf"):
        return Status.NON_FINITE, *nothing
    image = product + (rounding - damping) * sketch  # shifted, so that the core is definite whatever rounding did to it
    core = (sketch.T @ image).double()
    values, vectors = torch.linalg.eigh((core + core.T) / 2)
    if float(values[0]) < -1000 * rounding:
        return Status.NOT_PSD, *nothing
    usable = values > rounding / 2
    root = image.double() @ (vectors[:, usable] / values[usable].sqrt())
    U, singular, _ = torch.linalg.svd(root, full_matrices=False)
    eigenvalues = (singular.square() - rounding).clamp(min=0)
    keep = eigenvalues + damping > eps * (eigenvalues[:1] + damping)
    return Status.CONVERGED, U[:, keep].to(sketch.dtype), eigenvalues[keep].to(sketch.dtype)


@dataclass(frozen=True, eq=False, kw_only=True)
class NystromInverse(Inverse):
    """``eigenvalues [k]``, largest first, and their vectors ``U [P, k]``, of the undamped matrix."""

    U: Tensor = field(repr=False)
    eigenvalues: Tensor = field(repr=False)
    damping: float

    def _inverse(self, B: Tensor) -> Tensor:
        if len(self.eigenvalues) == 0:
            return B.clone()
        damped = self.eigenvalues + self.damping
        return B + ((B @ self.U) * (damped[-1] / damped - 1)) @ self.U.T


def inverse_of(preconditioner: Preconditioner | InverseFunction | str, operator: CountedOperator, who: str) -> InverseFunction | Status:
    """``M⁻¹`` as a function that is checked where it is the user's own, or what kept it from being made."""
    recipe = Jacobi() if preconditioner == "jacobi" else preconditioner
    inverse = recipe
    if isinstance(recipe, Preconditioner):
        inverse = recipe.factorise(operator.operator.exact)  # rounding would pass for eigenvalues
        operator.absorb(inverse)
    if isinstance(inverse, Inverse):
        return inverse if inverse.status is Status.CONVERGED else inverse.status
    assert callable(inverse)
    custom = inverse

    def checked(R: Tensor) -> Tensor:
        Z = custom(R)
        if not isinstance(Z, Tensor) or Z.shape != R.shape or Z.dtype != R.dtype:
            got = f"{list(Z.shape)} of {Z.dtype}" if isinstance(Z, Tensor) else type(Z).__name__
            raise ShapeError(
                f"{who}: expected the preconditioner to return a tensor like its argument, {list(R.shape)} of {R.dtype}, got {got}; "
                "the rows are the columns still running, not all V."
            )
        return Z.detach()

    return checked


class PreconditionedSolver(Solver):
    """What CG and BlockCG share: a preconditioner, and a start other than zero."""

    preconditioner: Preconditioner | InverseFunction | Literal["jacobi"] | None

    def __post_init__(self) -> None:
        super().__post_init__()
        given = self.preconditioner
        known = given is None or is_one_of(given, ("jacobi",)) or (callable(given) and not isinstance(given, type))
        known = known or isinstance(given, Preconditioner)
        self._require(known, "preconditioner to be None, 'jacobi', a Preconditioner or a function [V, P] -> [V, P]", given)

    def solve(self, operator: LinearOperator, B: Tensor, x0: Tensor | None = None) -> Solution:
        """As :meth:`Solver.solve`, from ``x0`` of the shape of ``B`` (default: zero); one more product per column."""
        return run(self, operator, B, self._solve, x0)

    def prepared(self, operator: LinearOperator) -> Self:
        """The same solver with its preconditioner made for ``operator``, to solve with again and again."""
        check_operator(operator, self.name)
        recipe = Jacobi() if self.preconditioner == "jacobi" else self.preconditioner
        if not isinstance(recipe, Preconditioner):
            return self
        solver: Any = self  # whose dataclass has the field
        prepared: Self = replace(solver, preconditioner=recipe.factorise(operator.exact))
        return prepared

    def _require_kept(self, value: int | None) -> None:
        valid = value is None or (is_whole(value) and value >= 0)
        self._require(valid, "reorthogonalise to be None or an integer of at least 0", value, "it is how many past residuals to keep")
        self._keep("reorthogonalise", None if value is None else int(value))

    @abc.abstractmethod
    def _solve(self, operator: CountedOperator, B: Tensor, x0: Tensor | None = None) -> Outcome:
        """As :meth:`Solver._solve`, from ``x0``."""
