"""What BlockCG promises beyond the answer: fewer steps, dependent right-hand sides, hard spectra, float32."""

from __future__ import annotations

import pytest
import torch

from influence_ext.solvers import CG, BlockCG, Status
from tests.cases.solvers import SYSTEMS, DenseOperator, error, exact, matrix, rhs, rotated

F64 = torch.float64


def test_block_needs_fewer_products_than_cg() -> None:
    operator = DenseOperator(rotated(torch.logspace(0, 4, 200, dtype=F64), "block"))
    B = rhs(20, operator)
    block, single = BlockCG(rtol=1e-8).solve(operator, B), CG(rtol=1e-8, max_steps=5000).solve(operator, B)
    assert error(block.value, exact(operator, B)) <= 1e-5
    assert block.num_products < 0.3 * single.num_products


def test_condition_of_1e8() -> None:
    operator = DenseOperator(rotated(torch.logspace(0, 8, 120, dtype=F64), "hard"))
    B = rhs(20, operator)
    solution = BlockCG(rtol=1e-6).solve(operator, B)
    residual = (B - solution.value @ matrix(operator)).norm(dim=1) / B.norm(dim=1)
    assert bool((residual <= 1.01e-6).all())


def test_one_block_step_is_the_projection_onto_the_right_hand_sides() -> None:
    operator = SYSTEMS[0].make()
    B = rhs(3, operator)
    A = matrix(operator)
    solution = BlockCG(max_steps=1, on_failure="return").solve(operator, B)
    oracle = torch.linalg.solve(B @ A @ B.T, B @ B.T).T @ B
    assert solution.status == [Status.MAX_STEPS] * 3
    assert error(solution.value, oracle) <= 1e-12


def test_dependent_columns_of_different_scale() -> None:
    operator = SYSTEMS[0].make()
    b = rhs(3, operator)
    B = torch.cat([b, b[:1], 1e12 * b[1:2], (b[0] - 1e-9 * b[2])[None], torch.zeros_like(b[:1]), b.sum(0, keepdim=True)])
    solution = BlockCG(rtol=1e-10).solve(operator, B)
    assert solution.stats["rank"] == 3
    assert solution.converged
    for column in range(len(B)):
        assert float((solution.value[column] - exact(operator, B[column])).norm()) <= 1e-8 * float(B[column].norm())


@pytest.mark.parametrize("check_every", [1, 4])
def test_more_columns_than_parameters(check_every: int) -> None:
    operator = SYSTEMS[1].make()
    B = rhs(100, operator)
    solution = BlockCG(rtol=1e-10, check_every=check_every).solve(operator, B)
    assert solution.stats["rank"] == 40
    assert error(solution.value, exact(operator, B)) <= 1e-8


def test_easy_columns_beside_hard_ones() -> None:
    operator = DenseOperator(torch.diag(torch.logspace(0, 3, 30, dtype=F64)))
    B = rhs(3, operator)
    B[0] = torch.eye(30, dtype=F64)[4]  # an eigenvector
    solution = BlockCG(rtol=1e-9).solve(operator, B)
    assert solution.converged
    assert solution.stats["iterations"][0] < solution.stats["iterations"][1]


def test_warm_start() -> None:
    operator = SYSTEMS[0].make()
    B = rhs(3, operator)
    x = exact(operator, B)
    x0 = x + 1e-5 * rhs(3, operator, "x0")
    x0[1] = x[1]
    warm = BlockCG(rtol=1e-8).solve(operator, B, x0=x0)
    assert warm.stats["iterations"][1] == 0
    assert error(warm.value, x) <= 1e-7
    assert warm.num_products < BlockCG(rtol=1e-8).solve(operator, B).num_products


def test_float32_reaches_what_it_can_and_says_where_it_cannot() -> None:
    A = rotated(torch.logspace(0, 4, 40, dtype=F64), "f32")
    operator = DenseOperator(A.float())
    B = rhs(3, operator)
    assert BlockCG(rtol=1e-2).solve(operator, B).converged
    solution = BlockCG(rtol=1e-6, on_failure="return").solve(operator, B)
    assert Status.CONVERGED not in solution.status
    residual = (B.double() - solution.value.double() @ operator.A.double()).norm(dim=1) / B.double().norm(dim=1)
    assert bool((residual <= 2e-2).all())
