"""The oracles themselves, against finite differences and closed forms in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from influence_ext import reference
from influence_ext.testing import assert_close, deviation
from tests.cases import NetworkCase, build, generator
from tests.cases.losses import ROWS as LOSS_ROWS
from tests.cases.losses import LossCase, half_mse_mean
from tests.cases.models import NETWORKS

F64 = torch.float64
STENCIL = "a five-point difference quotient keeps about ten digits"
SMOOTH = ["mlp-tanh", "mlp-ce", "mlp-bce", "residual", "tied-layer", "tied-transpose", "mixer", "two-inputs",
          "named-inputs", "unused-parameters", "frozen-middle", "biases-only", "scalar-head"]  # fmt: skip
smooth_network = pytest.mark.parametrize("case", [NETWORKS[id] for id in SMOOTH], ids=SMOOTH)
every_loss = pytest.mark.parametrize("row", LOSS_ROWS, ids=lambda row: row.id)


def derivative(f: Callable[[Tensor], Tensor], x: Tensor, step: float = 2e-3) -> Tensor:
    """Central differences of fourth order: ``[*f, x.numel()]``."""
    columns = []
    for k in range(x.numel()):
        unit = torch.zeros_like(x).reshape(-1)
        unit[k] = step
        unit = unit.reshape(x.shape)
        columns.append((8 * (f(x + unit) - f(x - unit)) - (f(x + 2 * unit) - f(x - 2 * unit))) / (12 * step))
    return torch.stack(columns, dim=-1)


def curvature(f: Callable[[Tensor], Tensor], x: Tensor, v: Tensor, step: float = 2e-2) -> Tensor:
    """``vᵀ ∇²f(x) v`` by central differences of fourth order."""
    near, far = f(x + step * v) + f(x - step * v), f(x + 2 * step * v) + f(x - 2 * step * v)
    return (16 * near - far - 30 * f(x)) / (12 * step**2)


def softmax_fisher(model: nn.Module, X: Tensor) -> Tensor:
    """``(1/N) Σ_n Σ_c p_nc g_nc g_ncᵀ`` with ``g_nc = ∇ log p_nc``: equals the GGN of the mean cross-entropy."""
    total = torch.zeros((), dtype=F64)
    p = reference.outputs(model, X).softmax(dim=1)
    for c in range(p.shape[1]):
        labels = torch.full((X.shape[0],), c)
        g = reference.per_example_grads(model, nn.CrossEntropyLoss(), X, labels)
        total = total + g.T @ (p[:, c : c + 1] * g) / X.shape[0]
    return total


@smooth_network
def test_jacobian_matches_finite_differences(case: NetworkCase) -> None:
    network = build(case, F64)
    theta = reference.parameter_vector(network.model)

    def outputs(theta: Tensor) -> Tensor:
        moved = reference.with_parameters(network.model, theta)
        return reference.outputs(moved, network.X).reshape(network.N, -1)

    assert_close(network.jacobian, derivative(outputs, theta), factor=1e2, because=STENCIL)


@smooth_network
def test_per_example_gradients_match_finite_differences(case: NetworkCase) -> None:
    network = build(case, F64)

    def losses(theta: Tensor) -> Tensor:
        z = reference.outputs(reference.with_parameters(network.model, theta), network.X)
        return reference.loss_values(network.loss_case.oracle(), z, network.y)

    theta = reference.parameter_vector(network.model)
    assert_close(network.grads, derivative(losses, theta), factor=1e2, because=STENCIL)


@smooth_network
def test_batch_gradient_is_the_sum_of_per_example_gradients(case: NetworkCase) -> None:
    network = build(case, F64)
    batch = reference.batch_gradient(network.model, network.loss_case.reduced(), *network.data)
    assert_close(network.factor * network.grads.sum(dim=0), batch, scope="layer")


def test_jacobian_selects_parameters_in_model_order() -> None:
    network = build(NETWORKS["mlp-tanh"], F64)
    names = list(reference.trainable(network.model))
    sizes = [p.numel() for p in reference.trainable(network.model).values()]
    blocks = dict(zip(names, network.jacobian.split(sizes, dim=2), strict=True))
    chosen = reference.jacobian(network.model, network.X, params=[names[3], names[0]])
    assert_close(chosen, torch.cat([blocks[names[0]], blocks[names[3]]], dim=2), scope="layer")


@every_loss
def test_loss_value_of_the_batch_is_the_reduction_of_the_examples(row: LossCase) -> None:
    z, t = row.sample()
    values = reference.loss_values(row.oracle(), z, t)
    assert_close(row.factor(t) * values.sum(), row.reduced()(z, t), scope="layer")


def step_inside(row: LossCase) -> float:
    """A step that is small beside the distance to the end of the domain of rates and probabilities."""
    return 1e-5 if row.link in (F.softplus, torch.sigmoid) else 2e-3


@every_loss
def test_loss_gradient_matches_finite_differences(row: LossCase) -> None:
    z, t = row.sample()
    numeric = derivative(lambda z: reference.loss_values(row.oracle(), z, t), z, step_inside(row)).reshape(row.num_examples, *z.shape)
    assert_close(
        reference.loss_gradient(row.oracle(), z, t),
        numeric[torch.arange(row.num_examples), torch.arange(row.num_examples)],
        factor=1e3,
        because="values near 100 lose two more digits in the difference quotient",
    )


@every_loss
def test_loss_hessian_matches_finite_differences(row: LossCase) -> None:
    z, t = row.sample()
    H = reference.loss_hessian(row.oracle(), z, t)
    for n in range(row.num_examples):
        gradient = lambda z_n, n=n: reference.loss_gradient(row.oracle(), z_n[None], t[n : n + 1]).reshape(-1)  # noqa: E731
        numeric = derivative(gradient, z[n], step_inside(row))
        assert_close(H[n], numeric, scale=max(1.0, float(H[n].norm())), factor=1e2, because=STENCIL)
        assert_close(H[n], H[n].T, scope="layer", scale=1.0)


def test_loss_hessian_closed_forms() -> None:
    z, t = LOSS_ROWS[0].sample()
    C = z.shape[1]
    for loss, scale in ((nn.MSELoss(), 2 / C), (nn.MSELoss(reduction="sum"), 2.0), (half_mse_mean, 1 / C)):
        expected = (scale * torch.eye(C, dtype=F64)).expand(z.shape[0], C, C)
        assert_close(reference.loss_hessian(loss, z, t), expected, scope="layer")
    p = z.softmax(dim=1)
    labels = torch.zeros(z.shape[0], dtype=torch.long)
    expected = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    assert_close(reference.loss_hessian(nn.CrossEntropyLoss(), z, labels), expected, scope="layer")
    q = z.sigmoid()
    binary = reference.loss_hessian(nn.BCEWithLogitsLoss(reduction="sum"), z, t.sigmoid())
    assert_close(binary, torch.diag_embed(q * (1 - q)), scope="layer")


def test_ggn_of_softmax_is_its_fisher_matrix() -> None:
    network = build(NETWORKS["residual"], F64)
    fisher = softmax_fisher(network.model, network.X)
    assert_close(reference.ggn(network.model, nn.CrossEntropyLoss(), *network.data), fisher)


def test_ggn_of_a_linear_model_is_the_hessian() -> None:
    X, y = ridge_data()
    model = nn.Linear(X.shape[1], 1, bias=False).to(F64)
    G = reference.ggn(model, half_mse_mean, X, y[:, None])
    assert_close(G, X.T @ X / X.shape[0], scope="layer")
    summed = reference.ggn(model, half_mse_mean, X, y[:, None], reduction="sum")
    assert_close(summed, X.T @ X, scope="layer")


def test_ggn_assembled_from_cached_parts_equals_the_function() -> None:
    for id in ("mixer", "mlp-mse-sum", "tied-transpose"):
        network = build(NETWORKS[id], F64)
        G = reference.ggn(network.model, network.loss_case.oracle(), *network.data, network.factor)
        assert_close(network.ggn, G, scope="layer")


class Product(nn.Module):
    """``f = a·b·x``, the scalar toy of rank one."""

    def __init__(self, a: float, b: float) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor(a, dtype=F64)), nn.Parameter(torch.tensor(b, dtype=F64))

    def forward(self, x: Tensor) -> Tensor:
        return self.a * self.b * x


def test_scalar_toy_has_a_ggn_of_rank_one() -> None:
    a, b, damping = 0.7, -1.9, 0.3
    x, z = torch.ones(4, 1, dtype=F64), torch.tensor([[0.1], [2.0], [-1.0], [0.5]], dtype=F64)
    model = Product(a, b)
    v = torch.tensor([b, a], dtype=F64)
    assert_close(reference.ggn(model, half_mse_mean, x, z), torch.outer(v, v), scope="layer")
    for i in range(4):
        change = reference.parameter_change(model, half_mse_mean, (x, z), [i], damping)
        expected = (a * b - z[i, 0]) * (v @ v) / (v @ v + damping) / 4
        assert_close(v @ change, expected, scope="layer")


@every_loss
def test_bregman_divergence_is_nonnegative_and_zero_at_the_anchor(row: LossCase) -> None:
    z_s, t = row.sample()
    z, _ = row.sample("elsewhere")
    D = reference.bregman_divergence(row.oracle(), z, z_s, t)
    scale = reference.loss_values(row.oracle(), z, t).abs() + reference.loss_values(row.oracle(), z_s, t).abs() + 1
    assert D.shape == (row.num_examples,)
    assert (D / scale).min() >= -8 * torch.finfo(F64).eps
    assert D.max() > 0
    assert torch.equal(reference.bregman_divergence(row.oracle(), z_s, z_s, t), torch.zeros_like(D))


def test_bregman_divergence_closed_forms() -> None:
    z_s, t = LOSS_ROWS[0].sample()
    z, _ = LOSS_ROWS[0].sample("elsewhere")
    square = (z - z_s).square().sum(dim=1)
    D = reference.bregman_divergence(nn.MSELoss(reduction="sum"), z, z_s, t)
    assert_close(D, square)
    p_s, labels = z_s.softmax(dim=1), torch.tensor([0, 1, 2, 0, 1, 2])
    KL = (p_s * (z_s.log_softmax(dim=1) - z.log_softmax(dim=1))).sum(dim=1)
    for shift in range(3):
        D = reference.bregman_divergence(nn.CrossEntropyLoss(), z, z_s, (labels + shift) % 3)
        assert_close(D, KL)


@pytest.mark.parametrize("id", ["mlp-ce", "mlp-half-mse", "mlp-bce"])
def test_pbo_is_stationary_at_the_anchor_and_curved_like_the_damped_ggn(id: str) -> None:
    network, damping = build(NETWORKS[id], F64), 0.05
    theta = reference.parameter_vector(network.model)
    loss = network.loss_case.oracle()
    v = network.random("direction", network.P)
    v /= v.norm()

    def objective(theta: Tensor, epsilon: float = 0.0) -> Tensor:
        return reference.pbo(network.model, loss, network.data, theta, [1], damping, epsilon)

    assert objective(theta) == 0
    slope = derivative(lambda s: objective(theta + s * v), torch.zeros((), dtype=F64), step=1e-3)
    bent = curvature(objective, theta, v)
    expected = v @ network.ggn @ v + damping
    assert_close(bent, expected, factor=1e4, because="a second difference quotient keeps about seven digits")
    assert abs(slope) <= 1e-9 * float(expected)
    pull = derivative(lambda s: objective(theta + s * v, 0.4), torch.zeros(1, dtype=F64), step=1e-3)[0]
    assert_close(pull, -0.4 * network.grads[1] @ v, factor=1e3, because=STENCIL)


def test_linearized_pbrf_solves_its_linear_system() -> None:
    network, damping, remove = build(NETWORKS["mlp-ce"], F64), 0.02, [0, 3]
    theta = reference.parameter_vector(network.model)
    moved = reference.linearized_pbrf(network.model, nn.CrossEntropyLoss(), network.data, remove, damping)
    lhs = network.ggn @ (moved - theta) + damping * (moved - theta)
    assert_close(lhs, network.grads[remove].sum(dim=0) / network.N)


def test_scores_are_the_first_order_change_of_the_test_loss() -> None:
    network, damping = build(NETWORKS["mlp-ce"], F64), 0.1
    loss = network.loss_case.oracle()
    scores = reference.influence_scores(network.model, loss, network.data, network.data, damping)
    for i in range(network.N):
        change = reference.parameter_change(network.model, loss, network.data, [i], damping)
        assert_close(scores[:, i], network.grads @ change)
    assert (scores.diagonal() > 0).all()
    assert_close(scores, scores.T)


def ridge_data(N: int = 12, P: int = 4) -> tuple[Tensor, Tensor]:
    rng = generator("ridge")
    X = torch.randn(N, P, generator=rng, dtype=F64)
    return X, X @ torch.randn(P, generator=rng, dtype=F64) + 0.3 * torch.randn(N, generator=rng, dtype=F64)


def test_ridge_fit_is_stationary() -> None:
    X, y = ridge_data()
    theta = reference.ridge_fit(X, y, 0.2)
    gradient = X.T @ (X @ theta - y) / X.shape[0] + 0.2 * theta
    assert_close(gradient, torch.zeros_like(theta))


def test_ridge_leave_one_out_equals_refitting() -> None:
    X, y = ridge_data()
    theta = reference.ridge_fit(X, y, 0.2)
    predicted = reference.ridge_leave_one_out(X, y, 0.2)
    for i in range(X.shape[0]):
        weights = torch.ones_like(y)
        weights[i] = 0
        assert_close(predicted[i], reference.ridge_fit(X, y, 0.2, weights) - theta)


def test_ridge_response_minimises_the_pbo_and_is_influence_over_one_minus_epsilon_h() -> None:
    X, y = ridge_data()
    N, P, damping = *X.shape, 0.15
    model = nn.Linear(P, 1, bias=False).to(F64)  # nowhere near a minimum: none of this needs one
    model.weight.data.copy_(torch.linspace(-1, 1, P))
    theta_s = reference.parameter_vector(model)
    data = (X, y[:, None])
    A = X.T @ X / N + damping * torch.eye(P, dtype=F64)
    for i in range(N):
        delta = reference.ridge_response(X, y, theta_s, [i], damping)
        objective = lambda theta, i=i: reference.pbo(model, half_mse_mean, data, theta, [i], damping)  # noqa: E731
        gradient = derivative(objective, theta_s + delta, step=0.1)
        start = derivative(objective, theta_s, step=0.1)
        assert gradient.norm() <= 1e-12 * (1 + start.norm())
        h = X[i] @ torch.linalg.solve(A, X[i])
        influence = reference.parameter_change(model, half_mse_mean, data, [i], damping)
        assert_close(delta, influence / (1 - h / N))


def test_removing_a_helpful_example_raises_the_test_loss() -> None:
    X, y = ridge_data(N=40)
    damping, theta = 0.2, reference.ridge_fit(X, y, 0.2)
    model = reference.with_parameters(nn.Linear(X.shape[1], 1, bias=False), theta)
    X_t, y_t = X[:3] + 0.05, y[:3]
    scores = reference.influence_scores(model, half_mse_mean, (X, y[:, None]), (X_t, y_t[:, None]), damping)
    true = torch.stack(
        [
            0.5 * (X_t @ (theta + change) - y_t).square() - 0.5 * (X_t @ theta - y_t).square()
            for change in reference.ridge_leave_one_out(X, y, damping)
        ],
        dim=1,
    )
    large = true.abs() > 0.2 * true.abs().max()
    assert large.sum() >= 3
    assert torch.equal(scores[large].sign(), true[large].sign())
    assert torch.corrcoef(torch.stack([scores.reshape(-1), true.reshape(-1)]))[0, 1] > 0.95


def test_deviation_handles_zeros_empties_and_non_finite_numbers() -> None:
    zero = torch.zeros(2, 3, dtype=F64)
    assert deviation(zero + 1e-3, zero).frobenius == pytest.approx(1e-3 * math.sqrt(6))
    assert deviation(torch.empty(0), torch.empty(0, dtype=F64)).frobenius == 0
    infinite = torch.tensor([1.0, math.inf], dtype=F64)
    assert deviation(infinite, infinite).frobenius == 0
    assert not math.isfinite(deviation(infinite, infinite.nan_to_num(posinf=1.0)).frobenius)


def test_assert_close_is_strict_and_says_why() -> None:
    oracle = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=F64)
    wrong = oracle.clone()
    wrong[1, 0] += 1e-9
    with pytest.raises(AssertionError, match=r"relative Frobenius error 1\.8\d+e-10 is 1\.8\d? times .* at \[1, 0\]"):
        assert_close(wrong, oracle)
    assert_close(oracle + 1e-13, oracle, scope="layer")
    with pytest.raises(AssertionError, match="layer"):
        assert_close(wrong, oracle, scope="layer")
    with pytest.raises(AssertionError, match=r"expected shape \[2, 2\], got \[4\]"):
        assert_close(oracle.reshape(-1), oracle)
    with pytest.raises(AssertionError, match="nan"):
        assert_close(oracle * math.nan, oracle)
    with pytest.raises(ValueError, match="float64 oracle"):
        assert_close(oracle, oracle.float())
    with pytest.raises(ValueError, match="reason"):
        assert_close(oracle, oracle, factor=2.0)


def test_assert_close_in_float32_allows_twice_the_error_of_eager_torch() -> None:
    oracle = torch.full((10,), 1.0, dtype=F64)
    eager, ours = oracle.float() + 1e-4, oracle.float() + 1.9e-4
    assert_close(ours, oracle, eager=eager)
    assert_close(oracle.float() + 1e-6, oracle)
    with pytest.raises(AssertionError, match="eager PyTorch's errors"):
        assert_close(oracle.float() + 2.1e-4, oracle, eager=eager)
    with pytest.raises(AssertionError, match="relative Frobenius"):
        assert_close(ours, oracle)


@smooth_network
def test_products_are_those_of_the_dense_jacobian(case: NetworkCase) -> None:
    network = build(case, F64)
    V, G = network.random("V", 2, network.P), network.random("G", 2, *network.outputs.shape)
    J, H, flat = network.jacobian, network.loss_hessian, G.reshape(2, network.N, -1)
    tangents = torch.einsum("ncp,vp->vnc", J, V)
    assert_close(reference.jacobian_products(network.model, network.X, V).reshape_as(tangents), tangents)
    assert_close(reference.jacobian_transpose_products(network.model, network.X, G), torch.einsum("ncp,vnc->vp", J, flat))
    loss, reduction = network.loss_case.oracle(), network.loss_case.reduction
    products = reference.ggn_products(network.model, loss, network.X, network.y, V, reduction)
    assert_close(products, network.factor * torch.einsum("ncp,ncd,vnd->vp", J, H, tangents))


def test_products_without_forward_mode_go_by_rows() -> None:
    class Distances(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.centres = nn.Parameter(torch.randn(3, 2, dtype=F64))

        def forward(self, x: Tensor) -> Tensor:
            return torch.cdist(x, self.centres)

    torch.manual_seed(0)
    model, X, V = Distances(), torch.randn(4, 2, dtype=F64), torch.randn(2, 6, dtype=F64)
    expected = torch.einsum("ncp,vp->vnc", reference.jacobian(model, X), V)
    assert_close(reference.jacobian_products(model, X, V), expected)
