"""ATen graph -> rule applications: one table from operator to lowering function.

To support an operator, write a function that emits nodes and add its name to ``LOWERINGS``. A function gets the context
and the fx node, all of whose batched inputs have values; it returns the output's value, or None after it has recorded a
problem.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from influence_ext.capture.constants import ORDER_KEEPING, draws_random_numbers
from influence_ext.capture.context import Context, Value, is_free, is_number, target_of
from influence_ext.capture.export import Exported
from influence_ext.capture.graph import CapturedGraph, Problem

Lowering = Callable[[Context, fx.Node], Value | None]

RULES = ("linear", "activation", "add", "affine", "view")

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


def lower(
    exported: Exported, model_name: str, dtype: torch.dtype, input_names: tuple[str, ...]
) -> tuple[CapturedGraph | None, list[Problem]]:
    """Lower an exported program.

    Args:
        exported: from ``export_model``.
        model_name: for messages and the report.
        dtype: the dtype all values must have.
        input_names: one an input, in order.

    Returns:
        The graph, with the problems that depend on which parameters are trained as its ``conditions``; and all
        problems. The graph is None if a problem stands whatever is trained.
    """
    context = Context(exported, dtype, input_names)
    for index, node in enumerate(context.inputs):
        context.add_input(node, index)
    for node in exported.program.graph.nodes:
        if node.op == "call_function" and node in context.live and context.is_batched(node):
            context.values[node] = _lower_node(context, node)
    output = _check_output(context)
    problems = list(dict.fromkeys(context.problems))
    conditions = tuple(p for p in problems if p.parameters is not None)
    if output is None or len(conditions) < len(problems):
        return None, problems
    graph = CapturedGraph(
        model_name=model_name,
        dtype=dtype,
        input_names=input_names,
        input_shapes=tuple(context.value(node).shape for node in context.inputs),
        nodes=tuple(context.nodes),
        slots=tuple(context.table.slots),
        output=output.id,
        output_shape=output.shape,
        conditions=conditions,
    )
    return graph, problems


def _lower_node(context: Context, node: fx.Node) -> Value | None:
    lowering = LOWERINGS.get(target_of(node))
    if lowering is None:
        if target_of(node) != "getitem":
            context.refuse(node, _missing_rule(context, node))
        return None
    if not context.lowered(node):
        return None
    for source in [n for n in node.all_input_nodes if context.is_batched(n)] + [node]:
        found = source.meta["val"].dtype
        if found != context.dtype:
            where = "gives" if source is node else f"reads {context.name_of(source)} of"
            context.refuse(node, f"{where} {found} where the parameters are {context.dtype}; convert the data or constant")
            return None
    return lowering(context, node)


def _missing_rule(context: Context, node: fx.Node) -> str:
    target = target_of(node)
    if "batch_norm" in target and "no_training" not in target and any(a is True for a in node.args):
        return "batch norm with batch statistics mixes the examples of a batch; use running statistics and model.eval()"
    if "dropout" in target:
        return "dropout is active in evaluation mode; pass training=self.training to it"
    if draws_random_numbers(node):
        return "draws random numbers in evaluation mode; make the forward pass deterministic"
    if any(is_number(n) for n in node.all_input_nodes) and not any(isinstance(n.meta.get("val"), Tensor) for n in node.all_input_nodes):
        return "builds a tensor whose size is the number of examples; let a tensor of one example broadcast instead"
    if isinstance(node.meta.get("val"), Tensor) and context.layout(node) is None:
        return "no rule for this operator, which also mixes the examples of a batch"
    return "no rule for this operator"


def _check_output(context: Context) -> Value | None:
    if len(context.outputs) != 1:
        context.problems.append(
            Problem(f"output: the model returns {len(context.outputs)} tensors instead of one; return the one the loss is computed from")
        )
        return None
    (node,) = context.outputs
    if not context.is_batched(node):
        context.refuse(node, "the output does not depend on the inputs; return the network's output")
        return None
    if context.values.get(node) is None:
        return None
    if not is_free(node.meta["val"].shape[0]) or context.value(node).fold != 1:
        context.refuse(node, "the output's first axis does not count the examples; reshape it to [N, ...]")
        return None
    return context.value(node)


def _argument(node: fx.Node, position: int, name: str, default: Any) -> Any:
    return node.args[position] if position < len(node.args) else node.kwargs.get(name, default)


def _linear(context: Context, node: fx.Node) -> Value | None:
    """``linear(x, W, b)``, W ``[O, I]``."""
    x, weight = node.args[:2]
    return _emit_linear(context, node, x, weight, _argument(node, 2, "bias", None), matrix_is_transposed=False)


def _matmul(context: Context, node: fx.Node) -> Value | None:
    """``matmul(x, W)``, W ``[I, O]`` or a vector ``[I]``."""
    x, weight = node.args
    return _emit_linear(context, node, x, weight, None, matrix_is_transposed=True)


def _addmm(context: Context, node: fx.Node) -> Value | None:
    """``addmm(b, x, W)``, W ``[I, O]``; b is a bias or a batched tensor."""
    bias: Any
    bias, x, weight = node.args
    if node.kwargs.get("alpha", 1) != 1 or node.kwargs.get("beta", 1) != 1:
        context.refuse(node, "no rule for addmm with alpha or beta other than 1; scale the terms separately")
        return None
    if not context.is_batched(bias):
        return _emit_linear(context, node, x, weight, bias, matrix_is_transposed=True)
    if context.layout(bias) != context.layout(node):
        context.refuse(node, "no rule for broadcasting one activation over another; expand it to one shape in the data")
        return None
    product = _emit_linear(context, node, x, weight, None, matrix_is_transposed=True, suffix="_product")
    return None if product is None else context.emit(node, "add", [context.value(bias), product], floats={"a": 1.0, "b": 1.0})


def _emit_linear(
    context: Context, node: fx.Node, x: Any, weight: Any, bias: Any, *, matrix_is_transposed: bool, suffix: str = ""
) -> Value | None:
    if not context.is_batched(x) or not context.is_constant(weight):
        context.refuse(node, "no rule for a matrix product other than activation times weight; put the weight on the right")
        return None
    size = tuple(weight.meta["val"].shape)
    if len(size) not in (1, 2):
        context.refuse(node, f"no rule for a weight of shape {list(size)}; use a matrix")
        return None
    value = context.value(x)
    if not value.rest:
        context.refuse(node, "mixes the examples of a batch; keep the examples on the first axis and the features on the last")
        return None
    found = context.table.matrix(node, weight)
    if found is None:
        return None
    slot, flipped = found
    transposed = len(size) == 2 and matrix_is_transposed != flipped
    in_features = value.rest[-1]
    out_features = math.prod(size) // in_features
    bias_slot: int | None = -1
    if bias is not None:
        bias_slot = context.table.bias(node, bias, out_features)
    if bias_slot is None:
        return None
    ints = {"in_features": in_features, "out_features": out_features, "transposed": int(transposed)}
    return context.emit(node, "linear", [value], (slot, bias_slot), ints, suffix=suffix)


def _activation(kind: str, *defaults: tuple[str, float]) -> Lowering:
    """``kind(x, *parameters)``; ``defaults`` name the operator's numbers, which become ``a`` and ``b`` in this
    order.
    """

    def lowering(context: Context, node: fx.Node) -> Value | None:
        numbers = [context.number(node, _argument(node, i, *default)) for i, default in enumerate(defaults, start=1)]
        return _emit_activation(context, node, kind, numbers)

    return lowering


def _emit_activation(context: Context, node: fx.Node, kind: str, numbers: Sequence[float | None]) -> Value | None:
    given = [number for number in numbers if number is not None]
    if len(given) < len(numbers):
        return None
    a, b = [*given, 0.0, 0.0][:2]
    ints = {"kind": ACTIVATION_KINDS[kind]}
    return context.emit(node, "activation", [context.value(node.args[0])], ints=ints, floats={"a": a, "b": b})


def _gelu(context: Context, node: fx.Node) -> Value | None:
    approximate = _argument(node, 1, "approximate", "none")
    return _emit_activation(context, node, "gelu" if approximate == "none" else "gelu_tanh", [])


def _elu(context: Context, node: fx.Node) -> Value | None:
    """``elu(x, alpha, scale, input_scale)``."""
    names = ("alpha", "scale", "input_scale")
    numbers = [context.number(node, _argument(node, i, name, 1.0)) for i, name in enumerate(names, start=1)]
    if numbers[2] not in (1.0, None):
        context.refuse(node, "no rule for ELU with an input scale other than 1; scale the input beforehand")
        return None
    return _emit_activation(context, node, "elu", numbers[:2])


def _celu(context: Context, node: fx.Node) -> Value | None:
    """``celu(x, alpha)`` is ELU for alpha = 1; other values scale the input."""
    alpha = context.number(node, _argument(node, 1, "alpha", 1.0))
    if alpha not in (1.0, None):
        context.refuse(node, "no rule for CELU with alpha other than 1; use ELU")
        return None
    return _emit_activation(context, node, "elu", [alpha, 1.0])


def _selu(context: Context, node: fx.Node) -> Value | None:
    # The constants are torch's own (aten/src/ATen/native/Activation.cpp), from Klambauer et al. 2017.
    return _emit_activation(context, node, "elu", [1.6732632423543772848170429916717, 1.0507009873554804934193349852946])


def _rrelu(context: Context, node: fx.Node) -> Value | None:
    """In evaluation mode ``rrelu(x, lower, upper)`` is a leaky ReLU with their mean as slope."""
    if _argument(node, 3, "training", False):
        context.refuse(node, "draws random numbers in evaluation mode; make the forward pass deterministic")
        return None
    lower = context.number(node, _argument(node, 1, "lower", 0.125))
    upper = context.number(node, _argument(node, 2, "upper", 1.0 / 3.0))
    return None if lower is None or upper is None else _emit_activation(context, node, "leaky_relu", [(lower + upper) / 2])


def _add(context: Context, node: fx.Node) -> Value | None:
    return _sum(context, node, node.args[0], node.args[1], 1.0, _alpha(node))


def _sub(context: Context, node: fx.Node) -> Value | None:
    return _sum(context, node, node.args[0], node.args[1], 1.0, -_alpha(node))


def _rsub(context: Context, node: fx.Node) -> Value | None:
    """``rsub(x, y) = y - alpha x``."""
    return _sum(context, node, node.args[0], node.args[1], -_alpha(node), 1.0)


def _alpha(node: fx.Node) -> float:
    return float(_argument(node, 2, "alpha", 1))


def _sum(context: Context, node: fx.Node, left: Any, right: Any, a: float, b: float) -> Value | None:
    """``a left + b right``, either of them batched, the other batched, a constant or a number."""
    if not context.is_batched(left):
        left, right, a, b = right, left, b, a
    value = context.value(left)
    if context.layout(node) != (value.fold, value.rest):
        context.refuse(node, "no rule for broadcasting an activation to another shape; give both terms the same shape")
        return None
    if context.is_batched(right):
        if context.layout(right) != (value.fold, value.rest):
            context.refuse(node, "no rule for broadcasting one activation over another; give both terms the same shape")
            return None
        return context.emit(node, "add", [value, context.value(right)], floats={"a": a, "b": b})
    if context.is_constant(right):
        if a == b == 1.0 and (fused := _fuse_bias(context, node, left, right)) is not None:
            return fused
        shift = context.table.elementwise(node, right, value.rest, value.shape, context.dtype, factor=b)
        return None if shift is None else context.emit(node, "affine", [value], (-1, shift), floats={"a": a, "b": 0.0})
    number = context.number(node, right)
    return None if number is None else context.emit(node, "affine", [value], (-1, -1), floats={"a": a, "b": b * number})


def _fuse_bias(context: Context, node: fx.Node, left: fx.Node, right: fx.Node) -> Value | None:
    """``x @ W + b`` as one linear node, so that a trained b gets its derivative; None if this is something else."""
    value = context.value(left)
    index = context.producer(value)
    if index is None or not context.table.is_plain(right) or len(context.live_users(left)) != 1:
        return None
    product = context.nodes[index]
    size = tuple(right.meta["val"].shape)
    if product.rule != "linear" or product.slots[1] != -1 or product.name != left.name:
        return None
    num_features = product.ints["out_features"]
    on_features = num_features == 1 or (size[-1:] == (num_features,) and value.rest[-1:] == (num_features,))
    if math.prod(size) != num_features or not on_features:
        return None
    bias = context.table.bias(node, right, num_features)
    if bias is None:
        return None
    context.nodes[index] = dataclasses.replace(product, slots=(product.slots[0], bias))
    return value


def _mul(context: Context, node: fx.Node) -> Value | None:
    left, right = node.args
    return _product(context, node, *((left, right) if context.is_batched(left) else (right, left)))


def _div(context: Context, node: fx.Node) -> Value | None:
    left, right = node.args
    if not context.is_batched(left):
        context.refuse(node, "no rule for division by an activation")
        return None
    return _product(context, node, left, right, reciprocal=True)


def _neg(context: Context, node: fx.Node) -> Value | None:
    return _product(context, node, node.args[0], -1.0)


def _product(context: Context, node: fx.Node, x: Any, factor: Any, *, reciprocal: bool = False) -> Value | None:
    """``x * factor`` or ``x / factor``."""
    value = context.value(x)
    if context.is_batched(factor):
        context.refuse(node, f"no rule for a {'quotient' if reciprocal else 'product'} of two activations")
        return None
    if context.layout(node) != (value.fold, value.rest):
        context.refuse(node, "no rule for broadcasting an activation to another shape; give both factors the same shape")
        return None
    if context.is_constant(factor):
        scale = context.table.elementwise(node, factor, value.rest, value.shape, context.dtype, reciprocal=reciprocal)
        return None if scale is None else context.emit(node, "affine", [value], (scale, -1), floats={"a": 1.0, "b": 0.0})
    number = context.number(node, factor)
    if number is None:
        return None
    if reciprocal and number == 0.0:
        context.refuse(node, "divides by zero")
        return None
    return context.emit(node, "affine", [value], (-1, -1), floats={"a": 1.0 / number if reciprocal else number, "b": 0.0})


def _view(context: Context, node: fx.Node) -> Value | None:
    """Operators that keep the elements in order: the output is the input's memory under another shape."""
    value = context.value(node.args[0])
    layout = context.layout(node)
    if layout is not None and layout[0] * math.prod(layout[1]) != value.width:
        context.refuse(node, "no rule for selecting or repeating elements of an activation")
        return None
    return context.emit(node, "view", [value])


