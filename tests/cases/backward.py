"""Networks for what hooks into ``loss.backward()``, and what it should find there: a loop over examples of torch's own autograd."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

N = 6


class Sequence(nn.Module):
    """Embedding, attention, norms and a tied head; one loss term a position."""

    def __init__(self, norm: Callable[[int], nn.Module] = nn.LayerNorm, tied: bool = True):
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.mix, self.first, self.norm = nn.Linear(8, 24), norm(8), norm(8)
        self.head = nn.Linear(8, 11, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """``[N, T] -> [N, K, T]``."""
        h = self.first(self.table(tokens))
        q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in self.mix(h).chunk(3, dim=-1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return self.head(self.norm(h + mixed)).transpose(1, 2)


class Twice(nn.Module):
    """A layer used twice, a bare parameter, and a parameter that nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(4, 4), nn.Parameter(torch.tensor([0.5, 1.0, 2.0, -1.0]))
        self.unread = nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        """``[N, 4] -> [N, 4]``."""
        return self.layer(torch.tanh(self.layer(x)) * self.scale)


@dataclass(frozen=True)
class Row:
    """A network, its inputs, and a loss with its targets."""

    make: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    targets: Callable[[Tensor], Tensor]
    loss: Callable[..., Tensor]

    def problem(self) -> tuple[nn.Module, Tensor, Tensor]:
        """The network in float64 and training mode, inputs, targets."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(11)
            model, X = self.make().double().train(), self.inputs()
            X = X.double() if X.is_floating_point() else X
            return model, X, self.targets(model(X).detach())


def images() -> Tensor:
    return torch.randn(N, 2, 8, 8)


def labels(z: Tensor) -> Tensor:
    return torch.randint(0, z.shape[1], (N, *z.shape[2:]))


def numbers(z: Tensor) -> Tensor:
    return torch.randn_like(z)


def convolutional(norm: nn.Module) -> nn.Module:
    layers = [
        # A bias before an instance norm has no gradient.
        nn.Conv2d(2, 4, 3, padding=1, stride=2, bias=not isinstance(norm, nn.InstanceNorm2d)),
        norm,
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, groups=2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(24, 3),
    ]
    return nn.Sequential(*layers)


def frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    model[0].weight.requires_grad_(False)
    return model


def tokens() -> Tensor:
    return torch.randint(0, 11, (N, 5))


def rows() -> Tensor:
    return torch.randn(N, 4)


ROWS = {
    "mlp": Row(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), rows, labels, F.cross_entropy),
    "regression": Row(lambda: nn.Sequential(nn.Linear(4, 5), nn.SiLU(), nn.Linear(5, 2)), rows, numbers, F.mse_loss),
    "conv": Row(lambda: convolutional(nn.Identity()), images, labels, F.cross_entropy),
    "group-norm": Row(lambda: convolutional(nn.GroupNorm(2, 4)), images, labels, F.cross_entropy),
    "instance-norm": Row(lambda: convolutional(nn.InstanceNorm2d(4, affine=True)), images, labels, F.cross_entropy),
    "conv1d": Row(lambda: nn.Sequential(nn.Conv1d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2)),
                  lambda: torch.randn(N, 3, 5), labels, F.cross_entropy),
    "conv3d": Row(lambda: nn.Sequential(nn.Conv3d(1, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)),
                  lambda: torch.randn(N, 1, 3, 3, 3), labels, F.cross_entropy),
    "sequence": Row(Sequence, tokens, labels, F.cross_entropy),
    "rms-norm": Row(lambda: Sequence(nn.RMSNorm, tied=False), tokens, labels, F.cross_entropy),
    "positions": Row(lambda: nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 2)),
                     lambda: torch.randn(N, 3, 4), numbers, F.mse_loss),
    "twice": Row(Twice, rows, numbers, F.mse_loss),
    "frozen": Row(frozen, rows, labels, F.cross_entropy),
}  # fmt: skip

WIDE = Row(lambda: nn.Sequential(nn.Linear(4, 512), nn.Tanh(), nn.Linear(512, 3)), rows, labels, F.cross_entropy)
"""Its gradients are large enough for their memory to be kept (:func:`influence_ext.set_cache_limit`)."""


def expected(row: Row, model: nn.Module, X: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Name -> ``[N, *shape]``: gradients of each example's own loss, as a batch of one; a parameter that is not read is left out."""
    model = copy.deepcopy(model)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found: dict[str, list[Tensor]] = {name: [] for name in named}
    for n in range(len(X)):
        grads = torch.autograd.grad(row.loss(model(X[n : n + 1]), y[n : n + 1]), list(named.values()), allow_unused=True)
        for name, g in zip(named, grads, strict=True):
            if g is not None:
                found[name].append(g)
    return {name: torch.stack(grads) for name, grads in found.items() if grads}
