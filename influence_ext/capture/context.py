"""What a lowering function works with: the values, nodes, slots and problems of the graph under construction."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.export.graph_signature import InputKind

from influence_ext.capture.constants import SlotTable, draws_random_numbers
from influence_ext.capture.cost import operations
from influence_ext.capture.dependence import contributing, parameter_dependence
from influence_ext.capture.export import Exported, output_nodes
from influence_ext.capture.generic import Operator
from influence_ext.capture.graph import Node, Problem
from influence_ext.capture.layout import Layout, is_free, layout_of


@dataclass(frozen=True)
class Value:
    """A batched tensor of the graph: number ``id``, and how it lies in memory."""

    id: int
    layout: Layout

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one example: the rank of the tensor, its batch axis replaced by the fold."""
        return self.layout.shape

    @property
    def axis(self) -> int:
        """The tensor's batch axis."""
        return self.layout.axis

    @property
    def width(self) -> int:
        """Elements of one example."""
        return math.prod(self.shape)


class Context:
    """The graph being lowered.

    A tensor of the fx graph is *batched* if it depends on an input or on the number of examples, else *batch-free*: a constant, a
    parameter or an expression of these, looked at only where a node reads it. Batched tensors that depend on no parameter are left to
    torch (``Prologue``) and enter the plan as inputs; what the output does not depend on is not lowered.
    """

    def __init__(self, exported: Exported, dtype: torch.dtype, input_names: tuple[str, ...]):
        program = exported.program
        self.exported = exported
        self.dtype = dtype
        self.input_names = input_names
        self.problems: list[Problem] = list(exported.problems)
        self.nodes: list[Node] = []
        self.sources: list[fx.Node] = []
        self.values: dict[fx.Node, Value] = {}
        self.parts: dict[fx.Node, list[Value]] = {}  # the outputs of an operator that has several and emits them together
        self.outputs = output_nodes(program)
        self.live = contributing(self.outputs)
        self.depends = parameter_dependence(program, exported.names)
        kinds = {spec.arg.name: spec.kind for spec in program.graph_signature.input_specs}
        self.inputs = [n for n in program.graph.nodes if n.op == "placeholder" and kinds[n.name] == InputKind.USER_INPUT]
        leading = [n.meta["val"].shape[0] for n in self.inputs]
        self.symbols = {size.node.expr for size in leading if is_free(size)}
        self._batched: set[fx.Node] = set(self.inputs)
        self._layouts: dict[fx.Node, Layout | None] = {}
        for node in program.graph.nodes:
            if not is_number(node) and any(n in self._batched or is_number(n) for n in node.all_input_nodes):
                self._batched.add(node)
            if node in self._batched and isinstance(node.meta.get("val"), Tensor):
                # One of several outputs lies as what the operator reads.
                known = [n for n in operation_of(node).all_input_nodes if n in self._layouts]
                self._layouts[node] = layout_of(node, self._layouts.get, known, self.symbols)
        self.table = SlotTable(program, exported.names, self.depends, self.refuse, dtype)
        boundary = self._boundary([n for n in program.graph.nodes if n in self.live and self._enters(n)])
        for node in program.graph.nodes:
            if node in boundary:
                self.values[node] = Value(len(self.sources), self._layouts[node])  # type: ignore[arg-type]
                self.sources.append(node)
        if not self.sources and self.inputs and self.layout(self.inputs[0]) is not None:
            # The output needs nothing but the number of examples: the first input tells it.
            self.values[self.inputs[0]] = Value(0, self._layouts[self.inputs[0]])  # type: ignore[arg-type]
            self.sources.append(self.inputs[0])
        self.num_sources = len(self.sources)

    def _enters(self, node: fx.Node) -> bool:
        """Whether a parameter-free batched tensor is read by a node that depends on parameters, or is the output."""
        if not self.is_batched(node) or self.depends[node] or not isinstance(node.meta.get("val"), Tensor):
            return False
        return node in self.outputs or any(user in self.live and user.op == "call_function" and self.depends[user] for user in node.users)

    def _boundary(self, wanted: list[fx.Node]) -> set[fx.Node]:
        """The nodes ``wanted`` as values; for those that cannot be values, the nearest ones that they are computed from."""
        found: set[fx.Node] = set()
        waiting = list(wanted)
        while waiting:
            node = waiting.pop()
            if self.can_be_value(node):
                found.add(node)
            else:
                waiting.extend(n for n in node.all_input_nodes if self.is_batched(n))
        return found

    def can_be_value(self, node: fx.Node) -> bool:
        """Whether a batched tensor has its examples on one axis, and numbers that the plan's dtype holds."""
        tensor = node.meta.get("val")
        if not isinstance(tensor, Tensor) or self.layout(node) is None or tensor.is_complex():
            return False
        if self.depends[node]:
            return tensor.dtype == self.dtype or not tensor.is_floating_point()
        return not tensor.is_floating_point() or torch.promote_types(tensor.dtype, self.dtype) == self.dtype

    def is_batched(self, argument: Any) -> bool:
        """Whether an argument is a tensor with the examples in it."""
        return isinstance(argument, fx.Node) and argument in self._batched

    def is_batch_free(self, argument: Any) -> bool:
        """Whether an argument is a tensor that depends neither on the inputs nor on the number of examples."""
        return isinstance(argument, fx.Node) and not self.is_batched(argument) and isinstance(argument.meta.get("val"), Tensor)

    def value(self, argument: Any) -> Value:
        """The value of a batched argument."""
        return self.values[argument]

    def layout(self, node: Any) -> Layout | None:
        """Where the examples lie in a batched tensor; None if they are on no single axis."""
        return self._layouts.get(node)

    def keep_sources(self, numbers: Sequence[int]) -> None:
        """Forget the sources that no node reads after all."""
        self.sources = [self.sources[number] for number in numbers]

    def set_layout(self, node: fx.Node, layout: Layout | None) -> None:
        """Let a multi-output operator lie as the output that is read from it."""
        self._layouts[node] = layout

    def dim(self, value: Value, axis: int) -> int | None:
        """An axis of the tensor as an axis of ``value.shape``; None for the batch axis, along which examples would mix."""
        axis %= len(value.shape)
        return None if axis == value.axis else axis

    def emit(
        self,
        node: fx.Node,
        rule: str,
        inputs: Sequence[Value],
        slots: Sequence[int] = (),
        ints: Mapping[str, int] | None = None,
        floats: Mapping[str, float] | None = None,
        lists: Mapping[str, Sequence[int]] | None = None,
        suffix: str = "",
        layout: Layout | None = None,
        operator: Operator | None = None,
    ) -> Value | None:
        """Append an application of ``rule``. Its output lies as ``node`` does, or as ``layout`` says (steps on the way, with a ``suffix``).

        Returns:
            The output's value; None if ``node`` has no layout.
        """
        layout = layout or self.layout(node)
        if layout is None:
            return None
        value = Value(self.num_sources + len(self.nodes), layout)
        self.nodes.append(
            Node(
                rule=rule,
                name=node.name + suffix,
                target=operator_name(node),
                inputs=tuple(v.id for v in inputs),
                output=value.id,
                slots=tuple(slots),
                ints=dict(ints or {}),
                floats=dict(floats or {}),
                lists={key: list(items) for key, items in (lists or {}).items()},
                width=value.width,
                layout=layout,
                operations=0.0 if rule == "view" or suffix else operations(operation_of(node), value.width),
                module=module_of(node),
                operator=operator,
            )
        )
        return value

    def producer(self, value: Value) -> int | None:
        """Index of the node that computes ``value``, None for an input of the plan."""
        return value.id - self.num_sources if value.id >= self.num_sources else None

    def slot(self, argument: fx.Node, shape: tuple[int, ...] | None = None) -> int | None:
        """The slot of a batch-free tensor, broadcast to ``shape`` if given; None (and a problem) where it is random."""
        return self.table.slot(argument, shape)

    def number(self, node: fx.Node, argument: Any) -> float | None:
        """A Python number as float; None where it is computed in the graph."""
        return float(argument) if isinstance(argument, (bool, int, float)) else None

    def size(self, node: fx.Node) -> Callable[[int], int | float] | None:
        """A number that the graph computes (``is_number``) as a function of the number of examples; None if it depends on the data."""
        value = node.meta["val"]
        if isinstance(value, (bool, int, float)):
            return lambda n: value
        expression, kind = value.node.expr, int if isinstance(value, torch.SymInt) else float
        free = expression.free_symbols
        if not free <= self.symbols:
            return None
        return functools.cache(lambda n: kind(expression.subs(dict.fromkeys(free, n))))

    def counted(self, node: Any, n: int) -> Tensor | None:
        """A tensor that depends on the number of examples alone, for ``n`` examples; None for any other."""
        if not isinstance(node, fx.Node) or node.op != "call_function" or draws_random_numbers(node) or is_part(node):
            return None
        found: dict[fx.Node, Any] = {}
        for operand in node.all_input_nodes:
            size = self.size(operand) if is_number(operand) else None
            found[operand] = size(n) if size is not None else self.counted(operand, n)
        if any(value is None for value in found.values()) or not isinstance(node.target, torch._ops.OpOverload):
            return None
        args: Any = fx.map_arg(node.args, found.__getitem__)
        kwargs: Any = fx.map_arg(node.kwargs, found.__getitem__)
        result = node.target(*args, **kwargs)
        return result if isinstance(result, Tensor) else None

    def live_users(self, node: fx.Node) -> list[fx.Node]:
        """Nodes that read ``node`` on the way to the output."""
        return [user for user in node.users if user in self.live]

    def name_of(self, node: fx.Node) -> str:
        """What to call a batched node in a message."""
        return self.input_names[self.inputs.index(node)] if node in self.inputs else node.name

    def refuse(self, node: fx.Node, reason: str, parameters: frozenset[str] | None = None) -> None:
        """Record a problem; ``parameters`` as in ``Problem``."""
        parts = [operator_name(node), f"in {module_of(node)}"] if module_of(node) else [operator_name(node)]
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            parts.append(f"output [{', '.join(self._size_text(d) for d in value.shape)}]")
        self.problems.append(Problem(f"{node.name}: {reason} ({', '.join(parts)})", parameters))

    def _size_text(self, size: Any) -> str:
        text = str(size)
        for symbol in self.symbols:
            text = text.replace(str(symbol), "N")
        return text


