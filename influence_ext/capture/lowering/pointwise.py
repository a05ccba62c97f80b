"""Activations and arithmetic."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from influence_ext.capture.constants import Step
from influence_ext.capture.context import Context, Value
from influence_ext.capture.layout import Layout
from influence_ext.capture.lowering.linear import bias_of
from influence_ext.capture.lowering.movement import (
    emit_broadcast,
    emit_shifts,
    emit_strided,
    expanded,
    row_major,
    slot_operands,
    terms_of,
)
from influence_ext.capture.lowering.table import Lowering, argument, named

# In the order of their numbers (csrc/math/activations.h has the same list).
# fmt: off
_KINDS = (
    "relu", "tanh", "gelu", "gelu_tanh", "silu", "sigmoid", "elu", "softplus", "leaky_relu", "hardswish", "hardsigmoid", "clamp",
    "hardtanh", "mish", "softshrink", "hardshrink", "threshold", "log_sigmoid", "celu", "exp", "exp2", "expm1", "log", "log2", "log10",
    "log1p", "sqrt", "rsqrt", "reciprocal", "square", "pow", "abs", "sign", "floor", "ceil", "round", "trunc", "sin", "cos", "tan",
    "asin", "acos", "atan", "sinh", "cosh", "asinh", "acosh", "atanh", "erf", "erfc", "greater", "greater_equal", "less", "less_equal",
    "equal", "not_equal",
)

# Functions of one argument under their own names.
_PLAIN = (
    "hardswish", "hardsigmoid", "mish", "exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sqrt", "rsqrt", "reciprocal", "square",
    "abs", "floor", "ceil", "trunc", "sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "asinh", "acosh", "atanh", "erf",
    "erfc",
)
# fmt: on

ACTIVATION_KINDS = {kind: number for number, kind in enumerate(_KINDS)}


def _activation(kind: str, *defaults: tuple[str, float]) -> Lowering:
    """``kind(x, *parameters)``; ``defaults`` name the operator's numbers, which become ``a`` and ``b`` in this
    order.
    """

    def lowering(context: Context, node: fx.Node) -> Value | None:
        numbers = [context.number(node, argument(node, i, *default)) for i, default in enumerate(defaults, start=1)]
        return _emit_activation(context, node, kind, numbers)

    return lowering


def _emit_activation(context: Context, node: fx.Node, kind: str, numbers: Sequence[float | None]) -> Value | None:
    if None in numbers or not context.is_batched(node.args[0]):
        return None
    return _activated(context, node, context.value(node.args[0]), kind, [float(number) for number in numbers if number is not None])


def _activated(
    context: Context, node: fx.Node, value: Value, kind: str, numbers: Sequence[float] = (), suffix: str = "", layout: Layout | None = None
) -> Value | None:
    a, b = [*numbers, 0.0, 0.0][:2]
    floats = {"a": a, "b": b}
    return context.emit(node, "activation", [value], ints={"kind": ACTIVATION_KINDS[kind]}, floats=floats, suffix=suffix, layout=layout)


def _gelu(context: Context, node: fx.Node) -> Value | None:
    approximate = argument(node, 1, "approximate", "none")
    return _emit_activation(context, node, "gelu" if approximate == "none" else "gelu_tanh", [])


def _relu6(context: Context, node: fx.Node) -> Value | None:
    return _emit_activation(context, node, "hardtanh", [0.0, 6.0])


def _elu(context: Context, node: fx.Node) -> Value | None:
    """``elu(x, alpha, scale, input_scale)``."""
    names = ("alpha", "scale", "input_scale")
    numbers = [context.number(node, argument(node, i, name, 1.0)) for i, name in enumerate(names, start=1)]
    return _emit_activation(context, node, "elu", numbers[:2]) if numbers[2] == 1.0 else None


def _selu(context: Context, node: fx.Node) -> Value | None:
    # The constants are torch's own (aten/src/ATen/native/Activation.cpp), from Klambauer et al. 2017.
    return _emit_activation(context, node, "elu", [1.6732632423543772848170429916717, 1.0507009873554804934193349852946])


def _rrelu(context: Context, node: fx.Node) -> Value | None:
    """In evaluation mode ``rrelu(x, lower, upper)`` is a leaky ReLU with their mean as slope."""
    if argument(node, 3, "training", False):
        context.refuse(node, "draws random numbers in evaluation mode; make the forward pass deterministic")
        return None
    lower = context.number(node, argument(node, 1, "lower", 0.125))
    upper = context.number(node, argument(node, 2, "upper", 1.0 / 3.0))
    return None if lower is None or upper is None else _emit_activation(context, node, "leaky_relu", [(lower + upper) / 2])


def _add(context: Context, node: fx.Node) -> Value | None:
    return _sum(context, node, node.args[0], node.args[1], 1.0, _alpha(node))


def _sub(context: Context, node: fx.Node) -> Value | None:
    return _sum(context, node, node.args[0], node.args[1], 1.0, -_alpha(node))


def _rsub(context: Context, node: fx.Node) -> Value | None:
    """``rsub(x, y) = y - alpha x``."""
    return _sum(context, node, node.args[0], node.args[1], -_alpha(node), 1.0)


def _alpha(node: fx.Node) -> float:
    return float(argument(node, 2, "alpha", 1))


def _clamp(context: Context, node: fx.Node) -> Value | None:
    """``clamp(x, min, max)``, either absent; also with bounds that are tensors of one number each."""
    return _clamped(context, node, argument(node, 1, "min", None), argument(node, 2, "max", None))


def _clamp_min(context: Context, node: fx.Node) -> Value | None:
    return _clamped(context, node, argument(node, 1, "min", None), None)


def _clamp_max(context: Context, node: fx.Node) -> Value | None:
    return _clamped(context, node, None, argument(node, 1, "max", None))


def _clamped(context: Context, node: fx.Node, low: Any, high: Any) -> Value | None:
    bounds = [-math.inf if low is None else context.number(node, low), math.inf if high is None else context.number(node, high)]
    return _emit_activation(context, node, "clamp", bounds)


def _round(context: Context, node: fx.Node) -> Value | None:
    return _emit_activation(context, node, "round", []) if argument(node, 1, "decimals", 0) == 0 else None


def _pow(context: Context, node: fx.Node) -> Value | None:
    """``x ** a`` with a number a."""
    exponent = context.number(node, node.args[1])
    kinds = {2.0: "square", 0.5: "sqrt", -1.0: "reciprocal", -0.5: "rsqrt"}
    if exponent in kinds:
        return _emit_activation(context, node, kinds[exponent], [])
    return _emit_activation(context, node, "pow", [exponent])


def _comparison(kind: str) -> Lowering:
    """``x > y`` and the like, y a tensor or a number, as 1 or 0 with a derivative of zero."""

    def lowering(context: Context, node: fx.Node) -> Value | None:
        first, second = node.args[:2]
        if context.is_batched(first) and first.meta["val"].dtype == context.dtype:  # type: ignore[union-attr]
            number = _constant_number(context, node, second)
            if number is not None:
                return _emit_activation(context, node, kind, [number])
        if not isinstance(first, fx.Node) or not isinstance(second, fx.Node):
            return None
        if any(x.meta["val"].dtype not in (context.dtype, torch.bool) for x in (first, second)):
            return None
        pair = _pair(context, node, first, second)
        return None if pair is None else context.emit(node, "comparison", pair, ints={"kind": ACTIVATION_KINDS[kind]})

    return lowering


def _glu(context: Context, node: fx.Node) -> Value | None:
    """``glu(x, dim)``: the first half times the sigmoid of the second."""
    source: Any = node.args[0]
    layout = context.layout(node)
    if layout is None or not context.is_batched(source):
        return None
    value = context.value(source)
    axis = context.dim(value, int(argument(node, 1, "dim", -1)))
    if axis is None:
        return None
    strides = row_major(value.shape)
    first = emit_strided(context, node, value, 0, strides, "_value", layout)
    second = emit_strided(context, node, value, layout.shape[axis] * strides[axis], strides, "_gate", layout)
    if first is None or second is None:
        return None
    gate = _activated(context, node, second, "sigmoid", suffix="_sigmoid", layout=layout)
    return None if gate is None else context.emit(node, "multiply", [first, gate])


def _prelu(context: Context, node: fx.Node) -> Value | None:
    """``prelu(x, weight)``, one weight or one for each entry of axis 1."""
    source: Any = node.args[0]
    weight: Any = node.args[1]
    if not context.is_batched(source) or not context.is_batch_free(weight):
        return None
    value, channels = context.value(source), math.prod(weight.meta["val"].shape)
    if channels != 1 and (value.axis != 0 or value.layout.fold != 1 or len(value.shape) < 2 or value.shape[1] != channels):
        return None
    slot = context.slot(weight)
    return None if slot is None else context.emit(node, "prelu", [value], (slot,), {"channels": channels})


def _sum(context: Context, node: fx.Node, left: Any, right: Any, a: float, b: float) -> Value | None:
    """``a left + b right``, either of them batched, the other batched, batch-free or a number."""
    if not context.is_batched(left):
        left, right, a, b = right, left, b, a
    layout = context.layout(node)
    if layout is None:
        return None
    if context.is_batched(right):
        pair = _pair(context, node, left, right)
        return None if pair is None else context.emit(node, "add", pair, floats={"a": a, "b": b})
    if context.is_batch_free(right):
        if a == b == 1.0 and (fused := _fuse_bias(context, node, left, right)) is not None:
            return fused
        if b != 1.0 and b != 0.0 and context.depends[right]:
            # b (a/b x + y), so that y is read as it lies
            inner = _affine(context, node, left, "shift", right, a / b, [], "_sum")
            return None if inner is None else context.emit(node, "affine", [inner], (-1, -1), floats={"a": b, "b": 0.0})
        return _affine(context, node, left, "shift", right, a, [] if b == 1.0 else [(torch.mul, (b,))])
    number = context.number(node, right)
    if number is None or not context.is_batched(left):
        return None
    return context.emit(node, "affine", [context.value(left)], (-1, -1), floats={"a": a, "b": b * number})


def _pair(context: Context, node: fx.Node, *tensors: Any) -> list[Value] | None:
    """Operands as values of the output's shape, repeated where they broadcast; None where the examples lie on different axes."""
    layout = context.layout(node)
    if layout is None:
        return None
    values: list[Value] = []
    for position, tensor in enumerate(tensors):
        if tensor.meta["val"].dtype not in (context.dtype, torch.bool) and context.depends[tensor]:
            return None
        if context.is_batched(tensor):
            value = expanded(context, node, context.value(tensor), layout, f"_operand_{position}")
        else:
            value = emit_broadcast(context, node, tensor, layout, f"_operand_{position}")
        if value is None:
            return None
        values.append(value)
    return values


