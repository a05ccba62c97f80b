"""The other curvatures: the Hessian, the empirical and the Monte Carlo Fisher matrix."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import influence_ext as ie
from influence_ext import errors, reference
from influence_ext.plan import Plan
from influence_ext.reference.jacobian import call, double, double_copy
from influence_ext.reference.products import TwiceDifferentiable
from influence_ext.tape import Tape
from influence_ext.testing import assert_close
from tests.cases import Network, NetworkCase, budget_of, build, in_float64
from tests.cases.families import FAMILIES
from tests.cases.models import NETWORKS

F64 = torch.float64
CURVED = (
    *("mlp-tanh", "mlp-gelu", "mlp-silu", "mlp-ce", "mlp-ce-sum", "mlp-bce", "mlp-half-mse"),
    *("tied-layer", "tied-transpose", "mixer", "frozen-middle", "named-inputs", "unused-parameters", "diamonds"),
)


def rows() -> list[NetworkCase]:
    """Models of every activation, and the first row of each family of operators."""
    by_rule: dict[frozenset[str], NetworkCase] = {}
    for case in FAMILIES:
        by_rule.setdefault(case.rules, case)
    return [NETWORKS[name] for name in CURVED] + list(by_rule.values())


def dense_hessian(network: Network) -> Tensor:
    """Float64 ``[P, P]`` by two reverse passes, with PyTorch's own reduced loss."""
    model = double_copy(network.model)
    trained = list(reference.trainable(model).values())
    loss = network.loss_case.reduced()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), TwiceDifferentiable():
        z = call(model, double(network.X))
        gradients = torch.autograd.grad(loss(z, double(network.y)), trained, create_graph=True, allow_unused=True, materialize_grads=True)
        flat = torch.cat([g.reshape(-1) for g in gradients])
        lines = []
        for p in range(flat.numel()):
            second = torch.autograd.grad(flat[p], trained, retain_graph=True, allow_unused=True, materialize_grads=True)
            lines.append(torch.cat([g.reshape(-1) for g in second]).detach())
    return torch.stack(lines)


@pytest.mark.parametrize("case", rows(), ids=lambda case: case.id)
def test_hessian_is_the_second_derivative(case: NetworkCase) -> None:
    network = build(case, F64)
    expected = dense_hessian(network)
    H = ie.Hessian(network.model, network.loss, network.data, damping=0.25)
    V = network.random("V", 3, network.P)
    assert_close(H.matmat(V), V @ expected + 0.25 * V)
    assert_close(H @ V[0], expected @ V[0] + 0.25 * V[0])


