"""A captured graph as a table for people."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from typing import Any

from influence_ext.capture.generic import NodeOperator
from influence_ext.capture.graph import CapturedGraph, Node
from influence_ext.capture.layout import Layout
from influence_ext.capture.lowering import ACTIVATION_KINDS, PART_LOWERINGS

_MOST_INPUTS = 4  # that a node's note names
_STEP = re.compile(r"(.+)_(\d+)_([a-z_]+)")  # layer, step and part, as lowering/recurrent.py names them
_HEADER = ("node", "operator", "rule", "output", "reads", "note")


def format_table(graph: CapturedGraph, notes: Mapping[str, str] | None = None) -> str:
    """One line a node: name, ATen operator, rule, output shape, parameters and constants it reads, note.

    Args:
        graph: from ``capture``.
        notes: node name -> a remark that takes the place of the rule's attributes in the last column.

    Returns:
        Text without a newline at the end: three lines of heading, a line a node (of an unrolled layer's steps that are alike, one line for
        all but the first), then what runs in torch and why.
    """
    names = graph.prologue.names + tuple(node.name for node in graph.nodes)
    given = notes or {}
    rows: list[tuple[str, ...]] = [_HEADER]
    for item in _folded(graph, given):
        if isinstance(item, str):
            rows.append((item,))
            continue
        note = given.get(item.name) or _attributes(graph, item, names)
        rows.append((item.name, item.target, item.rule, _layout_text(item.layout), _slots_text(graph, item), note))
    widths = [max(len(row[column]) for row in rows if len(row) > 1) for column in range(len(_HEADER))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip() for row in rows]
    inputs = ", ".join(f"{n} {_shape_text(s)}" for n, s in zip(graph.input_names, graph.input_shapes, strict=True))
    title = f"{graph.model_name}: {inputs} -> {names[graph.output]} {_shape_text(graph.output_shape)}, {graph.dtype}"
    lines = [title, lines[0], "  ".join("-" * width for width in widths), *lines[1:]]
    if graph.fallback is not None:
        lines.append(f"generic: the whole model, in torch, since {graph.fallback}")
    elif generic := [node for node in graph.nodes if node.rule == "generic"]:
        names_of = ", ".join(dict.fromkeys(node.target for node in generic))
        lines.append(
            f"generic: {len(generic)} nodes, {graph.generic_share:.1%} of the arithmetic, in torch for want of a native rule: {names_of}"
        )
    lines += _hidden_texts(graph)
    if computed := [name for name in graph.prologue.names if name not in graph.input_names]:
        lines.append(f"computed once in torch, since no parameter enters: {', '.join(computed)}")
    return "\n".join(lines)


def _folded(graph: CapturedGraph, notes: Mapping[str, str]) -> list[Node | str]:
    """The nodes; of three or more steps of an unrolled layer that are alike, the first one's and a line for the others."""

    def alike(step: list[Node]) -> list[tuple[Any, ...]]:
        parts = [(node, match[3]) for node in step if (match := _STEP.fullmatch(node.name))]
        return [(part, n.target, n.rule, n.layout, n.slots, n.floats, notes.get(n.name)) for n, part in parts]

    steps = [(key, list(nodes)) for key, nodes in itertools.groupby(graph.nodes, _step_of)]
    lines: list[Node | str] = []
    runs = itertools.groupby(steps, lambda step: (step[0][0], alike(step[1])) if step[0] is not None else None)
    for key, run in runs:
        (first, nodes), *others = run
        if key is None or first is None or len(others) < 2:
            lines += itertools.chain(nodes, *(more for _, more in others))
            continue
        names = [f"{step[0]}_{step[1]}" for step in (first, others[0][0], others[-1][0]) if step is not None]
        lines += [*nodes, f"{names[1]} ... {names[2]}: as {names[0]}"]
    return lines


def _step_of(node: Node) -> tuple[str, str] | None:
    """Layer and number of the step of a recurrent layer that a node belongs to; None for other nodes."""
    match = _STEP.fullmatch(node.name) if node.target in PART_LOWERINGS else None
    return None if match is None else (match[1], match[2])


def _hidden_texts(graph: CapturedGraph) -> list[str]:
    """What runs inside generic nodes since it is no value of the plan: one line for nodes that are alike."""
    found: dict[tuple[str, str], list[str]] = {}
    for node in graph.nodes:
        steps = node.operator.steps if isinstance(node.operator, NodeOperator) else ()
        for reason in dict.fromkeys(step.hidden for step in steps if step.hidden):
            operators = ", ".join(dict.fromkeys(str(step.target) for step in steps if step.hidden == reason))
            found.setdefault((operators, reason), []).append(node.name)
    return [f"{', '.join(names)}: in torch together with {operators}, as {reason}" for (operators, reason), names in found.items()]


def _layout_text(layout: Layout) -> str:
    sizes = [str(size) for size in layout.shape]
    sizes[layout.axis] = "·".join([*([str(layout.pre)] * (layout.pre > 1)), "N", *([str(layout.post)] * (layout.post > 1))])
    return f"[{', '.join(sizes)}]"


def _shape_text(shape: tuple[int, ...]) -> str:
    return f"[{', '.join(map(str, ('N', *shape)))}]"


def _slots_text(graph: CapturedGraph, node: Node) -> str:
    return ", ".join(graph.slots[index].label for index in node.slots if index >= 0)


def _attributes(graph: CapturedGraph, node: Node, names: tuple[str, ...]) -> str:
    """The attributes that tell a node from others of its rule."""
    a, b = node.floats.get("a", 0.0), node.floats.get("b", 0.0)
    if node.rule == "linear":
        positions = node.width // node.ints["out_features"]
        parts = [f"{node.ints['in_features']} -> {node.ints['out_features']}"]
        return ", ".join(parts + [f"{positions} positions"] * (positions != 1) + ["stored [in, out]"] * node.ints["transposed"])
    if node.rule == "activation":
        kind = next(name for name, number in ACTIVATION_KINDS.items() if number == node.ints["kind"])
        return {
            "elu": f"alpha {a:g}, scale {b:g}",
            "softplus": f"beta {a:g}, threshold {b:g}",
            "leaky_relu": f"slope {a:g}",
        }.get(kind, kind)
    if node.rule == "add":
        return f"{a:g} {names[node.inputs[0]]} + {b:g} {names[node.inputs[1]]}"
    if node.rule == "affine":
        return f"a {a:g}, b {b:g}"
    more = f" and {len(node.inputs) - _MOST_INPUTS} more" if len(node.inputs) > _MOST_INPUTS else ""
    return f"of {', '.join(names[i] for i in node.inputs[:_MOST_INPUTS])}{more}" if node.inputs else ""
