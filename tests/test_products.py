"""Products between activations by hand-made plans: strides, masks and layouts that a lowering may or may not reach, against torch.func."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from influence_ext import _C
from influence_ext.plan import Plan
from tests.cases import build
from tests.cases.products import PRODUCTS

F64 = torch.float64


@dataclass
class HandMade:
    """A plan in which value i of ``features`` is an input times a trained matrix (no matrix where None), then one node under test."""

    rule: str
    shapes: Sequence[tuple[int, ...]]  # of one example, per input
    features: Sequence[int | None]
    width: int
    ints: dict[str, int]
    floats: dict[str, float]
    lists: dict[str, list[int]]
    oracle: Callable[..., Tensor]  # (values, slots) -> [N, width]
    slot: tuple[int, ...] | None = None
    slot_is_trained: bool = True
    make_slot: Callable[[Tensor], Tensor] = field(default=lambda t: t)
    make_inputs: Sequence[Callable[[Tensor], Tensor] | None] = ()
    value_inputs: Sequence[int] = ()  # which values the node reads; all by default

    def build(self, dtype: torch.dtype, N: int, schedule: int) -> tuple[Any, Callable[[Tensor], Tensor], Tensor]:
        rng = torch.Generator().manual_seed(0)
        inputs = [torch.randn(N, *shape, generator=rng, dtype=F64) for shape in self.shapes]
        inputs = [make(x) if make else x for x, make in zip(inputs, self.make_inputs or [None] * len(inputs), strict=True)]
        nodes: list[dict[str, Any]] = []
        slots: list[tuple[int, int]] = []
        theta: list[Tensor] = []
        offset = 0
        values = []
        for i, size in enumerate(self.features):
            if size is None:
                values.append(i)
                continue
            ints = {"in_features": size, "out_features": size, "transposed": 0}
            width = math.prod(self.shapes[i])
            values.append(len(inputs) + len(nodes))
            nodes.append(node("linear", [i], values[-1], [len(slots), -1], width, ints))
            slots.append((size * size, offset))
            theta.append(torch.randn(size, size, generator=rng, dtype=F64) / size**0.5)
            offset += size * size
        own = []
        if self.slot is not None:
            own = [len(slots)]
            theta.append(self.make_slot(torch.randn(self.slot, generator=rng, dtype=F64)))
            slots.append((theta[-1].numel(), offset if self.slot_is_trained else -1))
            offset += theta[-1].numel() if self.slot_is_trained else 0
        reads = [values[i] for i in (self.value_inputs or range(len(values)))]
        output = len(inputs) + len(nodes)
        nodes.append(node(self.rule, reads, output, own, self.width, self.ints, self.floats, self.lists))
        kind, tape_kind = (_C.Plan64, _C.Tape64) if dtype == F64 else (_C.Plan32, _C.Tape32)
        plan = kind(
            nodes=nodes,
            slots=slots,
            input_widths=[math.prod(s) for s in self.shapes],
            aliases=[-1] * (output + 1),
            output=output,
            num_parameters=offset,
        )
        tape = tape_kind(plan, [x.to(dtype).contiguous() for x in inputs])
        tape.set_schedule(schedule)
        tape.linearize([t.to(dtype) for t in theta])

        def network(flat: Tensor) -> Tensor:
            parts = iter(flat.split([t.numel() for t, s in zip(theta, slots, strict=True) if s[1] >= 0]))
            full = [next(parts).reshape(t.shape) if s[1] >= 0 else t for t, s in zip(theta, slots, strict=True)]
            matrices = iter(full)
            x = [
                v if size is None else (v.reshape(N, -1, size) @ next(matrices).T).reshape(v.shape)
                for v, size in zip(inputs, self.features, strict=True)
            ]
            x = [x[i] for i in (self.value_inputs or range(len(x)))]
            return self.oracle(*x, *([full[-1]] if own else [])).reshape(N, self.width)

        flat = torch.cat([t.flatten() for t, s in zip(theta, slots, strict=True) if s[1] >= 0])
        return tape, network, flat


def node(
    rule: str,
    inputs: list[int],
    output: int,
    slots: list[int],
    width: int,
    ints: dict[str, int],
    floats: dict[str, float] | None = None,
    lists: dict[str, list[int]] | None = None,
) -> dict[str, Any]:
    """A node as the extension takes it."""
    more: dict[str, Any] = {"ints": ints, "floats": floats or {}, "lists": lists or {}}
    return {"rule": rule, "name": f"{rule}_{output}", "inputs": inputs, "output": output, "slots": slots, "width": width, **more}


def close(found: Tensor, expected: Tensor) -> None:
    """Relative Frobenius error within what the sums of these sizes leave."""
    tolerance = 1e-12 if found.dtype == F64 else 1e-5
    assert float((found.double() - expected).norm()) <= tolerance * (1 + float(expected.norm()))


def strides(*sizes: int) -> list[int]:
    """Row-major."""
    return [math.prod(sizes[i + 1 :]) for i in range(len(sizes))]


def matmul(
    a: tuple[int, ...],
    b: tuple[int, ...],
    batch: list[int],
    sizes: tuple[int, int, int],
    lists: dict[str, list[int]],
    oracle: Callable[..., Tensor],
    *,
    slot: int = -1,
    trained: Sequence[bool] = (True, True),
    value_inputs: Sequence[int] = (),
) -> HandMade:
    """A row for the rule ``matmul``; operand ``slot`` (0 or 1) is a slot."""
    M, K, N = sizes
    shapes = [s for i, s in enumerate((a, b)) if i != slot]
    return HandMade(
        "matmul",
        shapes if not value_inputs else shapes[:1],
        [s[-1] if trained[i] else None for i, s in enumerate(shapes)][: len(set(value_inputs)) or None],
        math.prod(batch) * M * N,
        {"M": M, "K": K, "N": N, "slot_operand": slot},
        {},
        {"batch": batch, **lists},
        oracle,
        slot=(a, b)[slot] if slot >= 0 else None,
        slot_is_trained=slot < 0 or trained[-1],
        value_inputs=value_inputs,
    )


def swapped(oracle: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """Operands in the order of the product where values come before slots."""
    return lambda x, y: oracle(y, x)


MATMUL = {
    "plain": matmul(
        (5, 4), (4, 6), [], (5, 4, 6), {"a": [4, 1], "b": [6, 1], "c": [6, 1]}, torch.matmul
    ),
    "batch": matmul(
        (2, 3, 5, 4), (2, 3, 4, 6), [2, 3], (5, 4, 6),
        {"a": strides(2, 3, 5, 4), "b": strides(2, 3, 4, 6), "c": strides(2, 3, 5, 6)}, torch.matmul,
    ),
    "broadcast": matmul(
        (2, 1, 5, 4), (3, 4, 6), [2, 3], (5, 4, 6),
        {"a": [20, 0, 4, 1], "b": [0, 24, 6, 1], "c": strides(2, 3, 5, 6)}, lambda a, b: torch.matmul(a, b[:, None]),
    ),
    "b-transposed": matmul(
        (3, 17, 9), (3, 40, 9), [3], (17, 9, 40), {"a": strides(3, 17, 9), "b": [360, 1, 9], "c": strides(3, 17, 40)},
        lambda a, b: a @ b.transpose(-2, -1),
    ),
    "a-transposed": matmul(
        (3, 9, 17), (3, 9, 40), [3], (17, 9, 40), {"a": [153, 1, 17], "b": [360, 40, 1], "c": strides(3, 17, 40)},
        lambda a, b: a.transpose(-2, -1) @ b,
    ),
    "heads-inside": matmul(  # einsum("nqhd,nkhd->nhqk")
        (7, 3, 5), (8, 3, 5), [3], (7, 5, 8), {"a": [5, 15, 1], "b": [5, 1, 15], "c": [56, 8, 1]},
        lambda a, b: torch.einsum("nqhd,nkhd->nhqk", a, b),
    ),
    "heads-out": matmul(  # einsum("nhqk,nkhd->nqhd")
        (3, 7, 8), (8, 3, 5), [3], (7, 8, 5), {"a": [56, 8, 1], "b": [5, 15, 1], "c": [5, 15, 1]},
        lambda a, b: torch.einsum("nhqk,nkhd->nqhd", a, b),
    ),
    "c-transposed": matmul(
        (5, 4), (4, 6), [], (5, 4, 6), {"a": [4, 1], "b": [6, 1], "c": [1, 5]}, lambda a, b: (a @ b).transpose(-2, -1)
    ),
    "itself": matmul(
        (5, 4), (5, 4), [], (5, 4, 5), {"a": [4, 1], "b": [1, 4], "c": [5, 1]}, lambda a, b: a @ b.transpose(-2, -1),
        value_inputs=(0, 0),
    ),
    "left-untrained": matmul(
        (5, 4), (4, 6), [], (5, 4, 6), {"a": [4, 1], "b": [6, 1], "c": [6, 1]}, torch.matmul, trained=(False, True)
    ),
    "right-untrained": matmul(
        (5, 4), (4, 6), [], (5, 4, 6), {"a": [4, 1], "b": [6, 1], "c": [6, 1]}, torch.matmul, trained=(True, False)
    ),
    "slot-left": matmul(
        (5, 4), (4, 6), [], (5, 4, 6), {"a": [4, 1], "b": [6, 1], "c": [6, 1]}, swapped(torch.matmul), slot=0
    ),
    "slot-left-heads": matmul(
        (3, 5, 4), (2, 3, 4, 6), [2, 3], (5, 4, 6), {"a": [0, 20, 4, 1], "b": strides(2, 3, 4, 6), "c": strides(2, 3, 5, 6)},
        swapped(torch.matmul), slot=0,
    ),
    "slot-left-constant": matmul(
        (5, 4), (4, 6), [], (5, 4, 6), {"a": [4, 1], "b": [6, 1], "c": [6, 1]}, swapped(torch.matmul), slot=0, trained=(True, False)
    ),
    "slot-left-only": matmul(
        (5, 4), (4, 6), [], (5, 4, 6), {"a": [4, 1], "b": [6, 1], "c": [6, 1]}, swapped(torch.matmul), slot=0, trained=(False, True)
    ),
    "slot-right-heads": matmul(
        (5, 4), (3, 4, 6), [3], (5, 4, 6), {"a": [0, 4, 1], "b": strides(3, 4, 6), "c": strides(3, 5, 6)},
        lambda x, w: x[:, None] @ w, slot=1,
    ),
    "row": matmul((1, 4), (4, 6), [], (1, 4, 6), {"a": [4, 1], "b": [6, 1], "c": [6, 1]}, torch.matmul),
    "column": matmul((5, 4), (4, 1), [], (5, 4, 1), {"a": [4, 1], "b": [1, 1], "c": [1, 1]}, torch.matmul),
    "outer": matmul((5, 1), (1, 6), [], (5, 1, 6), {"a": [1, 1], "b": [6, 1], "c": [6, 1]}, torch.matmul),
}  # fmt: skip


def attention(
    q: tuple[int, int, int],
    S: int,
    *,
    value_features: int | None = None,
    key_heads: int | None = None,
    mask: tuple[int, ...] | None = None,
    mask_kind: int = 0,
    mask_is: str = "input",
    mask_is_trained: bool = False,
    causal: bool = False,
    scale: float | None = None,
    inside: bool = False,
    trained: Sequence[bool] = (True, True, True),
    make_mask: Callable[[Tensor], Tensor] | None = None,
) -> HandMade:
    """A row for the rule ``attention``: q ``[H, L, E]``, or ``[L, H, E]`` if heads are ``inside``; mask ``[H | 1, L | 1, S | 1]``."""
    H, L, E = q
    Hk, Ev = key_heads or H, value_features or E
    sizes = [(H, L, E), (Hk, S, E), (Hk, S, Ev)]
    lists: dict[str, list[int]] = {}
    for name, (heads, rows, width) in zip("qkvy", [*sizes, (H, L, Ev)], strict=True):
        lists[name] = [width, heads * width] if inside else [rows * width, width]
    shapes: list[tuple[int, ...]] = [(s[1], s[0], s[2]) if inside else s for s in sizes]
    features: list[int | None] = [s[2] if t else None for s, t in zip(sizes, trained, strict=True)]
    makes: list[Callable[[Tensor], Tensor] | None] = [None, None, None]
    slot: tuple[int, ...] | None = None
    if mask is not None:
        steps = [s if n > 1 else 0 for s, n in zip(strides(*mask), mask, strict=True)]
        lists["mask"] = [h * steps[0] for h in range(H)] + steps[1:]
        if mask_is == "slot":
            slot = mask
        else:
            shapes.append(mask)
            features.append(mask[-1] if mask_is_trained else None)
            makes.append(make_mask)

    def oracle(q: Tensor, k: Tensor, v: Tensor, m: Tensor | None = None) -> Tensor:
        if inside:
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        k, v = (t.repeat_interleave(H // Hk, dim=1) for t in (k, v))
        s = q @ k.transpose(-2, -1) * (scale or E**-0.5)
        if causal:
            s = s.masked_fill(torch.ones(L, S, dtype=torch.bool).triu(1), -math.inf)
        if m is not None:
            s = s.masked_fill(m == 0, -math.inf) if mask_kind == 2 else s + m
        hidden = (s == -math.inf).all(-1, keepdim=True)
        o = torch.where(hidden, 0.0, F.softmax(torch.where(hidden, 0.0, s), -1)) @ v
        return o.transpose(1, 2) if inside else o

    ints = {"heads": H, "key_heads": Hk, "queries": L, "keys": S, "features": E, "value_features": Ev}
    ints |= {"causal": int(causal), "mask": mask_kind}
    return HandMade(
        "attention",
        shapes,
        features,
        H * L * Ev,
        ints,
        {"scale": scale or E**-0.5},
        lists,
        oracle,
        slot=slot,
        slot_is_trained=mask_is_trained,
        make_slot=make_mask or (lambda t: t),
        make_inputs=makes,
    )


def visible(t: Tensor) -> Tensor:
    """0/1 mask: about half, and one row that sees nothing."""
    m = (t > 0).to(t.dtype)
    m[..., 1, :] = 0
    return m


def hiding(t: Tensor) -> Tensor:
    """Additive mask with some −∞."""
    return t.masked_fill(t > 0.5, -math.inf)


ATTENTION = {
    "one-head": attention((1, 7, 4), 7),
    "heads": attention((3, 7, 4), 9, value_features=5),
    "one-token": attention((3, 1, 4), 1),
    "one-query": attention((2, 1, 4), 33),
    "longer": attention((2, 65, 4), 33),
    "causal": attention((2, 33, 4), 33, causal=True),
    "causal-blocks": attention((1, 131, 4), 131, causal=True, value_features=70),
    "causal-wide": attention((2, 7, 4), 12, causal=True),
    "causal-tall": attention((2, 130, 4), 60, causal=True, value_features=40),
    "scale": attention((2, 7, 4), 7, scale=0.7),
    "grouped": attention((6, 7, 4), 9, key_heads=2),
    "grouped-causal": attention((4, 70, 4), 70, key_heads=2, causal=True),
    "multi-query": attention((3, 7, 4), 9, key_heads=1),
    "inside": attention((3, 7, 4), 9, value_features=5, inside=True),
    "inside-grouped": attention((4, 7, 4), 9, key_heads=2, inside=True),
    "mask-bool": attention((2, 7, 4), 9, mask=(1, 7, 9), mask_kind=2, make_mask=visible),
    "mask-bool-keys": attention((2, 7, 4), 9, mask=(1, 1, 9), mask_kind=2, make_mask=lambda t: (t > -1).to(t.dtype)),
    "mask-bool-slot": attention((2, 7, 4), 9, mask=(1, 7, 9), mask_kind=2, mask_is="slot", make_mask=visible),
    "mask-float": attention((2, 7, 4), 9, mask=(2, 7, 9), mask_kind=1, make_mask=hiding),
    "mask-float-slot": attention((2, 7, 4), 9, mask=(1, 7, 9), mask_kind=1, mask_is="slot", make_mask=hiding),
    "mask-computed-again": attention((2, 65, 2), 70, value_features=3, mask=(1, 1, 70), mask_kind=1, make_mask=hiding),
    "mask-causal": attention((2, 9, 4), 9, mask=(1, 9, 9), mask_kind=2, make_mask=lambda t: (t > -1).to(t.dtype), causal=True),
    "bias-trained": attention((3, 7, 4), 9, mask=(3, 7, 9), mask_kind=1, mask_is="slot", mask_is_trained=True),
    "bias-trained-row": attention((3, 7, 4), 9, mask=(1, 7, 1), mask_kind=1, mask_is="slot", mask_is_trained=True),
    "bias-trained-only": attention((3, 7, 4), 9, mask=(3, 1, 9), mask_kind=1, mask_is="slot", mask_is_trained=True, trained=(False,) * 3),
    "bias-value": attention((3, 7, 4), 9, mask=(3, 7, 9), mask_kind=1, mask_is_trained=True),
    "bias-value-shared": attention((3, 50, 4), 50, mask=(1, 50, 50), mask_kind=1, mask_is_trained=True, causal=True),
    "query-only": attention((2, 7, 4), 9, trained=(True, False, False)),
    "key-only": attention((2, 7, 4), 9, trained=(False, True, False)),
    "value-only": attention((2, 7, 4), 9, trained=(False, False, True)),
    "computed-again": attention((2, 70, 2), 70, value_features=3),
}  # fmt: skip

ALL = {f"matmul-{k}": v for k, v in MATMUL.items()} | {f"attention-{k}": v for k, v in ATTENTION.items()}


@pytest.mark.parametrize("schedule", [1, 2], ids=["by_example", "by_operator"])
@pytest.mark.parametrize("N", [1, 3])
@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize("id", ALL)
def test_products_match_torch(id: str, dtype: torch.dtype, N: int, schedule: int, threads: Callable[[int], None]) -> None:
    case = ALL[id]
    tape, network, theta = case.build(dtype, N, schedule)
    rng = torch.Generator().manual_seed(1)
    close(tape.outputs(), network(theta))
    V = torch.randn(3, len(theta), generator=rng, dtype=F64)
    G = torch.randn(3, N, case.width, generator=rng, dtype=F64)
    tangents = torch.stack([torch.func.jvp(network, (theta,), (v,))[1] for v in V])
    pull = torch.func.vjp(network, theta)[1]
    cotangents = torch.stack([pull(g)[0] for g in G])
    masks = torch.eye(N, dtype=F64)
    each = torch.stack([torch.stack([pull(g * m[:, None])[0] for m in masks]) for g in G])
    for num_threads in (1, 2):
        threads(num_threads)
        close(tape.jvp(V.to(dtype)), tangents)
        close(tape.jvp(V[:1].to(dtype)), tangents[:1])
        close(tape.vjp(G.to(dtype)), cotangents)
    close(tape.factors(G.to(dtype)).materialise(None).reshape(each.shape), each)


@pytest.mark.parametrize("id", ["matmul-scores", "matmul-heads", "matmul-transposed-left", "matmul-mixing-transposed", "einsum-heads"])
def test_transposes_become_strides(id: str) -> None:
    network = build(next(case for case in PRODUCTS if case.id == id), F64)
    graph = Plan.of(network.model, network.X).graph
    assert {node.rule for node in graph.nodes} <= {"linear", "view", "matmul"}
    assert [node.output for node in graph.nodes] == list(range(graph.num_sources, graph.num_values))
    read = {value for node in graph.nodes for value in node.inputs} | {graph.output}
    assert {node.output for node in graph.nodes} <= read