def _same_shape(context: Context, node: fx.Node) -> Value | None:
    """Slices and expansions that change nothing."""
    source: Any = node.args[0]
    if source.meta["val"].shape != node.meta["val"].shape:
        context.refuse(node, "no rule for selecting or repeating elements of an activation")
        return None
    return _view(context, node)


def _permute(context: Context, node: fx.Node) -> Value | None:
    """A permutation that moves only axes of size one."""
    args: Any = node.args
    shape = args[0].meta["val"].shape
    axes = list(range(len(shape)))
    if target_of(node) == "aten.permute.default":
        axes = [axis % len(shape) for axis in args[1]]
    else:
        axes[args[1]], axes[args[2]] = axes[args[2]], axes[args[1]]
    moved = [axis for axis in axes if not isinstance(shape[axis], int) or shape[axis] != 1]
    if moved != sorted(moved):
        context.refuse(node, "no rule for permuting the axes of an activation")
        return None
    return _view(context, node)


def _detach(context: Context, node: fx.Node) -> Value | None:
    parameters = context.depends[node]
    if parameters:
        context.refuse(
            node,
            f"detach cuts off the derivatives with respect to {', '.join(sorted(parameters))}; remove it or freeze these parameters",
            parameters,
        )
    return _view(context, node)


def _named(lowering: Lowering, operators: str) -> dict[str, Lowering]:
    return {f"aten.{name}": lowering for name in operators.split()}


