"""Products of an activation with a weight matrix."""

from __future__ import annotations

import math
from typing import Any

from torch import fx

from influence_ext.capture.context import Context, Value
from influence_ext.capture.lowering.table import Lowering, argument, named


def _linear(context: Context, node: fx.Node) -> Value | None:
    """``linear(x, W, b)``, W ``[O, I]``."""
    x, weight = node.args[:2]
    return emit_linear(context, node, x, weight, argument(node, 2, "bias", None), matrix_is_transposed=False)


def _matmul(context: Context, node: fx.Node) -> Value | None:
    """``matmul(x, W)``, W ``[I, O]`` or a vector ``[I]``."""
    x, weight = node.args
    return emit_linear(context, node, x, weight, None, matrix_is_transposed=True)


def _addmm(context: Context, node: fx.Node) -> Value | None:
    """``addmm(b, x, W)``, W ``[I, O]``; b is a bias or a batched tensor."""
    bias: Any
    bias, x, weight = node.args
    if node.kwargs.get("alpha", 1) != 1 or node.kwargs.get("beta", 1) != 1:
        return None
    if not context.is_batched(bias):
        return emit_linear(context, node, x, weight, bias, matrix_is_transposed=True)
    if context.layout(bias) != context.layout(node):
        return None
    product = emit_linear(context, node, x, weight, None, matrix_is_transposed=True, suffix="_product")
    return None if product is None else context.emit(node, "add", [context.value(bias), product], floats={"a": 1.0, "b": 1.0})


def emit_linear(
    context: Context, node: fx.Node, x: Any, weight: Any, bias: Any, *, matrix_is_transposed: bool, suffix: str = ""
) -> Value | None:
    """``x Wᵀ + b`` along the last axis of ``x``; None for anything else."""
    if not context.is_batched(x) or not context.is_batch_free(weight):
        return None
    size = tuple(weight.meta["val"].shape)
    value = context.value(x)
    if len(size) not in (1, 2) or value.axis == len(value.shape) - 1:
        return None
    in_features = value.shape[-1]
    if in_features == 0:
        return None
    out_features = math.prod(size) // in_features
    bias_slot: int | None = -1
    if bias is not None:
        bias_slot = bias_of(context, bias, out_features)
    found = context.table.matrix(weight)
    if found is None or bias_slot is None:
        return None
    slot, flipped = found
    transposed = len(size) == 2 and matrix_is_transposed != flipped
    ints = {"in_features": in_features, "out_features": out_features, "transposed": int(transposed)}
    return context.emit(node, "linear", [value], (slot, bias_slot), ints, suffix=suffix)


def bias_of(context: Context, bias: fx.Node, num_features: int) -> int | None:
    """The slot of a bias, broadcast to ``num_features`` elements where it has fewer."""
    if math.prod(bias.meta["val"].shape) == num_features:
        return context.slot(bias)
    return context.slot(bias, (num_features,))


LOWERINGS: dict[str, Lowering] = {
    **named(_linear, "linear.default"),
    **named(_addmm, "addmm.default"),
    **named(_matmul, "matmul.default mm.default mv.default"),
}