def _affine(
    context: Context, node: fx.Node, x: Any, role: str, tensor: fx.Node, a: float, steps: Sequence[Step], suffix: str = ""
) -> Value | None:
    """``a x ∘ tensor`` (role "scale") or ``a x + tensor`` (role "shift"), the tensor batch-free, after ``steps``."""
    layout = context.layout(node)
    value = None if layout is None else expanded(context, node, context.value(x), layout, "_operand")
    if layout is None or value is None:
        return None
    if role == "shift":
        return emit_shifts(context, node, value, [tensor] if steps else terms_of(context, tensor), a, suffix, layout, steps)
    operands = slot_operands(context, role, tensor, layout, steps)
    return None if operands is None else context.emit(node, "affine", [value], **operands, floats={"a": a, "b": 0.0}, suffix=suffix)


def _fuse_bias(context: Context, node: fx.Node, left: fx.Node, right: fx.Node) -> Value | None:
    """``x @ W + b`` as one linear node; None if this is something else."""
    value = context.value(left)
    index = context.producer(value)
    if index is None or not context.table.is_plain(right) or len(context.live_users(left)) != 1:
        return None
    product = context.nodes[index]
    size = tuple(right.meta["val"].shape)
    if product.rule != "linear" or product.slots[1] != -1 or product.name != left.name:
        return None
    num_features = product.ints["out_features"]
    on_features = num_features == 1 or (size[-1:] == (num_features,) and value.shape[-1:] == (num_features,))
    if math.prod(size) != num_features or not on_features:
        return None
    bias = bias_of(context, right, num_features)
    if bias is None:
        return None
    context.nodes[index] = dataclasses.replace(product, slots=(product.slots[0], bias))
    return value


