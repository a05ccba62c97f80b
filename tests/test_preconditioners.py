"""Preconditioners of CG and BlockCG: the formula, the steps they save, the answer they leave as it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from influence_ext.solvers import CG, BlockCG, Direct, Jacobi, Nystrom
from tests.cases import generator
from tests.cases.solvers import SYSTEMS, RootOperator, error, exact, matrix, rhs

F64 = torch.float64


def badly_scaled() -> RootOperator:
    """Parameters whose scale falls over two decades: diagonal and top of the spectrum both help."""
    U = torch.randn(400, 200, dtype=F64, generator=generator("badly scaled")) / 20
    return RootOperator(U * torch.logspace(0, -2, 200, dtype=F64), 1e-5)


def nystrom_oracle(operator: RootOperator, rank: int, seed: int) -> Tensor:
    """``M⁻¹`` of Frangella, Tropp and Udell from explicit matrices, without the shift that only rounding needs."""
    G, P = operator.U.T @ operator.U, operator.num_parameters
    omega, _ = torch.linalg.qr(torch.randn(P, rank, dtype=F64, generator=torch.Generator().manual_seed(seed)))
    low_rank = G @ omega @ torch.linalg.pinv(omega.T @ G @ omega) @ omega.T @ G
    values, vectors = torch.linalg.eigh(low_rank)
    values, vectors = values[-rank:], vectors[:, -rank:]
    unit = torch.eye(P, dtype=F64)
    return (values[0] + operator.damping) * (vectors / (values + operator.damping)) @ vectors.T + unit - vectors @ vectors.T


def test_nystrom_is_the_formula() -> None:
    operator = SYSTEMS[0].make()
    R = rhs(5, operator)
    inverse = Nystrom(rank=7, seed=3).factorise(operator)
    assert inverse.num_products == 7
    assert error(inverse(R), R @ nystrom_oracle(operator, 7, 3)) <= 1e-9
    assert inverse.num_products == sum(operator.blocks)


def test_nystrom_with_all_directions_is_the_inverse() -> None:
    operator = SYSTEMS[0].make()
    R = rhs(5, operator)
    inverse = Nystrom(rank=100).factorise(operator)
    smallest = torch.linalg.eigvalsh(matrix(operator))[0]
    assert error(inverse(R) / smallest, exact(operator, R)) <= 1e-9


@pytest.mark.parametrize("kind", [CG, BlockCG])
@pytest.mark.parametrize("preconditioner", ["jacobi", Jacobi(), Nystrom(60)], ids=str)
def test_a_preconditioner_changes_the_steps_not_the_answer(kind: type[CG] | type[BlockCG], preconditioner: Any) -> None:
    operator = badly_scaled()
    B = rhs(3, operator)
    plain = kind(rtol=1e-9, reorthogonalise=0).solve(operator, B)  # whose past would hold all 200 directions
    solver = kind(rtol=1e-9, preconditioner=preconditioner, reorthogonalise=0)
    solution = solver.solve(operator, B)
    assert solution.converged
    assert error(solution.value, exact(operator, B)) <= 1e-7
    assert max(solution.stats["iterations"]) < max(plain.stats["iterations"])
    residual = (B - solution.value @ matrix(operator)).norm(dim=1) / B.norm(dim=1)
    assert torch.allclose(solution.residual_norm, residual, rtol=1e-3, atol=1e-13)
    assert solution.num_products == sum(operator.blocks) - plain.num_products
    if preconditioner != "jacobi":
        prepared = solver.prepared(operator)
        again = prepared.solve(operator, B)
        assert torch.equal(again.value, solution.value)
        assert again.num_products == solution.num_products - prepared.preconditioner.num_products
        assert prepared.prepared(operator) is prepared


def test_a_factorisation_in_float32_preconditions_a_solve_in_float64() -> None:
    operator = SYSTEMS[2].make()
    inverse = Direct().factorise(RootOperator(operator.U.float(), operator.damping))
    solution = CG(rtol=1e-12, preconditioner=lambda R: inverse(R.float()).double()).solve(operator, rhs(3, operator))
    assert max(solution.stats["iterations"]) <= 3


def test_block_steps_with_the_exact_inverse() -> None:
    operator = SYSTEMS[3].make()
    solution = BlockCG(rtol=1e-10, preconditioner=Direct()).solve(operator, rhs(3, operator))
    assert solution.stats["iterations"] == [1, 1, 1]
