"""The objectives that responses minimise, in a form whose differences survive rounding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from influence_ext.bregman.response import TrainedNetwork
from influence_ext.data import Examples
from influence_ext.losses import OutputHessian
from influence_ext.operators.ggn import GGN
from influence_ext.plan import Plan
from influence_ext.tape import Tape


class Reference:
    """What all removed sets share: tapes, and the outputs ``z_s`` and loss gradients ``g_s`` at θs, each computed once.

    Values and gradients are evaluated in float64 whatever the network's dtype (``exact``), because near θs they are small differences;
    curvature products, which only steer the search, run in the network's own (``fast``).

    Args:
        network: θs with its data and loss.
        memory_budget: bytes that each tape with the workspace of a product may take; what does not fit is recomputed in chunks of
            examples. None: no limit.
    """

    def __init__(self, network: TrainedNetwork, memory_budget: int | None = None):
        self.network, self.memory_budget = network, None if memory_budget is None else int(memory_budget)
        self._exact_plan = Plan.of(network.exact_model, network.exact_examples.X, who=network.who)
        self.exact = self._tape(self._exact_plan, network.exact_examples, network.exact_theta)
        self.exact.check_outputs(network.who)
        self.z = self.exact.outputs.clone()
        self.targets = network.exact_examples.targets
        network.loss.check(self.z, self.targets, network.who)
        self.g = network.loss.gradient(self.z, self.targets)

    @property
    def is_double(self) -> bool:
        """Whether the network itself is float64."""
        return self.network.theta.dtype == torch.float64

    @cached_property
    def fast(self) -> Tape:
        """A tape in the network's dtype, for curvature products."""
        return self._tape(self._fast_plan, self.network.examples, self.network.theta)

    @cached_property
    def probe(self) -> Tape:
        """A second tape in the network's dtype, for difference quotients; between evaluations ``exact`` is free to serve as one."""
        return self.exact if self.is_double else self._tape(self._fast_plan, self.network.examples, self.network.theta)

    def subset(self, examples: Sequence[int]) -> Tape:
        """A tape at θs in float64 on some of the examples."""
        return self._tape(self._exact_plan, self.network.exact_examples.subset(examples), self.network.exact_theta)

    def _tape(self, plan: Plan, examples: Examples, theta: Tensor) -> Tape:
        return plan.linearize(examples, theta, memory_budget=self.memory_budget)

    @cached_property
    def _fast_plan(self) -> Plan:
        return self._exact_plan if self.is_double else Plan.of(self.network.model, self.network.examples.X, who=self.network.who)

    def loss_gradients(self, groups: Sequence[Sequence[int]]) -> Tensor:
        """``[V, P]`` in float64: ``Σ_{i ∈ group} ∇ℓ_i(θs)`` of each group, without weight decay; one pass over the examples named."""
        named = sorted({i for group in groups for i in group})
        if not named:
            return torch.zeros(len(groups), len(self.network.theta), dtype=torch.float64, device=self.z.device)
        tape = self.subset(named)
        row = {i: k for k, i in enumerate(named)}
        g_z = self.g[named]
        cotangents = torch.zeros(len(groups), *g_z.shape, dtype=g_z.dtype, device=g_z.device)
        for v, group in enumerate(groups):
            picked = [row[i] for i in group]
            cotangents[v, picked] = g_z[picked]
        return tape.vjp(cotangents)

    def curvature(self, damping: float) -> GGN:
        """``G + λ I`` at θs in the network's dtype."""
        return self._curvature.damped(damping)

    def exact_curvature(self, damping: float) -> GGN:
        """``G + λ I`` at θs in float64."""
        if self.is_double:
            return self.curvature(damping)
        return GGN(self.network.exact_model, self.network.loss, self.network.exact_examples, damping, memory_budget=self.memory_budget)

    @cached_property
    def _curvature(self) -> GGN:
        return GGN(self.network.model, self.network.loss, self.network.examples, memory_budget=self.memory_budget)