def _mul(context: Context, node: fx.Node) -> Value | None:
    left, right = node.args
    return _product(context, node, *((left, right) if context.is_batched(left) else (right, left)))


def _div(context: Context, node: fx.Node) -> Value | None:
    """``x / y``: a product with the reciprocal."""
    left, right = node.args[:2]
    if node.kwargs.get("rounding_mode") is not None or len(node.args) > 2:
        return None
    if context.is_batched(right):
        divisor = context.value(right)
        inverse = _activated(context, node, divisor, "reciprocal", suffix="_reciprocal", layout=divisor.layout)
        return None if inverse is None else _product_with(context, node, left, inverse)
    return _product(context, node, left, right, reciprocal=True)


def _product_with(context: Context, node: fx.Node, left: Any, factor: Value) -> Value | None:
    """``left * factor`` for a value that is no node of the graph."""
    layout = context.layout(node)
    whole = None if layout is None else expanded(context, node, factor, layout, "_operand")
    if layout is None or whole is None:
        return None
    if context.is_batched(left):
        value = expanded(context, node, context.value(left), layout, "_operand_0")
        return None if value is None else context.emit(node, "multiply", [value, whole])
    if context.is_batch_free(left):
        operands = slot_operands(context, "scale", left, layout)
        return None if operands is None else context.emit(node, "affine", [whole], **operands, floats={"a": 1.0, "b": 0.0})
    number = context.number(node, left)
    return None if number is None else context.emit(node, "affine", [whole], (-1, -1), floats={"a": number, "b": 0.0})


