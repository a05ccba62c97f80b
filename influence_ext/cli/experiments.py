"""What the demo computes; nothing here prints. Every number comes from the public interface of the library."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

import influence_ext as ie
from influence_ext.bregman import Correlation
from influence_ext.cli import datasets, networks
from influence_ext.cli.datasets import Dataset
from influence_ext.solvers import Dual, LiSSA, Solver

DUAL = Dual(max_roots=20_000)
"""For self-influence: every training example is a right-hand side, and one factorisation serves them all."""


class Reporter(Protocol):
    """What a progress bar offers: a callback ``(label, done, total)`` that can also count items."""

    def __call__(self, label: str, done: int, total: int) -> None:
        """Show ``done`` of ``total``."""

    def track(self, items: Iterable[Any], total: int) -> Iterator[Any]:
        """Yield ``items`` and count them."""


@dataclass(frozen=True)
class Experiment:
    """How one data set is trained and taken apart."""

    dataset: str
    hidden: tuple[int, ...]
    activation: str
    epochs: int
    lr: float
    damping: float
    num_train: int | None = None
    num_test: int | None = None
    batch_size: int = 64
    weight_decay: float = 1e-4
    num_removed: int = 20
    solver: Solver | None = None


@dataclass(frozen=True)
class Settings:
    """One size of the demo."""

    neighbours: Experiment
    mislabels: Experiment
    decompositions: tuple[Experiment, ...]


def quick(regression: str) -> Settings:
    """Under three minutes on two cores.

    With fewer examples than in the paper a removed one weighs more (1/N), and λ grows with it: 1/(N λ), which decides how far a
    removal moves the parameters, stays about what it is there.
    """
    return Settings(
        neighbours=Experiment("breast_cancer", (32,), "tanh", epochs=60, lr=0.02, damping=1e-2),
        mislabels=Experiment("mnist", (64,), "relu", epochs=20, lr=0.02, damping=1e-2, num_train=1000, num_test=400, solver=DUAL),
        decompositions=(
            Experiment(regression, (64, 64), "tanh", epochs=100, lr=0.02, damping=1e-2, batch_size=128, solver=LiSSA(num_steps=500)),
            Experiment("mnist", (64,), "relu", epochs=20, lr=0.02, damping=1e-2, num_train=2000, num_test=400, solver=LiSSA(num_steps=200)),
        ),
    )


def full(regression: str) -> Settings:
    """The paper's sizes as far as the data go: two hidden layers of 128, λ = 0.001, 4,000 digits."""
    return Settings(
        neighbours=Experiment("breast_cancer", (128, 128), "tanh", epochs=100, lr=0.02, damping=1e-3),
        mislabels=Experiment("mnist", (128, 128), "relu", epochs=20, lr=0.02, damping=1e-2, num_train=1500, num_test=1000, solver=DUAL),
        decompositions=(
            Experiment(regression, (128, 128), "tanh", epochs=300, lr=0.02, damping=1e-3, batch_size=128, solver=LiSSA(num_steps=5000)),
            Experiment("mnist", (128, 128), "relu", epochs=50, lr=0.02, damping=1e-3, num_train=4000, num_test=1000, solver=LiSSA()),
        ),
    )


@dataclass(frozen=True, eq=False)
class Trained:
    """A network trained as an experiment says."""

    experiment: Experiment
    data: Dataset
    run: ie.Run
    seconds: float

    @property
    def network(self) -> str:
        """``MLP 8-64-64-1 tanh``."""
        sizes = (self.data.num_inputs, *self.experiment.hidden, self.data.num_outputs)
        return f"MLP {'-'.join(map(str, sizes))} {self.experiment.activation}"

    @property
    def title(self) -> str:
        """Data set, network, N, P and λ in one line."""
        sizes = f"N = {self.data.num_examples}, P = {self.run.params.numel()}"
        return f"{self.data.title}, {self.network}, {sizes}, λ = {self.experiment.damping:g}"

    def outputs(self, X: Tensor) -> Tensor:
        """``[n, C]``, the network on ``X``."""
        with torch.no_grad():
            return self.run.model(X)

    def quality(self) -> tuple[str, float]:
        """Name and value of the test score: accuracy, or the part of the variance explained."""
        z, y = self.outputs(self.data.X_test), self.data.y_test
        if self.data.classes:
            return "test accuracy", float((self.predictions(z) == y.flatten()).double().mean())
        return "test R²", float(1 - ((z - y) ** 2).mean() / ((y - y.mean()) ** 2).mean())

    def predictions(self, z: Tensor) -> Tensor:
        """``[n]``: classes, or the outputs themselves in regression."""
        if self.data.loss == "cross_entropy":
            return z.argmax(dim=1)
        return (z[:, 0] > 0).to(z.dtype) if self.data.classes else z[:, 0]


def prepare(experiment: Experiment, seed: int, report: Reporter, change: Callable[[Dataset], Dataset] | None = None) -> Trained:
    """Load, perhaps ``change``, and train."""
    data = datasets.load(experiment.dataset, num_train=experiment.num_train, num_test=experiment.num_test, seed=seed)
    data = change(data) if change else data
    sizes = (data.num_inputs, *experiment.hidden, data.num_outputs)

    def build() -> nn.Module:
        return networks.mlp(sizes, experiment.activation)

    recipe = ie.Recipe(
        build,
        data.loss,
        lr=experiment.lr,
        epochs=experiment.epochs,
        batch_size=experiment.batch_size,
        weight_decay=experiment.weight_decay,
        seed=seed,
    )
    start = time.perf_counter()
    run = ie.train(recipe, data.train, progress=report)
    return Trained(experiment, data, run, time.perf_counter() - start)


