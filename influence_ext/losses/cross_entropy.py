"""Losses over classes: softmax cross-entropy and the likelihood of log-probabilities, at one or several positions of an example."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

import influence_ext._C as _C
from influence_ext.errors import ArgumentError, DataError, DTypeError, ShapeError, UnsupportedLossError
from influence_ext.losses.base import KernelLoss, Loss, check_outputs, check_weights, count
from influence_ext.losses.hessian import SOFTMAX, OutputHessian
from influence_ext.params import widened


@dataclass(frozen=True)
class ClassLoss(Loss):
    """Outputs ``[N, K, d1, ...]`` with classes on axis 1, at ``T = d1 · ...`` positions; targets ``[N, d1, ...]`` are class indices.

    ``ℓ_n = (1/T) Σ_positions w ℓ`` for a mean, without 1/T for a sum, and ``total_weight = Σ w / T`` over the data set.

    Attributes:
        name, reduction: see :class:`Loss`.
        weight: ``[K]``, w ≥ 0 of each class; None for ones.
        ignore_index: positions with this index do not count.
    """

    name: str
    reduction: str
    weight: Tensor | None = None
    ignore_index: int = -100

    def total_weight(self, targets: Tensor) -> float:
        """``Σ w / T`` over the positions that count; N for probabilities as targets, whatever the weights (as in PyTorch)."""
        if targets.is_floating_point():
            return float(targets.shape[0])
        counts = targets != self.ignore_index
        if self.weight is None:
            total = float(counts.sum())
        else:
            kept = targets[counts].long()
            self._check_range(kept, kept, len(self.weight), self.name)
            total = float(self.weight.double().to(targets.device)[kept].sum())
        return total / max(count(targets.shape), 1)

    def with_reduction(self, reduction: str) -> Loss:
        """See :meth:`Loss.with_reduction`."""
        return replace(self, reduction=reduction)

    def check(self, z: Tensor, target: Tensor, who: str) -> None:
        """See :meth:`Loss.check`. Cost: reads the targets; of the outputs the shape alone."""
        self._checked_targets(z, target, who)

    def _scale(self, z: Tensor) -> float:
        return 1.0 / max(count(z.shape) // z.shape[1], 1) if self.reduction == "mean" else 1.0

    def _class_weights(self, z: Tensor, who: str) -> Tensor | None:
        if self.weight is None:
            return None
        if self.weight.shape != z.shape[1:2]:
            raise ShapeError(
                f"{who}: expected weight [K] = [{z.shape[1]}], one for each class, got {list(self.weight.shape)}; the classes are on "
                f"axis 1 of the outputs {list(z.shape)}."
            )
        return self.weight.detach().to(z.dtype).contiguous()

    def _prepare(self, z: Tensor, target: Tensor, who: str) -> tuple[Tensor, Tensor]:
        """Outputs ``[N, K]`` or ``[N, K, T]`` and the targets that go with them."""
        targets = self._checked_targets(z, target, who)
        return self._rows(z), targets

    def _checked_targets(self, z: Tensor, target: Tensor, who: str) -> Tensor:
        """Indices ``[N, T]`` with −1 where a position does not count."""
        check_outputs(z, who)
        if z.dim() < 2:
            raise ShapeError(f"{who}: expected outputs [N, C, ...] with classes on axis 1, got {list(z.shape)}; return a row an example.")
        self._class_weights(z, who)
        target = target.detach()
        if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
            raise DTypeError(
                f"{who}: expected class indices as integers {self._shape(z)}, got {target.dtype} {list(target.shape)}; convert them with "
                "y.long()."
            )
        self._check_shape(z, target, who)
        target = target.to(torch.int64).contiguous()
        if target.is_cpu:
            index, outside = _C.class_indices(target, self.ignore_index, z.shape[1])
        else:
            index, outside = target.masked_fill(target == self.ignore_index, -1), 0
        if outside >= 0:
            target = target.masked_fill(target == self.ignore_index, 0)
            self._check_range(target, target, z.shape[1], who)
        return index.view(z.shape[0], count(target.shape))

    def _rows(self, z: Tensor) -> Tensor:
        if z.dim() == 2:
            return z.detach().contiguous()
        N, K = z.shape[:2]
        return z.detach().reshape(N, K, count(z.shape) // max(K, 1)).contiguous()

    def _check_shape(self, z: Tensor, target: Tensor, who: str) -> None:
        if target.shape == z.shape[:1] + z.shape[2:]:
            return
        hint = "pass one an example" if z.dim() == 2 else "pass one a position"
        if z.dim() == 3 and target.shape == z.shape[:2]:
            hint = "the classes must be on axis 1: let the model return logits.transpose(1, 2)"
        raise ShapeError(f"{who}: expected class indices {self._shape(z)}, got {list(target.shape)}; {hint}.")

    def _check_range(self, kept: Tensor, target: Tensor, K: int, who: str) -> None:
        if not kept.numel() or (int(kept.min()) >= 0 and int(kept.max()) < K):
            return
        outside = (target < 0) | (target >= K)
        first = int(outside.reshape(len(target), -1).any(dim=1).nonzero()[0, 0])
        unit = "examples" if target.dim() == 1 else "targets"
        raise DataError(
            f"{who}: expected class indices in [0, {K}), got {int(target[first][outside[first]].reshape(-1)[0])} in example {first} "
            f"({int(outside.sum())} of {target.numel()} {unit}); correct the labels, or name them in ignore_index."
        )

    @staticmethod
    def _shape(z: Tensor) -> str:
        return f"{'[' + ', '.join(['N', *map(str, z.shape[2:])]) + ']'} = {[z.shape[0], *z.shape[2:]]}"


def classes_innermost(z: Tensor) -> bool:
    """Whether outputs ``[N, K, d1, ...]`` lie in memory as ``[N, d1, ..., K]``."""
    return z.dim() > 2 and not z.is_contiguous() and z.movedim(1, -1).is_contiguous()


@dataclass(frozen=True)
class CrossEntropy(ClassLoss):
    """Softmax cross-entropy of logits; targets are class indices, or probabilities shaped like the outputs.

    Attributes:
        label_smoothing: ε, weight of the uniform distribution in the target.
        native: name of the C++ loss.
    """

    label_smoothing: float = 0.0
    native: str = "cross_entropy"

    def value(self, z: Tensor, target: Tensor) -> Tensor:
        """See :meth:`Loss.value`."""
        rows, checked = self._at_positions(z, target, self.name)
        out = z.new_empty(rows.shape[0])
        self._evaluate(z, rows, checked, value=out)
        return out if len(out) == len(z) else out.view(len(z), -1).sum(dim=1)

    def gradient(self, z: Tensor, target: Tensor) -> Tensor:
        """See :meth:`Loss.gradient`."""
        return self.checked_gradient(z, target, self.name)

    def checked_gradient(self, z: Tensor, target: Tensor, who: str) -> Tensor:
        """See :meth:`Loss.checked_gradient`. It lies in memory as ``z`` does, where classes are innermost there."""
        rows, checked = self._at_positions(z, target, who)
        out = torch.empty_like(rows)
        self._evaluate(z, rows, checked, gradient=out)
        return out.view(z.movedim(1, -1).shape).movedim(-1, 1) if classes_innermost(z) else out.view(z.shape)

    def hessian(self, z: Tensor, target: Tensor, weights: Tensor | None = None) -> OutputHessian:
        """See :meth:`Loss.hessian`. Its state lies in memory as ``z`` does, where classes are innermost there."""
        rows, checked = self._at_positions(z, target, self.name)
        by_example = check_weights(weights, z, self.name)
        state, mass = torch.empty_like(rows), rows.new_empty(rows.shape[0], *rows.shape[2:])
        self._evaluate(z, rows, checked, state=state, mass=mass)
        if classes_innermost(z):
            state, mass = state.view(len(z), -1, z.shape[1]).transpose(1, 2), mass.view(len(z), -1)
        if by_example is not None:
            mass.mul_(by_example if mass.dim() == 1 else by_example[:, None])
        return OutputHessian(SOFTMAX, 1.0, state, mass)

    def bregman(self, z: Tensor, z_s: Tensor, target: Tensor) -> Tensor:
        """See :meth:`Loss.bregman`."""
        rows, checked = self._at_positions(z, target, self.name)
        others = z_s.detach().movedim(1, -1).reshape(rows.shape) if classes_innermost(z) else self._rows(z_s)
        out = z.new_empty(rows.shape[0])
        self._evaluate(z, rows, checked, others.contiguous(), bregman=out)
        return out if len(out) == len(z) else out.view(len(z), -1).sum(dim=1)

    def as_kernel(self, z: Tensor, target: Tensor) -> KernelLoss | None:
        """See :meth:`Loss.as_kernel`."""
        rows, checked = self._prepare(z, target, self.name)
        weight = self._class_weights(rows, self.name)
        return KernelLoss(self.native, self._scale(rows), self.label_smoothing, tuple(rows.shape), checked, weight)

    def _at_positions(self, z: Tensor, target: Tensor, who: str) -> tuple[Tensor, Tensor]:
        """As ``_prepare``; where classes are innermost in memory every position is an example: ``[N·T, K]``, nothing is copied."""
        if not classes_innermost(z):
            return self._prepare(z, target, who)
        targets, K = self._checked_targets(z, target, who), z.shape[1]
        rows = z.detach().movedim(1, -1).reshape(-1, K)
        if not targets.is_floating_point():
            return rows, targets.view(-1, 1)
        return rows, targets.transpose(1, 2).reshape(-1, K).contiguous()  # of one example reshape is a view

    def _evaluate(self, z: Tensor, rows: Tensor, target: Tensor, z_s: Tensor | None = None, **results: Tensor) -> None:
        weight = self._class_weights(z, self.name)
        _C.loss_evaluate(self.native, self._scale(z), self.label_smoothing, rows, target, weight, z_s, results)

    def _checked_targets(self, z: Tensor, target: Tensor, who: str) -> Tensor:
        """Indices as of every loss of classes, or probabilities shaped like the outputs' rows."""
        if not target.is_floating_point():
            return super()._checked_targets(z, target, who)
        check_outputs(z, who)
        if target.shape != z.shape or z.dim() < 2:
            raise ShapeError(
                f"{who}: expected class indices as integers, or probabilities shaped like the outputs {list(z.shape)}, got "
                f"{list(target.shape)} of {target.dtype}; pass y.long(), or one probability a class."
            )
        target = widened(target)
        if target.dtype != z.dtype:
            raise DTypeError(f"{who}: expected probabilities of dtype {z.dtype}, got {target.dtype}; convert them with y.to({z.dtype}).")
        if self.ignore_index >= 0:
            raise ArgumentError(
                f"{who}: expected class indices as targets with ignore_index = {self.ignore_index}, got probabilities; leave ignore_index "
                "out, and give such positions probabilities of zero."
            )
        if bool((target < 0).any()):
            raise DataError(f"{who}: expected probabilities >= 0 as targets, got {float(target.min()):g}; correct the targets.")
        self._class_weights(z, who)
        return self._rows(target)


