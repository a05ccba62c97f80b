"""The operator tables, the losses and the influence functions on a GPU, against the same float64 oracles on the CPU."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

import influence_ext as ie
from influence_ext import reference
from influence_ext.errors import DeviceError
from influence_ext.losses import resolve
from influence_ext.plan import Plan
from influence_ext.testing import assert_close
from tests.cases import Network, NetworkCase, build, cast, generator
from tests.cases.families import RULE_ROWS
from tests.cases.losses import LOSSES, LossCase
from tests.test_families import row

__all__ = ["row"]

pytestmark = pytest.mark.gpu


def on_gpu(x: Any) -> Any:
    """The same in the GPU's memory."""
    if isinstance(x, Mapping):
        return {key: on_gpu(value) for key, value in x.items()}
    return x.cuda() if isinstance(x, Tensor) else tuple(on_gpu(value) for value in x)


def test_every_product(row: Network) -> None:
    model, X, y = copy.deepcopy(row.model).cuda(), on_gpu(row.X), on_gpu(row.y)
    tape = Plan.of(model, X).linearize(X)
    scope = row.case.scope
    assert_close(tape.outputs.cpu(), row.outputs, scope=scope)
    V, G = row.random("V", 5, row.P), row.random("G", 3, *row.outputs.shape)
    tangents = torch.einsum("ncp,vp->vnc", row.jacobian, V.double()).reshape(5, *row.outputs.shape)
    cotangents = torch.einsum("ncp,vnc->vp", row.jacobian, G.double().reshape(3, row.N, -1))
    assert_close(tape.jvp(V.cuda()).cpu(), tangents, scope=scope)
    assert_close(tape.vjp(G.cuda()).cpu(), cotangents, scope=scope)
    hessian = resolve(row.loss).hessian(tape.outputs, y).scaled(row.factor)
    first = tape.ggn(V.cuda(), hessian)
    assert first.device == tape.outputs.device
    assert_close(first.cpu(), row.ggn_matmat(V), scope=scope)
    assert torch.equal(first, tape.ggn(V.cuda(), hessian)), "products do not repeat"


@pytest.mark.parametrize("case", RULE_ROWS, ids=lambda case: case.id)
def test_hessian(case: NetworkCase) -> None:
    network = build(case, torch.float64)
    V = network.random("V", 3, network.P)
    H = ie.Hessian(copy.deepcopy(network.model).cuda(), network.loss, (on_gpu(network.X), on_gpu(network.y)))
    assert_close(H.matmat(V.cuda()).cpu(), network.hessian_matmat(V), scope=case.scope)


def test_every_per_example_quantity(row: Network) -> None:
    model, data = copy.deepcopy(row.model).cuda(), (on_gpu(row.X), on_gpu(row.y))
    scope = row.case.scope
    grads = ie.per_example_grads(model, row.loss, data)
    assert_close(torch.cat([g.reshape(row.N, -1) for g in grads.values()], dim=1).cpu(), row.grads, scope=scope)
    assert_close(ie.per_example_norms(model, row.loss, data).cpu(), row.grads.norm(dim=1), scope=scope)
    assert_close(ie.grad_gram(model, row.loss, data).cpu(), row.grads @ row.grads.T, scope=scope)


@pytest.mark.parametrize("case", LOSSES.values(), ids=lambda case: case.id)
def test_every_loss(case: LossCase) -> None:
    rng = generator(case.id)
    z = case.outputs(6, rng).requires_grad_()
    y = cast(case.targets(z.detach(), rng), torch.float64)
    loss, oracle = resolve(case.make()), case.oracle()
    values = torch.stack([oracle(z[n : n + 1], y[n : n + 1]) for n in range(6)])
    (gradients,) = torch.autograd.grad(values.sum(), z)
    z = z.detach().cuda()
    assert_close(loss.value(z, y.cuda()).cpu(), values.detach(), scope="model")
    assert_close(loss.gradient(z, y.cuda()).cpu(), gradients, scope="model")


def test_streams_and_solvers() -> None:
    """A product on a stream of its own, and scores by CG, agree with the CPU's."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3)).double()
    X, y = torch.randn(40, 6, dtype=torch.float64), torch.randint(3, (40,))
    here = ie.Influence(model, torch.nn.CrossEntropyLoss(), (X, y), damping=1e-2).scores((X[:5], y[:5]))
    model, X, y = copy.deepcopy(model).cuda(), X.cuda(), y.cuda()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        there = ie.Influence(model, torch.nn.CrossEntropyLoss(), (X, y), damping=1e-2).scores((X[:5], y[:5]))
    stream.synchronize()
    assert_close(there.values.cpu(), here.values.cpu(), scope="model")


@pytest.mark.parametrize(("precision", "limit"), [("full", 2e-6), ("tf32", 2e-3), ("bfloat16", 2e-2)])
def test_precisions_of_the_matrix_product(precision: Any, limit: float) -> None:
    """Relative error of a GGN product of an MLP 256-256-10 against float64: float32 has 24 bits, TF32 11, bfloat16 8."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.Tanh(), torch.nn.Linear(256, 10))
    X, y, loss = torch.randn(128, 256), torch.randint(10, (128,)), torch.nn.CrossEntropyLoss()
    V = torch.randn(2, sum(p.numel() for p in model.parameters()))
    exact = reference.ggn_products(model, torch.nn.functional.cross_entropy, X, y, V)
    product = ie.GGN(copy.deepcopy(model).cuda(), loss, (X.cuda(), y.cuda()), precision=precision).matmat(V.cuda()).cpu().double()
    error = float((product - exact).norm() / exact.norm())
    assert error < limit
    assert precision == "full" or error > 1e-5, "full precision where less was asked for"


def test_a_tensor_elsewhere_is_refused() -> None:
    model = torch.nn.Linear(3, 2).cuda()
    with pytest.raises(DeviceError, match="parameters' device"):
        ie.GGN(model, torch.nn.MSELoss(), (torch.randn(4, 3), torch.randn(4, 2)))
