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
from influence_ext.bregman.training import (
    Trainer,
    TrainingPoint,
    first_line,
    isolated_random_state,
    outputs_of,
    rows,
    seed_everything,
    seeded,
)
from influence_ext.checks import is_count, is_number, is_one_of, is_whole
from influence_ext.context import standalone, warn
from influence_ext.data import Examples, load
from influence_ext.errors import ArgumentError, DeviceError, DivergenceError, DTypeError
from influence_ext.losses import Loss, resolve
from influence_ext.losses.generic import CallableLoss
from influence_ext.params import DEVICES, SUPPORTED_DTYPES, ParameterSpace, is_half

OPTIMIZERS = ("sgd", "adam")
SCHEDULES = ("constant", "cosine")


@dataclass(frozen=True)
class Recipe:
    r"""How a network is trained; two runs of one recipe on the same data are equal bit for bit.

    The objective is ``c Σ_i ℓ_i(θ) + (w/2)‖θ‖²`` with ``c = 1/N`` (mean) or ``1`` (sum). A step on the batch ``𝓑`` takes the gradient
    ``(c N / |𝓑|) Σ_{i ∈ 𝓑} ∇ℓ_i + w θ``, where ``|𝓑|`` counts the batch **before** any example is removed: removing an example takes
    its term away and changes the weight of no other.

    Args:
        build_model: Called without arguments with the random generators seeded by ``seed``; returns a new network. What it returns is
            copied, so a network that exists already (a pretrained one, say) is a starting point that training does not change.
        loss: An ``nn`` loss module, its functional name, a loss of this library or any callable ``loss(output, target)``.
        optimizer: ``"sgd"`` (with momentum) or ``"adam"``, each with PyTorch's update. Weight decay is the gradient of
            ``(w/2)‖θ‖²`` in both; AdamW's decoupled decay is the gradient of no such term and is therefore refused.
        lr: Learning rate.
        momentum: Of SGD; Adam ignores it.
        weight_decay: ``w``.
        epochs: ``K``, passes over the data in base training.
        batch_size: Examples in a batch; the last batch of an epoch may be smaller.
        seed: Decides the initial parameters, the order of the batches and dropout; the global random state is left alone.
        schedule: Factor on ``lr``: ``"constant"``, ``"cosine"`` (from 1 to 0 over the ``K`` epochs of base training, and again over
            the later epochs of the branches) or a function of the epoch, which keeps counting from ``K`` in the branches; random numbers
            that it draws on the CPU depend on ``seed`` and the epoch alone.
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
        if is_one_of(self.optimizer, ("adamw",)):
            raise ArgumentError(
                "Recipe: expected optimizer 'sgd' or 'adam', got 'adamw', whose decoupled weight decay minimises no (w/2)‖θ‖² and "
                "so fits none of the objectives compared here; use 'adam' with weight_decay."
            )
        if not is_one_of(self.optimizer, OPTIMIZERS):
            raise ArgumentError(f"Recipe: expected optimizer 'sgd' or 'adam', got {self.optimizer!r}; choose one of the two.")
        if not callable(self.build_model) or isinstance(self.build_model, nn.Module):
            raise ArgumentError(
                f"Recipe: expected build_model to be a function that returns a new network, got {type(self.build_model).__name__}; "
                "pass a function, for example lambda: nn.Sequential(...)."
            )
        if (not callable(self.schedule) or isinstance(self.schedule, type)) and not is_one_of(self.schedule, SCHEDULES):
            raise ArgumentError(
                f"Recipe: expected schedule 'constant', 'cosine' or a function of the epoch, got {self.schedule!r}; choose one."
            )
        betas = tuple(self.betas) if isinstance(self.betas, (tuple, list)) else ()
        for name, ok, expected in (
            ("lr", is_number(self.lr) and self.lr > 0, "a positive number"),
            ("momentum", _in_unit(self.momentum), "a number in [0, 1)"),
            ("betas", len(betas) == 2 and all(map(_in_unit, betas)), "two numbers in [0, 1)"),
            ("eps", is_number(self.eps) and self.eps > 0, "a positive number"),
            ("weight_decay", is_number(self.weight_decay) and self.weight_decay >= 0, "a number of at least 0"),
            ("epochs", is_count(self.epochs), "a whole number of at least 1"),
            ("epochs", not is_count(self.epochs) or self.epochs < 2**31, "below 2^31"),
            ("batch_size", is_count(self.batch_size) and self.batch_size < 2**63, "a whole number of at least 1"),
            ("seed", is_whole(self.seed) and self.seed >= 0, "a whole number of at least 0"),
            (
                "dtype",
                self.dtype is None or (isinstance(self.dtype, torch.dtype) and self.dtype in SUPPORTED_DTYPES),
                "None, torch.float32 or torch.float64",
            ),
            ("device", _is_device(self.device), "None, 'cpu' or a CUDA device, which the kernels are for"),
        ):
            if not ok:
                raise ArgumentError(f"Recipe: expected {name} to be {expected}, got {getattr(self, name)!r}; correct {name}.")
        for name in ("lr", "momentum", "eps", "weight_decay"):
            object.__setattr__(self, name, float(getattr(self, name)))
        for name in ("epochs", "batch_size", "seed"):
            object.__setattr__(self, name, int(getattr(self, name)))
        object.__setattr__(self, "betas", tuple(map(float, betas)))

    @property
    def branch_epochs(self) -> int:
        """``K/2``, rounded up: the epochs of every branch after base training."""
        return (self.epochs + 1) // 2

    @property
    def schedule_name(self) -> str:
        """``"constant"``, ``"cosine"`` or the name of the function."""
        return getattr(self.schedule, "__name__", "function") if callable(self.schedule) else self.schedule

    def lr_factor(self, epoch: int) -> float:
        """The schedule's factor on ``lr`` in ``epoch``, counted from 0; epochs from ``K`` on belong to a branch."""
        if callable(self.schedule):
            with isolated_random_state(None):
                seed_everything(self.seed, epoch, None)
                found = self.schedule(epoch)
            try:
                factor = float(found)
            except (TypeError, ValueError):
                factor = math.nan
            if not 0 <= factor < math.inf:
                raise ArgumentError(
                    f"Recipe: expected schedule to return a number of at least 0, got {found!r} for epoch {epoch}; correct the function."
                )
            return factor
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
            "schedule": self.schedule_name,
        }


