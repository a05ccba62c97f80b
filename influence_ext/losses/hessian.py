"""Second derivatives of a loss by the network's outputs, as what multiplies cotangents."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

import influence_ext._C as _C
from influence_ext.errors import ArgumentError, UnsupportedLossError

SCALED_IDENTITY, DIAGONAL, SOFTMAX, SOFTMAX_LAST, GENERIC = range(5)
BLOCK_BYTES = 2**30
"""Dense blocks ``[N, C, C]`` for roots may take this much memory."""


@dataclass(frozen=True, eq=False)
class OutputHessian:
    """``w_n H_n`` of every example: ``s I``, ``diag d_n`` or ``diag p_n − p_n p_nᵀ``, which the C++ core multiplies itself.

    Attributes:
        shape: 0, 1 or 2 in this order; 3 for the last with classes as the outputs' last axis; 4 for the subclasses, which know their own
            product.
        scale: s; multiplies the other shapes as well.
        state: ``[N, C]``, d or p; ``[N, K, positions]`` for a softmax at each of several positions, contiguous or with classes innermost in
            memory; ``[N, positions, K]`` for shape 3; None for shape 0.
        weights: ``[N]``, or ``[N, positions]``, w ≥ 0; None for ones.
    """

    shape: int
    scale: float
    state: Tensor | None
    weights: Tensor | None

    @property
    def native(self) -> bool:
        """Whether the fused product of the C++ core takes it; else a product is ``vjp(matmat(jvp(V)))``."""
        return self.shape != GENERIC

    @property
    def classes_innermost(self) -> bool:
        """Whether a state ``[N, K, positions]`` lies in memory as ``[N, positions, K]``."""
        return self.shape == SOFTMAX and self.state is not None and not self.state.is_contiguous()

    def matmat(self, U: Tensor) -> Tensor:
        """``w_n H_n u[v, n]``: ``[V, N, *out] -> [V, N, *out]``."""
        return self._apply(0, U)

    def root_matmat(self, U: Tensor) -> Tensor:
        """``S_n u[v, n]`` with ``S_n S_nᵀ = w_n H_n``."""
        return self._apply(1, U)

    def root_rmatmat(self, U: Tensor) -> Tensor:
        """``S_nᵀ u[v, n]``."""
        return self._apply(2, U)

    def scaled(self, factor: float) -> OutputHessian:
        """``factor · w_n H_n``, sharing the state."""
        return replace(self, scale=self.scale * factor)

    def _apply(self, part: int, U: Tensor) -> Tensor:
        if self.classes_innermost:
            U = U.movedim(2, -1)
        result = U.detach().clone(memory_format=torch.contiguous_format)
        flat = result.view(*result.shape[:2], result.shape[2:].numel())
        _C.output_hessian(self.shape, self.scale, self.state, self.weights, part, flat)
        return result.movedim(-1, 2) if self.classes_innermost else result


@dataclass(frozen=True, eq=False)
class BlockHessian(OutputHessian):
    """``w_n H_n`` as dense symmetric blocks: ``state [N, C, C]``."""

    name: str

    def matmat(self, U: Tensor) -> Tensor:
        """``w_n H_n u[v, n]``: ``[V, N, *out] -> [V, N, *out]``. Cost: N products ``[C, C]·[C, V]``."""
        assert self.state is not None
        return self._weighted(_multiply(self.state, U), 1.0)

    def root_matmat(self, U: Tensor) -> Tensor:
        """``S_n u[v, n]`` with ``S_n = Q √Λ`` from ``H_n = Q Λ Qᵀ``.

        Raises:
            UnsupportedLossError: an ``H_n`` has a negative eigenvalue.

        Cost: N eigendecompositions ``[C, C]`` the first time.
        """
        return self._weighted(_multiply(self._root, U), 0.5)

    def root_rmatmat(self, U: Tensor) -> Tensor:
        """``S_nᵀ u[v, n]``. Raises and costs as :meth:`root_matmat`."""
        return self._weighted(_multiply(self._root.mT, U), 0.5)

    @cached_property
    def _root(self) -> Tensor:
        assert self.state is not None
        values, vectors = torch.linalg.eigh(self.state.double())
        limit = 32 * values.shape[-1] * torch.finfo(self.state.dtype).eps * values.abs().amax(dim=-1, keepdim=True)
        negative = (values < -limit).any(dim=-1).nonzero()[:, 0]
        if len(negative):
            n = int(negative[0])
            raise UnsupportedLossError(
                f"{self.name}: expected a loss that is convex in the outputs, got a Hessian with eigenvalue {float(values[n, 0]):.3g} for "
                f"example {n} ({len(negative)} of {len(values)} examples), which has no real root; use an operation that needs products "
                "only, or a convex loss."
            )
        return (vectors * values.clamp(min=0).sqrt()[:, None, :]).to(self.state.dtype)

    def _weighted(self, U: Tensor, power: float) -> Tensor:
        if self.weights is None:
            return U.mul_(self.scale**power)
        return U.mul_((self.scale * self.weights).pow(power).view(1, -1, *[1] * (U.dim() - 2)))


@dataclass(frozen=True, eq=False)
class GraphHessian(OutputHessian):
    """``w_n H_n`` as the derivative of the loss gradient, held as an autograd graph: ``∂gradient/∂leaf``."""

    name: str
    leaf: Tensor
    gradient: Tensor

    def matmat(self, U: Tensor) -> Tensor:
        """``w_n H_n u[v, n]``: ``[V, N, *out] -> [V, N, *out]``. Cost: a reverse pass through the loss gradient for each v."""
        factor: Tensor | float = self.scale
        if self.weights is not None:
            factor = self.scale * self.weights.view(-1, *[1] * (U.dim() - 2))
        return torch.stack([self._product(u) * factor for u in U.detach()]) if len(U) else U.detach().clone()

    def root_matmat(self, U: Tensor) -> Tensor:
        """``S_n u[v, n]`` through dense blocks.

        Raises:
            ArgumentError: the blocks would take more than ``BLOCK_BYTES``.
            UnsupportedLossError: an ``H_n`` has a negative eigenvalue.
        """
        return self._blocks.root_matmat(U)

    def root_rmatmat(self, U: Tensor) -> Tensor:
        """``S_nᵀ u[v, n]``. Raises as :meth:`root_matmat`."""
        return self._blocks.root_rmatmat(U)

    def dense(self) -> Tensor:
        """``H_n`` without scale and weights: ``[N, C, C]``. Cost: C reverse passes."""
        N, C = self.leaf.shape[0], self.leaf[0].numel() if len(self.leaf) else 0
        blocks = self.leaf.new_empty(N, C, C)
        unit = torch.zeros_like(self.leaf)
        for c in range(C):
            unit.view(N, C)[:, c] = 1
            blocks[:, :, c] = self._product(unit).reshape(N, C)
            unit.view(N, C)[:, c] = 0
        return (blocks + blocks.mT).div_(2)

    @cached_property
    def _blocks(self) -> BlockHessian:
        N, C = self.leaf.shape[0], self.leaf[0].numel()
        size = N * C * C * self.leaf.dtype.itemsize
        if size > BLOCK_BYTES:
            raise ArgumentError(
                f"{self.name}: expected blocks [N, C, C] = [{N}, {C}, {C}] of at most {BLOCK_BYTES} bytes for the root of the loss "
                f"Hessian, got {size}; use an operation that needs products only (a solver such as CG), or fewer examples."
            )
        return BlockHessian(GENERIC, self.scale, self.dense(), self.weights, self.name)

    def _product(self, u: Tensor) -> Tensor:
        (product,) = torch.autograd.grad(self.gradient, self.leaf, u.reshape(self.leaf.shape), retain_graph=True, allow_unused=True)
        return torch.zeros_like(self.leaf) if product is None else product.detach()


def _multiply(blocks: Tensor, U: Tensor) -> Tensor:
    """``M_n u[v, n]``: ``[N, C, C], [V, N, *out] -> [V, N, *out]``."""
    columns = U.detach().reshape(*U.shape[:2], blocks.shape[-1]).permute(1, 2, 0)
    return torch.bmm(blocks, columns).permute(2, 0, 1).contiguous().view(U.shape)
