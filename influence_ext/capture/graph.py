"""What capture hands on: a list of nodes over numbered values, and the tensors (slots) the nodes read."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from influence_ext.capture.generic import Operator, call
from influence_ext.capture.layout import Layout
from influence_ext.capture.prologue import Prologue
from influence_ext.params import HALF_DTYPES, widened

SlotKind = Literal["parameter", "buffer", "constant", "derived"]


@dataclass(frozen=True, eq=False)
class Expression:
    """A tensor computed from parameters and buffers only: ``operator(*args, **kwargs)``, arguments nested.

    Leaves are a name (``operator is None`` and ``args == (name,)``) or a tensor (``operator is None`` and ``args ==
    (tensor,)``).
    """

    operator: Callable[..., Any] | None
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def evaluate(self, tensors: Mapping[str, Tensor]) -> Any:
        """The value under ``tensors`` (name -> tensor)."""
        if self.operator is None:
            (leaf,) = self.args
            return leaf if isinstance(leaf, Tensor) else tensors[leaf]
        args = [_evaluate(a, tensors) for a in self.args]
        return call(self.operator, args, {k: _evaluate(a, tensors) for k, a in self.kwargs.items()})

    def names(self) -> frozenset[str]:
        """Names of the parameters and buffers that are read."""
        if self.operator is None:
            (leaf,) = self.args
            return frozenset() if isinstance(leaf, Tensor) else frozenset((leaf,))
        found: frozenset[str] = frozenset()
        for argument in (*self.args, *self.kwargs.values()):
            for item in argument if isinstance(argument, (list, tuple)) else (argument,):
                if isinstance(item, Expression):
                    found |= item.names()
        return found


def _evaluate(argument: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(argument, Expression):
        return argument.evaluate(tensors)
    if isinstance(argument, (list, tuple)):
        return type(argument)(_evaluate(a, tensors) for a in argument)
    return argument


@dataclass(frozen=True, eq=False)
class Slot:
    """A tensor without a batch axis that nodes read.

    ``kind`` says where its value comes from: ``"parameter"`` and ``"buffer"`` are re-read from the model by ``name`` (all of it, or the run
    of its elements that starts at number ``begin``),
    ``"constant"`` carries ``value``, ``"derived"`` is an ``expression`` of parameters and buffers evaluated anew at
    every read (a mean that is broadcast over a feature map, the reciprocal of a standard deviation). ``shape`` is the
    shape of what ``read`` returns.
    """

    name: str
    shape: tuple[int, ...]
    kind: SlotKind
    value: Tensor | None = None
    expression: Expression | None = None
    begin: int | None = None

    @property
    def label(self) -> str:
        """What a report calls it."""
        if self.begin is not None:
            return f"{self.name}[{self.begin}:{self.begin + math.prod(self.shape)}]"
        return self.name if self.kind == "parameter" else f"{self.name} ({self.kind})"

    def names(self) -> frozenset[str]:
        """Names of the parameters and buffers that the slot's value comes from."""
        if self.expression is not None:
            return self.expression.names()
        return frozenset() if self.kind == "constant" else frozenset((self.name,))

    def read(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The slot's current value, contiguous and detached.

        Args:
            tensors: every parameter and buffer by its name, as ``named_tensors(model)`` gives them.

        Returns:
            A tensor of shape ``self.shape``.
        """
        if self.value is not None:
            return self.value
        with torch.no_grad():
            tensor = tensors[self.name] if self.expression is None else self.expression.evaluate(tensors)
            tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
            if self.begin is not None:
                tensor = tensor.reshape(-1)[self.begin : self.begin + math.prod(self.shape)].reshape(self.shape)
            return tensor.detach().contiguous()


def real_shape(tensor: Tensor) -> tuple[int, ...]:
    """The shape of a slot that holds ``tensor``: complex numbers are pairs of real ones."""
    return (*tensor.shape, 2) if tensor.is_complex() else tuple(tensor.shape)


@dataclass(frozen=True)
class Node:
    """One application of a rule: ``output = rule(inputs, slots)`` for every example on its own.

    ``layout`` is the output's, ``operations`` its arithmetic for one example; ``operator`` computes the nodes of rule ``"generic"``.
    """

    rule: str
    name: str
    target: str
    inputs: tuple[int, ...]
    output: int
    slots: tuple[int, ...]
    ints: dict[str, int]
    floats: dict[str, float]
    lists: dict[str, list[int]]
    width: int
    layout: Layout
    operations: float
    module: str = ""
    operator: Operator | None = None


@dataclass(frozen=True)
class Problem:
    """Why a model cannot be captured. ``parameters`` None: always; else only if one of these parameters is trained."""

    text: str
    parameters: frozenset[str] | None = None

    def applies(self, trainable: Collection[str]) -> bool:
        """Whether the problem stands when ``trainable`` are trained."""
        return self.parameters is None or not self.parameters.isdisjoint(trainable)


@dataclass(frozen=True)
class CapturedGraph:
    """A network as rule applications in order of execution.

    Values are numbered: ``0 .. num_sources - 1`` are what ``prologue`` makes of the inputs (the inputs themselves, where nothing is to be
    computed), each node adds one. Shapes are those of one example; in memory a value is ``[N, *shape]``, row-major. Nothing here holds the
    model or its parameters, so a graph serves every model of the same structure.

    Attributes:
        input_shapes: of one example of each input, in the order of ``Examples.inputs``.
        input_dtypes: floating-point inputs have the parameters' dtype.
        prologue: all that depends on the inputs but on no parameter.
        fallback: why the model runs as a whole in the generic rule; None if it runs node by node.
    """

    model_name: str
    dtype: torch.dtype
    input_names: tuple[str, ...]
    input_shapes: tuple[tuple[int, ...], ...]
    input_dtypes: tuple[torch.dtype, ...]
    prologue: Prologue
    nodes: tuple[Node, ...]
    slots: tuple[Slot, ...]
    output: int
    output_shape: tuple[int, ...]
    conditions: tuple[Problem, ...] = ()
    fallback: str | None = None

    @property
    def num_inputs(self) -> int:
        """Number of input tensors."""
        return len(self.input_shapes)

    @property
    def num_sources(self) -> int:
        """Number of values that the prologue hands to the plan."""
        return len(self.prologue.shapes)

    @property
    def num_values(self) -> int:
        """Number of values, the sources included."""
        return self.num_sources + len(self.nodes)

    @property
    def generic_share(self) -> float:
        """Part of the forward pass's arithmetic that runs in generic rules, between 0 and 1."""
        total = sum(node.operations for node in self.nodes)
        return sum(node.operations for node in self.nodes if node.rule == "generic") / total if total else 0.0

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """Parameters read as they are, in order of first use."""
        return tuple(slot.name for slot in self.slots if slot.kind == "parameter")


def without_unread(nodes: Sequence[Node], output: int, num_sources: int) -> tuple[list[int], tuple[Node, ...], int]:
    """The sources and nodes that ``output`` is computed from, all values numbered anew, and the output's new number.

    Lowerings leave values unread where a rule reads through them: a transpose that became the strides of an operand, the numbers of the
    examples that pick one position of each. One source stays in any case: it tells the number of examples.
    """
    needed = {output}
    for node in reversed(nodes):
        if node.output in needed:
            needed.update(node.inputs)
    sources = [source for source in range(num_sources) if source in needed] or [0]
    number = {source: place for place, source in enumerate(sources)}
    kept: list[Node] = []
    for node in nodes:
        if node.output in needed:
            number[node.output] = len(sources) + len(kept)
            kept.append(replace(node, inputs=tuple(number[i] for i in node.inputs), output=number[node.output]))
    return sources, tuple(kept), number[output]


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer of ``model`` as it is now by name, under each of its names, in the dtype that is computed in.

    Cost: one walk over the modules, a tenth of what ``named_parameters`` and ``named_buffers`` take; it is on the way of every call.
    """
    parameters: dict[str, Tensor] = {}
    buffers: dict[str, Tensor] = {}
    waiting = [("", model)]
    while waiting:
        prefix, module = waiting.pop()
        for found, tensors in ((parameters, module._parameters), (buffers, module._buffers)):
            for name, tensor in tensors.items():
                if tensor is not None:
                    found[prefix + name] = tensor
        waiting += [(f"{prefix}{name}.", child) for name, child in reversed(module._modules.items()) if child is not None]
    half = any(p.dtype in HALF_DTYPES for p in parameters.values())
    parameters.update(buffers)
    return {name: widened(tensor.detach()) for name, tensor in parameters.items()} if half else parameters
