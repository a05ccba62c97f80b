"""One row per option of convolutions and pooling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tests.cases import NetworkCase
from tests.cases.layers import buffer, expression, frozen, normal, parameter, row


def conv(dims: int, *args: Any, **options: Any) -> Callable[[], nn.Module]:
    """Maker of a convolution, its outputs flattened and squashed so that their cotangents differ."""
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    return lambda: nn.Sequential(kind(*args, **options), nn.Tanh(), nn.Flatten())


def transposed(dims: int, *args: Any, **options: Any) -> Callable[[], nn.Module]:
    """The same of a transposed convolution."""
    kind = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1]
    return lambda: nn.Sequential(kind(*args, **options), nn.Tanh(), nn.Flatten())


def pooled(*pools: nn.Module, channels: int = 2, dims: int = 2) -> Callable[[], nn.Module]:
    """A convolution under pooling layers."""
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    return lambda: nn.Sequential(kind(1, channels, 2), *pools, nn.Flatten())


def averaged(*layers: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Layers of many channels, of whose outputs only means remain: Jacobians of all of them would be large."""
    return lambda: nn.Sequential(*(layer() for layer in layers), nn.Tanh(), nn.AdaptiveAvgPool2d((2, 1)), nn.Flatten())


def halves() -> nn.Module:
    """Windows of two by two."""
    return nn.MaxPool2d(2)


def stack(*layers: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """The layers one after the other."""
    return lambda: nn.Sequential(*(layer() for layer in layers))


def lenet() -> nn.Module:
    """LeNet's order of layers, in small."""
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2),
        nn.Flatten(), nn.Linear(16, 5), nn.Tanh(), nn.Linear(5, 3),
    )  # fmt: skip


class SharedKernel(nn.Module):
    """One kernel in two convolutions of different stride."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the module, then its weight once more."""
        h = torch.tanh(self.conv(x))
        return F.conv2d(h, self.conv.weight, None, stride=2).flatten(1)


class Residual(nn.Module):
    """Two branches of one input, below which there is a parameter."""

    def __init__(self, *branches: nn.Module, channels: int = 2) -> None:
        super().__init__()
        self.below = nn.Conv2d(channels, channels, 1)
        self.branches = nn.ModuleList(branches)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of the branches."""
        h = torch.tanh(self.below(x))
        return (h + sum(branch(h) for branch in self.branches)).flatten(1)


class Folded(nn.Module):
    """A convolution of each of several images ``[N, F, C, H, W]``."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The images as one batch."""
        y = torch.tanh(self.conv(x.flatten(0, 1)))
        return y.reshape(x.shape[0], -1)


class Pair(nn.Module):
    """A convolution under a pooling layer that returns indices too."""

    def __init__(self, conv: nn.Module, pool: nn.Module) -> None:
        super().__init__()
        self.conv, self.pool = conv, pool

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The values alone."""
        return self.pool(self.conv(x))[0].flatten(1)


class TwoReaders(nn.Module):
    """Several pooling layers of one value."""

    def __init__(self, conv: nn.Module, *pools: nn.Module) -> None:
        super().__init__()
        self.conv, self.pools = conv, nn.ModuleList(pools)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of the pools."""
        h = self.conv(x)
        return sum((pool(h) for pool in self.pools), 0.5 * self.pools[0](h)).flatten(1)


def conv_row(id: str, make: Callable[[], nn.Module], notes: str, inputs: Any, **more: Any) -> NetworkCase:
    """A row of the rule "convolution"."""
    return row(id, "convolution", make, notes, inputs, **more)


