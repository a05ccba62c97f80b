"""A regulariser of the flat parameters as a gradient and products with its Hessian."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from influence_ext.errors import ShapeError

Product = Callable[[Tensor], Tensor]
NUM_PROBES = 2
FEW = 6
"""Vectors up to which single passes cost less than setting up a batched one."""


class Regulariser:
    """``R`` at θ.

    Attributes:
        gradient: ``∇R(θ)``, ``[P]``.
        diagonal: the Hessian's diagonal ``[P]`` where the Hessian is diagonal, as any sum of functions of single parameters has it;
            else None.

    A Hessian is taken as diagonal when ``∇²R v = (∇²R 1) ∘ v`` to rounding for random Gaussian v: an off-diagonal part of a size that
    matters changes such a product with probability one. Else products differentiate the gradient's graph, which is kept.

    Args:
        function: ``R``, of a vector ``[P]``; a value that does not depend on it has derivatives zero.
        theta: ``[P]``.

    Raises:
        ShapeError: ``R`` is not a scalar.

    Cost: the gradient, and three products.
    """

    def __init__(self, function: Callable[[Tensor], Any], theta: Tensor):
        self._theta = theta.detach().clone().requires_grad_()
        self._graph: Tensor | None = None
        self.gradient = torch.zeros_like(theta)
        self.diagonal: Tensor | None = self.gradient
        with torch.enable_grad():
            value = function(self._theta)
            if not isinstance(value, Tensor) or not value.requires_grad:
                return
            if value.numel() != 1:
                raise ShapeError(f"train_regularization: expected a scalar, got {list(value.shape)}; reduce it with .sum().")
            (graph,) = torch.autograd.grad(value.sum(), self._theta, create_graph=True, materialize_grads=True)
        self.gradient = graph.detach()
        if graph.requires_grad:
            self._graph = graph
            self.diagonal = self._diagonal()

    def product(self, V: Tensor) -> Tensor:
        """``∇²R v``: ``[V, P] -> [V, P]``."""
        return self.add_product(V, torch.zeros_like(V))

    def add_product(self, V: Tensor, total: Tensor) -> Tensor:
        """``total + ∇²R v``, in the memory of ``total [V, P]``."""
        return total.add_(self._rows(V)) if self.diagonal is None else total.addcmul_(V, self.diagonal)

    def _rows(self, V: Tensor) -> Tensor:
        assert self._graph is not None
        return hessian_rows(self._graph, self._theta, V)

    def _diagonal(self) -> Tensor | None:
        theta = self._theta
        generator = torch.Generator().manual_seed(0)
        probes = torch.randn(NUM_PROBES, theta.numel(), generator=generator, dtype=torch.float64).to(theta)
        found = self._rows(torch.cat([torch.ones_like(theta)[None], probes]))
        error = (found[1:] - probes * found[0]).abs().max()
        return found[0] if bool(error <= 64 * torch.finfo(theta.dtype).eps * found[1:].abs().max()) else None


def hessian_rows(graph: Tensor, leaf: Tensor, V: Tensor) -> Tensor:
    """The derivative of ``graph`` by ``leaf`` transposed onto each v: ``[V, *graph] -> [V, *leaf]``; the graph stays.

    Many go in one batched pass where ``vmap`` knows all operators, else one by one.
    """
    if not graph.requires_grad:
        return leaf.new_zeros(V.shape[0], *leaf.shape)
    if V.shape[0] > FEW:
        try:
            return _grad(graph, leaf, V, batched=True)
        except (RuntimeError, NotImplementedError):
            pass  # an operator without a batching rule: the loop computes the same
    return torch.stack([_grad(graph, leaf, v, batched=False) for v in V]) if len(V) else leaf.new_zeros(0, *leaf.shape)


def _grad(graph: Tensor, leaf: Tensor, v: Tensor, batched: bool) -> Tensor:
    found = torch.autograd.grad(graph, leaf, v, retain_graph=True, is_grads_batched=batched, allow_unused=True)[0]
    return v.new_zeros((v.shape[0], *leaf.shape) if batched else leaf.shape) if found is None else found.detach()
