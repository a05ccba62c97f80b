"""Gradients of single examples, and what is computed from them without holding them."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import influence_ext as ie
from influence_ext import reference
from influence_ext.losses import resolve
from influence_ext.operators.per_example import ExampleGradients
from influence_ext.plan import Plan
from influence_ext.testing import assert_close
from tests.cases import Network, budget_of, build, eager, in_float64, subset
from tests.cases.models import NETWORKS
from tests.emulation import emulated_device


def flat(grads: dict[str, Tensor], N: int) -> Tensor:
    """``dict name -> [N, *shape]`` to ``[N, P]``."""
    return torch.cat([value.reshape(N, -1) for value in grads.values()], dim=1)


def test_gradients_match_the_loop_over_examples(problem: Network) -> None:
    grads = ie.per_example_grads(problem.model, problem.loss, problem.data)
    like = reference.trainable(problem.model)
    assert list(grads) == list(like)
    assert [g.shape for g in grads.values()] == [(problem.N, *p.shape) for p in like.values()]
    assert all(g.dtype == problem.dtype for g in grads.values())
    peer = partial(eager.per_example_grads, problem)
    assert_close(flat(grads, problem.N), problem.grads, scope=problem.case.scope, eager=peer)


@in_float64
def test_gradients_add_up_to_the_batch_gradient(problem: Network) -> None:
    grads = flat(ie.per_example_grads(problem.model, problem.loss, problem.data), problem.N)
    batch = reference.batch_gradient(problem.model, problem.loss_case.reduced(), *problem.data)
    scale = problem.factor * float(problem.grads.norm(dim=1).sum())
    total = problem.factor * grads.double().sum(dim=0)
    assert_close(total.to(problem.dtype), batch, scope=problem.case.scope, scale=scale,
                 eager=lambda: problem.factor * eager.per_example_grads(problem).sum(dim=0))  # fmt: skip


def test_norms(problem: Network) -> None:
    norms = ie.per_example_norms(problem.model, problem.loss, problem.data)
    peer = eager.per_example_grads(problem).norm(dim=1)
    assert_close(norms, problem.grads.norm(dim=1), scope=problem.case.scope, eager=peer)


def test_gram_matrix(problem: Network) -> None:
    gram = ie.grad_gram(problem.model, problem.loss, problem.data)
    G = eager.per_example_grads(problem)
    assert_close(gram, problem.grads @ problem.grads.T, scope=problem.case.scope, eager=G @ G.T)
    assert torch.equal(gram, gram.T)


@in_float64
def test_squared_norms_are_the_diagonal_of_the_gram_matrix(problem: Network) -> None:
    gram = ie.grad_gram(problem.model, problem.loss, problem.data)
    norms = ie.per_example_norms(problem.model, problem.loss, problem.data)
    assert_close(norms.square(), gram.diagonal().double(), scope=problem.case.scope,
                 eager=lambda: eager.per_example_grads(problem).square().sum(dim=1))  # fmt: skip


@in_float64
def test_gram_matrix_of_two_sets(problem: Network) -> None:
    rows, columns = slice(0, max(1, problem.N // 2)), slice(0, None, 2)
    left = (subset(problem.X, rows), problem.y[rows])
    right = (subset(problem.X, columns), problem.y[columns])
    gram = ie.grad_gram(problem.model, problem.loss, left, right)
    G = eager.per_example_grads(problem)
    expected = problem.grads[rows] @ problem.grads[columns].T
    assert_close(gram, expected, scope=problem.case.scope, eager=G[rows] @ G[columns].T)


def test_dots(problem: Network) -> None:
    V = problem.random("V", 8, problem.P)
    dots = ie.per_example_dots(problem.model, problem.loss, problem.data, V)
    peer = eager.per_example_grads(problem) @ V.T
    assert_close(dots, problem.grads @ V.double().T, scope=problem.case.scope, eager=peer)
    single = ie.per_example_dots(problem.model, problem.loss, problem.data, V[5])
    assert_close(single, dots[:, 5].double(), scope=problem.case.scope, scale=float(dots.double().norm()))


@in_float64
def test_repeated_calls_are_identical(problem: Network) -> None:
    for call in (ie.per_example_norms, ie.grad_gram):
        assert torch.equal(call(problem.model, problem.loss, problem.data), call(problem.model, problem.loss, problem.data))


@in_float64
def test_an_example_does_not_see_the_others(problem: Network) -> None:
    """The gradient is of the example's own loss: neither 1/N nor the batch it came in with enters."""
    grads = flat(ie.per_example_grads(problem.model, problem.loss, problem.data), problem.N)
    for n in {0, problem.N - 1}:
        alone = (subset(problem.X, slice(n, n + 1)), problem.y[n : n + 1])
        single = flat(ie.per_example_grads(problem.model, problem.loss, alone), 1)[0]
        assert_close(single, grads[n].double(), scope=problem.case.scope, scale=float(problem.grads.norm(dim=1).max()))


