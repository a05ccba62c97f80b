"""The class that curvlinops' own functions take: theirs where it is installed, ours of the same interface elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from influence_ext.adapters.curvlinops.standin import PyTorchLinearOperator
else:
    try:
        from curvlinops._torch_base import PyTorchLinearOperator
    except ImportError:
        from influence_ext.adapters.curvlinops.standin import PyTorchLinearOperator

__all__ = ["IdentityLinearOperator", "PyTorchLinearOperator"]


class IdentityLinearOperator(PyTorchLinearOperator):
    """The identity on tensors of the given shapes, for damping: ``G + 1e-3 * IdentityLinearOperator(shapes, device, dtype)``.

    Args:
        shape: shapes of the parameters.
        device, dtype: of the vectors.
    """

    SELF_ADJOINT = True

    def __init__(self, shape: Sequence[Sequence[int]], device: torch.device, dtype: torch.dtype):
        super().__init__(shape, shape)
        self._device, self._dtype = device, dtype

    @property
    def device(self) -> torch.device:
        """Of the vectors."""
        return self._device

    @property
    def dtype(self) -> torch.dtype:
        """Of the vectors."""
        return self._dtype

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        return X

    def _adjoint(self) -> PyTorchLinearOperator:
        return self
