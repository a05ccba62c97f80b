"""The branches that retrain: from the initialisation, from θs, and from θs with a proximity term."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from influence_ext.bregman.checks import check_damping, check_search
from influence_ext.bregman.minimise import minimise
from influence_ext.bregman.objective import BregmanObjective, Reference
from influence_ext.bregman.pbrf import checked, default_rtol, response_at
from influence_ext.bregman.progress import Progress, portion, reporter
from influence_ext.bregman.recipe import Run
from influence_ext.bregman.response import LateNorms, Norms, Response, ResponseStatus, TrainedNetwork, removed_indices
from influence_ext.bregman.together import TogetherTrainer, Trained
from influence_ext.bregman.training import Proximity, RanAway, Trainer
from influence_ext.checks import check_budget, is_answer, is_count, is_iterable, is_one_of
from influence_ext.context import standalone
from influence_ext.errors import ArgumentError

Start = Literal["cold", "warm"]


@standalone
@torch.inference_mode(False)
def retrain(
    run: Run,
    remove: Iterable[int] = (),
    start: Start = "cold",
    *,
    epochs: int | None = None,
    converge: bool = False,
    rtol: float | None = None,
    max_steps: int = 200,
    progress: bool | Progress = False,
) -> Response:
    r"""Train again without the examples ``remove``: minimise ``Q₋S(θ) = c Σ_{i ∉ S} ℓ_i(θ) + (w/2)‖θ‖²``, ``c = 1/N`` or 1.

    ``c`` and the size a batch is divided by stay those of the full data, so the objective differs from the base run's by the removed
    terms alone. Batches are those of the base run with the removed examples masked out. ``"cold"`` starts at the base run's θ₀ and
    walks its ``K`` epochs, then ``K/2`` more; ``"warm"`` starts at θs, with the optimiser's state there, and walks the same ``K/2``.
    With nothing removed both end at the same parameters, bit for bit.

    Args:
        run: The base run.
        remove: Indices of the training examples removed together.
        start: ``"cold"`` or ``"warm"``.
        epochs: Epochs after the first ``K``; ``None`` is ``K/2``, rounded up.
        converge: Solve to convergence instead of those epochs, by truncated Newton-CG on the full-batch objective.
        rtol: Goal of ``converge`` for the relative gradient norm; ``None`` is 1e-6 in float64 and 1e-4 in float32.
        max_steps: Bound on the Newton steps of ``converge``.
        progress: ``True`` for a line on stderr, or a function ``(label, done, total)``.

    Returns:
        The response; its gradient norm is that of ``Q₋S`` at its end. ``relative_gradient_norm`` compares with θs (with the point after the
        first ``K`` epochs for a cold start that is solved to convergence).

    Raises:
        ArgumentError: an option makes no sense.
        DivergenceError: training left the finite numbers.

    Warns:
        NumericalWarning: the response's ``status`` is no success, as where training diverged within the finite numbers.

    Cost:
        The epochs named, by the training loop of :func:`train`.

    Reference:
        Bae et al. 2022, section 3 and appendix on the protocol.
    """
    if not is_one_of(start, ("cold", "warm")):
        raise ArgumentError(f"retrain: expected start to be 'cold' or 'warm', got {start!r}; choose one.")
    branches = Branches(run, who="retrain", epochs=epochs, converge=converge, rtol=rtol, max_steps=max_steps)
    removed = removed_indices(remove, run.data.num_examples, who="retrain")
    report = reporter(progress, "retrain")
    response = (branches.cold([removed], report) if start == "cold" else branches.warm([removed], report))[0]
    return checked(response, "raise", who="retrain")


@standalone
@torch.inference_mode(False)
def retrain_many(
    run: Run,
    remove: Iterable[Iterable[int]],
    start: Start = "cold",
    *,
    epochs: int | None = None,
    converge: bool = False,
    rtol: float | None = None,
    max_steps: int = 200,
    memory_budget: int | None = None,
    progress: bool | Progress = False,
) -> list[Response]:
    r"""Train again without each of several removed sets, all sets together: :func:`retrain` for every set of ``remove``.

    The trainings step in time, each set with its own mask on the batch: in the C++ core, a set to a thread at a time, where network and
    loss run there on a CPU, else under ``torch.vmap``. Every trajectory is that of :func:`retrain` on the set by itself (batches, their
    order, the divisor of a batch, the optimiser's arithmetic) up to the order of summation. A network whose trainings cannot share a step
    (batch norm in training mode, dropout, operators that the core has not and ``torch.vmap`` refuses) is found by a probe before training
    and trained one by one: ``one_by_one`` of the response and a line at INFO level of the logger ``influence_ext`` say so and why.

    Args:
        run: The base run.
        remove: The removed sets, each a list of indices.
        start: ``"cold"`` or ``"warm"``.
        epochs: Epochs after the first ``K``; ``None`` is ``K/2``, rounded up.
        converge: Solve to convergence instead of those epochs, one set after the other; only the first ``K`` epochs of a cold start are
            trained together.
        rtol: Goal of ``converge`` for the relative gradient norm; ``None`` is 1e-6 in float64 and 1e-4 in float32.
        max_steps: Bound on the Newton steps of ``converge``.
        memory_budget: Bytes that sets in training may take together, a number of at least 0 such as ``2e9``; ``None`` is 1 GiB. It decides
            how many are trained at a time.
        progress: ``True`` for a line on stderr, or a function ``(label, done, total)``.

    Returns:
        One response for each set, in order.

    Raises:
        ArgumentError: no set, or an option makes no sense.
        DivergenceError: training left the finite numbers.

    Warns:
        NumericalWarning: the response's ``status`` is no success, as where training diverged within the finite numbers.

    Cost:
        The arithmetic of the trainings one by one; what a step costs beside that is paid once for all sets. Memory: for each set trained at
        a time, its parameters with gradient and moments, and the activations of a batch (in the C++ core the latter for each thread).
    """
    if not is_one_of(start, ("cold", "warm")):
        raise ArgumentError(f"retrain_many: expected start to be 'cold' or 'warm', got {start!r}; choose one.")
    groups = removed_sets(run, remove, who="retrain_many")
    branches = Branches(
        run, who="retrain_many", epochs=epochs, converge=converge, rtol=rtol, max_steps=max_steps, memory_budget=memory_budget
    )
    report = reporter(progress, "retrain_many")
    responses = branches.cold(groups, report) if start == "cold" else branches.warm(groups, report)
    return [checked(response, "raise", who="retrain_many") for response in responses]


@standalone
@torch.inference_mode(False)
def proximal_response(
    run: Run,
    remove: Iterable[int] = (),
    damping: float = 1e-3,
    *,
    epochs: int | None = None,
    converge: bool = False,
    rtol: float | None = None,
    max_steps: int = 200,
    progress: bool | Progress = False,
) -> Response:
    r"""Warm start held back: minimise ``Q₋S(θ) + (λ/2)‖θ − θs‖²`` from θs, ``Q₋S`` as in :func:`retrain`.

    Args:
        run: The base run.
        remove: Indices of the training examples removed together.
        damping: λ. The weight decay stays where the training has it, in ``(w/2)‖θ‖²``. With SGD and ``epochs``, ``λ + w`` has to be below
            ``2 (1 + momentum) / lr``, where its steps are stable, in one epoch at least of those that the schedule names
            and in which lr is not 0. That is necessary and not enough: small steps in one epoch do not take back what large ones in the
            others have made of it, and ``status`` and ``relative_gradient_norm`` tell how it ended.
        epochs: Epochs from θs; ``None`` is ``K/2``, rounded up.
        converge: Solve to convergence instead of those epochs.
        rtol: Goal of ``converge`` for the relative gradient norm; ``None`` is 1e-6 in float64 and 1e-4 in float32.
        max_steps: Bound on the Newton steps of ``converge``.
        progress: ``True`` for a line on stderr, or a function ``(label, done, total)``.

    Returns:
        The response.

    Raises:
        ArgumentError: an option makes no sense.
        DivergenceError: training left the finite numbers.

    Warns:
        NumericalWarning: the response's ``status`` is no success, as where training diverged within the finite numbers.

    Reference:
        Bae et al. 2022, section 3.
    """
    branches = Branches(run, who="proximal_response", epochs=epochs, converge=converge, rtol=rtol, max_steps=max_steps)
    branches.check_proximity(damping)
    removed = removed_indices(remove, run.data.num_examples, who="proximal_response")
    response = branches.proximal([removed], damping, reporter(progress, "proximal_response"))[0]
    return checked(response, "raise", who="proximal_response")


@standalone
@torch.inference_mode(False)
def proximal_response_many(
    run: Run,
    remove: Iterable[Iterable[int]],
    damping: float = 1e-3,
    *,
    epochs: int | None = None,
    converge: bool = False,
    rtol: float | None = None,
    max_steps: int = 200,
    memory_budget: int | None = None,
    progress: bool | Progress = False,
) -> list[Response]:
    r""":func:`proximal_response` for every set of ``remove``, trained together as by :func:`retrain_many`.

    Args:
        run: The base run.
        remove: The removed sets, each a list of indices.
        damping: λ.
        epochs: Epochs from θs; ``None`` is ``K/2``, rounded up.
        converge: Solve to convergence instead of those epochs, one set after the other.
        rtol: Goal of ``converge`` for the relative gradient norm; ``None`` is 1e-6 in float64 and 1e-4 in float32.
        max_steps: Bound on the Newton steps of ``converge``.
        memory_budget: See :func:`retrain_many`.
        progress: ``True`` for a line on stderr, or a function ``(label, done, total)``.

    Returns:
        One response for each set, in order.

    Raises:
        ArgumentError: no set, or an option makes no sense.
        DivergenceError: training left the finite numbers.

    Warns:
        NumericalWarning: the response's ``status`` is no success, as where training diverged within the finite numbers.

    Cost:
        See :func:`retrain_many`.
    """
    groups = removed_sets(run, remove, who="proximal_response_many")
    branches = Branches(
        run, who="proximal_response_many", epochs=epochs, converge=converge, rtol=rtol, max_steps=max_steps, memory_budget=memory_budget
    )
    branches.check_proximity(damping)
    responses = branches.proximal(groups, damping, reporter(progress, "proximal_response_many"))
    return [checked(response, "raise", who="proximal_response_many") for response in responses]


class Branches:
    """The retraining branches of one run; the network's copies and θs's tape are made once for all removed sets.

    Args:
        run: The base run, only read.
        who: Named in error messages.
        epochs: Epochs after base training.
        converge: Solve to convergence instead.
        rtol: Goal of that.
        max_steps: Its bound.
        memory_budget: Bytes that sets trained together may take.
        reference: Shared with other responses of the same run where there is one.
    """

    def __init__(
        self,
        run: Run,
        *,
        who: str,
        epochs: int | None = None,
        converge: bool = False,
        rtol: float | None = None,
        max_steps: int = 200,
        memory_budget: int | None = None,
        reference: Reference | None = None,
    ):
        if not isinstance(run, Run):
            raise ArgumentError(f"{who}: expected a Run, got {type(run).__name__}; train the network with train(recipe, data).")
        check_search(rtol, max_steps, who=who)
        if epochs is not None and not is_count(epochs):
            raise ArgumentError(f"{who}: expected epochs to be a whole number of at least 1, got {epochs!r}; correct epochs.")
        if not is_answer(converge):
            raise ArgumentError(f"{who}: expected converge to be True or False, got {converge!r}; True solves to convergence.")
        if epochs is not None and converge:
            raise ArgumentError(f"{who}: expected either epochs or converge=True, got both; leave out one.")
        memory_budget = check_budget(memory_budget, who)
        self.run, self._who = run, who
        self.network = TrainedNetwork.of(run, None, None, who=who) if reference is None else reference.network
        if converge and self.network.buffers_move(run.initial.buffers):
            raise ArgumentError(
                f"{who}: expected a network without running statistics for converge=True, got buffers that training changes; use epochs."
            )
        K = run.recipe.epochs
        self._first, self._later = range(K), range(K, K + (run.recipe.branch_epochs if epochs is None else int(epochs)))
        self._converge, self._rtol, self._max_steps = converge, rtol, max_steps
        self._reference = reference
        self._trainer = Trainer(run.recipe, copy.deepcopy(run.model), run.loss, run.data)
        self._trainers = TogetherTrainer(self._trainer, memory_budget)

    def cold(self, groups: Sequence[tuple[int, ...]], report: Progress) -> list[Response]:
        """From θ₀ through the base run's epochs, then on; once without each of ``groups``."""
        epochs = self._first if self._converge else range(self._later.stop)
        if self._converge:
            before = len(groups) * len(epochs)
            total = before + len(groups) * self._max_steps
            first, report = portion(report, 0, total), portion(report, before, total)
        else:
            first = report
        found = self._trainers.advance(self.run.initial, epochs, groups, report=first, label="cold start")
        if not self._converge:
            return self._trained("cold_start", groups, found, None, len(epochs))
        starts = [trained.point.theta.double() - self.network.exact_theta for trained in found]
        responses = self._converged("cold_start", groups, 0.0, starts, report)
        return [replace(response, one_by_one=trained.one_by_one) for response, trained in zip(responses, found, strict=True)]

    def warm(self, groups: Sequence[tuple[int, ...]], report: Progress) -> list[Response]:
        """From θs on, once without each of ``groups``."""
        if self._converge:
            return self._converged("warm_start", groups, 0.0, [torch.zeros_like(self.network.exact_theta)] * len(groups), report)
        found = self._trainers.advance(self.run.final, self._later, groups, report=report, label="warm start")
        return self._trained("warm_start", groups, found, None, len(self._later))

    def check_proximity(self, damping: float) -> None:
        """Refuse a proximity term on which SGD's steps grow along every direction in which the loss is flat or bends upwards.

        With momentum m and learning rate η, steps along a curvature κ are stable for ``η κ < 2 (1 + m)``; here ``κ = λ + w``. Where the
        schedule comes to a smaller η, what grew before may shrink again, so the smallest one that moves at all decides.
        """
        recipe = self.run.recipe
        check_damping(damping, recipe.weight_decay, who=self._who)
        lr = min((lr for epoch in self._later if (lr := recipe.lr * recipe.lr_factor(epoch)) > 0), default=0.0)
        most = 2 * (1 + recipe.momentum) / lr if lr else math.inf
        if recipe.optimizer == "sgd" and not self._converge and damping + recipe.weight_decay >= most:
            where = "" if recipe.schedule == "constant" else f" (at the least lr of schedule {recipe.schedule_name!r})"
            raise ArgumentError(
                f"{self._who}: expected damping + weight_decay below 2 (1 + momentum) / lr = {most:.3g}{where}, beyond which SGD's steps "
                f"on the proximity term grow without end, got {damping + recipe.weight_decay:g}; lower damping, or pass converge=True."
            )

    def proximal(self, groups: Sequence[tuple[int, ...]], damping: float, report: Progress) -> list[Response]:
        """From θs on, held back by ``(λ/2)‖θ − θs‖²``, once without each of ``groups``."""
        if self._converge:
            return self._converged("proximal", groups, damping, [torch.zeros_like(self.network.exact_theta)] * len(groups), report)
        proximity = Proximity(damping, self.network.theta)
        found = self._trainers.advance(self.run.final, self._later, groups, proximity=proximity, report=report, label="proximal response")
        return self._trained("proximal", groups, found, proximity, len(self._later))

    def _trained(
        self, kind: str, groups: Sequence[tuple[int, ...]], found: Sequence[Trained], proximity: Proximity | None, num_epochs: int
    ) -> list[Response]:
        # What the gradients at the ends are computed of: no optimiser state.
        ends = [replace(trained, point=replace(trained.point, moments=())) for trained in found]
        norms = LateNorms(partial(self._norms, groups, ends, proximity))
        away = [self._trainer.ran_away(self.run.initial, end.point, removed) for removed, end in zip(groups, ends, strict=True)]
        return [
            Response(
                kind,
                removed,
                trained.point.theta.double(),
                self.network,
                _ended(away[k]),
                norms=partial(norms.of, k),
                num_steps=num_epochs,
                buffers=trained.point.buffers,
                one_by_one=trained.one_by_one,
            )
            for k, (removed, trained) in enumerate(zip(groups, ends, strict=True))
        ]

    def _norms(self, groups: Sequence[tuple[int, ...]], ends: Sequence[Trained], proximity: Proximity | None) -> list[Norms]:
        start = self.run.final
        if len(groups) > 1 and all(trained.one_by_one is None for trained in ends):  # then examples do not depend on each other
            norms_s = [_norm(g) for g in self._trainer.gradients_without(start, groups)]  # the proximity term has none at θs
        else:
            norms_s = [_norm(self._trainer.gradient(start, removed=removed, proximity=proximity)) for removed in groups]
        norms = self._trainers.gradient_norms(ends, groups, proximity=proximity)
        return [(norm, norm / norm_s if norm_s else 0.0) for norm, norm_s in zip(norms, norms_s, strict=True)]

    def _converged(
        self, kind: str, groups: Sequence[tuple[int, ...]], damping: float, starts: Sequence[Tensor], report: Progress
    ) -> list[Response]:
        if self._reference is None:
            self._reference = Reference(self.network)
        label, total, responses = kind.replace("_", " "), len(groups) * self._max_steps, []
        for done, (removed, start) in enumerate(zip(groups, starts, strict=True)):
            minimum = minimise(
                BregmanObjective.retraining(self._reference, removed, damping),
                start,
                rtol=default_rtol(self.network.theta.dtype) if self._rtol is None else self._rtol,
                max_steps=self._max_steps,
                on_step=lambda step, done=done: report(label, done * self._max_steps + step, total),  # type: ignore[misc]
            )
            responses.append(response_at(minimum, kind, removed, self.network))
        report(label, total, total)
        return responses


def removed_sets(run: Run, remove: Iterable[Iterable[int]], *, who: str, allow_empty: bool = True) -> list[tuple[int, ...]]:
    """``remove`` as a list of tuples of indices.

    Raises:
        ArgumentError: not a list of lists, no set, or a set that :func:`removed_indices` refuses.
    """
    if not isinstance(run, Run):
        raise ArgumentError(f"{who}: expected a Run, got {type(run).__name__}; train the network with train(recipe, data).")
    sets: Sequence[Any] = list(remove) if is_iterable(remove) else [remove]
    if not sets or not all(map(is_iterable, sets)):
        raise ArgumentError(
            f"{who}: expected remove to be a list of removed sets, each a list of indices, got "
            f"{'none' if not sets else repr(sets[0])}; write remove=[[3], [17]] for two single examples."
        )
    return [removed_indices(group, run.data.num_examples, who=who, allow_empty=allow_empty) for group in sets]


def _ended(away: RanAway | None) -> ResponseStatus:
    """Status of a training."""
    if away is None:
        return ResponseStatus.TRAINED
    return ResponseStatus.TRAINING_DIVERGED if math.isfinite(away.objective) else ResponseStatus.NON_FINITE


def _norm(gradient: Tensor) -> float:
    return float(gradient.double().norm())
