"""Parameter sets of one network that take their training steps together, in the C++ core."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import influence_ext._C as _C
from influence_ext.context import about_to_start_threads
from influence_ext.losses import Loss


class Ensemble:
    """One network at parameter sets ``[S, P]``, each of which takes a step of a gradient method on the same batch.

    Made by :meth:`Plan.ensemble`.

    A thread takes one set after the other through forward pass, loss, cotangent sweep and update, so that what a set needs stays in the
    core's cache; results do not depend on which thread takes which set.

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
        about_to_start_threads()
        self._plan, self._inputs, self._constants = plan, inputs, constants
        self._output_shape, self._loss, self._targets = output_shape, loss, targets
        self._native: dict[int, Any] = {}  # by the size of the batch

    def step(
        self,
        theta: Tensor,
        moments: Sequence[Tensor],
        batch: Tensor,
        *,
        scale: float,
        dropped: Sequence[Sequence[int]],
        descent: dict[str, float],
        anchor: Tensor | None = None,
    ) -> Tensor:
        """Move every set down ``g = scale Σ_n ∇ℓ_n + decay θ + damping (θ − anchor)``, summed over its examples of the batch.

        Args:
            theta: ``[S, P]``, in place.
            moments: ``[S, P]`` each, in place: momentum for SGD, first and second moment for Adam.
            batch: ``[B]``, indices of the examples.
            scale: factor of the loss.
            dropped: for each set, positions in the batch of the examples that do not count.
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
        loss = self._loss.as_kernel(theta.new_zeros(size, *self._output_shape), self._targets[batch])
        assert loss is not None, "Plan.ensemble makes none of a loss without kernels"
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
            loss.shape,
            loss.target,
            loss.weight,
            dropped,
        )
        return total

    def gradients(
        self,
        theta: Tensor,
        batches: Sequence[Tensor],
        *,
        scale: float,
        dropped: Sequence[Sequence[Sequence[int]]],
        decay: float = 0.0,
        damping: float = 0.0,
        anchor: Tensor | None = None,
    ) -> Tensor:
        """``[S, P]``: ``scale Σ_n ∇ℓ_n + decay θ + damping (θ − anchor)`` of every set, over all batches; ``dropped`` by batch, then set.

        Steps of length zero, whose momentum adds the gradients up. Cost: those steps.
        """
        total = torch.zeros_like(theta)
        at = theta.clone()  # a gradient that is not finite would leave its trace even at length zero
        regularised = {"decay": decay, "damping": damping}
        for batch, positions in zip(batches, dropped, strict=True):
            descent = {"lr": 0.0, "momentum": 1.0, **regularised}
            self.step(at, [total], batch, scale=scale, dropped=positions, descent=descent, anchor=anchor)
            regularised = {}
        return total
