"""Fisher matrices from per-example gradients: empirical (the data's targets) and Monte Carlo (targets drawn from the model)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from influence_ext.checks import is_count, is_seed
from influence_ext.context import standalone
from influence_ext.errors import ArgumentError
from influence_ext.graphs import Graphs
from influence_ext.losses import Loss, LossLike
from influence_ext.operators.base import CurvatureOperator
from influence_ext.operators.kronecker import KroneckerFactored
from influence_ext.params import Selection
from influence_ext.tape import Schedule


class _OuterProducts(KroneckerFactored, CurvatureOperator):
    """``c Σ_k w Σ_n g_{k,n} g_{k,n}ᵀ + λI`` with ``g_{k,n} = J_nᵀ r_{k,n}``: a root ``U`` of ``K·N`` rows ``√(c w) g``."""

    _rows: Tensor  # [K, N, *out], √(c w) r

    @property
    def _num_draws(self) -> int:
        return self._rows.shape[0]

    def _undamped(self, V: Tensor) -> Tensor:
        return self.root_rmatmat(self.root_matmat(V))

    @standalone
    def diagonal(self) -> Tensor:
        """``[P]``, exact, from per-example factors. Cost: K cotangent sweeps and a product of squares a layer."""
        diagonal: Tensor = self._tape.factors(self._rows).square_sum()
        return diagonal.add_(self.damping)

    @standalone
    def root_matmat(self, V: Tensor) -> Tensor:
        """``U v``: ``[V, P] -> [V, R]`` with ``R = K·N``, draws first. Cost: V tangent sweeps."""
        self._check(V, "[V, P]", isinstance(V, Tensor) and V.dim() == 2 and V.shape[1] == self.num_parameters)
        rows = self._rows.reshape(self._num_draws, self.num_examples, -1)
        tangents = self._tape.jvp(V.detach().contiguous()).reshape(V.shape[0], *rows.shape[1:])
        return torch.einsum("vnc,knc->vkn", tangents, rows).reshape(V.shape[0], self.num_roots)

    @standalone
    def root_rmatmat(self, Y: Tensor) -> Tensor:
        """``Uᵀ y``: ``[V, R] -> [V, P]``. Cost: V cotangent sweeps."""
        y = Y.detach().reshape(Y.shape[0], self._num_draws, self.num_examples)
        rows = self._rows.reshape(self._num_draws, self.num_examples, -1)
        cotangents = torch.einsum("vkn,knc->vnc", y, rows)
        return self._tape.vjp(cotangents.reshape(Y.shape[0], *self._rows.shape[1:]).contiguous())

    @standalone
    def root_gram(self) -> Tensor:
        """``U Uᵀ [R, R]`` from per-example factors. Cost: K cotangent sweeps and two products ``[R, width]·[width, R]`` a layer."""
        factors = self._tape.factors(self._rows)
        gram: Tensor = factors.gram(factors)
        return (gram + gram.T).div_(2)

    def _root_cotangents(
        self, outputs: Tensor, start: int, size: int, num_samples: int | None, generator: torch.Generator
    ) -> Iterator[Tensor]:
        # its rows are samples already, so there is nothing to be drawn
        for first in range(0, self._num_draws, size):
            yield self._rows[first : first + size, start : start + outputs.shape[0]].contiguous()


class EmpiricalFisher(_OuterProducts):
    r"""The damped empirical Fisher matrix: outer products of the gradients at the data's own targets.

    .. math:: E + \lambda I, \qquad E = c \sum_n \nabla\ell_n \nabla\ell_n^T

    with the unreduced loss ``ℓ_n`` of each example and the loss's reduction ``c``. Arguments and errors:
    :class:`influence_ext.operators.linearised.LinearisedOperator`.

    Cost: a product with V vectors costs V tangent and V cotangent sweeps.

    Reference: Kunstner et al. 2019, "Limitations of the empirical Fisher approximation", on how it differs from the Fisher.
    """

    def _prepare(self) -> None:
        gradients = self.loss.gradient(self._tape.outputs, self.examples.targets)
        self._rows = self._weighted(gradients, 0.5)[None].contiguous()
        self.num_roots = self.num_examples


class MonteCarloFisher(_OuterProducts):
    r"""The damped Fisher matrix, its expectation over targets estimated by ``num_samples`` draws from the model's own distribution.

    .. math:: F + \lambda I, \qquad F = \frac{c}{K} \sum_{k, n} \nabla\ell_n(\tilde t_{k,n}) \nabla\ell_n(\tilde t_{k,n})^T,
        \quad \tilde t_{k,n} \sim p(\cdot \mid z_n) \propto e^{-\ell_n}

    Its expectation is the GGN, for at the outputs the gradient of a drawn target has second moment ``E[r rᵀ] = H_n``. What is drawn here is
    ``r = S_n ε`` with Gaussian ε, which has the same second moment for every loss with a root ``S_n S_nᵀ = H_n``; for squared errors it is
    the gradient of a drawn target, for the cross-entropies it stands for one.

    Args:
        num_samples: K ≥ 1, draws an example.
        seed: of the generator all draws come from.

    Other arguments and errors: :class:`influence_ext.operators.linearised.LinearisedOperator`. Cost: as
    :class:`EmpiricalFisher`; K·N·C numbers are kept.

    Reference: Martens 2020, "New insights and perspectives on the natural gradient method", section 5.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: LossLike | Loss,
        data: Any,
        damping: float = 0.0,
        *,
        num_samples: int = 1,
        seed: int = 0,
        params: Selection | None = None,
        memory_budget: int | None = None,
        reduction: str | None = None,
        schedule: Schedule = "auto",
        graphs: Graphs = "auto",
        weights: Tensor | None = None,
    ):
        if not is_count(num_samples) or num_samples >= 2**31:
            raise ArgumentError(
                f"MonteCarloFisher: expected num_samples >= 1 and below 2^31, got {num_samples!r}; draw at least one target an example."
            )
        if not is_seed(seed):
            raise ArgumentError(f"MonteCarloFisher: expected seed to be a whole number of 64 bits, got {seed!r}; correct it.")
        self.num_samples, self.seed = int(num_samples), int(seed)
        options: dict[str, Any] = {"memory_budget": memory_budget, "reduction": reduction, "schedule": schedule}
        super().__init__(model, loss, data, damping, params=params, graphs=graphs, weights=weights, **options)

    def _prepare(self) -> None:
        z = self._tape.outputs
        hessian = self.loss.hessian(z, self.examples.targets, self.weights).scaled(self._factor / self.num_samples)
        generator = torch.Generator(device=z.device).manual_seed(self.seed)
        noise = torch.randn(self.num_samples, *z.shape, generator=generator, dtype=z.dtype, device=z.device)
        self._rows = hessian.root_matmat(noise)
        self.num_roots = self.num_samples * self.num_examples
