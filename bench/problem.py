"""A workload made concrete, and its losses."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def mse(z: Tensor, y: Tensor) -> Tensor:
    """``F.mse_loss`` in elementary operations: forward-over-reverse mode fails on the fused one."""
    return ((z - y) ** 2).mean()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mse": mse, "cross_entropy": F.cross_entropy}
LOSS_MODULES: dict[str, Callable[[], nn.Module]] = {"mse": nn.MSELoss, "cross_entropy": nn.CrossEntropyLoss}


@dataclass(frozen=True, eq=False)
class Problem:
    """A network in evaluation mode, its data and the vectors to multiply or to solve for."""

    model: nn.Module
    loss: str
    X: Tensor
    y: Tensor
    vectors: Tensor  # [V, P]
    damping: float

    @property
    def loss_fn(self) -> Callable[[Tensor, Tensor], Tensor]:
        return LOSSES[self.loss]

    @property
    def nbytes(self) -> int:
        """Of network, data and vectors."""
        held = [*self.model.parameters(), *self.model.buffers(), self.X, self.y, self.vectors]
        return sum(t.nbytes for t in held)

    def on(self, device: torch.device) -> Problem:
        """The same problem in the memory of ``device``."""
        model = copy.deepcopy(self.model).to(device)
        return replace(self, model=model, X=self.X.to(device), y=self.y.to(device), vectors=self.vectors.to(device))

    def to(self, dtype: torch.dtype) -> Problem:
        """The same problem, rounded to or extended from its float32 or float64 numbers."""
        y = self.y.to(dtype) if self.y.is_floating_point() else self.y
        model = copy.deepcopy(self.model).to(dtype)
        X = self.X.to(dtype) if self.X.is_floating_point() else self.X
        return replace(self, model=model, X=X, y=y, vectors=self.vectors.to(dtype))

    def first(self, num_examples: int, num_vectors: int) -> Problem:
        """The same network with fewer examples and vectors."""
        return replace(self, X=self.X[:num_examples], y=self.y[:num_examples], vectors=self.vectors[:num_vectors])
