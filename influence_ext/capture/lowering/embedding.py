"""Rows of a table picked by indices of each example."""

from __future__ import annotations

import math
from typing import Any

from torch import fx

from influence_ext.capture.context import Context, Value
from influence_ext.capture.lowering.table import Lowering, argument, named


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


LOWERINGS: dict[str, Lowering] = named(_embedding, "embedding.default")
