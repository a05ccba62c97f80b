"""EK-FAC against its definition in plain torch: hooks, unfolded inputs, explicit bases; its use as solver and as preconditioner."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import influence_ext as ie
from influence_ext import reference
from influence_ext.errors import ArgumentError, SolverFailure
from influence_ext.operators import kronecker
from influence_ext.solvers import CG, EKFAC, BlockCG, Status
from tests.cases import generator

F64 = torch.float64
DAMPING = 1e-2


class Tied(nn.Module):
    """One linear layer twice, so that its factors have cross terms."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(torch.tanh(self.inner(torch.tanh(self.inner(x)))))


class Positions(nn.Module):
    """Weights shared by positions, behind an embedding and a norm, which are treated by themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(6, 4), nn.LayerNorm(4)
        self.mix, self.head = nn.Linear(4, 5, bias=False), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.norm(self.table(x))))).mean(dim=1)


class Flipped(nn.Module):
    """A weight that lies as ``[I, O]``."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(5, 3) / 2), nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1, stride=2),
        nn.Tanh(),
        nn.Conv2d(3, 6, 2, groups=3),
        nn.Tanh(),
        nn.Conv2d(6, 2, 1, bias=False),
        nn.Flatten(),
        nn.Linear(8, 3),
    )


def winograd() -> nn.Module:
    """Its second layer keeps its inputs as Winograd's algorithm reads them."""
    convolution = nn.Conv2d(12, 12, 3, padding=1)
    return nn.Sequential(nn.Conv2d(2, 12, 1), nn.Tanh(), convolution, nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48, 3))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)), lambda: torch.randn(40, 5)),
    "tied": (Tied, lambda: torch.randn(40, 5)),
    "convolutions": (convolutions, lambda: torch.randn(40, 2, 6, 6)),
    "winograd": (winograd, lambda: torch.randn(40, 2, 8, 8)),
    "positions": (Positions, lambda: torch.randint(0, 6, (40, 7))),
}


def problem(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    make, data = MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model, X = make().double(), data()
        return model, X.double() if X.is_floating_point() else X, torch.randint(0, 3, (40,))


def unfolded(layer: nn.Module, x: Tensor) -> Tensor:
    """A layer's inputs as ``[N, T, I + 1]``, with ones where it has a bias."""
    assert isinstance(layer, nn.Linear | nn.Conv2d)
    if isinstance(layer, nn.Conv2d):
        a = torch.nn.functional.unfold(x, layer.kernel_size, padding=layer.padding, stride=layer.stride).mT  # type: ignore[arg-type]
    else:
        a = x.reshape(len(x), -1, x.shape[-1])
    return a if layer.bias is None else torch.cat([a, torch.ones_like(a[..., :1])], dim=-1)


def oracle(model: nn.Module, loss: Any, X: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """``Q [P, P]`` and G from the definition: hooks for inputs and outputs, eigenvectors of A and B, places by parameter name."""
    calls: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}
    handles = [
        layer.register_forward_hook(lambda m, args, out: calls.setdefault(m, []).append((args[0].detach(), out)))
        for layer in model.modules()
        if isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)
    ]
    z = model(X)
    for handle in handles:
        handle.remove()
    H = reference.loss_hessian(loss, z.detach(), y)
    values, vectors = torch.linalg.eigh(H)
    S = vectors * values.clamp(min=0).sqrt()[:, None]
    offsets, P = {}, 0
    for name, p in model.named_parameters():
        offsets[name] = torch.arange(P, P + p.numel()).view(p.shape)
        P += p.numel()
    Q = torch.eye(P, dtype=F64)
    names = {module: name for name, module in model.named_modules()}
    for layer, uses in calls.items():
        A = sum(a.reshape(-1, a.shape[-1]).T @ a.reshape(-1, a.shape[-1]) for a in (unfolded(layer, x) for x, _ in uses))
        alone = len(uses) == 1
        B = torch.zeros(uses[0][1].shape[1 if isinstance(layer, nn.Conv2d) else -1], dtype=F64).diag()
        for c in range(z.shape[1]):
            for g in torch.autograd.grad(z, [out for _, out in uses], S[:, :, c], retain_graph=True):
                g = g.flatten(2).mT if isinstance(layer, nn.Conv2d) else g
                g = g.reshape(-1, g.shape[-1])
                B = B + g.T @ g
        index = offsets[f"{names[layer]}.weight"].flatten(1)
        if layer.bias is not None and alone:
            index = torch.cat([index, offsets[f"{names[layer]}.bias"][:, None]], dim=1)
        elif layer.bias is not None:  # read by several nodes: by itself
            A = A[:-1, :-1]
        block = torch.kron(torch.linalg.eigh(B)[1], torch.linalg.eigh(A)[1])
        Q[index.flatten()[:, None], index.flatten()] = block
    return Q, reference.ggn(model, loss, X, y)


