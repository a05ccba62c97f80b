"""Solvers and the systems they are tried on: every exported solver has a row, every system says why it is there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from influence_ext.operators.base import CurvatureOperator, KroneckerBlock, KroneckerFactors, LinearOperator, Rotation
from influence_ext.solvers import CG, EKFAC, BlockCG, Direct, Dual, LiSSA, Neumann, Nystrom, Solver, auto
from tests.cases import generator


class DenseOperator(LinearOperator):
    """A given symmetric matrix; remembers the size of every block it was applied to."""

    def __init__(self, A: Tensor):
        self.A = A
        self.num_parameters = A.shape[0]
        self.dtype, self.device = A.dtype, A.device
        self.blocks: list[int] = []

    def _matmat(self, V: Tensor) -> Tensor:
        self.blocks.append(V.shape[0])
        return V @ self.A


class RootOperator(CurvatureOperator):
    """``UᵀU + damping·I`` with ``U`` given; batches are random rows of ``U``, scaled to have the right mean."""

    def __init__(self, U: Tensor, damping: float):
        self.U, self.damping = U, damping
        self.num_roots, self.num_parameters = U.shape
        self.dtype, self.device = U.dtype, U.device
        self.blocks: list[int] = []

    def _matmat(self, V: Tensor) -> Tensor:
        self.blocks.append(V.shape[0])
        return (V @ self.U.T) @ self.U + self.damping * V

    def damped(self, damping: float) -> RootOperator:
        return RootOperator(self.U, damping)

    def root_matmat(self, V: Tensor) -> Tensor:
        return V @ self.U.T

    def root_rmatmat(self, Y: Tensor) -> Tensor:
        return Y @ self.U

    def root_gram(self) -> Tensor:
        return self.U @ self.U.T

    def kronecker_factors(self, num_samples: int | None = None, seed: int = 0) -> list[KroneckerFactors]:
        """All parameters as one matrix of one row, whose factor A is G: what EKFAC is exact for."""
        U = self.U.double()
        return [KroneckerFactors(KroneckerBlock(0, None, 1, self.num_parameters), U.T @ U, torch.ones(1, 1, dtype=torch.float64))]

    def rotated_diagonal(self, rotations: list[Rotation], num_samples: int | None = None, seed: int = 0) -> Tensor:
        U = self.U @ rotations[0].inputs if rotations else self.U
        return U.square().sum(dim=0)

    def sample(self, generator: Generator, batch_size: int) -> RootOperator:
        rows = torch.randint(self.num_roots, (batch_size,), generator=generator)
        return RootOperator(self.U[rows] * (self.num_roots / batch_size) ** 0.5, self.damping)


def matrix(operator: LinearOperator) -> Tensor:
    """The operator's matrix in float64, formed without its products."""
    if isinstance(operator, RootOperator):
        U = operator.U.double()
        return U.T @ U + operator.damping * torch.eye(U.shape[1], dtype=torch.float64)
    assert isinstance(operator, DenseOperator)
    return operator.A.double()


def rotated(eigenvalues: Tensor, key: str) -> Tensor:
    """A symmetric matrix with these eigenvalues and random eigenvectors."""
    P = eigenvalues.shape[0]
    Q, _ = torch.linalg.qr(torch.randn(P, P, dtype=torch.float64, generator=generator(key)))
    return (Q * eigenvalues) @ Q.T


def rhs(V: int, operator: LinearOperator, key: str = "B") -> Tensor:
    """``[V, P]`` Gaussian right-hand sides of the operator's dtype."""
    return torch.randn(V, operator.num_parameters, dtype=torch.float64, generator=generator(key)).to(operator.dtype)


def exact(operator: LinearOperator, B: Tensor) -> Tensor:
    """The oracle: dense LU in float64."""
    return torch.linalg.solve(matrix(operator), torch.atleast_2d(B.double()), left=False).reshape(B.shape)


