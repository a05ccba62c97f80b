"""Operators that move elements.

What a node does to the elements is found by running its operator on their numbers 0, 1, 2, ... of a few examples: the result says where
each element of the output comes from, for any operator that only moves, and shows one that moves elements from example to example.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from influence_ext.capture.constants import Step
from influence_ext.capture.context import Context, Value, is_number, target_of
from influence_ext.capture.elements import strides_of
from influence_ext.capture.layout import VIEWS, Layout
from influence_ext.capture.lowering.table import Lowering, argument, named

# Examples that an operator is tried on, to see whether it keeps them apart.
_TRIED = 3


def _view(context: Context, node: fx.Node) -> Value | None:
    """Operators that keep the elements in order: the output is the input's memory under another shape."""
    source: Any = node.args[0]
    if not context.is_batched(source):
        return None
    value, layout = context.value(source), context.layout(node)
    if source.meta["val"].dtype not in (node.meta["val"].dtype, torch.bool):
        return None  # truth values are kept as 1 and 0: they convert by doing nothing
    if layout is None or layout.before != value.layout.before:
        return None
    return context.emit(node, "view", [value])


def _permute(context: Context, node: fx.Node) -> Value | None:
    """A permutation; where only axes of one entry and the batch axis move, it is a view of the example's memory."""
    args: Any = node.args
    if not context.is_batched(args[0]):
        return None
    value = context.value(args[0])
    axes = permutation(node)
    strides = row_major(value.shape)
    return emit_strided(context, node, value, 0, [strides[axis] for axis in axes])


def permutation(node: fx.Node) -> list[int]:
    """The axes of the input that become the axes of the output, for permute and its relatives."""
    args: Any = node.args
    axes = list(range(args[0].meta["val"].dim()))
    target = target_of(node)
    if target == "aten.permute.default":
        return [axis % len(axes) for axis in args[1]]
    if target in ("aten.t.default", "aten.numpy_T.default"):
        return axes[::-1]
    first, second = args[1:3] if len(args) > 2 else (-2, -1)
    axes[first], axes[second] = axes[second], axes[first]
    return axes


