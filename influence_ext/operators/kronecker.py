"""Kronecker factors of the curvature of weight matrices, and the curvature's diagonal in their eigenbases, from layer factors.

An example's gradient by the weight of a linear layer or a convolution is ``Σ_t g_t a_tᵀ``: cotangents ``g`` of the layer's output and
inputs ``a``, a one appended for the bias, at the positions t that share the weight. Neither these products nor ``[N, P]`` is formed for
more than a tile of examples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from influence_ext.checks import is_count, is_seed
from influence_ext.context import standalone
from influence_ext.errors import ArgumentError
from influence_ext.operators.base import KroneckerBlock, KroneckerFactors, Rotation
from influence_ext.operators.linearised import LinearisedOperator
from influence_ext.plan import Plan
from influence_ext.tape import Tape

BLOCK_BYTES = 128 * 2**20
"""Layer factors of a block of examples and right-hand sides take about this much memory."""
TILE_BYTES = 4 * 2**20
"""Gradients formed at a time where positions share a weight."""
FEW_COLUMNS = 16
"""So many cotangents an example are taken together before blocks of examples get smaller."""

_Uses = list[tuple[Tensor, Tensor]]  # activations [n, T, I], cotangents [V, n, T, O] of each layer that reads the weight


class KroneckerFactored(LinearisedOperator):
    """What curvatures with a root ``U`` add for :class:`influence_ext.solvers.EKFAC`."""

    def _root_cotangents(
        self, outputs: Tensor, start: int, size: int, num_samples: int | None, generator: torch.Generator
    ) -> Iterator[Tensor]:
        """Rows of ``U`` of the examples from ``start`` on, as cotangents ``[V, n, *out]`` of their outputs, at most ``size`` at a time."""
        raise NotImplementedError

    def gram_operations(self) -> float:
        """Counted arithmetic of ``root_gram``: a cotangent sweep for each root of an example, ``2 R² (O + I)`` for a layer whose inputs are
        vectors, ``2 R²`` for every other trained parameter.
        """
        plan, R = self._tape.plan, self.num_roots  # type: ignore[attr-defined]
        graph, elements = plan.graph, 0
        for node in graph.nodes:
            sizes = [math.prod(graph.slots[index].shape) for index in node.slots if index >= 0 and plan.slot_offsets[index] >= 0]
            is_simple = node.rule == "linear" and node.width == node.ints["out_features"] and bool(sizes)
            elements += node.width + node.ints["in_features"] if is_simple else sum(sizes)
        sweeps = 2.0 * R * sum(node.operations for node in graph.nodes)
        return sweeps + 2.0 * R**2 * elements

    @standalone
    def kronecker_factors(self, num_samples: int | None = None, seed: int = 0) -> list[KroneckerFactors]:
        """``A = E[a aᵀ]`` and ``B = Σ g gᵀ`` of each weight of linear layers and convolutions; ``G ≈ B ⊗ A`` for that weight.

        Means and sums run over examples, positions and rows of the root, as in K-FAC for layers that share weights ("expand").
        Grouped and transposed convolutions, embeddings, norms and weights that are computed from parameters are left out.

        Args:
            num_samples: Gaussian draws an example in place of all C columns of the loss Hessian's root. None: all, exact.
            seed: Of the draws.

        Returns:
            One for each weight, matrices in float64.

        Cost: a forward pass and C (or ``num_samples``) cotangent sweeps; O² + I² operations for each position and sweep.
        """
        blocks = _blocks(self._tape.plan)
        sums: dict[int, _Sums] = {}
        for tape, is_first, cotangents in self._cotangent_blocks(num_samples, seed):
            for offset, uses in tape.factors(cotangents).outer_products().items():
                if offset in blocks:
                    block = blocks[offset]
                    sums.setdefault(offset, _Sums.zero(block, self.device)).add(block, uses, is_first)
        return [KroneckerFactors(blocks[offset], found.A / max(found.count, 1), found.B) for offset, found in sums.items()]

    @standalone
    def rotated_diagonal(self, rotations: list[Rotation], num_samples: int | None = None, seed: int = 0) -> Tensor:
        """``diag(Qᵀ G Q)``, ``[P]``, without damping, for the block-diagonal Q of ``rotations`` (the identity elsewhere).

        ``Σ_u (Qᵀ u)²`` over the rows u of the root: the second moments of the projected gradients, in the places of the parameters
        that they are coordinates of. Arguments as :meth:`kronecker_factors`.

        Cost: a forward pass and C (or ``num_samples``) cotangent sweeps, twice as many if the rotations leave out a parameter;
        ``O² + I²`` operations for each position and sweep and
        ``O·I`` for each of their products.
        """
        total = torch.zeros(self.num_parameters, dtype=torch.float64, device=self.device)
        covered = sum(math.prod(r.block.shape) for r in rotations)
        squares = [torch.zeros(r.block.shape, dtype=torch.float64, device=self.device) for r in rotations]
        for tape, _, cotangents in self._cotangent_blocks(num_samples, seed):
            factors = tape.factors(cotangents)
            if covered < self.num_parameters:
                total += factors.square_sum()
            found = factors.outer_products()
            for rotation, square in zip(rotations, squares, strict=True):
                square += _projected_squares(found[rotation.block.weight], rotation)
        for rotation, square in zip(rotations, squares, strict=True):
            rotation.block.put(square[None], total[None])
        return total.to(self.dtype)

    def _cotangent_blocks(self, num_samples: int | None, seed: int) -> Iterator[tuple[Tape, bool, Tensor]]:
        """``(tape, whether its examples are new, cotangents [V, n, *out])`` of blocks of ``BLOCK_BYTES``; every pass draws the same."""
        who = type(self).__name__
        if not (num_samples is None or is_count(num_samples)) or not is_seed(seed):
            raise ArgumentError(
                f"{who}: expected num_samples to be None or a whole number of at least 1, and seed one of 64 bits, got {num_samples!r} and "
                f"{seed!r}; None takes all columns."
            )
        num_samples = None if num_samples is None else int(num_samples)
        plan, theta = self._tape.plan, self._tape.theta
        fixed, each = _factor_widths(plan)
        limit = BLOCK_BYTES // self.dtype.itemsize
        num_columns = num_samples or math.prod(plan.output_shape)
        size = max(1, min(self.num_examples, limit // (fixed + each * min(num_columns, FEW_COLUMNS))))
        generator = torch.Generator().manual_seed(int(seed))
        for start, X in self.examples.blocks(size):
            tape = plan.linearize(X, theta)
            is_first = True
            columns = max(1, (limit // tape.num_examples - fixed) // each)
            for cotangents in self._root_cotangents(tape.outputs, start, columns, num_samples, generator):
                yield tape, is_first, cotangents
                is_first = False


@dataclass
class _Sums:
    A: Tensor
    B: Tensor
    count: int = 0

    @classmethod
    def zero(cls, block: KroneckerBlock, device: torch.device) -> _Sums:
        O, I = block.shape
        A, B = (torch.zeros(size, size, dtype=torch.float64, device=device) for size in (I, O))
        return cls(A, B)

    def add(self, block: KroneckerBlock, uses: _Uses, is_first: bool) -> None:
        """The covariances of one block; those of the activations once for all its cotangents."""
        for activations, cotangents in uses:
            g = cotangents.reshape(-1, cotangents.shape[-1])
            self.B += g.T @ g
            if not is_first:
                continue
            a = activations.reshape(-1, activations.shape[-1])
            I = a.shape[1]
            self.A[:I, :I] += a.T @ a
            if block.bias is not None:
                mean = a.sum(dim=0)
                self.A[:I, I] += mean
                self.A[I, :I] += mean
                self.A[I, I] += len(a)
            self.count += len(a)


def _projected_squares(uses: _Uses, rotation: Rotation) -> Tensor:
    """``Σ_{v, n} (Q_Bᵀ (Σ_t g_t a_tᵀ) Q_A)²``, ``[O, I]``."""
    num_inputs = rotation.block.num_inputs
    projected = []
    for activations, cotangents in uses:
        a = activations @ rotation.inputs[:num_inputs]
        if rotation.block.bias is not None:
            a += rotation.inputs[num_inputs]
        projected.append((a, cotangents @ rotation.outputs))
    a, g = projected[0]
    V, N, T, O = g.shape
    if T == 1 and len(projected) == 1:
        return g.square_().sum(dim=0)[:, 0].T @ a.square_()[:, 0]
    total = a.new_zeros(O, a.shape[-1])
    tile = max(1, TILE_BYTES // (total.numel() * total.itemsize))
    for v in range(V):
        for start in range(0, N, tile):
            rows = slice(start, start + tile)
            gradients = sum(g[v, rows].mT @ a[rows] for a, g in projected)
            assert isinstance(gradients, Tensor)
            total += gradients.square_().sum(dim=0)
    return total


def _blocks(plan: Plan) -> dict[int, KroneckerBlock]:
    """Offset of a weight -> its block, with the bias of its layer where neither is read anywhere else.

    A weight may be a slice of a parameter, such as the projections of an attention layer that share one.
    """
    graph, space = plan.graph, plan.space
    computed_from = {space.canonical(name) for slot in graph.slots if slot.kind == "derived" for name in slot.names()}
    places = [(offset, offset + math.prod(slot.shape)) for offset, slot in zip(plan.slot_offsets, graph.slots, strict=True)]
    reads = [places[index] for node in graph.nodes for index in node.slots if index >= 0 and plan.slot_offsets[index] >= 0]

    def parameter(index: int) -> int | None:
        """Its offset, if the slot is a trained parameter, or a run of one, that nothing is computed from."""
        if index < 0 or plan.slot_offsets[index] < 0 or graph.slots[index].kind != "parameter":
            return None
        return None if space.canonical(graph.slots[index].name) in computed_from else plan.slot_offsets[index]

    def is_read_once(index: int) -> bool:
        begin, end = places[index]
        return sum(first < end and begin < last for first, last in reads) == 1

    found: dict[int, KroneckerBlock] = {}
    orientations: dict[int, set[bool]] = {}
    for node in graph.nodes:
        plain = node.rule == "linear" or (node.rule == "convolution" and not node.ints["transposed"] and node.ints["groups"] == 1)
        offset = parameter(node.slots[0]) if plain else None
        if offset is None:
            continue
        transposed = node.rule == "linear" and bool(node.ints["transposed"])
        num_outputs = node.ints["out_features" if node.rule == "linear" else "out_channels"]
        bias = parameter(node.slots[1]) if len(node.slots) > 1 else None
        alone = bias is not None and all(map(is_read_once, node.slots[:2])) and math.prod(graph.slots[node.slots[1]].shape) == num_outputs
        orientations.setdefault(offset, set()).add(transposed)
        num_inputs = math.prod(graph.slots[node.slots[0]].shape) // num_outputs
        found[offset] = KroneckerBlock(offset, bias if alone else None, num_outputs, num_inputs, transposed)
    # a matrix that one layer reads as W and another as Wᵀ has two pairs of factors
    return {offset: block for offset, block in found.items() if len(orientations[offset]) == 1}


def _factor_widths(plan: Plan) -> tuple[int, int]:
    """Elements of the factors for one example: once, and for each right-hand side."""
    graph = plan.graph
    fixed = each = 1
    for node in graph.nodes:
        each += node.width
        if node.rule == "convolution":
            shape = graph.slots[node.slots[0]].shape
            fixed += node.width // shape[0] * math.prod(shape[1:])
    if plan.has_derived_parameters:
        each += plan.space.num_parameters  # whose gradients are formed
    return fixed, each
