"""Losses: value, gradient, Hessian and Bregman divergence at the network's outputs.

A loss is given as an ``nn`` module, the name of its functional, or the functional itself, and resolved once into a :class:`Loss`.
``ℓ_n`` is the loss applied to example n alone; the reduction over examples enters as one factor, :meth:`Loss.factor`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import influence_ext._C as _C
from influence_ext.errors import ArgumentError, DataError, DTypeError, ShapeError, UnsupportedLossError

LossLike = str | nn.Module | Callable[..., Any]


class HalfMSE(nn.Module):
    """``½ (z − t)²``, averaged over all elements or summed: the squared loss whose Hessian is the identity.

    Args:
        reduction: ``"mean"`` (over examples and elements) or ``"sum"``.
    """

    def __init__(self, reduction: str = "mean"):
        super().__init__()
        self.reduction = reduction

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """``[N, *out], [N, *out] -> scalar``."""
        return half_mse_loss(output, target, reduction=self.reduction)


def half_mse_loss(output: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    """Functional form of :class:`HalfMSE`."""
    return F.mse_loss(output, target, reduction=reduction) / 2


@dataclass(frozen=True, eq=False)
class OutputHessian:
    """``w_n H_n`` of every example, in one of three shapes: ``s I``, ``diag d_n`` or ``diag p_n − p_n p_nᵀ``.

    Attributes:
        shape: 0, 1 or 2 in this order.
        scale: s; multiplies the other two shapes as well.
        state: ``[N, C]``, d or p; None for shape 0.
        weights: ``[N]``, w ≥ 0; None for ones.
    """

    shape: int
    scale: float
    state: Tensor | None
    weights: Tensor | None

    def matmat(self, U: Tensor) -> Tensor:
        """``w_n H_n u[v, n]``: ``[V, N, *out] -> [V, N, *out]``."""
        return self._apply(0, U)

    def root_matmat(self, U: Tensor) -> Tensor:
        """``S_n u[v, n]`` with ``S_n S_nᵀ = w_n H_n``."""
        return self._apply(1, U)

    def root_rmatmat(self, U: Tensor) -> Tensor:
        """``S_nᵀ u[v, n]``."""
        return self._apply(2, U)

    def scaled(self, factor: float) -> OutputHessian:
        """``factor · w_n H_n``, sharing the state."""
        return replace(self, scale=self.scale * factor)

    def _apply(self, part: int, U: Tensor) -> Tensor:
        result = U.detach().clone(memory_format=torch.contiguous_format)
        flat = result.view(result.shape[0], result.shape[1], -1)
        _C.output_hessian(self.shape, self.scale, self.state, self.weights, part, flat)
        return result


@dataclass(frozen=True)
class Loss:
    """A resolved loss. Outputs are ``z [N, *out]``; all methods work on any number of examples.

    Attributes:
        name: of the functional, for messages.
        native: name of the C++ loss.
        reduction: ``"mean"`` or ``"sum"`` over examples.
        element_scale: weight of an element in its example's loss when examples hold one element; with ``averages_elements`` it is
            divided by the number of elements of an example, as a mean-reduced loss does.
        averages_elements: whether ℓ_n is a mean over the elements of the example.
    """

    name: str
    native: str
    reduction: str
    element_scale: float = 1.0
    averages_elements: bool = False

    def factor(self, num_examples: int) -> float:
        """The c in ``J = c Σ ℓ_n``: 1/N for ``"mean"``, 1 for ``"sum"``."""
        return 1.0 / num_examples if self.reduction == "mean" else 1.0

    def value(self, z: Tensor, target: Tensor) -> Tensor:
        """``ℓ_n``: ``[N]``.

        Raises:
            ShapeError, DTypeError, DataError: the target does not fit the output, or a class index is out of range.
        """
        rows, target = self._check(z, target)
        out = rows.new_empty(rows.shape[0])
        _C.loss_evaluate(self.native, self._scale(rows), rows, target, out, None, None)
        return out

    def gradient(self, z: Tensor, target: Tensor) -> Tensor:
        """``∇_z ℓ_n``, shaped like ``z``. Raises as :meth:`value`."""
        rows, target = self._check(z, target)
        out = torch.empty_like(rows)
        _C.loss_evaluate(self.native, self._scale(rows), rows, target, None, out, None)
        return out.view(z.shape)

    def hessian(self, z: Tensor, target: Tensor, weights: Tensor | None = None) -> OutputHessian:
        """``H_n = ∇²_z ℓ_n``, times ``weights[n] ≥ 0`` if given. Raises as :meth:`value`."""
        rows, target = self._check(z, target)
        shape, scale, has_state = _C.loss_hessian(self.native, self._scale(rows))
        state = None
        if has_state:
            state = torch.empty_like(rows)
            _C.loss_evaluate(self.native, self._scale(rows), rows, target, None, None, state)
        if weights is not None:
            if weights.shape != (z.shape[0],) or bool((weights < 0).any()):
                raise ArgumentError(
                    f"{self.name}: expected weights [N] = [{z.shape[0]}], none negative, got {list(weights.shape)} "
                    f"with minimum {float(weights.min()) if weights.numel() else 0.0:g}; pass one weight an example."
                )
            weights = weights.to(rows.dtype).contiguous()
        return OutputHessian(shape, scale, state, weights)

    def bregman(self, z: Tensor, z_s: Tensor, target: Tensor) -> Tensor:
        """``D_n = ℓ_n(z) − ℓ_n(z_s) − ∇ℓ_n(z_s)ᵀ(z − z_s)``: ``[N]``, evaluated without cancellation.

        ``s‖z − z_s‖²`` for squared errors, ``KL(p(z_s) ‖ p(z))`` for the cross-entropies. Its gradient in z is
        ``gradient(z, t) − gradient(z_s, t)`` and its Hessian ``hessian(z, t)``. Raises as :meth:`value`.
        """
        rows, _ = self._check(z, target)
        reference, _ = self._check(z_s, target)
        out = rows.new_empty(rows.shape[0])
        _C.loss_bregman(self.native, self._scale(rows), rows, reference, out)
        return out

    def check(self, z: Tensor, target: Tensor, who: str) -> None:
        """Raise with the caller's name if the target does not fit the output."""
        self._check(z, target, who)

    def _scale(self, rows: Tensor) -> float:
        return self.element_scale / rows.shape[1] if self.averages_elements else self.element_scale

    def _check(self, z: Tensor, target: Tensor, who: str | None = None) -> tuple[Tensor, Tensor]:
        """``z`` as rows ``[N, C]`` and the target as the kernel takes it."""
        who = who or self.name
        if z.dtype not in (torch.float32, torch.float64):
            raise DTypeError(f"{who}: expected outputs of float32 or float64, got {z.dtype}; run the model in one of these.")
        N = z.shape[0]
        rows = z.detach().reshape(N, -1 if N else math.prod(z.shape[1:])).contiguous()
        if self.native == "cross_entropy":
            return rows, self._check_classes(z, target, who)
        target = target.detach()
        if target.shape != z.shape:
            hint = f"target.view({', '.join(map(str, z.shape))})" if target.numel() == z.numel() else "one value an output"
            raise ShapeError(
                f"{who}: expected targets shaped like the outputs {list(z.shape)}, got {list(target.shape)} "
                f"(PyTorch would broadcast these against each other); pass {hint}."
            )
        if target.is_floating_point() and target.dtype != z.dtype:
            raise DTypeError(f"{who}: expected targets of dtype {z.dtype}, got {target.dtype}; convert them with y.to({z.dtype}).")
        target = target.to(z.dtype).reshape(rows.shape).contiguous()
        if self.native == "binary_cross_entropy" and target.numel() and bool(((target < 0) | (target > 1)).any()):
            raise DataError(
                f"{who}: expected targets in [0, 1], got values from {float(target.min()):g} to {float(target.max()):g}; "
                "pass probabilities or 0/1 labels."
            )
        return rows, target

    def _check_classes(self, z: Tensor, target: Tensor, who: str) -> Tensor:
        if z.dim() != 2:
            raise ShapeError(f"{who}: expected outputs [N, C] (one row of logits an example), got {list(z.shape)}; flatten them.")
        if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
            raise DTypeError(
                f"{who}: expected class indices as integers [N], got {target.dtype} {list(target.shape)}; "
                "convert them with y.long() (probabilities as targets are not supported)."
            )
        if target.shape != z.shape[:1]:
            raise ShapeError(f"{who}: expected class indices [N] = [{z.shape[0]}], got {list(target.shape)}; pass one a example.")
        target = target.detach().to(torch.int64).contiguous()
        outside = ((target < 0) | (target >= z.shape[1])).nonzero()[:, 0]
        if len(outside):
            first = int(outside[0])
            raise DataError(
                f"{who}: expected class indices in [0, {z.shape[1]}), got {int(target[first])} in example {first} "
                f"({len(outside)} of {len(target)} examples); correct the labels."
            )
        return target


