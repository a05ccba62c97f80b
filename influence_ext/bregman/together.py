"""Many trainings at once: parameter sets that differ in the examples they do without take their steps together."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from influence_ext.bregman.progress import Progress
from influence_ext.bregman.training import Proximity, Trainer, TrainingPoint, descend, isolated_random_state, no_moments, rows
from influence_ext.data import ModelInput, call_arguments

MEMORY_BUDGET = 2**30
"""Bytes that sets which are trained together may take where no budget is given."""
AGREEMENT = {torch.float64: 1e-10, torch.float32: 1e-4}
"""Relative deviation from one-by-one results up to which the probe takes stacked ones for the same."""

_log = logging.getLogger("influence_ext")


@dataclass(frozen=True, eq=False)
class Trained:
    """Where one set's training ended.

    Attributes:
        point: The end.
        one_by_one: Why it was trained by itself although there were several sets; ``None`` where it was trained together with others
            (or was alone from the start).
    """

    point: TrainingPoint
    one_by_one: str | None = None


class TogetherTrainer:
    """Trains several parameter sets from one point in step, each without examples of its own.

    A step evaluates the network once under ``torch.vmap`` over parameters ``[k, *shape]`` on the full batch; the output gradients
    of a set's removed examples are zero, the divisor stays that of the full batch, and the recipe's update is by elements. So each
    set's trajectory is the one that :class:`Trainer` gives, up to the order of summation.

    This holds for networks that treat each example by itself, draw no random numbers and change no buffers. Others, and whatever
    ``torch.vmap`` refuses, are found by a probe on the first batch and trained one by one, with the reason logged.

    Args:
        trainer: Trains one set; its private network serves here too.
        memory_budget: Bytes that sets trained together may take; it decides how many those are.
    """

    def __init__(self, trainer: Trainer, memory_budget: int | None = None):
        self._trainer = trainer
        self._budget = MEMORY_BUDGET if memory_budget is None else memory_budget
        self._probed: _Probe | None = None

    def advance(
        self,
        point: TrainingPoint,
        epochs: range,
        groups: Sequence[Sequence[int]],
        *,
        proximity: Proximity | None = None,
        report: Progress,
        label: str,
    ) -> list[Trained]:
        """Train from ``point`` through ``epochs`` once for each of ``groups``, without that group's examples.

        Returns:
            The end of each, in order.

        Raises:
            DivergenceError: a set left the finite numbers.

        Cost:
            For each set and step a forward and a backward pass; the overhead of a step is paid once for all sets that are together.
        """
        total = len(groups) * len(epochs)

        def alone(first: int, reason: str | None, members: Sequence[Sequence[int]]) -> list[Trained]:
            found = []
            for k, removed in enumerate(members):
                done = (first + k) * len(epochs)
                end, _ = self._trainer.advance(
                    point,
                    epochs,
                    removed=removed,
                    proximity=proximity,
                    report=lambda name, epoch, _, done=done: report(name, done + epoch, total),  # type: ignore[misc]
                    label=label,
                )
                found.append(Trained(end, reason))
            return found

        if len(groups) == 1:
            return alone(0, None, groups)
        obstacle, at_once = self._room(point, len(groups))
        if obstacle is not None:
            _log.info("%s: %d removed sets are trained one by one: %s.", label, len(groups), obstacle)
            return alone(0, obstacle, groups)
        found: list[Trained] = []
        for first in range(0, len(groups), at_once):
            members = groups[first : first + at_once]
            stack = _Stack(self._trainer, point, members, proximity)
            problem: str | None = None
            for epoch in epochs:
                report(label, first * len(epochs) + len(members) * (epoch - epochs.start), total)
                problem = stack.walk(epoch)
                if problem is not None:
                    break
            if problem is None:
                found += [Trained(end) for end in stack.points()]
                continue
            _log.info("%s: %d removed sets are trained one by one: %s.", label, len(members), problem)
            found += alone(first, problem, members)
        report(label, total, total)
        return found

    def _room(self, point: TrainingPoint, num_sets: int) -> tuple[str | None, int]:
        """Why sets cannot be trained together, or how many at a time, in parts as equal as they can be."""
        if self._probed is None:
            self._probed = _probe(self._trainer, point)
        if self._probed.obstacle is not None:
            return self._probed.obstacle, 1
        most = self._budget // self._probed.bytes_per_set
        if most < 2:
            return f"two sets together take {2 * self._probed.bytes_per_set} bytes, more than the memory budget of {self._budget}", 1
        return None, math.ceil(num_sets / math.ceil(num_sets / most))


class _Stack:
    """Parameter sets ``{name: [k, *shape]}`` on their way, with the optimiser's state of each."""

    def __init__(self, trainer: Trainer, point: TrainingPoint, groups: Sequence[Sequence[int]], proximity: Proximity | None):
        self.trainer, self.point = trainer, point
        self.num_sets, self.num_steps = len(groups), point.num_steps
        self.theta = {name: value.requires_grad_() for name, value in self._stacked(point.theta).items()}
        moments = [self._stacked(m) for m in point.moments]
        self.moments = {
            name: tuple(m[name] for m in moments) or no_moments(trainer.recipe, value.detach()) for name, value in self.theta.items()
        }
        self.scale = trainer.loss.factor(trainer.examples.targets) * trainer.examples.num_examples
        self.damping = 0.0 if proximity is None else proximity.damping
        self.anchor = {} if proximity is None else trainer.space.unflatten(proximity.anchor)
        self.kept = torch.ones(self.num_sets, trainer.examples.num_examples, dtype=torch.bool)
        for k, removed in enumerate(groups):
            self.kept[k, list(removed)] = False

    def _stacked(self, flat: Tensor) -> dict[str, Tensor]:
        values = self.trainer.space.unflatten(flat)
        return {
            name: value.expand(self.num_sets, *value.shape).clone(memory_format=torch.contiguous_format) for name, value in values.items()
        }

    def points(self) -> list[TrainingPoint]:
        """Where each set stands."""
        flatten, count = self.trainer.space.flatten, len(no_moments(self.trainer.recipe, self.point.theta[:0]))
        theta = flatten({name: value.detach() for name, value in self.theta.items()})
        moments = [flatten({name: m[i] for name, m in self.moments.items()}) for i in range(count)]
        buffers = self.point.buffers
        return [TrainingPoint(theta[k], buffers, tuple(m[k] for m in moments), self.num_steps) for k in range(self.num_sets)]

    def walk(self, epoch: int) -> str | None:
        """Take the steps of one epoch; returns why this cannot go on together, if so.

        What fails for one set says nothing about the others, and a removed example, which is evaluated here and would not be one by one,
        may be what failed: training one by one tells.
        """
        trainer = self.trainer
        recipe, N = trainer.recipe, trainer.examples.num_examples
        device = self.point.theta.device
        trainer.load_buffers(self.point.buffers)
        trainer.model.train()
        total = torch.zeros(self.num_sets, dtype=torch.float64, device=device)
        lr = recipe.lr * recipe.lr_factor(epoch)
        try:
            with isolated_random_state(device), torch.enable_grad():
                for batch in recipe.batch_order(epoch, N).split(recipe.batch_size):
                    total += self._step(batch, lr)
        except Exception as error:
            return _first_line(error)
        # A finite sum says as much as finite elements, in one pass; a sum that is not may have overflowed.
        finite = torch.isfinite(total).all() and all(v.detach().sum().isfinite() or v.isfinite().all() for v in self.theta.values())
        return None if finite else "a parameter or a training loss left the finite numbers"

    def _step(self, batch: Tensor, lr: float) -> Tensor:
        """One step of every set; ``[k]``, the sums of the losses over the kept examples."""
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
        self.num_steps += 1
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


