"""Parameter sets on their way together: in the C++ core where it has all that a step needs, else under ``torch.vmap``."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from influence_ext.bregman.recipe import Recipe
from influence_ext.bregman.training import Proximity, Trainer, TrainingPoint, descend, first_line, isolated_random_state, no_moments, rows
from influence_ext.data import ModelInput, call_arguments
from influence_ext.ensemble import Ensemble


@dataclass(frozen=True)
class Problem:
    """Why sets cannot go on together, and at which level that is logged: errors are not what a probed network leads one to expect."""

    reason: str
    level: int


class Stack(ABC):
    """``k`` parameter sets that take their steps together, each without examples of its own.

    Args:
        trainer: Trains one set.
        point: Where all sets start.
        groups: The examples that each goes without.
        proximity: Added to the objective.
    """

    def __init__(self, trainer: Trainer, point: TrainingPoint, groups: Sequence[Sequence[int]], proximity: Proximity | None):
        self.trainer, self.point, self.proximity = trainer, point, proximity
        self.num_sets, self.num_steps = len(groups), point.num_steps
        self.scale = trainer.loss.factor(trainer.examples.targets) * trainer.examples.num_examples
        self.kept = kept_examples(groups, trainer.examples.num_examples)

    def walk(self, epoch: int) -> Problem | None:
        """Take the steps of one epoch; returns why this cannot go on together, if so.

        What fails for one set says nothing about the others, and a removed example, which is evaluated here and would not be one by one,
        may be what failed: training one by one tells.

        Raises:
            AssertionError: a mistake of this package, which training one by one would hide.
        """
        recipe, N = self.trainer.recipe, self.trainer.examples.num_examples
        total = torch.zeros(self.num_sets, dtype=torch.float64, device=self.point.theta.device)
        lr = recipe.lr * recipe.lr_factor(epoch)
        try:
            for batch in recipe.batch_order(epoch, N).to(self.kept.device).split(recipe.batch_size):
                self.num_steps += 1
                total += self.step(batch, lr)
        except AssertionError:
            raise
        except Exception as error:
            return Problem(first_line(error), logging.WARNING)
        # A finite sum says as much as finite elements, in one pass; a sum that is not may have overflowed.
        finite = torch.isfinite(total).all() and all(v.sum().isfinite() or v.isfinite().all() for v in self.parameters())
        return None if finite else Problem("a parameter or a training loss left the finite numbers", logging.INFO)

    @abstractmethod
    def step(self, batch: Tensor, lr: float) -> Tensor:
        """One step of every set; ``[k]``, finite where the sums of the losses over the kept examples are."""

    @abstractmethod
    def parameters(self) -> Sequence[Tensor]:
        """The values of all sets, ``[k, ...]`` each."""

    @abstractmethod
    def points(self) -> list[TrainingPoint]:
        """Where each set stands."""


class NativeStack(Stack):
    """Parameter sets ``[k, P]`` in the C++ core."""

    def __init__(
        self, trainer: Trainer, point: TrainingPoint, groups: Sequence[Sequence[int]], proximity: Proximity | None, ensemble: Ensemble
    ):
        super().__init__(trainer, point, groups, proximity)
        self._ensemble = ensemble
        self.kept = self.kept.to(point.theta.device)
        self.theta, *self.moments = (
            x.expand(self.num_sets, -1).clone(memory_format=torch.contiguous_format)
            for x in (point.theta, *(point.moments or no_moments(trainer.recipe, point.theta)))
        )

    def step(self, batch: Tensor, lr: float) -> Tensor:
        """See :meth:`Stack.step`."""
        return self._ensemble.step(
            self.theta,
            self.moments,
            batch,
            scale=self.scale / len(batch),
            kept=self.kept.index_select(1, batch),
            descent=descent(self.trainer.recipe, self.num_steps, lr, 0.0 if self.proximity is None else self.proximity.damping),
            anchor=None if self.proximity is None else self.proximity.anchor,
        )

    def parameters(self) -> Sequence[Tensor]:
        """See :meth:`Stack.parameters`."""
        return [self.theta]

    def points(self) -> list[TrainingPoint]:
        """See :meth:`Stack.points`."""
        buffers, moments = self.point.buffers, zip(*self.moments, strict=True)
        return [TrainingPoint(theta.clone(), buffers, m, self.num_steps) for theta, m in zip(self.theta, moments, strict=True)]


def kept_examples(groups: Sequence[Sequence[int]], num_examples: int) -> Tensor:
    """``[k, N]``: whether a set keeps an example."""
    kept = torch.ones(len(groups), num_examples, dtype=torch.bool)
    for k, removed in enumerate(groups):
        kept[k, list(removed)] = False
    return kept


def descent(recipe: Recipe, num_steps: int, lr: float, damping: float) -> dict[str, float]:
    """The recipe's update in the numbers of :meth:`Ensemble.step`."""
    common = {"decay": recipe.weight_decay, "damping": damping}
    if recipe.optimizer == "sgd":
        return {"lr": lr, "momentum": recipe.momentum, **common}
    beta1, beta2 = recipe.betas
    return {
        "lr": lr / (1 - beta1**num_steps),
        "one_minus_beta1": 1 - beta1,
        "beta2": beta2,
        "one_minus_beta2": 1 - beta2,
        "root_correction": (1 - beta2**num_steps) ** 0.5,
        "eps": recipe.eps,
        **common,
    }


