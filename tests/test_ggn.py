"""The GGN operator: equals its definition, behaves as a matrix, and does not depend on how it is asked."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import influence_ext as ie
from influence_ext import reference
from influence_ext.testing import assert_close
from tests.cases import Network, NetworkCase, build, eager, generator, in_float64, subset
from tests.cases.layers import normal
from tests.cases.models import ACTIVATIONS, NETWORKS, mlp

FEW = ["mlp-tanh", "mlp-ce", "mlp-bce", "mlp-mse-sum", "mixer", "tied-transpose", "two-inputs", "named-inputs",
       "unused-parameters", "linear-many"]  # fmt: skip
few = pytest.mark.parametrize("id", FEW)


def operator(network: Network, damping: float = 0.0, **options: Any) -> ie.GGN:
    """The operator under test."""
    return ie.GGN(network.model, network.loss, network.data, damping, **options)


def test_products_match_the_definition(problem: Network) -> None:
    V = problem.random("V", 8, problem.P)
    G, expected, peer = operator(problem), problem.ggn_matmat(V), partial(eager.ggn_products, problem, V)
    product = G.matmat(V)
    assert_close(product, expected, scope=problem.case.scope, eager=peer)
    for num_rhs in (1, 3):
        assert_close(G.matmat(V[:num_rhs]), product[:num_rhs].double(), scope=problem.case.scope)
    assert_close(G.matvec(V[5]), product[5].double(), scope=problem.case.scope)
    assert G.matmat(V[:0]).shape == (0, problem.P)


def test_dense_matrix_is_symmetric_psd_and_matches_the_oracle(small_problem: Network) -> None:
    dense = operator(small_problem).to_dense()
    assert_close(dense, small_problem.ggn, scope=small_problem.case.scope, eager=partial(eager.ggn, small_problem))
    assert torch.equal(dense, dense.T)
    values = torch.linalg.eigvalsh(dense.double())
    eps = torch.finfo(small_problem.dtype).eps
    assert values.min() >= -50 * eps * max(float(values.max()), torch.finfo(small_problem.dtype).tiny)


@in_float64
def test_products_are_symmetric_before_any_averaging(problem: Network) -> None:
    u, v = problem.random("u", problem.P), problem.random("v", problem.P)
    G = operator(problem)
    Gu, Gv = (G @ u).double(), (G @ v).double()
    scale = float(Gu.norm() * v.double().norm() + Gv.norm() * u.double().norm())
    assert_close((u.double() @ Gv).to(u.dtype), v.double() @ Gu, scope=problem.case.scope, scale=scale)
    assert u.double() @ Gu >= -torch.finfo(problem.dtype).eps * scale


def test_diagonal_and_trace(small_problem: Network) -> None:
    G = operator(small_problem, damping=0.3)
    expected = small_problem.ggn.diagonal() + 0.3
    scope = small_problem.case.scope
    assert_close(G.diagonal(), expected, scope=scope, eager=lambda: eager.ggn(small_problem).diagonal() + 0.3)
    assert_close(G.trace(), expected.sum(), scope=scope, eager=lambda: (eager.ggn(small_problem).diagonal() + 0.3).sum())


@few
def test_damping_adds_a_multiple_of_the_identity(id: str, dtype: torch.dtype) -> None:
    network = build(NETWORKS[id], dtype)
    V = network.random("V", 2, network.P)
    G = operator(network, damping=0.25)
    expected = network.ggn_matmat(V) + 0.25 * V.double()
    peer = eager.ggn_products(network, V) + 0.25 * V
    assert_close(G.matmat(V), expected, eager=peer)
    assert_close(operator(network).damped(0.25).matmat(V), expected, eager=peer)
    assert_close(G.damped(0.0).matmat(V), network.ggn_matmat(V), eager=peer - 0.25 * V)
    assert G.damping == 0.25
    assert G.damped(2.0).damping == 2.0
    assert G.damping == 0.25


@few
def test_matmul_takes_vectors_matrices_lists_and_dicts(id: str, dtype: torch.dtype) -> None:
    network = build(NETWORKS[id], dtype)
    G = operator(network, damping=0.1)
    V = network.random("V", 3, network.P)
    rows = G.matmat(V)
    assert torch.equal(G @ V.T, rows.T)
    assert_close(G @ V[0], rows[0].double())
    like = reference.trainable(network.model)
    parts = dict(zip(like, V[0].split([p.numel() for p in like.values()]), strict=True))
    tensors = {name: parts[name].reshape(p.shape) for name, p in like.items()}
    as_list = G @ list(tensors.values())
    as_dict = G @ dict(reversed(tensors.items()))  # any order
    assert isinstance(as_list, list)
    assert isinstance(as_dict, dict)
    assert list(as_dict) == list(reversed(like))
    assert [t.shape for t in as_list] == [p.shape for p in like.values()]
    assert torch.equal(torch.cat([t.reshape(-1) for t in as_list]), G @ V[0])
    assert torch.equal(torch.cat([as_dict[name].reshape(-1) for name in like]), G @ V[0])


@few
def test_attributes(id: str, dtype: torch.dtype) -> None:
    network = build(NETWORKS[id], dtype)
    G = operator(network)
    assert G.shape == (network.P, network.P)
    assert G.dtype == dtype
    assert G.device == torch.device("cpu")
    assert list(G.param_names) == list(reference.trainable(network.model))
    assert G.num_examples == network.N


@few
def test_scipy_sees_the_same_matrix(id: str, dtype: torch.dtype) -> None:
    network = build(NETWORKS[id], dtype)
    G = operator(network, damping=0.1)
    S = G.to_scipy()
    V = network.random("V", 3, network.P)
    numbers = V.numpy()
    assert S.shape == G.shape
    assert S.dtype == numbers.dtype
    assert np.array_equal(S @ numbers[0], (G @ V[0]).numpy())
    assert np.array_equal(S @ numbers.T, G.matmat(V).numpy().T)
    assert np.array_equal(S.T @ numbers[0], (G @ V[0]).numpy())


def test_matmat_does_not_modify_its_argument_and_returns_new_memory() -> None:
    network = build(NETWORKS["mlp-tanh"], torch.float64)
    G = operator(network, damping=0.1)
    V = network.random("V", 3, network.P)
    before = V.clone()
    first = G.matmat(V)
    kept = first.clone()
    G.matmat(-V)
    assert torch.equal(V, before)
    assert torch.equal(first, kept)
    assert not first.requires_grad


@pytest.mark.parametrize(
    ("id", "pattern"),
    [("mlp-tanh", [0]), ("mlp-tanh", [3, 0]), ("mlp-ce", [2]), ("tied-transpose", [0]), ("tied-modules", [1, 0])],
)
@pytest.mark.parametrize("by", ["name", "tensor"])
def test_sub_spaces(id: str, pattern: list[int], by: str, dtype: torch.dtype) -> None:
    network = build(NETWORKS[id], dtype)
    like = reference.trainable(network.model)
    names = [list(like)[k] for k in pattern]
    params = names if by == "name" else [like[name] for name in names]
    G = operator(network, params=params)
    oracle = reference.ggn(network.model, network.loss_case.oracle(), *network.data, network.factor, names)
    offsets = torch.tensor([0, *[p.numel() for p in like.values()]]).cumsum(0)
    chosen = torch.cat([torch.arange(offsets[k], offsets[k + 1]) for k in sorted(pattern)])
    assert_close(G.to_dense(), oracle, eager=lambda: eager.ggn(network)[chosen][:, chosen])
    assert list(G.param_names) == sorted(names, key=list(like).index)


@few
@pytest.mark.parametrize("sizes", [[5], [1, 4], [2, 2, 1], [1, 1, 1, 1, 1]], ids=str)
def test_batches_of_any_size_are_one_data_set(id: str, sizes: list[int], dtype: torch.dtype) -> None:
    network = build(NETWORKS[id], dtype)
    sizes = [size * network.N // 5 for size in sizes]
    sizes[-1] += network.N - sum(sizes)
    parts = [slice(a, b) for a, b in itertools.pairwise(np.cumsum([0, *sizes]))]
    batches = [(subset(network.X, part), network.y[part]) for part in parts]
    V = network.random("V", 2, network.P)
    G = ie.GGN(network.model, network.loss, batches)
    assert G.num_examples == network.N
    peer = partial(eager.ggn_products, network, V)
    assert_close(G.matmat(V), network.ggn_matmat(V), eager=peer)


def test_data_loaders_are_read_in_order(dtype: torch.dtype) -> None:
    network = build(NETWORKS["mlp-many"], dtype)
    loader = DataLoader(TensorDataset(network.X, network.y), batch_size=64)
    v = network.random("v", network.P)
    G = ie.GGN(network.model, network.loss, loader)
    assert_close(G @ v, network.ggn_matmat(v[None])[0], eager=partial(eager.ggn_product, network, v))


@in_float64
def test_order_of_examples_does_not_matter(problem: Network) -> None:
    order = torch.randperm(problem.N, generator=torch.Generator().manual_seed(problem.N))
    v = problem.random("v", problem.P)
    G = ie.GGN(problem.model, problem.loss, (subset(problem.X, order), problem.y[order]))
    peer = partial(eager.ggn_product, problem, v)
    assert_close(G @ v, problem.ggn_matmat(v[None])[0], scope=problem.case.scope, eager=peer)


@in_float64
def test_repeated_products_are_identical(problem: Network) -> None:
    V = problem.random("V", 3, problem.P)
    G = operator(problem)
    first = G.matmat(V)
    assert torch.equal(first, G.matmat(V))
    assert torch.equal(first, operator(problem).matmat(V))


@in_float64
def test_thread_counts_agree(problem: Network, threads: Callable[[int], None]) -> None:
    V = problem.random("V", 3, problem.P)
    peer = partial(eager.ggn_products, problem, V)
    for count in (1, 2):
        threads(count)
        G = operator(problem)
        product = G.matmat(V)
        assert_close(product, problem.ggn_matmat(V), scope=problem.case.scope, eager=peer)
        assert torch.equal(product, G.matmat(V))


def test_root_squares_to_the_matrix(small_problem: Network) -> None:
    G = operator(small_problem, damping=0.7)
    rows = G.root_rmatmat(torch.eye(G.num_roots, dtype=small_problem.dtype))
    assert rows.shape == (G.num_roots, small_problem.P)
    peer = partial(eager.ggn, small_problem)
    assert_close(rows.T @ rows, small_problem.ggn, scope=small_problem.case.scope, eager=peer)
    assert_close(
        G.root_gram(),
        rows.double() @ rows.double().T,
        scope=small_problem.case.scope,
        eager=lambda: rows @ rows.T,
    )


@in_float64
def test_root_and_its_transpose_are_adjoint(problem: Network) -> None:
    G = operator(problem)
    V, Y = problem.random("V", 3, problem.P), problem.random("Y", 3, G.num_roots)
    UV, UtY = G.root_matmat(V).double(), G.root_rmatmat(Y).double()
    assert UV.shape == (3, G.num_roots)
    assert UtY.shape == (3, problem.P)
    scale = float(UV.norm() * Y.double().norm() + UtY.norm() * V.double().norm())
    assert_close((UV * Y.double()).sum().to(V.dtype), (V.double() * UtY).sum(), scope=problem.case.scope, scale=scale)
    forms = (V.double() * problem.ggn_matmat(V)).sum(dim=1)
    peer = partial(eager.ggn_products, problem, V)
    assert_close(
        UV.square().sum(dim=1).to(V.dtype),
        forms,
        scope=problem.case.scope,
        eager=lambda: (V.double() * peer().double()).sum(dim=1),
        factor=2.0,
        because="squaring doubles the relative error of U v",
    )


@pytest.mark.parametrize("loss", ["ce-mean", "mse-sum"])
@pytest.mark.parametrize("schedule", ["auto", "by_example", "by_operator"])
def test_a_network_too_wide_for_a_dense_oracle(loss: str, schedule: Any, dtype: torch.dtype) -> None:
    """Widths and an N that are no multiples of any tile, V beyond one sweep; the oracle is PyTorch's own product in float64."""
    case = NetworkCase(f"wide-{loss}", lambda: mlp(61, 257, 131, 10, act=nn.GELU), normal(61), "wide", loss=loss,
                       num_examples=301)  # fmt: skip
    network, exact = Network(case, dtype), Network(case, dtype)
    exact.model, exact.X, exact.dtype = copy.deepcopy(network.model).double(), network.X.double(), torch.float64
    exact.y = network.y.double() if network.y.is_floating_point() else network.y
    V = torch.randn(21, sum(p.numel() for p in network.model.parameters()), generator=generator("wide"), dtype=dtype)
    product = operator(network, schedule=schedule).matmat(V)
    assert_close(product, eager.ggn_products(exact, V.double()), eager=partial(eager.ggn_products, network, V))


