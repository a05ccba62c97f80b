"""What a lowering function works with: the values, nodes, slots and problems of the graph under construction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.export.graph_signature import InputKind

from influence_ext.capture.constants import SlotTable
from influence_ext.capture.export import Exported, contributing, output_nodes, parameter_dependence
from influence_ext.capture.graph import Node, Problem


@dataclass(frozen=True)
class Value:
    """A batched tensor ``[fold * N, *rest]``, in memory the same as ``[N, fold, *rest]``."""

    id: int
    fold: int
    rest: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one example."""
        return self.rest if self.fold == 1 else (self.fold, *self.rest)

    @property
    def width(self) -> int:
        """Elements of one example."""
        return math.prod(self.shape)


class Context:
    """The graph being lowered.

    A node of the fx graph is *batched* if it depends on an input or on the number of examples; every other tensor is a
    constant, looked at only where a rule reads it. Nodes the output does not depend on are not lowered.
    """

    def __init__(self, exported: Exported, dtype: torch.dtype, input_names: tuple[str, ...]):
        program = exported.program
        self.dtype = dtype
        self.input_names = input_names
        self.problems: list[Problem] = list(exported.problems)
        self.nodes: list[Node] = []
        self.values: dict[fx.Node, Value | None] = {}
        self.outputs = output_nodes(program)
        self.live = contributing(self.outputs)
        self.depends = parameter_dependence(program, exported.names)
        self.table = SlotTable(program, exported.names, self.depends, self.refuse)
        kinds = {spec.arg.name: spec.kind for spec in program.graph_signature.input_specs}
        self.inputs = [n for n in program.graph.nodes if n.op == "placeholder" and kinds[n.name] == InputKind.USER_INPUT]
        leading = [n.meta["val"].shape[0] for n in self.inputs]
        self._symbols = {size.node.expr for size in leading if is_free(size)}
        self._batched: set[fx.Node] = set(self.inputs)
        for node in program.graph.nodes:
            if not is_number(node) and any(n in self._batched or is_number(n) for n in node.all_input_nodes):
                self._batched.add(node)

    def is_batched(self, argument: Any) -> bool:
        """Whether an argument is a tensor with the examples in it."""
        return isinstance(argument, fx.Node) and argument in self._batched

    def is_constant(self, argument: Any) -> bool:
        """Whether an argument is a tensor that depends neither on the inputs nor on the number of examples."""
        return isinstance(argument, fx.Node) and not self.is_batched(argument) and isinstance(argument.meta.get("val"), Tensor)

    def value(self, argument: Any) -> Value:
        """The value of a batched argument; the walk skips nodes whose inputs could not be lowered."""
        value = self.values[argument]
        assert value is not None
        return value

    def lowered(self, node: fx.Node) -> bool:
        """Whether all batched inputs of ``node`` have a value."""
        return all(self.values.get(n) is not None for n in node.all_input_nodes if n in self._batched)

    def layout(self, node: fx.Node) -> tuple[int, tuple[int, ...]] | None:
        """``(fold, rest)`` of a node's shape, or None where the examples are not on its leading axis."""
        dims: list[Any] = [size if is_free(size) else int(size) for size in node.meta["val"].shape]
        while len(dims) > 1 and dims[0] == 1:
            dims.pop(0)
        if not dims or not is_free(dims[0]) or any(is_free(size) for size in dims[1:]):
            return None
        folds = [dims[0].node.expr / symbol for symbol in self._symbols]
        return next(((int(fold), tuple(dims[1:])) for fold in folds if fold.is_Integer), None)

    def name_of(self, node: fx.Node) -> str:
        """What to call a batched node in a message."""
        return self.input_names[self.inputs.index(node)] if node in self.inputs else node.name

    def live_users(self, node: fx.Node) -> list[fx.Node]:
        """Nodes that read ``node`` on the way to the output."""
        return [user for user in node.users if user in self.live]

    def add_input(self, node: fx.Node, index: int) -> None:
        """Give an input its value."""
        layout = self.layout(node)
        if layout is None:
            self.problems.append(
                Problem(
                    f"input {self.input_names[index]}: the forward pass fixes the number of examples, so batches of other sizes cannot be "
                    "computed; derive sizes from X.shape[0] instead of len(X) or constants"
                )
            )
        self.values[node] = None if layout is None else Value(index, *layout)

    def emit(
        self,
        node: fx.Node,
        rule: str,
        inputs: Sequence[Value],
        slots: Sequence[int] = (),
        ints: dict[str, int] | None = None,
        floats: dict[str, float] | None = None,
        suffix: str = "",
    ) -> Value | None:
        """Append an application of ``rule`` whose output has the shape of ``node``; None (and a problem) if that mixes
        examples.
        """
        layout = self.layout(node)
        if layout is None:
            self.refuse(node, "mixes the examples of a batch; keep the examples on the first axis")
            return None
        value = Value(len(self.inputs) + len(self.nodes), *layout)
        self.nodes.append(
            Node(
                rule=rule,
                name=node.name + suffix,
                target=target_of(node),
                inputs=tuple(v.id for v in inputs),
                output=value.id,
                slots=tuple(slots),
                ints=ints or {},
                floats=floats or {},
                width=value.width,
                shape=value.shape,
                module=module_of(node),
            )
        )
        return value

    def producer(self, value: Value) -> int | None:
        """Index of the node that computes ``value``, None for an input."""
        return value.id - len(self.inputs) if value.id >= len(self.inputs) else None

    def number(self, node: fx.Node, argument: Any) -> float | None:
        """A Python number as float; None (and a problem) where it is computed in the graph."""
        if isinstance(argument, (bool, int, float)):
            return float(argument)
        self.refuse(
            node,
            "uses a number that depends on the batch size or is read from a tensor; use a Python number or a buffer",
        )
        return None

    def refuse(self, node: fx.Node, reason: str, parameters: frozenset[str] | None = None) -> None:
        """Record a problem; ``parameters`` as in ``Problem``."""
        parts = [target_of(node), f"in {module_of(node)}"] if module_of(node) else [target_of(node)]
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            parts.append(f"output [{', '.join(self._size_text(d) for d in value.shape)}]")
        self.problems.append(Problem(f"{node.name}: {reason} ({', '.join(parts)})", parameters))

    def _size_text(self, size: Any) -> str:
        text = str(size)
        for symbol in self._symbols:
            text = text.replace(str(symbol), "N")
        return text


def is_free(size: Any) -> bool:
    """Whether a size varies with the number of examples; a symbol that tracing has fixed does not."""
    return isinstance(size, torch.SymInt) and not size.node.expr.is_Integer


def is_number(node: fx.Node) -> bool:
    """Whether a node computes a number, such as the number of examples, rather than a tensor."""
    return isinstance(node.meta.get("val"), (torch.SymInt, torch.SymFloat, torch.SymBool, bool, int, float))


def target_of(node: fx.Node) -> str:
    """``"aten.linear.default"``, ``"getitem"``."""
    if isinstance(node.target, (torch._ops.OpOverload, torch._ops.HigherOrderOperator)):
        return str(node.target)
    return node.target if isinstance(node.target, str) else node.target.__name__


def module_of(node: fx.Node) -> str:
    """``"encoder.fc1 (Linear)"``, or empty where torch does not know."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    if not stack or not isinstance(stack[-1], (tuple, list)):
        return ""
    path, cls = stack[-1]
    path = path.removeprefix("model").removeprefix(".")
    kind = (cls if isinstance(cls, str) else cls.__name__).rsplit(".", 1)[-1]
    return f"{path} ({kind})" if path else kind
