"""Rows of a table picked by indices of each example."""

from __future__ import annotations

import math
from typing import Any

from torch import fx

from influence_ext.capture.context import Context, Value
from influence_ext.capture.layout import Layout
from influence_ext.capture.lowering.movement import emit_strided
from influence_ext.capture.lowering.reduction import REDUCTION_KINDS
from influence_ext.capture.lowering.table import Lowering, argument, named

# Examples that offsets are looked at for.
_TRIED = 3


def _embedding(context: Context, node: fx.Node) -> Value | None:
    """``embedding(weight, indices, padding_idx)``."""
    weight: Any = node.args[0]
    indices: Any = node.args[1]
    if not context.is_batch_free(weight) or not context.is_batched(indices) or context.depends[indices]:
        return None
    if argument(node, 3, "scale_grad_by_freq", False):
        # The derivative of one example would depend on how often the others use its rows.
        context.refuse(node, "scale_grad_by_freq mixes the examples of a batch; switch it off")
        return None
    rows = int(weight.meta["val"].shape[0])
    padding = int(argument(node, 2, "padding_idx", -1))
    slot, layout, value = context.slot(weight), context.layout(node), context.value(indices)
    if slot is None or layout is None or layout.shape[:-1] != value.shape or math.prod(layout.shape) == 0:
        return None
    return context.emit(node, "embedding", [value], (slot,), {"rows": rows, "padding": padding})


def _embedding_bag(context: Context, node: fx.Node) -> Value | None:
    """``embedding_bag(weight, indices, offsets, scale_grad_by_freq, mode, sparse, weights, include_last_offset, padding_idx)``.

    Each example is a bag of as many indices: rows of the table, then their sum, mean or maximum.
    """
    weight: Any
    indices: Any
    weight, indices, offsets = node.args[:3]
    if not context.is_batch_free(weight) or not context.is_batched(indices) or context.depends[indices]:
        return None
    if argument(node, 3, "scale_grad_by_freq", False):
        context.refuse(node, "scale_grad_by_freq mixes the examples of a batch; switch it off")
        return None
    mode, factors, padding = (argument(node, i, name, None) for i, name in ((4, "mode"), (6, "per_sample_weights"), (8, "padding_idx")))
    bag, starts = context.value(indices), context.counted(offsets, _TRIED)
    num_rows, width = (int(size) for size in weight.meta["val"].shape)
    slot = context.slot(weight)
    if starts is None or starts.tolist() != [bag.width * n for n in range(_TRIED)] or bag.axis != 0 or bag.layout.pre != 1:
        return None
    if slot is None or bag.width == 0 or padding not in (None, -1) or argument(node, 7, "include_last_offset", False):
        return None
    layout = Layout((1, bag.width, width), 0)
    rows = context.emit(node, "embedding", [bag], (slot,), {"rows": num_rows, "padding": -1}, suffix="_rows", layout=layout)
    if factors is not None:
        own = context.value(factors) if context.is_batched(factors) else None
        weights = None if own is None else emit_strided(context, node, own, 0, (0, 1, 0), "_weights", layout)
        if rows is None or weights is None:
            return None
        rows = context.emit(node, "multiply", [rows, weights], suffix="_weighted", layout=layout)
    if rows is None:
        return None
    if mode == 2:
        ints = {"outer": 1, "size": bag.width, "inner": width, "kind": REDUCTION_KINDS["max"]}
        return context.emit(node, "reduce_nonlinear", [rows], ints=ints, floats={"a": 0.0})
    return context.emit(node, "reduce", [rows], ints={"mean": int(mode == 1)}, lists={"shape": layout.shape, "reduced": (0, 1, 0)})


LOWERINGS: dict[str, Lowering] = {
    **named(_embedding, "embedding.default"),
    **named(_embedding_bag, "embedding_bag.default embedding_bag.padding_idx"),
}
