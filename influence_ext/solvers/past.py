"""The residuals of a Krylov recurrence so far, to which the next ones are made orthogonal again."""

from __future__ import annotations

import torch
from torch import Tensor

from influence_ext.operators.base import LinearOperator

KEPT_BYTES = 256 * 2**20
"""What the past may take where nobody says how much to keep."""
BLOCK_OPERATIONS, VECTOR_OPERATIONS = 4, 16
"""Time to take one kept row out of a vector, in operations for each parameter: many vectors at once, and one (bound by memory)."""
FIRST_ROWS = 16
"""Rows that are allocated at first; whenever they are full, as many again as there are."""
CALL_OPERATIONS = 1e6
"""What the calls take that make one vector orthogonal, in operations' time: with products below that, a past costs more than it saves."""


class Past:
    """Rows ``q`` with ``qᵢᵀ M⁻¹ qⱼ = δᵢⱼ``, the residuals of conjugate gradients, normalised.

    In exact arithmetic the residuals of a recurrence are orthogonal. In floating point they lose that towards every eigenvector that has
    been found, which is then found again and again: steps that reduce nothing. Once taken out of a new residual, the past stays out.

    Args:
        most: Rows kept, the first that are added. Later residuals are made orthogonal to these: the directions of large eigenvalues,
            which are lost first, are found first.

    Cost: a row is one vector, two with a preconditioner; ``4 P`` operations to take one row out of a vector.

    Reference: Paige, "Error analysis of the Lanczos algorithm for tridiagonalizing a symmetric matrix" (1976); Simon, "Analysis of the
    symmetric Lanczos algorithm with reorthogonalization methods", Linear Algebra and its Applications 61 (1984).
    """

    def __init__(self, most: int):
        self._most = most
        self._count = 0
        self._room = 0  # in the last chunk
        self._chunks: list[list[Tensor]] = []  # of rows q, and M⁻¹q if that is another; what lies in a chunk stays where it is

    def __bool__(self) -> bool:
        return self._count > 0

    def add(self, q: Tensor, z: Tensor | None) -> None:
        """Keep ``q``, ``[P]`` or ``[k, P]``, with ``z = M⁻¹q`` (None for M = I), if all of it still finds room."""
        new = len(q) if q.dim() == 2 else 1
        if self._count + new > self._most:
            return
        given = [q] if z is None else [q, z]
        if new > self._room:
            self._trim()
            self._room = min(self._most - self._count, max(FIRST_ROWS, new, self._count))
            self._chunks.append([torch.empty(self._room, q.shape[-1], dtype=q.dtype, device=q.device) for _ in given])
        for rows, row in zip(self._chunks[-1], given, strict=True):
            begin = len(rows) - self._room
            rows[begin : begin + new] = row
        self._count += new
        self._room -= new

    def removed_from(self, R: Tensor) -> Tensor:
        """``R − (R M⁻¹Qᵀ) Q``, of ``[P]`` or ``[V, P]``."""
        for position, chunk in enumerate(self._chunks):
            filled = len(chunk[0]) - (self._room if position == len(self._chunks) - 1 else 0)
            q, z = chunk[0][:filled], chunk[-1][:filled]
            R = torch.addmv(R, q.T, z @ R, alpha=-1.0) if R.dim() == 1 else torch.addmm(R, R @ z.T, q, alpha=-1.0)
        return R

    def _trim(self) -> None:
        """The last chunk ends where it is filled: what is added next does not fit."""
        if self._room:
            self._chunks[-1] = [rows[: len(rows) - self._room] for rows in self._chunks[-1]]
            self._room = 0


def orthogonalisation_operations(num_parameters: int, at_once: int) -> float:
    """Counted time to take one kept row out of one of ``at_once`` vectors that share it."""
    return max(BLOCK_OPERATIONS, VECTOR_OPERATIONS / at_once) * num_parameters


def worth_keeping(operator: LinearOperator, num_columns: int, shared: bool, num_bytes: int = KEPT_BYTES, vectors: int = 1) -> int:
    """How many residuals a column are worth keeping: what fits into ``num_bytes``, and takes no longer than the product does.

    None on a device, where it is not measured, and a step with a past cannot be recorded and replayed.

    Args:
        operator: ``A``.
        num_columns: Right-hand sides at once.
        shared: Whether all columns are made orthogonal to the residuals of all, as in a block, or each to its own.
        num_bytes: For all columns.
        vectors: That a row takes: two with a preconditioner.
    """
    P, V = operator.num_parameters, max(1, num_columns)
    if operator.device.type != "cpu" or operator.recordable() is not None:
        return 0
    if not shared and operator.product_operations(V) / V < CALL_OPERATIONS:
        return 0
    together = V if shared else 1
    affordable = operator.product_operations(V) / V / (orthogonalisation_operations(P, together) * together)
    return int(min(P, affordable, num_bytes // (vectors * V * P * operator.dtype.itemsize)))
