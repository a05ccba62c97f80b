"""Products between activations, or with a batch-free tensor where that is no linear layer: matmul, einsum, attention."""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from influence_ext.capture.context import Context, Value
from influence_ext.capture.layout import Layout
from influence_ext.capture.lowering.linear import LOWERINGS as LINEAR
from influence_ext.capture.lowering.strided import Strided, own_memory, strided_slot, strided_value
from influence_ext.capture.lowering.table import Lowering, argument, named

MAX_BATCH_AXES = 8  # kernels/batched_matmul.h

Labels = Sequence[Hashable | None]  # one an axis; None for an axis of one entry that is broadcast


@dataclass(frozen=True)
class _Axis:
    """A loop of a contraction: its length, and its stride in A, B and C (0 where it does not occur)."""

    size: int
    a: int
    b: int
    c: int

    @property
    def role(self) -> tuple[bool, bool, bool]:
        return self.a != 0, self.b != 0, self.c != 0


_LEFT, _SUMMED, _RIGHT = (True, False, True), (True, True, False), (False, True, True)
_UNIT = _Axis(1, 0, 0, 0)


def _matmul(context: Context, node: fx.Node) -> Value | None:
    """``matmul(a, b)`` and its relatives, batch axes broadcast."""
    left, right = node.args[:2]
    return _product(context, node, left, right)


def _product(context: Context, node: fx.Node, left: Any, right: Any, layout: Layout | None = None, suffix: str = "") -> Value | None:
    ranks = [x.meta["val"].dim() for x in (left, right)]
    if min(ranks) == 0:
        return None
    batch = max(0, *(rank - 2 for rank in ranks))
    labels = [list[Hashable | None](range(batch - rank + 2, batch)) for rank in ranks]
    for own, x in zip(labels, (left, right), strict=True):
        for axis in range(len(own)):
            if _is_one(x.meta["val"].shape[axis]):
                own[axis] = None
    out: list[Hashable | None] = []
    for axis in range(batch):
        out.append(axis if axis in labels[0] or axis in labels[1] else None)
    labels[0] += ["m", "k"][2 - min(2, ranks[0]) :]
    labels[1] += ["k", "n"][: min(2, ranks[1])]
    out += ["m"] * (ranks[0] > 1) + ["n"] * (ranks[1] > 1)
    return contraction(context, node, (left, right), labels, out, layout, suffix)


def _einsum(context: Context, node: fx.Node) -> Value | None:
    """``einsum(equation, [a, b])``."""
    equation, operands = node.args[:2]
    if not isinstance(equation, str) or not isinstance(operands, (list, tuple)) or len(operands) != 2:
        return None
    equation = equation.replace(" ", "")
    if "." in equation:
        return None
    inputs, arrow, output = equation.partition("->")
    terms = inputs.split(",")
    if not arrow:
        letters = "".join(terms)
        output = "".join(sorted(letter for letter in set(letters) if letters.count(letter) == 1))
    labels: list[list[Hashable | None]] = []
    for term, x in zip(terms, operands, strict=True):
        sizes = x.meta["val"].shape
        if len(term) != len(sizes):
            return None
        # An axis of one entry meets a longer one under the same letter.
        labels.append([None if _is_one(size) and letter in output else letter for letter, size in zip(term, sizes, strict=True)])
    out = [letter if any(letter in own for own in labels) else None for letter in output]
    return contraction(context, node, tuple(operands), labels, out)


def _baddbmm(context: Context, node: fx.Node) -> Value | None:
    """``baddbmm(c, a, b, beta, alpha) = beta c + alpha a b``."""
    added, left, right = node.args[:3]
    beta, alpha = (context.number(node, argument(node, 9, name, 1)) for name in ("beta", "alpha"))
    layout = context.layout(node)
    if beta is None or alpha is None or layout is None or not isinstance(added, fx.Node):
        return None
    product = _product(context, node, left, right, suffix="_product")
    if product is None:
        return None
    if context.is_batched(added):
        if context.value(added).layout != layout:
            return None
        return context.emit(node, "add", [context.value(added), product], floats={"a": beta, "b": alpha})
    size = tuple(added.meta["val"].shape)
    aligned = (1,) * (len(layout.shape) - len(size)) + size
    if context.depends[added] or aligned[layout.axis] != 1:
        return None
    shift = context.table.slot(added, layout.shape, [] if beta == 1.0 else [(_scaled, (beta,))])
    return None if shift is None else context.emit(node, "affine", [product], (-1, shift), floats={"a": alpha, "b": 0.0})


