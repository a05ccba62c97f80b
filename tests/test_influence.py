"""Influence scores: equal the formula, have the right sign, add up, and know how wrong they can be."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import influence_ext as ie
from influence_ext import reference
from influence_ext.testing import assert_close
from tests.cases import Network, build, eager, generator, subset
from tests.cases.losses import half_mse_mean
from tests.cases.models import NETWORKS

F64 = torch.float64
DAMPING = 0.1
SOLVE = "errors of the gradients are amplified by up to the condition number of G + damping I"
ROWS = ["mlp-ce", "mlp-ce-sum", "mlp-half-mse", "mlp-bce", "mlp-mse-sum", "mixer", "tied-transpose", "two-inputs",
        "named-inputs", "head-only", "unused-parameters", "scalar-head", "mlp-single"]  # fmt: skip
rows = pytest.mark.parametrize("id", ROWS)
SOLVERS = {
    "default": lambda: None,
    "direct": lambda: ie.solvers.Direct(),
    "dual": lambda: ie.solvers.Dual(),
    "cg": lambda: ie.solvers.CG(rtol=1e-13),
}


def influence(network: Network, **options: Any) -> ie.Influence:
    """The object under test, damped."""
    return ie.Influence(network.model, network.loss, network.data, damping=DAMPING, **options)


def held_out(network: Network) -> tuple[Any, Tensor]:
    """Three examples that are not in the training set: its own, moved."""
    count = min(3, network.N)
    X = subset(network.X, slice(0, count))
    if isinstance(X, Tensor):
        return 0.9 * X + 0.1, network.y[:count]
    if isinstance(X, tuple):
        return tuple(0.9 * x + 0.1 for x in X), network.y[:count]
    return {key: 0.9 * x + 0.1 for key, x in X.items()}, network.y[:count]


def expected_scores(network: Network, test: tuple[Any, Tensor]) -> Tensor:
    """Float64 ``[n_test, n_train]``."""
    return reference.influence_scores(network.model, network.loss_case.oracle(), network.data, test, DAMPING, network.factor)


def eager_scores(network: Network) -> Tensor:
    """The formula on the training set in the network's own data type."""
    grads = eager.per_example_grads(network)
    A = eager.ggn(network) + DAMPING * torch.eye(network.P, dtype=network.dtype)
    return network.factor * grads @ torch.linalg.solve(A, grads.T)


@rows
@pytest.mark.parametrize("solver", SOLVERS)
def test_scores_match_the_formula(id: str, solver: str) -> None:
    network = build(NETWORKS[id], F64)
    test = held_out(network)
    scores = influence(network, solver=SOLVERS[solver]()).scores(test)
    factor = 1e5 if solver == "default" else 1e2
    because = "the default solver may stop at a relative residual" if solver == "default" else SOLVE
    assert_close(scores.values, expected_scores(network, test), factor=factor, because=because)


@rows
@pytest.mark.parametrize("solver", ["direct", "dual"])
def test_scores_in_float32(id: str, solver: str) -> None:
    network = build(NETWORKS[id], torch.float32)
    scores = influence(network, solver=SOLVERS[solver]()).scores(network.data)
    expected = expected_scores(network, network.data)
    assert scores.values.dtype == torch.float32
    assert_close(scores.values, expected, eager=partial(eager_scores, network), factor=4.0, because=SOLVE)


@rows
def test_scores_are_test_gradients_times_parameter_changes(id: str) -> None:
    network = build(NETWORKS[id], F64)
    test = held_out(network)
    inf = influence(network, solver=ie.solvers.Direct())
    values = inf.scores(test).values
    grads = reference.per_example_grads(network.model, network.loss_case.oracle(), *test)
    changes = torch.stack([inf.parameter_change([i]) for i in range(network.N)])
    assert_close(values, grads @ changes.T, factor=1e2, because=SOLVE)


@rows
def test_self_influence_is_the_diagonal_and_not_negative(id: str) -> None:
    network = build(NETWORKS[id], F64)
    inf = influence(network, solver=ie.solvers.Direct())
    own = inf.self_influence()
    assert own.shape == (network.N,)
    assert_close(own, expected_scores(network, network.data).diagonal(), factor=1e2, because=SOLVE)
    assert_close(own, inf.scores(network.data).values.diagonal(), factor=1e2, because=SOLVE)
    assert (own >= 0).all()


