"""Rows for layer, RMS, group, instance and batch norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tests.cases import NetworkCase
from tests.cases.layers import buffer, expression, fc, frozen, normal, parameter, row


def spread(layer: nn.Module) -> nn.Module:
    """``layer`` with weights, biases and running statistics that differ from channel to channel."""
    for name, value in [*layer.named_parameters(), *layer.named_buffers()]:
        if value.is_floating_point():
            with torch.no_grad():
                value.copy_(torch.rand_like(value) + 0.5 if name.endswith("var") else torch.randn_like(value) + (name == "weight"))
    return layer


def norm_row(id: str, rule: str, make: Callable[[], nn.Module], notes: str, inputs: Any = None, **more: Any) -> NetworkCase:
    """A linear layer along the last axis of the inputs, then the layer of ``make``: tangents enter it from both sides."""
    width = int((inputs or normal(3))(1, torch.Generator()).shape[-1])
    return row(id, rule, lambda: nn.Sequential(nn.Linear(width, width), spread(make())), notes, inputs, **more)


def layer_norm(id: str, make: Callable[[], nn.Module], notes: str, inputs: Any = None, **more: Any) -> NetworkCase:
    """A row of the layer_norm rule."""
    return norm_row(id, "layer_norm", make, notes, inputs, **more)


def batch_norm(id: str, make: Callable[[], nn.Module], notes: str, inputs: Any = None, **more: Any) -> NetworkCase:
    """A row of the batch_norm rule."""
    return norm_row(id, "batch_norm", make, notes, inputs, **more)


LAYER_NORMS = (
    layer_norm("layer-norm-3", lambda: nn.LayerNorm(3), "the plain layer"),
    layer_norm("layer-norm-1", lambda: nn.LayerNorm(1), "one element is its own mean: only the bias is felt", normal(1)),
    layer_norm("layer-norm-7", lambda: nn.LayerNorm(7), "no vector register is ever full", normal(7)),
    layer_norm("layer-norm-33", lambda: nn.LayerNorm(33), "remainders of every loop", normal(33), num_examples=3),
    layer_norm("layer-norm-single", lambda: nn.LayerNorm(3), "N = 1", num_examples=1),
    layer_norm("layer-norm-many", lambda: nn.LayerNorm(3), "N larger than a tile of examples, and odd", num_examples=131),
    layer_norm("layer-norm-seq", lambda: nn.LayerNorm(4), "[N, T, C]: positions share the weight", normal(5, 4)),
    layer_norm("layer-norm-two-axes", lambda: nn.LayerNorm((5, 4)), "normalised over [T, C]", normal(5, 4)),
    layer_norm("layer-norm-two-of-three", lambda: nn.LayerNorm((3, 4)), "the last two of three axes", normal(2, 3, 4)),
    layer_norm("layer-norm-nobias", lambda: nn.LayerNorm(4, bias=False), "no bias", normal(4)),
    layer_norm("layer-norm-plain", lambda: nn.LayerNorm(4, elementwise_affine=False), "no affine map", normal(2, 4)),
    layer_norm("layer-norm-frozen", lambda: frozen(nn.LayerNorm(4)), "a constant affine map", normal(2, 4)),
    layer_norm("layer-norm-frozen-weight", lambda: frozen(nn.LayerNorm(4), "weight"), "only the bias is trained", normal(2, 4)),
    layer_norm("layer-norm-frozen-bias", lambda: frozen(nn.LayerNorm(4), "bias"), "only the weight is trained", normal(2, 4)),
    layer_norm("layer-norm-eps", lambda: nn.LayerNorm(4, eps=0.3), "eps of the size of the variance", normal(4)),
    row("layer-norm-first", "layer_norm", lambda: spread(nn.LayerNorm((2, 4))), "nothing below it is trained", normal(2, 4)),
    row("layer-norm-first-bias", "layer_norm", lambda: frozen(nn.LayerNorm(4), "weight"), "a bias alone", normal(4)),
    row("layer-norm-then-act", "layer_norm",
        lambda: nn.Sequential(nn.Linear(3, 4), spread(nn.LayerNorm(4)), nn.Tanh(), nn.Linear(4, 2)),
        "the activation is a factor of its tangent"),
    row("act-then-layer-norm", "layer_norm", lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), spread(nn.LayerNorm(4))),
        "the activation is a factor of its cotangent"),
    expression("layer-norm-residual", "layer_norm", lambda m, x: (h := m.fc(x)) + m.norm(h),
               "its cotangent is added to another", fc=fc(), norm=lambda: spread(nn.LayerNorm(3))),
    expression("layer-norm-offset", "layer_norm", lambda m, x: m.norm(m.fc(x) + 1000.0),
               "a mean of 1000: the variance must not cancel", normal(33), fc=fc(33, 33), norm=lambda: nn.LayerNorm(33)),
    expression("layer-norm-functional", "layer_norm", lambda m, x: F.layer_norm(m.fc(x), (3,), m.w, m.b, 1e-3),
               "the weight is a constant", fc=fc(), w=lambda: buffer(3), b=lambda: parameter(3)),
    expression("layer-norm-native", "layer_norm", lambda m, x: torch.native_layer_norm(m.fc(x), (3,), m.w, None, 1e-5)[0],
               "the form with three outputs", fc=fc(), w=lambda: parameter(3)),
    expression("layer-norm-derived", "layer_norm", lambda m, x: F.layer_norm(m.fc(x), (3,), 1 + m.w),
               "the weight is an expression of a parameter", fc=fc(), w=lambda: parameter(3)),
    layer_norm("rms-norm", lambda: nn.RMSNorm(7, eps=1e-5), "no mean is subtracted", normal(3, 7)),
    layer_norm("rms-norm-plain", lambda: nn.RMSNorm(4, elementwise_affine=False, eps=1e-5), "no weight", normal(4)),
    layer_norm("rms-norm-eps", lambda: nn.RMSNorm(4), "eps of the data type", normal(4)),
    layer_norm("rms-norm-two-axes", lambda: nn.RMSNorm((3, 4), eps=1e-5), "over [T, C]", normal(3, 4)),
    layer_norm("rms-norm-one", lambda: nn.RMSNorm(1, eps=0.1), "one element: its sign, softened by eps", normal(2, 1)),
)  # fmt: skip

GROUP_NORMS = (
    layer_norm("group-norm", lambda: nn.GroupNorm(2, 6), "groups of several channels with runs of elements", normal(6, 5)),
    layer_norm("group-norm-all", lambda: nn.GroupNorm(1, 6), "groups = 1", normal(6, 3)),
    layer_norm("group-norm-each", lambda: nn.GroupNorm(6, 6), "groups = C", normal(6, 3)),
    layer_norm("group-norm-flat", lambda: nn.GroupNorm(2, 6), "no axis besides the channels", normal(6)),
    layer_norm("group-norm-grid", lambda: nn.GroupNorm(2, 4), "images", normal(4, 3, 3)),
    layer_norm("group-norm-run-33", lambda: nn.GroupNorm(2, 4), "runs longer than a vector, and odd", normal(4, 33)),
    layer_norm("group-norm-single", lambda: nn.GroupNorm(2, 4), "N = 1", normal(4, 3), num_examples=1),
    layer_norm("group-norm-plain", lambda: nn.GroupNorm(2, 4, affine=False), "no affine map", normal(4, 3)),
    layer_norm("group-norm-frozen-weight", lambda: frozen(nn.GroupNorm(2, 4), "weight"), "only the bias is trained", normal(4, 3)),
    row("group-norm-first", "layer_norm", lambda: spread(nn.GroupNorm(2, 4)), "nothing below it is trained", normal(4, 3)),
    row("group-norm-then-act", "layer_norm", lambda: nn.Sequential(nn.Linear(3, 3), spread(nn.GroupNorm(2, 4)), nn.SiLU()),
        "the activation is a factor of its tangent", normal(4, 3)),
    layer_norm("instance-norm-plain", lambda: nn.InstanceNorm1d(4), "a group a channel, no affine map", normal(4, 5)),
    layer_norm("instance-norm", lambda: nn.InstanceNorm2d(4, affine=True), "affine", normal(4, 3, 2)),
)  # fmt: skip

BATCH_NORMS = (
    batch_norm("batch-norm-flat", lambda: nn.BatchNorm1d(7), "[N, C]", normal(7)),
    batch_norm("batch-norm-1", lambda: nn.BatchNorm1d(1), "one channel", normal(1)),
    batch_norm("batch-norm-seq", lambda: nn.BatchNorm1d(4), "[N, C, L]", normal(4, 5)),
    batch_norm("batch-norm-image", lambda: nn.BatchNorm2d(3), "after a convolution's shape", normal(3, 5, 7)),
    batch_norm("batch-norm-volume", lambda: nn.BatchNorm3d(2), "[N, C, D, H, W]", normal(2, 2, 3, 2)),
    batch_norm("batch-norm-33", lambda: nn.BatchNorm1d(33), "remainders of every loop", normal(33), num_examples=3),
    batch_norm("batch-norm-run-33", lambda: nn.BatchNorm1d(2), "runs longer than a vector, and odd", normal(2, 33)),
    batch_norm("batch-norm-single", lambda: nn.BatchNorm2d(3), "N = 1", normal(3, 2, 2), num_examples=1),
    batch_norm("batch-norm-many", lambda: nn.BatchNorm1d(3), "N larger than a tile of examples, and odd", num_examples=131),
    batch_norm("batch-norm-plain", lambda: nn.BatchNorm1d(4, affine=False), "no affine map", normal(4, 3)),
    batch_norm("batch-norm-frozen", lambda: frozen(nn.BatchNorm1d(4)), "a constant affine map", normal(4, 3)),
    batch_norm("batch-norm-frozen-weight", lambda: frozen(nn.BatchNorm1d(4), "weight"), "only the bias is trained", normal(4, 3)),
    batch_norm("batch-norm-frozen-bias", lambda: frozen(nn.BatchNorm1d(4), "bias"), "only the weight is trained", normal(4, 3)),
    row("batch-norm-first", "batch_norm", lambda: spread(nn.BatchNorm1d(4)), "nothing below it is trained", normal(4, 3)),
    row("batch-norm-first-bias", "batch_norm", lambda: frozen(nn.BatchNorm1d(4), "weight"), "a bias alone", normal(4, 3)),
    row("batch-norm-then-act", "batch_norm",
        lambda: nn.Sequential(nn.Linear(3, 3), spread(nn.BatchNorm1d(4)), nn.SiLU(), nn.Linear(3, 2)),
        "the activation is a factor of its tangent", normal(4, 3)),
    row("act-then-batch-norm", "batch_norm", lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), spread(nn.BatchNorm1d(4))),
        "the activation is a factor of its cotangent"),
    expression("batch-norm-residual", "batch_norm", lambda m, x: (h := m.fc(x)) + m.norm(h),
               "its cotangent is added to another", fc=fc(), norm=lambda: spread(nn.BatchNorm1d(3))),
    expression("batch-norm-offset", "batch_norm", lambda m, x: F.batch_norm(m.fc(x) + 1000.0, m.mean, m.var, m.w, m.b),
               "a mean of 1000 is subtracted before it is scaled", fc=fc(), mean=lambda: buffer(3) + 1000.0,
               var=lambda: buffer(3).abs() + 0.5, w=lambda: parameter(3), b=lambda: parameter(3)),
    batch_norm("instance-norm-running", lambda: nn.InstanceNorm1d(4, affine=True, track_running_stats=True),
               "instance norm by running statistics is a batch norm", normal(4, 3)),
)  # fmt: skip

NORMALISATIONS = LAYER_NORMS + GROUP_NORMS + BATCH_NORMS
