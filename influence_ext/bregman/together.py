"""Many trainings at once: parameter sets that differ in the examples they do without take their steps together."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import functional_call

from influence_ext.bregman.progress import Progress, onward
from influence_ext.bregman.stacks import MappedStack, NativeStack, Problem, Stack, kept_examples, outputs
from influence_ext.bregman.training import Proximity, Trainer, TrainingPoint, first_line, isolated_random_state, rows
from influence_ext.data import ModelInput, call_arguments
from influence_ext.ensemble import Ensemble
from influence_ext.errors import InfluenceExtError
from influence_ext.plan import Plan

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

    A step evaluates every set's network on the full batch; the output gradients of a set's removed examples are zero, the divisor stays
    that of the full batch, and the recipe's update is by elements. So each set's trajectory is the one that :class:`Trainer` gives, up to
    the order of summation. The C++ core takes the steps where it has all of network and loss (:class:`NativeStack`), ``torch.vmap``
    elsewhere (:class:`MappedStack`).

    This holds for networks that treat each example by itself, draw no random numbers and change no buffers. Others, and whatever
    both refuse, are found by a probe on the first batch and trained one by one, with the reason logged.

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
        report = onward(report)
        obstacle: str | None = None
        at_once = 1
        if len(groups) > 1:
            obstacle, at_once = self._room(point, len(groups))
            if obstacle is not None:
                _log.info("%s: %d removed sets are trained one by one: %s.", label, len(groups), obstacle)
        if at_once == 1:
            return self._one_by_one(point, epochs, groups, obstacle, proximity, report, label, 0, total)
        found: list[Trained] = []
        for first in range(0, len(groups), at_once):
            members = groups[first : first + at_once]
            stack = self._stack(point, members, proximity)
            problem: Problem | None = None
            for epoch in epochs:
                report(label, first * len(epochs) + len(members) * (epoch - epochs.start), total)
                problem = stack.walk(epoch)
                if problem is not None:
                    break
            if problem is None:
                found += [Trained(end) for end in stack.points()]
                continue
            _log.log(problem.level, "%s: %d removed sets are trained one by one: %s.", label, len(members), problem.reason)
            found += self._one_by_one(point, epochs, members, problem.reason, proximity, report, label, first * len(epochs), total)
        report(label, total, total)
        return found

    def _one_by_one(
        self,
        point: TrainingPoint,
        epochs: range,
        groups: Sequence[Sequence[int]],
        reason: str | None,
        proximity: Proximity | None,
        report: Progress,
        label: str,
        done: int,
        total: int,
    ) -> list[Trained]:
        """Train each set by itself, for ``reason``; ``done`` of ``total`` epochs are behind."""
        found = []
        for k, removed in enumerate(groups):
            before = done + k * len(epochs)
            end, _ = self._trainer.advance(
                point,
                epochs,
                removed=removed,
                proximity=proximity,
                report=lambda name, epoch, _, before=before: report(name, before + epoch, total),  # type: ignore[misc]
                label=label,
            )
            found.append(Trained(end, reason))
        return found

    def gradient_norms(
        self, found: Sequence[Trained], groups: Sequence[Sequence[int]], *, proximity: Proximity | None = None
    ) -> list[float]:
        """Norm of :meth:`Trainer.gradient` where each set ended, in the C++ core if that took the set's steps."""
        trainer, ensemble = self._trainer, None if self._probed is None else self._probed.ensemble
        if ensemble is None or len(found) == 1 or any(trained.one_by_one is not None for trained in found):
            by_one = (trainer.gradient(end.point, removed=g, proximity=proximity) for end, g in zip(found, groups, strict=True))
            return [float(gradient.double().norm()) for gradient in by_one]
        _, at_once = self._room(found[0].point, len(found))
        examples, recipe = trainer.examples, trainer.recipe
        batches = torch.arange(examples.num_examples, device=trainer.space.device).split(recipe.batch_size)
        norms: list[float] = []
        for first in range(0, len(found), at_once):
            part = slice(first, first + at_once)
            kept = kept_examples(groups[part], examples.num_examples).to(trainer.space.device)
            gradients = ensemble.gradients(
                torch.stack([trained.point.theta for trained in found[part]]),
                batches,
                scale=trainer.loss.factor(examples.targets),
                kept=[kept.index_select(1, batch) for batch in batches],
                decay=recipe.weight_decay,
                damping=0.0 if proximity is None else proximity.damping,
                anchor=None if proximity is None else proximity.anchor,
            )
            norms += gradients.double().norm(dim=1).tolist()
        return norms

    def _stack(self, point: TrainingPoint, members: Sequence[Sequence[int]], proximity: Proximity | None) -> Stack:
        ensemble = None if self._probed is None else self._probed.ensemble
        if ensemble is None:
            return MappedStack(self._trainer, point, members, proximity)
        return NativeStack(self._trainer, point, members, proximity, ensemble)

    def _room(self, point: TrainingPoint, num_sets: int) -> tuple[str | None, int]:
        """Why sets cannot be trained together, or how many at a time, in parts as equal as they can be."""
        if self._probed is None:
            self._probed = _probe(self._trainer, point)
        if self._probed.obstacle is not None:
            return self._probed.obstacle, 1
        shared, each = self._probed.bytes_shared, self._probed.bytes_per_set
        most = (self._budget - shared) // each
        if most < 2:
            return f"two sets together take {shared + 2 * each} bytes, more than the memory budget of {self._budget}", 1
        return None, math.ceil(num_sets / math.ceil(num_sets / most))


