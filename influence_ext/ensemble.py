"""Parameter sets of one network that take their training steps together, in the C++ core."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import influence_ext._C as _C
from influence_ext.losses import Loss
from influence_ext.losses.base import KernelLoss

ROOM = 2**22
"""Outputs that are made at a time to prepare a loss for its targets."""


class Ensemble:
    """One network at parameter sets ``[S, P]``, each of which takes a step of a gradient method on the same batch.

    Made by :meth:`Plan.ensemble`.

    On a CPU a thread takes one set after the other through forward pass, loss, cotangent sweep and update, so that what a set needs stays
    in the core's cache; results do not depend on which thread takes which set. On a device all sets go through each kernel together, and
    nothing waits for the device but nodes that check indices in the data (embeddings, gathers).

    Args:
        plan: the core's plan.
        inputs: the plan's inputs, ``[N, ...]`` each.
        constants: values of the slots that are not trained, None for the others.
        output_shape: of one example.
        loss: one with kernels (:meth:`Loss.as_kernel`).
        targets: ``[N, ...]``.
    """

    def __init__(
        self,
        plan: Any,
        inputs: Sequence[Tensor],
        constants: Sequence[Tensor | None],
        output_shape: Sequence[int],
        loss: Loss,
        targets: Tensor,
    ):
        self._plan, self._inputs, self._constants = plan, inputs, constants
        self._loss = _prepared(loss, output_shape, targets, inputs[0])
        self._native: dict[int, Any] = {}  # by the size of the batch

    def step(
        self,
        theta: Tensor,
        moments: Sequence[Tensor],
        batch: Tensor,
        *,
        scale: float,
        kept: Tensor,
        descent: dict[str, float],
        anchor: Tensor | None = None,
    ) -> Tensor:
        """Move every set down ``g = scale Σ_n ∇ℓ_n + decay θ + damping (θ − anchor)``, summed over its examples of the batch.

        Args:
            theta: ``[S, P]``, in place.
            moments: ``[S, P]`` each, in place: momentum for SGD, first and second moment for Adam.
            batch: ``[B]``, indices of the examples, on the device of theta.
            scale: factor of the loss.
            kept: ``[S, B]``, booleans there too: whether an example of the batch counts for a set.
            descent: ``lr``, ``decay``, ``damping`` and, for SGD, ``momentum``; for Adam ``one_minus_beta1``, ``beta2``,
                ``one_minus_beta2``, ``root_correction`` (√(1 − β₂ᵗ)) and ``eps``, with ``lr`` divided by 1 − β₁ᵗ.
            anchor: ``[P]``, needed with a damping.

        Returns:
            ``[S]``, ``scale Σ_n ℓ_n`` before the step, up to terms that depend on targets alone.

        Cost: for each set a forward pass and a cotangent sweep, and one pass over its parameters and moments.
        """
        size = len(batch)
        native = self._native.get(size)
        if native is None:
            kind = _C.Ensemble32 if theta.dtype == torch.float32 else _C.Ensemble64
            native = self._native[size] = kind(self._plan, size)
        loss = self._loss
        weight = loss.weight.index_select(0, batch) if loss.weight is not None and loss.weight.dim() == 2 else loss.weight
        inputs = [x.index_select(0, batch) for x in self._inputs]
        total: Tensor = native.step(
            inputs,
            self._constants,
            theta,
            moments,
            descent,
            anchor,
            loss.name,
            loss.scale * scale,
            loss.parameter,
            (size, *loss.shape[1:]),
            loss.target.index_select(0, batch),
            weight,
            kept,
        )
        return total

    @staticmethod
    def sets_at_once(theta: Tensor) -> int:
        """How many of the sets ``[S, P]`` go through each kernel together: one on a CPU, all on a device."""
        return (_C.Ensemble32 if theta.dtype == torch.float32 else _C.Ensemble64).sets_at_once(theta)

    def gradients(
        self,
        theta: Tensor,
        batches: Sequence[Tensor],
        *,
        scale: float,
        kept: Sequence[Tensor],
        decay: float = 0.0,
        damping: float = 0.0,
        anchor: Tensor | None = None,
    ) -> Tensor:
        """``[S, P]``: ``scale Σ_n ∇ℓ_n + decay θ + damping (θ − anchor)`` of every set, over all batches; ``kept`` for each.

        Steps of length zero, whose momentum adds the gradients up. Cost: those steps.
        """
        total = torch.zeros_like(theta)
        at = theta.clone()  # a gradient that is not finite would leave its trace even at length zero
        regularised = {"decay": decay, "damping": damping}
        for batch, counted in zip(batches, kept, strict=True):
            descent = {"lr": 0.0, "momentum": 1.0, **regularised}
            self.step(at, [total], batch, scale=scale, kept=counted, descent=descent, anchor=anchor)
            regularised = {}
        return total


def _prepared(loss: Loss, output_shape: Sequence[int], targets: Tensor, like: Tensor) -> KernelLoss:
    """The loss on all targets, as the kernels take it, checked."""
    rows = max(1, ROOM // math.prod(output_shape))
    parts = []
    for some in targets.split(rows):
        z = like.new_zeros(len(some), *output_shape)
        kernel = loss.as_kernel(z, some)
        assert kernel is not None, "Plan.ensemble makes none of a loss without kernels"
        if not some.is_cpu:
            loss.value(z, some)  # indices that lie on a device are checked where kernels are called with them
        parts.append(kernel)
    by_example = parts[0].weight is not None and parts[0].weight.dim() == 2
    weight = torch.cat([kernel.weight for kernel in parts if kernel.weight is not None]) if by_example else parts[0].weight
    return replace(parts[0], target=torch.cat([kernel.target for kernel in parts]), weight=weight)