def _neg(context: Context, node: fx.Node) -> Value | None:
    return _product(context, node, node.args[0], -1.0)


def _product(context: Context, node: fx.Node, x: Any, factor: Any, *, reciprocal: bool = False) -> Value | None:
    """``x * factor`` or, if the factor is no activation, ``x / factor``."""
    if context.is_batched(factor):
        pair = _pair(context, node, x, factor)
        return None if pair is None else context.emit(node, "multiply", pair)
    if context.is_batch_free(factor):
        return _affine(context, node, x, "scale", factor, 1.0, [(torch.reciprocal, ())] if reciprocal else [])
    number = context.number(node, factor)
    if number is None or (reciprocal and number == 0.0):
        return None
    value = context.value(x)
    return context.emit(node, "affine", [value], (-1, -1), floats={"a": 1.0 / number if reciprocal else number, "b": 0.0})


def _maximum(context: Context, node: fx.Node) -> Value | None:
    pair = _pair(context, node, *node.args[:2])
    return None if pair is None else context.emit(node, "extremum", pair, ints={"minimum": 0})


def _minimum(context: Context, node: fx.Node) -> Value | None:
    pair = _pair(context, node, *node.args[:2])
    return None if pair is None else context.emit(node, "extremum", pair, ints={"minimum": 1})


def _where(context: Context, node: fx.Node) -> Value | None:
    """``where(mask, first, second)``."""
    return _choice(context, node, node.args[0], node.args[1], node.args[2])


def _masked_fill(context: Context, node: fx.Node) -> Value | None:
    """``masked_fill(x, mask, number)``."""
    return _choice(context, node, node.args[1], node.args[2], node.args[0])


