"""The branches that retrain: from the initialisation, from θs, and from θs with a proximity term."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from influence_ext.bregman.minimise import minimise
from influence_ext.bregman.objective import BregmanObjective, Reference
from influence_ext.bregman.pbrf import check_damping, checked, default_rtol, response_at
from influence_ext.bregman.progress import Progress, reporter
from influence_ext.bregman.recipe import Run
from influence_ext.bregman.response import Response, ResponseStatus, TrainedNetwork, removed_indices
from influence_ext.bregman.training import Proximity, Trainer, TrainingPoint
from influence_ext.context import standalone
from influence_ext.errors import ArgumentError

Start = Literal["cold", "warm"]


@standalone
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
        The response, with the gradient norm of ``Q₋S`` at its end. ``relative_gradient_norm`` compares with θs (with the point after the
        first ``K`` epochs for a cold start that is solved to convergence).

    Raises:
        ArgumentError: an option makes no sense.
        DivergenceError: training left the finite numbers.

    Cost:
        The epochs named, by the training loop of :func:`train`.

    Reference:
        Bae et al. 2022, section 3 and appendix on the protocol.
    """
    if start not in ("cold", "warm"):
        raise ArgumentError(f"retrain: expected start to be 'cold' or 'warm', got {start!r}; choose one.")
    branches = Branches(run, who="retrain", epochs=epochs, converge=converge, rtol=rtol, max_steps=max_steps)
    removed = removed_indices(remove, run.data.num_examples, who="retrain")
    report = reporter(progress)
    response = branches.cold(removed, report) if start == "cold" else branches.warm(removed, report)
    return checked(response, "raise", who="retrain")


@standalone
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
        damping: λ. The weight decay stays where the training has it, in ``(w/2)‖θ‖²``.
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

    Reference:
        Bae et al. 2022, section 3.
    """
    branches = Branches(run, who="proximal_response", epochs=epochs, converge=converge, rtol=rtol, max_steps=max_steps)
    check_damping(damping, run.recipe.weight_decay, who="proximal_response")
    removed = removed_indices(remove, run.data.num_examples, who="proximal_response")
    return checked(branches.proximal(removed, damping, reporter(progress)), "raise", who="proximal_response")


class Branches:
    """The retraining branches of one run; the network's copies and θs's tape are made once for all removed sets.

    Args:
        run: The base run, only read.
        who: Named in error messages.
        epochs: Epochs after base training.
        converge: Solve to convergence instead.
        rtol: Goal of that.
        max_steps: Its bound.
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
        reference: Reference | None = None,
    ):
        if not isinstance(run, Run):
            raise ArgumentError(f"{who}: expected a Run, got {type(run).__name__}; train the network with train(recipe, data).")
        if epochs is not None and (isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 1):
            raise ArgumentError(f"{who}: expected epochs to be a whole number of at least 1, got {epochs!r}; correct epochs.")
        if epochs is not None and converge:
            raise ArgumentError(f"{who}: expected either epochs or converge=True, got both; leave out one.")
        self.run = run
        self.network = TrainedNetwork.of(run, None, None, who=who) if reference is None else reference.network
        if converge and self.network.buffers_move(run.initial.buffers):
            raise ArgumentError(
                f"{who}: expected a network without running statistics for converge=True, got buffers that training changes; use epochs."
            )
        K = run.recipe.epochs
        self._first, self._later = range(K), range(K, K + (run.recipe.branch_epochs if epochs is None else epochs))
        self._converge, self._rtol, self._max_steps = converge, rtol, max_steps
        self._reference = reference
        self._trainer = Trainer(run.recipe, copy.deepcopy(run.model), run.loss, run.data)

    def cold(self, removed: tuple[int, ...], report: Progress) -> Response:
        """From θ₀ through the base run's epochs, then on."""
        epochs = self._first if self._converge else range(self._later.stop)
        point, _ = self._trainer.advance(self.run.initial, epochs, removed=removed, report=report, label="cold start")
        if self._converge:
            return self._converged("cold_start", removed, 0.0, point.theta.double() - self.network.exact_theta, report)
        return self._trained("cold_start", removed, point, None, len(epochs))

    def warm(self, removed: tuple[int, ...], report: Progress) -> Response:
        """From θs on."""
        if self._converge:
            return self._converged("warm_start", removed, 0.0, torch.zeros_like(self.network.exact_theta), report)
        point, _ = self._trainer.advance(self.run.final, self._later, removed=removed, report=report, label="warm start")
        return self._trained("warm_start", removed, point, None, len(self._later))

    def proximal(self, removed: tuple[int, ...], damping: float, report: Progress) -> Response:
        """From θs on, held back by ``(λ/2)‖θ − θs‖²``."""
        if self._converge:
            return self._converged("proximal", removed, damping, torch.zeros_like(self.network.exact_theta), report)
        proximity = Proximity(damping, self.network.theta)
        point, _ = self._trainer.advance(
            self.run.final, self._later, removed=removed, proximity=proximity, report=report, label="proximal response"
        )
        return self._trained("proximal", removed, point, proximity, len(self._later))

    def _trained(self, kind: str, removed: tuple[int, ...], point: TrainingPoint, proximity: Proximity | None, num_epochs: int) -> Response:
        norm = _norm(self._trainer.gradient(point, removed=removed, proximity=proximity))
        norm_s = _norm(self._trainer.gradient(self.run.final, removed=removed, proximity=proximity))
        return Response(
            kind,
            removed,
            point.theta.double(),
            self.network,
            ResponseStatus.TRAINED,
            gradient_norm=norm,
            relative_gradient_norm=norm / norm_s if norm_s else 0.0,
            num_steps=num_epochs,
            buffers=point.buffers,
        )

    def _converged(self, kind: str, removed: tuple[int, ...], damping: float, start: Tensor, report: Progress) -> Response:
        if self._reference is None:
            self._reference = Reference(self.network)
        minimum = minimise(
            BregmanObjective.retraining(self._reference, removed, damping),
            start,
            rtol=default_rtol(self.network.theta.dtype) if self._rtol is None else self._rtol,
            max_steps=self._max_steps,
            on_step=lambda step: report(kind.replace("_", " "), step, self._max_steps),
        )
        report(kind.replace("_", " "), self._max_steps, self._max_steps)
        return response_at(minimum, kind, removed, self.network)


def _norm(gradient: Tensor) -> float:
    return float(gradient.double().norm())