@rows
def test_parameter_change_of_groups(id: str) -> None:
    network = build(NETWORKS[id], F64)
    inf = influence(network, solver=ie.solvers.Direct())
    singles = torch.stack([inf.parameter_change([i]) for i in range(network.N)])
    for group in ([0], [network.N - 1, 0][: network.N], list(range(network.N))):
        change = inf.parameter_change(group)
        expected = reference.parameter_change(network.model, network.loss_case.oracle(), network.data, group, DAMPING, network.factor)
        assert_close(change, expected, factor=1e2, because=SOLVE)
        scale = float(singles[group].norm(dim=1).sum())
        assert_close(change, singles[group].sum(dim=0), scale=scale, factor=1e2, because=SOLVE)


@pytest.mark.parametrize("curvature", ["ggn", "empirical_fisher"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_nobody_removed_changes_nothing(solver: str, curvature: str) -> None:
    network = build(NETWORKS["mlp-ce"], F64)
    inf = influence(network, solver=SOLVERS[solver](), curvature=curvature)
    assert not inf.parameter_change([]).any()
    assert inf.self_influence([]).shape == (0,)
    assert repr(inf).startswith(f"Influence({type(inf.operator).__name__}(P={network.P}, N={network.N}, loss=cross_entropy, damping=0.1), ")


@rows
@pytest.mark.parametrize("rtol", [0.5, 1e-2, 1e-6])
def test_error_bound_holds(id: str, rtol: float) -> None:
    network = build(NETWORKS[id], F64)
    test = held_out(network)
    scores = influence(network, solver=ie.solvers.CG(rtol=rtol)).scores(test)
    bound = torch.as_tensor(scores.error_bound).double()
    error = (scores.values - expected_scores(network, test)).abs()
    assert bound.isfinite().all()
    assert (error <= bound + 1e-14 * (1 + scores.values.abs())).all()
    grads = reference.per_example_grads(network.model, network.loss_case.oracle(), *test)
    trained = network.factor * network.grads.norm(dim=1) * rtol / DAMPING
    assert (bound <= (1 + 1e-6) * grads.norm(dim=1).max() * trained.max()).all()


def test_error_bound_is_tight_where_the_solver_is_exact() -> None:
    network = build(NETWORKS["mlp-ce"], F64)
    scores = influence(network, solver=ie.solvers.Direct()).scores(network.data)
    assert torch.as_tensor(scores.error_bound).max() <= 1e-9 * scores.values.abs().max()


@pytest.mark.parametrize("id", ["mlp-ce", "mlp-mse-sum"])
def test_large_damping_leaves_inner_products_of_gradients(id: str) -> None:
    network, damping = build(NETWORKS[id], F64), 1e9
    inf = ie.Influence(network.model, network.loss, network.data, damping=damping, solver=ie.solvers.Direct())
    expected = network.factor * network.grads @ network.grads.T
    assert_close(damping * inf.scores(network.data).values, expected, factor=1e3, because="G / damping is dropped")


def ridge() -> tuple[nn.Module, Tensor, Tensor]:
    """A linear model at the minimum of its ridge objective, with the data."""
    rng = generator("ridge-influence")
    X = torch.randn(40, 4, generator=rng, dtype=F64)
    y = X @ torch.randn(4, generator=rng, dtype=F64) + 0.4 * torch.randn(40, generator=rng, dtype=F64)
    model = nn.Linear(4, 1, bias=False).to(F64)
    return reference.with_parameters(model, reference.ridge_fit(X, y, DAMPING)), X, y


def test_ridge_leave_one_out_is_influence_over_one_minus_leverage() -> None:
    model, X, y = ridge()
    inf = ie.Influence(model, half_mse(), (X, y[:, None]), damping=DAMPING, solver=ie.solvers.Direct())
    exact = reference.ridge_leave_one_out(X, y, DAMPING)
    A = X.T @ X / 40 + DAMPING * torch.eye(4, dtype=F64)
    for i in range(40):
        leverage = X[i] @ torch.linalg.solve(A, X[i]) / 40
        assert_close(inf.parameter_change([i]) / (1 - leverage), exact[i])


def test_removing_a_helpful_example_raises_the_test_loss() -> None:
    model, X, y = ridge()
    X_t, y_t = X[:5] + 0.05, y[:5]
    inf = ie.Influence(model, half_mse(), (X, y[:, None]), damping=DAMPING)
    values = inf.scores((X_t, y_t[:, None])).values
    theta = reference.parameter_vector(model)
    before = 0.5 * (X_t @ theta - y_t).square()
    changes = reference.ridge_leave_one_out(X, y, DAMPING)
    rise = torch.stack([0.5 * (X_t @ (theta + change) - y_t).square() - before for change in changes], dim=1)
    large = rise.abs() > 0.2 * rise.abs().max()
    assert large.sum() >= 5
    assert torch.equal(values[large].sign(), rise[large].sign())
    assert torch.corrcoef(torch.stack([values.reshape(-1), rise.reshape(-1)]))[0, 1] > 0.95


def half_mse() -> nn.Module:
    """``½ (z − t)²``."""
    return ie.losses.HalfMSE()


def test_scalar_toy_of_rank_one() -> None:
    """``f = a·b``: the observable's response to removing example i is ``(ab − z_i) ‖v‖² / (N (‖v‖² + λ))``, ``v = (b, a)``."""
    a, b = 0.7, -1.9
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)).to(F64)
    with torch.no_grad():
        model[0].weight.fill_(a)
        model[1].weight.fill_(b)
    x, z = torch.ones(4, 1, dtype=F64), torch.tensor([[0.1], [2.0], [-1.0], [0.5]], dtype=F64)
    v = torch.tensor([b, a], dtype=F64)
    assert_close(ie.GGN(model, half_mse(), (x, z)).to_dense(), torch.outer(v, v), scope="layer")
    inf = ie.Influence(model, half_mse(), (x, z), damping=DAMPING, solver=ie.solvers.Direct())
    for i in range(4):
        expected = (a * b - z[i, 0]) * (v @ v) / (v @ v + DAMPING) / 4
        assert_close(v @ inf.parameter_change([i]), expected)
    assert_close(inf.scores((x, z)).values, reference.influence_scores(model, half_mse_mean, (x, z), (x, z), DAMPING))