@dataclass(frozen=True, eq=False)
class Run:
    """A finished base training: the network, and what the branches need to repeat or continue it.

    Attributes:
        model: The trained network, in evaluation mode.
        recipe: How it was trained.
        data: The training examples, a copy of the caller's.
        history: ``"loss"``, the mean of ``c N ℓ`` over each epoch while training, and ``"lr"``; one number an epoch.
        initial: θ₀ with its buffers, before the first step.
        final: θs with its buffers and the optimiser's moments, after the last step.
        loss: The recipe's loss.
    """

    model: nn.Module
    recipe: Recipe
    data: Examples
    history: dict[str, list[float]]
    initial: TrainingPoint
    final: TrainingPoint
    loss: Loss

    @property
    def params(self) -> Tensor:
        """``[P]``, θs."""
        return self.final.theta

    @property
    def initial_params(self) -> Tensor:
        """``[P]``, θ₀."""
        return self.initial.theta

    def batch_order(self, epoch: int) -> Tensor:
        """``[N]``, the permutation of the training examples that ``epoch`` walks through.

        Raises:
            ArgumentError: ``epoch`` is no whole number of at least 0.
        """
        if not (is_whole(epoch) and epoch >= 0):
            raise ArgumentError(f"Run.batch_order: expected epoch to be a whole number of at least 0, got {epoch!r}; epochs count from 0.")
        return self.recipe.batch_order(int(epoch), self.data.num_examples)

    def __repr__(self) -> str:
        first, last = self.history["loss"][0], self.history["loss"][-1]
        return (
            f"Run({type(self.model).__name__}: P = {len(self.params)}, N = {self.data.num_examples}, {self.loss.name} {first:.4g} in epoch "
            f"1, {last:.4g} in epoch {self.recipe.epochs})"
        )


