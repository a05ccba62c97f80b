"""What torch-influence computes, in plain PyTorch: one pass over the loader for a product, differentiated anew for every batch.

It stands in for the original where that is not installed. Names and arguments are those of the adapter, as far as the benchmark uses them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, cg
from torch import Tensor, nn
from torch.autograd.functional import hessian, hvp, jvp, vjp
from torch.utils.data import DataLoader, RandomSampler, Subset


class Module:
    """Derivatives by ``torch.autograd.functional``, with the parameters replaced by views of a flat vector."""

    def __init__(self, model: nn.Module, objective: Any, train_loader: DataLoader, test_loader: DataLoader, device: Any, damp: float):
        self.model, self.objective, self.damp = model.eval().to(device), objective, damp
        self.train_loader, self.test_loader = train_loader, test_loader
        self.places = [(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name, _ in model.named_parameters()]
        self.parameters = tuple(model.parameters())

    def influences(self, train_idxs: list[int], test_idxs: list[int]) -> Tensor:
        stest = self.inverse_hvp(self.gradient(self.test_loader, test_idxs))
        scores = [g @ stest for g, _ in self._gradients(self.train_loader, train_idxs, 1, self.objective.train_loss)]
        return torch.stack(scores) / len(self.train_loader.dataset)

    def gradient(self, loader: DataLoader, idxs: list[int]) -> Tensor:
        return sum(g * size for g, size in self._gradients(loader, idxs, loader.batch_size, self.objective.test_loss)) / len(idxs)

    def inverse_hvp(self, vec: Tensor) -> Tensor:
        raise NotImplementedError

    def _gradients(self, loader: DataLoader, idxs: list[int], batch_size: int, loss: Any) -> Iterator[tuple[Tensor, int]]:
        for batch in DataLoader(Subset(loader.dataset, idxs), batch_size=batch_size):
            value = loss(model=self.model, params=torch.cat([p.view(-1) for p in self.parameters]), batch=batch)
            yield torch.cat([g.view(-1) for g in torch.autograd.grad(value, self.parameters)]), len(batch[0])

    def _free(self) -> Tensor:
        """Take the parameters off the model; ``_restore`` puts them back."""
        for owner, name in self.places:
            delattr(owner, name)
        return torch.cat([p.detach().view(-1) for p in self.parameters])

    def _restore(self) -> None:
        for (owner, name), p in zip(self.places, self.parameters, strict=True):
            setattr(owner, name, p)

    def _set(self, theta: Tensor) -> nn.Module:
        pieces = theta.split([p.numel() for p in self.parameters])
        for (owner, name), piece, p in zip(self.places, pieces, self.parameters, strict=True):
            setattr(owner, name, piece.view(p.shape))
        return self.model

    def _risk(self, batch: Any) -> Any:
        return lambda theta: self.objective.train_loss(self._set(theta), theta, batch)

    def _product(self, batch: Any, theta: Tensor, v: Tensor, gnh: bool) -> Tensor:
        if not gnh:
            return hvp(self._risk(batch), theta, v)[1]

        def outputs(at: Tensor) -> Tensor:
            return self.objective.train_outputs(self._set(at), batch)

        z, tangent = jvp(outputs, theta, v)
        cotangent = hvp(lambda out: self.objective.train_loss_on_outputs(out, batch), z, tangent)[1]
        return vjp(outputs, theta, cotangent)[1] + hvp(self.objective.train_regularization, theta, v)[1]


class AutogradInfluenceModule(Module):
    """The Hessian, formed and inverted."""

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        theta, N, total = self._free(), len(self.train_loader.dataset), 0.0
        for batch in DataLoader(self.train_loader.dataset, batch_size=self.train_loader.batch_size):
            total = total + hessian(self._risk(batch), theta) * (len(batch[0]) / N)
        self._restore()
        self.inverse = torch.inverse(total + self.damp * torch.eye(len(theta)))

    def inverse_hvp(self, vec: Tensor) -> Tensor:
        return self.inverse @ vec


class CGInfluenceModule(Module):
    """SciPy's conjugate gradients."""

    def __init__(self, gnh: bool = False, **kwargs: Any):
        own = {name: kwargs.pop(name) for name in ("model", "objective", "train_loader", "test_loader", "device", "damp")}
        super().__init__(**own)
        self.gnh, self.cg_options = gnh, kwargs

    def inverse_hvp(self, vec: Tensor) -> Tensor:
        theta, N = self._free(), len(self.train_loader.dataset)

        def multiply(x: np.ndarray) -> np.ndarray:
            v = torch.tensor(x, dtype=vec.dtype)
            total = self.damp * v
            for batch in DataLoader(self.train_loader.dataset, batch_size=self.train_loader.batch_size):
                total = total + self._product(batch, theta, v, self.gnh).detach() * (len(batch[0]) / N)
            return total.numpy()

        found = cg(LinearOperator((len(vec),) * 2, matvec=multiply), vec.numpy(), **self.cg_options)[0]
        self._restore()
        return torch.tensor(found)


class LiSSAInfluenceModule(Module):
    """The truncated Neumann series on random batches."""

    def __init__(self, repeat: int, depth: int, scale: float, gnh: bool = False, **kwargs: Any):
        super().__init__(**kwargs)
        self.gnh, self.repeat, self.depth, self.scale = gnh, repeat, depth, scale

    def inverse_hvp(self, vec: Tensor) -> Tensor:
        theta, size, total = self._free(), self.train_loader.batch_size, torch.zeros_like(vec)
        for _ in range(self.repeat):
            h = vec
            sampler = RandomSampler(self.train_loader.dataset, replacement=True, num_samples=self.depth * size)
            for batch in DataLoader(self.train_loader.dataset, batch_size=size, sampler=sampler):
                h = vec + h - (self._product(batch, theta, h, self.gnh).detach() + self.damp * h) / self.scale
            total += h / self.scale
        self._restore()
        return total / self.repeat
