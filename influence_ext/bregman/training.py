"""The training loop: plain PyTorch over one flat parameter buffer."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from influence_ext.bregman.progress import Progress
from influence_ext.data import Examples, ModelInput, call_model
from influence_ext.errors import DataError, DivergenceError, InfluenceExtError, ShapeError, UnsupportedModelError
from influence_ext.losses import Loss
from influence_ext.losses.generic import CallableLoss
from influence_ext.params import ParameterSpace

if TYPE_CHECKING:
    from influence_ext.bregman.recipe import Recipe

CHUNK = 4096
"""Examples in one forward pass outside training; the same everywhere, so that equal parameters give equal outputs."""
FEW = 64
"""Examples that a training's end is looked at on first."""

_generators = threading.RLock()


def _after_fork() -> None:
    """The child lacks the thread that may have held the lock, for as long as an epoch; a `with` around the fork leaves its own object."""
    global _generators
    _generators = threading.RLock()


os.register_at_fork(after_in_child=_after_fork)


def seeded(seed: int, epoch: int) -> torch.Generator:
    """A generator of its own that depends on ``seed`` and ``epoch`` only."""
    return torch.Generator().manual_seed(_mixed(seed, epoch))


def _mixed(seed: int, epoch: int) -> int:
    # The odd multiplier keeps (seed, epoch + 1) off (seed + 1, epoch).
    return ((seed + 1) * 0x9E3779B97F4A7C15 + epoch) & (2**63 - 1)


@dataclass(frozen=True, eq=False)
class TrainingPoint:
    """Where a training run stands; never modified once made.

    Attributes:
        theta: ``[P]``.
        buffers: The network's buffers by name (running statistics and the like).
        moments: The optimiser's state: momentum for SGD, first and second moment for Adam; each ``[P]``, empty before the first step.
        num_steps: Steps taken so far, which Adam's bias correction needs.
    """

    theta: Tensor
    buffers: dict[str, Tensor]
    moments: tuple[Tensor, ...] = ()
    num_steps: int = 0


@dataclass(frozen=True, eq=False)
class Proximity:
    """``(λ/2)‖θ − anchor‖²``, added to a training objective."""

    damping: float
    anchor: Tensor


@dataclass(frozen=True)
class RanAway:
    """A training that diverged: its ``objective`` at the end, above the ``limit``; see :meth:`Trainer.ran_away`."""

    objective: float
    limit: float

    def __str__(self) -> str:
        return (
            f"an objective of {self.objective:.3g} at its end (mean loss and weight decay), above the {self.limit:.3g} that it began with "
            "or that one output for all has"
        )


@contextlib.contextmanager
def isolated_random_state(device: torch.device | str | None) -> Iterator[None]:
    """Puts the generators of the CPU and of ``device`` back on leaving, also after an exception.

    Generators belong to the process, and layers such as dropout draw from them, so one thread at a time: another's draws would change this
    one's, and what the last to leave puts back would be the first one's seed.
    """
    cuda = torch.device(device) if device is not None else torch.device("cpu")
    with _generators, torch.random.fork_rng(devices=[cuda.index or 0] if cuda.type == "cuda" else []):
        yield


def seed_everything(seed: int, epoch: int, device: torch.device | str | None) -> None:
    """Seed exactly the generators that :func:`isolated_random_state` puts back; ``torch.manual_seed`` would reach every device."""
    torch.default_generator.manual_seed(_mixed(seed, epoch))
    where = torch.device(device) if device is not None else torch.device("cpu")
    if where.type == "cuda":
        torch.cuda.default_generators[where.index or 0].manual_seed(_mixed(seed, epoch))


def rows(X: ModelInput, index: Tensor | slice) -> ModelInput:
    """The examples ``index`` of a tensor, a tuple or a dict of tensors."""
    if isinstance(X, Tensor):
        return X[index]
    return {name: x[index] for name, x in X.items()} if isinstance(X, dict) else tuple(x[index] for x in X)


