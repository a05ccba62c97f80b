"""Convolutions and pooling: operators over one to three trailing spatial axes, which the rules see as three (leading ones of length 1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, fx

from influence_ext.capture.context import Context, Value
from influence_ext.capture.lowering.table import Lowering, argument, named


def _convolution(dims: int) -> Lowering:
    """``conv{dims}d(x, W, b, stride, padding, dilation, groups)``; the padding may be ``"same"`` or ``"valid"``."""

    def lowering(context: Context, node: fx.Node) -> Value | None:
        stride, padding, dilation, groups = _arguments(node, 3, [("stride", 1), ("padding", 0), ("dilation", 1), ("groups", 1)])
        return _emit_convolution(context, node, dims, stride, padding, dilation, groups, transposed=False)

    return lowering


def _conv_transpose(dims: int) -> Lowering:
    """``conv_transpose{dims}d(x, W, b, stride, padding, output_padding, groups, dilation)``."""

    def lowering(context: Context, node: fx.Node) -> Value | None:
        defaults = [("stride", 1), ("padding", 0), ("output_padding", 0), ("groups", 1), ("dilation", 1)]
        stride, padding, _, groups, dilation = _arguments(node, 3, defaults)
        return _emit_convolution(context, node, dims, stride, padding, dilation, groups, transposed=True)

    return lowering


def _general_convolution(context: Context, node: fx.Node) -> Value | None:
    """``convolution(x, W, b, stride, padding, dilation, transposed, output_padding, groups)``."""
    stride, padding, dilation, transposed, _, groups = node.args[3:9]
    dims = len(_output(node).shape) - 2
    return _emit_convolution(context, node, dims, stride, padding, dilation, groups, transposed=bool(transposed))


def _emit_convolution(
    context: Context, node: fx.Node, dims: int, stride: Any, padding: Any, dilation: Any, groups: Any, *, transposed: bool
) -> Value | None:
    x, weight, bias = node.args[0], node.args[1], argument(node, 2, "bias", None)
    if not 1 <= dims <= 3 or not context.is_batched(x) or not isinstance(weight, fx.Node) or context.is_batched(weight):
        return None
    value = context.value(x)
    if value.axis != 0 or len(value.shape) != dims + 2:
        return None
    kernel = [int(size) for size in weight.meta["val"].shape[2:]]
    stride, dilation = _each(stride, dims), _each(dilation, dims)
    if padding == "same":
        padding = [d * (k - 1) // 2 for d, k in zip(dilation, kernel, strict=True)]
    output = _output(node).shape
    slots = [context.slot(weight), -1 if bias is None else context.slot(bias)]
    if None in slots:
        return None
    return context.emit(
        node,
        "convolution",
        [value],
        [slot for slot in slots if slot is not None],
        ints={"in_channels": value.shape[1], "out_channels": int(output[1]), "groups": int(groups), "transposed": int(transposed)},
        lists={
            "input": three(value.shape[2:], 1),
            "output": three([int(size) for size in output[2:]], 1),
            "kernel": three(kernel, 1),
            "stride": three(stride, 1),
            "dilation": three(dilation, 1),
            "padding": three(_each(0 if padding == "valid" else padding, dims), 0),
        },
    )


# One axis of a pooling: for each output its first input, the end of its inputs, and what an average divides by.
Intervals = list[tuple[int, int, int]]


def _max_pool(dims: int) -> Lowering:
    """``max_pool{dims}d(x, kernel, stride, padding, dilation, ceil_mode)``, with indices or without."""

    def lowering(context: Context, node: fx.Node) -> Value | None:
        kernel = _each(node.args[1], dims)
        stride, padding, dilation = _arguments(node, 2, [("stride", []), ("padding", 0), ("dilation", 1)])
        stride, padding, dilation = _each(stride or kernel, dims), _each(padding, dims), _each(dilation, dims)

        def intervals(axis: int, size: int, num_outputs: int) -> Intervals:
            found = []
            for begin in range(-padding[axis], num_outputs * stride[axis] - padding[axis], stride[axis]):
                end = min(begin + (kernel[axis] - 1) * dilation[axis] + 1, size)
                # The first input of the window that is not padding.
                found.append((begin if begin >= 0 else begin % dilation[axis], end, 1))
            return found

        return _emit_pool(context, node, dims, "max_pool", intervals, dilation)

    return lowering


def _avg_pool(dims: int) -> Lowering:
    """``avg_pool{dims}d(x, kernel, stride, padding, ceil_mode, count_include_pad, divisor_override)``."""

    def lowering(context: Context, node: fx.Node) -> Value | None:
        kernel = _each(node.args[1], dims)
        defaults = [("stride", []), ("padding", 0), ("ceil_mode", False), ("count_include_pad", True), ("divisor_override", None)]
        stride, padding, _, include_pad, divisor = _arguments(node, 2, defaults)
        stride, padding = _each(stride or kernel, dims), _each(padding, dims)

        def intervals(axis: int, size: int, num_outputs: int) -> Intervals:
            found = []
            for start in range(-padding[axis], num_outputs * stride[axis] - padding[axis], stride[axis]):
                stop = min(start + kernel[axis], size + padding[axis])
                begin = max(start, 0)
                end = max(begin, min(stop, size))
                count = 1 if divisor is not None else stop - start if include_pad else max(1, end - begin)
                found.append((begin, end, count))
            return found

        return _emit_pool(context, node, dims, "avg_pool", intervals, [1] * dims, 1.0 if divisor is None else 1.0 / divisor)

    return lowering


def _adaptive_pool(rule: str, dims: int) -> Lowering:
    """``adaptive_{avg,max}_pool{dims}d(x, output_size)``."""

    def intervals(axis: int, size: int, num_outputs: int) -> Intervals:
        bounds = [(o * size // num_outputs, -(-(o + 1) * size // num_outputs)) for o in range(num_outputs)]
        return [(begin, end, end - begin) for begin, end in bounds]

    def lowering(context: Context, node: fx.Node) -> Value | None:
        return _emit_pool(context, node, dims, rule, intervals, [1] * dims)

    return lowering


def _emit_pool(
    context: Context,
    node: fx.Node,
    dims: int,
    rule: str,
    intervals: Callable[[int, int, int], Intervals],
    dilation: Sequence[int],
    factor: float = 1.0,
) -> Value | None:
    value = context.value(node.args[0])
    rank = len(value.shape)
    if value.axis >= rank - dims:
        return None
    sizes = value.shape[rank - dims :]
    outputs = [int(size) for size in _output(node).shape[rank - dims :]]
    lists: dict[str, Sequence[int]] = {"input": three(sizes, 1), "dilation": three(dilation, 1)}
    for axis in range(3):
        mine = axis - (3 - dims)
        found = intervals(mine, sizes[mine], outputs[mine]) if mine >= 0 else [(0, 1, 1)]
        lists[f"begin_{axis}"], lists[f"end_{axis}"], lists[f"count_{axis}"] = zip(*found, strict=True)
    return context.emit(node, rule, [value], floats={"factor": factor}, lists=lists)


def _output(node: fx.Node) -> Tensor:
    """The output, the first if there are several."""
    value = node.meta["val"]
    return value[0] if isinstance(value, (tuple, list)) else value


def _arguments(node: fx.Node, first: int, defaults: Sequence[tuple[str, Any]]) -> list[Any]:
    return [argument(node, first + i, name, default) for i, (name, default) in enumerate(defaults)]


def _each(setting: Any, dims: int) -> list[int]:
    """One number an axis, where the operator was given one for all."""
    numbers = [setting] if isinstance(setting, int) else list(setting)
    return [int(number) for number in (numbers * dims if len(numbers) == 1 else numbers)]


def three(numbers: Sequence[int], fill: int) -> list[int]:
    """Numbers of the spatial axes as those of three, leading ones filled in."""
    return [fill] * (3 - len(numbers)) + list(numbers)


LOWERINGS: dict[str, Lowering] = {**named(_general_convolution, "convolution.default")}
for _dims in (1, 2, 3):
    LOWERINGS |= named(_convolution(_dims), f"conv{_dims}d.default conv{_dims}d.padding")
    LOWERINGS |= named(_conv_transpose(_dims), f"conv_transpose{_dims}d.{'default' if _dims == 1 else 'input'}")
    LOWERINGS |= named(_max_pool(_dims), f"max_pool{_dims}d.default max_pool{_dims}d_with_indices.default")
    LOWERINGS |= named(_avg_pool(_dims), f"avg_pool{_dims}d.default")
    for _name in (f"adaptive_avg_pool{_dims}d", f"_adaptive_avg_pool{_dims}d"):
        LOWERINGS |= named(_adaptive_pool("avg_pool", _dims), f"{_name}.default")
    LOWERINGS |= named(_adaptive_pool("max_pool", _dims), f"adaptive_max_pool{_dims}d.default")
