"""ATen graph -> rule applications: tables from operator to lowering function, one module for each family of operators.

To support an operator, write a function that emits nodes and add its name to the ``LOWERINGS`` of its family. A function gets the context
and the fx node, all of whose batched inputs have values; it returns the output's value, or None where the operator has no native rule in
this form: then the generic rule runs it. What cannot be right in any way it refuses (``context.refuse``).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from influence_ext.capture.constants import draws_random_numbers
from influence_ext.capture.context import Context, Value, is_number, is_part, operation_of, operator_name, target_of
from influence_ext.capture.cost import elements, operations
from influence_ext.capture.export import Exported
from influence_ext.capture.generic import NodeOperator, Reference, Step
from influence_ext.capture.graph import CapturedGraph, Problem, without_unread
from influence_ext.capture.layout import NO_AXIS, Layout, is_free
from influence_ext.capture.lowering import (
    convolution,
    embedding,
    linear,
    movement,
    normalisation,
    pointwise,
    products,
    recurrent,
    reduction,
    resize,
)
from influence_ext.capture.lowering.pointwise import ACTIVATION_KINDS
from influence_ext.capture.lowering.table import Lowering
from influence_ext.capture.prologue import Prologue

__all__ = ["ACTIVATION_KINDS", "LOWERINGS", "Unlowered", "lower"]

LOWERINGS: dict[str, Lowering] = {
    **linear.LOWERINGS,
    **pointwise.LOWERINGS,
    **movement.LOWERINGS,
    **embedding.LOWERINGS,
    **convolution.LOWERINGS,
    **normalisation.LOWERINGS,
    **reduction.LOWERINGS,
    **products.LOWERINGS,
    **resize.LOWERINGS,
    **recurrent.LOWERINGS,
}

# Operators that give truth values, kept as 1 and 0: comparisons, and what moves their results.
PREDICATES: dict[str, Lowering] = {
    **pointwise.PREDICATES,
    **{name: lowering for name, lowering in movement.LOWERINGS.items() if name != "aten.detach.default"},
}

# Called with the getitem node of an operator that returns a list of tensors.
PART_LOWERINGS: dict[str, Lowering] = {**movement.PART_LOWERINGS, **recurrent.PART_LOWERINGS}


class Unlowered(Exception):
    """The graph cannot run node by node; the reason is for the report."""


def lower(
    exported: Exported, model_name: str, dtype: torch.dtype, input_names: tuple[str, ...]
) -> tuple[CapturedGraph | None, list[Problem], Context]:
    """Lower an exported program.

    Args:
        exported: from ``export_model``.
        model_name: for messages and the report.
        dtype: the dtype all differentiated values must have.
        input_names: one an input, in order.

    Returns:
        The graph, with the problems that depend on which parameters are trained as its ``conditions``; all problems; and the context, for
        the probe. The graph is None if a problem stands whatever is trained.

    Raises:
        Unlowered: a tensor's examples lie on no single axis, or the like: the model may still run as a whole.
    """
    context = Context(exported, dtype, input_names)
    _check_inputs(context)
    reason: str | None = None
    hidden: str | None = None
    for node in exported.program.graph.nodes:
        if node.op != "call_function" or node not in context.live or not context.is_batched(node):
            continue
        if draws_random_numbers(node) or _uses_batch_statistics(node):
            context.refuse(node, _refusal_text(node))
        elif context.depends[node] and isinstance(node.meta.get("val"), Tensor):
            if not context.can_be_value(node):
                hidden = hidden or f"{node.name}: {operator_name(node)} gives {_hidden_text(context, node)}"  # what reads it computes it
                continue
            try:
                value = _lower_node(context, node)
            except Unlowered as found:
                reason = reason or str(found)
                continue
            if value is not None:
                context.values[node] = value
    output = _check_output(context)
    problems = list(dict.fromkeys(context.problems))
    conditions = tuple(p for p in problems if p.parameters is not None)
    if len(conditions) < len(problems):
        return None, problems, context
    if output is None or reason is not None:
        raise Unlowered(reason or hidden or "the output is not computed from the inputs node by node")
    read, nodes, result = without_unread(context.nodes, output.id, context.num_sources)
    context.keep_sources(read)
    wanted = [(node, context.values[node].layout) for node in context.sources]
    graph = CapturedGraph(
        model_name=model_name,
        dtype=dtype,
        input_names=input_names,
        input_shapes=tuple(tuple(int(d) for d in node.meta["val"].shape[1:]) for node in context.inputs),
        input_dtypes=tuple(node.meta["val"].dtype for node in context.inputs),
        prologue=Prologue.of(exported.program, exported.names, context.inputs, wanted, [context.name_of(n) for n in context.sources]),
        nodes=nodes,
        slots=tuple(context.table.slots),
        output=result,
        output_shape=output.shape[1:],
        conditions=conditions,
    )
    return graph, problems, context


def _lower_node(context: Context, node: fx.Node) -> Value | None:
    operation = operation_of(node)
    item = node.args[1] if operation is not node else None
    if any(context.is_batched(n) and n not in context.values for n in operation.all_input_nodes):
        return _generic(context, node)
    found = node.meta["val"].dtype
    # Of a multi-output operator its first output has a rule; parts of a split have one each.
    read = node if operation is node or target_of(operation) in PART_LOWERINGS else operation
    lowering = PART_LOWERINGS.get(target_of(operation)) or (LOWERINGS.get(target_of(operation)) if item in (None, 0) else None)
    if found == torch.bool:
        lowering = PREDICATES.get(target_of(operation))
    if lowering is not None and found in (context.dtype, torch.bool):
        if read is not node:
            context.set_layout(operation, context.layout(node))
        before = len(context.nodes), len(context.problems)
        value = lowering(context, read)
        if value is not None or len(context.problems) > before[1]:
            return value
        del context.nodes[before[0] :]
    return _generic(context, node)


def _generic(context: Context, node: fx.Node) -> Value | None:
    """The node as an operator for torch to differentiate, together with operands that are no values."""
    layout = context.layout(node)
    assert layout is not None
    inside = _computed_inside(context, node)
    inputs: list[tuple[Layout, torch.dtype]] = []
    values: list[Value] = []
    slots: list[tuple[tuple[int, ...], torch.dtype]] = []
    slot_ids: list[int] = []
    references: dict[fx.Node, Reference] = {}

    def describe(argument: fx.Node) -> Any:
        if argument not in references:
            references[argument] = read(argument)
        return references[argument]

    def read(argument: fx.Node) -> Reference:
        if context.is_batched(argument):
            value = context.value(argument)
            inputs.append((value.layout, argument.meta["val"].dtype))
            values.append(value)
            return Reference("input", len(inputs) - 1)
        if is_number(argument):
            size = context.size(argument)
            if size is None:
                raise Unlowered(f"{argument.name}: a number that depends on the data")
            return Reference("size", size=size)
        slot = context.slot(argument)
        if slot is None:
            raise Unlowered(f"{argument.name}: changes from call to call")
        slots.append((tuple(int(s) for s in argument.meta["val"].shape), argument.meta["val"].dtype))
        slot_ids.append(slot)
        return Reference("slot", len(slots) - 1)

    steps: list[Step] = []
    for source in inside:
        args: Any = fx.map_arg(source.args, describe)
        kwargs: Any = fx.map_arg(source.kwargs, describe)
        shown = source is not operation_of(node) and not is_part(source) and not context.can_be_value(source)
        hidden = _hidden_text(context, source) if shown else ""
        steps.append(Step(source.name, source.target, tuple(args), dict(kwargs), hidden))  # type: ignore[arg-type]
        references[source] = Reference("step", len(steps) - 1)
    operator = NodeOperator(steps, inputs, slots, layout, context.dtype)
    value = context.emit(node, "generic", values, slot_ids, operator=operator)
    context.nodes[-1] = replace(context.nodes[-1], operations=sum(operations(n, elements(n)) for n in inside if not is_part(n)))
    return value


def _computed_inside(context: Context, node: fx.Node) -> list[fx.Node]:
    """``node`` and those of its operands that are no values, theirs, and so on, in order."""
    found = {node}
    waiting = [node]
    while waiting:
        current = waiting.pop()
        if not isinstance(current.target, torch._ops.OpOverload) and not is_part(current):
            raise Unlowered(f"{current.name}: {target_of(current)} is not an operator that torch can run on its own")
        for operand in current.all_input_nodes:
            known = operand in context.values and context.counted(operand, 1) is None  # what depends on N alone differs from the data's N
            if context.is_batched(operand) and not known and operand not in found:
                found.add(operand)
                waiting.append(operand)
    return [n for n in node.graph.nodes if n in found]


def _hidden_text(context: Context, node: fx.Node) -> str:
    """Why a tensor is no value of the plan."""
    tensor = node.meta.get("val")
    if isinstance(tensor, Tensor) and context.layout(node) is not None:
        return f"{tensor.dtype} where the parameters are {context.dtype}"
    return NO_AXIS


def _uses_batch_statistics(node: fx.Node) -> bool:
    target = target_of(node)
    return "batch_norm" in target and "no_training" not in target and any(a is True for a in node.args[3:6])


def _refusal_text(node: fx.Node) -> str:
    if "batch_norm" in target_of(node):
        return "batch norm with batch statistics mixes the examples of a batch; use running statistics and model.eval()"
    if "scaled_dot_product_attention" in target_of(node):
        return "dropout is active in evaluation mode; pass dropout_p=0.0 unless self.training"
    if "dropout" in target_of(node):
        return "dropout is active in evaluation mode; pass training=self.training to it"
    return "draws random numbers in evaluation mode; make the forward pass deterministic"


def _check_inputs(context: Context) -> None:
    for index, node in enumerate(context.inputs):
        if context.layout(node) is None:
            context.problems.append(
                Problem(
                    f"input {context.input_names[index]}: the forward pass fixes the number of examples, so batches of other sizes cannot "
                    "be computed; derive sizes from X.shape[0] instead of len(X) or constants"
                )
            )


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
    if node.meta["val"].dtype != context.dtype:
        context.refuse(node, f"gives {node.meta['val'].dtype} where the parameters are {context.dtype}; convert the output")
        return None
    shape = node.meta["val"].shape
    if not shape or not is_free(shape[0]):
        context.refuse(node, "the output's first axis does not count the examples; reshape it to [N, ...]")
        return None
    value = context.values.get(node)
    if value is not None and (value.layout.axis != 0 or value.layout.fold != 1):
        context.refuse(node, "the output's first axis does not count the examples; reshape it to [N, ...]")
        return None
    return value
