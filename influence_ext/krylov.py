"""The vectors of conjugate gradients with their scalars, which stay on the vectors' device: few fused passes a step, nothing read back."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import influence_ext._C as _C

if TYPE_CHECKING:
    from influence_ext.graphs import RecordableProduct

# csrc/math/krylov.h: CgStatus, and the columns of the table of scalars.
ENDS = ("running", "converged", "max_steps", "stalled", "breakdown", "non_finite", "not_psd")
_STATUS, _STEPS, _BUDGET, _TARGET, _RR, _RZ, _RZ_NEXT, _CURVATURE, _SQUARES, _TOP = range(_C.cg_scalars)
_HAS_CUDA = _C.build_info()["cuda"] == "yes"


class CGVectors:
    """``V`` recurrences ``x += α p,  r −= α A p,  p ← M⁻¹r + β p`` from ``x = 0``, each until it ends for a reason of its own.

    A recurrence that has ended keeps its x, r and p. Inner products are summed in float64, in an order that does not change.

    Attributes:
        x: ``[V, P]``, by how much each solution has moved.
        r: ``[V, P]``, the residuals; given, overwritten.

    Cost: three ``[V, P]`` buffers; a step reads and writes 11 ``[V, P]`` (13 with a preconditioner) and does not wait for a device.
    """

    def __init__(self, R: Tensor, target: Tensor, budget: list[int], lower_bound: float):
        """``target [V]`` of ``‖r‖``; ``budget``: steps each may take; ``lower_bound``: of A's eigenvalues by its construction, or 0."""
        self.r = R
        self.x = torch.zeros_like(R)
        self._p = torch.zeros_like(R)
        self._lower = lower_bound
        self._recorded: _RecordedStep | None = None
        self._give_back: Callable[[], None] | None = None
        self._table = torch.zeros(R.shape[0], _C.cg_scalars, dtype=torch.float64, device=R.device)
        size = torch.linalg.vector_norm(R, dim=1).double()
        self._table[:, _RR] = size.square()
        self._table[:, _TARGET] = target
        self._table[:, _BUDGET] = torch.tensor(budget, dtype=torch.float64, device=R.device)
        self._table[:, _STATUS] = torch.where(size <= target, float(ENDS.index("converged")), 0.0)
        self._table[:, _STATUS].masked_fill_((self._table[:, _BUDGET] == 0) & ~(size <= target), float(ENDS.index("max_steps")))

    def direction(self, z: Tensor | None) -> Tensor:
        """The next p ``[V, P]``, overwritten by the next call; ``z = M⁻¹r``, None for M = I."""
        if _is_native(self.r):
            _C.cg_direction(self.r, None if z is None else z.contiguous(), self._p, self._table)
        else:
            _direction(self.r, z, self._p, self._table)
        return self._p

    def step(self, q: Tensor) -> None:
        """Move along p, with ``q = A p``."""
        if _is_native(self.r):
            _C.cg_step(self._lower, self._p, q.contiguous(), self.x, self.r, self._table)
        else:
            _step(self._lower, self._p, q, self.x, self.r, self._table)

    def squares(self) -> Tensor:
        """``rᵀM⁻¹r`` of each residual, ``[V]``, infinite where it is not positive; between :meth:`direction` and :meth:`step`."""
        squares = self._table[:, _RZ_NEXT]
        return torch.where(squares > 0, squares, torch.inf)

    def replace_residuals(self, R: Tensor) -> None:
        """Go on with ``R [V, P]`` in place of the residuals, to which it is equal up to rounding; not of a recurrence that is replayed."""
        self.r = R
        self._table[:, _RR] = torch.linalg.vecdot(R.double(), R.double())

    def look(self) -> list[tuple[str, int]]:
        """For each recurrence how it ended (:data:`ENDS`) and after how many steps; waits for the device."""
        return [(ENDS[int(end)], int(steps)) for end, steps in self._table[:, [_STATUS, _STEPS]].tolist()]

    def select(self, keep: list[int]) -> None:
        """Go on with these recurrences alone, in new buffers."""
        self.x, self.r, self._p, self._table = self.x[keep], self.r[keep], self._p[keep], self._table[keep]
        if self._give_back is not None:
            self._give_back()
            self._recorded = self._give_back = None

    def replay(self, product: RecordableProduct, z: Tensor | None, times: int) -> bool:
        """Take ``times`` steps with ``product``, each one replay; False, and none is taken, if there is no recording.

        The first of such steps is to be taken by :meth:`direction` and :meth:`step`; the second is recorded, and later recurrences of as
        many columns replay it. x, r and p move to where the recording has them.

        Args:
            product: ``A``, the same until the next :meth:`select`.
            z: ``M⁻¹r``, None for M = I; at most one step then.
            times: steps.

        Cost: a launch for each step, one for each array when a recording is taken over.
        """
        if self._recorded is None:
            recordings = product.recordings
            kind = ("cg", product.call.key, product.damping, self._lower, z is None)
            key, found = recordings.take(kind, self.r, lambda: _RecordedStep(self, product, z is not None))
            if found is None:
                return False
            for there, here in zip(found.arrays, (self.x, self.r, self._p, self._table), strict=True):
                there.copy_(here)
            self.x, self.r, self._p, self._table = found.arrays
            self._recorded, self._give_back = found, lambda: recordings.put(key, found)
        if z is not None and self._recorded.z is not None:
            self._recorded.z.copy_(z)
        self._recorded.graph.replay(times)
        return True


