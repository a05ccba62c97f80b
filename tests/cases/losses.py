"""Losses: native module, oracle callable, outputs and targets.

``oracle`` is plain PyTorch and differs from the module under test only where PyTorch has no such module.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

LossFunction = Callable[[Tensor, Tensor], Tensor]


def half_mse(reduction: str) -> nn.Module:
    """The library's own module; imported late so that the oracles' tests need no extension."""
    from influence_ext.losses import HalfMSE

    return HalfMSE(reduction=reduction)


def half_mse_mean(z: Tensor, t: Tensor) -> Tensor:
    """Half the mean squared error over all entries."""
    return 0.5 * (z - t).square().mean()


def half_mse_sum(z: Tensor, t: Tensor) -> Tensor:
    """Half the sum of squared errors."""
    return 0.5 * (z - t).square().sum()


def normal_targets(z: Tensor, rng: Generator) -> Tensor:
    """Like ``z``, standard normal."""
    return torch.randn(z.shape, generator=rng, dtype=torch.float64)


def class_targets(z: Tensor, rng: Generator) -> Tensor:
    """``[N]`` class indices; the first and the last class occur where ``N > 1``."""
    t = torch.randint(0, z.shape[1], z.shape[:1], generator=rng)
    t[0], t[-1] = 0, z.shape[1] - 1
    return t


def hard_targets(z: Tensor, rng: Generator) -> Tensor:
    """Zeros and ones like ``z``."""
    return torch.randint(0, 2, z.shape, generator=rng).to(torch.float64)


def soft_targets(z: Tensor, rng: Generator) -> Tensor:
    """Uniform in ``[0, 1]`` like ``z``, the ends included."""
    t = torch.rand(z.shape, generator=rng, dtype=torch.float64)
    t.view(-1)[0], t.view(-1)[-1] = 0.0, 1.0
    return t


def normal_outputs(*out: int) -> Callable[[int, Generator], Tensor]:
    """``[N, *out]`` of moderate size."""
    return lambda N, rng: 2 * torch.randn(N, *out, generator=rng, dtype=torch.float64)


def saturated_outputs(*out: int) -> Callable[[int, Generator], Tensor]:
    """``[N, *out]`` with entries 0 and ±100 in every combination that occurs by chance."""
    return lambda N, rng: 100.0 * torch.randint(-1, 2, (N, *out), generator=rng).to(torch.float64)


MODULES: dict[str, Callable[[str], nn.Module]] = {
    "mse_loss": lambda reduction: nn.MSELoss(reduction=reduction),
    "half_mse_loss": half_mse,
    "cross_entropy": lambda reduction: nn.CrossEntropyLoss(reduction=reduction),
    "binary_cross_entropy_with_logits": lambda reduction: nn.BCEWithLogitsLoss(reduction=reduction),
}


@dataclass(frozen=True)
class LossCase:
    """One loss at outputs of one kind."""

    id: str
    loss: str
    reduction: str
    outputs: Callable[[int, Generator], Tensor]
    targets: Callable[[Tensor, Generator], Tensor]
    notes: str
    num_examples: int = 6
    saturated: bool = False

    def make(self) -> nn.Module:
        """The loss as a user would give it."""
        return MODULES[self.loss](self.reduction)

    def oracle(self) -> LossFunction:
        """The loss as a callable of plain PyTorch."""
        if self.loss == "half_mse_loss":
            return half_mse_mean if self.reduction == "mean" else half_mse_sum
        return self.make()

    def sample(self, key: str = "") -> tuple[Tensor, Tensor]:
        """Outputs ``[N, *out]`` and targets in float64; another ``key`` gives other outputs with the same targets."""
        rng = torch.Generator().manual_seed(zlib.crc32(f"{self.id}".encode()))
        z = self.outputs(self.num_examples, rng)
        t = self.targets(z, rng)
        if key:
            z = self.outputs(self.num_examples, rng.manual_seed(zlib.crc32(f"{self.id}/{key}".encode())))
        return z, t


MSE, HALF, CE, BCE = MODULES
N3, N1, N0 = normal_outputs(3), normal_outputs(1), normal_outputs()

ROWS = (
    LossCase("mse-mean", MSE, "mean", N3, normal_targets, "an example's loss is the mean over its entries"),
    LossCase("mse-sum", MSE, "sum", N3, normal_targets, "no mean over entries and no 1/N"),
    LossCase("mse-mean-1", MSE, "mean", N1, normal_targets, "C = 1: the plain regression"),
    LossCase("mse-sum-1", MSE, "sum", N1, normal_targets, "C = 1, summed"),
    LossCase("mse-mean-scalar", MSE, "mean", N0, normal_targets, "outputs [N] without a feature axis"),
    LossCase("mse-mean-seq", MSE, "mean", normal_outputs(4, 3), normal_targets, "[N, T, C]: mean over T·C entries"),
    LossCase("mse-sum-seq", MSE, "sum", normal_outputs(4, 3), normal_targets, "[N, T, C], summed"),
    LossCase("mse-mean-single", MSE, "mean", N3, normal_targets, "N = 1: 1/N is one", num_examples=1),
    LossCase("half-mse-mean", HALF, "mean", N3, normal_targets, "the one half enters once"),
    LossCase("half-mse-sum", HALF, "sum", N3, normal_targets, "½‖z−t‖²: the Hessian is the identity"),
    LossCase("half-mse-mean-1", HALF, "mean", N1, normal_targets, "the ridge regression of the closed forms"),
    LossCase("half-mse-mean-scalar", HALF, "mean", N0, normal_targets, "outputs [N] without a feature axis"),
    LossCase("ce-mean", CE, "mean", normal_outputs(4), class_targets, "Hessian singular along the ones vector"),
    LossCase("ce-sum", CE, "sum", normal_outputs(4), class_targets, "summed over examples"),
    LossCase("ce-mean-2", CE, "mean", normal_outputs(2), class_targets, "the smallest number of classes"),
    LossCase("ce-mean-33", CE, "mean", normal_outputs(33), class_targets, "more classes than a vector register, odd"),
    LossCase("ce-mean-single", CE, "mean", normal_outputs(4), class_targets, "N = 1", num_examples=1),
    LossCase(
        "ce-mean-saturated",
        CE,
        "mean",
        saturated_outputs(4),
        class_targets,
        "logits of ±100: exp overflows in float32 unless shifted; ties of the largest logit",
        num_examples=12,
        saturated=True,
    ),
    LossCase("bce-mean", BCE, "mean", N3, hard_targets, "several labels: mean over the entries of an example"),
    LossCase("bce-sum", BCE, "sum", N3, hard_targets, "several labels, summed"),
    LossCase("bce-mean-1", BCE, "mean", N1, hard_targets, "C = 1: the plain binary classifier"),
    LossCase("bce-mean-scalar", BCE, "mean", N0, hard_targets, "outputs [N] without a feature axis"),
    LossCase("bce-mean-soft", BCE, "mean", N3, soft_targets, "targets inside [0, 1], both ends included"),
    LossCase("bce-sum-soft-1", BCE, "sum", N1, soft_targets, "C = 1, soft targets, summed"),
    LossCase(
        "bce-mean-saturated",
        BCE,
        "mean",
        saturated_outputs(3),
        soft_targets,
        "logits of ±100: σ(1−σ) and log(1 + exp) at both ends",
        num_examples=12,
        saturated=True,
    ),
)

LOSSES = {row.id: row for row in ROWS}

FUNCTIONALS = {MSE: F.mse_loss, CE: F.cross_entropy, BCE: F.binary_cross_entropy_with_logits}
"""PyTorch's functional of each loss that has one; the key is its name."""