def influence_of(trained: Trained) -> ie.Influence:
    """Influence at the trained network, λ_eff = λ + weight decay."""
    experiment = trained.experiment
    damping = experiment.damping + experiment.weight_decay
    return ie.Influence(trained.run.model, trained.data.loss, trained.data.train, damping=damping, solver=experiment.solver)


# ---------------------------------------------------------------------------------------------------------------------
# Helpful and harmful training examples


@dataclass(frozen=True)
class Neighbours:
    """The training examples that matter most for one test example: ``(training index, score)``, strongest first."""

    test: int
    helpful: list[tuple[int, float]]
    harmful: list[tuple[int, float]]


def neighbours(influence: ie.Influence, trained: Trained, tests: list[int], k: int) -> tuple[list[Neighbours], ie.Scores]:
    """Scores of all training examples on the test examples ``tests``."""
    X, y = trained.data.test
    scores = influence.scores((X[tests], y[tests]))
    found = [Neighbours(t, scores.top(k, row), scores.top(k, row, harmful=True)) for row, t in enumerate(tests)]
    return found, scores


def choose_tests(trained: Trained, num_wrong: int, num_right: int) -> list[int]:
    """Test examples to look at: those the network gets most wrong, and ordinary ones of different classes it gets right."""
    z, y = trained.outputs(trained.data.X_test), trained.data.y_test
    losses = ie.losses.resolve(trained.data.loss).value(z, y)
    order = losses.argsort(descending=True).tolist()
    if not trained.data.classes:
        return order[:num_wrong] + order[len(order) // 2 :][:num_right]
    right = (trained.predictions(z) == y.flatten()).tolist()
    wrong = [i for i in order if not right[i]][:num_wrong]
    chosen: dict[int, int] = {}
    for i in (i for i in order if right[i]):  # of each class the one it was least sure of
        chosen.setdefault(int(y.flatten()[i]), i)
    return wrong + list(chosen.values())[:num_right]


# ---------------------------------------------------------------------------------------------------------------------
# Planted mislabels


@dataclass(frozen=True, eq=False)
class Detection:
    """How early each ranking finds the mislabelled examples.

    Attributes:
        flipped: Indices of the mislabelled training examples.
        curves: ranking -> fraction of them found after inspecting 0, 1, ..., N examples.
        inspected: Fraction of the training set that :attr:`found` refers to.
        found: ranking -> fraction found within it.
    """

    flipped: Tensor
    curves: dict[str, Tensor]
    inspected: float
    found: dict[str, float]


def with_mislabels(fraction: float, seed: int) -> tuple[Callable[[Dataset], Dataset], list[Tensor]]:
    """A change of a data set that flips labels, and the list into which it puts the flipped indices."""
    flipped: list[Tensor] = []

    def change(data: Dataset) -> Dataset:
        y, indices = datasets.flip_labels(data.y, fraction, len(data.classes), seed)
        flipped.append(indices)
        return replace(data, y=y)

    return change, flipped


def detect(
    influence: ie.Influence, trained: Trained, flipped: Tensor, report: Reporter, inspected: float = 0.2, block: int = 100
) -> Detection:
    """Rank the training set by self-influence and by loss."""
    N = trained.data.num_examples
    blocks = [range(start, min(start + block, N)) for start in range(0, N, block)]
    self_influence = torch.cat([influence.self_influence(b) for b in report.track(blocks, len(blocks))])
    losses = ie.losses.resolve(trained.data.loss).value(trained.outputs(trained.data.X), trained.data.y)
    is_flipped = torch.zeros(N, dtype=torch.float64)
    is_flipped[flipped] = 1
    curves = {}
    for name, values in (("self-influence", self_influence), ("training loss", losses)):
        hits = is_flipped[values.argsort(descending=True)].cumsum(0) / len(flipped)
        curves[name] = torch.cat([torch.zeros(1, dtype=torch.float64), hits])
    curves["random (expected)"] = torch.linspace(0, 1, N + 1, dtype=torch.float64)
    return Detection(flipped, curves, inspected, {name: float(curve[round(inspected * N)]) for name, curve in curves.items()})


# ---------------------------------------------------------------------------------------------------------------------
# Five terms


@dataclass(frozen=True, eq=False)
class Terms:
    """A decomposition with the correlations of influence with what each response does to the test losses."""

    trained: Trained
    decomposition: ie.Decomposition
    correlations: dict[str, Correlation]
    seconds: float

    def ratio(self, term: str) -> float:
        """Largest of terms 1 to 3 over this one (mean output distances)."""
        d = self.decomposition
        names = list(d.terms[0])
        return max(d.mean(name) for name in names[:3]) / d.mean(term)

    def statuses(self, kind: str) -> dict[str, int]:
        """How the responses of one kind ended: status -> count."""
        counts: dict[str, int] = {}
        for quality in self.decomposition.quality:
            status = quality[kind]["status"]
            counts[status] = counts.get(status, 0) + 1
        return counts


def decompose(trained: Trained, seed: int, report: Reporter) -> Terms:
    """Remove ``num_removed`` random training examples one at a time."""
    order = torch.randperm(trained.data.num_examples, generator=torch.Generator().manual_seed(seed))
    groups = [[i] for i in order[: trained.experiment.num_removed].tolist()]
    start = time.perf_counter()
    found = ie.decompose(trained.run, groups, trained.experiment.damping, trained.experiment.solver, progress=report)
    correlations = found.correlations(trained.data.test)
    return Terms(trained, found, correlations, time.perf_counter() - start)
