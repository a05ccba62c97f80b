"""Gradients of single examples, and what is computed from them without holding them."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import influence_ext as ie
from influence_ext import reference
from influence_ext.testing import assert_close
from tests.cases import Network, build, eager, in_float64, subset
from tests.cases.models import NETWORKS


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
