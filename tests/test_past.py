"""Residuals made orthogonal to the past: the steps are those of exact arithmetic, whatever the dtype."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import influence_ext as ie
from influence_ext.solvers import CG, BlockCG, Jacobi, Nystrom, Status
from influence_ext.solvers.past import Past, worth_keeping
from tests.cases import generator
from tests.cases.solvers import DenseOperator, RootOperator, error, exact, matrix, rhs, rotated

F64 = torch.float64
P = 800


def as_networks_have() -> DenseOperator:
    """Eigenvalues that fall from 30 to a damping of 3e-3: what trained networks have."""
    return DenseOperator(rotated(30.0 * torch.arange(1, P + 1, dtype=F64) ** -2.0 + 3e-3, "past").float())


def krylov_steps(A: Tensor, B: Tensor, rtol: float, inverse: Tensor | None = None) -> int:
    """Steps of exact arithmetic until the minimiser of the energy error over the Krylov space meets rtol for every row, in float64.

    The space has an explicit orthonormal basis; there is no recurrence for rounding to act on.
    """
    A, B = A.double(), B.double()
    M = torch.eye(len(A), dtype=F64) if inverse is None else inverse.double()
    block = M @ B.T
    basis = torch.empty(len(A), 0, dtype=F64)
    for step in range(1, len(A) + 1):
        for _ in range(2):
            block = block - basis @ (basis.T @ block)
            block = torch.linalg.qr(block)[0]
        basis = torch.cat([basis, block], dim=1)
        X = basis @ torch.linalg.solve(basis.T @ A @ basis, basis.T @ B.T)
        if bool(((B.T - A @ X).norm(dim=0) <= rtol * B.norm(dim=1)).all()):
            return step
        block = M @ (A @ block)
    raise AssertionError("the space of all parameters holds the solution")


@pytest.mark.parametrize(
    ("kind", "V", "dtype", "gain"),
    [(CG, 1, torch.float32, 2.0), (CG, 1, F64, 1.4), (BlockCG, 4, torch.float32, 2.0), (BlockCG, 4, F64, 1.2)],
)
def test_steps_are_those_of_exact_arithmetic(kind: type[CG] | type[BlockCG], V: int, dtype: torch.dtype, gain: float) -> None:
    operator = DenseOperator(as_networks_have().A.to(dtype))
    B = rhs(V, operator)
    fewest = krylov_steps(operator.A, B, 1e-3)
    kept = kind(rtol=1e-3, reorthogonalise=P).solve(operator, B)
    forgotten = kind(rtol=1e-3, reorthogonalise=0).solve(operator, B)
    assert kept.converged
    assert forgotten.converged
    assert fewest - 1 <= max(kept.stats["iterations"]) <= fewest + 2
    assert max(forgotten.stats["iterations"]) >= gain * fewest
    residual = (B.double() - kept.value.double() @ matrix(operator)).norm(dim=1) / B.double().norm(dim=1)
    assert bool((residual <= 1.1e-3).all())


@pytest.mark.parametrize("kind", [CG, BlockCG])
@pytest.mark.parametrize("preconditioner", [Jacobi(), Nystrom(5), lambda R: R * torch.logspace(0, -1, P)])
def test_orthogonal_in_the_preconditioner(kind: type[CG] | type[BlockCG], preconditioner: Any) -> None:
    operator = as_networks_have()
    inverse = preconditioner if callable(preconditioner) else preconditioner.factorise(operator)
    B = rhs(1, operator)
    fewest = krylov_steps(operator.A, B, 1e-3, inverse(torch.eye(P)))
    solution = kind(rtol=1e-3, preconditioner=preconditioner, reorthogonalise=P).solve(operator, B)
    assert solution.converged
    assert solution.stats["iterations"][0] <= fewest + 3


def test_the_first_rows_matter_most() -> None:
    operator = as_networks_have()
    b = rhs(1, operator)
    steps = [CG(rtol=1e-3, reorthogonalise=kept).solve(operator, b).stats["iterations"][0] for kept in (0, 10, P)]
    assert steps[0] > 1.3 * steps[1]
    assert steps[1] > steps[2]


def test_columns_keep_their_own_past() -> None:
    operator = as_networks_have()
    B = rhs(4, operator)
    B[1] = 1e3 * operator.A[0]
    B[2] = B[0] * 7
    solver = CG(rtol=1e-3, reorthogonalise=P)
    together = solver.solve(operator, B)
    for k, b in enumerate(B):
        alone = solver.solve(operator, b)
        assert abs(alone.stats["iterations"][0] - together.stats["iterations"][k]) <= 1
        assert error(together.value[k], exact(operator, b)) <= 2 * error(alone.value, exact(operator, b)) + 1e-6


def test_looking_seldom_changes_nothing() -> None:
    operator = as_networks_have()
    B = rhs(3, operator)
    B[1] = operator.A[0]
    one, seldom = (CG(rtol=1e-3, reorthogonalise=P, check_every=n).solve(operator, B) for n in (1, 7))
    assert one.stats["iterations"] == seldom.stats["iterations"]
    assert error(seldom.value, one.value.double()) <= 1e-5


def test_more_kept_than_there_are_directions() -> None:
    operator = DenseOperator(rotated(torch.linspace(1, 50, 12, dtype=F64), "small"))
    B = rhs(5, operator)
    for solver in (CG(rtol=1e-12, reorthogonalise=1000), BlockCG(rtol=1e-12, reorthogonalise=1000)):
        solution = solver.solve(operator, B)
        assert error(solution.value, exact(operator, B)) <= 1e-11


@pytest.mark.parametrize("kind", [CG, BlockCG])
def test_small_damping_in_float32(kind: type[CG] | type[BlockCG]) -> None:
    U = torch.randn(300, 900, dtype=F64, generator=generator("damped")) * torch.arange(1, 301, dtype=F64)[:, None] ** -1.0 / 20
    operator = RootOperator(U.float(), 1e-5)
    B = operator.root_rmatmat(rhs(2, DenseOperator(torch.eye(300))))
    options: dict[str, Any] = {"max_steps": 150, "on_failure": "return"}
    assert kind(rtol=1e-4, reorthogonalise=0, **options).solve(operator, B).status[0] is not Status.CONVERGED
    reached = kind(rtol=1e-4, reorthogonalise=300, **options).solve(operator, B)
    assert reached.status == [Status.CONVERGED] * 2
    residual = (B.double() - reached.value.double() @ matrix(operator)).norm(dim=1) / B.double().norm(dim=1)
    assert bool((residual <= 1.2e-4).all())
    beyond = kind(rtol=1e-9, reorthogonalise=300, max_steps=1000, on_failure="return").solve(operator, B)
    assert set(beyond.status) == {Status.STALLED}  # and not that the steps ran out
    assert bool((beyond.residual_norm <= 8e-5).all())


def test_the_past_is_a_projection() -> None:
    rows = torch.linalg.qr(torch.randn(30, 6, dtype=F64, generator=generator("rows")))[0].T
    M = torch.linspace(1, 2, 30, dtype=F64)
    for inverse in (None, M):
        past = Past(5)
        Q = rows if inverse is None else rows / M.sqrt()  # orthonormal in M⁻¹
        Z = None if inverse is None else Q * M
        R = rhs(3, DenseOperator(torch.eye(30, dtype=F64)))
        assert past.removed_from(R) is R
        for k in range(0, 6, 2):
            past.add(Q[k : k + 2], None if Z is None else Z[k : k + 2])  # the last two find no room
        left = past.removed_from(R)
        assert float((left @ (Q if Z is None else Z)[:4].T).abs().max()) <= 1e-12
        assert torch.allclose(R - left, ((R - left) @ (Q if Z is None else Z)[:4].T) @ Q[:4])
        assert float((left @ (Q if Z is None else Z)[4:].T).abs().min()) > 1e-3


def test_what_is_worth_keeping() -> None:
    # a product with a vector: 4·640·1000 operations; to take out a row 16·1000, of many vectors 4·1000 each
    operator = RootOperator(torch.zeros(640, 1000, dtype=F64), 1.0)
    assert worth_keeping(operator, 1, shared=False) == 160
    assert worth_keeping(operator, 10, shared=False) == 160
    assert worth_keeping(operator, 4, shared=True) == 160
    assert worth_keeping(operator, 8, shared=True) == 80
    assert worth_keeping(operator, 10, shared=False, num_bytes=3 * 10 * 1000 * 8) == 3
    assert worth_keeping(operator, 10, shared=False, num_bytes=4 * 10 * 1000 * 8, vectors=2) == 2
    assert worth_keeping(operator, 0, shared=True) == 160
    small = RootOperator(torch.zeros(64, 100, dtype=F64), 1.0)
    assert worth_keeping(small, 1, shared=False) == 0, "calls from Python take longer than such a product"
    assert worth_keeping(small, 4, shared=True) == 16

    class Recorded(RootOperator):
        def recordable(self) -> Any:
            return object()

    assert worth_keeping(Recorded(operator.U, 1.0), 1, shared=False) == 0


@pytest.mark.parametrize("kind", [CG, BlockCG])
def test_it_is_done_unless_forbidden(kind: type[CG] | type[BlockCG]) -> None:
    operator = as_networks_have()
    B = rhs(3, operator)
    worth = worth_keeping(operator, 3, shared=kind is BlockCG)
    default, same, none = (kind(rtol=1e-3, reorthogonalise=m).solve(operator, B) for m in (None, worth, 0))
    assert torch.equal(default.value, same.value)
    assert default.num_products < none.num_products


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_block_whose_column_ends_early_goes_on(dtype: torch.dtype) -> None:
    """An exhausted direction leaves rounding behind, which one pass does not take out of the past's span."""
    U = rotated(torch.ones(60, dtype=F64), "early")
    values = torch.logspace(0, 3, 60, dtype=F64)
    A = U @ torch.diag(values) @ U.T
    V = torch.linalg.eigh(A).eigenvectors
    blocks = torch.block_diag(A, torch.diag(torch.linspace(1, 5, 5, dtype=F64)))
    in_a_block = torch.zeros(3, 65, dtype=F64)
    in_a_block[0, 62] = 1.0
    in_a_block[1:, :60] = torch.randn(2, 60, dtype=F64, generator=generator("block"))
    for matrix_of, B in (
        (A, torch.stack([torch.randn(60, dtype=F64, generator=generator("any")), V[:, -1], V[:, 3]])),
        (blocks, in_a_block),
    ):
        operator = DenseOperator(matrix_of.to(dtype))
        rtol = 1e-4 if dtype == torch.float32 else 1e-9
        kept = BlockCG(rtol=rtol, reorthogonalise=100, on_failure="return").solve(operator, B.to(dtype))
        plain = BlockCG(rtol=rtol, reorthogonalise=0, on_failure="return").solve(operator, B.to(dtype))
        assert set(kept.status) == {Status.CONVERGED}
        assert max(kept.stats["iterations"]) <= max(plain.stats["iterations"]) + 2
        residual = B - kept.value.double() @ matrix_of
        assert bool((residual.norm(dim=1) <= 3 * rtol * B.norm(dim=1)).all())


def test_scores_of_centred_data_with_an_empty_test_point() -> None:
    """A linear model on centred inputs: the bias is an eigenvector of its own, and a test point x = 0 asks for nothing else."""
    torch.manual_seed(0)
    X = torch.randn(800, 120)
    X -= X.mean(0)
    model = nn.Linear(120, 1)
    y = X[:, :1] + 0.1 * torch.randn(800, 1)
    G = ie.GGN(model, nn.MSELoss(), (X, y), 1e-2)
    B = torch.randn(10, G.num_parameters, generator=torch.Generator().manual_seed(1))
    B[3] = 0
    B[3, -1] = 1.0  # the bias alone
    solution = BlockCG(rtol=1e-5).solve(G, B)
    dense = G.to_dense().double()
    assert float((solution.value.double() - torch.linalg.solve(dense, B.double().T).T).norm() / B.norm()) < 1e-2
    assert set(solution.status) == {Status.CONVERGED}