@dataclass(frozen=True)
class _Native:
    """How a PyTorch loss maps onto a C++ one, and which of its options must keep their default."""

    module: type[nn.Module]
    functional: Callable[..., Tensor]
    native: str
    element_scale: float = 1.0
    averages_elements: bool = False
    defaults: tuple[tuple[str, Any], ...] = ()


NATIVE: dict[str, _Native] = {
    "mse_loss": _Native(nn.MSELoss, F.mse_loss, "squared_error", averages_elements=True),
    "half_mse_loss": _Native(HalfMSE, half_mse_loss, "squared_error", element_scale=0.5, averages_elements=True),
    "cross_entropy": _Native(
        nn.CrossEntropyLoss,
        F.cross_entropy,
        "cross_entropy",
        defaults=(("weight", None), ("ignore_index", -100), ("label_smoothing", 0.0)),
    ),
    "binary_cross_entropy_with_logits": _Native(
        nn.BCEWithLogitsLoss,
        F.binary_cross_entropy_with_logits,
        "binary_cross_entropy",
        averages_elements=True,
        defaults=(("weight", None), ("pos_weight", None)),
    ),
}
"""Losses with a native implementation, by the name of their functional."""

_SHORT_NAMES = {"mse": "mse_loss", "half_mse": "half_mse_loss", "bce_with_logits": "binary_cross_entropy_with_logits"}


