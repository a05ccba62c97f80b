"""Is every element of a tensor finite? Asked of parameters, data and outputs at every entry, so it is one pass in the extension."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import influence_ext._C as _C

_NATIVE = (torch.float32, torch.float64)


def all_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite. Cost: one pass, nothing allocated where the tensor is contiguous and on the CPU."""
    if _is_plain(tensor):
        return _C.all_finite(tensor)
    return not (tensor.is_floating_point() or tensor.is_complex()) or bool(torch.isfinite(tensor).all())


def flatten_finite(tensors: Sequence[Tensor]) -> tuple[Tensor, bool]:
    """Tensors of one dtype one after another as a new vector, detached, and whether no element of it is NaN or infinite."""
    if all(map(_is_plain, tensors)):
        return _C.flatten_finite(tensors)
    flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
    return flat, all_finite(flat)


def _is_plain(tensor: Tensor) -> bool:
    return tensor.dtype in _NATIVE and tensor.is_cpu and tensor.is_contiguous()
