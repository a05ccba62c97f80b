"""Losses that are a sum or a mean over the elements of an example; their Hessian is diagonal."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import influence_ext._C as _C
from influence_ext.errors import DataError, DTypeError, ShapeError, UnsupportedLossError
from influence_ext.finite import all_finite
from influence_ext.losses.base import KernelLoss, Loss, check_outputs, check_weights, count
from influence_ext.losses.hessian import DIAGONAL, SCALED_IDENTITY, OutputHessian
from influence_ext.params import widened_dtype


@dataclass(frozen=True)
class Prepared:
    """What the kernel takes: outputs and targets as rows ``[N, C]``, weights of elements ``[C]`` or ``[N, C]`` or None."""

    rows: Tensor
    target: Tensor
    weight: Tensor | None


@dataclass(frozen=True)
class ElementwiseLoss(Loss):
    """``ℓ_n = s Σ_c w_c φ(z_nc, t_nc)`` with φ of csrc/math/losses.h.

    Attributes:
        name, reduction: see :class:`Loss`; ``"mean"`` averages over the elements of an example as well.
        native: name of φ.
        element_scale: s for a sum; for a mean it is divided by the number of elements.
        parameter: of φ.
        weight: w, anything that broadcasts to the outputs of one example; None for ones.
    """

    name: str
    reduction: str
    native: str
    element_scale: float = 1.0
    parameter: float = 0.0
    weight: Tensor | None = None

    def value(self, z: Tensor, target: Tensor) -> Tensor:
        """See :meth:`Loss.value`."""
        return self._values(self._prepare(z, target, self.name), z, target)

    def gradient(self, z: Tensor, target: Tensor) -> Tensor:
        """See :meth:`Loss.gradient`."""
        prepared = self._prepare(z, target, self.name)
        out = torch.empty_like(prepared.rows)
        self._evaluate(prepared, gradient=out)
        return out.view(z.shape)

    def hessian(self, z: Tensor, target: Tensor, weights: Tensor | None = None) -> OutputHessian:
        """See :meth:`Loss.hessian`."""
        prepared = self._prepare(z, target, self.name)
        checked = check_weights(weights, z, self.name)
        if self.native == "squared_error" and prepared.weight is None:
            return OutputHessian(SCALED_IDENTITY, 2 * self._scale(z), None, checked)
        state = torch.empty_like(prepared.rows)
        self._evaluate(prepared, state=state)
        return OutputHessian(DIAGONAL, 1.0, state, checked)

    def bregman(self, z: Tensor, z_s: Tensor, target: Tensor) -> Tensor:
        """See :meth:`Loss.bregman`."""
        prepared = self._prepare(z, target, self.name)
        reference = self._prepare(z_s, target, self.name).rows
        out = prepared.rows.new_empty(z.shape[0])
        self._evaluate(prepared, z_s=reference, bregman=out)
        return out

    def check(self, z: Tensor, target: Tensor, who: str) -> None:
        """See :meth:`Loss.check`."""
        self._check_values(self._prepare(z, target, who), z, target, who)

    def checked_gradient(self, z: Tensor, target: Tensor, who: str) -> Tensor:
        """See :meth:`Loss.checked_gradient`."""
        prepared = self._prepare(z, target, who)
        out = torch.empty_like(prepared.rows)
        self._check_values(prepared, z, target, who, gradient=out)
        return out.view(z.shape)

    def as_kernel(self, z: Tensor, target: Tensor) -> KernelLoss | None:
        """See :meth:`Loss.as_kernel`: None where the loss is not defined for all outputs."""
        if self.native in ("probability_cross_entropy", "poisson_rate"):
            return None
        prepared = self._prepare(z, target, self.name)
        rows = prepared.rows
        return KernelLoss(self.native, self._scale(rows), self.parameter, tuple(rows.shape), prepared.target, prepared.weight)

    def with_reduction(self, reduction: str) -> Loss:
        """See :meth:`Loss.with_reduction`."""
        return replace(self, reduction=reduction)

    def _values(self, prepared: Prepared, z: Tensor, target: Tensor, **results: Tensor) -> Tensor:
        """``ℓ_n``, and what else is wanted in the same pass."""
        out = prepared.rows.new_empty(z.shape[0])
        self._evaluate(prepared, value=out, **results)
        constant = self._constant(z, target)
        return out if constant is None else out.add_(constant.to(out.dtype))

    def _check_values(self, prepared: Prepared, z: Tensor, target: Tensor, who: str, **results: Tensor) -> None:
        values = self._values(prepared, z, target, **results)
        if not all_finite(values):
            bad = (~torch.isfinite(values)).nonzero()[:, 0]
            raise DataError(
                f"{who}: expected finite values of {self.name}, got NaN or infinity for example {int(bad[0])} ({len(bad)} of {z.shape[0]} "
                f"examples); {self._remedy()}."
            )

    def _evaluate(self, prepared: Prepared, z_s: Tensor | None = None, **results: Tensor) -> None:
        scale = self._scale(prepared.rows)
        _C.loss_evaluate(self.native, scale, self.parameter, prepared.rows, prepared.target, prepared.weight, z_s, results)

    def _scale(self, z: Tensor) -> float:
        return self.element_scale / max(count(z.shape), 1) if self.reduction == "mean" else self.element_scale

    def _prepare(self, z: Tensor, target: Tensor, who: str) -> Prepared:
        check_outputs(z, who)
        target = target.detach()
        if target.shape != z.shape:
            hint = f"target.view({', '.join(map(str, z.shape))})" if target.numel() == z.numel() else "one value an output"
            raise ShapeError(
                f"{who}: expected targets shaped like the outputs {list(z.shape)}, got {list(target.shape)} "
                f"(PyTorch would broadcast these against each other); pass {hint}."
            )
        rows = z.detach().reshape(z.shape[0], count(z.shape)).contiguous()
        return Prepared(rows, _as_rows(target, z, who), self._element_weights(self.weight, z, "weight", who))

    def _element_weights(self, weight: Tensor | None, z: Tensor, label: str, who: str) -> Tensor | None:
        """``weight`` broadcast to the outputs of one example, ``[C]``."""
        if weight is None:
            return None
        if weight.dim() == z.dim() and weight.shape[0] == 1:
            weight = weight[0]
        try:
            expanded = weight.detach().to(z.dtype).expand(z.shape[1:])
        except RuntimeError:
            raise ShapeError(
                f"{who}: expected {label} that broadcasts to the outputs of one example {list(z.shape[1:])}, got {list(weight.shape)}; a "
                "weight of each example is no part of a loss that is applied to other examples too."
            ) from None
        return expanded.reshape(-1).contiguous()

    def _constant(self, z: Tensor, target: Tensor) -> Tensor | None:
        """``[N]``: a part of ``ℓ_n`` that depends on the target alone."""
        return None

    def _remedy(self) -> str:
        return "check the scale of outputs and targets"


@dataclass(frozen=True)
class AbsoluteError(ElementwiseLoss):
    """``|z − t|``: its second derivative is zero wherever there is one."""

    @property
    def is_linear(self) -> bool:
        """It is, on either side of the kink."""
        return True

    def hessian(self, z: Tensor, target: Tensor, weights: Tensor | None = None) -> OutputHessian:
        """There is none."""
        raise UnsupportedLossError(
            f"{self.name}: expected a loss with curvature in the outputs, got one that is linear on either side of its kink (its "
            "Gauss-Newton matrix is zero); use nn.SmoothL1Loss or nn.HuberLoss, which round the kink off."
        )


@dataclass(frozen=True)
class BinaryCrossEntropy(ElementwiseLoss):
    """Binary cross-entropy of logits.

    Attributes:
        pos_weight: w₊, which makes it ``k (log(1 + eᶻ) − t' z)`` with ``k = w₊ t + 1 − t`` and ``t' = w₊ t/k``.
    """

    pos_weight: Tensor | None = None

    def _prepare(self, z: Tensor, target: Tensor, who: str) -> Prepared:
        prepared = super()._prepare(z, target, who)
        _check_interval(prepared.target, who)
        positive = self._element_weights(self.pos_weight, z, "pos_weight", who)
        if positive is None:
            return prepared
        mass = positive * prepared.target + (1 - prepared.target)
        target = torch.where(mass > 0, positive * prepared.target / mass, 0.0)
        weight = mass if prepared.weight is None else mass * prepared.weight
        return Prepared(prepared.rows, target, weight.contiguous())


@dataclass(frozen=True)
class ProbabilityCrossEntropy(ElementwiseLoss):
    """Binary cross-entropy of probabilities."""

    def _prepare(self, z: Tensor, target: Tensor, who: str) -> Prepared:
        prepared = super()._prepare(z, target, who)
        _check_interval(prepared.target, who)
        outside = ((z < 0) | (z > 1)).reshape(z.shape[0], -1).any(dim=1).nonzero()[:, 0]
        if len(outside):
            raise DataError(
                f"{who}: expected probabilities in (0, 1) as outputs, got values from {float(z.min()):g} to {float(z.max()):g} (first in "
                f"example {int(outside[0])}); end the model in a sigmoid, or use nn.BCEWithLogitsLoss on logits."
            )
        return prepared

    def _remedy(self) -> str:
        return "a probability of exactly 0 or 1 contradicts its target; take the sigmoid off the model and use nn.BCEWithLogitsLoss"


@dataclass(frozen=True)
class PoissonNLL(ElementwiseLoss):
    """Poisson likelihood of a rate, or of its logarithm; ``full`` adds Stirling's approximation of ``log t!``."""

    full: bool = False

    def _prepare(self, z: Tensor, target: Tensor, who: str) -> Prepared:
        prepared = super()._prepare(z, target, who)
        if bool((prepared.target < 0).any()):
            raise DataError(f"{who}: expected counts >= 0 as targets, got {float(prepared.target.min()):g}; correct the targets.")
        if self.native == "poisson_rate" and bool((z <= -self.parameter).any()):
            raise DataError(
                f"{who}: expected rates > 0 as outputs, got {float(z.min()):g}; end the model in a softplus or exp, or use log_input=True."
            )
        return prepared

    def _constant(self, z: Tensor, target: Tensor) -> Tensor | None:
        if not self.full:
            return None
        t = target.double().clamp(min=1)
        stirling = torch.where(target > 1, t * t.log() - t + 0.5 * (2 * math.pi * t).log(), 0.0)
        return self._scale(z) * stirling.reshape(z.shape[0], -1).sum(dim=1)

    def _remedy(self) -> str:
        return "scale the outputs down, exp overflows" if self.native == "poisson_log_rate" else super()._remedy()


@dataclass(frozen=True)
class GaussianNLL(ElementwiseLoss):
    """``½ (log v + (z − t)²/v)`` with a given variance v; targets are ``[N, 2, *out]``: t, then v.

    Attributes:
        full: adds ``½ log 2π``.
        eps: v is at least this.
    """

    full: bool = False
    eps: float = 1e-6

    def _prepare(self, z: Tensor, target: Tensor, who: str) -> Prepared:
        check_outputs(z, who)
        if target.shape != (z.shape[0], 2, *z.shape[1:]):
            raise ShapeError(
                f"{who}: expected targets [N, 2, *out] = {[z.shape[0], 2, *z.shape[1:]]} that hold the targets and their variances, got "
                f"{list(target.shape)}; pass torch.stack([y, variance], dim=1)."
            )
        mean, variance = target.detach().unbind(dim=1)
        if bool((variance < 0).any()):
            raise DataError(f"{who}: expected variances >= 0 in targets[:, 1], got {float(variance.min()):g}; correct the variances.")
        prepared = super()._prepare(z, mean, who)
        weight = _as_rows(variance, z, who).clamp(min=self.eps).reciprocal()
        return Prepared(prepared.rows, prepared.target, weight.contiguous())

    def _constant(self, z: Tensor, target: Tensor) -> Tensor | None:
        logarithms = target[:, 1].double().clamp(min=self.eps).log().reshape(z.shape[0], -1)
        if self.full:
            logarithms = logarithms + math.log(2 * math.pi)
        return self._scale(z) * logarithms.sum(dim=1)


def _as_rows(target: Tensor, z: Tensor, who: str) -> Tensor:
    if target.is_floating_point() and widened_dtype(target.dtype) != z.dtype:
        raise DTypeError(f"{who}: expected targets of dtype {z.dtype}, got {target.dtype}; convert them with y.to({z.dtype}).")
    return target.to(z.dtype).reshape(z.shape[0], count(z.shape)).contiguous()


def _check_interval(target: Tensor, who: str) -> None:
    if target.numel() and bool(((target < 0) | (target > 1)).any()):
        raise DataError(
            f"{who}: expected targets in [0, 1], got values from {float(target.min()):g} to {float(target.max()):g}; "
            "pass probabilities or 0/1 labels."
        )