@pytest.mark.parametrize("id", ["mlp-tanh", "tied-transpose", "tied-modules", "tied-layer", "mixer"])
def test_sub_spaces(id: str, dtype: torch.dtype) -> None:
    network = build(NETWORKS[id], dtype)
    like = reference.trainable(network.model)
    sizes = [p.numel() for p in like.values()]
    blocks = dict(zip(like, eager.per_example_grads(network).split(sizes, dim=1), strict=True))
    for name in like:
        grads = ie.per_example_grads(network.model, network.loss, network.data, params=[name])
        assert list(grads) == [name]
        expected = reference.per_example_grads(network.model, network.loss_case.oracle(), *network.data, params=[name])
        assert_close(grads[name].reshape(network.N, -1), expected, eager=blocks[name])


@pytest.mark.parametrize("id", ["mlp-ce", "two-inputs", "named-inputs"])
def test_batches_are_one_data_set(id: str, dtype: torch.dtype) -> None:
    network = build(NETWORKS[id], dtype)
    batches = [(subset(network.X, part), network.y[part]) for part in (slice(0, 2), slice(2, 3), slice(3, None))]
    whole = ie.grad_gram(network.model, network.loss, network.data)
    assert_close(ie.grad_gram(network.model, network.loss, batches), whole.double())
    norms = ie.per_example_norms(network.model, network.loss, batches)
    assert_close(norms, network.grads.norm(dim=1), eager=lambda: eager.per_example_grads(network).norm(dim=1))


def test_gram_matrix_of_many_examples(dtype: torch.dtype) -> None:
    """More examples than a block of the upper half holds, several roots; a shared layer, one without a bias, one with a frozen weight."""
    torch.manual_seed(0)
    shared = nn.Linear(5, 5)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), shared, nn.Tanh(), shared, nn.Linear(5, 6, bias=False), nn.Linear(6, 3)).to(dtype)
    model[-1].weight.requires_grad_(False)
    X, y = torch.randn(150, 4, dtype=dtype), torch.randint(3, (150,))
    exact = copy.deepcopy(model).double()
    rows = reference.per_example_grads(exact, nn.CrossEntropyLoss(), X.double(), y)
    gram = ie.grad_gram(model, "cross_entropy", (X, y))
    assert torch.equal(gram, gram.T)
    assert_close(gram, rows @ rows.T)
    assert_close(ie.grad_gram(model, "cross_entropy", (X, y), (X[:70], y[:70])), rows @ rows[:70].T)
    roots = ie.GGN(model, "cross_entropy", (X, y)).root_gram()
    U = ie.GGN(exact, "cross_entropy", (X.double(), y)).root_rmatmat(torch.eye(len(roots), dtype=torch.float64))
    assert torch.equal(roots, roots.T)
    assert_close(roots, U @ U.T)


@pytest.mark.parametrize("size", [8, 40])
def test_gradients_that_leave_the_cache_are_the_same(size: int, dtype: torch.dtype) -> None:
    """Rows that are written past the caches, at every alignment, with lines of whole vectors and of others."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(size, 129), nn.Tanh(), nn.Linear(129, 640), nn.Tanh(), nn.Linear(640, 3)).to(dtype)
    N = 1 + (1 << 28) // (85_000 * dtype.itemsize)  # 256 MB: more than three quarters of most last-level caches
    X, y = torch.randn(N, size, dtype=dtype), torch.randint(3, (N,))
    grads = flat(ie.per_example_grads(model, "cross_entropy", (X, y)), N)
    some = torch.tensor([0, 1, 2, 3, N // 2, N - 1])
    assert_close(grads[some], flat(ie.per_example_grads(model, "cross_entropy", (X[some], y[some])), len(some)).double())


class _Positions(nn.Module):
    """Weights that few positions share: of convolutions on planes of 4 × 4 and 2 × 2, wide and in groups, and of a linear layer on rows."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.grouped, self.pool = nn.Conv2d(3, 40, 3, padding=1), nn.Conv2d(40, 40, 3, padding=1, groups=8), nn.MaxPool2d(2)
        self.deep, self.rows, self.head = nn.Conv2d(40, 37, 3, padding=1), nn.Linear(4, 7), nn.Linear(37 * 7, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.deep(self.pool(torch.tanh(self.grouped(torch.relu(self.wide(x)))))))
        return self.head(torch.tanh(self.rows(h.flatten(2))).flatten(1))