def test_a_mislabelled_example_has_the_largest_self_influence() -> None:
    model, X, y = ridge()
    y = y.clone()
    y[17] += 8.0
    trained = reference.with_parameters(model, reference.ridge_fit(X, y, DAMPING))
    inf = ie.Influence(trained, half_mse(), (X, y[:, None]), damping=DAMPING)
    assert int(inf.self_influence().argmax()) == 17


def test_top_lists_the_extremes() -> None:
    network = build(NETWORKS["mlp-ce"], F64)
    scores = influence(network).scores(network.data)
    for t in range(network.N):
        best = torch.argsort(scores.values[t], descending=True)[:2].tolist()
        found = scores.top(2, test=t)
        indices = [int(entry[0]) if isinstance(entry, tuple) else int(entry) for entry in found]
        assert indices == best


def test_scores_survive_saving(tmp_path: Any) -> None:
    network = build(NETWORKS["mlp-ce"], F64)
    scores = influence(network).scores(network.data)
    path = tmp_path / "scores"
    scores.save(path)
    loaded = ie.load_scores(path)
    assert torch.equal(loaded.values, scores.values)
    assert torch.equal(torch.as_tensor(loaded.error_bound), torch.as_tensor(scores.error_bound))


def test_a_failed_factorisation_is_tried_again() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    data = torch.randn(20, 4, dtype=F64), torch.randint(0, 3, (20,))
    found = ie.Influence(model, nn.CrossEntropyLoss(), data, damping=DAMPING, solver=ie.solvers.Dual(max_roots=5))
    for _ in range(2):
        with pytest.raises(ie.errors.ArgumentError, match="max_roots = 5"):
            found.scores(data)
