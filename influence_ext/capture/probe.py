"""Does an example's result depend on the other examples of the batch? Tried out on a small batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from influence_ext.capture.context import Context, operator_name
from influence_ext.capture.generic import NodeOperator
from influence_ext.capture.layout import NO_AXIS
from influence_ext.capture.prologue import subgraph

# Each of them is compared: a flip leaves the middle one in place, a running sum the first, a shared maximum the one that has it.
NUM_PROBES = 3


def probe_batch(inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Three examples from the data; where it has fewer, variations of the first."""
    batch = []
    for x in inputs:
        rows = [x[k] for k in range(min(NUM_PROBES, x.shape[0]))]
        while len(rows) < NUM_PROBES:
            rows.append(0.5 * rows[0] + 0.1 if x.is_floating_point() else rows[0].flip(0) if rows[0].dim() else rows[0])
        batch.append(torch.stack(rows).detach())
    return tuple(batch)


def mixing_node(context: Context, inputs: Sequence[Tensor], tensors: Mapping[str, Tensor]) -> str | None:
    """The first node, among those that torch computes, where one example's result changes with the others; in words.

    Native rules see one example at a time by construction; what the prologue and the generic rule run may be anything.

    Cost: passes of the exported graph over three examples and over each of them; none if every node is native.
    """
    program = context.exported.program
    generic = {node.name: node.operator for node in context.nodes if node.rule == "generic"}
    read = {value for node in context.nodes for value in node.inputs}
    # A source that no node reads (the counter in x[arange(N), i]) may be anything.
    sources = {n for n in context.sources if n not in context.inputs and (context.values[n].id in read or n in context.outputs)}
    checked = [n for n in program.graph.nodes if n in context.values and (n in sources or n.name in generic)]
    if not checked:
        return None
    run = subgraph(program, context.exported.names, context.inputs, checked)
    batch = probe_batch(inputs)
    with torch.no_grad():
        together = run(batch, tensors)
        alone = [run(tuple(x[k : k + 1] for x in batch), tensors) for k in range(NUM_PROBES)]
    for node, many, *ones in zip(checked, together, *alone, strict=True):
        layout = context.values[node].layout
        gathered = layout.gather(many)
        if not all(same(gathered[k], layout.gather(one)[0]) for k, one in enumerate(ones)):
            operator = generic.get(node.name)
            # Where it took several steps, most likely the one after which the examples were on no axis.
            steps = operator.steps if isinstance(operator, NodeOperator) else ()
            name, target = next(((s.name, str(s.target)) for s in steps if s.hidden == NO_AXIS), (node.name, operator_name(node)))
            return f"{name}: mixes the examples of a batch; keep the examples on the first axis ({target})"
    return None


def same(first: Tensor, second: Tensor) -> bool:
    """Equal up to the rounding that another batch size may bring."""
    if not first.is_floating_point():
        return bool((first == second).all())
    tolerance = 1e-4 if first.dtype == torch.float32 else 1e-9
    scale = float(torch.nan_to_num(second, posinf=0, neginf=0).abs().max()) if second.numel() else 0.0
    return torch.allclose(first, second, rtol=tolerance, atol=tolerance * scale, equal_nan=True)


def mixes(run: Callable[[tuple[Tensor, ...]], Tensor], inputs: Sequence[Tensor]) -> bool:
    """The same question of a whole model, ``run(inputs) -> [N, ...]``; also true where it returns another number of examples."""
    batch = probe_batch(inputs)
    together = run(batch)
    alone = [run(tuple(x[k : k + 1] for x in batch)) for k in range(NUM_PROBES)]
    if together.shape[0] != NUM_PROBES or any(one.shape != (1, *together.shape[1:]) for one in alone):
        return True
    return not all(same(together[k], one[0]) for k, one in enumerate(alone))
