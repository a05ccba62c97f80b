"""Tensors of the graph as strided views of one example's memory: what lets rules read through transposes instead of copying."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from influence_ext.capture.context import Context, Value, target_of
from influence_ext.capture.layout import VIEWS, Layout
from influence_ext.capture.lowering.movement import permutation

_PERMUTATIONS = frozenset(
    f"aten.{name}.{overload}"
    for overload, names in (
        ("default", ("permute", "swapaxes", "swapdims", "t", "numpy_T", "mT", "adjoint")),
        ("int", ("transpose",)),
    )
    for name in names
)


@dataclass(frozen=True)
class Strided:
    """An operand: element ``index`` of one example at ``Σ index * strides`` of a value's memory, or of a slot's.

    ``layout`` is that of the tensor in the graph, None for a slot.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    layout: Layout | None
    value: Value | None = None
    slot: int = -1


def strided_value(context: Context, node: fx.Node) -> Strided:
    """A batched tensor, seen through the permutations and reshapes it came by, as far as these are views."""
    value = context.value(node)
    viewed, source = _view(context, node)
    return Strided(value.shape, tuple(viewed.stride()), value.layout, source)


def own_memory(strided: Strided, value: Value) -> Strided:
    """The same tensor in its own memory, contiguous."""
    contiguous = torch.empty(value.shape, device="meta").stride()
    return Strided(strided.shape, tuple(contiguous), strided.layout, value)


def strided_slot(context: Context, tensor: fx.Node) -> Strided | None:
    """A batch-free tensor; a parameter's transpose is the parameter seen through other strides."""
    shape = tuple(int(size) for size in tensor.meta["val"].shape)
    strides = tuple(torch.empty(shape, device="meta").stride())
    if len(shape) != 2:
        slot = context.slot(tensor)
        return None if slot is None else Strided(shape, strides, None, slot=slot)
    found = context.table.matrix(tensor)
    if found is None:
        return None
    slot, flipped = found
    return Strided(shape, (1, shape[0]) if flipped else strides, None, slot=slot)


def _view(context: Context, node: fx.Node) -> tuple[Tensor, Value]:
    """A meta tensor with one example's strides, and the value whose memory they refer to."""
    value = context.value(node)
    own = torch.empty(value.shape, device="meta"), value
    source: Any = node.args[0] if node.args else None
    if node.op != "call_function" or node in context.sources or not context.is_batched(source) or source not in context.values:
        return own
    if source.meta["val"].dtype != node.meta["val"].dtype:
        return own
    target = target_of(node)
    if target in _PERMUTATIONS:
        tensor, root = _view(context, source)
        return tensor.permute(permutation(node)), root
    if target in VIEWS and context.value(source).layout.before == value.layout.before:
        tensor, root = _view(context, source)
        try:
            return tensor.view(value.shape), root
        except RuntimeError:
            return own
    return own
