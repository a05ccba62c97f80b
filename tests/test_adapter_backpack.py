"""BackPACK's first-order fields: against a loop over examples, and against BackPACK on the networks it takes."""

from __future__ import annotations

import copy
import gc
import importlib
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import backpack as original
import pytest
import torch
import torch.nn.functional as F
from backpack import extensions
from torch import Tensor, nn

import influence_ext as ie
from influence_ext.adapters.backpack import BatchGrad, BatchL2Grad, SumGradSquared, Variance, backpack, disable, extend
from influence_ext.errors import ArgumentError, UnsupportedModelError
from influence_ext.testing import assert_close
from tests.cases.backward import ROWS, WIDE, N, Row, expected

# The peer hooks on a first layer.
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")
FIELDS = {"grad_batch": BatchGrad, "batch_l2": BatchL2Grad, "sum_grad_squared": SumGradSquared, "variance": Variance}
every_row = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())


def fields(model: nn.Module, name: str) -> dict[str, Tensor]:
    return {key: getattr(p, name) for key, p in model.named_parameters() if hasattr(p, name)}


def reduced(rows: Tensor) -> dict[str, Tensor]:
    """The four fields from gradients ``[N, *shape]``."""
    return {
        "grad_batch": rows,
        "batch_l2": rows.flatten(1).square().sum(dim=1),
        "sum_grad_squared": rows.square().sum(dim=0),
        "variance": rows.var(dim=0, unbiased=False),
    }


@every_row
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_fields(row: Row, reduction: str) -> None:
    model, X, y = row.problem()
    plain = copy.deepcopy(model)
    factor = N if reduction == "sum" else 1
    extended = extend(model)
    assert extended is model
    with backpack(*(ext() for ext in FIELDS.values())):
        (factor * row.loss(model(X), y)).backward()
    (factor * row.loss(plain(X), y)).backward()
    rows = {name: factor / N * grads for name, grads in expected(row, plain, X, y).items()}
    for field in FIELDS:
        found = fields(model, field)
        assert found.keys() == rows.keys()
        for name, grads in rows.items():
            # A variance is a difference of these.
            scale = float(grads.square().mean(dim=0).norm()) if field == "variance" else None
            assert_close(found[name], reduced(grads)[field], scope="model", scale=scale)
    for (name, p), q in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert (p.grad is None) == (q[1].grad is None), name
        if p.grad is not None:
            assert_close(p.grad, q[1].grad, scope="model")


PEERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)),
    "relu": lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 5, bias=False), nn.Sigmoid(), nn.Linear(5, 3)),
    "conv": lambda: nn.Sequential(nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 3, 2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(15, 3)),
    "transposed": lambda: nn.Sequential(nn.Unflatten(1, (1, 4)), nn.ConvTranspose1d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)),
}


@pytest.mark.parametrize("make", PEERS.values(), ids=PEERS.keys())
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_backpack_says_the_same(make: Callable[[], nn.Module], reduction: str) -> None:
    torch.manual_seed(2)
    ours = make().double()
    theirs = copy.deepcopy(ours)
    X, y = torch.randn(N, 4).double(), torch.randint(0, 3, (N,))
    loss = nn.CrossEntropyLoss(reduction=reduction)
    extend(loss)
    extend(ours)
    with backpack(*(ext() for ext in FIELDS.values())):
        loss(ours(X), y).backward()
    theirs, their_loss = original.extend(theirs), original.extend(nn.CrossEntropyLoss(reduction=reduction))
    with original.backpack(extensions.BatchGrad(), extensions.BatchL2Grad(), extensions.SumGradSquared(), extensions.Variance()):
        their_loss(theirs(X), y).backward()
    for field in (*FIELDS, "grad"):
        found, like = fields(ours, field), fields(theirs, field)
        assert found.keys() == like.keys()
        for name in like:
            assert_close(found[name], like[name], scope="model")


def mlp() -> tuple[nn.Module, Tensor, Tensor]:
    return ROWS["mlp"].problem()