def approximation(model: nn.Module, loss: Any, X: Tensor, y: Tensor) -> Tensor:
    """``Q diag(QᵀGQ) Qᵀ``."""
    Q, G = oracle(model, loss, X, y)
    return (Q * (Q.T @ G @ Q).diagonal()) @ Q.T


def rows(V: int, P: int, key: str = "ekfac") -> Tensor:
    return torch.randn(V, P, dtype=F64, generator=generator(key))


@pytest.mark.parametrize("name", MODELS)
def test_solution_is_the_definition(name: str) -> None:
    model, X, y = problem(name)
    loss = nn.functional.cross_entropy
    G = ie.GGN(model, loss, (X, y), DAMPING)
    B = rows(5, G.num_parameters)
    dense = approximation(model, loss, X, y) + DAMPING * torch.eye(G.num_parameters, dtype=F64)
    solution = EKFAC().solve(G, B)
    assert torch.allclose(solution.value, torch.linalg.solve(dense, B.T).T, rtol=1e-7, atol=1e-8)
    assert solution.status == [Status.APPROXIMATE] * 5
    assert solution.success
    assert not solution.converged
    damped = reference.ggn(model, loss, X, y) + DAMPING * torch.eye(G.num_parameters, dtype=F64)
    residual = (B - solution.value @ damped).norm(dim=1) / B.norm(dim=1)
    assert torch.allclose(solution.residual_norm, residual, rtol=1e-6)


@pytest.mark.parametrize(
    "make", [lambda: nn.Linear(5, 3), lambda: nn.Linear(5, 3, bias=False), Flipped], ids=["bias", "no bias", "flipped"]
)
def test_exact_for_one_layer_under_a_squared_error(make: Callable[[], nn.Module]) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model, X, y = make().double(), torch.randn(30, 5, dtype=F64), torch.randn(30, 3, dtype=F64)
    G = ie.GGN(model, "mse_loss", (X, y), DAMPING)
    B = rows(4, G.num_parameters)
    damped = reference.ggn(model, nn.functional.mse_loss, X, y) + DAMPING * torch.eye(G.num_parameters, dtype=F64)
    solution = EKFAC(rtol=1e-10).solve(G, B)
    assert solution.converged
    assert torch.allclose(solution.value, torch.linalg.solve(damped, B.T).T, rtol=1e-9, atol=1e-10)


def test_factors_are_the_covariances() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model, X, y = nn.Linear(5, 3).double(), torch.randn(30, 5, dtype=F64), torch.randn(30, 3, dtype=F64)
    (found,) = ie.GGN(model, nn.MSELoss(reduction="sum"), (X, y)).kronecker_factors()
    ones = torch.cat([X, torch.ones(30, 1, dtype=F64)], dim=1)
    assert torch.allclose(found.A, ones.T @ ones / 30)
    assert torch.allclose(found.B, 2 * 30 * torch.eye(3, dtype=F64))