CONVOLUTIONS = (
    conv_row("conv2d", conv(2, 2, 3, 3), "the plain layer", normal(2, 5, 6)),
    conv_row("conv2d-1-1", conv(2, 1, 1, 1), "a single weight", normal(1, 3, 3)),
    conv_row("conv2d-7-33", conv(2, 7, 33, 3, padding=1), "odd channels: remainders of every loop", normal(7, 3, 3), num_examples=2),
    conv_row("conv2d-33-7", conv(2, 33, 7, 2), "more channels in than out", normal(33, 3, 3), num_examples=2),
    conv_row("conv2d-single", conv(2, 2, 3, 3), "N = 1", normal(2, 4, 4), num_examples=1),
    conv_row("conv2d-many", conv(2, 1, 2, 2), "N larger than a tile of examples, and odd", normal(1, 3, 3), num_examples=131),
    conv_row("conv2d-wide", conv(2, 1, 2, 3, padding=1), "lines of more than a vector, and no multiple of one", normal(1, 2, 21)),
    conv_row("conv2d-line", conv(2, 1, 2, 3, padding=1), "lines of whole vectors", normal(1, 2, 32), num_examples=2),
    conv_row("conv2d-nobias", conv(2, 2, 3, 3, bias=False), "no bias", normal(2, 4, 4)),
    conv_row("conv2d-pointwise", conv(2, 3, 4, 1), "1 x 1: no neighbours", normal(3, 3, 4)),
    conv_row("conv2d-pointwise-stride", conv(2, 3, 4, 1, stride=2), "1 x 1 that skips inputs", normal(3, 4, 5)),
    conv_row("conv2d-padding", conv(2, 2, 3, 3, padding=(2, 1)), "different padding along each axis", normal(2, 3, 4)),
    conv_row("conv2d-stride", conv(2, 2, 3, 3, stride=2, padding=1), "stride 2, an input left over", normal(2, 6, 7)),
    conv_row("conv2d-stride-3", conv(2, 2, 3, (3, 4), stride=(3, 1)), "different strides", normal(2, 7, 6)),
    conv_row("conv2d-stride-gaps", conv(2, 2, 3, 2, stride=3), "a stride beyond the kernel: inputs that nothing reads", normal(2, 7, 8)),
    conv_row("conv2d-dilation", conv(2, 2, 3, 3, dilation=(2, 1), padding=2), "dilation", normal(2, 5, 5)),
    conv_row("conv2d-dilation-stride", conv(2, 2, 3, 3, dilation=2, stride=2, padding=2), "both share a factor", normal(2, 6, 6)),
    conv_row("conv2d-kernel-larger", conv(2, 2, 3, 5, padding=2), "a kernel larger than the image", normal(2, 3, 2)),
    conv_row("conv2d-position", conv(2, 2, 3, (4, 3)), "one position: the gradient is a single outer product", normal(2, 4, 3)),
    conv_row("conv2d-few-positions", conv(2, 8, 24, 4), "few positions: outer products", normal(8, 5, 4), num_examples=2),
    conv_row("conv2d-same", conv(2, 2, 3, (2, 4), padding="same"), "even kernels: one side has more padding", normal(2, 4, 5)),
    conv_row("conv2d-same-dilation", conv(2, 2, 2, 3, padding="same", dilation=2), "'same' with dilation", normal(2, 4, 4)),
    conv_row("conv2d-valid", conv(2, 2, 3, 3, padding="valid"), "no padding, by name", normal(2, 4, 4)),
    conv_row("conv2d-circular", conv(2, 2, 3, 3, padding=1, padding_mode="circular"), "padding by an operator of its own", normal(2, 3, 4)),
    conv_row("conv2d-groups", conv(2, 6, 4, 3, groups=2), "groups", normal(6, 4, 4)),
    conv_row("conv2d-groups-odd", conv(2, 9, 15, 2, groups=3, stride=2), "odd groups", normal(9, 5, 4), num_examples=2),
    conv_row("conv2d-depthwise", conv(2, 5, 5, 3, groups=5, padding=1), "a kernel for each channel", normal(5, 4, 5)),
    conv_row("conv2d-depthwise-wide", conv(2, 2, 2, 3, groups=2, padding=1), "long lines", normal(2, 3, 37), num_examples=2),
    conv_row("conv2d-depthwise-multiple", conv(2, 3, 6, 3, groups=3, stride=2), "two kernels for each channel", normal(3, 5, 5)),
    conv_row("conv2d-frozen-weight", lambda: frozen(conv(2, 2, 3, 2)(), "0.weight"), "only the bias is trainable", normal(2, 3, 3)),
    conv_row("conv2d-frozen-bias", lambda: frozen(conv(2, 2, 3, 2)(), "0.bias"), "only the weight is trainable", normal(2, 3, 3)),
    conv_row("conv2d-under-frozen", lambda: nn.Sequential(nn.Conv2d(2, 3, 2), frozen(nn.Conv2d(3, 2, 2)), nn.Flatten()),
             "the cotangent passes a layer that has no trainable parameter", normal(2, 4, 4)),
    conv_row("conv2d-frozen-below", lambda: nn.Sequential(frozen(nn.Conv2d(2, 3, 2)), nn.Conv2d(3, 2, 2), nn.Flatten()),
             "no tangent enters the trainable layer", normal(2, 4, 4)),
    conv_row("conv2d-two", stack(lambda: nn.Conv2d(2, 3, 3, padding=1), nn.ReLU, lambda: nn.Conv2d(3, 2, 3, stride=2), nn.Flatten),
             "both terms of the tangent, and the activation's derivative as epilogue", normal(2, 5, 5)),
    conv_row("conv2d-residual", lambda: Residual(nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 1)),
             "cotangents add up in an input", normal(2, 4, 3)),
    conv_row("conv2d-shared", SharedKernel, "one kernel in two convolutions", normal(2, 5, 5)),
    conv_row("conv2d-folded", lambda: Folded(nn.Conv2d(2, 3, 2)), "several images an example", normal(3, 2, 3, 4)),
    conv_row("conv1d", conv(1, 3, 4, 3, padding=1), "one axis", normal(3, 7)),
    conv_row("conv1d-long", conv(1, 1, 2, 5, stride=2, padding=2), "a long line", normal(1, 67), num_examples=2),
    conv_row("conv1d-causal", conv(1, 2, 3, 2, dilation=4, padding=4), "dilation beyond the padding", normal(2, 6)),
    conv_row("conv1d-depthwise", conv(1, 4, 4, 3, groups=4, padding=1), "a kernel for each channel", normal(4, 6)),
    conv_row("conv3d", conv(3, 2, 3, 2), "three axes", normal(2, 3, 4, 3), num_examples=2),
    conv_row("conv3d-options", conv(3, 2, 2, (3, 2, 3), stride=(2, 1, 2), padding=(1, 0, 2), dilation=(1, 2, 1)),
             "every option of three axes", normal(2, 4, 4, 3), num_examples=2),
    conv_row("conv-transpose2d", transposed(2, 3, 2, 3), "the transposed layer", normal(3, 3, 4)),
    conv_row("conv-transpose2d-stride", transposed(2, 3, 2, 2, stride=2), "upsampling without overlap", normal(3, 3, 3)),
    conv_row("conv-transpose2d-output", transposed(2, 2, 3, 3, stride=2, padding=1, output_padding=1), "output padding", normal(2, 3, 2)),
    conv_row("conv-transpose2d-gaps", transposed(2, 2, 2, 1, stride=3), "outputs that nothing reaches", normal(2, 3, 2)),
    conv_row("conv-transpose2d-groups", transposed(2, 4, 6, 3, groups=2, stride=(2, 1), dilation=(1, 2)), "groups", normal(4, 3, 3)),
    conv_row("conv-transpose2d-nobias", transposed(2, 2, 3, 2, bias=False), "no bias", normal(2, 3, 3)),
    conv_row("conv-transpose2d-frozen", lambda: frozen(transposed(2, 2, 3, 2)(), "0.weight"), "only the bias trains", normal(2, 2, 3)),
    conv_row("conv-transpose1d", transposed(1, 3, 2, 4, stride=2, padding=1), "one axis", normal(3, 5)),
    conv_row("conv-transpose3d", transposed(3, 2, 2, 2, stride=(2, 1, 2)), "three axes", normal(2, 2, 3, 2), num_examples=2),
    conv_row("conv-autoencoder", stack(lambda: nn.Conv2d(1, 3, 3, stride=2, padding=1), nn.ReLU,
                                       lambda: nn.ConvTranspose2d(3, 1, 3, stride=2, padding=1, output_padding=1), nn.Flatten),
             "down and up again", normal(1, 6, 4)),
    expression("conv2d-functional", "convolution", lambda m, x: F.conv2d(x, m.w, m.b).flatten(1), "functional form",
               normal(2, 4, 3), w=lambda: parameter(3, 2, 2, 2), b=lambda: parameter(3)),
    expression("conv2d-buffer", "convolution", lambda m, x: F.conv2d(x * m.a, m.w).flatten(1), "the kernel is a constant",
               normal(2, 4, 3), w=lambda: buffer(3, 2, 2, 2), a=lambda: parameter(2, 1, 1)),
    expression("conv2d-normalised", "convolution", lambda m, x: F.conv2d(x, m.w / m.w.norm()).flatten(1),
               "the kernel is an expression of parameters", normal(2, 4, 3), w=lambda: parameter(3, 2, 2, 2)),
    row("lenet", "convolution", lenet, "convolutions, both kinds of pooling, linear layers", normal(1, 10, 10)),
)  # fmt: skip

