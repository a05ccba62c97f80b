"""Batch-free tensors of an exported graph -> slots that rules read."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from influence_ext.capture.graph import Expression, Slot, SlotKind

# Operators that keep a tensor's elements in order: a parameter seen through them is the same memory.
ORDER_KEEPING = frozenset(
    f"aten.{name}.default" for name in ("_reshape_alias", "_unsafe_view", "alias", "clone", "squeeze", "unsqueeze", "view", "reshape")
) | {"aten.squeeze.dim", "aten.squeeze.dims"}
# Operators whose output is the input's memory under other strides.
STRIDED = ORDER_KEEPING - {"aten.clone.default"} | frozenset(
    f"aten.{name}"
    for name in ("permute.default", "transpose.int", "t.default", "expand.default", "slice.Tensor", "select.int", "narrow.default")
)
SWAPS = frozenset(("aten.transpose.int", "aten.swapaxes.default", "aten.swapdims.default"))
_KINDS: dict[InputKind, SlotKind] = {
    InputKind.PARAMETER: "parameter",
    InputKind.BUFFER: "buffer",
    InputKind.CONSTANT_TENSOR: "constant",
}
Refuse = Callable[[fx.Node, str, frozenset[str] | None], None]
Step = tuple[Callable[..., Tensor], tuple[Any, ...]]


class SlotTable:
    """The slots of one graph, each tensor once.

    A parameter, buffer or lifted tensor that a rule can read as it lies in memory (also through a reshape, and for
    weights through a transpose) becomes a plain slot; anything else that does not depend on the inputs becomes a
    derived one: an expression, evaluated by torch and differentiated by it where it depends on trained parameters.
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
        self._specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}

    def matrix(self, weight: fx.Node) -> tuple[int, bool] | None:
        """The slot of a weight, and whether the slot holds its transpose; None (and a problem) where it is random."""
        leaf, flipped = self._leaf(weight)
        if leaf is not None:
            return self._plain(leaf), flipped
        slot = self.slot(weight)
        return None if slot is None else (slot, False)

    def slot(self, tensor: fx.Node, shape: tuple[int, ...] | None = None, steps: Sequence[Step] = ()) -> int | None:
        """The slot of a batch-free tensor after ``steps``, broadcast to ``shape`` if given.

        A slot's elements are those of the tensor in row-major order; a parameter seen through a reshape shares the parameter's slot.
        None (and a problem) where the tensor is random.
        """
        value = tensor.meta["val"]
        leaf, flipped = self._leaf(tensor)
        same_shape = shape is None or _without_ones(shape) == _without_ones(tuple(value.shape))
        if leaf is not None and not flipped and not steps and same_shape and value.dtype == self._dtype:
            return self._plain(leaf)
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

    def strided(self, tensor: fx.Node, steps: Sequence[Step] = ()) -> tuple[int, int, tuple[int, ...]] | None:
        """A batch-free tensor after ``steps`` as elements of a slot: ``(slot, offset, strides)``, one stride an axis of the tensor.

        A slice, a permutation or an expansion of a parameter is read from the parameter itself. None as for ``slot``.
        """
        chain: list[fx.Node] = []
        node = tensor
        while node.op == "call_function" and str(node.target) in STRIDED and node.all_input_nodes == [node.args[0]]:
            chain.append(node)
            node = node.args[0]  # type: ignore[assignment]
        if not steps and self._kind(node) is not None and tensor.meta["val"].dtype == self._dtype:
            root = view = torch.empty(tuple(int(s) for s in node.meta["val"].shape), device="meta")
            for link in reversed(chain):
                view = link.target(view, *link.args[1:], **link.kwargs)  # type: ignore[operator]
            if view is root or view._base is root:
                return self._plain(node), int(view.storage_offset()), view.stride()
        slot = self.slot(tensor, None, steps)
        shape = tuple(int(s) for s in tensor.meta["val"].shape)
        return None if slot is None else (slot, 0, torch.empty(shape, device="meta").stride())

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
        leaf, flipped = self._leaf(constant)
        return leaf is not None and not flipped

    @staticmethod
    def _shape_after(value: Tensor, steps: Sequence[Step]) -> tuple[int, ...]:
        sample: Tensor = torch.empty(tuple(int(s) for s in value.shape), dtype=value.dtype, device="meta")
        for operator, operands in steps:
            sample = operator(sample, *operands)
        return tuple(sample.shape)

    def _leaf(self, constant: fx.Node) -> tuple[fx.Node | None, bool]:
        """The placeholder whose memory ``constant`` is, and whether it is that matrix transposed; ``(None, False)`` if
        it is neither.
        """
        flipped = reshaped = False
        node = constant
        while node.op == "call_function":
            source = node.args[0] if node.args else None
            if not isinstance(source, fx.Node):
                return None, False
            if str(node.target) in ORDER_KEEPING:
                reshaped = reshaped or node.meta["val"].shape != source.meta["val"].shape
                if reshaped and flipped:
                    return None, False
            elif transposes_matrix(node) and not reshaped:
                flipped = not flipped
            else:
                return None, False
            node = source
        return (node, flipped) if self._kind(node) is not None else (None, False)

    def _kind(self, node: fx.Node) -> SlotKind | None:
        return _KINDS.get(self._specs[node.name].kind) if node.op == "placeholder" else None

    def _name(self, leaf: fx.Node) -> str:
        target = str(self._specs[leaf.name].target)
        return self._names.get(target, target)

    def _plain(self, leaf: fx.Node) -> int:
        kind, name = self._kind(leaf), self._name(leaf)
        assert kind is not None
        value = self._lifted(name) if kind == "constant" else None
        return self._add((kind, name), Slot(name, tuple(leaf.meta["val"].shape), kind, value))

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


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)


def transposes_matrix(node: fx.Node) -> bool:
    """Whether a node swaps the two axes of a matrix."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.dim() != 2:
        return False
    target = str(node.target)
    if target in ("aten.t.default", "aten.numpy_T.default", "aten.mT.default", "aten.adjoint.default"):
        return True
    args: Any = node.args
    if target in SWAPS:
        return int(args[1] - args[2]) % 2 == 1
    return target == "aten.permute.default" and [axis % 2 for axis in args[1]] == [1, 0]


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