def test_only_the_backward_passes_inside_fill() -> None:
    model, X, y = mlp()
    extend(model)
    loss = F.cross_entropy(model(X), y)
    F.cross_entropy(model(X), y).backward()
    assert fields(model, "grad_batch") == {}
    with backpack(BatchGrad()):
        with backpack(BatchL2Grad()):
            F.cross_entropy(model(X), y).backward()
        assert fields(model, "grad_batch") == {}
        assert len(fields(model, "batch_l2")) == 4
        loss.backward()
    assert len(fields(model, "grad_batch")) == 4


def test_fields_are_of_the_last_pass() -> None:
    model, X, y = mlp()
    extend(model)
    for size in (N, 2):
        with backpack(BatchGrad()):
            loss = F.cross_entropy(model(X[:size]), y[:size])
            loss.backward(retain_graph=True)
            once = model[0].weight.grad_batch
            loss.backward()
        assert torch.equal(model[0].weight.grad_batch, once)
        assert len(once) == size


def test_values_of_parameters_are_those_of_the_forward_pass() -> None:
    model, X, y = mlp()
    extend(model)
    for _ in range(3):
        like = expected(ROWS["mlp"], model, X, y)
        with backpack(BatchGrad()):
            F.cross_entropy(model(X), y).backward()
        for name, rows in fields(model, "grad_batch").items():
            assert_close(rows, like[name] / N, scope="model")
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.3 * p.grad


def test_some_examples_only() -> None:
    model, X, y = mlp()
    extend(model)
    like = expected(ROWS["mlp"], model, X, y)
    with backpack(BatchGrad(subsampling=[4, -N])):
        F.cross_entropy(model(X), y).backward()
    for name, rows in fields(model, "grad_batch").items():
        assert_close(rows, like[name][[4, 0]] / N, scope="model")


def test_memory_is_used_again_only_when_nobody_holds_it() -> None:
    model, X, y = WIDE.problem()
    extend(model)

    def step(scale: float) -> Tensor:
        with backpack(BatchGrad()):
            F.cross_entropy(model(scale * X), y).backward()
        return model[0].weight.grad_batch

    first = step(1.0).data_ptr()
    assert step(2.0).data_ptr() == first
    kept = model[2].bias.grad_batch
    copied = kept.clone()
    assert step(3.0).data_ptr() != first
    assert torch.equal(kept, copied)
    assert not torch.equal(kept, model[2].bias.grad_batch)


def test_a_hook_sees_the_modules_with_parameters_last_first() -> None:
    model, X, y = mlp()
    extend(model)
    seen: list[tuple[nn.Module, int]] = []
    with backpack(BatchL2Grad(), extension_hook=lambda module: seen.append((module, len(module.weight.batch_l2)))):
        F.cross_entropy(model(X), y).backward()
    assert seen == [(model[2], N), (model[0], N)]


def test_parts_of_a_network() -> None:
    """An extended head behind a body that is not, and an extended network inside another."""
    model, X, y = mlp()
    plain = copy.deepcopy(model)
    extend(model[2])
    with backpack(BatchGrad()):
        F.cross_entropy(model(X), y).backward()
    F.cross_entropy(plain(X), y).backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert_close(p.grad, q.grad, scope="model")
    like = expected(ROWS["mlp"], plain, X, y)
    assert fields(model, "grad_batch").keys() == {"2.weight", "2.bias"}
    extend(model)
    with backpack(BatchGrad()):
        F.cross_entropy(model(X), y).backward()
    for name, rows in fields(model, "grad_batch").items():
        assert_close(rows, like[name] / N, scope="model")
    assert len(fields(model, "grad_batch")) == 4