def test_inputs_by_name_may_come_in_any_order() -> None:
    """Two inputs of one shape: only the names tell them apart."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Difference().double()
    rng = generator("names")
    left, right, y = (torch.randn(5, k, generator=rng, dtype=torch.float64) for k in (3, 3, 2))
    v = torch.randn(32, generator=rng, dtype=torch.float64)
    one = ie.GGN(model, nn.MSELoss(), ({"left": left, "right": right}, y)) @ v
    other = ie.GGN(model, nn.MSELoss(), ({"right": right, "left": left}, y)) @ v
    swapped = ie.GGN(model, nn.MSELoss(), ({"left": right, "right": left}, y)) @ v
    assert_close(one, reference.ggn(model, nn.MSELoss(), {"left": left, "right": right}, y) @ v)
    assert torch.equal(other, one)
    assert not torch.allclose(swapped, one)


class Difference(nn.Module):
    """Tells its two inputs apart."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.head(torch.tanh(self.a(left)) - F.silu(self.b(right)))


def test_report_names_the_nodes() -> None:
    text = str(operator(build(NETWORKS["affine-everywhere"], torch.float64)).report())
    for word in ("linear", "affine", "tanh"):
        assert word in text


@st.composite
def architectures(draw: st.DrawFn) -> tuple[NetworkCase, int]:
    """A random network of the supported operators with inputs and a loss that fits, and a number of right-hand sides."""
    widths = [draw(st.integers(1, 9)) for _ in range(draw(st.integers(2, 5)))]
    positions = draw(st.sampled_from([(), (3,)]))
    acts = [draw(st.sampled_from(sorted(ACTIVATIONS))) for _ in widths]
    kinds = [draw(st.sampled_from(["plain", "residual", "affine", "nobias", "frozen", "tied"])) for _ in widths]
    loss = draw(st.sampled_from(["mse-mean", "mse-sum", "half-mse-mean", "ce-mean", "ce-sum", "bce-mean", "bce-sum"]))
    if loss.startswith("ce"):
        positions = ()
        widths[-1] = max(widths[-1], 2)
    N, num_rhs = draw(st.integers(1, 12)), draw(st.integers(1, 9))
    id = f"random-{widths}-{positions}-{acts}-{kinds}-{loss}-{N}"
    case = NetworkCase(id, lambda: Random(widths, acts, kinds), normal(*positions, widths[0]), "drawn", loss=loss,
                       num_examples=N)  # fmt: skip
    return case, num_rhs


