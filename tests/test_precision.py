"""``precision="bfloat16"`` of the curvature operators on the CPU: its error, what stays exact, and that solvers solve the exact system."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import influence_ext as ie
from influence_ext.errors import ArgumentError
from influence_ext.solvers import CG, BlockCG, Direct, Dual, LiSSA, auto
from influence_ext.testing import deviation
from tests.cases.solvers import DenseOperator
from tests.cases.zoo import ZOO, WholeModel

CURVATURES = (ie.GGN, ie.Hessian, ie.EmpiricalFisher)
curvatures = pytest.mark.parametrize("curvature", CURVATURES)

# Largest relative error of a GGN product by class of network; docs/design.md has the same table.
CLASSES = {"mlp": 5e-3, "lenet": 5e-3, "gpt": 1e-2, "lstm": 1e-2}


def problem(*widths: int, num_examples: int = 60) -> tuple[nn.Module, nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for num_in, num_out in pairwise(widths):
        layers += [nn.Linear(num_in, num_out), nn.Tanh()]
    X, y = torch.randn(num_examples, widths[0]), torch.randint(widths[-1], (num_examples,))
    return nn.Sequential(*layers[:-1]), nn.CrossEntropyLoss(), (X, y)


@pytest.mark.parametrize("id", CLASSES)
def test_error_of_a_product_by_class_of_network(id: str) -> None:
    model = WholeModel(next(case for case in ZOO if case.id == id), torch.float32) if id != "mlp" else None
    if model is None:
        network, loss, data = problem(64, 128, 64, 10)
        G = ie.GGN(network, loss, data, precision="bfloat16")
        V = torch.randn(3, G.shape[0])
        oracle = ie.GGN(network.double(), loss, (data[0].double(), data[1])).matmat(V.double())
    else:
        G = ie.GGN(model.model, model.loss, model.data, params=model.case.params, precision="bfloat16")
        V, oracle = model.V, model.products
    error = deviation(G.matmat(V), oracle).frobenius
    assert 1e-4 < error < CLASSES[id], "bfloat16 factors leave about 3e-3; less means that nothing was rounded"


class Attended(nn.Module):
    """Attention between trained elementwise layers: no other product can be rounded."""

    def __init__(self, length: int, causal: bool):
        super().__init__()
        self.q, self.k, self.v = (nn.Parameter(torch.randn(2, length, 7)) for _ in range(3))
        self.causal = causal

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(x * self.q, x * self.k, x * self.v, is_causal=self.causal)


@pytest.mark.parametrize("curvature", [ie.GGN, ie.Hessian])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [5, 70])
def test_attention_is_rounded(length: int, causal: bool, curvature: Any) -> None:
    """In one block of queries and in several."""
    torch.manual_seed(length)
    model, X, y = Attended(length, causal), torch.randn(3, 2, length, 7), torch.randn(3, 2, length, 7)
    rounded = curvature(model, nn.MSELoss(), (X, y), precision="bfloat16")
    V = torch.randn(3, rounded.shape[0])
    found = rounded.matmat(V)
    oracle = curvature(model.double(), nn.MSELoss(), (X.double(), y.double())).matmat(V.double())
    assert 2e-4 < deviation(found, oracle).frobenius < 1e-2, "less means that nothing was rounded"
    assert deviation(rounded.exact.matmat(V), oracle).frobenius < 2e-6
    assert torch.equal(rounded.matmat(V), found)


@curvatures
def test_the_point_is_exact_and_shared(curvature: Any) -> None:
    model, loss, data = problem(8, 20, 3)
    full, rounded = curvature(model, loss, data, 0.1), curvature(model, loss, data, 0.1, precision="bfloat16")
    V = torch.randn(2, full.shape[0])
    assert rounded.precision == "bfloat16"
    assert full.precision == "full"
    assert torch.equal(rounded.tape.outputs, full.tape.outputs)
    assert torch.equal(rounded.exact.matmat(V), full.matmat(V))
    assert torch.equal(full.at_precision("bfloat16").matmat(V), rounded.matmat(V))
    assert torch.equal(rounded.damped(0.3).matmat(V), full.damped(0.3).at_precision("bfloat16").matmat(V))
    assert full.exact is full
    assert not torch.equal(rounded.matmat(V), full.matmat(V))
    assert torch.equal(rounded.matmat(V), rounded.matmat(V))
    assert torch.equal(rounded.tape.theta, full.tape.theta)


@curvatures
@pytest.mark.parametrize("options", [{"memory_budget": 14_000}, {"schedule": "by_operator"}, {"schedule": "by_example"}], ids=str)
def test_tapes_of_every_kind(curvature: Any, options: dict[str, Any], threads: Callable[[int], None]) -> None:
    model, loss, data = problem(8, 20, 3)
    V = torch.randn(3, sum(p.numel() for p in model.parameters()))
    expected = curvature(model, loss, data, precision="bfloat16").matmat(V)
    full = curvature(model, loss, data).matmat(V)
    for count in (1, 2):
        threads(count)
        G = curvature(model, loss, data, precision="bfloat16", **options)
        found = G.matmat(V)
        assert 1e-5 < deviation(found, full.double()).frobenius < 1e-2
        assert deviation(found, expected.double()).frobenius < 3e-3  # other tiles, other roundings of their sums
        assert deviation(G.exact.matmat(V), full.double()).frobenius < 1e-6
    if "memory_budget" in options:
        assert G.tape.chunk is not None


def test_batches_are_drawn_at_the_same_precision() -> None:
    G = ie.GGN(*problem(8, 20, 3), 0.1, precision="bfloat16")
    assert G.sample(torch.Generator().manual_seed(0), 10).precision == "bfloat16"


def test_the_report_tells_it() -> None:
    G = ie.GGN(*problem(8, 20, 3), precision="bfloat16")
    assert "rounded to bfloat16" in G.report()
    assert "3e-3" in G.report()
    assert "bfloat16" not in G.exact.report()


def test_what_cannot_be_is_refused() -> None:
    model, loss, (X, y) = problem(8, 20, 3)
    G = ie.GGN(model, loss, (X, y))
    with pytest.raises(ArgumentError, match=r'expected precision="full" or "bfloat16" for torch.float32 on cpu, got "tf32"'):
        G.at_precision("tf32")
    with pytest.raises(ArgumentError, match=r'expected precision="full" for torch.float64 on cpu, got "bfloat16"'):
        ie.GGN(model.double(), loss, (X.double(), y), precision="bfloat16")


@pytest.mark.parametrize("preconditioner", [None, "jacobi"])
@pytest.mark.parametrize("damping", [1e-1, 1e-3])
def test_cg_reaches_the_tolerance_of_the_exact_system(damping: float, preconditioner: Any) -> None:
    """Where the products' own error is 3e-3."""
    G = ie.GGN(*problem(12, 40, 4), damping)
    B = torch.randn(3, G.shape[0])
    B[1] = 0
    rounded = G.at_precision("bfloat16")
    assert deviation(rounded.matmat(B), G.matmat(B).double()).frobenius > 5e-4
    rtol = 1e-5 if damping > 1e-2 else 1e-4  # float32 itself gives no more
    solution = CG(rtol=rtol, preconditioner=preconditioner).solve(rounded, B)
    assert solution.converged
    true = (B - G.matmat(solution.value)).norm(dim=1) / B.norm(dim=1).clamp_min(1e-30)
    assert float(true.max()) <= 1.05 * rtol
    assert torch.allclose(true, solution.residual_norm, rtol=0.05, atol=1e-7)
    few = solution.stats["exact_products"]
    assert 0 < few < solution.num_products / 3, "most products are cheap ones"
    plain = CG(rtol=rtol, preconditioner=preconditioner, reorthogonalise=0).solve(G, B)
    assert solution.num_products < 2 * plain.num_products
    assert (solution.value - plain.value).norm() < 1e-2 * plain.value.norm()


