"""Parameters that are read in part, beyond single products: sub-spaces, other points, recomputed chunks, regions, many sets at once."""

from __future__ import annotations

import bisect
import unittest.mock
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import influence_ext as ie
from influence_ext import reference
from influence_ext.capture import elements
from influence_ext.capture.generic import NodeOperator
from influence_ext.data import load
from influence_ext.losses import resolve
from influence_ext.plan import Plan
from influence_ext.testing import assert_close
from tests.cases import NetworkCase, build
from tests.cases.layers import Expression, parameter
from tests.cases.reads import GPT, PADDED, Bert, ViT

MODELS = ("bert", "vit")
N = 7


def problem(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    if name == "bert":
        return Bert(padding=1).double().eval(), torch.randint(0, 19, (N, 5)), torch.randint(0, 3, (N,))
    return ViT(early=True).double().eval(), torch.randn(N, 4, 4, dtype=torch.float64), torch.randint(0, 3, (N,))


def gradients(model: nn.Module, theta: dict[str, Tensor], X: Tensor, cotangents: Tensor) -> Tensor:
    """``[N, P]`` by autograd, an example after the other."""
    rows = []
    for n in range(len(X)):
        leaves = {name: t.clone().requires_grad_() for name, t in theta.items()}
        output = torch.func.functional_call(model, leaves, (X[n : n + 1],))
        found = torch.autograd.grad(output, list(leaves.values()), cotangents[n : n + 1], materialize_grads=True, allow_unused=True)
        rows.append(torch.cat([g.reshape(-1) for g in found]))
    return torch.stack(rows)


@pytest.mark.parametrize("name", MODELS)
def test_sub_spaces_and_recomputed_chunks(name: str) -> None:
    model, X, y = problem(name)
    dense = reference.ggn(model, F.cross_entropy, X, y)
    G = ie.GGN(model, nn.CrossEntropyLoss(), (X, y))
    V = torch.randn(3, len(dense), dtype=torch.float64)
    assert_close(G.matmat(V), V @ dense)
    chunked = ie.GGN(model, nn.CrossEntropyLoss(), (X, y), memory_budget=max(40000, G.cached_bytes // 2))
    assert_close(chunked.matmat(V), V @ dense)
    space = Plan.of(model, X).space
    where = dict(zip(space.names, zip(space.offsets, space.sizes, strict=True), strict=True))
    names = [n for n in space.names if n.startswith("positions")]
    for chosen in (names + ["head.weight"], [n for n in space.names if n not in names]):
        part = ie.GGN(model, nn.CrossEntropyLoss(), (X, y), params=chosen)
        index = torch.cat([torch.arange(o, o + s) for o, s in (where[n] for n in part._tape.plan.space.names)])
        V = torch.randn(2, len(index), dtype=torch.float64)
        assert_close(part.matmat(V), V @ dense[index][:, index])


@pytest.mark.parametrize("name", MODELS)
def test_per_example_quantities_at_another_point(name: str) -> None:
    model, X, _ = problem(name)
    plan = Plan.of(model, X)
    tape, space = plan.linearize(X), plan.space
    theta = tape.theta + torch.randn_like(tape.theta) / 10
    tape.relinearize(theta)
    g = torch.randn_like(tape.outputs)
    rows = gradients(model, space.unflatten(theta), X, g)
    factors = tape.factors(g[None])
    assert_close(factors.materialise(None)[0], rows)
    assert_close(factors.square_norms()[0], rows.square().sum(dim=1))
    assert_close(factors.square_sum(), rows.square().sum(dim=0))
    assert_close(factors.gram(factors), rows @ rows.T)
    U = torch.randn(2, len(theta), dtype=torch.float64)
    assert_close(factors.dots(U)[0], U @ rows.T)
    norms = torch.zeros(len(space.names), N, dtype=torch.float64)
    for begin, found in factors.square_norms_by_region().items():
        norms[bisect.bisect_right(space.offsets, begin) - 1] += found[0]
    assert_close(norms, torch.stack([part.square().sum(dim=1) for part in rows.split(list(space.sizes), dim=1)]))


@pytest.mark.parametrize("make", [lambda: Bert(padding=1), GPT], ids=["bert", "gpt"])
def test_many_sets_at_once(make: Callable[[], nn.Module]) -> None:
    """Training steps of several parameter sets, which an expression of parameters would have kept from the core."""
    torch.manual_seed(1)
    model, X = make().double().eval(), torch.randint(0, 11, (N, 6))
    shape = model(X).shape
    y = torch.randint(0, shape[-1], shape[:-1])
    criterion = nn.CrossEntropyLoss(reduction="sum") if len(shape) == 2 else nn.MSELoss(reduction="sum")
    targets = y if len(shape) == 2 else torch.randn(shape, dtype=torch.float64)
    plan = Plan.of(model, X)
    ensemble = plan.ensemble(load((X, targets), who="test"), resolve(criterion))
    assert ensemble is not None
    own = plan.space.values(model)
    theta = own + torch.randn(3, len(own), dtype=torch.float64) / 10
    batch = torch.arange(N)
    found = ensemble.gradients(theta, [batch], scale=1.0, kept=[torch.ones(3, N, dtype=torch.bool)])
    for t, gradient in zip(theta, found, strict=True):
        leaves = {name: value.clone().requires_grad_() for name, value in plan.space.unflatten(t).items()}
        tied = {alias: leaves[name] for alias, name in plan.space.aliases.items()}
        loss = criterion(torch.func.functional_call(model, {**leaves, **tied}, (X,)), targets)
        expected = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(leaves.values()))])
        assert_close(gradient, expected)


