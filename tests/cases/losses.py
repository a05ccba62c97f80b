"""Losses: what a user passes, oracles in plain PyTorch, outputs and targets."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

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


def ignored_targets(index: int, whole: bool = True) -> Callable[[Tensor, Generator], Tensor]:
    """Class indices at every position, about a third of them ``index``; with ``whole`` the second example counts nowhere."""

    def draw(z: Tensor, rng: Generator) -> Tensor:
        t = torch.randint(0, z.shape[1], z.shape[:1] + z.shape[2:], generator=rng)
        t[torch.rand(t.shape, generator=rng) < 0.3] = index
        t[0], t[-1] = 0, z.shape[1] - 1
        if whole:
            t[1] = index
        return t

    return draw


def place_targets(z: Tensor, rng: Generator) -> Tensor:
    """``[N, d1, ...]`` class indices of outputs ``[N, K, d1, ...]``."""
    return torch.randint(0, z.shape[1], z.shape[:1] + z.shape[2:], generator=rng)


def token_targets(z: Tensor, rng: Generator) -> Tensor:
    """``[N, T]`` class indices of outputs ``[N, T, K]``."""
    return torch.randint(0, z.shape[2], z.shape[:2], generator=rng)


def distributions(z: Tensor, rng: Generator) -> Tensor:
    """Probabilities over axis 1, those of the first example one-hot."""
    t = torch.softmax(2 * torch.randn(z.shape, generator=rng, dtype=torch.float64), dim=1)
    t[0] = 0
    t[0, 0] = 1
    return t


def counts(z: Tensor, rng: Generator) -> Tensor:
    """Whole numbers from 0 to 4 like ``z``, as floating point."""
    return torch.randint(0, 5, z.shape, generator=rng).to(torch.float64)


def with_variances(z: Tensor, rng: Generator) -> Tensor:
    """``[N, 2, *out]``: normal targets and variances between 0.1 and 2."""
    t = torch.randn(z.shape, generator=rng, dtype=torch.float64)
    return torch.stack([t, 0.1 + 1.9 * torch.rand(z.shape, generator=rng, dtype=torch.float64)], dim=1)


def linked_outputs(link: Callable[[Tensor], Tensor], *out: int) -> Callable[[int, Generator], Tensor]:
    """``[N, *out]`` of moderate size after ``link``."""
    return lambda N, rng: link(2 * torch.randn(N, *out, generator=rng, dtype=torch.float64))


def gaussian_nll(z: Tensor, t: Tensor, **options: Any) -> Tensor:
    """Targets and variances from one tensor."""
    return F.gaussian_nll_loss(z, t[:, 0], t[:, 1], **options)


def probability_cross_entropy(z: Tensor, t: Tensor, reduction: str, weight: Tensor | None = None) -> Tensor:
    """PyTorch's second derivative of ``F.binary_cross_entropy`` is that of another function: it adds 1e-12 to z and to 1 − z."""
    terms = -torch.xlogy(t, z) - torch.special.xlog1py(1 - t, -z)
    terms = terms if weight is None else weight * terms
    return terms.mean() if reduction == "mean" else terms.sum()


def log_cosh(z: Tensor, t: Tensor) -> Tensor:
    """A convex loss that PyTorch has no module for, averaged."""
    return F.softplus(2 * (z - t)).mean() - (z - t).mean()


def coupled(z: Tensor, t: Tensor) -> Tensor:
    """Convex, summed; its Hessian is not diagonal and depends on the target."""
    d = z.cumsum(dim=1) - t
    return (d.square() + 0.1 * d.square().square()).sum()


def token_cross_entropy(z: Tensor, t: Tensor) -> Tensor:
    """What users write for ``[N, T, K]``."""
    return F.cross_entropy(z.flatten(0, 1), t.flatten())


def branching(z: Tensor, t: Tensor) -> Tensor:
    """Control flow that reads a value, which vmap cannot do; averaged."""
    scale = 2.0 if float(t.sum()) > 0 else 1.0
    return (
        scale * (z - t).square().mean()
        if len(z) == 1
        else torch.stack([branching(a[None], b[None]) for a, b in zip(z, t, strict=True)]).mean()
    )


