"""Tensors without a batch axis in an exported graph -> slots that rules read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from influence_ext.capture.graph import Expression, Slot, SlotKind

# Operators that keep a tensor's elements in order: a parameter seen through them is the same memory.
ORDER_KEEPING = frozenset(
    f"aten.{name}.default" for name in ("_reshape_alias", "_unsafe_view", "alias", "clone", "squeeze", "unsqueeze", "view")
) | {"aten.squeeze.dim", "aten.squeeze.dims"}
SWAPS = frozenset(("aten.transpose.int", "aten.swapaxes.default", "aten.swapdims.default"))
_KINDS: dict[InputKind, SlotKind] = {
    InputKind.PARAMETER: "parameter",
    InputKind.BUFFER: "buffer",
    InputKind.CONSTANT_TENSOR: "constant",
}
Refuse = Callable[[fx.Node, str, frozenset[str] | None], None]
Steps = Sequence[tuple[Callable[..., Tensor], tuple[Any, ...]]]


class SlotTable:
    """The slots of one graph, each tensor once.

    A parameter, buffer or lifted tensor that a rule can read as it lies in memory (also through a reshape, and for
    weights through a transpose) becomes a plain slot; anything else that does not depend on the inputs becomes a
    derived one. A derived slot has no derivative, so one that depends on parameters is a problem as long as these are
    trained.
    """

    def __init__(
        self,
        program: ExportedProgram,
        names: dict[str, str],
        depends: dict[fx.Node, frozenset[str]],
        refuse: Refuse,
    ):
        self.slots: list[Slot] = []
        self._program = program
        self._names = names
        self._depends = depends
        self._refuse = refuse
        self._index: dict[Any, int] = {}
        self._specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}

    def matrix(self, node: fx.Node, weight: fx.Node) -> tuple[int, bool] | None:
        """The slot of a weight that ``node`` reads, and whether the slot holds its transpose."""
        leaf, flipped = self._leaf(weight)
        if leaf is not None:
            return self._plain(leaf), flipped
        slot = self._derived(node, weight, (), tuple(weight.meta["val"].shape), "a weight computed from")
        return None if slot is None else (slot, False)

    def bias(self, node: fx.Node, bias: fx.Node, num_features: int) -> int | None:
        """The slot of a bias, broadcast to ``num_features`` elements where it has fewer."""
        leaf, flipped = self._leaf(bias)
        if leaf is not None and not flipped and bias.meta["val"].numel() == num_features:
            return self._plain(leaf)
        steps: Steps = [(torch.reshape, ((-1,),)), (torch.broadcast_to, ((num_features,),))]
        return self._derived(node, bias, steps, (num_features,), "a bias computed from")

    def elementwise(
        self,
        node: fx.Node,
        constant: fx.Node,
        rest: tuple[int, ...],
        shape: tuple[int, ...],
        dtype: torch.dtype,
        *,
        reciprocal: bool = False,
        factor: float = 1.0,
    ) -> int | None:
        """The slot of ``factor * constant`` (or of its reciprocal), broadcast to the shape of one example.

        Args:
            node: the operation that reads it.
            constant: the tensor.
            rest: sizes behind the batch axis of the value it is combined with.
            shape: shape of one example of that value (``rest``, or one more axis in front).
            dtype: dtype the slot has.
            reciprocal: take ``1 / constant``.
            factor: multiply by this.
        """
        own = tuple(constant.meta["val"].shape)
        aligned = own[max(0, len(own) - len(rest)) :]
        steps: list[tuple[Callable[..., Tensor], tuple[Any, ...]]] = []
        if constant.meta["val"].dtype != dtype:
            steps.append((torch.Tensor.to, (dtype,)))
        if reciprocal:
            steps.append((torch.reciprocal, ()))
        if factor != 1.0:
            steps.append((torch.mul, (factor,)))
        if aligned != own:
            steps.append((torch.reshape, (aligned,)))
        if aligned != shape:
            steps.append((torch.broadcast_to, (shape,)))
        return self._derived(node, constant, steps, shape, "an elementwise operation with")

    def is_plain(self, constant: fx.Node) -> bool:
        """Whether a tensor is a parameter, a buffer or a lifted tensor, up to a reshape."""
        leaf, flipped = self._leaf(constant)
        return leaf is not None and not flipped

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

    def _derived(self, node: fx.Node, constant: fx.Node, steps: Steps, shape: tuple[int, ...], what: str) -> int | None:
        """The slot of ``constant`` after ``steps``; plain where there is nothing to compute."""
        parameters = self._depends[constant]
        if parameters:
            self._refuse(
                node,
                f"{what} {', '.join(sorted(parameters))} has no rule while that is trained; freeze it with requires_grad_(False) or leave "
                "it out with params=",
                parameters,
            )
        leaf, flipped = self._leaf(constant)
        if not steps and leaf is not None and not flipped and tuple(leaf.meta["val"].shape) == shape:
            return self._plain(leaf)
        key = (constant, tuple(steps), shape)
        if key in self._index:
            return self._index[key]
        expression = self._expression(constant)
        if expression is None:
            return None
        for operator, operands in steps:
            expression = Expression(operator, (expression, *operands))
        if expression.names():
            return self._add(key, Slot(constant.name, shape, "derived", expression=expression))
        with torch.no_grad():
            value = expression.evaluate({}).detach().contiguous()
        return self._add(key, Slot(constant.name, shape, "constant", value=value))

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


def draws_random_numbers(node: fx.Node) -> bool:
    """Whether an operator reads the random state."""
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
