"""The interface of curvlinops' ``PyTorchLinearOperator`` where curvlinops is not installed: products, sums, multiples, chains, SciPy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from influence_ext.errors import DeviceError, DTypeError, ShapeError

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator as ScipyLinearOperator


class PyTorchLinearOperator:
    """A matrix ``[M, N]`` known by its products, between products of tensor spaces.

    Subclasses implement ``_matmat`` on lists of tensors ``[*shape, K]``, ``dtype``, ``device``, and ``_adjoint`` unless ``SELF_ADJOINT``.

    Args:
        in_shape: shapes of the tensors that make up a column vector the operator takes.
        out_shape: shapes of those that it returns.
    """

    SELF_ADJOINT: bool = False

    def __init__(self, in_shape: Sequence[Sequence[int]], out_shape: Sequence[Sequence[int]]):
        self._in_shape = [torch.Size(s) for s in in_shape]
        self._out_shape = [torch.Size(s) for s in out_shape]
        self._in_shape_flat = [s.numel() for s in self._in_shape]
        self._out_shape_flat = [s.numel() for s in self._out_shape]
        self.shape = (sum(self._out_shape_flat), sum(self._in_shape_flat))

    @property
    def dtype(self) -> torch.dtype:
        """Of the vectors it takes."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Of the vectors it takes."""
        raise NotImplementedError

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        raise NotImplementedError

    def _adjoint(self) -> PyTorchLinearOperator:
        raise NotImplementedError

    def adjoint(self) -> PyTorchLinearOperator:
        """The transpose."""
        return self if self.SELF_ADJOINT else self._adjoint()

    def __matmul__(self, X: Any) -> Any:
        """``[N] -> [M]``, ``[N, K] -> [M, K]``, lists of tensors ``[*shape]`` or ``[*shape, K]`` likewise, or an operator -> their chain.

        Raises:
            ValueError: another shape or type.
        """
        if isinstance(X, PyTorchLinearOperator):
            return _Chain(self, X)
        columns, single = self._columns(X)
        product = self._matmat(columns)
        K = columns[0].shape[-1]
        expected = [(*s, K) for s in self._out_shape]
        if [tuple(p.shape) for p in product] != expected:
            raise ShapeError(
                f"{self._name}: expected a product of shapes {expected}, got {[list(p.shape) for p in product]}; correct _matmat."
            )
        if isinstance(X, list):
            return [p.squeeze(-1) for p in product] if single else product
        flat = torch.cat([p.reshape(size, K) for p, size in zip(product, self._out_shape_flat, strict=True)])
        return flat.squeeze(-1) if single else flat

    def _columns(self, X: Any) -> tuple[list[Tensor], bool]:
        """Tensors ``[*shape, K]``, and whether they are one vector."""
        shapes = [list(s) for s in self._in_shape]
        if isinstance(X, Tensor):
            if X.dim() not in (1, 2) or X.shape[0] != self.shape[1]:
                raise ShapeError(
                    f"{self._name}: expected a tensor [N] or [N, K] with N = {self.shape[1]}, got {list(X.shape)}; reshape it."
                )
            K = 1 if X.dim() == 1 else X.shape[1]
            return [x.reshape(*s, K) for x, s in zip(X.split(self._in_shape_flat), self._in_shape, strict=True)], X.dim() == 1
        if not isinstance(X, list) or not all(isinstance(x, Tensor) for x in X):
            raise ShapeError(f"{self._name}: expected a tensor, a list of tensors or an operator, got {type(X).__name__}; convert it.")
        if [list(x.shape) for x in X] == shapes:
            return [x.unsqueeze(-1) for x in X], True
        if [list(x.shape[:-1]) for x in X] == shapes and len({x.shape[-1] for x in X}) == 1:
            return X, False
        raise ShapeError(
            f"{self._name}: expected a list of tensors of shapes {shapes}, with one further trailing axis for a matrix, got "
            f"{[list(x.shape) for x in X]}; reshape them."
        )

    @property
    def _name(self) -> str:
        return type(self).__name__

    def __add__(self, other: PyTorchLinearOperator) -> PyTorchLinearOperator:
        """The sum of two operators."""
        return _Sum(self, other)

    def __sub__(self, other: PyTorchLinearOperator) -> PyTorchLinearOperator:
        """Their difference."""
        return _Sum(self, -1.0 * other)

    def __mul__(self, scalar: float) -> PyTorchLinearOperator:
        """A multiple."""
        return _Multiple(self, scalar)

    __rmul__ = __mul__

    def to_scipy(self, dtype: Any = None) -> ScipyLinearOperator:
        """As ``scipy.sparse.linalg.LinearOperator``; products run in the operator's own dtype.

        Args:
            dtype: NumPy dtype that the SciPy operator declares; default NumPy's own, float64.
        """
        import numpy as np
        from scipy.sparse.linalg import LinearOperator as ScipyLinearOperator

        def on_arrays(operator: PyTorchLinearOperator) -> Callable[[np.ndarray], np.ndarray]:
            def product(X: np.ndarray) -> np.ndarray:
                result = operator @ torch.as_tensor(np.ascontiguousarray(X), dtype=operator.dtype, device=operator.device)
                return result.cpu().numpy().astype(X.dtype)

            return product

        forward, backward = on_arrays(self), on_arrays(self.adjoint())
        declared = np.dtype(dtype)
        return ScipyLinearOperator(self.shape, matvec=forward, matmat=forward, rmatvec=backward, rmatmat=backward, dtype=declared)


