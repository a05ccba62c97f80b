"""A loss of some elements of the outputs in another arrangement: what callables such as
``lambda z, t: F.cross_entropy(z.flatten(0, 1), t.flatten())`` are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from influence_ext.losses.base import Loss
from influence_ext.losses.hessian import GENERIC, SOFTMAX, SOFTMAX_LAST, OutputHessian


@dataclass(frozen=True, eq=False)
class MovedLoss(Loss):
    """``ℓ_n(z, t) = inner_n(P z, Q t)``, P and Q selections of an example's elements, each at most once.

    Attributes:
        name: see :class:`Loss`.
        inner: the loss of the selected elements.
        outputs: ``[*inner outputs]``, the number of each selected element in one example of z.
        targets: the same of t.
        target_dtype: what the selected targets are converted to.
    """

    name: str
    inner: Loss
    outputs: Tensor
    targets: Tensor
    target_dtype: torch.dtype

    @property
    def reduction(self) -> str:  # type: ignore[override]
        """That of the inner loss."""
        return self.inner.reduction

    @property
    def is_linear(self) -> bool:
        """Whether the inner loss is."""
        return self.inner.is_linear

    def total_weight(self, targets: Tensor) -> float:
        """See :meth:`Loss.total_weight`."""
        return self.inner.total_weight(self._targets(targets))

    def with_reduction(self, reduction: str) -> Loss:
        """See :meth:`Loss.with_reduction`."""
        return MovedLoss(self.name, self.inner.with_reduction(reduction), self.outputs, self.targets, self.target_dtype)

    def check(self, z: Tensor, target: Tensor, who: str) -> None:
        """See :meth:`Loss.check`."""
        self.inner.check(self._outputs(z), self._targets(target), who)

    def value(self, z: Tensor, target: Tensor) -> Tensor:
        """See :meth:`Loss.value`."""
        return self.inner.value(self._outputs(z), self._targets(target))

    def gradient(self, z: Tensor, target: Tensor) -> Tensor:
        """See :meth:`Loss.gradient`."""
        return self._put_back(self.inner.gradient(self._outputs(z), self._targets(target)), z)

    def checked_gradient(self, z: Tensor, target: Tensor, who: str) -> Tensor:
        """See :meth:`Loss.checked_gradient`."""
        return self._put_back(self.inner.checked_gradient(self._outputs(z), self._targets(target), who), z)

    def hessian(self, z: Tensor, target: Tensor, weights: Tensor | None = None) -> OutputHessian:
        """See :meth:`Loss.hessian`: the core's own where the elements keep their order, or classes are the outputs' last axis."""
        inner = self.inner.hessian(self._outputs(z), self._targets(target), weights)
        order = self._order(z)
        if inner.native and order == "kept":
            return inner
        if inner.shape == SOFTMAX and order == "transposed":
            assert inner.state is not None
            return replace(inner, shape=SOFTMAX_LAST, state=inner.state.transpose(1, 2).contiguous())
        return MovedHessian(GENERIC, 1.0, None, None, inner, self.outputs)

    def bregman(self, z: Tensor, z_s: Tensor, target: Tensor) -> Tensor:
        """See :meth:`Loss.bregman`."""
        return self.inner.bregman(self._outputs(z), self._outputs(z_s), self._targets(target))

    def _order(self, z: Tensor) -> Literal["kept", "transposed", "other"]:
        """How all elements of an example reach the inner loss: as they are, the last axis first, or otherwise."""
        return self._whole_order if self.outputs.numel() == z.shape[1:].numel() else "other"

    @cached_property
    def _whole_order(self) -> Literal["kept", "transposed", "other"]:
        in_order = torch.arange(self.outputs.numel(), device=self.outputs.device)
        if torch.equal(self.outputs.flatten(), in_order):
            return "kept"
        return "transposed" if self.outputs.dim() == 2 and torch.equal(self.outputs.T.flatten(), in_order) else "other"

    def _outputs(self, z: Tensor) -> Tensor:
        """P z; nothing is copied where that is a view."""
        order, shape = self._order(z), self.outputs.shape
        if order == "kept":
            return z.reshape(len(z), *shape)
        return z.reshape(len(z), *shape[::-1]).transpose(1, 2) if order == "transposed" else select(z, self.outputs, lead=1)

    def _put_back(self, gradient: Tensor, z: Tensor) -> Tensor:
        """Pᵀ gradient."""
        order = self._order(z)
        if order == "other":
            return put_back(gradient, self.outputs, z.shape[1:], lead=1)
        return (gradient if order == "kept" else gradient.transpose(1, 2)).reshape(z.shape)

    def _targets(self, target: Tensor) -> Tensor:
        """Q t; nothing is copied where that is a view."""
        if self._takes_all_targets and self.targets.numel() == target.shape[1:].numel():
            return target.reshape(len(target), *self.targets.shape).to(self.target_dtype)
        return select(target, self.targets, lead=1).to(self.target_dtype)

    @cached_property
    def _takes_all_targets(self) -> bool:
        """Whether targets reach the inner loss in their order, each once."""
        return torch.equal(self.targets.flatten(), torch.arange(self.targets.numel(), device=self.targets.device))


@dataclass(frozen=True, eq=False)
class MovedHessian(OutputHessian):
    """``Pᵀ H_n P`` with the root ``Pᵀ S_n P``, which is one since ``P Pᵀ = I``.

    Attributes:
        inner: H_n.
        outputs: P, see :class:`MovedLoss`.
    """

    inner: OutputHessian
    outputs: Tensor

    def matmat(self, U: Tensor) -> Tensor:
        """``[V, N, *out] -> [V, N, *out]``. Cost: that of the inner product, and moving U twice."""
        return self._moved(self.inner.matmat, U)

    def root_matmat(self, U: Tensor) -> Tensor:
        """``Pᵀ S_n P u[v, n]``."""
        return self._moved(self.inner.root_matmat, U)

    def root_rmatmat(self, U: Tensor) -> Tensor:
        """``Pᵀ S_nᵀ P u[v, n]``."""
        return self._moved(self.inner.root_rmatmat, U)

    def scaled(self, factor: float) -> OutputHessian:
        """``factor · H_n``, sharing the state."""
        return MovedHessian(GENERIC, 1.0, None, None, self.inner.scaled(factor), self.outputs)

    def _moved(self, multiply: Callable[[Tensor], Tensor], U: Tensor) -> Tensor:
        return put_back(multiply(select(U.detach(), self.outputs, lead=2)), self.outputs, U.shape[2:], lead=2)


def select(x: Tensor, index: Tensor, lead: int) -> Tensor:
    """Elements of each example: ``[*lead, ...] -> [*lead, *index.shape]``."""
    flat = x.reshape(*x.shape[:lead], x.shape[lead:].numel())
    return flat.index_select(-1, index.flatten().to(x.device)).reshape(*x.shape[:lead], *index.shape)


def put_back(x: Tensor, index: Tensor, shape: torch.Size, lead: int) -> Tensor:
    """The transpose of :func:`select`: ``[*lead, *index.shape] -> [*lead, *shape]``, zero where nothing was selected."""
    out = x.new_zeros(*x.shape[:lead], shape.numel())
    out.index_copy_(-1, index.flatten().to(x.device), x.reshape(*x.shape[:lead], index.numel()))
    return out.reshape(*x.shape[:lead], *shape)
