"""The first-order quantities that a backward pass can leave on parameters, under BackPACK's names."""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from influence_ext.adapters.backward import ForwardPass
from influence_ext.errors import ArgumentError

__all__ = ["BatchGrad", "BatchL2Grad", "SumGradSquared", "Variance"]


class Extension(ABC):
    """A quantity that a backward pass leaves in an attribute of every parameter; overwritten by the next pass.

    Attributes:
        savefield: the attribute's name.
    """

    savefield: ClassVar[str]

    @abstractmethod
    def compute(self, call: ForwardPass, cotangents: Tensor, factors: Any) -> dict[str, Tensor]:
        """The quantity by parameter."""

    @abstractmethod
    def of_rows(self, rows: Tensor) -> Tensor:
        """The quantity of one parameter from its gradients ``[N, *shape]``."""


class BatchGrad(Extension):
    """``p.grad_batch [N, *shape]``: the gradient of each example's part of the loss.

    Args:
        subsampling: indices of the examples wanted, negative ones from the end; default all.
    """

    savefield = "grad_batch"

    def __init__(self, subsampling: Sequence[int] | None = None):
        try:
            self.subsampling = None if subsampling is None else [operator.index(n) for n in subsampling]
        except TypeError:
            raise ArgumentError(f"backpack: expected subsampling as a list of indices, got {subsampling!r}; pass integers.") from None

    def compute(self, call: ForwardPass, cotangents: Tensor, factors: Any) -> dict[str, Tensor]:
        """See :class:`Extension`. Cost: N·P elements written."""
        return {name: self.of_rows(rows) for name, rows in call.rows(factors).items()}

    def of_rows(self, rows: Tensor) -> Tensor:
        """See :class:`Extension`."""
        if self.subsampling is None:
            return rows
        outside = [index for index in self.subsampling if not -len(rows) <= index < len(rows)]
        if outside:
            raise IndexError(
                f"backpack: expected subsampling with indices from {-len(rows)} to {len(rows) - 1}, got {outside[0]}; "
                "name examples of the batch."
            )
        return rows[self.subsampling]

    def __repr__(self) -> str:
        return f"BatchGrad(subsampling={self.subsampling})"


class BatchL2Grad(Extension):
    """``p.batch_l2 [N]``: the squared norm of each example's gradient by this parameter; where a layer works on vectors none is formed."""

    savefield = "batch_l2"

    def compute(self, call: ForwardPass, cotangents: Tensor, factors: Any) -> dict[str, Tensor]:
        """See :class:`Extension`."""
        return call.square_norms(factors)

    def of_rows(self, rows: Tensor) -> Tensor:
        """See :class:`Extension`."""
        return rows.flatten(1).square().sum(dim=1)


class SumGradSquared(Extension):
    """``p.sum_grad_squared [*shape]``: the elementwise sum over the examples of their squared gradients."""

    savefield = "sum_grad_squared"

    def compute(self, call: ForwardPass, cotangents: Tensor, factors: Any) -> dict[str, Tensor]:
        """See :class:`Extension`."""
        return call.square_sums(factors)

    def of_rows(self, rows: Tensor) -> Tensor:
        """See :class:`Extension`."""
        return rows.square().sum(dim=0)


class Variance(Extension):
    """``p.variance [*shape]``: the elementwise variance of the examples' gradients, with 1/N: mean of squares less square of the mean."""

    savefield = "variance"

    def compute(self, call: ForwardPass, cotangents: Tensor, factors: Any) -> dict[str, Tensor]:
        """See :class:`Extension`. Cost: one cotangent sweep more."""
        N, sums = call.num_examples, call.sums(cotangents)
        return {name: squares / N - (sums[name] / N).square() for name, squares in call.square_sums(factors).items()}

    def of_rows(self, rows: Tensor) -> Tensor:
        """See :class:`Extension`."""
        return rows.var(dim=0, correction=0)
