"""Layer, RMS, group, instance and batch norm."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from influence_ext.capture.context import Context, Value
from influence_ext.capture.lowering.table import Lowering, argument, named


def _layer_norm(context: Context, node: fx.Node) -> Value | None:
    """``layer_norm(x, shape, weight, bias, eps)``: over the trailing axes ``shape``."""
    weight, bias = argument(node, 2, "weight", None), argument(node, 3, "bias", None)
    return _over_trailing(context, node, weight, bias, argument(node, 4, "eps", 1e-5), centre=True)


def _rms_norm(context: Context, node: fx.Node) -> Value | None:
    """``rms_norm(x, shape, weight, eps)``: as layer norm without mean and bias."""
    eps = argument(node, 3, "eps", None)
    eps = torch.finfo(context.dtype).eps if eps is None else eps
    return _over_trailing(context, node, argument(node, 2, "weight", None), None, eps, centre=False)


def _over_trailing(context: Context, node: fx.Node, weight: Any, bias: Any, eps: Any, *, centre: bool) -> Value | None:
    x, shape = node.args[:2]
    if not context.is_batched(x):
        return None
    value = context.value(x)
    leading = len(value.shape) - len(shape)  # type: ignore[arg-type]
    if value.axis >= leading:
        return None
    size = math.prod(value.shape[leading:])
    return _emit(context, node, value, weight, bias, eps, size=size, channels=size, channel_groups=1, centre=centre)


def _group_norm(context: Context, node: fx.Node) -> Value | None:
    """``group_norm(x, groups, weight, bias, eps)`` of ``[B, C, *]``."""
    weight, bias = argument(node, 2, "weight", None), argument(node, 3, "bias", None)
    return _over_groups(context, node, node.args[1], weight, bias, argument(node, 4, "eps", 1e-5))


def _native_group_norm(context: Context, node: fx.Node) -> Value | None:
    """``native_group_norm(x, weight, bias, B, C, L, groups, eps)``; its first output."""
    _, weight, bias, _, _, _, groups, eps = node.args
    return _over_groups(context, node, groups, weight, bias, eps)


def _instance_norm(context: Context, node: fx.Node) -> Value | None:
    """``instance_norm(x, weight, bias, mean, variance, use_input_stats, momentum, eps)``: a group a channel, or with running
    statistics a batch norm.
    """
    x, weight, bias, mean, variance, use_input_stats, _, eps = node.args[:8]
    if not use_input_stats:
        return _running(context, node, weight, bias, mean, variance, eps)
    if not context.is_batched(x):
        return None
    shape = context.value(x).shape
    return _over_groups(context, node, shape[1], weight, bias, eps)


def _over_groups(context: Context, node: fx.Node, groups: Any, weight: Any, bias: Any, eps: Any) -> Value | None:
    x = node.args[0]
    if not context.is_batched(x) or not isinstance(groups, int):
        return None
    value = context.value(x)
    if value.axis != 0:
        return None
    channels = value.shape[1] // groups
    size = channels * math.prod(value.shape[2:])
    return _emit(context, node, value, weight, bias, eps, size=size, channels=channels, channel_groups=groups, centre=True)


def _emit(
    context: Context,
    node: fx.Node,
    value: Value,
    weight: Any,
    bias: Any,
    eps: Any,
    *,
    size: int,
    channels: int,
    channel_groups: int,
    centre: bool,
) -> Value | None:
    """Every ``size`` elements in a row by their own statistics, then an affine map of the channels."""
    slots = _affine_slots(context, weight, bias, channels * channel_groups)
    number = context.number(node, eps)
    if slots is None or number is None or size == 0:
        return None
    ints = {
        "groups": value.width // size,
        "size": size,
        "channels": channels,
        "channel_groups": channel_groups,
        "centre": int(centre),
    }
    return context.emit(node, "layer_norm", [value], slots, ints, {"eps": number})


def _affine_slots(context: Context, weight: Any, bias: Any, num_channels: int) -> list[int] | None:
    slots = []
    for tensor in (weight, bias):
        slot: int | None = -1
        if tensor is not None:
            if not context.is_batch_free(tensor) or math.prod(tensor.meta["val"].shape) != num_channels:
                return None
            slot = context.slot(tensor)
        if slot is None:
            return None
        slots.append(slot)
    return slots


def _batch_norm(context: Context, node: fx.Node) -> Value | None:
    """``batch_norm(x, weight, bias, mean, variance, training, momentum, eps)``, and its native forms."""
    _, weight, bias, mean, variance, training, _, eps = node.args[:8]
    return None if training is not False else _running(context, node, weight, bias, mean, variance, eps)


def _batch_norm_no_training(context: Context, node: fx.Node) -> Value | None:
    """``_native_batch_norm_legit_no_training(x, weight, bias, mean, variance, momentum, eps)``."""
    _, weight, bias, mean, variance, _, eps = node.args
    return _running(context, node, weight, bias, mean, variance, eps)


def _running(context: Context, node: fx.Node, weight: Any, bias: Any, mean: Any, variance: Any, eps: Any) -> Value | None:
    """``[B, C, *]`` by running statistics."""
    x = node.args[0]
    number = context.number(node, eps)
    statistics = (mean, variance)
    if not context.is_batched(x) or number is None or not all(context.is_batch_free(s) and not context.depends[s] for s in statistics):
        return None
    value = context.value(x)
    if value.axis != 0:
        return None
    slots = _affine_slots(context, weight, bias, value.shape[1])
    constants = _affine_slots(context, mean, variance, value.shape[1])
    if slots is None or constants is None:
        return None
    ints = {"channels": value.shape[1], "run": math.prod(value.shape[2:])}
    return context.emit(node, "batch_norm", [value], [*slots, *constants], ints, {"eps": number})


LOWERINGS: dict[str, Lowering] = {
    **named(_layer_norm, "layer_norm.default native_layer_norm.default"),
    **named(_rms_norm, "rms_norm.default _fused_rms_norm.default"),
    **named(_group_norm, "group_norm.default"),
    **named(_native_group_norm, "native_group_norm.default"),
    **named(_instance_norm, "instance_norm.default"),
    **named(_batch_norm, "batch_norm.default native_batch_norm.default cudnn_batch_norm.default"),
    **named(_batch_norm_no_training, "_native_batch_norm_legit_no_training.default"),
}