MODULES: dict[str, Callable[..., nn.Module]] = {
    "mse_loss": nn.MSELoss,
    "half_mse_loss": half_mse,
    "l1_loss": nn.L1Loss,
    "smooth_l1_loss": nn.SmoothL1Loss,
    "huber_loss": nn.HuberLoss,
    "cross_entropy": nn.CrossEntropyLoss,
    "nll_loss": nn.NLLLoss,
    "binary_cross_entropy_with_logits": nn.BCEWithLogitsLoss,
    "binary_cross_entropy": nn.BCELoss,
    "poisson_nll_loss": nn.PoissonNLLLoss,
    "gaussian_nll_loss": nn.GaussianNLLLoss,
}
PLAIN: dict[str, Callable[..., Tensor]] = {
    "half_mse_loss": lambda z, t, reduction: half_mse_mean(z, t) if reduction == "mean" else half_mse_sum(z, t),
    "binary_cross_entropy": probability_cross_entropy,
    "gaussian_nll_loss": gaussian_nll,
}
"""Losses in plain PyTorch where the functional of that name is not it."""
CALLABLES = {function.__name__: function for function in (log_cosh, coupled, token_cross_entropy, branching)}


@dataclass(frozen=True)
class LossCase:
    """One loss at outputs of one kind.

    ``total_weight`` is for means over weighted targets: what PyTorch divides the whole data set by, over the positions of an example.
    ``link`` is what a network must end in, ``convex`` whether D > 0 away from the anchor, ``curvature`` whether there is a Hessian.
    """

    id: str
    loss: str
    reduction: str
    outputs: Callable[[int, Generator], Tensor]
    targets: Callable[[Tensor, Generator], Tensor]
    notes: str
    num_examples: int = 6
    saturated: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    total_weight: Callable[[Tensor], Tensor] | None = None
    link: Callable[[Tensor], Tensor] | None = None
    convex: bool = True
    curvature: bool = True

    def make(self) -> Any:
        """The loss as a user would give it."""
        return CALLABLES.get(self.loss) or MODULES[self.loss](reduction=self.reduction, **self.options)

    def reduced(self, reduction: str | None = None) -> LossFunction:
        """The loss of a batch in plain PyTorch, in the type of the outputs."""
        if self.loss in CALLABLES:
            return CALLABLES[self.loss]
        plain = PLAIN.get(self.loss) or getattr(F, self.loss)

        def loss(z: Tensor, t: Tensor) -> Tensor:
            options = {key: value.to(z.dtype) if isinstance(value, Tensor) else value for key, value in self.options.items()}
            return plain(z, t, reduction=reduction or self.reduction, **options)

        return loss

    def oracle(self) -> LossFunction:
        """``ℓ_n`` as a callable of plain PyTorch, for batches of one example: where targets weigh, without the denominator."""
        if self.total_weight is None:
            return self.reduced()
        return lambda z, t: self.reduced("sum")(z, t) / t[0].numel()

    def factor(self, t: Tensor) -> float:
        """``c`` of the data set with these targets."""
        if self.reduction == "sum":
            return 1.0
        return 1.0 / (len(t) if self.total_weight is None else float(self.total_weight(t)) / t[0].numel())

    def sample(self, key: str = "") -> tuple[Tensor, Tensor]:
        """Outputs ``[N, *out]`` and targets in float64; another ``key`` gives other outputs with the same targets."""
        rng = torch.Generator().manual_seed(zlib.crc32(f"{self.id}".encode()))
        z = self.outputs(self.num_examples, rng)
        t = self.targets(z, rng)
        if key:
            z = self.outputs(self.num_examples, rng.manual_seed(zlib.crc32(f"{self.id}/{key}".encode())))
        return z, t


MSE, HALF, L1, SMOOTH, HUBER, CE, NLL, BCE, PROB, POISSON, GAUSS = MODULES
W4 = torch.tensor([0.5, 2.0, 0.0, 1.25], dtype=torch.float64)
W3 = torch.tensor([0.5, 2.0, 1.25], dtype=torch.float64)
SMOOTHING = {"label_smoothing": 0.1}