# Enough channels and positions for Winograd's algorithm (takes_winograd in csrc/kernels/winograd.h).
WINOGRAD = (
    conv_row("winograd", averaged(lambda: nn.Conv2d(16, 16, 3, padding=1)), "whole tiles", normal(16, 8, 8), num_examples=3),
    conv_row("winograd-edges", averaged(lambda: nn.Conv2d(20, 24, 3, padding=1)), "tiles and channels left over", normal(20, 11, 15),
             num_examples=2),
    conv_row("winograd-valid", averaged(lambda: nn.Conv2d(16, 16, 3)), "no padding: two zeros around the cotangent", normal(16, 10, 10),
             num_examples=2),
    conv_row("winograd-padding", averaged(lambda: nn.Conv2d(16, 20, 3, padding=(2, 0))), "different padding along each axis",
             normal(16, 10, 9), num_examples=2),
    conv_row("winograd-bands", averaged(lambda: nn.Conv2d(16, 16, 3, padding=1)), "images larger than a unit of tiles", normal(16, 40, 37),
             num_examples=1),
    conv_row("winograd-many", averaged(lambda: nn.Conv2d(16, 16, 3, padding=1)), "several units of images, the last smaller",
             normal(16, 8, 8), num_examples=19),
    conv_row("winograd-two", averaged(lambda: nn.Conv2d(16, 16, 3, padding=1), nn.ReLU, lambda: nn.Conv2d(16, 16, 3, padding=1)),
             "both terms of the tangent, and the activation's derivative as epilogue", normal(16, 8, 8), num_examples=2),
    conv_row("winograd-curved", averaged(lambda: nn.Conv2d(16, 16, 3, padding=1), nn.Tanh, lambda: nn.Conv2d(16, 16, 3, padding=1)),
             "second derivatives: shared cotangents, kernels of each right-hand side", normal(16, 5, 8), num_examples=2),
    conv_row("winograd-residual", lambda: Residual(nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1), channels=16),
             "cotangents add up in an input", normal(16, 4, 5), num_examples=2),
    conv_row("winograd-transposed", averaged(lambda: nn.ConvTranspose2d(16, 20, 3, padding=1)), "the transposed layer", normal(16, 8, 8),
             num_examples=2),
    conv_row("winograd-folded", lambda: Folded(nn.Conv2d(16, 16, 3, padding=1)), "several images an example", normal(3, 16, 4, 4),
             num_examples=2),
)  # fmt: skip

