"""Which nodes of an exported graph depend on which."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind


def parameter_dependence(program: ExportedProgram, names: dict[str, str]) -> dict[fx.Node, frozenset[str]]:
    """For each node the parameters its value depends on."""
    kinds = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
    depends: dict[fx.Node, frozenset[str]] = {}
    for node in program.graph.nodes:
        own: frozenset[str] = frozenset()
        if node.op == "placeholder" and kinds[node.name].kind == InputKind.PARAMETER:
            target = str(kinds[node.name].target)
            own = frozenset((names.get(target, target),))
        depends[node] = own.union(*(depends[n] for n in node.all_input_nodes))
    return depends


def contributing(outputs: Iterable[fx.Node]) -> set[fx.Node]:
    """All nodes that ``outputs`` are computed from, themselves included."""
    seen: set[fx.Node] = set()
    waiting = list(outputs)
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            waiting.extend(node.all_input_nodes)
    return seen
