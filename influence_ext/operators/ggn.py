"""The generalised Gauss-Newton matrix of a training cost."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from influence_ext.context import standalone
from influence_ext.graphs import RecordableProduct
from influence_ext.losses import OutputHessian
from influence_ext.operators.base import CurvatureOperator
from influence_ext.operators.kronecker import KroneckerFactored


class GGN(KroneckerFactored, CurvatureOperator):
    r"""The damped generalised Gauss-Newton matrix at the model's present parameters.

    .. math:: G + \lambda I, \qquad G = c \sum_n J_n^T H_n J_n

    ``J_n [C, P]`` is the Jacobian of output n, ``H_n [C, C]`` the loss Hessian in output space, ``c`` the loss's reduction over the whole
    data set, however it comes in batches: ``1/N`` for "mean" (the sum of weights, where the loss has some), 1 for "sum".

    Args:
        model: any network; used in evaluation mode, never modified.
        loss: ``nn`` loss module, functional, its name, or a callable ``loss(output, target)``.
        data: one ``(X, y)`` or a re-iterable of such batches.
        damping: λ ≥ 0.

    All other arguments, and the errors: :class:`influence_ext.operators.linearised.LinearisedOperator`.

    Cost: one forward pass; keeps the activations of all N examples (``cached_bytes``). A product with V vectors costs V tangent and V
    cotangent sweeps, about four forward passes' multiplications less two of the first layer's, and V·(2 widest activations) of workspace
    per example in flight.

    Reference: Schraudolph 2002, "Fast curvature matrix-vector products for second-order gradient descent".
    """

    def _prepare(self) -> None:
        self._hessian: OutputHessian = self.loss.hessian(self._tape.outputs, self.examples.targets, self.weights).scaled(self._factor)
        self.num_roots = self._tape.outputs.numel()

    def _undamped(self, V: Tensor) -> Tensor:
        return self._tape.ggn(V, self._hessian)

    def recordable(self) -> RecordableProduct | None:
        """``G v + damping·v`` as launches of the core alone."""
        return self._tape.recordable("ggn", self._hessian, self.damping) if self._multiplies_as(GGN) else None

    @standalone
    def diagonal(self) -> Tensor:
        """``[P]``, exact, from per-example factors.

        ``diag G = Σ_n Σ_r (J_nᵀ s_{n,r})²`` with the columns ``s`` of the loss Hessian's root. Cost: C cotangent sweeps and one product of
        squares a layer; memory N·C times the widths of the trainable layers, in blocks of right-hand sides.
        """
        total = torch.zeros(self.num_parameters, dtype=self.dtype, device=self.device)
        for roots in self._root_blocks():
            total += self._tape.factors(roots).square_sum()
        return total.add_(self.damping)

    @standalone
    def root_matmat(self, V: Tensor) -> Tensor:
        """``U v``: ``[V, P] -> [V, R]`` with ``R = C·N`` ordered output first, ``U = [√c S_nᵀ J_n]``."""
        self._check(V, "[V, P]", isinstance(V, Tensor) and V.dim() == 2 and V.shape[1] == self.num_parameters)
        outputs = self._hessian.root_rmatmat(self._tape.jvp(V.detach().contiguous()))
        return (
            outputs.reshape(V.shape[0], self.num_examples, self.num_roots // self.num_examples)
            .transpose(1, 2)
            .reshape(V.shape[0], self.num_roots)
        )

    @standalone
    def root_rmatmat(self, Y: Tensor) -> Tensor:
        """``Uᵀ y``: ``[V, R] -> [V, P]``."""
        N = self.num_examples
        cotangents = Y.detach().reshape(Y.shape[0], self.num_roots // N, N).transpose(1, 2).contiguous()
        cotangents = cotangents.view(Y.shape[0], N, *self._tape.plan.output_shape)
        return self._tape.vjp(self._hessian.root_matmat(cotangents))

    @standalone
    def root_gram(self) -> Tensor:
        """``U Uᵀ [R, R]`` from per-example factors. Cost: C cotangent sweeps and two products ``[R, width]·[width, R]`` a layer."""
        N = self.num_examples
        C = self.num_roots // N
        factors = self._tape.factors(self._roots(0, C))
        gram: Tensor = factors.gram(factors)
        return (gram + gram.T).div_(2)

    def _roots(self, start: int, stop: int) -> Tensor:
        """Columns ``start..stop`` of each ``√c S_n``, as cotangents ``[stop − start, N, *out]``."""
        return _root_columns(self._hessian, self._tape.outputs, start, stop)

    def _root_cotangents(
        self, outputs: Tensor, start: int, size: int, num_samples: int | None, generator: torch.Generator
    ) -> Iterator[Tensor]:
        N, C = outputs.shape[0], outputs[0].numel()
        rows = slice(start, start + N)
        weights = None if self.weights is None else self.weights[rows]
        hessian = self.loss.hessian(outputs, self.examples.targets[rows], weights).scaled(self._factor / (num_samples or 1))
        for first in range(0, num_samples or C, size):
            last = min(first + size, num_samples or C)
            if num_samples is None:
                yield _root_columns(hessian, outputs, first, last)
            else:  # on the CPU, so that every device draws the same
                noise = torch.randn(last - first, *outputs.shape, generator=generator, dtype=torch.float64)
                yield hessian.root_matmat(noise.to(dtype=self.dtype, device=self.device))

    def _root_blocks(self, limit_bytes: int = 256 * 2**20) -> Iterator[Tensor]:
        """All of them, a block of output elements at a time."""
        C = self.num_roots // self.num_examples
        width = sum(node.width for node in self._tape.plan.graph.nodes)
        block = max(1, min(C, limit_bytes // max(1, self.num_examples * width * self.dtype.itemsize)))
        for start in range(0, C, block):
            yield self._roots(start, min(start + block, C))


def _root_columns(hessian: OutputHessian, outputs: Tensor, start: int, stop: int) -> Tensor:
    """Columns ``start..stop`` of the root of each example's Hessian, as cotangents ``[stop − start, N, *out]`` of the outputs."""
    N, C = outputs.shape[0], outputs[0].numel()
    unit = torch.zeros(stop - start, N, C, dtype=outputs.dtype, device=outputs.device)
    unit[torch.arange(stop - start), :, torch.arange(start, stop)] = 1
    return hessian.root_matmat(unit.view(stop - start, *outputs.shape))
