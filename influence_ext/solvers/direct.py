"""Dense Cholesky, for few parameters."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from influence_ext.context import standalone
from influence_ext.errors import ArgumentError
from influence_ext.operators.base import LinearOperator
from influence_ext.solvers.base import CountedOperator, check_operator
from influence_ext.solvers.factorisation import Factorisation, FactorisingSolver, cholesky


@dataclass(frozen=True)
class Direct(FactorisingSolver):
    """Dense Cholesky of the whole matrix in the operator's dtype, with one step of iterative refinement.

    Attributes:
        max_parameters: Refuse larger matrices, which take P² numbers twice over.
        rtol: See :class:`FactorisingSolver`.

    Statistics: ``refinements`` per column.

    Raises:
        ArgumentError: an option makes no sense; on solving, more than ``max_parameters`` parameters.

    Cost: ``operator.to_dense()`` (counted as P products), P³/3 operations and 2 P² numbers of memory once; then 2 P²
    operations and a product per column, twice with refinement.

    Reference: Golub and Van Loan, "Matrix Computations", 4.2 (Cholesky) and 3.5 (iterative refinement).
    """

    max_parameters: int = 20_000

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_count("max_parameters", self.max_parameters)

    @standalone
    def factorise(self, operator: LinearOperator) -> DirectFactorisation:
        """The Cholesky factor, to solve with again and again.

        Raises:
            ArgumentError: the operator has more than ``max_parameters`` parameters.
        """
        operator = check_operator(operator, "Direct").exact
        P = operator.num_parameters
        if self.max_parameters < P:
            size = P * P * operator.dtype.itemsize / 2**30
            raise ArgumentError(
                f"Direct: expected at most max_parameters = {self.max_parameters} parameters, got {P}, whose dense "
                f"matrix takes {size:.1f} GiB; use Dual (exact, through the outputs) or CG, or raise max_parameters."
            )
        counted = CountedOperator(operator)
        # a pivot of this size is what rounding leaves of a zero one; it is no sign of a definite matrix
        rounding = 4 * torch.finfo(operator.dtype).eps * math.sqrt(P)
        factor, status = cholesky(counted.to_dense(), rounding)
        return DirectFactorisation(
            operator=operator,
            solver=self,
            status=status,
            num_products=counted.num_products,
            num_calls=counted.num_calls,
            factor=factor,
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class DirectFactorisation(Factorisation):
    """``A = L Lᵀ``; ``factor`` is L, ``[P, P]``."""

    factor: Tensor = field(repr=False)

    def _inverse(self, B: Tensor) -> Tensor:
        return torch.cholesky_solve(B.T, self.factor).T.contiguous()