def resolve(loss: LossLike | Loss, reduction: str | None = None, who: str = "loss") -> Loss:
    """Turn what a user calls a loss into a :class:`Loss`.

    Args:
        loss: ``nn.MSELoss``, :class:`HalfMSE`, ``nn.CrossEntropyLoss`` or ``nn.BCEWithLogitsLoss`` (an instance), the name of the
            functional (``"mse_loss"``, ``"half_mse_loss"``, ``"cross_entropy"``, ``"binary_cross_entropy_with_logits"``), the functional
            itself, or a ``Loss``.
        reduction: ``"mean"`` or ``"sum"`` over examples; by default the module's own, and ``"mean"`` for names and functionals.
        who: the caller's name for messages.

    Raises:
        UnsupportedLossError: no native implementation, an option of the loss that has none, or an unknown reduction.
    """
    if isinstance(loss, Loss):
        return loss if reduction is None else replace(loss, reduction=_check_reduction(reduction, loss.name, who))
    if isinstance(loss, type) and issubclass(loss, nn.Module):
        raise UnsupportedLossError(f"{who}: expected an instance of a loss, got the class {loss.__name__}; write {loss.__name__}().")
    for name, entry in NATIVE.items():
        if type(loss) is entry.module:
            changed = [
                f"{option}={getattr(loss, option)!r}"
                for option, default in entry.defaults
                if not (getattr(loss, option) is default or getattr(loss, option) == default)
            ]
            if changed:
                raise UnsupportedLossError(
                    f"{who}: expected {type(loss).__name__} with default options, got {', '.join(changed)}; this option has no "
                    "native implementation yet."
                )
            found = str(getattr(loss, "reduction", "mean"))
            return _make(name, _check_reduction(reduction or found, type(loss).__name__, who))
        if loss is entry.functional or (isinstance(loss, str) and _SHORT_NAMES.get(loss, loss) == name):
            return _make(name, _check_reduction(reduction or "mean", name, who))
    given = repr(loss) if isinstance(loss, str) else getattr(loss, "__name__", type(loss).__name__)
    raise UnsupportedLossError(
        f"{who}: expected a loss with a native implementation ({', '.join(NATIVE)}; as nn module, functional or name), got {given}; "
        "use one of these."
    )


def _make(name: str, reduction: str) -> Loss:
    entry = NATIVE[name]
    averages = entry.averages_elements and reduction == "mean"
    return Loss(name, entry.native, reduction, entry.element_scale, averages)


def _check_reduction(reduction: str, name: str, who: str) -> str:
    if reduction not in ("mean", "sum"):
        raise UnsupportedLossError(f"{who}: expected {name} with reduction 'mean' or 'sum', got {reduction!r}; set one of these.")
    return reduction