def test_hessian_in_float32() -> None:
    network = build(NETWORKS["mlp-gelu"], torch.float32)
    H = ie.Hessian(network.model, network.loss, network.data)
    V = network.random("V", 3, network.P)
    expected = V.double() @ dense_hessian(build(NETWORKS["mlp-gelu"], F64))
    assert float((H.matmat(V).double() - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize("name", ["mlp-tanh", "tied-layer", "mixer", "diamonds"])
def test_hessian_is_symmetric(name: str) -> None:
    network = build(NETWORKS[name], F64)
    H = ie.Hessian(network.model, network.loss, network.data)
    U, V = network.random("U", 4, network.P), network.random("V", 4, network.P)
    assert_close(H.matmat(U) @ V.T, (H.matmat(V) @ U.T).T, scale=float(U.norm() * H.matmat(V).norm()))


def test_hessian_of_one_example_and_of_any_number_of_vectors() -> None:
    network = build(NETWORKS["mlp-gelu"], F64)
    X, y = network.X[:1], network.y[:1]
    H = ie.Hessian(network.model, network.loss, (X, y))
    V = network.random("V", 5, network.P)
    expected = reference.hessian_products(network.model, network.loss_case.oracle(), X, y, V, network.loss_case.reduction)
    assert_close(H.matmat(V), expected)
    assert_close(H.matmat(V[2:3]), expected[2:3])
    assert H.matmat(V[:0]).shape == (0, network.P)


class Parts(nn.Module):
    """Nodes without a native rule, between native ones, and a weight that is an expression of parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 4)
        self.direction, self.length = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.rand(4))
        self.outer = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.special.bessel_j0(self.inner(x))
        weight = self.length[:, None] * self.direction / self.direction.square().sum(1, keepdim=True).sqrt()
        return self.outer(torch.lerp(h, torch.tanh(h @ weight.T), h.square()))


@pytest.mark.parametrize(
    "loss", [nn.MSELoss(), lambda z, t: ((z - t).square() + 0.1 * (z - t) ** 4).sum(dim=1).mean()], ids=["native", "callable"]
)
@pytest.mark.parametrize("budget", [None, 8_000])
def test_hessian_through_generic_nodes_and_expressions(loss: Callable[[Tensor, Tensor], Tensor], budget: int | None) -> None:
    torch.manual_seed(0)
    model = Parts().double()
    X, y = torch.randn(37, 3, dtype=F64), torch.randn(37, 2, dtype=F64)
    H = ie.Hessian(model, loss, (X, y), damping=0.5, memory_budget=budget)
    assert (H.tape.chunk is None) == (budget is None)
    assert "generic" in H.report()
    V = torch.randn(3, H.shape[0], dtype=F64)
    assert_close(H.matmat(V), reference.hessian_products(model, loss, X, y, V) + 0.5 * V)


def test_hessian_reports_what_is_curved() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    X, y = torch.randn(5, 3), torch.randn(5, 2)
    curved = next(line for line in ie.Hessian(model, nn.MSELoss(), (X, y)).report().splitlines() if line.startswith("second-order terms"))
    assert curved == "second-order terms: linear_1, tanh, linear_2"
    assert "second-order terms" not in ie.GGN(model, nn.MSELoss(), (X, y)).report()
    model.requires_grad_(False)[4].requires_grad_(True)
    assert "second-order terms: none" in ie.Hessian(model, nn.MSELoss(), (X, y)).report()


def test_second_order_products_need_their_tape_and_their_cotangents() -> None:
    network = build(NETWORKS["mlp-tanh"], F64)
    plan = Plan.of(network.model, network.X)
    V = network.random("V", 2, network.P)
    with pytest.raises(errors.ArgumentError, match="linearize with second_order=True"):
        plan.linearize(network.X).keep_cotangents(torch.ones_like(network.outputs))
    tape = plan.linearize(network.X, second_order=True)
    with pytest.raises(errors.ArgumentError, match="call keep_cotangents first"):
        tape.hvp(V, None)
    tape.keep_cotangents(torch.ones_like(network.outputs))
    assert tape.hvp(V, None).shape == V.shape
    tape.relinearize(tape.theta + 1)
    with pytest.raises(errors.ArgumentError, match="call keep_cotangents first"):
        tape.hvp(V, None)


@pytest.mark.parametrize("name", ["mlp-tanh", "mlp-ce"])
def test_a_tape_moves_to_other_examples(name: str) -> None:
    network = build(NETWORKS[name], F64)
    plan, theta = Plan.of(network.model, network.X), network.random("theta", network.P)
    V, G = network.random("V", 2, network.P), torch.ones_like(network.outputs)
    other = network.X.flip(0) + 1
    tape, fresh = plan.linearize(network.X, second_order=True), plan.linearize(other, theta, second_order=True)
    tape.keep_cotangents(G)
    tape.relinearize(theta, other)
    with pytest.raises(errors.ArgumentError, match="call keep_cotangents first"):
        tape.hvp(V, None)
    for one in (tape, fresh):
        one.keep_cotangents(G)
    assert torch.equal(tape.outputs, fresh.outputs)
    assert torch.equal(tape.hvp(V, None), fresh.hvp(V, None))
    with pytest.raises(errors.ShapeError, match="another number anew"):
        tape.relinearize(theta, other[:-1])
    assert torch.equal(tape.jvp(V), fresh.jvp(V))
    chunked = plan.linearize(network.X, memory_budget=budget_of(2, lambda budget: plan.linearize(network.X, memory_budget=budget)))
    with pytest.raises(errors.ArgumentError, match="recomputed in chunks"):
        chunked.relinearize(theta, other)


class Sum(nn.Module):
    """Of two inputs, by a weight that is an expression of a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 3) / 2)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return torch.tanh((x + z) @ torch.sinh(self.w))