def weigh(weight: Tensor | None = None, ignore_index: int = -100) -> Callable[[Tensor], Tensor]:
    """Sum of the weights of the targets that count."""

    def total(t: Tensor) -> Tensor:
        kept = t[t != ignore_index]
        return torch.ones(kept.shape).sum() if weight is None else weight[kept].sum()

    return total


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
    LossCase("ce-mean-weight", CE, "mean", normal_outputs(4), class_targets, "class weights, one of them zero: c = 1/Σ w",
             options={"weight": W4}, total_weight=weigh(W4), convex=False),
    LossCase("ce-sum-weight", CE, "sum", normal_outputs(3), class_targets, "class weights, summed", options={"weight": W3}),
    LossCase("ce-mean-ignore", CE, "mean", normal_outputs(4), ignored_targets(1), "an index that is a class too is ignored",
             options={"ignore_index": 1}, total_weight=weigh(ignore_index=1), convex=False, num_examples=9),
    LossCase("ce-mean-smooth", CE, "mean", normal_outputs(4), class_targets, "label smoothing", options=SMOOTHING),
    LossCase("ce-mean-smooth-saturated", CE, "mean", saturated_outputs(4), class_targets, "smoothed, logits of ±100", 12, True, SMOOTHING),
    LossCase("ce-mean-smooth-weight-ignore", CE, "mean", normal_outputs(4), ignored_targets(-100), "all options at once",
             options={"weight": W4, **SMOOTHING}, total_weight=weigh(W4), convex=False, num_examples=9),
    LossCase("ce-mean-probabilities", CE, "mean", normal_outputs(4), distributions, "distributions as targets"),
    LossCase("ce-mean-probabilities-saturated", CE, "mean", saturated_outputs(4), distributions, "logits of ±100", 12, True),
    LossCase("ce-mean-probabilities-weight", CE, "mean", normal_outputs(4), distributions, "PyTorch divides by N here, not by Σ w",
             options={"weight": W4, **SMOOTHING}),
    LossCase("ce-sum-probabilities-seq", CE, "sum", normal_outputs(4, 3), distributions, "distributions at every position",
             options={"weight": W4}),
    LossCase("ce-mean-seq", CE, "mean", normal_outputs(4, 3), place_targets, "[N, K, T]: classes are not the last axis"),
    LossCase("ce-mean-seq-2d", CE, "mean", normal_outputs(4, 2, 3), place_targets, "[N, K, d1, d2], as in segmentation"),
    LossCase("ce-sum-seq-long", CE, "sum", normal_outputs(3, 67), place_targets, "more positions than a block", num_examples=2),
    LossCase("ce-mean-seq-saturated", CE, "mean", saturated_outputs(4, 3), place_targets, "positions at logits of ±100", 10, True),
    LossCase("ce-mean-seq-ignore", CE, "mean", normal_outputs(4, 3), ignored_targets(-100), "padded sequences of unequal length",
             total_weight=weigh(), convex=False),
    LossCase("ce-mean-seq-smooth-weight-ignore", CE, "mean", normal_outputs(4, 3), ignored_targets(3), "all options at every position",
             options={"weight": W4, "ignore_index": 3, **SMOOTHING}, total_weight=weigh(W4, 3), convex=False),
    LossCase("huber-mean", HUBER, "mean", N3, normal_targets, "some elements on the ramp, some on the plateau", convex=False),
    LossCase("huber-sum", HUBER, "sum", N3, normal_targets, "summed", convex=False),
    LossCase("huber-mean-delta", HUBER, "mean", N3, normal_targets, "another delta", options={"delta": 1.7}, convex=False),
    LossCase("smooth-l1-mean", SMOOTH, "mean", N3, normal_targets, "Huber over beta", convex=False),
    LossCase("smooth-l1-sum", SMOOTH, "sum", N3, normal_targets, "summed", convex=False),
    LossCase("smooth-l1-mean-beta", SMOOTH, "mean", N3, normal_targets, "another beta", options={"beta": 2.5}, convex=False),
    LossCase("poisson-mean", POISSON, "mean", N3, counts, "log rates"),
    LossCase("poisson-sum", POISSON, "sum", N3, counts, "log rates, summed"),
    LossCase("poisson-mean-full", POISSON, "mean", N3, counts, "Stirling's terms are constants", options={"full": True}),
    LossCase("poisson-mean-rate", POISSON, "mean", linked_outputs(F.softplus, 3), counts, "rates, counts of zero among the targets",
             options={"log_input": False}, link=F.softplus, convex=False),
    LossCase("poisson-sum-rate-eps", POISSON, "sum", linked_outputs(F.softplus, 3), counts, "an eps that shows",
             options={"log_input": False, "eps": 0.1, "full": True}, link=F.softplus, convex=False),
    LossCase("gaussian-mean", GAUSS, "mean", N3, with_variances, "a variance of each element beside its target"),
    LossCase("gaussian-sum", GAUSS, "sum", N3, with_variances, "summed"),
    LossCase("gaussian-mean-full", GAUSS, "mean", N0, with_variances, "with ½ log 2π, and variances below eps",
             options={"full": True, "eps": 0.5}),
    LossCase("bce-mean-weight", BCE, "mean", N3, soft_targets, "weights of the elements", options={"weight": W3}),
    LossCase("bce-mean-pos-weight", BCE, "mean", N3, soft_targets, "pos_weight, soft targets", options={"pos_weight": W3}),
    LossCase("bce-sum-pos-weight", BCE, "sum", N3, hard_targets, "both weights, summed", options={"pos_weight": W3, "weight": W3}),
    LossCase("bce-mean-pos-weight-saturated", BCE, "mean", saturated_outputs(3), soft_targets, "pos_weight at logits of ±100", 12, True,
             {"pos_weight": W3}),
    LossCase("prob-mean", PROB, "mean", linked_outputs(torch.sigmoid, 3), hard_targets, "probabilities as outputs", link=torch.sigmoid),
    LossCase("prob-sum", PROB, "sum", linked_outputs(torch.sigmoid, 1), hard_targets, "C = 1, summed", link=torch.sigmoid),
    LossCase("prob-mean-soft-weight", PROB, "mean", linked_outputs(torch.sigmoid, 3), soft_targets, "soft targets, weights of the elements",
             options={"weight": W3}, link=torch.sigmoid),
    LossCase("callable-mean", "log_cosh", "mean", N3, normal_targets, "no module of PyTorch's: differentiated by PyTorch"),
    LossCase("callable-mean-scalar", "log_cosh", "mean", N0, normal_targets, "outputs [N] without a feature axis"),
    LossCase("callable-sum-coupled", "coupled", "sum", N3, normal_targets, "dense Hessian blocks"),
    LossCase("callable-sum-wide", "coupled", "sum", linked_outputs(lambda z: 0.1 * z, 70), normal_targets, "too wide for dense blocks",
             num_examples=2, link=lambda z: 0.1 * z),
    LossCase("callable-mean-tokens", "token_cross_entropy", "mean", normal_outputs(3, 4), token_targets, "[N, T, K], flattened"),
    LossCase("callable-mean-branching", "branching", "mean", N3, normal_targets, "a loop over the examples where vmap fails"),
)  # fmt: skip

