"""LiSSA: the truncated Neumann series, with full or sampled curvature."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Generator, Tensor

from influence_ext.errors import ArgumentError
from influence_ext.operators.base import LinearOperator
from influence_ext.solvers.base import CountedOperator, Outcome, Solver, Status, norm
from influence_ext.solvers.power import top_eigenvalue

MARGIN = 1.25
"""Automatic scale over the estimated top eigenvalue: an estimate as low as 40 % of the truth still converges."""

NUM_SCALE_BATCHES = 4
"""Batches whose top eigenvalues, beside that of the whole matrix, enter the automatic scale."""


@runtime_checkable
class Sampled(Protocol):
    """An operator ``G + λI`` over N examples that can be thinned out to a random batch of them."""

    def sample(self, generator: Generator, batch_size: int) -> LinearOperator:
        """``G_B + λI`` on ``batch_size`` random examples, of expectation ``G + λI``; draws from ``generator`` only."""


@dataclass(frozen=True)
class LiSSA(Solver):
    """Linear-time stochastic second-order algorithm.

    ``h ← v + h − (G_B h + λ h)/σ`` for T steps from ``h = v``; the result is the mean over R repeats of ``h/σ``. With
    the full matrix ``A = G + λI`` this is ``x = A⁻¹ (I − (I − A/σ)^(T+1)) b`` exactly. It converges when σ exceeds
    half the top eigenvalue of A, and stopping after T steps acts as extra damping of about σ/T.

    A truncated series is the purpose, so without ``rtol`` the status is TRUNCATED, which counts as success;
    ``residual_norm`` tells how far it got. With ``rtol`` the status is CONVERGED or MAX_STEPS by the recomputed
    residual of the final mean, and with the full matrix, where each step shows the residual, a column stops as soon as
    it meets ``rtol``.

    DIVERGED: with the full matrix, when the residual, which can only fall if σ is large enough, has doubled from its
    smallest value; with batches, when ``‖h_t‖`` exceeds twice its bound ``(t+1)‖v‖``. Such a column ends at once.

    Attributes:
        num_steps: T.
        scale: σ. ``None`` sets it to 1.25 times the top eigenvalue of A as estimated by power iteration (with batches:
            the largest estimate over A and four of its batches).
        num_repeats: R; needs batches, since otherwise every repeat is the same.
        batch_size: Examples per step, from ``operator.sample(generator, batch_size)``; ``None`` takes the full matrix
            each step.
        seed: Of ``torch.Generator().manual_seed(seed)``, which all batches of all repeats are drawn from in order. The
            global random state is neither read nor changed.
        rtol: Relative residual to stop at or to judge the result by.

    Statistics: ``scale``; ``top_eigenvalue`` (NaN where ``scale`` was given); ``extra_damping`` = σ/T; ``iterations``
    per column, over all repeats.

    Raises:
        ArgumentError: an option makes no sense; on solving, ``batch_size`` with an operator that cannot be sampled.

    Cost: T·R products per column, one host synchronisation a step, five ``[V, P]`` buffers; 20 products for the
    automatic scale (100 with batches), one per column for the residual.

    Reference: Agarwal, Bullins and Hazan, "Second-order stochastic optimization for machine learning in linear time",
    JMLR 18 (2017); Koh and Liang, "Understanding black-box predictions via influence functions", ICML 2017.
    """

    num_steps: int = 1000
    scale: float | None = None
    num_repeats: int = 1
    batch_size: int | None = None
    seed: int = 0
    rtol: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_count("num_steps", self.num_steps)
        self._require_count("num_repeats", self.num_repeats)
        self._require_positive("scale", self.scale, "leave it None to have it estimated")
        self._require_tolerance(self.rtol)
        self._require_seed(self.seed)
        if self.batch_size is not None:
            self._require_count("batch_size", self.batch_size)
        self._require(
            self.batch_size is not None or self.num_repeats == 1,
            "num_repeats = 1 without batch_size, as every repeat with the full matrix is the same",
            self.num_repeats,
            "set batch_size",
        )

    def _solve(self, operator: CountedOperator, B: Tensor) -> Outcome:
        multiply = self._multiply(operator)
        top, scale = math.nan, self.scale
        if scale is None:
            top = self._top_eigenvalue(operator)
            scale = MARGIN * top
        stats = {"scale": scale, "top_eigenvalue": top, "extra_damping": scale / self.num_steps}
        if not math.isfinite(scale) or scale == 0:
            cause = Status.NOT_PSD if scale == 0 else Status.NON_FINITE
            return Outcome.failed(B, cause, stats, counts=("iterations",))
        iterations = [0] * B.shape[0]
        failure: dict[int, Status] = {}
        total = torch.zeros_like(B)
        for _ in range(self.num_repeats):
            columns = [column for column in range(B.shape[0]) if column not in failure]
            h, steps, failed = self._series(multiply, B[columns], scale)
            total[columns] += h
            for position, column in enumerate(columns):
                iterations[column] += steps[position]
                if position in failed:
                    failure[column] = failed[position]
        # a column that failed has fewer repeats in its total, but what it holds is not an answer in any case
        X = total / (self.num_repeats * scale)
        residual_norm = norm(operator.residual(X, B)) / norm(B)
        judged = [self._judge(residual) for residual in residual_norm.tolist()]
        status = [failure.get(column, verdict) for column, verdict in enumerate(judged)]
        return Outcome(X, status, residual_norm, stats, {"iterations": iterations})

    def _judge(self, residual: float) -> Status:
        if not math.isfinite(residual):
            return Status.NON_FINITE
        if self.rtol is None:
            return Status.TRUNCATED
        return Status.CONVERGED if residual <= self.rtol else Status.MAX_STEPS

    def _multiply(self, operator: CountedOperator) -> Callable[[Tensor], Tensor]:
        """The product of one step: with the full matrix, or with a fresh batch at every call."""
        if self.batch_size is None:
            return operator.matmat
        source, size = self._sampled(operator), self.batch_size
        generator = torch.Generator().manual_seed(int(self.seed))
        return lambda h: operator.apply(source.sample(generator, size), h)

    def _sampled(self, operator: CountedOperator) -> Sampled:
        source = operator.operator
        if not isinstance(source, Sampled):
            raise ArgumentError(
                f"LiSSA: expected an operator with sample(generator, batch_size), as batch_size = {self.batch_size}, "
                f"got {type(source).__name__}; leave batch_size None to use the full matrix at every step."
            )
        return source

    def _top_eigenvalue(self, operator: CountedOperator) -> float:
        estimates = [top_eigenvalue(operator, seed=self.seed)]
        if self.batch_size is not None:
            generator = torch.Generator().manual_seed(int(self.seed))
            source = self._sampled(operator)
            for _ in range(NUM_SCALE_BATCHES):
                batch = CountedOperator(source.sample(generator, self.batch_size))
                estimates.append(top_eigenvalue(batch, seed=self.seed))
                operator.absorb(batch)
        return max(estimates)

    def _series(self, multiply: Callable[[Tensor], Tensor], v: Tensor, scale: float) -> tuple[Tensor, list[int], dict[int, Status]]:
        """One repeat: where h of each column ended ``[V, P]``, after how many products, and how it failed."""
        result = v.clone()
        steps = [self.num_steps] * v.shape[0]
        failed: dict[int, Status] = {}
        stochastic = self.batch_size is not None
        tolerance = -1.0 if stochastic or self.rtol is None else self.rtol
        eps = torch.finfo(v.dtype).eps
        columns = list(range(v.shape[0]))
        h, v_norm = result.clone(), norm(v)
        smallest = v_norm
        for step in range(1, self.num_steps + 1):
            if not columns:
                break
            change = v - multiply(h) / scale  # with the full matrix, the residual b − A x of x = h/σ
            change_norm, h_norm = norm(change), norm(h)
            if stochastic:
                diverged = h_norm > 2 * step * v_norm
            else:
                diverged = (change_norm > 2 * smallest) & (change_norm > 100 * eps * h_norm)
                smallest = torch.minimum(smallest, change_norm)
            flags = torch.stack([~change_norm.isfinite(), diverged, change_norm <= tolerance * v_norm]).T.tolist()
            ended = [k for k, row in enumerate(flags) if any(row)]
            if ended:
                for k in ended:
                    broken, growing, _ = flags[k]
                    steps[columns[k]] = step
                    if broken or growing:
                        failed[columns[k]] = Status.NON_FINITE if broken else Status.DIVERGED
                result[columns] = h
                keep = [k for k in range(len(columns)) if k not in set(ended)]
                columns = [columns[k] for k in keep]
                h, change, v, v_norm, smallest = h[keep], change[keep], v[keep], v_norm[keep], smallest[keep]
            h = h + change
        result[columns] = h
        return result, steps, failed
