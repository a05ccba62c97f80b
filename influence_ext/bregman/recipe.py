"""Recipes and base training: everything that a retraining branch has to repeat exactly."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from influence_ext.bregman.progress import Progress, reporter
from influence_ext.bregman.training import Trainer, TrainingPoint, isolated_random_state, seed_everything, seeded
from influence_ext.context import standalone
from influence_ext.data import Examples, load
from influence_ext.errors import ArgumentError, DTypeError
from influence_ext.losses import Loss, resolve
from influence_ext.params import ParameterSpace

OPTIMIZERS = ("sgd", "adam")
SCHEDULES = ("constant", "cosine")


@dataclass(frozen=True)
class Recipe:
    r"""How a network is trained; two runs of one recipe on the same data are equal bit for bit.

    The objective is ``c Σ_i ℓ_i(θ) + (w/2)‖θ‖²`` with ``c = 1/N`` (mean) or ``1`` (sum). A step on the batch ``𝓑`` takes the gradient
    ``(c N / |𝓑|) Σ_{i ∈ 𝓑} ∇ℓ_i + w θ``, where ``|𝓑|`` counts the batch **before** any example is removed: removing an example takes
    its term away and changes the weight of no other.

    Args:
        build_model: Called without arguments with the random generators seeded by ``seed``; returns a new network.
        loss: An ``nn`` loss module, its functional name or a loss of this library.
        optimizer: ``"sgd"`` (with momentum) or ``"adam"``, each with PyTorch's update. Weight decay is the gradient of
            ``(w/2)‖θ‖²`` in both; AdamW's decoupled decay is the gradient of no such term and is therefore refused.
        lr: Learning rate.
        momentum: Of SGD; Adam ignores it.
        weight_decay: ``w``.
        epochs: ``K``, passes over the data in base training.
        batch_size: Examples in a batch; the last batch of an epoch may be smaller.
        seed: Decides the initial parameters, the order of the batches and dropout; the global random state is left alone.
        schedule: Factor on ``lr``: ``"constant"``, ``"cosine"`` (from 1 to 0 over the ``K`` epochs of base training, and again over
            the later epochs of the branches) or a function of the epoch, which keeps counting from ``K`` in the branches.
        betas: Of Adam.
        eps: Of Adam.
        reduction: ``"mean"`` or ``"sum"`` where it cannot be read from ``loss``.
        device: Where to train; ``None`` is where ``build_model`` puts the network.
        dtype: Of the parameters; ``None`` is what ``build_model`` gives.

    Raises:
        ArgumentError: an option makes no sense.
    """

    build_model: Callable[[], nn.Module]
    loss: Any
    optimizer: str = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 0.0
    epochs: int = 100
    batch_size: int = 128
    seed: int = 0
    schedule: Literal["constant", "cosine"] | Callable[[int], float] = "constant"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    reduction: str | None = None
    device: torch.device | str | None = None
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.optimizer == "adamw":
            raise ArgumentError(
                "Recipe: expected optimizer 'sgd' or 'adam', got 'adamw', whose decoupled weight decay minimises no (w/2)‖θ‖² and "
                "so fits none of the objectives compared here; use 'adam' with weight_decay."
            )
        if self.optimizer not in OPTIMIZERS:
            raise ArgumentError(f"Recipe: expected optimizer 'sgd' or 'adam', got {self.optimizer!r}; choose one of the two.")
        if not callable(self.build_model):
            raise ArgumentError(
                f"Recipe: expected build_model to be a function that returns a new network, got {type(self.build_model).__name__}; "
                "pass a function, for example lambda: nn.Sequential(...)."
            )
        if not callable(self.schedule) and self.schedule not in SCHEDULES:
            raise ArgumentError(
                f"Recipe: expected schedule 'constant', 'cosine' or a function of the epoch, got {self.schedule!r}; choose one."
            )
        in_unit = [0 <= b < 1 for b in (self.momentum, *self.betas)]
        for name, ok, expected in (
            ("lr", _finite(self.lr) and self.lr > 0, "a positive number"),
            ("momentum", in_unit[0], "a number in [0, 1)"),
            ("betas", len(self.betas) == 2 and all(in_unit[1:]), "two numbers in [0, 1)"),
            ("eps", _finite(self.eps) and self.eps > 0, "a positive number"),
            ("weight_decay", _finite(self.weight_decay) and self.weight_decay >= 0, "a number of at least 0"),
            ("epochs", _count(self.epochs), "a whole number of at least 1"),
            ("batch_size", _count(self.batch_size), "a whole number of at least 1"),
            ("seed", _integer(self.seed) and self.seed >= 0, "a whole number of at least 0"),
        ):
            if not ok:
                raise ArgumentError(f"Recipe: expected {name} to be {expected}, got {getattr(self, name)!r}; correct {name}.")

    @property
    def branch_epochs(self) -> int:
        """``K/2``, rounded up: the epochs of every branch after base training."""
        return (self.epochs + 1) // 2

    def lr_factor(self, epoch: int) -> float:
        """The schedule's factor on ``lr`` in ``epoch``, counted from 0; epochs from ``K`` on belong to a branch."""
        if callable(self.schedule):
            return float(self.schedule(epoch))
        if self.schedule == "constant":
            return 1.0
        start, total = (0, self.epochs) if epoch < self.epochs else (self.epochs, self.branch_epochs)
        return 0.5 * (1 + math.cos(math.pi * min((epoch - start) / total, 1.0)))

    def batch_order(self, epoch: int, num_examples: int) -> Tensor:
        """``[N]``, the permutation that ``epoch`` walks through; a function of ``seed`` and ``epoch`` alone, so branches share it."""
        return torch.randperm(num_examples, generator=seeded(self.seed, epoch))

    def describe(self) -> dict[str, Any]:
        """The protocol as plain values, for files and tables."""
        return {
            "loss": resolve(self.loss, self.reduction).name,
            "optimizer": self.optimizer,
            "lr": self.lr,
            "momentum": self.momentum if self.optimizer == "sgd" else None,
            "weight_decay": self.weight_decay,
            "epochs": self.epochs,
            "branch_epochs": self.branch_epochs,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "schedule": getattr(self.schedule, "__name__", "function") if callable(self.schedule) else self.schedule,
        }