def test_a_warm_start_that_is_exact_costs_one_exact_product() -> None:
    G = ie.GGN(*problem(12, 40, 4), 1e-1)
    B = torch.randn(2, G.shape[0])
    X = CG(rtol=1e-6).solve(G, B).value
    solution = CG(rtol=1e-4).solve(G.at_precision("bfloat16"), B, X)
    assert torch.equal(solution.value, X)
    assert solution.stats["iterations"] == [0, 0]
    assert solution.num_products == 2


class Rounded(DenseOperator):
    """A matrix whose products are those of another."""

    def __init__(self, A: Tensor, exact: DenseOperator):
        super().__init__(A)
        self._exact = exact

    @property
    def exact(self) -> DenseOperator:
        return self._exact


@pytest.mark.parametrize("wrong", ["slightly", "in its small eigenvalues", "entirely"])
def test_columns_that_cheap_steps_cannot_finish_are_finished_exactly(wrong: str) -> None:
    torch.manual_seed(0)
    Q = torch.linalg.qr(torch.randn(30, 30, dtype=torch.float64)).Q
    values = torch.logspace(-3, 0, 30, dtype=torch.float64)
    noise = {"slightly": 1e-5, "in its small eigenvalues": 1e-2, "entirely": 1.0}[wrong]
    E = torch.randn(30, 30, dtype=torch.float64) * noise / 30**0.5
    exact = DenseOperator((Q * values) @ Q.T)
    operator = Rounded(exact.A + (-2.0 if wrong == "entirely" else 1.0) * (E + E.T) / 2, exact)
    B = torch.randn(4, 30, dtype=torch.float64)
    solution = CG(rtol=1e-9).solve(operator, B)
    assert solution.converged
    assert float(((B - solution.value @ exact.A).norm(dim=1) / B.norm(dim=1)).max()) <= 1e-9
    assert (wrong == "slightly") == (solution.stats["exact_products"] < solution.num_products / 2)