def is_number(node: fx.Node) -> bool:
    """Whether a node computes a number, such as the number of examples, rather than a tensor."""
    return isinstance(node.meta.get("val"), (torch.SymInt, torch.SymFloat, torch.SymBool, bool, int, float))


def target_of(node: fx.Node) -> str:
    """``"aten.linear.default"``, ``"getitem"``."""
    if isinstance(node.target, (torch._ops.OpOverload, torch._ops.HigherOrderOperator)):
        return str(node.target)
    return node.target if isinstance(node.target, str) else node.target.__name__


def operation_of(node: fx.Node) -> fx.Node:
    """The node itself, and for one of an operator's several outputs the operator."""
    source = node.args[0] if node.args else None
    return source if target_of(node) == "getitem" and isinstance(source, fx.Node) else node


def is_part(node: fx.Node) -> bool:
    """Whether a node picks one of an operator's several outputs."""
    return operation_of(node) is not node


def operator_name(node: fx.Node) -> str:
    """``target_of`` the operation."""
    return target_of(operation_of(node))


def module_of(node: fx.Node) -> str:
    """``"encoder.fc1 (Linear)"``, or empty where torch does not know."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    if not stack or not isinstance(stack[-1], (tuple, list)):
        return ""
    path, cls = stack[-1]
    path = path.removeprefix("model").removeprefix(".")
    kind = (cls if isinstance(cls, str) else cls.__name__).rsplit(".", 1)[-1]
    return f"{path} ({kind})" if path else kind