# Lines that fill vectors badly: lanes run along channels, or along columns of the kernel and channels (csrc/kernels/convolution_lanes.h).
CHANNEL_LANES = (
    conv_row("channels", averaged(lambda: nn.Conv2d(6, 16, 5)), "LeNet's second layer: whole vectors of channels", normal(6, 14, 14),
             num_examples=3),
    conv_row("channels-two", averaged(lambda: nn.Conv2d(3, 6, 3, padding=1), nn.ReLU, lambda: nn.Conv2d(6, 16, 5)),
             "both terms of the tangent; columns of the kernel in the cotangent of the input", normal(3, 11, 10), num_examples=2),
    conv_row("channels-odd", averaged(lambda: nn.Conv2d(5, 13, (3, 5), padding=(2, 1))), "channels and taps left over", normal(5, 7, 9),
             num_examples=2),
    conv_row("channels-blocks", averaged(lambda: nn.Conv2d(2, 43, 3, padding=1)), "several blocks of channels, the last smaller",
             normal(2, 5, 9), num_examples=2),
    conv_row("channels-stride", averaged(lambda: nn.Conv2d(3, 32, 7, stride=2, padding=3)), "stride 2: runs of four and three taps",
             normal(3, 13, 19), num_examples=2),
    conv_row("channels-dilation", averaged(lambda: nn.Conv2d(4, 6, 3), nn.ReLU, lambda: nn.Conv2d(6, 16, (2, 3), dilation=2, padding=1)),
             "columns of the kernel that are not neighbours", normal(4, 11, 12), num_examples=2),
    conv_row("channels-long", averaged(lambda: nn.Conv2d(64, 16, (3, 9), padding=(1, 4))),
             "more terms than are summed at once, long kernels", normal(64, 5, 9), num_examples=1),
    conv_row("channels-plane", averaged(lambda: nn.Conv2d(2, 16, 3)), "a plane of more positions than are summed at once",
             normal(2, 27, 27), num_examples=2),
    conv_row("channels-three-axes",
             stack(lambda: nn.Conv3d(3, 16, (2, 3, 3), padding=1), nn.Tanh, lambda: nn.AdaptiveAvgPool3d(1), nn.Flatten),
             "three axes", normal(3, 3, 4, 5), num_examples=2),
    conv_row("channels-curved", averaged(lambda: nn.Conv2d(3, 4, 3), nn.Tanh, lambda: nn.Conv2d(4, 16, 5)),
             "second derivatives: shared cotangents, kernels of each right-hand side", normal(3, 11, 11), num_examples=2),
    conv_row("channels-residual", lambda: Residual(nn.Conv2d(6, 6, 5, padding=2), nn.Conv2d(6, 6, (3, 1), padding=(1, 0)), channels=6),
             "cotangents add up in an input", normal(6, 5, 9), num_examples=2),
    conv_row("channels-transposed", averaged(lambda: nn.ConvTranspose2d(16, 6, 5)), "the transposed layer", normal(16, 6, 6),
             num_examples=2),
    conv_row("channels-many", averaged(lambda: nn.Conv2d(6, 16, 5)), "several tiles of examples", normal(6, 9, 9), num_examples=19),
)  # fmt: skip