def _choice(context: Context, node: fx.Node, mask: Any, first: Any, second: Any) -> Value | None:
    layout = context.layout(node)
    if layout is None or (context.depends[mask] and not context.is_batched(mask)):
        return None
    values: list[Value] = []
    slots: tuple[int, ...] = ()
    if context.is_batched(mask):
        value = expanded(context, node, context.value(mask), layout, "_mask")
        if value is None:
            return None
        values.append(value)
    else:
        slot = context.slot(mask, layout.shape) if mask.meta["val"].dim() <= len(layout.shape) else None
        if slot is None:
            return None
        slots = (slot,)
    numbers = [_constant_number(context, node, branch) for branch in (first, second)]
    for number, branch in zip(numbers, (first, second), strict=True):
        if number is None:
            pair = _pair(context, node, branch) if isinstance(branch, fx.Node) else None
            if pair is None:
                return None
            values += pair
    ints = {"has_mask": int(not slots), "has_first": int(numbers[0] is None), "has_second": int(numbers[1] is None)}
    return context.emit(node, "where", values, slots, ints=ints, floats={"a": numbers[0] or 0.0, "b": numbers[1] or 0.0})


def _constant_number(context: Context, node: fx.Node, branch: Any) -> float | None:
    """A branch that is one number, also as a tensor without axes that is part of the graph."""
    if context.is_batch_free(branch) and branch.meta["val"].dim() == 0 and not context.depends[branch]:
        literal = context.table.literal(branch)
        return None if literal is None else float(literal)
    return context.number(node, branch)


# Operators that give truth values, which are kept as 1 and 0.
PREDICATES: dict[str, Lowering] = {
    f"aten.{name}.{form}": _comparison(kind)
    for name, kind in {
        "gt": "greater",
        "ge": "greater_equal",
        "lt": "less",
        "le": "less_equal",
        "eq": "equal",
        "ne": "not_equal",
    }.items()
    for form in ("Scalar", "Tensor")
}

LOWERINGS: dict[str, Lowering] = {
    **named(_activation("relu"), "relu.default"),
    **named(_activation("tanh"), "tanh.default"),
    **named(_activation("sigmoid"), "sigmoid.default"),
    **named(_activation("silu"), "silu.default"),
    **named(_activation("softplus", ("beta", 1.0), ("threshold", 20.0)), "softplus.default"),
    **named(_activation("leaky_relu", ("negative_slope", 0.01)), "leaky_relu.default"),
    **named(_gelu, "gelu.default"),
    **named(_elu, "elu.default"),
    **named(_activation("celu", ("alpha", 1.0)), "celu.default"),
    **named(_selu, "selu.default"),
    **named(_rrelu, "rrelu.default"),
    **named(_activation("hardtanh", ("min_val", -1.0), ("max_val", 1.0)), "hardtanh.default"),
    **named(_relu6, "relu6.default"),
    **named(_activation("softshrink", ("lambd", 0.5)), "softshrink.default"),
    **named(_activation("hardshrink", ("lambd", 0.5)), "hardshrink.default"),
    **named(_activation("threshold", ("threshold", 0.0), ("value", 0.0)), "threshold.default"),
    **named(_activation("log_sigmoid"), "log_sigmoid.default log_sigmoid_forward.default"),
    **named(_activation("sign"), "sign.default sgn.default"),
    **{f"aten.{kind}.default": _activation(kind) for kind in _PLAIN},
    **named(_clamp, "clamp.default clip.default"),
    **named(_clamp_min, "clamp_min.default"),
    **named(_clamp_max, "clamp_max.default"),
    **named(_round, "round.default round.decimals"),
    **named(_pow, "pow.Tensor_Scalar"),
    **named(_glu, "glu.default"),
    **named(_prelu, "prelu.default _prelu_kernel.default"),
    **named(_maximum, "maximum.default"),
    **named(_minimum, "minimum.default"),
    **named(_where, "where.self where.ScalarOther where.ScalarSelf where.Scalar"),
    **named(_masked_fill, "masked_fill.Scalar masked_fill.Tensor"),
    **named(_add, "add.Tensor add.Scalar"),
    **named(_sub, "sub.Tensor sub.Scalar subtract.Tensor"),
    **named(_rsub, "rsub.Tensor rsub.Scalar"),
    **named(_mul, "mul.Tensor mul.Scalar multiply.Tensor"),
    **named(_div, "div.Tensor div.Scalar divide.Tensor true_divide.Tensor"),
    **named(_neg, "neg.default negative.default"),
}