@pytest.mark.parametrize("case", PADDED, ids=lambda case: case.id)
def test_padding_rows_in_what_torch_differentiates(case: NetworkCase) -> None:
    """Forward and reverse mode agree on the row that takes no derivative; the oracle is reverse mode alone."""
    network = build(case, torch.float64)
    model, X = network.model, network.X
    plan = Plan.of(model, X)
    assert plan.has_derived_parameters or any(node.operator is not None for node in plan.graph.nodes)
    tape = plan.linearize(X)
    shape, own = tape.outputs.shape, {name: p.detach() for name, p in model.named_parameters()}
    units = torch.eye(tape.outputs[0].numel(), dtype=torch.float64)
    J = torch.stack([gradients(model, own, X, unit.view(1, *shape[1:]).expand(shape)) for unit in units], dim=1)
    V, G, targets = (
        torch.randn(3, J.shape[2], dtype=torch.float64),
        torch.randn(2, *shape, dtype=torch.float64),
        torch.randn_like(tape.outputs),
    )
    rows = torch.einsum("ncp,vnc->vnp", J, G.flatten(2))
    assert_close(tape.jvp(V), torch.einsum("ncp,vp->vnc", J, V).reshape(3, *shape))
    assert_close(tape.vjp(G), rows.sum(dim=1))
    assert_close(tape.factors(G).dots(V), torch.einsum("vnp,wp->vwn", rows, V))
    loss = nn.MSELoss(reduction="sum")
    ggn = ie.GGN(model, loss, (X, targets)).matmat(torch.eye(J.shape[2], dtype=torch.float64))
    assert_close(ggn, 2 * torch.einsum("ncp,ncq->pq", J, J))
    leaves = list(model.parameters())
    first = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss(model(X), targets), leaves, create_graph=True)])
    second = [torch.autograd.grad(first, leaves, v, retain_graph=True) for v in V]
    products = torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in second])
    assert_close(ie.Hessian(model, loss, (X, targets)).matmat(V), products)


def test_padding_rows_in_a_step_of_a_generic_node() -> None:
    """Rows of another precision are no value of the plan: they are computed within the node that reads them."""
    model = Expression(lambda m, x: F.embedding(x, m.w.float(), padding_idx=0).to(x.device, torch.float64).tanh(), w=parameter(5, 3))
    X = torch.randint(0, 5, (N, 4))
    plan = Plan.of(model, X)
    steps = [step.target for node in plan.graph.nodes if isinstance(node.operator, NodeOperator) for step in node.operator.steps]
    assert torch.ops.aten.embedding.default in steps
    tape = plan.linearize(X)
    size = tape.outputs.numel()
    J = tape.vjp(torch.eye(size, dtype=torch.float64).view(size, *tape.outputs.shape))
    assert J.view(size, 5, 3)[:, 0].count_nonzero() == 0
    pushed = tape.jvp(torch.eye(15, dtype=torch.float64)).reshape(15, size)
    assert torch.allclose(pushed.T, J, rtol=0, atol=1e-6), "torch computes this node in float32"


@pytest.mark.parametrize(
    ("read", "wrong", "bounds"),
    [
        (lambda m: m.w[m.i], -10, r"\[-9, 9\)"),
        (lambda m: m.w[m.i], 9, r"\[-9, 9\)"),
        (lambda m: F.embedding(m.i, m.w), -1, r"\[0, 9\)"),
    ],
)
def test_numbers_outside_of_a_table(read: Callable[[Expression], Tensor], wrong: int, bounds: str) -> None:
    model = Expression(lambda m, x: m.fc(x) * read(m), fc=nn.Linear(3, 3), w=nn.Parameter(torch.randn(9, 3)), i=torch.tensor([3, wrong, 1]))
    X = torch.randn(4, 3, 3)
    plan = Plan.of(model, X)
    message = rf"^w: expected row numbers of the table in {bounds}, got {wrong}; correct the buffer that picks them\.$"
    with pytest.raises(IndexError, match=message):
        plan.linearize(X)


def test_weights_that_are_moved_take_no_memory_at_capture() -> None:
    """An index map of a weight is worth its memory only where a rule reads rows."""
    model = Expression(lambda m, x: F.linear(x, m.w.roll(1, 1)), w=nn.Parameter(torch.randn(6, 5)))
    X = torch.randn(4, 5)
    with unittest.mock.patch.object(elements, "_numbers", side_effect=AssertionError("an index map is formed")):
        plan = Plan.of(model, X)
    assert torch.allclose(plan.linearize(X).outputs, model(X), atol=1e-6)