# Convolutions of which a max pool takes some elements (takes_picks in csrc/kernels/convolution_picks.h): one node where there is AVX-512.
POOLED = (
    conv_row("picks", averaged(lambda: nn.Conv2d(1, 6, 5, padding=2), nn.ReLU, halves, lambda: nn.Conv2d(6, 16, 5), nn.ReLU, halves),
             "LeNet's: windows side by side in a vector, and cotangents of the chosen elements", normal(1, 18, 18), num_examples=3),
    conv_row("picks-many", averaged(lambda: nn.Conv2d(2, 12, 5), nn.ReLU, halves), "several tiles of examples", normal(2, 10, 10),
             num_examples=19),
    conv_row("picks-plain", averaged(lambda: nn.Conv2d(2, 5, 3), halves), "an activation behind the pool alone", normal(2, 8, 9)),
    conv_row("picks-curved", averaged(lambda: nn.Conv2d(2, 5, 3), nn.Tanh, halves), "an activation with second derivatives",
             normal(2, 8, 9)),
    conv_row("picks-saturated", averaged(lambda: nn.Conv2d(2, 5, 3), lambda: nn.Hardtanh(-0.1, 0.1), halves),
             "windows where several elements, or all, are at a bound", normal(2, 8, 9)),
    conv_row("picks-blocks", averaged(lambda: nn.Conv2d(2, 21, 5), nn.ReLU, halves), "more channels than lanes", normal(2, 9, 12),
             num_examples=2),
    conv_row("picks-deep", averaged(lambda: nn.Conv2d(24, 6, 5), halves), "more terms than are summed in registers", normal(24, 10, 11),
             num_examples=2),
    conv_row("picks-long", averaged(lambda: nn.Conv2d(1, 3, (2, 5)), nn.ReLU, halves), "lines of several groups, with windows left over",
             normal(1, 5, 47), num_examples=2),
    conv_row("picks-tall", averaged(lambda: nn.Conv2d(2, 4, (7, 1)), lambda: nn.MaxPool2d((2, 3))), "tall kernels, wide windows",
             normal(2, 10, 13)),
    conv_row("picks-flat", averaged(lambda: nn.Conv2d(2, 4, (1, 4)), lambda: nn.MaxPool2d(2, (2, 3))), "rows of taps, gaps between windows",
             normal(2, 4, 13)),
    conv_row("picks-overlap", averaged(lambda: nn.Conv2d(1, 6, 3, padding=1), nn.ReLU, lambda: nn.MaxPool2d((2, 3), 2, (0, 1))),
             "an element may win several windows", normal(1, 8, 9)),
    conv_row("picks-padded", averaged(lambda: nn.Conv2d(1, 2, 3, padding=1), nn.Tanh, lambda: nn.Conv2d(2, 8, 5, padding=(1, 4)), halves),
             "cotangents with zeros around them and without", normal(1, 8, 7), num_examples=2),
    conv_row("picks-frozen", averaged(lambda: nn.Conv2d(1, 2, 3), lambda: frozen(nn.Conv2d(2, 8, 3), "weight"), nn.ReLU, halves),
             "only the bias is trainable", normal(1, 10, 9), num_examples=2),
)  # fmt: skip

PICKS = (
    *POOLED,
    conv_row("picks-shared", lambda: TwoReaders(nn.Conv2d(1, 6, 5), nn.MaxPool2d(2)), "another reader: every element is wanted",
             normal(1, 8, 8)),
)  # fmt: skip