@pytest.mark.parametrize("chunk", [None, 4])
def test_copies_of_a_tape_stand_where_it_stands(chunk: int | None) -> None:
    torch.manual_seed(0)
    model, X = Sum(), (torch.randn(9, 4), torch.randn(9, 4))
    V, G, theta = torch.randn(2, 12), torch.randn(9, 3), torch.randn(12) / 2
    plan = Plan.of(model, X)

    def linearized(budget: int | None) -> Tape:
        return plan.linearize(X, second_order=True, memory_budget=budget)

    def expected(theta: Tensor) -> Tensor:
        def value(w: Tensor) -> Tensor:
            return (outputs(w) * G.double()).sum()

        return V.double() @ torch.autograd.functional.hessian(value, theta.double())

    def outputs(w: Tensor) -> Tensor:
        return torch.tanh((X[0] + X[1]).double() @ torch.sinh(w.view(4, 3)))

    tape = linearized(None if chunk is None else budget_of(chunk, linearized))
    assert tape.chunk == chunk
    tape.keep_cotangents(2 * G)
    copy = tape.at_precision("bfloat16").at_precision("full")
    tape.keep_cotangents(G)
    wider: dict[str, Any] = {"factor": 4, "because": "the curvatures of sinh and tanh cancel in part"}
    for one in (tape, copy):
        assert_close(one.hvp(V, None), expected(one.theta), **wider)
    copy.relinearize(theta)
    copy.keep_cotangents(G)
    for one in (tape, copy):
        assert torch.equal(one.theta, theta)
        assert_close(one.outputs, outputs(theta.double()))
        assert_close(one.hvp(V, None), expected(theta), **wider)


def test_inputs_that_do_not_fit_leave_the_tape_where_it_stands() -> None:
    X = torch.randn(6, 4), torch.randn(6, 4)
    tape = Plan.of(Sum(), X).linearize(X)
    with pytest.raises(errors.ShapeError, match=r"as many examples in X\[1\] as in X\[0\], 6, got 5"):
        tape.relinearize(tape.theta + 1, (X[0], X[1][:5]))
    assert tape.jvp(torch.randn(1, 12)).shape == (1, 6, 3)


def test_a_sample_has_an_objective_of_its_own() -> None:
    network = build(NETWORKS["mlp-ce"], F64)
    N = network.outputs.shape[0]
    G = ie.GGN(network.model, network.loss, network.data, weights=torch.arange(N, dtype=F64))
    before = G.objective_weight
    chosen = torch.randperm(N, generator=torch.Generator().manual_seed(1))[:2]
    assert G.sample(torch.Generator().manual_seed(1), 2).objective_weight == pytest.approx(float(chosen.double().mean()))
    assert before == G.objective_weight == (N - 1) / 2


def test_hessian_keeps_the_point_it_was_made_at() -> None:
    network = Network(NETWORKS["mlp-tanh"], F64)
    H = ie.Hessian(network.model, network.loss, network.data)
    v = network.random("v", network.P)
    before = H @ v
    with torch.no_grad():
        for p in network.model.parameters():
            p.add_(1)
    assert torch.equal(H @ v, before)