def _scaled(tensor: Any, factor: float) -> Any:
    return tensor * factor


def contraction(
    context: Context,
    node: fx.Node,
    operands: tuple[Any, Any],
    labels: Sequence[Labels],
    out: Labels,
    layout: Layout | None = None,
    suffix: str = "",
) -> Value | None:
    """``C[out] = Σ A[labels 0] B[labels 1]`` as the rule ``matmul``; None where it is none, or mixes examples."""
    layout = layout or context.layout(node)
    if layout is None or len(out) != len(layout.shape) or any(len({*own} - {None}) + [*own].count(None) < len(own) for own in labels):
        return None
    found = [_operand(context, x) for x in operands]
    if None in found:
        return None
    views: list[Strided] = [x for x in found if x is not None]
    if not _keeps_examples_apart(views, labels, out, layout):
        return None
    for first, second in itertools.product(*(_memories(context, x, view) for x, view in zip(operands, views, strict=True))):
        attributes = _as_matmul(first, second, labels, out, layout)
        if attributes is not None:
            break
    else:
        return None
    ints, lists = attributes
    values = [view.value for view in (first, second) if view.value is not None]
    slots = [view.slot for view in (first, second) if view.value is None]
    ints["slot_operand"] = 0 if first.value is None else 1 if second.value is None else -1
    return context.emit(node, "matmul", values, slots, ints, lists=lists, suffix=suffix, layout=layout)


def _operand(context: Context, x: Any) -> Strided | None:
    if context.is_batched(x):
        return strided_value(context, x)
    return strided_slot(context, x) if context.is_batch_free(x) else None


def _memories(context: Context, x: Any, view: Strided) -> Iterator[Strided]:
    """Where an operand may be read: through its views, else from its own memory."""
    yield view
    if view.value is not None and view.value.id != context.value(x).id:
        yield own_memory(view, context.value(x))


def _keeps_examples_apart(operands: Sequence[Strided], labels: Sequence[Labels], out: Labels, layout: Layout) -> bool:
    """Whether the batch axis of every batched operand is the output's batch axis."""
    return all(
        x.layout is None
        or (
            labels[i][x.layout.axis] is not None
            and labels[i][x.layout.axis] == out[layout.axis]
            and (x.layout.pre, x.layout.post) == (layout.pre, layout.post)
        )
        for i, x in enumerate(operands)
    )


def _as_matmul(
    first: Strided, second: Strided, labels: Sequence[Labels], out: Labels, layout: Layout
) -> tuple[dict[str, int], dict[str, list[int]]] | None:
    """Attributes of the rule ``matmul``: which axes are M, K and N, and the strides of the others."""
    strides = [dict(zip(own, x.strides, strict=True)) for own, x in zip(labels, (first, second), strict=True)]
    sizes: dict[Hashable, int] = {}
    for own, x in zip(labels, (first, second), strict=True):
        for label, size in zip(own, x.shape, strict=True):
            if label is not None and sizes.setdefault(label, size) != size:
                return None
    position = 1
    c: dict[Hashable, int] = {}
    for label, size in zip(reversed(out), reversed(layout.shape), strict=True):
        if label is not None:
            c[label] = position
        position *= size
    axes = [_Axis(size, strides[0].get(label, 0), strides[1].get(label, 0), c.get(label, 0)) for label, size in sizes.items() if size > 1]
    if any(sum(axis.role) < 2 for axis in axes):  # summed within one operand
        return None
    axes = _merged(axes)
    best: tuple[int, tuple[_Axis, _Axis, _Axis]] | None = None
    for m, k, n in itertools.product(*([*(x for x in axes if x.role == role), _UNIT] for role in (_LEFT, _SUMMED, _RIGHT))):
        fits = _unit(m, k, m.a, k.a) and _unit(k, n, k.b, n.b) and _unit(m, n, m.c, n.c)
        if fits and (best is None or m.size * k.size * n.size > best[0]):
            best = m.size * k.size * n.size, (m, k, n)
    if best is None:
        return None
    m, k, n = best[1]
    rest = [axis for axis in axes if axis not in (m, k, n)]
    if len(rest) > MAX_BATCH_AXES:
        return None
    lists = {
        "batch": [axis.size for axis in rest],
        "a": [*(axis.a for axis in rest), m.a, k.a],
        "b": [*(axis.b for axis in rest), k.b, n.b],
        "c": [*(axis.c for axis in rest), m.c, n.c],
    }
    return {"M": m.size, "K": k.size, "N": n.size}, lists


