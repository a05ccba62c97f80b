"""Softmax, sums and other reductions over axes other than the examples'."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import fx

from influence_ext.capture.context import Context, Value
from influence_ext.capture.lowering.table import Lowering, argument, named

# csrc/kernels/reduction.h
REDUCTION_KINDS = {
    "amax": 0,
    "amin": 1,
    "max": 2,
    "min": 3,
    "log_sum_exp": 4,
    "variance": 5,
    "deviation": 6,
    "norm": 7,
    "absolute_norm": 8,
    "product": 9,
}


def _axes(context: Context, node: fx.Node, dims: Any) -> tuple[Value, list[int]] | None:
    """The operand, and for each axis of its value whether it is among ``dims``; None if the examples' axis is."""
    x = node.args[0]
    if not context.is_batched(x) or dims is None or (isinstance(dims, (list, tuple)) and not dims):
        return None
    value = context.value(x)
    flags = [0] * len(value.shape)
    for dim in dims if isinstance(dims, (list, tuple)) else [dims]:
        axis = context.dim(value, dim)
        if axis is None:
            return None
        flags[axis] = 1
    return value, flags


def _block(context: Context, node: fx.Node, dims: Any) -> tuple[Value, dict[str, int]] | None:
    """The operand as ``[outer, size, inner]`` with ``dims`` in the middle; None if they are not neighbours in memory."""
    found = _axes(context, node, dims)
    if found is None:
        return None
    value, flags = found
    chosen = [axis for axis, flag in enumerate(flags) if flag]
    first, last = chosen[0], chosen[-1] + 1
    if any(not flags[axis] and value.shape[axis] != 1 for axis in range(first, last)):
        return None
    shape = value.shape
    return value, {"outer": math.prod(shape[:first]), "size": math.prod(shape[first:last]), "inner": math.prod(shape[last:])}


def _softmax(log: bool) -> Lowering:
    def lowering(context: Context, node: fx.Node) -> Value | None:
        """``softmax(x, dim)``."""
        found = _block(context, node, argument(node, 1, "dim", None))
        if found is None or found[0].width == 0:
            return None
        value, ints = found
        return context.emit(node, "softmax", [value], ints={**ints, "log": int(log)})

    return lowering


def _reduce(mean: bool) -> Lowering:
    def lowering(context: Context, node: fx.Node) -> Value | None:
        """``sum(x, dims, keepdim)``."""
        found = _axes(context, node, argument(node, 1, "dim", None))
        if found is None or found[0].width == 0:
            return None
        value, flags = found
        return context.emit(node, "reduce", [value], ints={"mean": int(mean)}, lists={"shape": value.shape, "reduced": flags})

    return lowering


def _nonlinear(kind: str) -> Lowering:
    def lowering(context: Context, node: fx.Node) -> Value | None:
        """``amax(x, dims, keepdim)``."""
        return _emit_nonlinear(context, node, kind, argument(node, 1, "dim", None))

    return lowering


def _emit_nonlinear(context: Context, node: fx.Node, kind: str, dims: Any, a: float = 0.0) -> Value | None:
    found = _block(context, node, dims)
    if found is None or found[0].width == 0:
        return None
    value, ints = found
    if kind in ("variance", "deviation") and ints["size"] <= a:
        return None
    return context.emit(node, "reduce_nonlinear", [value], ints={**ints, "kind": REDUCTION_KINDS[kind]}, floats={"a": a})


def _spread(kind: str, correction_of: Callable[[fx.Node], Any]) -> Lowering:
    def lowering(context: Context, node: fx.Node) -> Value | None:
        """``var(x, dims, correction)``; a correction that is not given is 1."""
        given = correction_of(node)
        correction = 1.0 if given is None else context.number(node, given)
        return None if correction is None else _emit_nonlinear(context, node, kind, argument(node, 1, "dim", None), correction)

    return lowering


def _correction(node: fx.Node) -> Any:
    return node.kwargs.get("correction")


def _unbiased(node: fx.Node) -> Any:
    return int(bool(argument(node, 2, "unbiased", True)))


def _vector_norm(context: Context, node: fx.Node) -> Value | None:
    """``vector_norm(x, ord, dims, keepdim)`` and ``norm(x, p, dims, keepdim)``, of order 1 and 2."""
    order = argument(node, 1, "ord", 2)
    kind = {None: "norm", 2: "norm", 1: "absolute_norm"}.get(order)
    return None if kind is None else _emit_nonlinear(context, node, kind, argument(node, 2, "dim", None))


def _cumulative_sum(context: Context, node: fx.Node) -> Value | None:
    """``cumsum(x, dim)``."""
    found = _block(context, node, argument(node, 1, "dim", None))
    return None if found is None or found[0].width == 0 else context.emit(node, "cumulative_sum", [found[0]], ints=found[1])


LOWERINGS: dict[str, Lowering] = {
    **named(_softmax(log=False), "softmax.int _softmax.default"),
    **named(_softmax(log=True), "log_softmax.int _log_softmax.default"),
    **named(_reduce(mean=False), "sum.dim_IntList"),
    **named(_reduce(mean=True), "mean.dim"),
    **named(_nonlinear("amax"), "amax.default"),
    **named(_nonlinear("amin"), "amin.default"),
    **named(_nonlinear("max"), "max.dim"),
    **named(_nonlinear("min"), "min.dim"),
    **named(_nonlinear("log_sum_exp"), "logsumexp.default"),
    **named(_nonlinear("product"), "prod.dim_int"),
    **named(_spread("variance", _correction), "var.correction"),
    **named(_spread("deviation", _correction), "std.correction"),
    **named(_spread("variance", _unbiased), "var.dim"),
    **named(_spread("deviation", _unbiased), "std.dim"),
    **named(_vector_norm, "linalg_vector_norm.default norm.ScalarOpt_dim"),
    **named(_cumulative_sum, "cumsum.default"),
}