def test_hessian_of_a_sample_is_that_of_the_batch() -> None:
    network = build(NETWORKS["mlp-ce"], F64)
    H = ie.Hessian(network.model, network.loss, network.data)
    index = torch.randperm(network.N, generator=torch.Generator().manual_seed(3))[:2]
    v = network.random("v", network.P)
    batch = ie.Hessian(network.model, network.loss, (network.X[index], network.y[index]))
    assert_close(H.sample(torch.Generator().manual_seed(3), 2) @ v, batch @ v)


@in_float64
def test_empirical_fisher_is_made_of_outer_products(small_problem: Network) -> None:
    network = small_problem
    G = network.grads
    expected = network.factor * G.T @ G
    E = ie.EmpiricalFisher(network.model, network.loss, network.data, damping=0.5)
    V = network.random("V", 3, network.P)
    scale = float(expected.norm() * V.norm())
    close = partial(assert_close, scope=network.case.scope)
    close(E.matmat(V), V @ expected + 0.5 * V, scale=scale)
    close(E.diagonal(), expected.diagonal() + 0.5, scale=float(expected.norm()) + 0.5)
    close(E.root_gram(), network.factor * G @ G.T)
    close(E.root_rmatmat(E.root_matmat(V)), V @ expected, scale=scale)


def test_dual_solves_with_the_empirical_fisher() -> None:
    network = build(NETWORKS["mlp-ce"], F64)
    E = ie.EmpiricalFisher(network.model, network.loss, network.data, damping=0.1)
    B = network.random("B", 4, network.P)
    solution = ie.solvers.Dual().solve(E, B)
    G = network.grads
    dense = network.factor * G.T @ G + 0.1 * torch.eye(network.P, dtype=F64)
    assert_close(solution.value, torch.linalg.solve(dense, B.T).T)


@pytest.mark.parametrize("name", ["mlp-ce", "mlp-bce", "mlp-tanh", "mlp-mse-sum"])
def test_monte_carlo_fisher_tends_to_the_gauss_newton_matrix(name: str) -> None:
    network = build(NETWORKS[name], F64)
    few, many = (ie.MonteCarloFisher(network.model, network.loss, network.data, num_samples=K, seed=1).to_dense() for K in (50, 5000))
    error = [float((F - network.ggn).norm() / network.ggn.norm()) for F in (few, many)]
    assert error[1] < 0.05
    assert error[1] < 0.4 * error[0]  # a tenth, up to luck


def test_monte_carlo_fisher_depends_on_its_seed_alone() -> None:
    network = build(NETWORKS["mlp-ce"], F64)
    v = network.random("v", network.P)
    state = torch.get_rng_state()
    one, two, other = (ie.MonteCarloFisher(network.model, network.loss, network.data, seed=seed) @ v for seed in (5, 5, 6))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert torch.equal(state, torch.get_rng_state())
    F = ie.MonteCarloFisher(network.model, network.loss, network.data, num_samples=3, seed=5)
    assert F.num_roots == 3 * network.N
    assert_close(F.diagonal(), F.to_dense().diagonal())
    with pytest.raises(errors.ArgumentError, match=r"num_samples >= 1 and below 2\^31, got 0"):
        ie.MonteCarloFisher(network.model, network.loss, network.data, num_samples=0)


def test_indefinite_hessians_are_not_taken_for_positive() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    X, y = torch.randn(8, 3, dtype=F64), 5 * torch.randn(8, 1, dtype=F64)
    H = ie.Hessian(model, nn.MSELoss(), (X, y))
    assert float(torch.linalg.eigvalsh(H.to_dense()).min()) < 0
    with pytest.raises(errors.SolverFailure):
        ie.solvers.Direct().solve(H, torch.randn(1, H.shape[0], dtype=F64))


