"""Trust-region Newton-CG with exact curvature and an acceptance test that survives rounding."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from influence_ext.bregman.objective import Evaluation
from influence_ext.bregman.response import ResponseStatus

ACCEPT, SHRINK, GROW = 1e-4, 0.25, 0.75
SLOW = 0.3
"""A trial that leaves more of the gradient than this asks for the full Hessian from then on."""
WINDOW = 20
"""Trials over which a search that has all but stopped is recognised."""
RUNAWAY_FALL, RUNAWAY_TRIALS, RUNAWAY_REACH = 5.0, 20, 100.0
"""A local search has run away when, after so many trials, the value fell so many times further than the Gauss-Newton step at the start
was predicted to bring, or the point is so many such steps away. Where a minimum is near, the fall is seldom twice the prediction."""

Product = Callable[[Tensor], Tensor]


class Objective(Protocol):
    """What the minimiser needs."""

    def evaluate(self, delta: Tensor) -> Evaluation:
        """Value relative to the value at 0, and gradient, at ``delta``."""

    def curvature_product(self, v: Tensor, at: Evaluation) -> Tensor:
        """The positive semi-definite Gauss-Newton curvature there, ``[P] -> [P]``."""

    def hessian_product(self, v: Tensor, at: Evaluation, length: float, full: bool) -> Tensor:
        """The Hessian there, possibly indefinite, ``[P] -> [P]``, averaged over a stretch of ``length``; cheaper if not ``full``."""


@dataclass(frozen=True, eq=False)
class Minimum:
    """Where a minimisation ended.

    Attributes:
        delta: ``[P]``.
        status: How it ended.
        value: Relative to the value at 0.
        gradient_norm: At ``delta``.
        relative_gradient_norm: Over the norm at the start; 0 if both are.
        num_steps: Accepted steps.
        num_products: Curvature products.
        num_evaluations: Values with gradients.
    """

    delta: Tensor
    status: ResponseStatus
    value: float
    gradient_norm: float
    relative_gradient_norm: float
    num_steps: int
    num_products: int
    num_evaluations: int


def minimise(
    objective: Objective,
    start: Tensor,
    *,
    rtol: float,
    max_steps: int,
    max_products: int = 250,
    first_step: Tensor | None = None,
    local: bool = False,
    on_step: Callable[[int], None] = lambda step: None,
) -> Minimum:
    r"""The local minimum downhill from ``start``, to ``‖∇Q‖ ≤ rtol ‖∇Q(start)‖``.

    The first trial is the full Gauss-Newton step, whose length becomes the radius of the trust region. From then on each trial
    minimises the quadratic model with the Hessian (exact once progress is slow) inside the region by CG (Steihaug and Toint), only as
    accurately as the progress so far warrants (Eisenstat and Walker); along a direction of negative curvature it goes to the edge.

    Args:
        objective: What to minimise.
        start: ``[P]`` in float64.
        rtol: Goal for the relative gradient norm.
        max_steps: Bound on the trials.
        max_products: Bound on the products of one trial.
        first_step: ``[P]``, the Gauss-Newton step at ``start`` where it is known already.
        local: Whether only a minimum near the start counts: a search that runs away is DIVERGED.
        on_step: Called after each trial with their number.

    Returns:
        The last point reached, with a status; nothing is raised.

    Cost:
        Per trial one evaluation and the products of CG, each at most about twice a Gauss-Newton product.

    Reference:
        Conn, Gould and Toint, "Trust-Region Methods", 2000, algorithms 6.1.1 and 7.5.1.
    """
    search = _Search(objective, start)
    radius, depth, reach = math.inf, math.inf, math.inf
    forcing = 1e-2
    for step in range(max_steps):
        if search.norm <= rtol * search.initial_norm:
            return search.finished(ResponseStatus.CONVERGED)
        if not math.isfinite(search.norm):
            return search.finished(ResponseStatus.NON_FINITE)
        if search.has_stalled():
            return search.finished(ResponseStatus.STALLED if search.saw_finite else ResponseStatus.NON_FINITE)
        if step == 0:
            trial = search.first_trial(first_step, forcing, max_products)
            radius = trial.length
            if local:
                depth, reach = RUNAWAY_FALL * trial.predicted, RUNAWAY_REACH * trial.length
        else:
            trial = search.trial(search.hessian, radius, forcing, max_products)
        before = search.norm
        ratio = search.attempt(trial)
        on_step(step + 1)
        if ratio < SHRINK:
            radius = SHRINK * min(radius, trial.length)
        elif ratio > GROW:
            radius = max(radius, 2 * trial.length)
        if ratio >= ACCEPT:
            goal = 0.5 * rtol * search.initial_norm / max(search.norm, 1e-300)
            forcing = min(max((search.norm / before) ** 1.5, goal, 1e-4), 0.1)
        search.full |= step > 0 and search.norm > SLOW * before
        if (step >= RUNAWAY_TRIALS and search.fall > depth) or _norm(search.now.delta - start) > reach:
            return search.finished(ResponseStatus.DIVERGED)
    converged = search.norm <= rtol * search.initial_norm
    return search.finished(ResponseStatus.CONVERGED if converged else ResponseStatus.MAX_STEPS)


@dataclass(frozen=True, eq=False)
class _Trial:
    """A step, its length and the decrease that the model predicts."""

    step: Tensor
    length: float
    predicted: float


class _Search:
    """The state of one minimisation."""

    def __init__(self, objective: Objective, start: Tensor):
        self.objective = objective
        self.now = objective.evaluate(start.clone())
        self.norm = self.initial_norm = _norm(self.now.gradient)
        self.initial_value = self.now.value
        self.stretch, self.full = 0.0, False
        self.num_steps, self.num_products, self.num_evaluations = 0, 0, 1
        self.saw_finite = False
        self.trace: list[tuple[float, float]] = []

    def finished(self, status: ResponseStatus) -> Minimum:
        relative = self.norm / self.initial_norm if self.initial_norm else 0.0
        return Minimum(
            self.now.delta,
            status,
            self.now.value,
            self.norm,
            relative,
            self.num_steps,
            self.num_products,
            self.num_evaluations,
        )

    def has_stalled(self) -> bool:
        """Whether the last trials brought the gradient no tenth down and the value hardly further."""
        if len(self.trace) <= WINDOW:
            return False
        value, _ = self.trace[-WINDOW - 1]
        earlier = min(norm for _, norm in self.trace[:-WINDOW])
        recent = min(norm for _, norm in self.trace[-WINDOW:])
        return recent > 0.9 * earlier and value - self.now.value <= 0.005 * self.fall

    @property
    def fall(self) -> float:
        """How far the value has fallen since the start."""
        return self.initial_value - self.now.value

    def curvature(self, v: Tensor) -> Tensor:
        return self.objective.curvature_product(v, self.now)

    def hessian(self, v: Tensor) -> Tensor:
        return self.objective.hessian_product(v, self.now, self.stretch, self.full)

    def first_trial(self, known: Tensor | None, forcing: float, max_products: int) -> _Trial:
        """The full Gauss-Newton step."""
        if known is None:
            return self.trial(self.curvature, math.inf, forcing, max_products)
        return _Trial(known, _norm(known), -_dot(self.now.gradient, known) / 2)

    def trial(self, product: Product, radius: float, forcing: float, max_products: int) -> _Trial:
        """The quadratic model's minimiser within ``radius``, by CG to the relative residual ``forcing``."""
        g = self.now.gradient.clone()
        s, p = torch.zeros_like(g), -g
        gg, predicted, goal = _dot(g, g), 0.0, (forcing * self.norm) ** 2
        for _ in range(max_products):
            if gg <= goal:
                break
            Hp = product(p)
            self.num_products += 1
            curvature = _dot(p, Hp)
            alpha = gg / curvature if curvature > 0 else math.inf
            if alpha == math.inf or _norm(s.add(p, alpha=alpha)) >= radius:
                if radius == math.inf:
                    break
                alpha = _to_edge(s, p, radius)
                return _Trial(s.add(p, alpha=alpha), radius, predicted + alpha * (gg - alpha * curvature / 2))
            s.add_(p, alpha=alpha)
            predicted += alpha * gg / 2
            g.add_(Hp, alpha=alpha)
            gg, previous = _dot(g, g), gg
            p.mul_(gg / previous).sub_(g)
        return _Trial(s, _norm(s), predicted)

    def attempt(self, trial: _Trial) -> float:
        """Evaluate the trial's point and move there if the objective falls; returns actual over predicted decrease."""
        then = self.objective.evaluate(self.now.delta + trial.step)
        self.num_evaluations += 1
        self.stretch = _norm(trial.step)
        ratio = self._ratio(trial, then)
        self.saw_finite |= math.isfinite(ratio)
        if ratio >= ACCEPT:
            self.now, self.norm = then, _norm(then.gradient)
            self.num_steps += 1
        self.trace.append((self.now.value, self.norm))
        return ratio

    def _ratio(self, trial: _Trial, then: Evaluation) -> float:
        if not (math.isfinite(then.value) and bool(torch.isfinite(then.gradient).all()) and trial.predicted > 0):
            return -math.inf
        actual = self.now.value - then.value
        if trial.predicted < 10 * (self.now.noise + then.noise):
            # Below the rounding of the values the slopes at both ends still tell a fall from a rise.
            actual = -_dot(self.now.gradient + then.gradient, trial.step) / 2
        return actual / trial.predicted


def _to_edge(s: Tensor, p: Tensor, radius: float) -> float:
    """``α > 0`` with ``‖s + α p‖ = radius``."""
    sp, pp = _dot(s, p), _dot(p, p)
    return (math.sqrt(sp**2 + pp * max(radius**2 - _dot(s, s), 0.0)) - sp) / pp


def _dot(a: Tensor, b: Tensor) -> float:
    return float(torch.dot(a, b))


def _norm(a: Tensor) -> float:
    return math.sqrt(_dot(a, a))
