"""Fields of a backward pass with ``create_graph=True``: penalties on the gradients of single examples, as in Fishr, can be trained."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from influence_ext.adapters.backpack import BatchGrad, BatchL2Grad, SumGradSquared, Variance, backpack, extend
from influence_ext.errors import UnsupportedModelError
from influence_ext.testing import assert_close
from tests.cases.backward import ROWS, N, Row
from tests.test_adapter_backpack import FIELDS, mlp, reduced

pytestmark = pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")


def loop(model: nn.Module, row: Row, X: Tensor, y: Tensor) -> dict[str, Tensor]:
    """``∇ℓ_n / N`` by parameter, ``[N, *shape]``, one example at a time, with a graph."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rows = [
        torch.autograd.grad(row.loss(model(X[n : n + 1]), y[n : n + 1]) / N, list(named.values()), create_graph=True, allow_unused=True)
        for n in range(N)
    ]
    return {name: torch.stack(list(column)) for name, column in zip(named, zip(*rows, strict=True), strict=True) if column[0] is not None}


def penalty(rows: dict[str, Tensor], field: str) -> Tensor:
    return sum((reduced(row)[field].square().sum() for row in rows.values()), torch.zeros((), dtype=torch.float64))


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
@pytest.mark.parametrize("field", FIELDS)
def test_a_penalty_on_fields_is_differentiated(row: Row, field: str) -> None:
    model, X, y = row.problem()
    plain = copy.deepcopy(model)
    loss = row.loss(extend(model)(X), y)
    with backpack(FIELDS[field]()):
        loss.backward(retain_graph=True, create_graph=True)
    found = {name: getattr(p, field) for name, p in model.named_parameters() if hasattr(p, field)}
    model.zero_grad()
    (loss + sum(value.square().sum() for value in found.values())).backward()

    with sdpa_kernel(SDPBackend.MATH):  # torch's fused attention has no second derivatives
        rows = loop(plain, row, X, y)
        assert found.keys() == rows.keys()
        (row.loss(plain(X), y) + penalty(rows, field)).backward()
    like = dict(plain.named_parameters())
    for name, p in model.named_parameters():
        if p.grad is None:
            assert like[name].grad is None
        else:
            assert_close(p.grad, like[name].grad, scope="model")


def test_the_graph_reaches_what_comes_before_an_extended_head() -> None:
    model, X, y = mlp()
    plain = copy.deepcopy(model)
    body, head = model[:2], extend(model[2])
    loss = F.cross_entropy(head(body(X)), y, reduction="none").sum()
    with backpack(BatchGrad(subsampling=[0, 2])):
        loss.backward(inputs=list(head.parameters()), retain_graph=True, create_graph=True)
    assert body[0].weight.grad is None
    value = sum(p.grad_batch.square().sum() for p in head.parameters())
    found = torch.autograd.grad(value, list(model.parameters()))
    losses = [F.cross_entropy(plain(X[n : n + 1]), y[n : n + 1]) for n in (0, 2)]
    each = [g for loss in losses for g in torch.autograd.grad(loss, plain[2].parameters(), create_graph=True)]
    like = torch.autograd.grad(sum(g.square().sum() for g in each), list(plain.parameters()))
    for ours, theirs in zip(found, like, strict=True):
        assert_close(ours, theirs, scope="model")


def test_second_derivatives_without_fields_are_torchs() -> None:
    model, X, y = mlp()
    plain = copy.deepcopy(model)
    X.requires_grad_()
    found = []
    for network in (extend(model), plain):
        (slope,) = torch.autograd.grad(F.cross_entropy(network(X), y), X, create_graph=True)
        found.append(torch.autograd.grad(slope.square().sum(), list(network.parameters()), materialize_grads=True))
    for ours, theirs in zip(*found, strict=True):
        assert_close(ours, theirs, scope="model")


def test_fields_of_a_second_backward_pass_are_refused() -> None:
    """What reaches the network there is only a part of the derivative: BackPACK's own fields are wrong for most networks."""
    model, X, y = mlp()
    loss = F.cross_entropy(extend(model)(X), y)
    with backpack(Variance()):
        loss.backward(retain_graph=True, create_graph=True)
    value = sum(p.variance.sum() for p in model.parameters())
    with backpack(BatchGrad()), pytest.raises(UnsupportedModelError, match="got one through derivatives made with create_graph=True"):
        value.backward(retain_graph=True)
    with backpack(BatchL2Grad(), SumGradSquared()):  # another first pass through the same graph is none of that kind
        loss.backward()
    assert model[0].weight.batch_l2.shape == (N,)


def twice(model: nn.Module, X: Tensor) -> Tensor:
    return model(model(X))


def scaled(model: nn.Module, X: Tensor) -> Tensor:
    return model(X * sum(p.sum() for p in model.parameters()))


def adversarial(model: nn.Module, X: Tensor) -> Tensor:
    X = X.clone().requires_grad_()
    return model(X + torch.autograd.grad(model(X).square().sum(), X, create_graph=True)[0])


@pytest.mark.parametrize("call", [twice, scaled, adversarial])
def test_inputs_may_depend_on_the_parameters(call: Callable[[nn.Module, Tensor], Tensor]) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    plain, X = copy.deepcopy(model), torch.randn(N, 4).double()

    def first_and_second(network: nn.Module) -> list[Tensor]:
        parameters = list(network.parameters())
        gradients = torch.autograd.grad(call(network, X).pow(3).sum(), parameters, create_graph=True)
        return [*gradients, *torch.autograd.grad(sum(g.square().sum() for g in gradients), parameters)]

    for found, expected in zip(first_and_second(extend(model)), first_and_second(plain), strict=True):
        assert_close(found.detach(), expected.detach(), scope="model")


def test_fields_of_inputs_that_depend_on_the_parameters() -> None:
    """A field is of the pass it belongs to: inputs are given."""
    fields = []
    for create_graph in (False, True):
        model, X, y = mlp()
        loss = F.cross_entropy(extend(model)(X * model[0].weight.sum()), y)
        with backpack(BatchGrad()):
            loss.backward(create_graph=create_graph)
        fields.append(model[0].weight.grad_batch.detach())
    assert_close(fields[1], fields[0])


def test_autocast_around_the_backward_pass_changes_nothing() -> None:
    fields = []
    for enabled in (False, True):
        model, X, y = mlp()
        model, X = model.float(), X.float()
        loss = F.cross_entropy(extend(model)(X), y)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled), backpack(BatchGrad()):
            loss.backward(create_graph=True)
        fields.append([(p.grad, p.grad_batch) for p in model.parameters()])
    for plain, cast in zip(*fields, strict=True):
        for a, b in zip(plain, cast, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("what", ["trained", "frozen", "buffer"])
def test_what_changed_since_the_forward_pass_is_noticed(what: str) -> None:
    model, X, y = mlp()
    model = nn.Sequential(model, nn.BatchNorm1d(3, affine=False).double().eval())
    if what == "frozen":
        model[0][2].weight.requires_grad_(False)
    loss = F.cross_entropy(extend(model)(X), y)
    with torch.no_grad():
        {"trained": model[0][0].weight, "frozen": model[0][2].weight, "buffer": model[1].running_mean}[what].add_(1)
    with backpack(BatchGrad()), pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward(create_graph=True)