@dataclass(frozen=True, eq=False)
class Evaluation:
    """An objective at one point.

    Attributes:
        delta: ``[P]`` in float64, ``θ − θs``.
        value: Relative to the value at θs.
        gradient: ``[P]`` in float64.
        noise: Rounding error of ``value``.
        slopes: ``[N, *out]`` in float64, the derivative by the outputs.
    """

    delta: Tensor
    value: float
    gradient: Tensor
    noise: float
    slopes: Tensor


class BregmanObjective:
    r"""``Q(θs + δ) − Q(θs) = Σ_i a_i D_i(z_i, z_s,i) + Σ_i b_iᵀ (z_i − z_s,i) + pᵀδ + (κ/2)‖δ‖²``.

    Every objective of this library is of this form, because ``ℓ_i(z) − ℓ_i(z_s) = D_i(z, z_s) + g_s,iᵀ (z − z_s)``: the proximal Bregman
    objective keeps ``D`` and drops the first-order terms of the kept examples, retraining keeps them. All terms are small where
    ``δ`` is small, so nothing is lost by subtracting large numbers.

    Args:
        reference: θs, its tapes, outputs and loss gradients. The tapes move with the evaluations.
        bregman_weights: ``a``, ``[N]`` in float64.
        slopes: ``b``, ``[N, *out]`` in float64.
        damping: ``κ``, weight decay included.
        parameter_slope: ``p``, ``[P]`` in float64, or ``None`` for zero.
        removed: The examples whose ``r = ∂Q/∂z`` outweighs the others'; none if there are no such.
    """

    def __init__(
        self,
        reference: Reference,
        bregman_weights: Tensor,
        slopes: Tensor,
        damping: float,
        parameter_slope: Tensor | None = None,
        removed: Sequence[int] = (),
    ):
        self._reference, self._a, self._b = reference, bregman_weights, slopes
        self.damping, self._p, self._removed = damping, parameter_slope, list(removed)
        self._hessian: tuple[Evaluation, OutputHessian] | None = None
        self._quotient: _Quotient | None = None

    @classmethod
    def proximal_bregman(cls, reference: Reference, removed: Sequence[int], epsilon: float, damping: float) -> BregmanObjective:
        """``c Σ_i D_i − ε Σ_{z ∈ S} ℓ_z + (λ_eff/2)‖δ‖²``: ``a = c − ε 1_S``, ``b = −ε 1_S g_s``."""
        index, c = list(removed), reference.network.factor
        a = torch.full((reference.network.num_examples,), c, dtype=torch.float64, device=reference.z.device)
        a[index] = c - epsilon
        b = torch.zeros_like(reference.g)
        b[index] = -epsilon * reference.g[index]
        return cls(reference, a, b, damping, removed=index)

    @classmethod
    def retraining(cls, reference: Reference, removed: Sequence[int], damping: float = 0.0) -> BregmanObjective:
        """``c Σ_{i ∉ S} ℓ_i + (w/2)‖θ‖² + (λ/2)‖δ‖²``: ``a = c 1_{∉S}``, ``b = a g_s``, ``p = w θs``, ``κ = λ + w``."""
        network = reference.network
        a = torch.full((network.num_examples,), network.factor, dtype=torch.float64, device=reference.z.device)
        a[list(removed)] = 0.0
        decay = network.weight_decay
        return cls(
            reference, a, _per_example(a, reference.g) * reference.g, damping + decay, decay * network.exact_theta if decay else None
        )

    def evaluate(self, delta: Tensor) -> Evaluation:
        """Value and gradient at ``θs + delta``, ``delta [P]`` in float64. Cost: one forward and one cotangent sweep in float64."""
        reference, loss = self._reference, self._reference.network.loss
        reference.exact.relinearize(reference.network.exact_theta + delta)
        z = reference.exact.outputs
        step = z - reference.z
        value = (self._a * loss.bregman(z, reference.z, reference.targets)).sum() + (self._b * step).sum()
        value += self.damping / 2 * delta.square().sum()
        slopes = _per_example(self._a, z) * (loss.gradient(z, reference.targets) - reference.g) + self._b
        gradient = reference.exact.vjp(slopes[None])[0].add_(delta, alpha=self.damping)
        if self._p is not None:
            value += torch.dot(self._p, delta)
            gradient += self._p
        noise = torch.finfo(z.dtype).eps * (slopes * z).abs().sum()
        return Evaluation(delta, float(value), gradient, float(noise), slopes)

    def curvature_product(self, v: Tensor, at: Evaluation) -> Tensor:
        """``(Σ_i max(a_i, 0) J_iᵀ H_i J_i + κ I) v`` there, ``[P] -> [P]``: positive semi-definite. Cost: a Gauss-Newton product."""
        tape = self._reference.fast
        if self._hessian is None or self._hessian[0] is not at:
            network = self._reference.network
            tape.relinearize((network.exact_theta + at.delta).to(tape.theta.dtype))
            weights = self._a.clamp(min=0).to(tape.theta.dtype)
            self._hessian = at, network.loss.hessian(tape.outputs, network.examples.targets, weights=weights)
        return tape.ggn(v.to(tape.theta.dtype)[None], self._hessian[1])[0].double().add_(v, alpha=self.damping)

    def hessian_product(self, v: Tensor, at: Evaluation, length: float, full: bool) -> Tensor:
        r"""``∇²Q v`` there, ``[P] -> [P]``, possibly indefinite.

        Gauss-Newton plus the network's own curvature ``Σ_i Σ_k r_ik ∇²f_ik`` with ``r = ∂Q/∂z``, as the difference quotient of ``Jᵀr``
        over ``length`` with ``r`` held. Near θs that is a small part, so its error matters little; at a kink of the network the
        quotient over the length of a step tells more than the derivative.

        Without ``full`` only the removed examples' own curvature counts: theirs is the one large ``r``, and it costs next to nothing.
        With ``full``: a forward and a cotangent sweep on top of the Gauss-Newton product.
        """
        product = self.curvature_product(v, at)
        if not full and not self._removed:
            return product
        if self._quotient is None or self._quotient.at is not at or self._quotient.full is not full:
            tape = self._reference.probe if full else self._reference.subset(self._removed)
            slopes = at.slopes if full else at.slopes[self._removed]
            self._quotient = _Quotient(tape, self._reference.network.exact_theta, at, slopes, full)
        return product.add_(self._quotient.product(v, length))


class _Quotient:
    """``v ↦ (J(θ + hv)ᵀ r − J(θ)ᵀ r)/h`` on a tape's examples, at ``θ = θs + at.delta``."""

    def __init__(self, tape: Tape, theta_s: Tensor, at: Evaluation, slopes: Tensor, full: bool):
        self.at, self.full = at, full
        self._tape, self._theta = tape, theta_s + at.delta
        self._cotangent = slopes.to(tape.theta.dtype)[None]
        self._base = self._pulled_back(self._theta)
        self._shortest = (1 + float(theta_s.norm())) * torch.finfo(tape.theta.dtype).eps ** 0.5

    def product(self, v: Tensor, length: float) -> Tensor:
        norm = float(v.norm())
        if norm == 0:
            return torch.zeros_like(v)
        h = max(length, self._shortest) / norm
        return self._pulled_back(self._theta + h * v).sub_(self._base).div_(h)

    def _pulled_back(self, theta: Tensor) -> Tensor:
        self._tape.relinearize(theta.to(self._tape.theta.dtype))
        return self._tape.vjp(self._cotangent)[0].double()


def _per_example(weights: Tensor, like: Tensor) -> Tensor:
    return weights.view(-1, *[1] * (like.dim() - 1))
