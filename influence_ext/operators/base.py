"""Linear operators: what solvers and SciPy see of a curvature matrix.

Rows are right-hand sides: ``matmat`` takes and returns ``[V, P]``.
"""

from __future__ import annotations

import abc
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from influence_ext.checks import is_count
from influence_ext.context import standalone
from influence_ext.errors import ArgumentError, DeviceError, DTypeError, ShapeError

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator as ScipyLinearOperator

    from influence_ext.graphs import RecordableProduct

_PIECE = 1 << 17  # elements transposed at a time: what is read and what is written stay in the second-level cache


def rows_of(columns: Sequence[Tensor]) -> Tensor:
    """``[V, P]``, contiguous, from blocks ``[P_i, V]`` of columns; for few columns in half the time of ``contiguous()``, which gathers."""
    num_columns = columns[0].shape[1]
    dtype = functools.reduce(torch.promote_types, (block.dtype for block in columns))
    rows = columns[0].new_empty((num_columns, sum(map(len, columns))), dtype=dtype)
    pieces = [piece for block in columns for piece in block.detach().split(max(1, _PIECE // max(1, num_columns)))]
    for to, piece in zip(rows.split([len(piece) for piece in pieces], dim=1), pieces, strict=True):
        to.T.copy_(piece)
    return rows


class LinearOperator(abc.ABC):
    """A symmetric matrix known by its products.

    Subclasses set ``num_parameters``, ``dtype`` and ``device`` and implement ``_matmat``.
    """

    num_parameters: int
    dtype: torch.dtype
    device: torch.device

    @property
    def shape(self) -> tuple[int, int]:
        """``(P, P)``."""
        return (self.num_parameters, self.num_parameters)

    @property
    def exact(self) -> LinearOperator:
        """The operator that this one's products stand for: itself, unless they are made at reduced precision."""
        return self

    @abc.abstractmethod
    def _matmat(self, V: Tensor) -> Tensor:
        """``[V, P] -> [V, P]``; the argument is checked, contiguous, of the operator's dtype and device, and not to be modified."""

    @standalone
    def matmat(self, V: Tensor) -> Tensor:
        """Multiply onto many vectors at once.

        Args:
            V: ``[V, P]``, one vector a row, of the operator's dtype and device. Not modified.

        Returns:
            ``[V, P]``.

        Raises:
            ShapeError: ``V`` is not ``[V, P]``.
            DTypeError: another dtype.
            DeviceError: another device.
        """
        self._check(V, "[V, P]", isinstance(V, Tensor) and V.dim() == 2 and V.shape[1] == self.num_parameters)
        return self._matmat(V.detach().contiguous())

    @standalone
    def matvec(self, v: Tensor) -> Tensor:
        """Multiply onto one vector ``[P] -> [P]``."""
        self._check(v, "[P]", isinstance(v, Tensor) and v.dim() == 1 and v.shape[0] == self.num_parameters)
        return self._matmat(v.detach().contiguous()[None])[0]

    def __matmul__(self, v: Any) -> Any:
        """``[P] -> [P]`` or ``[P, V] -> [P, V]`` (columns, as in linear algebra; ``matmat`` takes rows and is the fast path)."""
        if not isinstance(v, Tensor):
            raise DTypeError(
                f"{type(self).__name__}: expected a tensor of shape [P] or [P, V], got {type(v).__name__}; convert it with torch.as_tensor."
            )
        self._check(v, "[P] or [P, V]", v.dim() in (1, 2) and v.shape[0] == self.num_parameters)
        return self.matvec(v) if v.dim() == 1 else self.matmat(rows_of([v])).T

    def recordable(self) -> RecordableProduct | None:
        """The product as launches of the core alone, for a solver that records more than a product; None: there is only ``matmat``."""
        return None

    @property
    def objective_weight(self) -> float:
        """What the objective's terms weigh together: 1 for a mean, N for a sum where nothing weighs them otherwise.

        It is what a damping is large or small against.
        """
        return 1.0

    def product_operations(self, V: int) -> float:
        """Counted arithmetic of a product with V vectors, what ``solvers.auto`` weighs solvers by: ``2 P² V`` unless a subclass knows."""
        return 2.0 * self.num_parameters**2 * V

    @standalone
    def diagonal(self) -> Tensor:
        """``[P]``, the exact diagonal. Cost: P products unless a subclass knows better."""
        return self.to_dense().diagonal().clone()

    def trace(self) -> Tensor:
        """Scalar tensor: the exact trace."""
        return self.diagonal().sum()

    @standalone
    def to_dense(self, block_size: int = 64) -> Tensor:
        """``[P, P]``, assembled by products onto unit vectors, ``block_size`` at a time.

        Raises:
            ArgumentError: the matrix would take more than 8 GiB, or ``block_size`` is no number of at least 1.
        """
        if not is_count(block_size):
            raise ArgumentError(f"{type(self).__name__}.to_dense: expected block_size to be at least 1, got {block_size!r}; leave it out.")
        P, block_size = self.num_parameters, int(block_size)
        size = P * P * self.dtype.itemsize
        if size > 8 * 2**30:
            raise ArgumentError(
                f"{type(self).__name__}.to_dense: expected a matrix of at most 8 GiB, got [{P}, {P}] = {size / 2**30:.1f} GiB; "
                "use products (matmat) or a solver instead."
            )
        dense = torch.empty(P, P, dtype=self.dtype, device=self.device)
        for start in range(0, P, block_size):
            stop = min(start + block_size, P)
            unit = torch.zeros(stop - start, P, dtype=self.dtype, device=self.device)
            unit[torch.arange(stop - start), torch.arange(start, stop)] = 1
            dense[start:stop] = self.matmat(unit)
        return (dense + dense.T) / 2

    def to_scipy(self) -> ScipyLinearOperator:
        """The operator as ``scipy.sparse.linalg.LinearOperator`` (CPU, NumPy arrays in and out, the operator's dtype)."""
        import numpy as np
        from scipy.sparse.linalg import LinearOperator as ScipyLinearOperator

        numpy_dtype = torch.empty(0, dtype=self.dtype).numpy().dtype

        def columns(X: np.ndarray) -> np.ndarray:
            rows = torch.as_tensor(np.ascontiguousarray(X.T), dtype=self.dtype, device=self.device)
            return self.matmat(rows.reshape(-1, self.num_parameters)).cpu().numpy().T

        return ScipyLinearOperator(
            shape=self.shape,
            dtype=numpy_dtype,
            matvec=lambda x: columns(x.reshape(-1, 1))[:, 0],
            matmat=columns,
            rmatvec=lambda x: columns(x.reshape(-1, 1))[:, 0],
            rmatmat=columns,
        )

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """``torch.lobpcg(operator, ...)``, and products ``torch.matmul(operator, x)`` with ``[P]`` or ``[P, V]``."""
        if func in (torch.matmul, torch.mm, torch.mv) and isinstance(args[0], LinearOperator):
            return args[0] @ args[1]
        if func is not torch.lobpcg:
            return NotImplemented
        operands: list[Any] = [OperatorTensor(a) if isinstance(a, LinearOperator) else a for a in args]
        named: dict[str, Any] = {key: OperatorTensor(a) if isinstance(a, LinearOperator) else a for key, a in (kwargs or {}).items()}
        return torch._lobpcg._lobpcg(*operands, **named)  # what torch.lobpcg calls once it has looked for this very method

    def _check(self, v: Tensor, expected: str, shape_ok: bool) -> None:
        who = type(self).__name__
        if not isinstance(v, Tensor) or v.layout != torch.strided:
            found = v.layout if isinstance(v, Tensor) else type(v).__name__
            raise DTypeError(f"{who}: expected v as a dense tensor of shape {expected}, got {found}; convert it with torch.as_tensor.")
        if not shape_ok:
            raise ShapeError(f"{who}: expected v of shape {expected} with P = {self.num_parameters}, got {list(v.shape)}{self._hint()}.")
        if v.dtype != self.dtype:
            raise DTypeError(f"{who}: expected v of dtype {self.dtype}, got {v.dtype}; convert it with v.to({self.dtype}).")
        if v.device != self.device:
            raise DeviceError(f"{who}: expected v on {self.device}, got {v.device}; move it with v.to('{self.device}').")

    def _hint(self) -> str:
        return ""


class OperatorTensor(Tensor):
    """A linear operator for functions that insist on a tensor: ``[P, P]`` without numbers, known by its products ``A x`` and ``A X``."""

    operator: LinearOperator

    @staticmethod
    def __new__(cls, operator: LinearOperator) -> OperatorTensor:  # noqa: D102
        tensor: OperatorTensor = torch.Tensor._make_wrapper_subclass(cls, operator.shape, dtype=operator.dtype, device=operator.device)
        tensor.operator = operator
        return tensor

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Products go to the operator, above autograd, whose forward mode it may need."""
        if func is torch.matmul and isinstance(args[0], OperatorTensor):
            return args[0].operator @ args[1]
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """There are no numbers to compute with."""
        return NotImplemented


class CurvatureOperator(LinearOperator):
    """``G + damping·I`` with a known root: ``G = Uᵀ U``, ``U`` of shape ``[R, P]``.

    The root is what lets a solver work in the ``R``-dimensional space of outputs instead of the ``P``-dimensional one of parameters.
    """

    damping: float
    num_roots: int

    def product_operations(self, V: int) -> float:
        """Counted arithmetic of a product with V vectors: ``4 R P V``, U and Uᵀ as they stand, unless a subclass knows better."""
        return 4.0 * max(self.num_roots, 1) * self.num_parameters * V

    def gram_operations(self) -> float:
        """Counted arithmetic of ``root_gram``: ``2 R² P`` unless a subclass knows better."""
        return 2.0 * self.num_roots**2 * self.num_parameters

    @abc.abstractmethod
    def damped(self, damping: float) -> CurvatureOperator:
        """The same curvature with another damping; the cached state is shared, not copied."""

    @abc.abstractmethod
    def root_matmat(self, V: Tensor) -> Tensor:
        """``U`` applied: ``[V, P] -> [V, R]``."""

    @abc.abstractmethod
    def root_rmatmat(self, Y: Tensor) -> Tensor:
        """``Uᵀ`` applied: ``[V, R] -> [V, P]``."""

    @abc.abstractmethod
    def root_gram(self) -> Tensor:
        """``U Uᵀ``, ``[R, R]``, without forming ``U``."""


@dataclass(frozen=True)
class KroneckerBlock:
    """The weight of a linear map, a matrix ``[O, I]``, and the map's bias as one more input that is always one.

    Attributes:
        weight: Where it begins in the flat vectors.
        bias: Where the bias begins; None if there is none, or it is treated by itself.
        num_outputs: O.
        num_inputs: I, without the bias.
        transposed: Whether the weight lies in memory as ``[I, O]``.
    """

    weight: int
    bias: int | None
    num_outputs: int
    num_inputs: int
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """``(O, I)``, with the bias ``(O, I + 1)``."""
        return self.num_outputs, self.num_inputs + (self.bias is not None)

    def take(self, V: Tensor) -> Tensor:
        """The block of each flat vector: ``[V, P] -> [V, *shape]``."""
        O, I = self.num_outputs, self.num_inputs
        flat = V[:, self.weight : self.weight + O * I]
        matrices = flat.view(-1, I, O).mT if self.transposed else flat.view(-1, O, I)
        return matrices if self.bias is None else torch.cat([matrices, V[:, self.bias : self.bias + O, None]], dim=2)

    def put(self, matrices: Tensor, V: Tensor) -> None:
        """Write ``[V, *shape]`` to its place in the flat vectors ``[V, P]``."""
        O, I = self.num_outputs, self.num_inputs
        weights = matrices[:, :, :I]
        V[:, self.weight : self.weight + O * I] = (weights.mT if self.transposed else weights).reshape(-1, O * I)
        if self.bias is not None:
            V[:, self.bias : self.bias + O] = matrices[:, :, I]


@dataclass(frozen=True, eq=False)
class KroneckerFactors:
    """``G ≈ B ⊗ A`` for one block: ``A [I, I]`` (``[I + 1, I + 1]`` with the bias) and ``B [O, O]``, in float64."""

    block: KroneckerBlock
    A: Tensor
    B: Tensor


@dataclass(frozen=True, eq=False)
class Rotation:
    """An orthogonal change of basis of one block, ``M -> outputsᵀ M inputs``; columns of ``outputs`` and ``inputs`` are the new axes."""

    block: KroneckerBlock
    outputs: Tensor
    inputs: Tensor