class _RecordedStep:
    """A step on arrays of its own: direction, product, move."""

    def __init__(self, vectors: CGVectors, product: RecordableProduct, has_z: bool):
        self.arrays = tuple(t.clone() for t in (vectors.x, vectors.r, vectors._p, vectors._table))
        self.z = torch.zeros_like(vectors.r) if has_z else None
        self._product, self._lower = product, vectors._lower
        _C.add_multiple(0.0, vectors._p, torch.zeros_like(vectors._p))  # the one kernel of a step that no step before has loaded
        self.graph = _C.Graph(vectors.r.device, self._enqueue)

    def _enqueue(self) -> None:
        x, r, p, table = self.arrays
        _C.cg_direction(r, self.z, p, table)
        self._q = self._product.call.run(p)
        if self._product.damping:
            _C.add_multiple(self._product.damping, p, self._q)
        _C.cg_step(self._lower, p, self._q, x, r, table)


def _is_native(like: Tensor) -> bool:
    return like.dtype in (torch.float32, torch.float64) and (like.is_cpu or (like.is_cuda and _HAS_CUDA))


# What the extension has no kernel for: another device or data type, which an operator of the user's own may have.


def _direction(r: Tensor, z: Tensor | None, p: Tensor, table: Tensor) -> None:
    running = table[:, _STATUS] == 0
    rz_next = table[:, _RR] if z is None else (r * z).sum(dim=1, dtype=torch.float64)
    beta = torch.where(table[:, _STEPS] == 0, 0.0, rz_next / table[:, _RZ]).to(p.dtype)
    table[:, _RZ_NEXT] = torch.where(running, rz_next, table[:, _RZ_NEXT])
    p.copy_(torch.where(running[:, None], (r if z is None else z) + beta[:, None] * p, p))


def _step(lower: float, p: Tensor, q: Tensor, x: Tensor, r: Tensor, table: Tensor) -> None:
    eps = torch.finfo(p.dtype).eps
    running = table[:, _STATUS] == 0
    rz = table[:, _RZ_NEXT]
    curvature, squares = (p * q).sum(dim=1, dtype=torch.float64), (p * p).sum(dim=1, dtype=torch.float64)
    top = torch.maximum(table[:, _TOP], curvature / squares)
    floor = 0.5 * lower * squares if lower > 0 else eps * top * squares
    certain = -1000 * eps * top * squares if lower > 0 else floor
    alpha = torch.where(running & (curvature > floor), rz / curvature, 0.0).to(p.dtype)[:, None]
    x.copy_(torch.where(running[:, None], x + alpha * p, x))
    r.copy_(torch.where(running[:, None], r - alpha * q, r))
    rr = (r * r).sum(dim=1, dtype=torch.float64)
    steps = table[:, _STEPS] + 1
    ends = {  # the first that holds
        "non_finite": ~(rr.isfinite() & curvature.isfinite()),
        "breakdown": rz <= 0,
        "not_psd": (curvature <= floor) & (curvature <= certain),
        "stalled": curvature <= floor,
        "converged": rr.sqrt() <= table[:, _TARGET],
        "max_steps": steps == table[:, _BUDGET],
    }
    status = torch.zeros_like(rr)
    for end, holds in reversed(ends.items()):
        status = torch.where(holds, float(ENDS.index(end)), status)
    new = torch.stack([status, steps, table[:, _BUDGET], table[:, _TARGET], rr, rz, rz, curvature, squares, top], dim=1)
    table.copy_(torch.where(running[:, None], new, table))