LINEAR_ROWS = (
    LossCase("l1-mean", L1, "mean", N3, normal_targets, "no curvature, but a gradient", convex=False, curvature=False),
    LossCase("l1-sum", L1, "sum", N3, normal_targets, "summed", convex=False, curvature=False),
    LossCase("smooth-l1-mean-0", SMOOTH, "mean", N3, normal_targets, "beta = 0 is the absolute error", options={"beta": 0.0},
             convex=False, curvature=False),
    LossCase("nll-mean", NLL, "mean", linked_outputs(lambda z: z.log_softmax(1), 4), class_targets, "log-probabilities", convex=False,
             curvature=False),
    LossCase("nll-sum", NLL, "sum", linked_outputs(lambda z: z.log_softmax(1), 4), class_targets, "summed", convex=False, curvature=False),
    LossCase("nll-mean-seq-weight-ignore", NLL, "mean", linked_outputs(lambda z: z.log_softmax(1), 4, 3), ignored_targets(2),
             "all options at every position", options={"weight": W4, "ignore_index": 2}, total_weight=weigh(W4, 2), convex=False,
             curvature=False),
)  # fmt: skip
"""Losses that are linear in the outputs: value and gradient, no Gauss-Newton matrix."""

LOSSES = {row.id: row for row in ROWS}

FUNCTIONALS = {name: getattr(F, name) for name in MODULES if name != HALF}
"""PyTorch's functional of each loss that has one; the key is its name."""