def first_line(error: Exception) -> str:
    """What an exception says, in short."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}".removesuffix(": ").rstrip(".")


@contextlib.contextmanager
def calling_the_network(who: str, remedy: str = "correct their shape, dtype or values, or the network") -> Iterator[None]:
    """What a network says of inputs that it does not take becomes an error in the name of ``who``; lack of memory stays what it is.

    Raises:
        DataError: the network raised; its own exception is the cause.
    """
    try:
        yield
    except (InfluenceExtError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
        if "DefaultCPUAllocator" in str(error) or "can't allocate memory" in str(error):
            raise
        raise DataError(f"{who}: expected inputs that the network takes, got {first_line(error)}; {remedy}.") from error


def outputs_of(model: nn.Module, X: ModelInput, size: int, who: str) -> Tensor:
    """``[size, *out]``, the network's outputs for ``size`` examples.

    Raises:
        DataError: the network raised.
        ShapeError: it returned something else.
    """
    alone = ("correct the network, or choose a batch_size that leaves no batch of a single example",) if size == 1 else ()
    with calling_the_network(who, *alone):
        z = call_model(model, X)
    if not isinstance(z, Tensor) or z.shape[:1] != (size,):
        found = list(z.shape) if isinstance(z, Tensor) else type(z).__name__
        raise ShapeError(
            f"{who}: expected a network that returns one tensor with an output for each of {size} examples, got {found}; wrap it in a "
            "module that does."
        )
    return z


def no_moments(recipe: Recipe, theta: Tensor) -> tuple[Tensor, ...]:
    """The optimiser's state before the first step, shaped like ``theta``."""
    return tuple(torch.zeros_like(theta) for _ in range(1 if recipe.optimizer == "sgd" else 2))


def descend(recipe: Recipe, theta: Tensor, grad: Tensor, moments: tuple[Tensor, ...], num_steps: int, lr: float) -> None:
    """The recipe's update, by elements and in place: ``theta`` and ``moments`` of any one shape.

    Args:
        recipe: Names the optimiser.
        theta: Parameters.
        grad: The gradient there, only read.
        moments: See :class:`TrainingPoint`.
        num_steps: Counts this step too.
        lr: Learning rate of this step.
    """
    if recipe.optimizer == "sgd":
        momentum = moments[0].mul_(recipe.momentum).add_(grad)
        theta.add_(momentum, alpha=-lr)
        return
    first, second = moments
    beta1, beta2 = recipe.betas
    first.lerp_(grad, 1 - beta1)
    second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = second.sqrt().div_((1 - beta2**num_steps) ** 0.5).add_(recipe.eps)
    theta.addcdiv_(first, denominator, value=-lr / (1 - beta1**num_steps))


