"""Batch-free tensors of an exported graph -> slots that rules read."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from influence_ext.capture.elements import Elements, elements_of
from influence_ext.capture.graph import Expression, Slot, SlotKind

_KINDS: dict[InputKind, SlotKind] = {
    InputKind.PARAMETER: "parameter",
    InputKind.BUFFER: "buffer",
    InputKind.CONSTANT_TENSOR: "constant",
}
Refuse = Callable[[fx.Node, str, frozenset[str] | None], None]
Step = tuple[Callable[..., Tensor], tuple[Any, ...]]
_EXACT = {torch.float32: 2**24}  # whole numbers up to here


@dataclass(frozen=True)
class Read:
    """How a rule reads a batch-free tensor: its element i is number ``offset + Σ i_k strides_k`` of a slot.

    Or of rows of the slot, ``cols`` elements each, whose numbers another slot holds; row ``padding`` takes no derivative (−1: none).
    """

    slot: int
    offset: int
    strides: tuple[int, ...]
    rows: int = -1
    cols: int = 0
    padding: int = -1


class SlotTable:
    """The slots of one graph, each tensor once.

    A parameter or buffer that a rule can read as it lies in memory, or a run of its elements (a slice, a reshape, for
    weights a transpose), becomes a plain slot; anything else that does not depend on the inputs becomes a derived one:
    an expression, evaluated by torch and differentiated by it where it depends on trained parameters.
    """

    def __init__(
        self,
        program: ExportedProgram,
        names: dict[str, str],
        depends: dict[fx.Node, frozenset[str]],
        refuse: Refuse,
        dtype: torch.dtype,
    ):
        self.slots: list[Slot] = []
        self._program = program
        self._names = names
        self._depends = depends
        self._refuse = refuse
        self._dtype = dtype
        self._index: dict[Any, int] = {}
        self._found: dict[tuple[fx.Node, bool], Elements | None] = {}
        self._specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}

    def matrix(self, weight: fx.Node) -> tuple[int, bool] | None:
        """The slot of a weight, and whether the slot holds its transpose; None (and a problem) where it is random."""
        found = self._elements(weight, rows=False)
        if found is not None and found.rows is None and len(found.shape) == 2 and found.view().t().is_contiguous():
            turned = found.shape[::-1]
            if not found.is_run or tuple(found.leaf.meta["val"].shape) == turned != found.shape:  # a single row or column is either
                return self._run(found, turned), True
        slot = self.slot(weight)
        return None if slot is None else (slot, False)

    def slot(self, tensor: fx.Node, shape: tuple[int, ...] | None = None, steps: Sequence[Step] = ()) -> int | None:
        """The slot of a batch-free tensor after ``steps``, broadcast to ``shape`` if given.

        A slot's elements are those of the tensor in row-major order; a parameter seen through a reshape shares the parameter's slot.
        None (and a problem) where the tensor is random.
        """
        value = tensor.meta["val"]
        same_shape = shape is None or _without_ones(shape) == _without_ones(tuple(value.shape))
        if not steps and same_shape and (found := self._elements(tensor, rows=False)) is not None and found.is_run:
            return self._run(found, found.shape)
        chain: list[Step] = []
        if value.is_complex():
            chain.append((torch.view_as_real, ()))  # as Slot.read does with what is no expression
        elif value.dtype != self._dtype:
            chain.append((torch.Tensor.to, (self._dtype,)))
        chain += steps
        if shape is not None:
            chain.append((torch.broadcast_to, (shape,)))
        key = (tensor, tuple(chain))
        if key in self._index:
            return self._index[key]
        expression = self._expression(tensor)
        if expression is None:
            return None
        for operator, operands in chain:
            expression = Expression(operator, (expression, *operands))
        final = shape if shape is not None else self._shape_after(value, chain)
        if expression.names():
            return self._add(key, Slot(tensor.name, final, "derived", expression=expression))
        with torch.no_grad():
            constant = expression.evaluate({}).detach().contiguous()
        return self._add(key, Slot(tensor.name, final, "constant", value=constant))

    def read(self, tensor: fx.Node, steps: Sequence[Step] = ()) -> Read | None:
        """A batch-free tensor after ``steps`` as elements of a slot, one stride an axis of the tensor.

        A slice, a permutation or an expansion of a parameter is read from the parameter itself, and so are its rows. None as for ``slot``.
        """
        found = None if steps else self._elements(tensor)
        if found is None or (found.rows is not None and self._kind(found.leaf) != "parameter"):
            slot = self.slot(tensor, None, steps)
            shape = tuple(int(s) for s in tensor.meta["val"].shape)
            return None if slot is None else Read(slot, 0, torch.empty(shape, device="meta").stride())
        if found.rows is None:
            return Read(self._run(found, (found.span,)), 0, found.strides)
        rows = found.rows
        if isinstance(rows.numbers, Tensor):
            numbers: int | None = self.constant((tensor, "rows"), f"{tensor.name}_rows", rows.numbers.to(self._dtype))
        else:
            size = found.size // rows.cols
            numbers = self.slot(rows.numbers, None, [(_row_numbers, (size, rows.count_back_from is not None, self._name(found.leaf)))])
        table = self._plain(found.leaf, found.first, (found.size,))
        return None if numbers is None else Read(table, found.offset, found.strides, numbers, rows.cols, rows.padding)

    def literal(self, tensor: fx.Node) -> Tensor | None:
        """The value of a tensor that reads neither parameters nor buffers, so that it is part of the graph; None for any other."""
        expression = self._expression(tensor)
        if expression is None or expression.names():
            return None
        with torch.no_grad():
            value: Tensor = expression.evaluate({})
            return value

    def constant(self, key: Hashable, name: str, value: Tensor) -> int:
        """The slot of a tensor that a lowering computes, one for equal keys."""
        return self._add(key, Slot(name, tuple(value.shape), "constant", value.contiguous()))

    def is_plain(self, constant: fx.Node) -> bool:
        """Whether a tensor is a parameter, a buffer or a lifted tensor, up to a reshape."""
        found = self._elements(constant, rows=False)
        return found is not None and found.is_run

    @staticmethod
    def _shape_after(value: Tensor, steps: Sequence[Step]) -> tuple[int, ...]:
        sample: Tensor = torch.empty(tuple(int(s) for s in value.shape), dtype=value.dtype, device="meta")
        for operator, operands in steps:
            sample = operator(sample, *operands)
        return tuple(sample.shape)

    def _elements(self, tensor: fx.Node, rows: bool = True) -> Elements | None:
        """The elements of a parameter, a buffer or a whole lifted tensor that ``tensor`` consists of; views alone unless ``rows`` serve."""
        if tensor.meta["val"].dtype != self._dtype:
            return None
        if (tensor, rows) not in self._found:
            found = elements_of(tensor, lambda node: self._kind(node) is not None, self.literal if rows else None)
            if found is not None and not self._is_readable(found):
                found = None
            self._found[tensor, rows] = found
        return self._found[tensor, rows]

    def _is_readable(self, found: Elements) -> bool:
        whole = found.rows is None and found.span == math.prod(found.leaf.meta["val"].shape)
        if found.leaf.meta["val"].dtype != self._dtype or math.prod(found.shape) == 0:
            return False
        if self._kind(found.leaf) == "constant" and not whole:
            return False  # what is made of literals alone is one
        if found.rows is None:
            return True
        numbers = found.rows.numbers
        exact = found.size // found.rows.cols <= _EXACT.get(self._dtype, 2**53)
        return exact and (isinstance(numbers, Tensor) or not self._depends[numbers])

    def _kind(self, node: fx.Node) -> SlotKind | None:
        return _KINDS.get(self._specs[node.name].kind) if node.op == "placeholder" else None

    def _name(self, leaf: fx.Node) -> str:
        target = str(self._specs[leaf.name].target)
        return self._names.get(target, target)

    def _run(self, found: Elements, shape: tuple[int, ...]) -> int:
        """The slot of elements from the first to the last, in that order ``shape``d."""
        return self._plain(found.leaf, found.offset, shape)

    def _plain(self, leaf: fx.Node, begin: int, shape: tuple[int, ...]) -> int:
        """The slot of so many elements of a parameter, buffer or lifted tensor; of all of them in its own shape."""
        kind, name = self._kind(leaf), self._name(leaf)
        assert kind is not None
        own = tuple(leaf.meta["val"].shape)
        if math.prod(shape) != math.prod(own):
            return self._add((kind, name, begin, shape), Slot(name, shape, kind, begin=begin))
        value = self._lifted(name) if kind == "constant" else None
        return self._add((kind, name), Slot(name, own, kind, value))

    def _lifted(self, name: str) -> Tensor:
        """A copy: the user may go on to change a tensor that the graph was traced with."""
        return self._program.constants[name].detach().clone(memory_format=torch.contiguous_format)

    def _add(self, key: Any, slot: Slot) -> int:
        if key not in self._index:
            self._index[key] = len(self.slots)
            self.slots.append(slot)
        return self._index[key]

    def _expression(self, node: fx.Node) -> Expression | None:
        """A tensor as an expression of parameters, buffers and lifted tensors; None (and a problem) where it is
        random.
        """
        if (kind := self._kind(node)) is not None:
            name = self._name(node)
            return Expression(None, (self._lifted(name) if kind == "constant" else name,))
        if node.op != "call_function" or not callable(node.target) or draws_random_numbers(node):
            self._refuse(node, "changes from call to call; draw random numbers once and keep them in a buffer", None)
            return None
        operands: dict[fx.Node, Any] = {n: self._expression(n) for n in node.all_input_nodes}
        if None in operands.values():
            return None
        args: Any = fx.map_arg(node.args, operands.__getitem__)
        kwargs: Any = fx.map_arg(node.kwargs, operands.__getitem__)
        return Expression(node.target, tuple(args), dict(kwargs))


def _row_numbers(numbers: Tensor, size: int, back: bool, table: str) -> Tensor:
    """Numbers of ``size`` rows of a table; with ``back``, negative ones as those that they stand for."""
    low = -size if back else 0
    outside = (numbers < low) | (numbers >= size)
    if not numbers.is_meta and bool(outside.any()):
        found = int(numbers[outside][0])
        raise IndexError(f"{table}: expected row numbers of the table in [{low}, {size}), got {found}; correct the buffer that picks them.")
    return torch.where(numbers < 0, numbers + size, numbers)


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)


# Operators that may draw random numbers -> the argument that decides.
_SWITCHES = {
    "aten.scaled_dot_product_attention.default": "dropout_p",
    "aten.lstm.input": "train",
    "aten.gru.input": "train",
    "aten.rnn_tanh.input": "train",
    "aten.rnn_relu.input": "train",
    "aten.rrelu.default": "training",
    "aten.dropout.default": "train",
    "aten.feature_dropout.default": "train",
    "aten.alpha_dropout.default": "train",
    "aten.feature_alpha_dropout.default": "train",
}


def draws_random_numbers(node: fx.Node) -> bool:
    """Whether an operator reads the random state."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    switch = _SWITCHES.get(str(node.target))
    if switch is None:
        return True
    schema: Any = node.target._schema  # type: ignore[union-attr]
    position = next(i for i, a in enumerate(schema.arguments) if a.name == switch)
    default = schema.arguments[position].default_value
    return bool(node.args[position] if position < len(node.args) else node.kwargs.get(switch, default))