@dataclass(frozen=True)
class _Probe:
    """Why a network's trainings cannot run together (``None``: they can), what memory they take, and what takes the steps."""

    obstacle: str | None
    bytes_per_set: int = 0
    bytes_shared: int = 0
    ensemble: Ensemble | None = None


def _probe(trainer: Trainer, point: TrainingPoint) -> _Probe:
    """Compares two sets together, one without the batch's first example, with each by itself, on the first batch and at two points.

    "Together" is first tried as the C++ core does it, in evaluation mode, then as ``torch.vmap`` does.
    """
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
        native = _native(trainer, X, thetas, gs)
        if native is not None and _agree(by_one, native.together, first, space.dtype):
            return _Probe(None, native.bytes_per_set, native.bytes_shared, native.ensemble)
        trainer.model.train()
        theta = {name: value.clone().requires_grad_() for name, value in space.unflatten(thetas).items()}
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                z = outputs(trainer, theta, X)
                gradients = _gradient(trainer, theta, z, gs)
        except Exception as error:
            return _Probe(f"torch.vmap refuses it ({first_line(error)})")
    missing = [str(w.message) for w in caught if "batching rule" in str(w.message)]
    if missing:
        return _Probe(f"torch.vmap has no rule for one of its operators ({missing[0].splitlines()[0]})")
    if not _agree(by_one, [(z[k].detach(), gradients[k]) for k in range(2)], first, space.dtype):
        return _Probe("together it gives other results, as where an example's output depends on the others in its batch")
    return _Probe(None, bytes_per_set)


_Results = Sequence[tuple[Tensor, Tensor]]
"""Outputs and gradient at either point."""


def _agree(by_one: _Results, together: _Results, first: int, dtype: torch.dtype) -> bool:
    """Whether outputs and gradients are the same; the second set's outputs count from example ``first`` on."""
    for one, many in zip(by_one, [together[0], (together[1][0][first:], together[1][1])], strict=True):
        for a, b in zip(one, many, strict=True):
            if a.shape != b.shape or not float((a - b).norm()) <= AGREEMENT[dtype] * float(a.norm()):
                return False
    return True


@dataclass(frozen=True)
class _Native:
    """The core's ensemble, what it takes for each set and for all, and what it gives at the two points of the probe."""

    ensemble: Ensemble
    bytes_per_set: int
    bytes_shared: int
    together: _Results


def _native(trainer: Trainer, X: ModelInput, thetas: Tensor, gs: Tensor) -> _Native | None:
    """None where the core has not all that a step needs."""
    space = trainer.space
    if space.dtype not in AGREEMENT:
        return None
    trainer.model.eval()
    try:
        plan = Plan.of(trainer.model, X)
        ensemble = plan.ensemble(trainer.examples, trainer.loss)
        if ensemble is None or plan.space.names != space.names:
            return None
        together = []
        tape = plan.linearize(X, thetas[0])
        for theta, g in zip(thetas, gs, strict=True):
            tape.relinearize(theta)
            together.append((tape.outputs, tape.vjp(g[None])[0]))
    except InfluenceExtError as error:
        _log.debug("together: not in the C++ core: %s", error)
        return None
    except AssertionError:
        raise
    except Exception as error:
        _log.warning("together: the C++ core failed, torch.vmap takes the steps: %s", first_line(error))
        return None
    itemsize = space.dtype.itemsize
    P = space.num_parameters * itemsize
    args, kwargs = call_arguments(X)
    batch = sum(x.nbytes for x in (*args, *(kwargs or {}).values()) if isinstance(x, Tensor))
    sizes = 2 if trainer.examples.num_examples % trainer.recipe.batch_size else 1
    ends = 4 * P  # parameters, up to two moments, and where the set ends
    if ensemble.sets_at_once(thetas) > 1:
        tape.set_schedule("by_operator")  # as the steps of many sets run
        # For each set a tape, another if the last batch is smaller, a sweep and a gradient; targets, losses and cotangents.
        each = sizes * tape.cached_bytes + tape.workspace_bytes(1) + P + 3 * gs[0].numel() * itemsize
        return _Native(ensemble, ends + each, batch, together)
    # For each thread a tape, its workspace and a gradient; the batch as it is and packed for two products; twice if the last is smaller.
    shared = torch.get_num_threads() * (tape.cached_bytes + tape.workspace_bytes(1) + P) + 3 * batch
    return _Native(ensemble, ends, sizes * shared, together)


def _gradient(trainer: Trainer, theta: dict[str, Tensor], z: Tensor, g: Tensor) -> Tensor:
    """``[..., P]``: the product of ``g`` with the Jacobian of ``z``, zero for parameters that ``z`` does not depend on."""
    grads = torch.autograd.grad(z, list(theta.values()), g, allow_unused=True)
    return trainer.space.flatten([torch.zeros_like(t) if grad is None else grad for t, grad in zip(theta.values(), grads, strict=True)])


def _random_state(device: torch.device) -> Tensor:
    """The state of the generators a network on ``device`` may draw from."""
    state = torch.get_rng_state()
    return torch.cat([state, torch.cuda.get_rng_state(device)]) if device.type == "cuda" else state
