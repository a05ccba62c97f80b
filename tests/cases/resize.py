"""One row per kind and option of interpolation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from tests.cases import NetworkCase
from tests.cases.convolution import Folded, Residual, pooled
from tests.cases.layers import expression, normal, row


class Resized(nn.Module):
    """``F.interpolate`` with its options."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, *spatial]``."""
        return F.interpolate(x, **self.options)


def resize_row(id: str, notes: str, inputs: tuple[int, ...], num_examples: int = 3, **options: Any) -> NetworkCase:
    """A convolution under ``F.interpolate(**options)``; ``inputs`` are the spatial sizes before the convolution, which takes one off."""
    make: Callable[[], nn.Module] = pooled(Resized(**options), dims=len(inputs))
    return row(f"resize-{id}", "resize", make, notes, normal(1, *inputs), num_examples=num_examples)


RESIZE = (
    resize_row("nearest", "each element four times", (4, 5), scale_factor=2),
    resize_row("nearest-odd", "a factor that is no whole number", (4, 6), scale_factor=1.7),
    resize_row("nearest-down", "inputs that nothing reads", (6, 8), size=(3, 2)),
    resize_row("nearest-1d", "one axis", (6,), size=13),
    resize_row("nearest-3d", "three axes", (3, 4, 3), scale_factor=(2, 1, 3), num_examples=2),
    resize_row("nearest-exact", "the middle of each interval", (5, 6), size=(7, 3), mode="nearest-exact"),
    resize_row("nearest-exact-1d", "one axis", (6,), scale_factor=0.6, mode="nearest-exact"),
    resize_row("nearest-exact-3d", "three axes", (3, 4, 3), size=(3, 2, 5), mode="nearest-exact", num_examples=2),
    resize_row("linear", "one axis", (6,), scale_factor=2, mode="linear"),
    resize_row("linear-aligned", "corners stay", (6,), size=9, mode="linear", align_corners=True),
    resize_row("bilinear", "two axes", (4, 6), scale_factor=2, mode="bilinear"),
    resize_row("bilinear-aligned", "corners stay", (4, 6), size=(7, 8), mode="bilinear", align_corners=True),
    resize_row("bilinear-down", "inputs that nothing reads", (9, 8), size=(3, 2), mode="bilinear"),
    resize_row("bilinear-factor", "the factor given is not the quotient of the sizes", (4, 6), scale_factor=(1.3, 2.5), mode="bilinear"),
    resize_row("bilinear-recomputed", "the factor taken from the sizes", (4, 6), scale_factor=1.3, mode="bilinear",
               recompute_scale_factor=True),
    resize_row("bilinear-one", "an axis of one entry", (2, 5), size=(3, 5), mode="bilinear"),
    resize_row("bilinear-to-one", "to one entry, aligned", (4, 5), size=1, mode="bilinear", align_corners=True),
    resize_row("bilinear-wide", "lines of more than a vector", (3, 22), size=(5, 41), mode="bilinear"),
    resize_row("bilinear-single", "N = 1", (4, 5), scale_factor=2, mode="bilinear", num_examples=1),
    resize_row("bilinear-antialias", "a filter as wide as the step", (9, 8), size=(3, 5), mode="bilinear", antialias=True),
    resize_row("trilinear", "three axes", (3, 4, 3), scale_factor=2, mode="trilinear", num_examples=2),
    resize_row("trilinear-aligned", "three axes, corners stay", (3, 4, 3), size=(4, 5, 2), mode="trilinear", align_corners=True,
               num_examples=2),
    resize_row("bicubic", "four neighbours, some of them beyond the edge", (4, 5), scale_factor=2, mode="bicubic"),
    resize_row("bicubic-aligned", "corners stay", (6, 5), size=(4, 9), mode="bicubic", align_corners=True),
    resize_row("bicubic-antialias", "a filter as wide as the step", (9, 9), size=(4, 3), mode="bicubic", antialias=True),
    row("resize-folded", "resize", lambda: Folded(nn.Sequential(nn.Conv2d(2, 2, 2), nn.Upsample(scale_factor=2))),
        "several images an example", normal(3, 2, 3, 4)),
    row("resize-twice", "resize", lambda: Residual(nn.Sequential(nn.MaxPool2d(2), nn.Upsample(scale_factor=2, mode="bilinear")),
                                                   nn.Sequential(nn.AvgPool2d(2), nn.Upsample(scale_factor=2))),
        "cotangents of both branches add up", normal(2, 4, 4)),
    expression("resize-like", "resize", lambda m, x: F.interpolate(m.conv(x), size=x.shape[-2:], mode="bilinear").flatten(1),
               "to the size of another tensor", normal(1, 6, 5), conv=lambda: nn.Conv2d(1, 2, 3)),
)  # fmt: skip