class Trainer:
    """Trains one network under a recipe.

    Args:
        recipe: The recipe.
        model: A network this trainer owns; its parameters become views of one flat buffer.
        loss: The resolved loss.
        examples: The **full** training set; removed examples are masked out of their batches.
    """

    def __init__(self, recipe: Recipe, model: nn.Module, loss: Loss, examples: Examples):
        self.recipe, self.model, self.loss, self.examples = recipe, model, loss, examples
        self.space = ParameterSpace.of(model)
        self._start = self.space.values(model)
        self._theta = self._start.clone()
        self._grad = torch.zeros_like(self._theta)
        self._beginnings: dict[int, tuple[TrainingPoint, Tensor, Tensor]] = {}
        values, grads = self.space.unflatten(self._theta), self.space.unflatten(self._grad)
        for name in self.space.names:
            parameter = model.get_parameter(name)
            parameter.data, parameter.grad = values[name], grads[name]

    def starting_point(self) -> TrainingPoint:
        """The network as it was handed over, before any step."""
        return TrainingPoint(self._start.clone(), self.buffers())

    def write(self, point: TrainingPoint, model: nn.Module) -> None:
        """Copy a point's parameters and buffers into ``model``."""
        values = self.space.unflatten(point.theta)
        with torch.no_grad():
            for name in self.space.names:
                model.get_parameter(name).copy_(values[name])
            for name, buffer in model.named_buffers():
                buffer.copy_(point.buffers[name])

    def advance(
        self,
        point: TrainingPoint,
        epochs: range,
        *,
        removed: Sequence[int] = (),
        proximity: Proximity | None = None,
        report: Progress,
        label: str,
    ) -> tuple[TrainingPoint, dict[str, list[float]]]:
        """Train from ``point`` through ``epochs`` without the examples ``removed``.

        Returns:
            The new point and the history (``"loss"`` over the kept examples, ``"lr"``), one number an epoch.

        Raises:
            DivergenceError: the training loss left the finite numbers.
            UnsupportedModelError: outputs have no gradient.
        """
        recipe = self.recipe
        theta, grad = self._theta, self._grad
        theta.copy_(point.theta)
        self.load_buffers(point.buffers)
        moments = tuple(m.clone() for m in point.moments) or no_moments(recipe, theta)
        num_steps = point.num_steps
        N = self.examples.num_examples
        scale = self.loss.factor(self.examples.targets) * N
        kept = torch.ones(N, dtype=torch.bool)
        kept[list(removed)] = False
        history: dict[str, list[float]] = {"loss": [], "lr": []}
        self.model.train()
        for done, epoch in enumerate(epochs):
            report(label, done, len(epochs))
            lr = recipe.lr * recipe.lr_factor(epoch)
            total = torch.zeros((), dtype=torch.float64, device=theta.device)
            with isolated_random_state(theta.device), torch.enable_grad():
                seed_everything(recipe.seed, epoch, theta.device)
                for batch in recipe.batch_order(epoch, N).split(recipe.batch_size):
                    grad.zero_()
                    index = batch[kept[batch]].to(theta.device)
                    if len(index):
                        t = self.examples.targets[index]
                        z = outputs_of(self.model, rows(self.examples.X, index), len(index), label)
                        if not z.requires_grad:
                            raise UnsupportedModelError(
                                f"{label}: expected outputs that PyTorch can differentiate by the trainable parameters, got ones without a "
                                "gradient; leave out what detaches them, such as .detach() or torch.no_grad() in the forward pass."
                            )
                        z_value = z.detach()
                        if isinstance(self.loss, CallableLoss) and done in (0, len(epochs) - 1):
                            self.loss.confirm(z_value, t, label)
                        z.backward(self.loss.gradient(z_value, t) * (scale / len(batch)))
                        total += self.loss.value(z_value, t).sum(dtype=torch.float64)
                    if recipe.weight_decay:
                        grad.add_(theta, alpha=recipe.weight_decay)
                    if proximity is not None:
                        grad.add_(theta - proximity.anchor, alpha=proximity.damping)
                    num_steps += 1
                    descend(recipe, theta, grad, moments, num_steps, lr)
            loss = total.item() * scale / N
            history["loss"].append(loss)
            history["lr"].append(lr)
            if not (torch.isfinite(total).item() and torch.isfinite(theta).all().item()):
                raise DivergenceError(
                    f"{label}: expected finite parameters and a finite training loss, got loss = {loss:.3g} after epoch "
                    f"{epoch + 1}; lower lr (now {lr:g}) or standardise the inputs."
                )
        report(label, len(epochs), len(epochs))
        return TrainingPoint(theta.clone(), self.buffers(), moments, num_steps), history

    def ran_away(self, start: TrainingPoint, end: TrainingPoint, removed: Sequence[int] = ()) -> RanAway | None:
        """Whether a training diverged, be it within the finite numbers; ``None`` if not.

        Its objective at the end, the mean loss with its share of the weight decay, is then above that at the start and above that of one
        output for all examples, the mean one at the start: it has learned less than nothing. (A start may be a trained network, which noisy
        steps leave uphill.)

        Cost: a forward pass over 64 examples at the end; where it is above on them, over all. The same once at each start that is asked of.
        Memory: the outputs of a chunk of examples, and two numbers an example.
        """
        everything = torch.arange(self.examples.num_examples, device=self.space.device)
        kept = torch.ones_like(everything, dtype=torch.bool)
        kept[list(removed)] = False
        few = everything[torch.linspace(0, len(everything) - 1, min(FEW, len(everything)), dtype=torch.float64).round().long()]
        for index, counted in ((few, slice(None)), (everything, kept)):
            values, one_for_all = self._beginning(start, index)
            limit = max(_mean(values[counted]), _mean(one_for_all[counted])) + self._decay(start)
            found = _mean(self._losses(end, index[counted])[0]) + self._decay(end)
            if found <= limit:
                return None
        return RanAway(found, limit)

    def _decay(self, point: TrainingPoint) -> float:
        """``(w/2)‖θ‖²`` in units of the mean loss."""
        weight = self.loss.factor(self.examples.targets) * self.examples.num_examples
        return self.recipe.weight_decay / 2 * float(point.theta.square().sum(dtype=torch.float64)) / weight

    def _beginning(self, start: TrainingPoint, index: Tensor) -> tuple[Tensor, Tensor]:
        """``ℓ`` of the examples ``index`` at the start, and with their mean output for each: ``[n]`` both, kept for the next branch."""
        known = self._beginnings.get(len(index))
        if known is None or known[0] is not start:
            values, z = self._losses(start, index)
            targets = self.examples.targets
            one_for_all = [self.loss.value(z.expand(len(part), *z.shape[1:]), targets[part]) for part in index.split(CHUNK)]
            known = self._beginnings[len(index)] = start, values, torch.cat(one_for_all)
        return known[1:]

    def _losses(self, point: TrainingPoint, index: Tensor) -> tuple[Tensor, Tensor]:
        """``ℓ`` of the examples ``index`` in evaluation mode, ``[n]``, and the mean of their outputs, ``[1, *out]``."""
        self._theta.copy_(point.theta)
        self.load_buffers(point.buffers)
        self.model.eval()
        values, total = [], torch.zeros((), dtype=torch.float64, device=self.space.device)
        with isolated_random_state(self.space.device), torch.no_grad():
            for part in index.split(CHUNK):
                z = call_model(self.model, rows(self.examples.X, part))
                values.append(self.loss.value(z, self.examples.targets[part]))
                total = total + z.sum(dim=0, keepdim=True, dtype=torch.float64)
        return torch.cat(values), (total / len(index)).to(self.space.dtype)

    def gradient(
        self,
        point: TrainingPoint,
        *,
        removed: Sequence[int] = (),
        proximity: Proximity | None = None,
    ) -> Tensor:
        """``[P]``: the full-batch gradient of ``c Σ_{i ∉ removed} ℓ_i + (w/2)‖θ‖² + (λ/2)‖θ − anchor‖²`` in evaluation mode."""
        N = self.examples.num_examples
        weight = torch.full((N,), self.loss.factor(self.examples.targets), dtype=self._theta.dtype, device=self._theta.device)
        weight[list(removed)] = 0
        gradient = self._loss_gradient(point, self.examples, weight).add_(point.theta, alpha=self.recipe.weight_decay)
        return gradient if proximity is None else gradient.add_(point.theta - proximity.anchor, alpha=proximity.damping)

    def gradients_without(self, point: TrainingPoint, groups: Sequence[Sequence[int]]) -> Iterator[Tensor]:
        """``[P]`` each: :meth:`gradient` without each of ``groups``, from one pass over all examples and one over the removed ones.

        For networks that treat each example by itself.
        """
        full, factor = self.gradient(point), self.loss.factor(self.examples.targets)
        for removed in groups:
            weight = full.new_full((len(removed),), factor)
            yield full - self._loss_gradient(point, self.examples.subset(removed), weight) if removed else full

    def _loss_gradient(self, point: TrainingPoint, examples: Examples, weight: Tensor) -> Tensor:
        """``[P]``: ``Σ_i weight_i ∇ℓ_i`` in evaluation mode."""
        self._theta.copy_(point.theta)
        self.load_buffers(point.buffers)
        self._grad.zero_()
        self.model.eval()
        with torch.inference_mode(False), torch.enable_grad():
            for start in range(0, examples.num_examples, CHUNK):
                part = slice(start, start + CHUNK)
                z = call_model(self.model, rows(examples.X, part))
                g_z = self.loss.gradient(z.detach(), examples.targets[part])
                z.backward(g_z * weight[part].view(-1, *[1] * (g_z.dim() - 1)))
        return self._grad.clone()

    def buffers(self) -> dict[str, Tensor]:
        """Copies of the network's buffers as they are now."""
        return {name: buffer.detach().clone() for name, buffer in self.model.named_buffers()}

    def load_buffers(self, buffers: dict[str, Tensor]) -> None:
        """Give the network these buffers."""
        with torch.no_grad():
            for name, buffer in self.model.named_buffers():
                buffer.copy_(buffers[name])


def _mean(values: Tensor) -> float:
    return float(values.mean(dtype=torch.float64))