@pytest.mark.parametrize("name", MODELS)
def test_blocks_of_examples_and_of_cotangents_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, X, y = problem(name)
    G = ie.GGN(model, "cross_entropy", (X, y), DAMPING)
    whole = EKFAC(num_samples=5).factorise(G)
    B = rows(3, G.num_parameters)
    monkeypatch.setattr(kronecker, "TILE_BYTES", 1000)
    assert torch.allclose(EKFAC(num_samples=5).factorise(G)(B), whole(B), rtol=1e-8, atol=1e-9)
    exact = EKFAC().factorise(G)
    monkeypatch.setattr(kronecker, "BLOCK_BYTES", 2000)
    assert len(list(G._cotangent_blocks(None, 0))) > 3
    assert torch.allclose(EKFAC().factorise(G)(B), exact(B), rtol=1e-8, atol=1e-9)
    batches = [(X[:15], y[:15]), (X[15:], y[15:])]
    streamed = ie.GGN(model, "cross_entropy", batches, DAMPING, memory_budget=max(9000, G.cached_bytes // 3))
    assert torch.allclose(EKFAC().factorise(streamed)(B), exact(B), rtol=1e-8, atol=1e-9)


def test_a_sub_space_and_derived_parameters() -> None:
    model, X, y = problem("mlp")
    part = ie.GGN(model, "cross_entropy", (X, y), DAMPING, params=["0.weight", "2.*"])
    weight, head = EKFAC().factorise(part).rotations
    assert (weight.block.bias, head.block.bias) == (None, 32)
    nn.utils.parametrizations.weight_norm(model[0])  # type: ignore[index]
    G = ie.GGN(model, "cross_entropy", (X, y), DAMPING)
    found = EKFAC().factorise(G)
    assert len(found.rotations) == 1
    assert torch.allclose(found.eigenvalues.sum(), torch.trace(reference.ggn(model, nn.functional.cross_entropy, X, y)))


@pytest.mark.parametrize("name", MODELS)
def test_draws_repeat_within_and_between_passes(name: str) -> None:
    model, X, y = problem(name)
    G = ie.GGN(model, "cross_entropy", (X, y), DAMPING)
    state = torch.get_rng_state()
    found = EKFAC(num_samples=1, seed=4).factorise(G)
    assert torch.equal(torch.get_rng_state(), state)
    # a rotation leaves the sum of squares of the same draws as it is
    assert torch.allclose(found.eigenvalues.sum(), G.rotated_diagonal([], 1, 4).sum())
    assert not torch.allclose(found.eigenvalues.sum(), G.rotated_diagonal([], 1, 5).sum(), rtol=1e-6)
    many = EKFAC(num_samples=2000).factorise(G)
    assert torch.allclose(many.eigenvalues.sum(), EKFAC().factorise(G).eigenvalues.sum(), rtol=0.05)


def test_fisher_matrices_have_their_own_rows() -> None:
    model, X, y = problem("mlp")
    B = rows(2, 35 + 4)
    for operator in (
        ie.EmpiricalFisher(model, "cross_entropy", (X, y), DAMPING),
        ie.MonteCarloFisher(model, "cross_entropy", (X, y), DAMPING, num_samples=2, seed=1),
    ):
        found = EKFAC().factorise(operator)
        Q = found._turned(torch.eye(39, dtype=F64), back=True)
        undamped = operator.damped(0.0).to_dense()
        assert torch.allclose((Q @ undamped * Q).sum(dim=1), found.eigenvalues, atol=1e-12)
        assert EKFAC().solve(operator, B).success


def test_one_factorisation_serves_every_damping() -> None:
    model, X, y = problem("mlp")
    G = ie.GGN(model, "cross_entropy", (X, y), DAMPING)
    B = rows(3, G.num_parameters)
    solution = EKFAC().factorise(G).damped(0.3).solve(B)
    again = EKFAC().solve(G.damped(0.3), B)
    assert torch.allclose(solution.value, again.value)
    assert torch.allclose(solution.residual_norm, again.residual_norm)
    singular = EKFAC(on_failure="return").factorise(G).damped(0.0)
    assert singular.status in (Status.CONVERGED, Status.NOT_PSD)


def test_a_tolerance_that_is_missed() -> None:
    model, X, y = problem("tied")
    G = ie.GGN(model, "cross_entropy", (X, y), DAMPING)
    with pytest.raises(SolverFailure, match=r"STALLED: .* or for EKFAC as its approximation is"):
        EKFAC(rtol=1e-6).solve(G, rows(2, G.num_parameters))


def test_what_has_no_factors_is_refused() -> None:
    model, X, y = problem("mlp")
    hessian = ie.Hessian(model, "cross_entropy", (X, y), DAMPING)
    with pytest.raises(ArgumentError, match=r"EKFAC: expected a curvature made of .* got Hessian; use CG"):
        EKFAC().solve(hessian, rows(1, hessian.num_parameters))
    with pytest.raises(ArgumentError, match="EKFAC: expected num_samples to be an integer of at least 1, got 0"):
        EKFAC(num_samples=0)


def ill_conditioned(dtype: torch.dtype) -> tuple[nn.Module, Tensor, Tensor]:
    """Features over two decades of scale and more examples than parameters: what layer-wise preconditioning is for."""
    with torch.random.fork_rng():
        torch.manual_seed(11)
        X = torch.randn(600, 12) * torch.logspace(1, -1, 12)
        model = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3))
        return model.to(dtype), X.to(dtype), torch.randn(600, 3).to(dtype)


@pytest.mark.parametrize("kind", [CG, BlockCG])
def test_as_preconditioner_it_saves_steps_and_leaves_the_answer(kind: type[CG] | type[BlockCG]) -> None:
    model, X, y = ill_conditioned(F64)
    G = ie.GGN(model, "mse_loss", (X, y), 1e-6)
    B = rows(3, G.num_parameters)
    plain = kind(rtol=1e-8, max_steps=5000, reorthogonalise=0).solve(G, B)  # the past saves most of these steps, too
    solution = kind(rtol=1e-8, preconditioner=EKFAC(), reorthogonalise=0).solve(G, B)
    dense = reference.ggn(model, nn.functional.mse_loss, X, y) + 1e-6 * torch.eye(G.num_parameters, dtype=F64)
    exact = torch.linalg.solve(dense, B.T).T
    assert float((solution.value - exact).norm() / exact.norm()) <= 1e-5
    assert max(solution.stats["iterations"]) < 0.7 * max(plain.stats["iterations"])


