"""Operators that move elements."""

from __future__ import annotations

from typing import Any

from torch import fx

from influence_ext.capture.context import Context, Value, target_of
from influence_ext.capture.layout import VIEWS
from influence_ext.capture.lowering.table import Lowering, named


def _view(context: Context, node: fx.Node) -> Value | None:
    """Operators that keep the elements in order: the output is the input's memory under another shape."""
    source: Any = node.args[0]
    if not context.is_batched(source):
        return None
    value, layout = context.value(source), context.layout(node)
    if source.meta["val"].dtype != node.meta["val"].dtype:
        return None
    if layout is None or layout.before != value.layout.before:
        return None
    return context.emit(node, "view", [value])


def _same_shape(context: Context, node: fx.Node) -> Value | None:
    """Slices and expansions that change nothing."""
    source: Any = node.args[0]
    return _view(context, node) if source.meta["val"].shape == node.meta["val"].shape else None


def _permute(context: Context, node: fx.Node) -> Value | None:
    """A permutation that leaves the memory of an example as it is: only axes of one entry, and the batch axis, move."""
    args: Any = node.args
    if not context.is_batched(args[0]):
        return None
    value = context.value(args[0])
    axes = permutation(node)
    moved = [axis for axis in axes if value.shape[axis] != 1]
    return context.emit(node, "view", [value]) if moved == sorted(moved) else None


def permutation(node: fx.Node) -> list[int]:
    """The axes of the input that become the axes of the output, for permute and its relatives."""
    args: Any = node.args
    axes = list(range(args[0].meta["val"].dim()))
    if target_of(node) == "aten.permute.default":
        return [axis % len(axes) for axis in args[1]]
    axes[args[1]], axes[args[2]] = axes[args[2]], axes[args[1]]
    return axes


def _detach(context: Context, node: fx.Node) -> Value | None:
    parameters = context.depends[node]
    context.refuse(
        node,
        f"detach cuts off the derivatives with respect to {', '.join(sorted(parameters))}; remove it or freeze these parameters",
        parameters,
    )
    return context.emit(node, "view", [context.value(node.args[0])])


LOWERINGS: dict[str, Lowering] = {
    **dict.fromkeys(VIEWS, _view),
    **named(_view, "_to_copy.default type_as.default"),
    **named(_same_shape, "slice.Tensor expand.default"),
    **named(_permute, "permute.default transpose.int swapaxes.default swapdims.default"),
    **named(_detach, "detach.default"),
}

PART_LOWERINGS: dict[str, Lowering] = {}