POOLING = (
    row("max-pool2d", "max_pool", pooled(nn.MaxPool2d(2)), "the plain layer", normal(1, 5, 7)),
    row("max-pool2d-overlap", "max_pool", pooled(nn.MaxPool2d(3, 1)), "an input may win several windows", normal(1, 5, 6)),
    row("max-pool2d-even", "max_pool", pooled(nn.MaxPool2d(3, 2)), "windows add up to the width, but overlap", normal(1, 7, 6)),
    row("max-pool2d-options", "max_pool", pooled(nn.MaxPool2d(3, 2, padding=1, dilation=(1, 2))), "padding never wins", normal(1, 7, 8)),
    row("max-pool2d-ceil", "max_pool", pooled(nn.MaxPool2d(2, ceil_mode=True)), "windows that reach over the edge", normal(1, 6, 6)),
    row("max-pool2d-gaps", "max_pool", pooled(nn.MaxPool2d(2, 3)), "inputs in no window", normal(1, 6, 7)),
    row("max-pool2d-ties", "max_pool", pooled(nn.ReLU(), nn.MaxPool2d(2)), "zeros that tie: the first wins", normal(1, 7, 7)),
    row("max-pool2d-indices", "max_pool", lambda: Pair(nn.Conv2d(1, 2, 2), nn.MaxPool2d(2, return_indices=True)),
        "the operator that returns indices too", normal(1, 5, 5)),
    row("max-pool1d", "max_pool", pooled(nn.MaxPool1d(3, 2, padding=1), dims=1), "one axis", normal(1, 8)),
    row("max-pool3d", "max_pool", pooled(nn.MaxPool3d(2, 1), dims=3), "three axes", normal(1, 4, 4, 3), num_examples=2),
    row("max-pool2d-adaptive", "max_pool", pooled(nn.AdaptiveMaxPool2d((2, 3))), "windows of unequal size", normal(1, 6, 6)),
    row("max-pool1d-adaptive", "max_pool", pooled(nn.AdaptiveMaxPool1d(3), dims=1), "one axis", normal(1, 8)),
    row("max-pool3d-adaptive", "max_pool", pooled(nn.AdaptiveMaxPool3d((2, 1, 2)), dims=3), "three axes", normal(1, 4, 3, 3),
        num_examples=2),
    row("avg-pool2d", "avg_pool", pooled(nn.AvgPool2d(2)), "the plain layer", normal(1, 5, 7)),
    row("avg-pool2d-padding", "avg_pool", pooled(nn.AvgPool2d(3, 2, padding=1)), "zeros of the padding count", normal(1, 6, 7)),
    row("avg-pool2d-no-padding", "avg_pool", pooled(nn.AvgPool2d(3, 2, padding=1, count_include_pad=False)), "or do not", normal(1, 6, 7)),
    row("avg-pool2d-ceil", "avg_pool", pooled(nn.AvgPool2d(3, 2, padding=1, ceil_mode=True)), "windows beyond padding", normal(1, 7, 5)),
    row("avg-pool2d-divisor", "avg_pool", pooled(nn.AvgPool2d((2, 3), divisor_override=5)), "a divisor of the user's", normal(1, 5, 7)),
    row("avg-pool1d", "avg_pool", pooled(nn.AvgPool1d(3, 2, padding=1), dims=1), "one axis", normal(1, 8)),
    row("avg-pool3d", "avg_pool", pooled(nn.AvgPool3d(2, (1, 2, 1), padding=1), dims=3), "three axes", normal(1, 3, 4, 3), num_examples=2),
    row("avg-pool2d-global", "avg_pool", pooled(nn.AdaptiveAvgPool2d(1), channels=5), "one window: the mean of the plane", normal(1, 4, 5)),
    row("avg-pool2d-adaptive", "avg_pool", pooled(nn.AdaptiveAvgPool2d((2, 4))), "windows of unequal size", normal(1, 6, 7)),
    row("avg-pool1d-adaptive", "avg_pool", pooled(nn.AdaptiveAvgPool1d(3), dims=1), "one axis", normal(1, 8)),
    row("avg-pool3d-adaptive", "avg_pool", pooled(nn.AdaptiveAvgPool3d(2), dims=3), "three axes", normal(1, 4, 3, 4), num_examples=2),
    row("avg-pool2d-twice", "avg_pool", lambda: TwoReaders(nn.Conv2d(1, 2, 2), nn.AvgPool2d(2), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(2)),
        "cotangents of several pools add up in one input", normal(1, 5, 5)),
)  # fmt: skip

CONVOLUTION = CONVOLUTIONS + WINOGRAD + CHANNEL_LANES + PICKS + POOLING