def test_frozen_layers_below_take_no_bias_away() -> None:
    """A linear layer under a squared error is exact, whatever lies frozen below it."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(3, 30), nn.Tanh(), nn.Linear(30, 2)).double()
    X, y = torch.randn(50, 3, dtype=F64), torch.randn(50, 2, dtype=F64)
    model[0].requires_grad_(False)
    G = ie.GGN(model, "mse_loss", (X, y), 1e-3)
    B = rows(4, G.num_parameters)
    assert torch.allclose(EKFAC().factorise(G)(B), torch.linalg.solve(G.to_dense(), B.T).T, rtol=1e-8, atol=1e-8)


def test_float32() -> None:
    model, X, y = ill_conditioned(torch.float32)
    G = ie.GGN(model, "mse_loss", (X, y), 1e-2)
    B = rows(3, G.num_parameters).float()
    found = EKFAC().factorise(G)
    double = EKFAC().factorise(ie.GGN(model.double(), "mse_loss", (X.double(), y.double()), 1e-2))
    assert found(B).dtype == torch.float32
    assert torch.allclose(found(B).double(), double(B.double()), rtol=1e-2, atol=1e-3 * float(double(B.double()).abs().max()))


def test_influence_scores_carry_the_error_of_the_approximation() -> None:
    model, X, y = problem("mlp")
    test = (X[:3], y[:3])
    approximate = ie.Influence(model, "cross_entropy", (X, y), damping=DAMPING, solver=EKFAC())
    scores = approximate.scores(test)
    exact = reference.influence_scores(model, nn.functional.cross_entropy, (X, y), test, DAMPING)
    gap = (scores.values - exact).abs()
    assert float(gap.max()) > 1e-6
    assert bool((gap <= scores.error_bound).all())
    assert dataclasses.replace(EKFAC(), seed=1) != EKFAC()
    assert "EKFAC" in scores.info["solver"]


def test_weights_that_are_slices_of_one_parameter() -> None:
    """The projections of an attention layer with other keys than queries, and overlapping slices, which have no factors."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.memory, self.attention = nn.Linear(4, 4), nn.MultiheadAttention(4, 2, batch_first=True)
            self.shared, self.head = nn.Parameter(torch.randn(6, 4)), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            memory = self.memory(x)
            h = self.attention(x, memory, memory, need_weights=False)[0].mean(dim=1)
            y: Tensor = self.head(nn.functional.linear(nn.functional.linear(h, self.shared[:4]).tanh(), self.shared[2:]))
            return y

    torch.manual_seed(0)
    model, X, y = Net().double(), torch.randn(7, 3, 4, dtype=torch.float64), torch.randint(0, 3, (7,))
    G = ie.GGN(model, "cross_entropy", (X, y), DAMPING)
    found = EKFAC().factorise(G)
    space = G._tape.plan.space
    at = dict(zip(space.names, space.offsets, strict=True))
    q = at["attention.in_proj_weight"]
    assert {r.block.weight for r in found.rotations} == {
        *(q, q + 16),  # queries; keys and values together, which read the same
        *(at["memory.weight"], at["attention.out_proj.weight"], at["head.weight"]),
    }
    bias = at["attention.in_proj_bias"]
    assert [r.block.bias for r in found.rotations if q <= r.block.weight < q + 48] == [bias, bias + 4]
    dense = reference.ggn(model, nn.functional.cross_entropy, X, y)
    assert torch.allclose(found.eigenvalues.sum(), torch.trace(dense))
    # the rotation is orthogonal, and its diagonal that of the rotated matrix
    Q = torch.eye(len(dense), dtype=torch.float64)
    for r in found.rotations:
        O = r.block.shape[0]
        places = list(range(r.block.weight, r.block.weight + O * r.block.num_inputs))
        index = torch.tensor(places).view(O, -1)
        if r.block.bias is not None:
            index = torch.cat([index, torch.arange(r.block.bias, r.block.bias + O)[:, None]], dim=1)
        flat = index.reshape(-1)
        Q[flat[:, None], flat[None]] = torch.kron(r.outputs, r.inputs)
    assert torch.allclose(found.eigenvalues, (Q.T @ dense @ Q).diagonal(), atol=1e-10)