class Random(nn.Module):
    """Layers between the given widths, each followed by an activation and wrapped in one of six ways."""

    def __init__(self, widths: list[int], acts: list[str], kinds: list[str]) -> None:
        super().__init__()
        self.kinds = kinds
        self.layers, self.inner, self.acts = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for num_in, num_out, act, kind in zip(widths[:-1], widths[1:], acts, kinds, strict=False):
            self.layers.append(nn.Linear(num_in, num_out, bias=kind != "nobias"))
            self.inner.append(nn.Linear(num_out, num_out) if kind in ("residual", "tied") else nn.Identity())
            self.acts.append(ACTIVATIONS[act]())
            if kind == "frozen" and len(self.layers) > 1:
                self.layers[-1].requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        for layer, inner, act, kind in zip(self.layers, self.inner, self.acts, self.kinds, strict=False):
            x = act(layer(x))
            if kind == "residual":
                x = x + act(inner(x))
            elif kind == "tied":
                x = inner(act(inner(x)))
            elif kind == "affine":
                x = 1.5 - x * 0.7
        return x


def check_random(drawn: tuple[NetworkCase, int]) -> None:
    """GGN products, per-example gradients and root of a random network."""
    case, num_rhs = drawn
    network = Network(case, torch.float64)
    V = network.random("V", num_rhs, network.P)
    G = operator(network)
    assert_close(G.matmat(V), network.ggn_matmat(V))
    grads = ie.per_example_grads(network.model, network.loss, network.data)
    assert_close(torch.cat([g.reshape(network.N, -1) for g in grads.values()], dim=1), network.grads)
    UV = G.root_matmat(V)
    assert_close(UV.square().sum(dim=1), (V * network.ggn_matmat(V)).sum(dim=1))


