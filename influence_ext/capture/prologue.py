"""What depends on the inputs but on no parameter: computed by torch, once for each data set, before the plan runs.

Masks, position ids, integer arithmetic, normalised images: none of it has a derivative with respect to parameters, so none of it needs a
rule. Its results are the plan's inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from influence_ext.capture.dependence import contributing
from influence_ext.capture.layout import Layout


@dataclass(frozen=True, eq=False)
class Prologue:
    """A function of the inputs and of buffers.

    Attributes:
        names: of the results, for messages.
        shapes: of one example of each result.
        compute: ``(inputs, tensors) -> results``, each with the elements of ``[N, *shape]``.
        reads_model: whether ``compute`` reads any of ``tensors``, the model's parameters and buffers by name.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    compute: Callable[[Sequence[Tensor], Mapping[str, Tensor]], list[Tensor]]
    reads_model: bool

    @classmethod
    def of(
        cls,
        program: ExportedProgram,
        names: Mapping[str, str],
        inputs: Sequence[fx.Node],
        wanted: Sequence[tuple[fx.Node, Layout]],
        labels: Sequence[str],
    ) -> Prologue:
        """The nodes ``wanted`` of an exported program.

        Args:
            program: exported; only its constants are kept.
            names: name of a parameter or buffer in the program -> its name in the model.
            inputs: the program's inputs, in the user's order.
            wanted: nodes and how the examples lie in them.
            labels: their names for people.
        """
        shapes = tuple(layout.shape for _, layout in wanted)
        if all(node in inputs and layout.axis == 0 for node, layout in wanted):
            # Nothing to compute, and an input has its examples on the first axis, one to an entry.
            places = [list(inputs).index(node) for node, _ in wanted]
            return cls(tuple(labels), shapes, lambda tensors, state: [tensors[place] for place in places], False)
        run = subgraph(program, names, inputs, [node for node, _ in wanted])
        layouts = [layout for _, layout in wanted]

        def compute(tensors: Sequence[Tensor], state: Mapping[str, Tensor]) -> list[Tensor]:
            with torch.no_grad():
                return [layout.gather(result) for layout, result in zip(layouts, run(tensors, state), strict=True)]

        return cls(tuple(labels), shapes, compute, True)


def subgraph(
    program: ExportedProgram, names: Mapping[str, str], inputs: Sequence[fx.Node], outputs: Sequence[fx.Node]
) -> Callable[[Sequence[Tensor], Mapping[str, Tensor]], list[Tensor]]:
    """The part of an exported graph that computes ``outputs``, as a function ``(inputs, parameters and buffers by name) -> results``."""
    specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
    needed = contributing(outputs)
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    leaves: list[Callable[[Sequence[Tensor], Mapping[str, Tensor]], Any]] = []
    for node in program.graph.nodes:
        if node not in needed:
            continue
        if node.op != "placeholder":
            copies[node] = graph.node_copy(node, copies.__getitem__)
            copies[node].meta = {}
            continue
        copies[node] = graph.placeholder(node.name)
        if node in inputs:
            leaves.append(_input(list(inputs).index(node)))
        elif specs[node.name].kind == InputKind.CONSTANT_TENSOR:
            leaves.append(_constant(program.constants[str(specs[node.name].target)].detach().clone()))
        else:
            target = str(specs[node.name].target)
            leaves.append(_named(names.get(target, target)))
    graph.output([copies[node] for node in outputs])
    module = fx.GraphModule({}, graph)

    def run(tensors: Sequence[Tensor], state: Mapping[str, Tensor]) -> list[Tensor]:
        return list(module(*(leaf(tensors, state) for leaf in leaves)))

    return run


def _input(index: int) -> Callable[[Sequence[Tensor], Mapping[str, Tensor]], Tensor]:
    return lambda tensors, state: tensors[index]


def _constant(value: Tensor) -> Callable[[Sequence[Tensor], Mapping[str, Tensor]], Tensor]:
    return lambda tensors, state: value


def _named(name: str) -> Callable[[Sequence[Tensor], Mapping[str, Tensor]], Tensor]:
    return lambda tensors, state: state[name]