@dataclass(frozen=True)
class _Probe:
    """Why a network's trainings cannot run together (``None``: they can), and what memory one of them takes."""

    obstacle: str | None
    bytes_per_set: int = 0


def _probe(trainer: Trainer, point: TrainingPoint) -> _Probe:
    """Compares two sets together, one without the batch's first example, with each by itself, on the first batch and at two points."""
    space, N = trainer.space, trainer.examples.num_examples
    batch = trainer.recipe.batch_order(0, N)[: trainer.recipe.batch_size].to(space.device)
    X = rows(trainer.examples.X, batch)
    thetas = torch.stack([point.theta, 1.01 * point.theta])
    stored: dict[int, int] = {}

    def note(x: Tensor) -> Tensor:
        stored[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    def by_itself(theta: Tensor, X: ModelInput) -> tuple[dict[str, Tensor], Tensor]:
        parameters = {name: value.clone().requires_grad_() for name, value in space.unflatten(theta).items()}
        args, kwargs = call_arguments(X)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            return parameters, functional_call(trainer.model, parameters, args, kwargs)

    trainer.load_buffers(point.buffers)
    trainer.model.train()
    with isolated_random_state(space.device), torch.enable_grad():
        state = _random_state(space.device)
        parameters, z = by_itself(thetas[0], X)
        bytes_per_set = sum(stored.values()) + space.num_parameters * space.dtype.itemsize * 6 + 4 * z.numel() * z.element_size()
        if not torch.equal(state, _random_state(space.device)):
            return _Probe("the network draws random numbers while it is trained, as dropout does")
        if any(not torch.equal(now, point.buffers[name]) for name, now in trainer.buffers().items()):
            return _Probe("training changes the network's buffers, as running statistics do")
        g = torch.randn(z.shape, generator=torch.Generator().manual_seed(0), dtype=z.dtype).to(z.device)
        first = min(len(batch) - 1, 1)
        by_one = [(z.detach(), _gradient(trainer, parameters, z, g))]
        parameters, z = by_itself(thetas[1], rows(X, slice(first, None)))
        by_one.append((z.detach(), _gradient(trainer, parameters, z, g[first:])))
        gs = g.expand(2, *g.shape).clone()
        gs[1, :first] = 0
        theta = {name: value.clone().requires_grad_() for name, value in space.unflatten(thetas).items()}
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                z = outputs(trainer, theta, X)
                gradients = _gradient(trainer, theta, z, gs)
        except Exception as error:
            return _Probe(f"torch.vmap refuses it ({_first_line(error)})")
    missing = [str(w.message) for w in caught if "batching rule" in str(w.message)]
    if missing:
        return _Probe(f"torch.vmap has no rule for one of its operators ({missing[0].splitlines()[0]})")
    together = [(z[0].detach(), gradients[0]), (z[1, first:].detach(), gradients[1])]
    for one, many in zip(by_one, together, strict=True):
        for a, b in zip(one, many, strict=True):
            if a.shape != b.shape or not float((a - b).norm()) <= AGREEMENT[space.dtype] * float(a.norm()):
                return _Probe("together it gives other results, as where an example's output depends on the others in its batch")
    return _Probe(None, bytes_per_set)


def _gradient(trainer: Trainer, theta: dict[str, Tensor], z: Tensor, g: Tensor) -> Tensor:
    """``[..., P]``: the product of ``g`` with the Jacobian of ``z``, zero for parameters that ``z`` does not depend on."""
    grads = torch.autograd.grad(z, list(theta.values()), g, allow_unused=True)
    return trainer.space.flatten([torch.zeros_like(t) if grad is None else grad for t, grad in zip(theta.values(), grads, strict=True)])


def _random_state(device: torch.device) -> Tensor:
    """The state of the generators a network on ``device`` may draw from."""
    state = torch.get_rng_state()
    return torch.cat([state, torch.cuda.get_rng_state(device)]) if device.type == "cuda" else state


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}".removesuffix(": ").rstrip(".")