@pytest.mark.parametrize("num_vectors", [1, 2, 9])
def test_weights_that_few_positions_share(num_vectors: int, dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    model, loss = _Positions().to(dtype), nn.CrossEntropyLoss()
    X, y = torch.randn(13, 3, 4, 4, dtype=dtype), torch.randint(3, (13,))
    grads = reference.per_example_grads(model, loss, X, y)
    V = torch.randn(num_vectors, grads.shape[1], dtype=dtype)
    dots = ie.per_example_dots(model, loss, (X, y), V)
    assert_close(dots, grads @ V.double().T)
    assert_close(ie.grad_gram(model, loss, (X, y)), grads @ grads.T)
    assert_close(ie.grad_gram(model, loss, (X, y), (X[:6], y[:6])), grads @ grads[:6].T)


class _Mean(nn.Module):
    """A convolution that takes planes of any size."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 40, 3), nn.Linear(40, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.conv(x)).mean((2, 3)))


def test_gram_matrix_of_sets_of_different_shapes() -> None:
    """One position, few and many: the plans hold the gradient of one weight as outer products or formed."""
    torch.manual_seed(0)
    model, loss, y = _Mean().double(), nn.CrossEntropyLoss(), torch.randint(3, (6,))
    sets = [(torch.randn(6, 3, size, size, dtype=torch.float64), y) for size in (3, 4, 14)]
    grads = [reference.per_example_grads(model, loss, *data) for data in sets]
    for left, G in zip(sets, grads, strict=True):
        for right, H in zip(sets, grads, strict=True):
            assert_close(ie.grad_gram(model, loss, left, right), G @ H.T)


class _Wide(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.rows, self.head = nn.Linear(width, 4), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.rows(x)).flatten(1))


@pytest.mark.parametrize("width", [100, 12_000, 44_000])
def test_gram_matrix_of_the_root_of_wide_layers(width: int) -> None:
    """More roots than positions: all rows of the weight formed at a time, one of them, or no row of all roots, as 32 MiB have room for."""
    torch.manual_seed(0)
    model = _Wide(width).double()
    G = ie.GGN(model, "cross_entropy", (torch.randn(20, 2, width, dtype=torch.float64), torch.randint(5, (20,))))
    roots = G.root_gram()
    U = G.root_rmatmat(torch.eye(len(roots), dtype=torch.float64))
    assert torch.equal(roots, roots.T)
    assert_close(roots, U @ U.T)


class _Runs(nn.Module):
    """Sequences of any length, which read other runs of one table; ``read(model, T)`` gives the positions' rows."""

    def __init__(self, read: Callable[[Any, int], Tensor]) -> None:
        super().__init__()
        self.table, self.read = nn.Embedding(12, 4), read
        self.rows, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(torch.tanh(self.rows(x) + self.read(self, x.shape[1])).mean(1))
        return y


def _interpolated(model: Any, T: int) -> Tensor:
    """As position embeddings of images are resized: a plan has an expression of the table, or the table as it is where that fits."""
    w = model.table.weight
    return w if T == 12 else nn.functional.interpolate(w.T[None], T, mode="linear")[0].T


RUNS: dict[str, Callable[[Any, int], Tensor]] = {
    "first": lambda m, T: m.table.weight[:T],
    "last": lambda m, T: m.table.weight[12 - T :],
    "numbers": lambda m, T: m.table(torch.arange(T)),
    "ends": lambda m, T: m.table.weight[:T] + m.table.weight[12 - T :],
    "interpolated": _interpolated,
}


class _Slices(nn.Module):
    """Two slices of one parameter that overlap, each over a sequence of its own, which may be empty."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 4))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return nn.functional.linear(a, self.w[2:5]).sum(1) + nn.functional.linear(b, self.w[0:3]).sum(1)


@pytest.mark.parametrize("lengths", [(1, 0), (0, 1), (2, 0), (2, 3)])
def test_slices_that_overlap_where_one_adds_nothing(lengths: tuple[int, int]) -> None:
    torch.manual_seed(0)
    model, factors, expected = _Slices().double(), [], []
    for T, S in (lengths, lengths[::-1]):
        X = torch.randn(3, T, 4, dtype=torch.float64), torch.randn(3, S, 4, dtype=torch.float64)
        g = torch.randn(1, 3, 3, dtype=torch.float64)
        jacobian = torch.func.jacrev(lambda w, X=X: torch.func.functional_call(model, {"w": w}, X))(model.w.detach())
        expected.append(torch.einsum("no,nop->np", g[0], jacobian.reshape(3, 3, -1)))
        factors.append(Plan.of(model, X).linearize(X).factors(g))
        assert_close(factors[-1].square_sum(), expected[-1].square().sum(0))
    assert_close(factors[0].gram(factors[1]), expected[0] @ expected[1].T)


@pytest.mark.parametrize("device", ["cpu", "emulated"])
@pytest.mark.parametrize("read", RUNS)
def test_gram_matrix_of_sets_that_read_other_runs_of_a_parameter(read: str, device: str) -> None:
    """Runs of one table that contain one another, overlap, meet in one row, or have several of the other set's in them; also in chunks."""
    torch.manual_seed(0)
    model, loss = _Runs(RUNS[read]).double(), resolve(nn.MSELoss())
    with emulated_device() if device == "emulated" else contextlib.nullcontext():
        sides: list[list[ExampleGradients]] = []
        grads = []
        for N, T in ((5, 3), (4, 8), (3, 12), (6, 1)):
            X, y = torch.randn(N, T, 3, dtype=torch.float64), torch.randn(N, 2, dtype=torch.float64)
            plan = Plan.of(model, X)
            tapes = [plan.linearize(X)]
            if T == 8:
                budget = budget_of(2, lambda budget, plan=plan, X=X: plan.linearize(X, memory_budget=budget))  # type: ignore[misc]
                tapes.append(plan.linearize(X, memory_budget=budget))
                assert tapes[1].chunk is not None
            sides.append([ExampleGradients.on(tape, loss, y, "test") for tape in tapes])
            grads.append(reference.per_example_grads(model, nn.MSELoss(), X, y))
        for left, G in zip(sides, grads, strict=True):
            for right, H in zip(sides, grads, strict=True):
                for mine in left:
                    for theirs in right:
                        assert_close(mine.gram(theirs), G @ H.T)


class _Sum(nn.Module):
    """Of sequences of any length, also none."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(torch.tanh(self.rows(x)).sum(1))
        return y


@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_gram_matrix_of_nothing(device: str) -> None:
    """No right-hand side, no example, and sequences without a position, whose shared weights have no gradient."""
    torch.manual_seed(0)
    model, X, empty = _Sum().double(), torch.randn(6, 5, 3, dtype=torch.float64), torch.randn(4, 0, 3, dtype=torch.float64)
    with emulated_device() if device == "emulated" else contextlib.nullcontext():
        plan = Plan.of(model, X)
        some = plan.linearize(X).factors(torch.randn(2, 6, 2, dtype=torch.float64))
        no_vector = plan.linearize(X).factors(torch.empty(0, 6, 2, dtype=torch.float64))
        no_example = plan.linearize(X[:0]).factors(torch.empty(3, 0, 2, dtype=torch.float64))
        for none in (no_vector, no_example):
            assert some.gram(none).shape == (12, 0)
            assert none.gram(some).shape == (0, 12)
            assert none.gram(none).shape == (0, 0)
        G = torch.randn(1, 4, 2, dtype=torch.float64)
        factors = Plan.of(model, empty).linearize(empty).factors(G)
        rows, expected = factors.materialise()[0], torch.zeros(4, 26, dtype=torch.float64)
        expected[:, 24:] = G[0]  # the sum is zero: of all parameters, only the head's bias has a gradient
        assert torch.equal(rows, expected)
        assert_close(factors.gram(factors), expected @ expected.T)
        assert_close(factors.gram(some), expected @ some.materialise().flatten(0, 1).T)
        assert_close(factors.square_norms()[0], expected.square().sum(dim=1))
