"""Training problems for the adapters, and their Hessians in plain torch, dense, float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from influence_ext.adapters.torch_influence import AutogradInfluenceModule, BaseObjective, CGInfluenceModule

N, D, L2, DAMP = 41, 5, 0.03, 0.02
CPU = torch.device("cpu")
Loss = Callable[[Tensor, Tensor], Tensor]


class Objective(BaseObjective):
    """Outputs, loss and regulariser as given."""

    def __init__(self, loss: Loss, outputs: Callable[[Tensor], Tensor] = lambda z: z, regulariser: Any = None):
        self.loss, self.outputs = loss, outputs
        self.l2 = L2
        self.regulariser = regulariser

    def train_outputs(self, model: nn.Module, batch: Any) -> Tensor:
        return self.outputs(model(batch[0]))

    def train_loss_on_outputs(self, outputs: Tensor, batch: Any) -> Tensor:
        return self.loss(outputs, batch[1])

    def train_regularization(self, params: Tensor) -> Tensor:
        return 0.5 * self.l2 * torch.square(params.norm()) if self.regulariser is None else self.regulariser(params)

    def test_loss(self, model: nn.Module, params: Tensor, batch: Any) -> Tensor:
        return self.train_loss_on_outputs(self.train_outputs(model, batch), batch)


def linear(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Objective, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    X = torch.randn(N, D, generator=generator, dtype=dtype)
    y = X @ torch.randn(D, 1, generator=generator, dtype=dtype) + torch.randn(N, 1, generator=generator, dtype=dtype)
    return seeded(lambda: nn.Linear(D, 1)).to(dtype), Objective(F.mse_loss), X, y


def logistic() -> tuple[nn.Module, Objective, Tensor, Tensor]:
    model, _, X, y = linear()
    return model, Objective(F.binary_cross_entropy, torch.sigmoid), X, (y > 0).double()


def network() -> tuple[nn.Module, Objective, Tensor, Tensor]:
    _, _, X, y = linear()
    model = seeded(lambda: nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, 3))).double()
    labels = (y[:, 0] > 0).long() + (X[:, 0] > 0).long()
    return model, Objective(F.cross_entropy, regulariser=lambda p: 0.1 * (p**4).sum() + 0.01 * p.sum() ** 2), X, labels


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return build()


def make(cls: type, problem: tuple, batch_size: int = 7, loader: Any = None, **options: Any) -> Any:
    model, objective, X, y = problem
    loader = loader or DataLoader(TensorDataset(X, y), batch_size=batch_size)
    return cls(model=model, objective=objective, train_loader=loader, test_loader=loader, device=CPU, **{"damp": DAMP, **options})


# Oracles: the batches' training losses as functions of the flat parameters, differentiated densely


def functional(model: nn.Module, function: Callable[..., Tensor], *args: Any) -> Callable[[Tensor], Tensor]:
    names = [(name, p.shape) for name, p in model.named_parameters() if p.requires_grad]

    class Call(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, theta: Tensor, with_theta: bool) -> Tensor:
            return function(self.model, *((theta,) if with_theta else ()), *args)

    def at(theta: Tensor, with_theta: bool = False) -> Tensor:
        pieces = theta.split([shape.numel() for _, shape in names])
        named = {f"model.{name}": piece.view(shape) for (name, shape), piece in zip(names, pieces, strict=True)}
        return torch.func.functional_call(Call(), named, (theta, with_theta))

    return at


def theta_of(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters() if p.requires_grad])


def in_batches(X: Tensor, y: Tensor, size: int) -> Iterator[list[Tensor]]:
    for start in range(0, len(X), size):
        yield [X[start : start + size], y[start : start + size]]


def dense(problem: tuple, gnh: bool, batch_size: int = 7, batches: list | None = None) -> Tensor:
    """The mean over batches, by size, of their Hessians; with ``gnh`` of their Gauss-Newton matrices; without damping."""
    model, objective, X, y = problem
    theta, total = theta_of(model), 0.0
    for batch in batches or in_batches(X, y, batch_size):
        if gnh:
            outputs = functional(model, objective.train_outputs, batch)
            z = outputs(theta).detach()
            J = torch.autograd.functional.jacobian(outputs, theta).reshape(z.numel(), -1)
            H = torch.autograd.functional.hessian(lambda z, batch=batch: objective.train_loss_on_outputs(z, batch), z)
            part = J.T @ H.reshape(z.numel(), -1) @ J
            part = part + torch.autograd.functional.hessian(objective.train_regularization, theta)
        else:
            risk = functional(model, objective.train_loss, batch)
            part = torch.autograd.functional.hessian(lambda t, risk=risk: risk(t, True), theta)
        total = total + part * len(batch[0]) / (sum(len(b[0]) for b in batches) if batches else len(X))
    return total


def gradient(problem: tuple, rows: list[int], train: bool) -> Tensor:
    model, objective, X, y = problem
    function = functional(model, objective.train_loss if train else objective.test_loss, [X[rows], y[rows]])
    return torch.autograd.functional.jacobian(lambda t: function(t, True), theta_of(model))


def vector(size: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(3), dtype=dtype)


def close(a: Tensor, b: Tensor, rtol: float = 1e-8) -> None:
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    assert float((a - b).abs().max()) <= rtol * float(b.abs().max())


def damped(H: Tensor, damp: float = DAMP) -> Tensor:
    return H + damp * torch.eye(len(H), dtype=H.dtype)


MODULES = [
    (AutogradInfluenceModule, {}, False),
    (CGInfluenceModule, {"rtol": 1e-13}, False),
    (CGInfluenceModule, {"rtol": 1e-13, "gnh": True}, True),
]