@settings(max_examples=25)
@given(architectures())
def test_random_networks(drawn: tuple[NetworkCase, int]) -> None:
    check_random(drawn)


@pytest.mark.slow
@settings(max_examples=400)
@given(architectures())
def test_many_random_networks(drawn: tuple[NetworkCase, int]) -> None:
    check_random(drawn)


class _Shared(nn.Module):
    """One layer of two calls (its gradient can only be added), three of one call (theirs are written), one of none (zeros)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared, self.unused, self.last = nn.Linear(24, 160), nn.Linear(160, 160), nn.Linear(8, 8), nn.Linear(160, 3)
        self.skipped = nn.Linear(160, 160, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.shared(torch.tanh(self.first(x))))
        return self.last(torch.tanh(self.shared(h)) + self.skipped(h))


@pytest.mark.parametrize("schedule", ["by_example", "by_operator"])
@pytest.mark.parametrize("N", [1, 30])
def test_a_product_does_not_depend_on_what_its_memory_held(N: int, schedule: str, threads: Callable[[int], None]) -> None:
    threads(2)
    model = _Shared().double()
    X, t = normal(24)(N, generator("X")), normal(3)(N, generator("t"))
    G = ie.GGN(model, nn.MSELoss(), (X, t), schedule=schedule)
    V = normal(G.shape[0])(2, generator("V"))
    theta = {name: p.detach() for name, p in model.named_parameters()}

    def outputs(p: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, p, (X,))

    expected = []
    for v in V:
        tangents = {
            name: part.view_as(p) for (name, p), part in zip(theta.items(), v.split([p.numel() for p in theta.values()]), strict=True)
        }
        z, t_z = torch.func.jvp(outputs, (theta,), (tangents,))
        (g,) = torch.func.vjp(outputs, theta)[1](2 * t_z / z.numel())
        expected.append(torch.cat([g[name].flatten() for name in theta]))
    G.matmat(V).fill_(torch.nan)  # freed at once, and kept for the next result
    torch.testing.assert_close(G.matmat(V), torch.stack(expected), rtol=1e-11, atol=1e-13)
