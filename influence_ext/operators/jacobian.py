"""Jacobian products at the network's output."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from influence_ext.context import standalone
from influence_ext.data import load_inputs
from influence_ext.errors import DeviceError, DTypeError, ShapeError
from influence_ext.params import ParameterSpace, Selection
from influence_ext.plan import Plan


@standalone
def jvp(model: nn.Module, X: Any, v: Any, *, params: Selection | None = None) -> Tensor:
    """``J_n v`` for every example.

    Args:
        model: used in evaluation mode, never modified.
        X: inputs of N examples (a tensor, a tuple or a dict of tensors).
        v: ``[P]`` or ``[V, P]`` in the order of ``named_parameters()``, or a list or dict of tensors shaped like the parameters.
        params: selects a sub-space.

    Returns:
        ``[N, *out]``, or ``[V, N, *out]`` for ``[V, P]``.

    Raises:
        ShapeError, DTypeError, DataError, UnsupportedModelError: see :class:`influence_ext.GGN`.

    Cost: one forward pass and one tangent sweep.
    """
    inputs = load_inputs(X, "jvp")
    plan = Plan.of(model, inputs, params, "jvp")
    flat = v if isinstance(v, Tensor) else plan.space.flatten(v)
    _check(flat, plan.space, "jvp", "v", flat.dim() in (1, 2) and flat.shape[-1] == plan.space.num_parameters, "[P] or [V, P]")
    rows = flat.detach().reshape(-1, plan.space.num_parameters).contiguous()
    tangents = plan.linearize(inputs).jvp(rows)
    return tangents[0] if flat.dim() == 1 else tangents


@standalone
def vjp(model: nn.Module, X: Any, g: Tensor, *, params: Selection | None = None) -> Tensor:
    """``Σ_n J_nᵀ g_n``.

    Args:
        model: used in evaluation mode, never modified.
        X: inputs of N examples.
        g: cotangents of the output, ``[N, *out]`` or ``[V, N, *out]``.
        params: selects a sub-space.

    Returns:
        ``[P]``, or ``[V, P]``.

    Raises:
        ShapeError, DTypeError, DataError, UnsupportedModelError: see :class:`influence_ext.GGN`.

    Cost: one forward pass and one cotangent sweep.
    """
    inputs = load_inputs(X, "vjp")
    plan = Plan.of(model, inputs, params, "vjp")
    tape = plan.linearize(inputs)
    shape = tuple(tape.outputs.shape)
    single = isinstance(g, Tensor) and tuple(g.shape) == shape
    fits = single or (isinstance(g, Tensor) and tuple(g.shape[1:]) == shape and g.dim() == len(shape) + 1)
    _check(g, plan.space, "vjp", "g", fits, f"{list(shape)} or [V, {', '.join(map(str, shape))}]")
    rows = tape.vjp((g[None] if single else g).detach().contiguous())
    return rows[0] if single else rows


def _check(tensor: Any, space: ParameterSpace, who: str, name: str, fits: bool, expected: str) -> None:
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
        found = tensor.layout if isinstance(tensor, Tensor) else type(tensor).__name__
        raise DTypeError(f"{who}: expected {name} as a dense tensor, got {found}; convert it with torch.as_tensor.")
    if not fits:
        raise ShapeError(
            f"{who}: expected {name} of shape {expected} with P = {space.num_parameters}, got {list(tensor.shape)}; "
            f"parameters: {space.describe()}."
        )
    if tensor.dtype != space.dtype:
        raise DTypeError(f"{who}: expected {name} of dtype {space.dtype}, got {tensor.dtype}; convert it with .to({space.dtype}).")
    if tensor.device != space.device:
        raise DeviceError(f"{who}: expected {name} on {space.device}, got {tensor.device}; move it with .to('{space.device}').")
