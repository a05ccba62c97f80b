"""Jacobian products at the network output, over all layer and model rows."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, jvp, vjp

import influence_ext as ie
from influence_ext.plan import Plan
from influence_ext.testing import assert_close
from tests.cases import Network, build, eager, in_float64, subset
from tests.cases.models import NETWORKS


def expected_jvp(network: Network, V: Tensor) -> Tensor:
    """Float64 ``[V, N, *out]``."""
    flat = torch.einsum("ncp,vp->vnc", network.jacobian, V.double())
    return flat.reshape(V.shape[0], *network.outputs.shape)


def expected_vjp(network: Network, G: Tensor) -> Tensor:
    """Float64 ``[V, P]``."""
    return torch.einsum("ncp,vnc->vp", network.jacobian, G.double().reshape(G.shape[0], network.N, -1))


def test_jvp_matches_the_jacobian(network: Network) -> None:
    V, scope = network.random("V", 8, network.P), network.case.scope
    T = ie.jvp(network.model, network.X, V)
    assert_close(T, expected_jvp(network, V), scope=scope, eager=partial(eager.jacobian_products, network, V))
    assert_close(ie.jvp(network.model, network.X, V[:3]), T[:3].double(), scope=scope)
    single = ie.jvp(network.model, network.X, V[5])
    assert_close(single, T[5].double(), scope=scope)
    assert single.shape == network.outputs.shape


def test_vjp_matches_the_jacobian(network: Network) -> None:
    G, scope = network.random("G", 8, *network.outputs.shape), network.case.scope
    W = ie.vjp(network.model, network.X, G)
    assert_close(W, expected_vjp(network, G), scope=scope, eager=partial(eager.jacobian_transpose_products, network, G))
    assert_close(ie.vjp(network.model, network.X, G[:3]), W[:3].double(), scope=scope)
    single = ie.vjp(network.model, network.X, G[5])
    assert_close(single, W[5].double(), scope=scope)
    assert single.shape == (network.P,)


@in_float64
def test_adjoint_identity(network: Network) -> None:
    v, g = network.random("v", network.P), network.random("g", *network.outputs.shape)
    t, w = ie.jvp(network.model, network.X, v), ie.vjp(network.model, network.X, g)
    assert_close(
        (t.double() * g.double()).sum().to(network.dtype),
        (w.double() * v.double()).sum(),
        scope=network.case.scope,
        scale=float(t.double().norm() * g.double().norm() + w.double().norm() * v.double().norm()),
    )


@in_float64
def test_repeated_calls_are_identical(network: Network) -> None:
    V, G = network.random("V", 3, network.P), network.random("G", 3, *network.outputs.shape)
    assert torch.equal(ie.jvp(network.model, network.X, V), ie.jvp(network.model, network.X, V))
    assert torch.equal(ie.vjp(network.model, network.X, G), ie.vjp(network.model, network.X, G))


@in_float64
def test_examples_do_not_touch_each_other(network: Network) -> None:
    order = torch.randperm(network.N, generator=torch.Generator().manual_seed(network.N))
    v = network.random("v", network.P)
    whole = ie.jvp(network.model, network.X, v)
    permuted = ie.jvp(network.model, subset(network.X, order), v)
    scale = float(whole.double().norm())
    assert_close(permuted, whole[order].double(), scope=network.case.scope, scale=scale)
    half = network.N // 2
    if half:
        parts = [ie.jvp(network.model, subset(network.X, part), v) for part in (slice(0, half), slice(half, None))]
        assert_close(torch.cat(parts), whole.double(), scope=network.case.scope, scale=scale)


@in_float64
def test_vjp_adds_up_over_examples(network: Network) -> None:
    g = network.random("g", *network.outputs.shape)
    whole = ie.vjp(network.model, network.X, g)
    singles = [ie.vjp(network.model, subset(network.X, slice(n, n + 1)), g[n : n + 1]) for n in range(network.N)]
    total = torch.stack(singles).double().sum(dim=0)
    scale = float(torch.stack(singles).double().norm(dim=1).sum())
    assert_close(whole, total, scope=network.case.scope, scale=scale)


@in_float64
def test_zero_in_zero_out(network: Network) -> None:
    zero_v, zero_g = torch.zeros(network.P, dtype=network.dtype), torch.zeros_like(network.outputs, dtype=network.dtype)
    assert torch.count_nonzero(ie.jvp(network.model, network.X, zero_v)) == 0
    assert torch.count_nonzero(ie.vjp(network.model, network.X, zero_g)) == 0


@pytest.mark.parametrize("id", ["mlp-tanh", "mixer", "tied-transpose"])
def test_vectors_may_be_strided(id: str, dtype: torch.dtype) -> None:
    network = build(NETWORKS[id], dtype)
    wide = network.random("wide", 2 * network.P, 6)
    V = wide.T[1::2, ::2]
    assert not V.is_contiguous()
    G = network.random("G", *reversed(network.outputs.shape), 3).permute(*reversed(range(network.outputs.dim() + 1)))
    assert not G.is_contiguous()
    assert torch.equal(ie.jvp(network.model, network.X, V), ie.jvp(network.model, network.X, V.contiguous()))
    assert torch.equal(ie.vjp(network.model, network.X, G), ie.vjp(network.model, network.X, G.contiguous()))


def test_products_are_taken_at_the_parameters_of_the_moment(dtype: torch.dtype) -> None:
    network = build(NETWORKS["mlp-tanh"], dtype)
    model, v = copy.deepcopy(network.model), network.random("v", network.P)
    before = ie.jvp(model, network.X, v)
    assert torch.equal(before, ie.jvp(network.model, network.X, v))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    moved = Network(network.case, dtype)
    moved.model = model
    after = ie.jvp(model, network.X, v)
    assert not torch.allclose(after, before)
    assert_close(after, expected_jvp(moved, v[None])[0], eager=partial(eager.jacobian_product, moved, v))


def test_buffers_are_read_at_the_moment_too(dtype: torch.dtype) -> None:
    network = build(NETWORKS["normalise-input"], dtype)
    model, v = copy.deepcopy(network.model), network.random("v", network.P)
    ie.jvp(model, network.X, v)
    model.std.mul_(3.0)
    moved = Network(network.case, dtype)
    moved.model = model
    assert_close(ie.jvp(model, network.X, v), expected_jvp(moved, v[None])[0], eager=partial(eager.jacobian_product, moved, v))


def test_more_vectors_than_one_sweep_takes() -> None:
    """A sweep takes as many right-hand sides as the cache holds beside one another; the last group is shorter."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 3)).double()
    X, y, P = torch.randn(30, 20).double(), torch.randint(0, 3, (30,)), sum(p.numel() for p in model.parameters())
    theta, flat = dict(model.named_parameters()), torch.cat([p.detach().reshape(-1) for p in model.parameters()])

    def outputs(vector: Tensor) -> Tensor:
        parts = vector.split([p.numel() for p in theta.values()])
        return functional_call(model, {k: v.view_as(p) for (k, p), v in zip(theta.items(), parts, strict=True)}, (X,))

    V, G = torch.randn(19, P).double(), torch.randn(19, 30, 3).double()
    assert_close(ie.jvp(model, X, V), torch.stack([jvp(outputs, (flat,), (v,))[1] for v in V]))
    pull = vjp(outputs, flat)[1]
    assert_close(ie.vjp(model, X, G), torch.stack([pull(g)[0] for g in G]))
    gradient = grad(lambda vector: nn.functional.cross_entropy(outputs(vector), y))
    assert_close(ie.Hessian(model, nn.CrossEntropyLoss(), (X, y)).matmat(V), torch.stack([jvp(gradient, (flat,), (v,))[1] for v in V]))
    rows = jacrev(lambda vector: nn.functional.cross_entropy(outputs(vector), y, reduction="none"))(flat)
    assert_close(ie.per_example_dots(model, nn.CrossEntropyLoss(), (X, y), V), rows @ V.T)
    tape = Plan.of(model, X).linearize(X)
    assert tape.workspace_bytes(0) <= tape.workspace_bytes(1) < tape.workspace_bytes(19) <= tape.workspace_bytes(1000)