def _unit(rows: _Axis, cols: _Axis, row: int, col: int) -> bool:
    return row == 1 or col == 1 or rows.size == 1 or cols.size == 1


def _merged(axes: list[_Axis]) -> list[_Axis]:
    """Axes that lie side by side wherever they occur become one."""
    merged: list[_Axis] = []
    for axis in sorted(axes, key=lambda x: (x.role, x.c, x.a, x.b)):  # inner axes first
        inner = merged[-1] if merged else None
        if inner is not None and inner.role == axis.role and all(getattr(axis, x) == inner.size * getattr(inner, x) for x in "abc"):
            merged[-1] = replace(inner, size=inner.size * axis.size)
        else:
            merged.append(axis)
    return sorted(merged, key=lambda x: (-x.c, -x.a, -x.b))


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def _bilinear(context: Context, node: fx.Node) -> Value | None:
    """``bilinear(x, y, W, b)``, W ``[O, I, J]``: W y as a linear layer of O·I outputs, then Σ_i x_i (W y)_oi as a product."""
    left, right, weight = (argument(node, i, name, None) for i, name in enumerate(("input1", "input2", "weight")))
    bias = argument(node, 3, "bias", None)
    layout = context.layout(node)
    if layout is None or not (context.is_batched(left) and context.is_batched(right) and context.is_batch_free(weight)):
        return None
    x, y = context.value(left), context.value(right)
    O, I, J = (int(size) for size in weight.meta["val"].shape)
    if x.axis == len(x.shape) - 1 or replace(x.layout, shape=layout.shape) != layout or replace(y.layout, shape=layout.shape) != layout:
        return None
    matrix = context.slot(weight)
    shift = -1 if bias is None else context.slot(bias, layout.shape)
    if matrix is None or shift is None:
        return None
    ints = {"in_features": J, "out_features": O * I, "transposed": 0}
    wide = replace(y.layout, shape=(*y.shape[:-1], O * I))
    weighted = context.emit(node, "linear", [y], (matrix, -1), ints, suffix="_weighted", layout=wide)
    if weighted is None:
        return None
    ints = {"M": O, "K": I, "N": 1, "slot_operand": -1}
    lists = {"batch": [math.prod(x.shape[:-1])], "a": [O * I, I, 1], "b": [I, 1, 0], "c": [O, 1, 0]}
    product = context.emit(node, "matmul", [weighted, x], (), ints, lists=lists, suffix="" if bias is None else "_product")
    if bias is None or product is None:
        return product
    return context.emit(node, "affine", [product], (-1, shift), floats={"a": 1.0, "b": 0.0})