@standalone
@torch.inference_mode(False)
def train(recipe: Recipe, data: Any, progress: bool | Progress = False) -> Run:
    """Train the recipe's network on ``data``.

    Args:
        recipe: What to train and how.
        data: ``(X, y)``, or a re-iterable of such batches. The run keeps a copy, which all its branches are trained on: what becomes of
            these tensors afterwards changes nothing.
        progress: ``True`` for a line on stderr, or a function ``(label, done, total)``.

    Returns:
        The run; ``run.model`` is the trained network in evaluation mode.

    Raises:
        ArgumentError: no recipe, or one whose ``build_model`` returns no network.
        DataError, ShapeError, DTypeError, DeviceError: the data are unusable, or do not fit the network or the loss.
        UnsupportedLossError: the loss is none, or mixes examples.
        UnsupportedModelError: the network's outputs have no gradient.
        DivergenceError: the training loss left the finite numbers.

    Warns:
        NumericalWarning: the training diverged within them: its loss is above what it began with and what one output for all would have.

    Cost:
        ``K`` passes of a plain forward and backward; data stay in memory, parameters and gradients are one flat buffer each. In several
        threads epochs take turns, because layers such as dropout draw from the process's generators, which each epoch seeds and puts back.
    """
    if not isinstance(recipe, Recipe):
        raise ArgumentError(f"train: expected a Recipe, got {type(recipe).__name__}; write train(Recipe(...), data).")
    examples = load(data, who="train")
    model = _build(recipe)
    space = ParameterSpace.of(model, who="train")
    examples = _placed(examples, space, recipe.dtype)
    loss = resolve(recipe.loss, recipe.reduction, "train")
    trainer = Trainer(recipe, copy.deepcopy(model), loss, examples)
    initial = trainer.starting_point()
    _check_fit(trainer)
    final, history = trainer.advance(initial, range(recipe.epochs), report=reporter(progress, "train"), label="training")
    if (away := trainer.ran_away(initial, final)) is not None:
        message = (
            f"train: expected a training that learns, got {away}; it diverged: lower lr (now {recipe.lr:g}) or standardise the inputs."
        )
        if not math.isfinite(away.objective):
            raise DivergenceError(message)
        warn(message)
    trainer.write(final, model)
    return Run(model.eval(), recipe, examples, history, initial, final, loss)


def _build(recipe: Recipe) -> nn.Module:
    """A new network of the recipe, its initialisation drawn under ``seed`` with the global generators put back afterwards."""
    wanted = None if recipe.device is None else torch.device(recipe.device)
    if wanted is not None and wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count() or "none"
        raise DeviceError(f"train: expected the recipe's device {recipe.device} to be there, got {found} that PyTorch finds; leave it out.")
    with isolated_random_state(recipe.device), torch.enable_grad():
        seed_everything(recipe.seed, -1, recipe.device)
        model = recipe.build_model()
    if not isinstance(model, nn.Module):
        raise ArgumentError(
            f"train: expected build_model to return an nn.Module, got {type(model).__name__}; return the network from the function."
        )
    try:
        model = copy.deepcopy(model)
    except (RuntimeError, TypeError) as error:
        raise ArgumentError(
            f"train: expected build_model to return a network that copy.deepcopy copies, got {first_line(error)}; where it is "
            "torch.nn.utils.weight_norm, use torch.nn.utils.parametrizations.weight_norm."
        ) from error
    model = model.to(device=recipe.device, dtype=recipe.dtype)
    if is_half(model):
        raise DTypeError(
            "train: expected a network in float32 or float64, got parameters in half precision, in which the small differences of "
            "responses drown; set dtype=torch.float32 in the recipe."
        )
    return model


def _check_fit(trainer: Trainer) -> None:
    """Whether network, loss and data fit each other: one batch, and all targets where the loss knows what targets may be.

    The latter with the first output for all, as a view: the outputs of all examples may be larger than memory.
    """
    examples, N = trainer.examples, trainer.examples.num_examples
    size = min(max(trainer.recipe.batch_size, 2), N)  # of one example a callable's reduction cannot be told
    trainer.model.eval()
    with isolated_random_state(trainer.space.device), torch.no_grad():
        z = outputs_of(trainer.model, rows(examples.X, slice(0, size)), size, "train")
    if not isinstance(trainer.loss, CallableLoss):  # which may be defined for an output and its own target alone
        trainer.loss.check(z[:1].expand(N, *z.shape[1:]), examples.targets, "train")
    trainer.loss.check(z, examples.targets[:size], "train")


def _placed(examples: Examples, space: ParameterSpace, dtype: torch.dtype | None) -> Examples:
    """The examples on the parameters' device and, where the recipe names a dtype, their floating-point tensors in it."""

    def place(x: Tensor) -> Tensor:
        return x.to(space.device, dtype if x.is_floating_point() else None, copy=True)  # outside of inference mode, so autograd takes it

    placed = replace(examples, inputs=tuple(map(place, examples.inputs)), targets=place(examples.targets))
    other = {str(x.dtype) for x in placed.inputs if x.is_floating_point() and x.dtype != space.dtype}
    if other:
        raise DTypeError(
            f"train: expected inputs of the parameters' dtype {space.dtype}, got {', '.join(sorted(other))}; convert them, or set dtype in "
            "the recipe."
        )
    return placed


def _in_unit(x: Any) -> bool:
    return is_number(x) and 0 <= x < 1


def _is_device(device: Any) -> bool:
    try:
        return device is None or torch.device(device).type in DEVICES
    except (RuntimeError, TypeError, ValueError):
        return False