def test_an_extended_network_is_a_network() -> None:
    """For evaluation, for this library's operators, for copies."""
    model, X, y = mlp()
    plain = copy.deepcopy(model)
    extend(extend(model))
    with torch.no_grad():
        assert torch.equal(model(X), plain(X))
    with disable():
        assert not disable.should_store_io()
        assert torch.equal(model(X), plain(X))
    assert disable.should_store_io()
    for found, like in zip(*(ie.per_example_grads(m, nn.CrossEntropyLoss(), (X, y)).values() for m in (model, plain)), strict=True):
        assert_close(found, like)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin[0].weight.mul_(2)
    with backpack(BatchGrad()):
        F.cross_entropy(twin(X), y).backward()
    assert fields(model, "grad_batch") == {}
    like = expected(ROWS["mlp"], twin, X, y)
    assert_close(twin[0].weight.grad_batch, like["0.weight"] / N, scope="model")
    assert list(model.state_dict()) == list(plain.state_dict())


def test_a_forward_pass_of_the_instance_is_kept() -> None:
    model, X, y = mlp()
    model.forward = lambda x: 2 * model[2](model[0](x))  # type: ignore[method-assign]
    F.cross_entropy(model(X), y).backward()
    like = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    extend(model)
    F.cross_entropy(model(X), y).backward()
    for name, p in model.named_parameters():
        assert_close(p.grad, like[name], scope="model")


def test_an_extended_network_can_be_freed() -> None:
    model, X, _ = mlp()
    extend(model)
    model(X).sum().backward()
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"])
def test_an_extended_network_can_be_copied(again: Callable[[nn.Module], nn.Module]) -> None:
    model, X, y = WIDE.problem()
    extend(model)
    model(X)
    other = again(model)
    with backpack(BatchGrad()):
        F.cross_entropy(other(2 * X), y).backward()
    for name, rows in expected(WIDE, other, 2 * X, y).items():
        assert_close(fields(other, "grad_batch")[name], rows / N, scope="model")
    assert not fields(model, "grad_batch")


def test_fields_have_the_dtype_of_their_parameters() -> None:
    model, X, y = WIDE.problem()
    extend(model.bfloat16())
    with backpack(*(ext() for ext in FIELDS.values())):
        F.cross_entropy(model(X.bfloat16()), y).backward()
    assert {getattr(p, name).dtype for p in model.parameters() for name in FIELDS} == {torch.bfloat16}


def test_the_names_are_where_the_peer_has_them() -> None:
    ours = importlib.import_module("influence_ext.adapters.backpack.extensions")
    assert ours.BatchGrad is BatchGrad
    assert set(ours.__all__) <= set(extensions.__all__)


@pytest.mark.parametrize(
    ("exts", "text"),
    [
        ([BatchGrad], r"got the class BatchGrad; write BatchGrad\(\)"),
        ([extensions.BatchGrad()], "got BatchGrad; import it from there"),
        ([extensions.DiagGGNExact()], "got DiagGGNExact; curvature is in ie.GGN"),
        (["grad_batch"], "got str"),
    ],
)
def test_what_is_no_extension_is_refused(exts: list[Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        backpack(*exts)


def test_bad_input() -> None:
    model, X, y = mlp()
    with pytest.raises(TypeError, match=r"expected an nn.Module to extend, got function"):
        extend(F.cross_entropy)  # type: ignore[arg-type]
    for subsampling in (3, [0.5]):
        with pytest.raises(ArgumentError, match="expected subsampling as a list of indices, got"):
            BatchGrad(subsampling=subsampling)  # type: ignore[arg-type]
    extend(model)
    with backpack(BatchGrad(subsampling=[N])), pytest.raises(IndexError, match=f"indices from {-N} to {N - 1}, got {N}"):
        F.cross_entropy(model(X), y).backward()
    model.append(nn.BatchNorm1d(3).double())
    with pytest.raises(UnsupportedModelError, match=r"(?s)backpack: .*batch norm 3 is in training mode"):
        model(X)
    model[3] = nn.Dropout(0.5)
    with pytest.raises(NotImplementedError, match=r"active dropout, .*got Dropout \(3\) in training mode"):
        model(X)