@dataclass(frozen=True, eq=False)
class Run:
    """A finished base training: the network, and what the branches need to repeat or continue it.

    Attributes:
        model: The trained network, in evaluation mode.
        recipe: How it was trained.
        data: The training examples.
        history: ``"loss"``, the mean of ``c N ℓ`` over each epoch while training, and ``"lr"``; one number an epoch.
        initial: θ₀ with its buffers, before the first step.
        final: θs with its buffers and the optimiser's moments, after the last step.
    """

    model: nn.Module
    recipe: Recipe
    data: Examples
    history: dict[str, list[float]]
    initial: TrainingPoint
    final: TrainingPoint

    @property
    def loss(self) -> Loss:
        """The recipe's loss."""
        return resolve(self.recipe.loss, self.recipe.reduction)

    @property
    def params(self) -> Tensor:
        """``[P]``, θs."""
        return self.final.theta

    @property
    def initial_params(self) -> Tensor:
        """``[P]``, θ₀."""
        return self.initial.theta

    def batch_order(self, epoch: int) -> Tensor:
        """``[N]``, the permutation of the training examples that ``epoch`` walks through."""
        return self.recipe.batch_order(epoch, self.data.num_examples)


@standalone
def train(recipe: Recipe, data: Any, progress: bool | Progress = False) -> Run:
    """Train the recipe's network on ``data``.

    Args:
        recipe: What to train and how.
        data: ``(X, y)``, or a re-iterable of such batches.
        progress: ``True`` for a line on stderr, or a function ``(label, done, total)``.

    Returns:
        The run; ``run.model`` is the trained network in evaluation mode.

    Raises:
        DataError: the data are unusable.
        DivergenceError: the training loss left the finite numbers.

    Cost:
        ``K`` passes of a plain forward and backward; data stay in memory, parameters and gradients are one flat buffer each.
    """
    examples = load(data, who="train")
    model = _build(recipe)
    space = ParameterSpace.of(model, who="train")
    examples = _placed(examples, space, recipe.dtype)
    loss = resolve(recipe.loss, recipe.reduction)
    trainer = Trainer(recipe, copy.deepcopy(model), loss, examples)
    initial = trainer.starting_point()
    final, history = trainer.advance(initial, range(recipe.epochs), report=reporter(progress), label="training")
    trainer.write(final, model)
    return Run(model.eval(), recipe, examples, history, initial, final)


def _build(recipe: Recipe) -> nn.Module:
    """A new network of the recipe, its initialisation drawn under ``seed`` with the global generators put back afterwards."""
    with isolated_random_state(recipe.device), torch.enable_grad():
        seed_everything(recipe.seed, -1, recipe.device)
        model = recipe.build_model()
    if not isinstance(model, nn.Module):
        raise ArgumentError(
            f"train: expected build_model to return an nn.Module, got {type(model).__name__}; return the network from the function."
        )
    return model.to(device=recipe.device, dtype=recipe.dtype)


def _placed(examples: Examples, space: ParameterSpace, dtype: torch.dtype | None) -> Examples:
    """The examples on the parameters' device and, where the recipe names a dtype, their floating-point tensors in it."""

    def place(x: Tensor) -> Tensor:
        return x.to(space.device, dtype if x.is_floating_point() else None)

    placed = replace(examples, inputs=tuple(map(place, examples.inputs)), targets=place(examples.targets))
    other = {str(x.dtype) for x in placed.inputs if x.is_floating_point() and x.dtype != space.dtype}
    if other:
        raise DTypeError(
            f"train: expected inputs of the parameters' dtype {space.dtype}, got {', '.join(sorted(other))}; convert them, or set dtype in "
            "the recipe."
        )
    return placed


def _finite(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x)


def _integer(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


def _count(x: Any) -> bool:
    return _integer(x) and x >= 1