@dataclass(frozen=True)
class NegativeLogLikelihood(ClassLoss):
    """``−w_t z_t`` of log-probabilities z: linear in z."""

    @property
    def is_linear(self) -> bool:
        """It is."""
        return True

    def value(self, z: Tensor, target: Tensor) -> Tensor:
        """See :meth:`Loss.value`."""
        slope = self.gradient(z, target)
        picked = torch.where(slope != 0, slope * z.detach(), 0.0)  # also where an unlikely class has log-probability −∞
        return picked.reshape(z.shape[0], -1).sum(dim=1)

    def gradient(self, z: Tensor, target: Tensor) -> Tensor:
        """See :meth:`Loss.gradient`."""
        rows, index = self._prepare(z, target, self.name)
        weight = self._class_weights(z, self.name)
        slopes = rows.new_ones(()) if weight is None else weight[index.clamp(min=0)]
        slopes = torch.where(index >= 0, -self._scale(z) * slopes, 0.0).to(z.dtype)
        out = torch.zeros_like(rows).view(z.shape[0], z.shape[1], -1)
        return out.scatter_(1, index.clamp(min=0)[:, None, :], slopes[:, None, :]).view(z.shape)

    def hessian(self, z: Tensor, target: Tensor, weights: Tensor | None = None) -> OutputHessian:
        """There is none."""
        raise UnsupportedLossError(
            f"{self.name}: expected a loss with curvature in the outputs, got one that is linear in log-probabilities (its Gauss-Newton "
            "matrix is zero); take log_softmax off the end of the model and use cross_entropy on the logits, which is the same loss."
        )

    def bregman(self, z: Tensor, z_s: Tensor, target: Tensor) -> Tensor:
        """Zero: the loss is linear."""
        self._checked_targets(z, target, self.name)
        return z.new_zeros(z.shape[0])
