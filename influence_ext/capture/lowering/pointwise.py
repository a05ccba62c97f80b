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
from influence_ext.capture.lowering.linear import bias_of
from influence_ext.capture.lowering.table import Lowering, argument, named

ACTIVATION_KINDS = {
    "relu": 0,
    "tanh": 1,
    "gelu": 2,
    "gelu_tanh": 3,
    "silu": 4,
    "sigmoid": 5,
    "elu": 6,
    "softplus": 7,
    "leaky_relu": 8,
}


def _activation(kind: str, *defaults: tuple[str, float]) -> Lowering:
    """``kind(x, *parameters)``; ``defaults`` name the operator's numbers, which become ``a`` and ``b`` in this
    order.
    """

    def lowering(context: Context, node: fx.Node) -> Value | None:
        numbers = [context.number(node, argument(node, i, *default)) for i, default in enumerate(defaults, start=1)]
        return _emit_activation(context, node, kind, numbers)

    return lowering


def _emit_activation(context: Context, node: fx.Node, kind: str, numbers: Sequence[float | None]) -> Value | None:
    given = [number for number in numbers if number is not None]
    if len(given) < len(numbers) or not context.is_batched(node.args[0]):
        return None
    a, b = [*given, 0.0, 0.0][:2]
    ints = {"kind": ACTIVATION_KINDS[kind]}
    return context.emit(node, "activation", [context.value(node.args[0])], ints=ints, floats={"a": a, "b": b})


def _gelu(context: Context, node: fx.Node) -> Value | None:
    approximate = argument(node, 1, "approximate", "none")
    return _emit_activation(context, node, "gelu" if approximate == "none" else "gelu_tanh", [])


def _elu(context: Context, node: fx.Node) -> Value | None:
    """``elu(x, alpha, scale, input_scale)``."""
    names = ("alpha", "scale", "input_scale")
    numbers = [context.number(node, argument(node, i, name, 1.0)) for i, name in enumerate(names, start=1)]
    return _emit_activation(context, node, "elu", numbers[:2]) if numbers[2] == 1.0 else None


def _celu(context: Context, node: fx.Node) -> Value | None:
    """``celu(x, alpha)`` is ELU for alpha = 1; other values scale the input."""
    alpha = context.number(node, argument(node, 1, "alpha", 1.0))
    return _emit_activation(context, node, "elu", [alpha, 1.0]) if alpha == 1.0 else None


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


def _sum(context: Context, node: fx.Node, left: Any, right: Any, a: float, b: float) -> Value | None:
    """``a left + b right``, either of them batched, the other batched, batch-free or a number."""
    if not context.is_batched(left):
        left, right, a, b = right, left, b, a
    value = context.value(left)
    if context.layout(node) != value.layout:
        return None
    if context.is_batched(right):
        if context.layout(right) != value.layout:
            return None
        return context.emit(node, "add", [value, context.value(right)], floats={"a": a, "b": b})
    if context.is_batch_free(right):
        if a == b == 1.0 and (fused := _fuse_bias(context, node, left, right)) is not None:
            return fused
        shift = _constant(context, right, value, [] if b == 1.0 else [(torch.mul, (b,))])
        return None if shift is None else context.emit(node, "affine", [value], (-1, shift), floats={"a": a, "b": 0.0})
    number = context.number(node, right)
    return None if number is None else context.emit(node, "affine", [value], (-1, -1), floats={"a": a, "b": b * number})


def _constant(context: Context, tensor: fx.Node, value: Value, steps: Sequence[Step]) -> int | None:
    """The slot of a constant that meets ``value`` elementwise; None where it depends on parameters or varies along the batch axis."""
    size = tuple(tensor.meta["val"].shape)
    aligned = (1,) * (len(value.shape) - len(size)) + size
    if context.depends[tensor] or len(aligned) > len(value.shape) or aligned[value.axis] != 1:
        return None
    return context.table.slot(tensor, value.shape, steps)


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
    left, right = node.args
    return _product(context, node, left, right, reciprocal=True) if context.is_batched(left) else None


def _neg(context: Context, node: fx.Node) -> Value | None:
    return _product(context, node, node.args[0], -1.0)


def _product(context: Context, node: fx.Node, x: Any, factor: Any, *, reciprocal: bool = False) -> Value | None:
    """``x * factor`` or ``x / factor``."""
    value = context.value(x)
    if context.is_batched(factor) or context.layout(node) != value.layout:
        return None
    if context.is_batch_free(factor):
        scale = _constant(context, factor, value, [(torch.reciprocal, ())] if reciprocal else [])
        return None if scale is None else context.emit(node, "affine", [value], (scale, -1), floats={"a": 1.0, "b": 0.0})
    number = context.number(node, factor)
    if number is None or (reciprocal and number == 0.0):
        return None
    return context.emit(node, "affine", [value], (-1, -1), floats={"a": 1.0 / number if reciprocal else number, "b": 0.0})


LOWERINGS: dict[str, Lowering] = {
    **named(_activation("relu"), "relu.default"),
    **named(_activation("tanh"), "tanh.default"),
    **named(_activation("sigmoid"), "sigmoid.default"),
    **named(_activation("silu"), "silu.default"),
    **named(_activation("softplus", ("beta", 1.0), ("threshold", 20.0)), "softplus.default"),
    **named(_activation("leaky_relu", ("negative_slope", 0.01)), "leaky_relu.default"),
    **named(_gelu, "gelu.default"),
    **named(_elu, "elu.default"),
    **named(_celu, "celu.default"),
    **named(_selu, "selu.default"),
    **named(_rrelu, "rrelu.default"),
    **named(_add, "add.Tensor add.Scalar"),
    **named(_sub, "sub.Tensor sub.Scalar subtract.Tensor"),
    **named(_rsub, "rsub.Tensor rsub.Scalar"),
    **named(_mul, "mul.Tensor mul.Scalar multiply.Tensor"),
    **named(_div, "div.Tensor div.Scalar divide.Tensor true_divide.Tensor"),
    **named(_neg, "neg.default negative.default"),
}
