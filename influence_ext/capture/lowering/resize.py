"""Interpolation of one to three spatial axes: a linear map for each axis, found by running torch's operator on unit vectors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from influence_ext.capture.context import Context, Value, target_of
from influence_ext.capture.lowering.convolution import three
from influence_ext.capture.lowering.table import Lowering, argument, named

# kind of interpolation -> the operator that does it along one axis, and whether that axis comes with another one of length 1
_ALONG_AXIS: dict[str, tuple[Any, bool]] = {
    "nearest": (torch.ops.aten.upsample_nearest1d.default, False),
    "nearest_exact": (torch.ops.aten._upsample_nearest_exact1d.default, False),
    "linear": (torch.ops.aten.upsample_linear1d.default, False),
    "cubic": (torch.ops.aten.upsample_bicubic2d.default, True),
    "linear_aa": (torch.ops.aten._upsample_bilinear2d_aa.default, True),
    "cubic_aa": (torch.ops.aten._upsample_bicubic2d_aa.default, True),
}


def _resize(kind: str, dims: int) -> Lowering:
    """``upsample_*(x, output_size, [align_corners,] scales...)``, and the form with a list of factors (``vec``)."""

    def lowering(context: Context, node: fx.Node) -> Value | None:
        if not context.is_batched(node.args[0]):
            return None
        value, layout = context.value(node.args[0]), context.layout(node)
        if layout is None or value.axis >= len(value.shape) - dims or layout.shape[:-dims] != value.shape[:-dims]:
            return None
        sizes, outputs = value.shape[-dims:], layout.shape[-dims:]
        aligned = None if kind.startswith("nearest") else bool(argument(node, 2, "align_corners", False))
        scales = _scales(node, dims, first=2 if aligned is None else 3)
        lists: dict[str, list[int]] = {"input": three(sizes, 1), "output": three(outputs, 1)}
        forward: list[Tensor] = []
        backward: list[Tensor] = []
        for axis in range(3):
            mine = axis - (3 - dims)
            matrix = torch.ones(1, 1, dtype=context.dtype)
            if mine >= 0:
                matrix = _matrix(kind, sizes[mine], outputs[mine], aligned, scales[mine], context.dtype)
            for prefix, found, weights in (("", matrix, forward), ("back_", matrix.T, backward)):
                lists[f"{prefix}begin_{axis}"], lists[f"{prefix}end_{axis}"], band = _bands(found)
                weights.append(band)
        key = (kind, sizes, outputs, aligned, *scales)
        slot = context.table.constant(key, f"{node.name}_weights", torch.cat([*forward, *backward]))
        return context.emit(node, "resize", [value], [slot], lists=lists)

    return lowering


def _scales(node: fx.Node, dims: int, first: int) -> list[float | None]:
    """The factor of each axis where one was given; it need not be the quotient of the sizes."""
    if target_of(node).endswith(".vec"):
        factors = argument(node, first, "scale_factors", None)
        return [None] * dims if factors is None else [float(factor) for factor in factors]
    names = ["scales"] if dims == 1 else ["scales_d", "scales_h", "scales_w"][3 - dims :]
    found = [argument(node, first + i, name, None) for i, name in enumerate(names)]
    return [None if factor is None else float(factor) for factor in found]


def _matrix(kind: str, size: int, outputs: int, aligned: bool | None, scale: float | None, dtype: torch.dtype) -> Tensor:
    """``[outputs, size]``: the operator's results for unit vectors, in the arithmetic of ``dtype``."""
    operator, with_another = _ALONG_AXIS[kind]
    units = torch.eye(size, dtype=dtype)[:, None]
    options = [] if aligned is None else [aligned]
    if with_another:
        # The other axis comes first: with a last one of length 1, torch 2.13 smooths wrongly.
        return operator(units[:, None], [1, outputs], *options, None, scale)[:, 0, 0].T
    return operator(units, [outputs], *options, scale)[:, 0].T


def _bands(matrix: Tensor) -> tuple[list[int], list[int], Tensor]:
    """For each row the first column that is not zero, the end of these, and all entries between, row by row."""
    begins, ends, entries = [], [], []
    for row in matrix:
        places = row.nonzero()[:, 0]
        begin, end = (int(places[0]), int(places[-1]) + 1) if len(places) else (0, 0)
        begins.append(begin)
        ends.append(end)
        entries.append(row[begin:end])
    return begins, ends, torch.cat(entries)


LOWERINGS: dict[str, Lowering] = {}
for _name, _kind, _dims in (
    ("upsample_nearest1d", "nearest", 1),
    ("upsample_nearest2d", "nearest", 2),
    ("upsample_nearest3d", "nearest", 3),
    ("_upsample_nearest_exact1d", "nearest_exact", 1),
    ("_upsample_nearest_exact2d", "nearest_exact", 2),
    ("_upsample_nearest_exact3d", "nearest_exact", 3),
    ("upsample_linear1d", "linear", 1),
    ("upsample_bilinear2d", "linear", 2),
    ("upsample_trilinear3d", "linear", 3),
    ("upsample_bicubic2d", "cubic", 2),
    ("_upsample_bilinear2d_aa", "linear_aa", 2),
    ("_upsample_bicubic2d_aa", "cubic_aa", 2),
):
    LOWERINGS |= named(_resize(_kind, _dims), f"{_name}.default {_name}.vec")
