"""The Hessian of a training cost."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from influence_ext.context import exclusive
from influence_ext.data import Examples
from influence_ext.losses import OutputHessian
from influence_ext.operators.linearised import LinearisedOperator

BLOCK_BYTES = 512 * 2**20
"""Activations of the examples and vectors in flight in the second-order part may take about this much."""


class Hessian(LinearisedOperator):
    r"""The damped Hessian of the training cost at the model's present parameters.

    .. math:: \nabla^2 J + \lambda I, \qquad \nabla^2 J = G + c \sum_n \sum_c (\nabla_z \ell_n)_c \nabla^2_\theta z_{n,c}

    The Gauss-Newton part ``G`` runs through the native rules; the second, in which the network itself is curved, through torch's forward
    mode over reverse mode on the whole network, in blocks of examples. Exact, symmetric, indefinite: solvers that need a positive matrix
    refuse it or report what they met.

    Arguments and errors: :class:`LinearisedOperator`.

    Cost: a product with V vectors costs a GGN product, and V times about four forward passes of torch.

    Reference: Pearlmutter 1994, "Fast exact multiplication by the Hessian".
    """

    def _prepare(self) -> None:
        z, targets = self._tape.outputs, self.examples.targets
        self._hessian: OutputHessian | None = (
            None if self.loss.is_linear else self.loss.hessian(z, targets, self.weights).scaled(self._factor)
        )
        if "_network" not in self.__dict__:
            self._network = self._tape.plan.network()
        self._gradients = self._weighted(self.loss.gradient(z, targets))

    def _undamped(self, V: Tensor) -> Tensor:
        product = torch.zeros_like(V) if self._hessian is None else self._tape.ggn(V, self._hessian)
        plan, theta = self._tape.plan, self._tape.theta
        width = sum(node.width for node in plan.graph.nodes) * 6 * self.dtype.itemsize
        vectors = max(1, min(V.shape[0], BLOCK_BYTES // (width * min(self.num_examples, 64))))
        block = max(1, BLOCK_BYTES // (width * vectors))
        for start, X in self.examples.blocks(int(block)):
            function = self._network(X)
            gradients = self._gradients[start : start + Examples.of_inputs(X).num_examples]
            for first in range(0, V.shape[0], vectors):
                product[first : first + vectors] += _curvature(function, theta, gradients, V[first : first + vectors])
        return product


def _curvature(function: Callable[[Tensor], Tensor], theta: Tensor, gradients: Tensor, V: Tensor) -> Tensor:
    """``Σ_n Σ_c g_{n,c} ∇²z_{n,c} v``: the derivative of ``θ ↦ J(θ)ᵀ g`` along each v, ``[V, P] -> [V, P]``."""

    def pulled(at: Tensor) -> Tensor:
        return torch.func.vjp(function, at)[1](gradients)[0]

    with exclusive:
        return torch.stack([torch.func.jvp(pulled, (theta,), (v,))[1] for v in V]).detach()
