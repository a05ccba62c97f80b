"""What a loss is to the rest of the library, and the checks that all losses share."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from influence_ext.errors import ArgumentError, DataError, DTypeError, ShapeError, UnsupportedLossError
from influence_ext.losses.hessian import OutputHessian


@dataclass(frozen=True)
class KernelLoss:
    """A loss on some targets, as the kernels take it.

    Attributes:
        name: of the kernel's loss.
        scale: weight of each element in its example's loss.
        parameter: the loss's own.
        shape: of the outputs as rows, ``[N, C]`` or ``[N, K, positions]``.
        target: ``[N, C]``, or class indices ``[N, positions]`` with −1 where a position does not count.
        weight: of elements ``[C]`` or ``[N, C]``, or of classes ``[K]``.
    """

    name: str
    scale: float
    parameter: float
    shape: tuple[int, ...]
    target: Tensor
    weight: Tensor | None


class Loss(ABC):
    """A resolved loss ``J = c Σ_n ℓ_n``. Outputs are ``z [N, *out]``; all methods work on any number of examples.

    ``ℓ_n`` depends on example n alone. Where nothing weighs the targets it is the loss applied to the example as a batch of one. Where
    class weights or an ``ignore_index`` make PyTorch's mean a weighted one, ``ℓ_n`` is the sum of the weighted terms over the number of
    positions, and c carries the denominator of the whole data set.

    Attributes:
        name: for messages.
        reduction: ``"mean"`` or ``"sum"``.
    """

    name: str
    reduction: str

    def total_weight(self, targets: Tensor) -> float:
        """What a mean divides ``Σ ℓ_n`` by: N, unless targets weigh differently. Adds up over parts of a data set.

        Args:
            targets: ``[N, ...]``.
        """
        return float(targets.shape[0])

    def factor(self, targets: Tensor) -> float:
        """The c in ``J = c Σ ℓ_n`` over the data set with these targets: ``1/total_weight`` for ``"mean"``, 1 for ``"sum"``.

        Args:
            targets: ``[N, ...]``, of the whole data set.

        Raises:
            DataError: no target counts.
        """
        total = self.total_weight(targets)
        if total == 0 and targets.numel():
            raise DataError(
                f"{self.name}: expected a target that counts, got none among {targets.numel()} (all are ignored, or of classes of weight "
                "zero); drop these examples or correct the labels."
            )
        return 1.0 / total if self.reduction == "mean" else 1.0

    @property
    def is_linear(self) -> bool:
        """Whether the loss is linear in the outputs wherever it has a derivative: ``H_n`` is zero, and no Gauss-Newton matrix exists."""
        return False

    @abstractmethod
    def value(self, z: Tensor, target: Tensor) -> Tensor:
        """``ℓ_n``: ``[N]``.

        Raises:
            ShapeError, DTypeError, DataError: the target does not fit the output, or lies outside the loss's domain.
        """

    @abstractmethod
    def gradient(self, z: Tensor, target: Tensor) -> Tensor:
        """``∇_z ℓ_n``, shaped like ``z``. Raises as :meth:`value`."""

    @abstractmethod
    def hessian(self, z: Tensor, target: Tensor, weights: Tensor | None = None) -> OutputHessian:
        """``H_n = ∇²_z ℓ_n``, times ``weights[n] ≥ 0`` if given.

        Raises:
            UnsupportedLossError: the loss is linear (:attr:`is_linear`).
            ArgumentError: weights that are not ``[N]`` or negative.
            ShapeError, DTypeError, DataError: see :meth:`value`.
        """

    @abstractmethod
    def bregman(self, z: Tensor, z_s: Tensor, target: Tensor) -> Tensor:
        """``D_n = ℓ_n(z) − ℓ_n(z_s) − ∇ℓ_n(z_s)ᵀ(z − z_s)``: ``[N]``, evaluated without cancellation.

        Its gradient in z is ``gradient(z, t) − gradient(z_s, t)`` and its Hessian ``hessian(z, t)``. Raises as :meth:`value`.
        """

    @abstractmethod
    def check(self, z: Tensor, target: Tensor, who: str) -> None:
        """Raise with the caller's name if the target does not fit the output, or the loss there is not finite."""

    def as_kernel(self, z: Tensor, target: Tensor) -> KernelLoss | None:
        """What the kernels take for these targets and any outputs shaped like ``z``, up to terms of the value that depend on targets alone.

        None where there is no kernel, or where outputs have to be checked before it. Raises as :meth:`value`.
        """
        return None

    def checked_gradient(self, z: Tensor, target: Tensor, who: str) -> Tensor:
        """:meth:`gradient` of data that comes from outside, checked as :meth:`check` does. A loss may do both in one pass."""
        self.check(z, target, who)
        return self.gradient(z, target)

    @abstractmethod
    def with_reduction(self, reduction: str) -> Loss:
        """The same loss with another reduction."""


def check_outputs(z: Tensor, who: str) -> None:
    """Raise unless ``z`` is of a type the library computes in."""
    if z.dtype not in (torch.float32, torch.float64):
        raise DTypeError(f"{who}: expected outputs of float32 or float64, got {z.dtype}; run the model in one of these.")
    if z.dim() == 0:
        raise ShapeError(f"{who}: expected outputs [N, ...] with the examples first, got a scalar; return one output an example.")


def check_weights(weights: Tensor | None, z: Tensor, name: str) -> Tensor | None:
    """``weights`` in the type of ``z`` if they are ``[N]`` and none is negative."""
    if weights is None:
        return None
    expected = f"{name}: expected weights [N] = [{z.shape[0]}] on {z.device}, finite and none negative"
    if not isinstance(weights, Tensor):
        raise ArgumentError(f"{expected}, got {type(weights).__name__}; pass a tensor.")
    dense = weights.layout == torch.strided and not weights.is_complex()
    if not dense or weights.shape != (z.shape[0],) or weights.device != z.device:
        found = f"{weights.dtype} {list(weights.shape)} on {weights.device}" + ("" if dense else f", {weights.layout}")
        raise ArgumentError(f"{expected}, got {found}; pass one weight an example.")
    weights = weights.detach()
    if not bool((weights.isfinite() & (weights >= 0)).all()):
        raise ArgumentError(f"{expected}, got minimum {float(weights.min()):g} and maximum {float(weights.max()):g}; correct them.")
    return weights.to(z.dtype).contiguous()


def check_reduction(reduction: str, name: str, who: str) -> str:
    """``reduction`` if it is one of the two there are."""
    if reduction not in ("mean", "sum"):
        raise UnsupportedLossError(f"{who}: expected {name} with reduction 'mean' or 'sum', got {reduction!r}; set one of these.")
    return reduction


def count(shape: torch.Size | tuple[int, ...]) -> int:
    """Number of elements of one example, whose axes are all but the first."""
    return math.prod(shape[1:])