class MappedStack(Stack):
    """Parameter sets ``{name: [k, *shape]}`` through one forward pass under ``torch.vmap`` and one backward pass, by PyTorch."""

    def __init__(self, trainer: Trainer, point: TrainingPoint, groups: Sequence[Sequence[int]], proximity: Proximity | None):
        super().__init__(trainer, point, groups, proximity)
        self.theta = {name: value.requires_grad_() for name, value in self._stacked(point.theta).items()}
        moments = [self._stacked(m) for m in point.moments]
        self.moments = {
            name: tuple(m[name] for m in moments) or no_moments(trainer.recipe, value.detach()) for name, value in self.theta.items()
        }
        self.damping = 0.0 if proximity is None else proximity.damping
        self.anchor = {} if proximity is None else trainer.space.unflatten(proximity.anchor)

    def _stacked(self, flat: Tensor) -> dict[str, Tensor]:
        values = self.trainer.space.unflatten(flat)
        return {
            name: value.expand(self.num_sets, *value.shape).clone(memory_format=torch.contiguous_format) for name, value in values.items()
        }

    def parameters(self) -> Sequence[Tensor]:
        """See :meth:`Stack.parameters`."""
        return [value.detach() for value in self.theta.values()]

    def points(self) -> list[TrainingPoint]:
        """See :meth:`Stack.points`."""
        flatten, count = self.trainer.space.flatten, len(no_moments(self.trainer.recipe, self.point.theta[:0]))
        theta = flatten({name: value.detach() for name, value in self.theta.items()})
        moments = [flatten({name: m[i] for name, m in self.moments.items()}) for i in range(count)]
        buffers = self.point.buffers
        return [TrainingPoint(theta[k].clone(), buffers, tuple(m[k] for m in moments), self.num_steps) for k in range(self.num_sets)]

    def walk(self, epoch: int) -> Problem | None:
        """See :meth:`Stack.walk`."""
        self.trainer.load_buffers(self.point.buffers)
        self.trainer.model.train()
        with isolated_random_state(self.point.theta.device), torch.enable_grad():
            return super().walk(epoch)

    def step(self, batch: Tensor, lr: float) -> Tensor:
        """See :meth:`Stack.step`."""
        trainer, k = self.trainer, self.num_sets
        kept = self.kept[:, batch]
        dropped = None if kept.all() else ~kept.to(self.point.theta.device)
        index = batch.to(self.point.theta.device)
        t = trainer.examples.targets[index]
        z = outputs(trainer, self.theta, rows(trainer.examples.X, index))
        flat = z.detach().reshape(k * len(batch), *z.shape[2:])
        t = t.expand(k, *t.shape).reshape(k * len(batch), *t.shape[1:])
        losses = trainer.loss.value(flat, t).view(k, len(batch))
        g = (trainer.loss.gradient(flat, t) * (self.scale / len(batch))).view(z.shape)
        if dropped is not None:
            losses.masked_fill_(dropped, 0)
            g.masked_fill_(dropped.view(*dropped.shape, *[1] * (g.dim() - 2)), 0)
        grads = torch.autograd.grad(z, list(self.theta.values()), g, allow_unused=True)
        decay = trainer.recipe.weight_decay
        with torch.no_grad():
            for (name, theta), found in zip(self.theta.items(), grads, strict=True):
                # What autograd returns may be shared between parameters, so nothing is added to it in place.
                grad = torch.zeros_like(theta) if found is None else found
                if decay:
                    grad = grad.add(theta, alpha=decay)
                if self.anchor:
                    grad = grad.add(theta - self.anchor[name], alpha=self.damping)
                descend(trainer.recipe, theta, grad, self.moments[name], self.num_steps, lr)
        return losses.sum(dim=1, dtype=torch.float64)


def outputs(trainer: Trainer, theta: dict[str, Tensor], X: ModelInput) -> Tensor:
    """``[k, B, *out]``: the trainer's network at parameters ``{name: [k, *shape]}``, on one batch for all."""
    args, kwargs = call_arguments(X)

    def network(parameters: dict[str, Tensor]) -> Tensor:
        with _StackedProducts():
            z: Tensor = functional_call(trainer.model, parameters, args, kwargs)
        return z

    z: Tensor = torch.vmap(network)(theta)
    return z


class _StackedProducts(TorchFunctionMode):
    """Sends ``torch.nn.functional.linear`` to :class:`_Linear`."""

    def __torch_function__(self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is F.linear:
            return _linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    z: Tensor = _Linear.apply(input, weight)
    return z if bias is None else z + bias


class _Linear(torch.autograd.Function):
    """``x Wᵀ``, whose rule for stacked weights makes one product of all where they share ``x``.

    PyTorch's own rule forms ``x Wᵀ`` set by set and ``(xᵀ g)ᵀ`` as the gradient of W, strided across each weight, for which the update
    pays. ``W xᵀ`` gives that gradient as ``g x``, in the order in which W lies.
    """

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        g_weight = g.reshape(-1, g.shape[-1]).mT @ x.reshape(-1, x.shape[-1]) if ctx.needs_input_grad[1] else None
        return g @ weight if ctx.needs_input_grad[0] else None, g_weight

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, int | None], x: Tensor, weight: Tensor) -> tuple[Tensor, int]:
        """Differentiated as it stands, outside of the map."""
        if in_dims[1] is None:  # weights that are not trained
            return F.linear(x.movedim(in_dims[0] or 0, 0), weight), 0
        k, (outputs, features) = info.batch_size, weight.movedim(in_dims[1], 0).shape[1:]
        weight = weight.movedim(in_dims[1], 0)
        if in_dims[0] is None:
            z = (weight.reshape(k * outputs, features) @ x.reshape(-1, features).mT).view(k, outputs, -1)
            return z.mT.unflatten(1, x.shape[:-1]) if x.dim() > 1 else z[:, :, 0], 0
        x = x.movedim(in_dims[0], 0)
        z = weight @ x.reshape(k, -1, features).mT
        return z.mT.unflatten(1, x.shape[1:-1]) if x.dim() > 2 else z[:, :, 0], 0