def error(actual: Tensor, oracle: Tensor) -> float:
    """Relative Frobenius error."""
    return float((actual.double() - oracle).norm() / oracle.norm())


def diagonal(*entries: float) -> DenseOperator:
    """A diagonal matrix."""
    return DenseOperator(torch.diag(torch.tensor(entries, dtype=torch.float64)))


def _gaussian(R: int, P: int, damping: float, key: str) -> RootOperator:
    return RootOperator(torch.randn(R, P, dtype=torch.float64, generator=generator(key)) / R**0.5, damping)


@dataclass(frozen=True)
class SystemCase:
    id: str
    make: Callable[[], RootOperator]
    notes: str


def _badly_scaled() -> RootOperator:
    U = _gaussian(60, 20, 0.1, "scaled").U
    return RootOperator(U * torch.logspace(0, 1, 20, dtype=torch.float64), 1.0)


def _graded() -> RootOperator:
    Q, _ = torch.linalg.qr(torch.randn(25, 10, dtype=torch.float64, generator=generator("graded")))
    return RootOperator((Q * torch.logspace(1, -3, 10, dtype=torch.float64)).T.contiguous(), 1.0)


SYSTEMS = [
    SystemCase("tall", lambda: _gaussian(50, 30, 0.5, "tall"), "more roots than parameters"),
    SystemCase("wide", lambda: _gaussian(12, 40, 0.2, "wide"), "fewer roots than parameters: G itself is singular"),
    SystemCase("graded", _graded, "singular values over four decades, condition number 100"),
    SystemCase("scaled", _badly_scaled, "parameters of different scale, what Jacobi is for"),
    SystemCase("single", lambda: _gaussian(3, 1, 0.1, "single"), "one parameter"),
    SystemCase("one-root", lambda: _gaussian(1, 7, 0.3, "one-root"), "one root, one distinct eigenvalue beside the damping"),
]


@dataclass(frozen=True)
class SolverCase:
    """``make`` gets the operator only for ``auto``; ``tolerance`` bounds the relative error of the value on SYSTEMS."""

    id: str
    make: Callable[[LinearOperator], Solver]
    tolerance: float
    notes: str = ""


def _halve(R: Tensor) -> Tensor:
    return R / 2


SOLVERS = [
    SolverCase("CG", lambda _: CG(rtol=1e-11), 1e-8),
    SolverCase("CG-jacobi", lambda _: CG(rtol=1e-11, preconditioner="jacobi"), 1e-8),
    SolverCase("CG-custom", lambda _: CG(rtol=1e-11, preconditioner=_halve), 1e-8, "scales the recurrence, not the answer"),
    SolverCase("BlockCG", lambda _: BlockCG(rtol=1e-11), 1e-8, "one search space for all columns"),
    SolverCase("BlockCG-nystrom", lambda _: BlockCG(rtol=1e-11, preconditioner=Nystrom(5)), 1e-8, "conjugate in M⁻¹"),
    SolverCase("CG-nystrom", lambda _: CG(rtol=1e-11, preconditioner=Nystrom(5)), 1e-8, "more directions than parameters, too"),
    SolverCase("LiSSA", lambda _: LiSSA(num_steps=10_000, rtol=1e-10), 1e-8, "full matrix, automatic scale"),
    SolverCase("Neumann", lambda _: Neumann(num_terms=10_000, rtol=1e-10), 1e-8, "LiSSA by another name"),
    SolverCase("EKFAC", lambda _: EKFAC(rtol=1e-5), 1e-10, "exact for one block of one row"),
    SolverCase("Direct", lambda _: Direct(), 1e-12),
    SolverCase("Dual", lambda _: Dual(), 1e-11),
    SolverCase("Dual-spectral", lambda _: Dual(spectral=True), 1e-11),
    SolverCase("AutoChoice", lambda operator: auto(operator, num_rhs=4), 1e-11, "exact on systems this small"),
]
