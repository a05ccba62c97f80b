"""curvlinops' inverses by conjugate gradients and by a truncated Neumann series, of any of its operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from influence_ext.adapters.curvlinops.interface import PyTorchLinearOperator
from influence_ext.context import warn
from influence_ext.errors import ArgumentError, DTypeError, ShapeError
from influence_ext.operators import LinearOperator
from influence_ext.solvers import CG


class _InverseLinearOperator(PyTorchLinearOperator):
    """What the inverses of an operator share; subclasses solve for columns ``[P, K]``."""

    def __init__(self, A: PyTorchLinearOperator):
        if not isinstance(A, PyTorchLinearOperator):
            raise DTypeError(
                f"{type(self).__name__}: expected a linear operator, got {type(A).__name__}; for a matrix torch.linalg.solve is the way."
            )
        if A._in_shape != A._out_shape:
            raise ShapeError(
                f"{type(self).__name__}: expected a square operator, got {A._in_shape} -> {A._out_shape}; compose it with its adjoint."
            )
        super().__init__(A._in_shape, A._out_shape)
        self._A = A
        self.SELF_ADJOINT = A.SELF_ADJOINT

    @property
    def dtype(self) -> torch.dtype:
        """Of the operator."""
        return self._A.dtype

    @property
    def device(self) -> torch.device:
        """Of the operator."""
        return self._A.device

    def _solve(self, B: Tensor) -> Tensor:
        raise NotImplementedError

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        K = X[0].shape[-1]
        solved = self._solve(torch.cat([x.reshape(-1, K) for x in X]))
        return [x.reshape(*s, K) for x, s in zip(solved.split(self._out_shape_flat), self._out_shape, strict=True)]


class CGInverseLinearOperator(_InverseLinearOperator):
    """``A⁻¹`` of a symmetric positive definite operator by conjugate gradients (:class:`influence_ext.solvers.CG`).

    Takes the options of the ``linear_cg`` that curvlinops calls. A column stops when its residual, recomputed at the end, is at most
    ``tolerance`` times the right-hand side; ``linear_cg`` stops when the mean over the columns is. A solve that does not get there
    warns and gives what it reached.

    Args:
        A: the operator.
        tolerance: relative residual; default 1e-5. (``linear_cg``'s own default is 1, which means about ten steps.)
        max_iter: steps; default 1000.
        preconditioner: ``M⁻¹`` as a function ``[P, K] -> [P, K]``.
        initial_guess: ``[P, K]`` or ``[P]``.
        eps, stop_updating_after, max_tridiag_iter: accepted for compatibility; they concern what does not occur here.

    Raises:
        ValueError: an operator that is not square.
        TypeError: an unknown option.

    Warns:
        NumericalWarning: a column did not reach the tolerance.
    """

    def __init__(
        self,
        A: PyTorchLinearOperator,
        *,
        tolerance: float | None = None,
        max_iter: int | None = None,
        preconditioner: Callable[[Tensor], Tensor] | None = None,
        initial_guess: Tensor | None = None,
        eps: float = 1e-10,
        stop_updating_after: float = 1e-10,
        max_tridiag_iter: int | None = None,
    ):
        super().__init__(A)
        self._options: dict[str, Any] = {
            "tolerance": tolerance,
            "max_iter": max_iter,
            "preconditioner": preconditioner,
            "initial_guess": initial_guess,
            "eps": eps,
            "stop_updating_after": stop_updating_after,
            "max_tridiag_iter": max_tridiag_iter,
        }
        rows = None if preconditioner is None else lambda R: preconditioner(R.T).T
        self._solver = CG(1e-5 if tolerance is None else tolerance, 1000 if max_iter is None else max_iter, rows, on_failure="return")

    def _solve(self, B: Tensor) -> Tensor:
        guess = self._options["initial_guess"]
        x0 = None if guess is None else guess.reshape(len(B), -1).expand_as(B).T
        solution = self._solver.solve(_Rows(self._A), B.T, x0)
        failed = {status: solution.status.count(status) for status in solution.status if not status.success}
        if failed:
            worst = float(solution.residual_norm.max())
            reason = next(iter(failed)).explanation
            warn(
                f"CGInverseLinearOperator: {sum(failed.values())} of {B.shape[1]} columns did not reach the tolerance "
                f"{self._solver.rtol:g}, the worst relative residual is {worst:.2e}. {reason}"
            )
        return solution.value.T

    def _adjoint(self) -> PyTorchLinearOperator:
        return CGInverseLinearOperator(self._A.adjoint(), **self._options)


class NeumannInverseLinearOperator(_InverseLinearOperator):
    r"""``α Σ_{k=0}^{K} (I − α A)^k``, which tends to ``A⁻¹`` if all eigenvalues of A lie between 0 and ``2/α``.

    Args:
        A: the operator.
        num_terms: K.
        scale: α.
        check_nan: raise as soon as a partial sum holds NaN.

    Raises:
        ValueError: an operator that is not square; in products, NaN.

    Reference: Lorraine, Vicol, Duvenaud 2020, "Optimizing millions of hyperparameters by implicit differentiation".
    """

    def __init__(self, A: PyTorchLinearOperator, num_terms: int = 100, scale: float = 1.0, check_nan: bool = True):
        super().__init__(A)
        if num_terms < 0:
            raise ArgumentError(f"NeumannInverseLinearOperator: expected num_terms of at least 0, got {num_terms}; more terms, less error.")
        self._num_terms, self._scale, self._check_nan = num_terms, scale, check_nan

    def _solve(self, B: Tensor) -> Tensor:
        total, term = B.clone(), B
        for k in range(self._num_terms):
            term = torch.sub(term, self._A @ term, alpha=self._scale)
            total += term
            if self._check_nan and bool(total.isnan().any()):
                raise ArgumentError(
                    f"NeumannInverseLinearOperator: expected a series that converges, got NaN in term {k} with scale {self._scale:g}; "
                    "take a scale below 2 / (largest eigenvalue)."
                )
        return total.mul_(self._scale)

    def _adjoint(self) -> PyTorchLinearOperator:
        return NeumannInverseLinearOperator(self._A.adjoint(), self._num_terms, self._scale, self._check_nan)


class _Rows(LinearOperator):
    """An operator on columns as the library's solvers take it, on rows."""

    def __init__(self, A: PyTorchLinearOperator):
        self._A = A
        self.num_parameters = A.shape[1]
        self.dtype, self.device = A.dtype, A.device

    def _matmat(self, V: Tensor) -> Tensor:
        return (self._A @ V.T).T