def row_major(shape: Sequence[int]) -> list[int]:
    """Strides of a contiguous tensor."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return strides[::-1]


def emit_strided(
    context: Context, node: fx.Node, value: Value, offset: int, strides: Sequence[int], suffix: str = "", layout: Layout | None = None
) -> Value | None:
    """``y[i] = x[offset + Σ_k i_k strides_k]`` over the shape of the output: a view where that changes nothing."""
    found = layout or context.layout(node)
    if found is None or 0 in found.shape:
        return None
    steps = [(size, stride) for size, stride in zip(found.shape, strides, strict=True) if size != 1]
    contiguous = [stride for _, stride in steps] == row_major([size for size, _ in steps])
    if offset == 0 and contiguous and math.prod(found.shape) == value.width:
        return context.emit(node, "view", [value], suffix=suffix, layout=layout)
    lists = {"shape": found.shape, "strides": strides}
    return context.emit(node, "strided", [value], ints={"offset": offset}, lists=lists, suffix=suffix, layout=layout)


def expanded(context: Context, node: fx.Node, value: Value, layout: Layout, suffix: str) -> Value | None:
    """``value`` repeated to ``layout`` by the rules of broadcasting; None where the examples do not lie on the same axis."""
    if value.layout == layout:
        return value
    extra = len(layout.shape) - len(value.shape)
    same = value.axis + extra == layout.axis and (value.layout.pre, value.layout.post) == (layout.pre, layout.post)
    if extra < 0 or not same:
        return None
    aligned = (1,) * extra + value.shape
    steps = [0] * extra + row_major(value.shape)
    strides = [0 if size == 1 else step for size, step in zip(aligned, steps, strict=True)]
    return emit_strided(context, node, value, 0, strides, suffix, layout)


def _moved(context: Context, node: fx.Node) -> Value | None:
    """Any operator on one batched tensor that moves elements or fills in a number."""
    value = context.value(node.args[0]) if context.is_batched(node.args[0]) else None
    return None if value is None else _emit_moved(context, node, node, None, value)


def _part(context: Context, node: fx.Node) -> Value | None:
    """One tensor of those that an operator returns; ``node`` is the getitem."""
    operation, item = node.args
    assert isinstance(operation, fx.Node)
    source = operation.args[0]
    return _emit_moved(context, node, operation, item, context.value(source)) if context.is_batched(source) else None


def _emit_moved(context: Context, node: fx.Node, operation: fx.Node, item: Any, value: Value) -> Value | None:
    layout = context.layout(node)
    if layout is None or 0 in layout.shape:
        return None
    fill = argument(operation, 2, "value", 0) if target_of(operation) == "aten.constant_pad_nd.default" else None
    if target_of(operation) == "aten.pad.default":
        fill = argument(operation, 3, "value", None) if argument(operation, 2, "mode", "constant") == "constant" else None
    index = _index_map(context, operation, item, value, layout, without=fill)
    if index is None:
        return None
    affine = strides_of(index)
    if affine is not None:
        return emit_strided(context, node, value, *affine)
    return context.emit(node, "gather", [value], floats={"fill": float(fill or 0)}, lists={"index": index.flatten().tolist()})


def _index_map(context: Context, operation: fx.Node, item: Any, value: Value, layout: Layout, without: Any) -> Tensor | None:
    """For each element of an example's output the number of the input's element, −1 where it is filled in; None if examples mix."""
    if not callable(operation.target):
        return None
    substitutes: dict[fx.Node, Any] = {}
    for source in operation.all_input_nodes:
        if is_number(source):
            size = context.size(source)
            substitutes[source] = None if size is None else size(_TRIED)
        elif not context.is_batched(source):
            substitutes[source] = context.table.literal(source)
    if None in substitutes.values():
        return None
    # Numbers from one on, so that what an operator fills in shows as zero.
    numbers = torch.arange(1, _TRIED * value.width + 1, dtype=torch.float64).reshape(_TRIED, *value.shape)
    substitutes[operation.args[0]] = value.layout.scatter(numbers)  # type: ignore[index]
    if any(source not in substitutes for source in operation.all_input_nodes):
        return None
    args: Any = list(fx.map_arg(operation.args, substitutes.__getitem__))
    kwargs: Any = dict(fx.map_arg(operation.kwargs, substitutes.__getitem__))
    if without:
        schema: Any = operation.target._schema  # type: ignore[attr-defined]
        names = [a.name for a in schema.arguments]
        args = [0 if name == "value" else a for name, a in zip(names, args, strict=False)]
        kwargs.pop("value", None)
    result = operation.target(*args, **kwargs)
    moved = layout.gather(result if item is None else result[item]).reshape(_TRIED, *layout.shape)
    index = moved.long() - 1
    own = index - torch.arange(_TRIED).reshape(-1, *[1] * len(layout.shape)) * value.width
    own = torch.where(index < 0, -1, own)
    apart = bool(((own[0] < value.width) & (own == own[0])).all()) and bool(((own >= 0) | (index < 0)).all())
    return own[0] if apart else None


def _expand(context: Context, node: fx.Node) -> Value | None:
    """Axes of one entry repeated; a tensor without examples repeated for each of them is a broadcast."""
    source: Any = node.args[0]
    layout = context.layout(node)
    if layout is None:
        return None
    if not context.is_batched(source):
        return emit_broadcast(context, node, source, layout, "")
    value = context.value(source)
    return context.emit(node, "view", [value]) if value.layout == layout else expanded(context, node, value, layout, "")


def emit_broadcast(context: Context, node: fx.Node, tensor: fx.Node, layout: Layout, suffix: str) -> Value | None:
    """A tensor without examples as a value: the same for each example."""
    first, *others = terms_of(context, tensor)
    operands = slot_operands(context, "shift", first, layout)
    if operands is None:
        return None
    value = context.emit(node, "broadcast", [], **operands, suffix=suffix + "_0" * bool(others), layout=layout)
    return emit_shifts(context, node, value, others, 1.0, suffix, layout)


def terms_of(context: Context, tensor: fx.Node) -> list[fx.Node]:
    """A batch-free tensor as a sum of tensors, so that the sum of two parameters is no expression of them (positions and segments)."""
    terms: Any = tensor.args
    is_sum = tensor.op == "call_function" and target_of(tensor) == "aten.add.Tensor" and not tensor.kwargs and len(terms) == 2
    if not is_sum or not context.depends[tensor] or not all(map(context.is_batch_free, terms)):
        return [tensor]
    if any(term.meta["val"].dtype != context.dtype for term in terms):
        return [tensor]
    return [part for term in terms for part in terms_of(context, term)]


def emit_shifts(
    context: Context,
    node: fx.Node,
    value: Value | None,
    terms: Sequence[fx.Node],
    a: float,
    suffix: str,
    layout: Layout,
    steps: Sequence[Step] = (),
) -> Value | None:
    """``a value`` plus batch-free tensors, each after ``steps``."""
    for number, term in enumerate(terms, start=1):
        operands = slot_operands(context, "shift", term, layout, steps)
        if value is None or operands is None:
            return None
        own = suffix + f"_{number}" * (number < len(terms))
        value = context.emit(node, "affine", [value], **operands, floats={"a": a, "b": 0.0}, suffix=own, layout=layout)
        a = 1.0
    return value


def slot_operands(context: Context, role: str, tensor: fx.Node, layout: Layout, steps: Sequence[Step] = ()) -> dict[str, Any] | None:
    """What ``affine`` and ``broadcast`` read a batch-free tensor by, under broadcasting to ``layout``, as arguments of ``Context.emit``.

    ``role`` is "scale" or "shift". None where the tensor varies along the batch axis, or is random.
    """
    size = tuple(int(s) for s in tensor.meta["val"].shape)
    extra = len(layout.shape) - len(size)
    aligned = (1,) * extra + size
    if extra < 0 or aligned[layout.axis] != 1 or any(a not in (1, s) for a, s in zip(aligned, layout.shape, strict=True)):
        return None
    read = context.table.read(tensor, steps)
    if read is None:
        return None
    strides = [0 if a == 1 else s for a, s in zip(aligned, [0] * extra + list(read.strides), strict=True)]
    ints, slots = {f"{role}_offset": read.offset}, [-1, -1]
    slots[role == "shift"] = read.slot
    if read.rows >= 0:
        slots += [-1, -1]
        slots[2 + (role == "shift")] = read.rows
        ints |= {f"{role}_cols": read.cols, f"{role}_padding": read.padding}
    return {"slots": slots, "ints": ints, "lists": {f"{role}_shape": layout.shape, f"{role}_strides": strides}}


def _cat(context: Context, node: fx.Node) -> Value | None:
    """``cat(tensors, dim)``; tensors without examples are repeated for each of them."""
    tensors: Any = node.args[0]
    return _join(context, node, tensors, argument(node, 1, "dim", 0))


def _stack(context: Context, node: fx.Node) -> Value | None:
    """``stack(tensors, dim)``: cat of tensors with one more axis."""
    tensors: Any = node.args[0]
    return _join(context, node, tensors, argument(node, 1, "dim", 0), stacked=True)


def _join(context: Context, node: fx.Node, tensors: Sequence[fx.Node], dim: int, *, stacked: bool = False) -> Value | None:
    layout = context.layout(node)
    if layout is None:
        return None
    dim %= len(layout.shape)
    if dim == layout.axis:
        return None
    values: list[Value] = []
    for position, tensor in enumerate(tensors):
        if tensor.meta["val"].dim() == 1 and tensor.meta["val"].shape[0] == 0:
            continue  # torch lets an empty vector stand among tensors of any shape
        size = 1 if stacked else int(tensor.meta["val"].shape[dim])
        part = Layout(tuple(size if axis == dim else s for axis, s in enumerate(layout.shape)), layout.axis, layout.pre, layout.post)
        value: Value | None
        if context.is_batched(tensor):
            value = context.value(tensor)
            own = value.layout
            if (own.pre, own.post) != (layout.pre, layout.post) or value.width != math.prod(part.shape):
                return None
        else:
            # Along the batch axis it has as many entries as there are examples in one: it cannot be another number.
            value = None if stacked else emit_broadcast(context, node, tensor, part, f"_{position}")
        if value is None:
            return None
        values.append(value)
    return context.emit(node, "concat", values, ints={"outer": math.prod(layout.shape[:dim])})


def _take_along(context: Context, node: fx.Node) -> Value | None:
    """``gather(x, dim, index)`` with indices that differ between examples."""
    x: Any
    dim: Any
    index: Any
    x, dim, index = node.args[:3]
    if not context.is_batched(x) or not context.is_batched(index) or context.depends[index]:
        return None
    value, indices = context.value(x), context.value(index)
    axis = context.dim(value, int(dim))
    layout = context.layout(node)
    if axis is None or layout is None or indices.layout != layout or layout.axis != value.axis:
        return None
    cut = tuple(size if k == axis else layout.shape[k] for k, size in enumerate(value.shape))
    if cut != value.shape:
        part = Layout(cut, value.axis, value.layout.pre, value.layout.post)
        found = emit_strided(context, node, value, 0, row_major(value.shape), "_part", part)
        if found is None:
            return None
        value = found
    count, inner = layout.shape[axis], math.prod(layout.shape[axis + 1 :])
    ints = {
        "outer": math.prod(cut[:axis]),
        "length": cut[axis],
        "count": count,
        "inner": inner,
        "index_outer": count * inner,
        "index_count": inner,
        "index_inner": 1,
        "from_end": 0,
    }
    return context.emit(node, "select_axis", [value, indices], ints=ints)


def _index(context: Context, node: fx.Node) -> Value | None:
    """``x[...]`` with index tensors: constant ones are a map; ``x[arange(N), index]`` selects by an index of each example."""
    x: Any = node.args[0]
    indices: Any = node.args[1]
    given = [i for i in indices if i is not None]
    if not any(context.is_batched(i) for i in given):
        return _moved(context, node)
    if len(indices) != 2 or None in indices or not context.is_batched(x):
        return None
    counting, index = indices
    value, layout = context.value(x), context.layout(node)
    if not _counts_examples(context, counting) or not context.is_batched(index) or context.depends[index] or layout is None:
        return None
    found = context.layout(index)
    if value.axis != 0 or value.layout.fold != 1 or found is None or found.shape != (1,) or layout.axis != 0:
        return None
    ints = {
        "outer": 1,
        "length": value.shape[1],
        "count": 1,
        "inner": math.prod(value.shape[2:]),
        "index_outer": 0,
        "index_count": 1,
        "index_inner": 0,
        "from_end": 1,
    }
    return context.emit(node, "select_axis", [value, context.value(index)], ints=ints)


def _counts_examples(context: Context, node: Any) -> bool:
    """Whether a tensor is 0, 1, ..., N − 1."""
    while isinstance(node, fx.Node) and target_of(node) in ("aten._to_copy.default", "aten.to.dtype", "aten.clone.default"):
        node = node.args[0]
    if not isinstance(node, fx.Node) or target_of(node) not in ("aten.arange.default", "aten.arange.start", "aten.arange.start_step"):
        return False
    bounds = [a for a in node.args if isinstance(a, fx.Node)]
    numbers = [a for a in node.args if not isinstance(a, fx.Node)]
    is_count = len(bounds) == 1 and is_number(bounds[0]) and getattr(bounds[0].meta["val"], "node", None) is not None
    return is_count and bounds[0].meta["val"].node.expr in context.symbols and numbers in ([], [0], [0, 1])


def _detach(context: Context, node: fx.Node) -> Value | None:
    parameters = context.depends[node]
    context.refuse(
        node,
        f"detach cuts off the derivatives with respect to {', '.join(sorted(parameters))}; remove it or freeze these parameters",
        parameters,
    )
    return context.emit(node, "view", [context.value(node.args[0])])


def _inactive_dropout(context: Context, node: fx.Node) -> Value | None:
    """Dropout that is switched off; an active one is refused before it comes here."""
    return _view(context, node)


LOWERINGS: dict[str, Lowering] = {
    **named(_inactive_dropout, "dropout.default feature_dropout.default alpha_dropout.default feature_alpha_dropout.default"),
    **dict.fromkeys(VIEWS, _view),
    **named(_view, "_to_copy.default type_as.default"),
    **named(
        _permute, "permute.default transpose.int swapaxes.default swapdims.default t.default numpy_T.default mT.default adjoint.default"
    ),
    **named(_expand, "expand.default expand_as.default broadcast_to.default"),
    **named(_moved, "slice.Tensor select.int narrow.default movedim.int moveaxis.int flip.default roll.default unfold.default"),
    **named(
        _moved, "diagonal.default repeat.default repeat_interleave.self_int tile.default index_select.default tril.default triu.default"
    ),
    **named(_moved, "constant_pad_nd.default pad.default reflection_pad1d.default reflection_pad2d.default reflection_pad3d.default"),
    **named(_moved, "replication_pad1d.default replication_pad2d.default replication_pad3d.default pixel_shuffle.default"),
    **named(_moved, "pixel_unshuffle.default channel_shuffle.default rot90.default diag_embed.default im2col.default"),
    **named(_cat, "cat.default concat.default concatenate.default"),
    **named(_stack, "stack.default"),
    **named(_take_along, "gather.default"),
    **named(_index, "index.Tensor"),
    **named(_detach, "detach.default"),
}

PART_LOWERINGS: dict[str, Lowering] = named(
    _part,
    "split.Tensor split.sizes split_with_sizes.default chunk.default tensor_split.sections tensor_split.indices unbind.int "
    "unsafe_split.Tensor unsafe_split_with_sizes.default unsafe_chunk.default",
)
