"""The fused vectors of CG on the CPU, on the emulated device, and in plain torch, against CG as textbooks write it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import influence_ext.krylov as krylov
from influence_ext.krylov import CGVectors
from influence_ext.solvers import CG, Status
from influence_ext.testing import assert_close
from tests.cases.solvers import DenseOperator
from tests.emulation import emulated_device

SIZES = [1, 7, 64, 4099, 20000]
"""One element; fewer than a block has threads; one stretch of vectors; two and five stretches, without and with vectors of 16 bytes."""


@pytest.fixture(params=["cpu", "device", "plain"], autouse=True)
def _engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if request.param == "device":
        with emulated_device():
            yield
        return
    if request.param == "plain":
        monkeypatch.setattr(krylov, "_is_native", lambda like: False)
    yield


def textbook(spectrum: Tensor, b: Tensor, steps: int, inverse: Tensor | None = None) -> Tensor:
    """x of each of the steps ``[steps, P]`` on a diagonal matrix, in float64, as in Hestenes and Stiefel."""
    spectrum, b = spectrum.double(), b.double()
    m = torch.ones_like(b) if inverse is None else inverse.double()
    x, r = torch.zeros_like(b), b.clone()
    p = m * r
    found = []
    for _ in range(steps):
        alpha = (r @ (m * r)) / (p @ (spectrum * p))
        x = x + alpha * p
        r_next = r - alpha * spectrum * p
        p = m * r_next + (r_next @ (m * r_next)) / (r @ (m * r)) * p
        r = r_next
        found.append(x)
    return torch.stack(found)


@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("P", SIZES)
def test_every_step(P: int, dtype: torch.dtype, preconditioned: bool) -> None:
    torch.manual_seed(P)
    V, steps = 3, 1 if P == 1 else 4
    spectrum = 1 + 4 * torch.rand(P, dtype=dtype)
    inverse = 1 / (1 + torch.rand(P, dtype=dtype)) if preconditioned else None
    B = torch.randn(V, P, dtype=dtype)
    vectors = CGVectors(B.clone(), torch.zeros(V, dtype=dtype), [steps + 1] * V, 0.0)
    expected = torch.stack([textbook(spectrum, b, steps, inverse) for b in B])
    for step in range(steps):
        p = vectors.direction(None if inverse is None else inverse * vectors.r)
        vectors.step(spectrum * p)
        assert_close(vectors.x, expected[:, step], scope="model")
        assert_close(vectors.r + spectrum * vectors.x, B.double(), scope="model")
    if P > 1:
        assert vectors.look() == [("running", steps)] * V


def test_each_end_and_what_stands_still() -> None:
    """Columns end for reasons of their own; what has ended keeps its x to the bit while others go on, and says the same."""
    P = 300
    torch.manual_seed(0)
    spectrum = torch.stack(
        [
            torch.ones(P),  # solved by one step
            torch.linspace(1, 100, P),  # runs out of steps
            torch.linspace(-3, 1, P),  # negative curvature
            torch.linspace(1, 2, P),  # a product that is NaN in the second step
            torch.linspace(1, 2, P),  # a preconditioner that is not definite
            torch.linspace(1, 2, P),  # no step was left to it
            torch.linspace(1, 2, P),  # solved from the start
        ]
    ).double()
    B = torch.randn(7, P).double()
    target = 1e-8 * B.norm(dim=1)
    target[6] = 2 * B[6].norm()
    sign = torch.ones(7, 1).double()
    sign[4] = -1
    vectors = CGVectors(B.clone(), target, [9, 5, 9, 9, 9, 0, 9], 0.0)
    kept: dict[int, Tensor] = {}
    for step in range(9):
        q = spectrum * vectors.direction(sign * vectors.r)
        if step == 1:
            q[3] = float("nan")
        vectors.step(q)
        for column, (end, _) in enumerate(vectors.look()):
            if column in kept and column != 3:
                assert torch.equal(vectors.x[column], kept[column])
            if end != "running":
                kept.setdefault(column, vectors.x[column].clone())
    assert vectors.look() == [
        ("converged", 1),
        ("max_steps", 5),
        ("not_psd", 1),
        ("non_finite", 2),
        ("breakdown", 1),
        ("max_steps", 0),
        ("converged", 0),
    ]
    assert vectors.x[[2, 5, 6]].count_nonzero() == 0
    assert_close(vectors.x[0], B[0], scope="model")


def test_stalled_where_the_matrix_is_definite_by_construction() -> None:
    """Curvature below half of what it can be is rounding; far below zero it proves that the bound was wrong."""
    P = 50
    B = torch.ones(2, P, dtype=torch.float64)
    vectors = CGVectors(B.clone(), torch.zeros(2, dtype=torch.float64), [5, 5], 1.0)
    vectors.step(torch.tensor([[0.25], [-1.0]]).double() * vectors.direction(None))
    assert vectors.look() == [("stalled", 1), ("not_psd", 1)]


def test_looking_seldom_changes_no_solution() -> None:
    torch.manual_seed(0)
    spectrum = torch.linspace(1, 50, 200).double()
    B = torch.randn(4, 200).double()
    B[1] = torch.zeros(200).double().index_fill(0, torch.tensor(3), 2.0)  # an eigenvector: one step
    operator = DenseOperator(spectrum.diag())
    often, seldom = CG(rtol=1e-11, check_every=1).solve(operator, B), CG(rtol=1e-11, check_every=7).solve(operator, B)
    assert often.status == seldom.status == [Status.CONVERGED] * 4
    assert often.stats["iterations"] == seldom.stats["iterations"]
    assert often.stats["iterations"][1] == 1
    assert often.num_products < seldom.num_products
    for solution in (often, seldom):
        assert_close(solution.value, B / spectrum, scope="model")