def test_influence_with_the_empirical_fisher() -> None:
    network = build(NETWORKS["mlp-ce"], F64)
    influence = ie.Influence(network.model, network.loss, network.data, damping=0.1, curvature="empirical_fisher")
    scores = influence.scores(network.data).values
    G = network.grads
    dense = network.factor * G.T @ G + 0.1 * torch.eye(network.P, dtype=F64)
    assert_close(scores, network.factor * G @ torch.linalg.solve(dense, G.T))

    def within(budget: int) -> ie.Influence:
        return ie.Influence(network.model, network.loss, network.data, damping=0.1, memory_budget=budget)

    chunked = within(budget_of(2, within))
    assert chunked.operator.tape.chunk is not None
    assert_close(
        chunked.scores(network.data).values,
        ie.Influence(network.model, network.loss, network.data, damping=0.1).scores(network.data).values,
    )
    with pytest.raises(errors.ArgumentError, match="among 'ggn', 'empirical_fisher', got 'hessian'"):
        ie.Influence(network.model, network.loss, network.data, curvature="hessian")


def weighted_dense(network: Network, weights: Tensor, kind: str) -> Tensor:
    """The matrix of ``c Σ w_n ℓ_n`` in float64, example by example."""
    model, loss = double_copy(network.model), network.loss_case.reduced()
    trained = list(reference.trainable(model).values())
    total = torch.zeros(network.P, network.P, dtype=F64)
    for w, x, t in zip(weights, double(network.X), double(network.y), strict=True):
        z = call(model, x[None])
        gradients = torch.autograd.grad(loss(z, t[None]), trained, create_graph=True, allow_unused=True, materialize_grads=True)
        g = torch.cat([g.reshape(-1) for g in gradients])
        if kind == "EmpiricalFisher":
            total += w * torch.outer(g, g).detach()
            continue
        for p in range(network.P):
            second = torch.autograd.grad(g[p], trained, retain_graph=True, allow_unused=True, materialize_grads=True)
            total[p] += w * torch.cat([s.reshape(-1) for s in second]).detach()
    return total / len(weights)


@pytest.mark.parametrize("kind", ["Hessian", "EmpiricalFisher"])
@pytest.mark.parametrize("name", ["mlp-tanh", "mlp-ce"])
def test_weights_multiply_the_losses(name: str, kind: str) -> None:
    network = build(NETWORKS[name], F64)
    weights = torch.linspace(0, 2, network.N, dtype=F64)
    A = getattr(ie, kind)(network.model, network.loss, network.data, weights=weights)
    V = network.random("V", 3, network.P)
    assert_close(A.matmat(V), V @ weighted_dense(network, weights, kind))


def test_weights_of_the_gauss_newton_matrices() -> None:
    network = build(NETWORKS["mlp-ce"], F64)
    weights = torch.linspace(0, 2, network.N, dtype=F64)
    V, J = network.random("V", 3, network.P), reference.jacobian(network.model, network.X)
    H = reference.loss_hessian(network.loss_case.reduced(), reference.outputs(network.model, network.X), network.y)
    dense = torch.einsum("n,ncp,ncd,ndq->pq", weights / network.N, J, H, J)
    G = ie.GGN(network.model, network.loss, network.data, weights=weights)
    assert_close(G.matmat(V), V @ dense)
    assert_close(G.diagonal(), dense.diagonal())
    assert_close(G.root_rmatmat(G.root_matmat(V)), V @ dense)
    half = ie.GGN(network.model, network.loss, network.data, weights=weights / 2)
    batch = [A.sample(torch.Generator().manual_seed(0), 5) @ V[0] for A in (G, half)]
    assert_close(batch[0], 2 * batch[1])
    drawn = [ie.MonteCarloFisher(network.model, network.loss, network.data, weights=w) @ V[0] for w in (weights, weights / 2)]
    assert_close(drawn[0], 2 * drawn[1])


@pytest.mark.parametrize("weights", [torch.ones(3), -torch.ones(12)])
def test_weights_are_checked(weights: Tensor) -> None:
    network = build(NETWORKS["mlp-tanh"], F64)
    with pytest.raises(errors.ArgumentError, match="weights"):
        ie.GGN(network.model, network.loss, network.data, weights=weights)