def _attention(context: Context, node: fx.Node) -> Value | None:
    """``scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, is_causal, *, scale, enable_gqa)``."""
    mask, dropout, causal = (
        argument(node, i, name, default) for i, name, default in ((3, "attn_mask", None), (4, "dropout_p", 0.0), (5, "is_causal", False))
    )
    layout = context.layout(node)
    given: list[Any] = [argument(node, i, name, None) for i, name in enumerate(("query", "key", "value"))]
    if layout is None or dropout != 0.0 or not isinstance(causal, bool) or not all(context.is_batched(x) for x in given):
        return None
    views = [strided_value(context, x) for x in given]
    shapes = [view.shape for view in views]
    if any(len(shape) != len(shapes[0]) or view.layout is None for shape, view in zip(shapes, views, strict=True)):
        return None
    rank = len(shapes[0])
    places = {(x.layout.axis, x.layout.pre, x.layout.post) for x in views if x.layout is not None}
    if places != {(layout.axis, layout.pre, layout.post)} or layout.axis >= rank - 2:
        return None
    grouped = bool(argument(node, 7, "enable_gqa", False))
    same = rank - 3 if grouped else rank - 2
    if any(shape[:same] != shapes[0][:same] for shape in shapes) or shapes[1][:-2] != shapes[2][:-2]:
        return None
    if grouped and (layout.axis == rank - 3 or rank < 3):
        return None
    scale = argument(node, 6, "scale", None)
    scale = shapes[0][-1] ** -0.5 if scale is None else context.number(node, scale)
    heads, key_heads = math.prod(shapes[0][:-2]), math.prod(shapes[1][:-2])
    if scale is None or heads % key_heads:
        return None
    lists = {"y": [shapes[0][-2] * shapes[2][-1], shapes[2][-1]]}
    values: list[Value] = []
    for name, x, view in zip("qkv", given, views, strict=True):
        read = next((r for r in _memories(context, x, view) if _head_strides(r) is not None), None)
        if read is None or read.value is None:
            return None
        lists[name] = list(_head_strides(read) or ())
        values.append(read.value)
    ints = {
        "heads": heads,
        "key_heads": key_heads,
        "queries": shapes[0][-2],
        "keys": shapes[1][-2],
        "features": shapes[0][-1],
        "value_features": shapes[2][-1],
        "causal": int(causal),
        "mask": 0,
    }
    slots: list[int] = []
    if mask is not None:
        boolean = mask.meta["val"].dtype.is_floating_point is False
        found = _mask(context, mask, (*shapes[0][:-1], shapes[1][-2]), layout)
        if found is None or (boolean and context.depends[mask]):
            return None
        view, lists["mask"] = found
        ints["mask"] = 2 if boolean else 1
        if view.value is None:
            slots.append(view.slot)
        else:
            values.append(view.value)
    return context.emit(node, "attention", values, slots, ints, {"scale": scale}, lists)


def _head_strides(x: Strided) -> tuple[int, int] | None:
    """Strides of head and row, where all leading axes count as heads; None where the rule ``attention`` cannot read it."""
    *lead, rows, features = x.shape
    head_stride, heads = 0, 1
    for size, stride in zip(reversed(lead), reversed(x.strides[:-2]), strict=True):
        if size == 1:
            continue
        if heads == 1:
            head_stride = stride
        elif stride != heads * head_stride:
            return None
        heads *= size
    if features > 1 and x.strides[-1] != 1:
        return None
    for head, row in ((rows * features, features), (features, heads * features)):
        if head_stride in (0, head) and (rows == 1 or x.strides[-2] == row):
            return head, row
    return None


def _mask(context: Context, mask: fx.Node, scores: tuple[int, ...], layout: Layout) -> tuple[Strided, list[int]] | None:
    """A mask that broadcasts to ``scores`` ``[..., L, S]``: where it is read, an offset for each head, the strides of row and column."""
    if context.is_batched(mask):
        value = context.value(mask)
        view = Strided(value.shape, (), value.layout, value)
        extra = len(scores) - len(value.shape)
        if extra < 0 or (value.layout.axis + extra, value.layout.pre, value.layout.post) != (layout.axis, layout.pre, layout.post):
            return None
    else:
        slot = context.slot(mask)
        if slot is None:
            return None
        view = Strided(tuple(int(size) for size in mask.meta["val"].shape), (), None, slot=slot)
        extra = len(scores) - len(view.shape)
        if extra < 0 or (layout.axis >= extra and view.shape[layout.axis - extra] != 1):
            return None
    shape = (1,) * extra + view.shape
    if any(size not in (1, full) for size, full in zip(shape, scores, strict=True)):
        return None
    strides, step = [0] * len(shape), 1
    for axis in reversed(range(len(shape))):
        strides[axis] = step if shape[axis] > 1 else 0
        step *= shape[axis]
    offsets = [
        sum(i * stride for i, stride in zip(index, strides[:-2], strict=True)) for index in itertools.product(*map(range, scores[:-2]))
    ]
    return view, [*offsets, *strides[-2:]]


def _linear_or_product(context: Context, node: fx.Node) -> Value | None:
    """An activation times a weight is a linear layer, anything else a product."""
    value = LINEAR[str(node.target)](context, node)
    return value if value is not None else _matmul(context, node)


LOWERINGS: dict[str, Lowering] = {
    **named(_linear_or_product, "matmul.default mm.default"),
    **named(_matmul, "bmm.default"),
    **named(_baddbmm, "baddbmm.default"),
    **named(_einsum, "einsum.default"),
    **named(_bilinear, "bilinear.default"),
    **named(_attention, "scaled_dot_product_attention.default"),
}