LOWERINGS: dict[str, Lowering] = {
    **_named(_linear, "linear.default"),
    **_named(_addmm, "addmm.default"),
    **_named(_matmul, "matmul.default mm.default mv.default"),
    **_named(_activation("relu"), "relu.default"),
    **_named(_activation("tanh"), "tanh.default"),
    **_named(_activation("sigmoid"), "sigmoid.default"),
    **_named(_activation("silu"), "silu.default"),
    **_named(_activation("softplus", ("beta", 1.0), ("threshold", 20.0)), "softplus.default"),
    **_named(_activation("leaky_relu", ("negative_slope", 0.01)), "leaky_relu.default"),
    **_named(_gelu, "gelu.default"),
    **_named(_elu, "elu.default"),
    **_named(_celu, "celu.default"),
    **_named(_selu, "selu.default"),
    **_named(_rrelu, "rrelu.default"),
    **_named(_add, "add.Tensor add.Scalar"),
    **_named(_sub, "sub.Tensor sub.Scalar subtract.Tensor"),
    **_named(_rsub, "rsub.Tensor rsub.Scalar"),
    **_named(_mul, "mul.Tensor mul.Scalar multiply.Tensor"),
    **_named(_div, "div.Tensor div.Scalar divide.Tensor true_divide.Tensor"),
    **_named(_neg, "neg.default negative.default"),
    **dict.fromkeys(ORDER_KEEPING, _view),
    **_named(_view, "_to_copy.default type_as.default"),
    **_named(_same_shape, "slice.Tensor expand.default"),
    **_named(_permute, "permute.default transpose.int"),
    **_named(_detach, "detach.default"),
}