def test_a_step_that_raises_the_residual_is_kept() -> None:
    """Conjugate gradients lower the energy error at every step, the residual not always."""
    exact = DenseOperator(torch.tensor([1.0, 0.01], dtype=torch.float64).diag())
    B = torch.tensor([[0.1, 1.0]], dtype=torch.float64)
    solver = CG(rtol=None, max_steps=1)
    plain, refined = solver.solve(exact, B), solver.solve(Rounded(exact.A.clone(), exact), B)
    assert float(plain.residual_norm[0]) > 1
    assert torch.allclose(refined.value, plain.value)


def test_truncation_and_running_out_of_steps() -> None:
    G = ie.GGN(*problem(12, 40, 4), 1e-3)
    rounded, B = G.at_precision("bfloat16"), torch.randn(2, G.shape[0])
    truncated = CG(rtol=None, max_steps=5).solve(rounded, B)
    assert [status.name for status in truncated.status] == ["TRUNCATED"] * 2
    out = CG(rtol=1e-6, max_steps=5, on_failure="return").solve(rounded, B)
    assert [status.name for status in out.status] == ["MAX_STEPS"] * 2
    for solution in (truncated, out):
        true = (B - G.matmat(solution.value)).norm(dim=1) / B.norm(dim=1)
        assert torch.allclose(true, solution.residual_norm, rtol=1e-3)
        assert solution.stats["iterations"] == [5, 5]


@pytest.mark.parametrize(
    "solver",
    [BlockCG(rtol=1e-5), Direct(), Dual(), LiSSA(num_steps=3000, rtol=1e-3)],
    ids=lambda solver: type(solver).__name__,
)
def test_every_solver_is_held_to_the_exact_residual(solver: Any) -> None:
    G = ie.GGN(*problem(6, 10, 3), 1e-1)
    B = torch.randn(2, G.shape[0])
    solution = solver.solve(G.at_precision("bfloat16"), B)
    true = (B - G.matmat(solution.value)).norm(dim=1) / B.norm(dim=1)
    assert torch.allclose(true, solution.residual_norm, rtol=0.05, atol=2e-7)
    assert float(true.max()) < 1e-2
    assert solution.success


def test_auto_takes_it() -> None:
    G = ie.GGN(*problem(12, 40, 4), 1e-1)
    B = torch.randn(2, G.shape[0])
    assert auto(G.at_precision("bfloat16"), 2).solve(G.at_precision("bfloat16"), B).success