class _Composed(PyTorchLinearOperator):
    """What is made of other operators lives where the first of them does."""

    def __init__(self, first: PyTorchLinearOperator, in_shape: Sequence[Sequence[int]], out_shape: Sequence[Sequence[int]]):
        super().__init__(in_shape, out_shape)
        self._first = first

    @property
    def dtype(self) -> torch.dtype:
        return self._first.dtype

    @property
    def device(self) -> torch.device:
        return self._first.device


class _Sum(_Composed):
    def __init__(self, A: PyTorchLinearOperator, B: PyTorchLinearOperator):
        _require_fit("sum", A._in_shape + A._out_shape, B._in_shape + B._out_shape, A, B)
        super().__init__(A, A._in_shape, A._out_shape)
        self._A, self._B = A, B
        self.SELF_ADJOINT = A.SELF_ADJOINT and B.SELF_ADJOINT

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        return [a + b for a, b in zip(self._A._matmat(X), self._B._matmat(X), strict=True)]

    def _adjoint(self) -> PyTorchLinearOperator:
        return _Sum(self._A.adjoint(), self._B.adjoint())


class _Multiple(_Composed):
    def __init__(self, A: PyTorchLinearOperator, scalar: float):
        super().__init__(A, A._in_shape, A._out_shape)
        self._A, self._scalar = A, scalar
        self.SELF_ADJOINT = A.SELF_ADJOINT

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        return [self._scalar * a for a in self._A._matmat(X)]

    def _adjoint(self) -> PyTorchLinearOperator:
        return _Multiple(self._A.adjoint(), self._scalar)


class _Chain(_Composed):
    def __init__(self, A: PyTorchLinearOperator, B: PyTorchLinearOperator):
        _require_fit("product", A._in_shape, B._out_shape, A, B)
        super().__init__(A, B._in_shape, A._out_shape)
        self._A, self._B = A, B

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        return self._A._matmat(self._B._matmat(X))

    def _adjoint(self) -> PyTorchLinearOperator:
        return _Chain(self._B.adjoint(), self._A.adjoint())


def _require_fit(what: str, left: Any, right: Any, A: PyTorchLinearOperator, B: PyTorchLinearOperator) -> None:
    """Raise unless two operators have the shapes, dtype and device for a sum or a product."""
    if left != right:
        raise ShapeError(f"{what} of operators: expected spaces that fit, got {left} and {right}; use the same parameters in both.")
    if A.dtype != B.dtype:
        raise DTypeError(f"{what} of operators: expected one dtype, got {A.dtype} and {B.dtype}; convert one of them.")
    if A.device != B.device:
        raise DeviceError(f"{what} of operators: expected one device, got {A.device} and {B.device}; move one of them.")
