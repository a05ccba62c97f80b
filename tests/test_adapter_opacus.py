"""``p.grad_sample`` as Opacus fills it: against a loop over examples, and where Opacus is installed against Opacus."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from influence_ext.adapters import opacus as adapter
from influence_ext.adapters.opacus import GradSampleModule, register_grad_samplers
from influence_ext.errors import ArgumentError, DTypeError, UnsupportedModelError
from influence_ext.testing import assert_close
from tests.cases.backward import ROWS, WIDE, N, Row, expected

# Opacus' hooks on a first layer.
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")
every_row = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())


def samples(module: nn.Module) -> dict[str, Tensor]:
    return {
        name.removeprefix("_module."): p.grad_sample for name, p in module.named_parameters() if getattr(p, "grad_sample", None) is not None
    }


def assert_all_close(found: dict[str, Tensor], like: dict[str, Tensor]) -> None:
    assert found.keys() == like.keys()
    for name, rows in like.items():
        assert_close(found[name], rows, scope="model")


@every_row
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradients_of_single_examples(row: Row, reduction: str) -> None:
    model, X, y = row.problem()
    plain = copy.deepcopy(model)
    wrapped = GradSampleModule(model, batch_first=True, loss_reduction=reduction)
    output = wrapped(X)
    assert_close(output, plain(X), scope="model")
    # Where an example has several terms its own loss is their mean; the sum is over examples.
    factor = N if reduction == "sum" else 1
    (factor * row.loss(output, y)).backward()
    (factor * row.loss(plain(X), y)).backward()
    assert_all_close(samples(wrapped), expected(row, model, X, y))
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if q.grad is not None:
            assert_close(p.grad, q.grad, scope="model")


@every_row
def test_opacus_says_the_same(row: Row) -> None:
    opacus = pytest.importorskip("opacus.grad_sample")
    model, X, y = row.problem()
    if any(isinstance(p, nn.Parameter) for name, p in model.named_parameters() if "." not in name):
        pytest.skip("Opacus finds no sampler for bare parameters beside layers")
    ours, theirs = GradSampleModule(copy.deepcopy(model)), opacus.GradSampleModule(copy.deepcopy(model))
    for wrapped in (ours, theirs):
        row.loss(wrapped(X), y).backward()
    assert_all_close(samples(ours), samples(theirs))


@every_row
def test_opacus_own_module_runs_on_our_samplers(row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    opacus = pytest.importorskip("opacus.grad_sample")
    model, X, y = row.problem()
    if any(isinstance(p, nn.Parameter) for name, p in model.named_parameters() if "." not in name):
        pytest.skip("Opacus finds no sampler for bare parameters beside layers")
    like = expected(row, model, X, y)
    calls: list[type[nn.Module]] = []
    real = adapter.grad_sampler

    def counted(layer: nn.Module, *args: Any) -> Any:
        calls.append(type(layer))
        return real(layer, *args)

    monkeypatch.setattr(adapter, "grad_sampler", counted)
    before = dict(opacus.GradSampleHooks.GRAD_SAMPLERS)
    restore = register_grad_samplers()
    try:
        wrapped = opacus.GradSampleModule(model)
        for _ in range(2):
            wrapped.zero_grad()
            row.loss(wrapped(X), y).backward()
            assert_all_close(samples(wrapped), like)
    finally:
        restore()
    assert before == opacus.GradSampleHooks.GRAD_SAMPLERS
    layers = [m for m in model.modules() if isinstance(m, adapter.LAYERS) and any(p.requires_grad for p in m.parameters(recurse=False))]
    assert len(calls) >= 2 * len(layers) > 0


@pytest.mark.parametrize(
    "layer", [nn.Linear(4, 3), nn.Embedding(5, 3, padding_idx=1), nn.LayerNorm(4), nn.GroupNorm(2, 4)], ids=lambda x: type(x).__name__
)
def test_a_sampler_on_its_own(layer: nn.Module) -> None:
    layer = layer.double()
    x = torch.tensor([[0, 1], [4, 4], [1, 1]]) if isinstance(layer, nn.Embedding) else torch.randn(3, 4).double()
    g = torch.randn_like(layer(x))
    found = adapter.grad_sampler(layer, [x], g)
    for n in range(3):
        grads = torch.autograd.grad(layer(x[n : n + 1]), list(layer.parameters()), g[n : n + 1])
        for p, like in zip(layer.parameters(), grads, strict=True):
            assert_close(found[p][n], like)
    empty = adapter.grad_sampler(layer, [x[:0]], g[:0])
    assert [rows.shape for rows in empty.values()] == [(0, *p.shape) for p in layer.parameters()]


def mlp() -> tuple[nn.Module, Tensor, Tensor]:
    return ROWS["mlp"].problem()


def test_rounds_without_zero_grad_make_a_list() -> None:
    model, X, y = mlp()
    wrapped = GradSampleModule(model)
    like = expected(ROWS["mlp"], model, X, y)
    for size in (N, 4, 2):
        F.cross_entropy(wrapped(X[:size]), y[:size]).backward()
    for name, p in model.named_parameters():
        assert [len(rows) for rows in p.grad_sample] == [N, 4, 2]
        for rows in p.grad_sample:
            assert_close(rows, like[name][: len(rows)], scope="model")


def test_forward_passes_before_their_backward_passes_add_up() -> None:
    model, X, y = mlp()
    wrapped = GradSampleModule(model)
    first = expected(ROWS["mlp"], model, X, y)
    second = expected(ROWS["mlp"], model, X[:3] * 2, y[:3])
    wrapped(X)  # whose output is dropped: it does not count
    gc.collect()
    (F.cross_entropy(wrapped(X), y) + F.cross_entropy(wrapped(X[:3] * 2), y[:3])).backward()
    for name, rows in samples(wrapped).items():
        like = first[name].clone()
        like[:3] += second[name]
        assert_close(rows, like, scope="model")


def test_accumulation_can_be_forbidden() -> None:
    model, X, y = mlp()
    wrapped = GradSampleModule(model)
    wrapped.forbid_grad_accumulation()
    F.cross_entropy(wrapped(X), y).backward()
    with pytest.raises(ValueError, match="one backward pass between steps"):
        F.cross_entropy(wrapped(X), y).backward()
    wrapped.zero_grad()
    F.cross_entropy(wrapped(X), y).backward()
    wrapped.allow_grad_accumulation()
    F.cross_entropy(wrapped(X), y).backward()
    assert len(model[0].weight.grad_sample) == 2


def test_clearing() -> None:
    model, X, y = mlp()
    wrapped = GradSampleModule(model)
    assert all(p.grad_sample is None for p in model.parameters())
    F.cross_entropy(wrapped(X), y).backward()
    wrapped.zero_grad()
    assert all(p.grad_sample is None and not p.grad.any() for p in model.parameters())
    wrapped.zero_grad(set_to_none=True)
    assert all(p.grad is None for p in model.parameters())
    wrapped.del_grad_sample()
    wrapped.del_grad_sample()
    assert not any(hasattr(p, "grad_sample") for p in model.parameters())


def test_the_wrapped_model_comes_back_as_it_was() -> None:
    model, X, _ = mlp()
    attributes = [set(m.__dict__) for m in model.modules()]
    wrapped = GradSampleModule(model)
    wrapped(X).sum().backward()
    assert wrapped.to_standard_module() is model
    assert [set(m.__dict__) for m in model.modules()] == attributes
    assert not any(m._forward_hooks or m._backward_hooks for m in model.modules())
    assert not any(hasattr(p, "grad_sample") for p in model.parameters())


def test_names_and_modules_are_found_through_the_wrapper() -> None:
    model = nn.Sequential()
    model.add_module("fc", nn.Linear(4, 3))
    wrapped = GradSampleModule(model)
    assert wrapped.fc is model.fc
    assert list(wrapped.state_dict()) == ["_module.fc.weight", "_module.fc.bias"]
    assert repr(wrapped) == f"GradSampleModule({model!r})"
    with pytest.raises(AttributeError, match="gc"):
        _ = wrapped.gc
    assert list(copy.deepcopy(wrapped).state_dict()) == list(wrapped.state_dict())


@pytest.mark.parametrize("how", ["eval", "no_grad", "disable_hooks", "remove_hooks", "frozen"])
def test_nothing_is_recorded_where_opacus_records_nothing(how: str) -> None:
    model, X, y = mlp()
    wrapped = GradSampleModule(model)
    if how == "frozen":
        model.requires_grad_(False)
    elif how == "no_grad":
        with torch.no_grad():
            assert not wrapped(X).requires_grad
    else:
        getattr(wrapped, how)()
        F.cross_entropy(wrapped(X), y).backward()
        assert all(p.grad is not None for p in model.parameters())
    assert_close(wrapped(X), model(X))
    assert samples(wrapped) == {}
    if how == "remove_hooks":
        wrapped.add_hooks()
        F.cross_entropy(wrapped(X), y).backward()
        assert len(samples(wrapped)) == 4
        with pytest.raises(ValueError, match="one that does"):
            wrapped.add_hooks()


def test_disabling_between_forward_and_backward() -> None:
    model, X, y = mlp()
    wrapped = GradSampleModule(model)
    loss = F.cross_entropy(wrapped(X), y)
    wrapped.disable_hooks()
    loss.backward()
    assert samples(wrapped) == {}
    assert all(p.grad is not None for p in model.parameters())


def test_training_follows_the_parameters() -> None:
    """Steps of DP-SGD by hand: clipped sums of ``grad_sample``; every step sees the values of the one before."""
    model, X, y = mlp()
    wrapped = GradSampleModule(model)
    twin = copy.deepcopy(model)
    for _ in range(3):
        wrapped.zero_grad()
        F.cross_entropy(wrapped(X), y).backward()
        like = expected(ROWS["mlp"], twin, X, y)
        norms = torch.stack([rows.flatten(1).norm(dim=1) for rows in like.values()]).norm(dim=0)
        clip = (0.7 / norms).clamp(max=1)
        with torch.no_grad():
            for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
                p -= 0.5 * torch.einsum("n,n...->...", clip, p.grad_sample) / N
                q -= 0.5 * torch.einsum("n,n...->...", clip, like[name]) / N
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert_close(p, q.detach(), scope="model")


def test_gradients_reach_what_lies_before_the_network() -> None:
    model, X, y = mlp()
    before = nn.Linear(4, 4).double()
    F.cross_entropy(GradSampleModule(model)(before(X)), y).backward()
    grads = [p.grad.clone() for p in before.parameters()]
    before.zero_grad()
    F.cross_entropy(model(before(X)), y).backward()
    for p, g in zip(before.parameters(), grads, strict=True):
        assert_close(g, p.grad, scope="model")


def test_arguments_by_name_and_several_of_them() -> None:
    model = nn.Bilinear(3, 4, 2).double()
    x, z = torch.randn(N, 3).double(), torch.randn(N, 4).double()
    found = []
    for args, kwargs in (((x, z), {}), ((), {"input1": x, "input2": z}), ((x,), {"input2": z})):
        wrapped = GradSampleModule(model)
        wrapped(*args, **kwargs).square().mean(dim=0).sum().backward()
        found.append(model.weight.grad_sample)
        wrapped.to_standard_module()
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    for n in range(N):
        (like,) = torch.autograd.grad(model(x[n : n + 1], z[n : n + 1]).square().sum(), [model.weight])
        assert_close(found[0][n], like, scope="model")


@pytest.mark.parametrize("again", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))], ids=["deepcopy", "pickle"])
def test_a_wrapper_that_has_recorded_can_be_copied(again: Callable[[nn.Module], nn.Module]) -> None:
    model, X, y = WIDE.problem()
    wrapped = GradSampleModule(model)
    pending = wrapped(X)
    F.cross_entropy(wrapped(X), y)
    other = again(wrapped)
    F.cross_entropy(other(2 * X), y).backward()
    assert_all_close(samples(other), expected(WIDE, other._module, 2 * X, y))
    assert not samples(wrapped)
    F.cross_entropy(pending, y).backward()
    assert_all_close(samples(wrapped), expected(WIDE, model, X, y))


def test_examples_on_the_second_axis() -> None:
    opacus = pytest.importorskip("opacus.grad_sample")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    X, y = torch.randint(9, (5, N)), torch.randint(3, (5, N))
    found = []
    for make in (opacus.GradSampleModule, GradSampleModule):
        wrapped = make(copy.deepcopy(model), batch_first=False)
        output = wrapped(X)
        F.cross_entropy(output.flatten(0, 1), y.flatten()).backward()
        assert_close(output, model(X))
        assert wrapped.state_dict().keys() == {f"_module.{name}" for name in model.state_dict()}
        found.append(samples(wrapped))
    assert_all_close(found[1], found[0])
    wrapped.zero_grad()
    wrapped(X[:, :0]).sum().backward()
    assert samples(wrapped)["2.bias"].shape == (0, 3)


def test_an_empty_batch_gives_no_rows() -> None:
    """Poisson sampling draws some."""
    model, X, y = WIDE.problem()
    wrapped = GradSampleModule(model)
    wrapped(X[:0]).sum().backward()
    for p in model.parameters():
        assert p.grad_sample.shape == (0, *p.shape)
        assert not p.grad.any()
    wrapped.zero_grad()
    empty, full = wrapped(X[:0]), wrapped(X)
    (empty.sum() + F.cross_entropy(full, y)).backward()
    assert_all_close(samples(wrapped), expected(WIDE, model, X, y))
    with torch.no_grad():
        assert wrapped(X[:0]).shape == (0, 3)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return self.fc(x) * scale


def test_mixed_arguments_on_the_second_axis() -> None:
    X, scale = torch.randn(5, 2, 4).double(), torch.randn(5, 2, 1).double()
    wrapped = GradSampleModule(Scaled().double(), batch_first=False, loss_reduction="sum")
    wrapped(X, scale=scale).sum().backward()
    rows = torch.einsum("tnk,tni->nki", scale.expand(5, 2, 3), X)
    assert_close(samples(wrapped)["fc.weight"], rows)


def test_a_pass_is_freed_with_its_graph() -> None:
    model, X, _ = mlp()
    wrapped = GradSampleModule(model)
    output = wrapped(X)
    tape = weakref.ref(output.grad_fn.call.tape)
    gc.disable()
    try:
        del output
        assert tape() is None
    finally:
        gc.enable()


def test_memory_is_used_again_only_when_nobody_holds_it() -> None:
    model, X, y = WIDE.problem()
    wrapped = GradSampleModule(model)

    def step(scale: float) -> Tensor:
        wrapped.zero_grad()
        F.cross_entropy(wrapped(scale * X), y).backward()
        return model[0].weight.grad_sample

    first = step(1.0).data_ptr()
    assert step(2.0).data_ptr() == first
    kept = model[2].bias.grad_sample[1:, :2]  # a view of a view
    copied = kept.clone()
    assert step(3.0).data_ptr() != first
    assert torch.equal(kept, copied)
    like = expected(WIDE, model, 3 * X, y)
    assert_all_close(samples(wrapped), like)


class Switched(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * (2 if self.training else 1)


PAIR = torch.ones(2, 4)
BAD: list[tuple[Any, Any, type[Exception], str]] = [
    (lambda: GradSampleModule(nn.Linear(4, 3), loss_reduction="none"), None, ValueError, "loss_reduction 'mean' or 'sum', got 'none'"),
    (lambda: GradSampleModule(nn.Linear(4, 3), batch_first=False), PAIR[0], ValueError, r"expected inputs \[K, N, ...\]"),
    (lambda: GradSampleModule(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))), None, NotImplementedError,
     r"got BatchNorm1d \(1\) in training mode"),
    (lambda: GradSampleModule(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), strict=False), PAIR, UnsupportedModelError,
     "batch norm 1 is in training mode"),
    (lambda: GradSampleModule(nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.1))), PAIR, UnsupportedModelError,
     r"active dropout, .*got Dropout \(1\) in"),
    (lambda: GradSampleModule(Switched()), PAIR, UnsupportedModelError, "same in training and in evaluation mode, got Switched"),
    (lambda: GradSampleModule(nn.Linear), None, TypeError, "expected an nn.Module, got <class"),
    (lambda: GradSampleModule(nn.Linear(4, 3)), [1.0], DTypeError, "tensors as arguments.*got list"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "call", "error", "text"), BAD)
def test_bad_input(make: Any, call: Any, error: type[Exception], text: str) -> None:
    if call is None:
        with pytest.raises(error, match=text):
            make()
        return
    module = make()
    with pytest.raises(error, match=text):
        module(call)


def test_samplers_are_registered_for_known_layers_only() -> None:
    pytest.importorskip("opacus")
    with pytest.raises(ArgumentError, match=r"expected layers among Linear, .*got Bilinear"):
        register_grad_samplers([nn.Bilinear])


def test_models_that_are_allowed_after_all() -> None:
    for model in (nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3).eval()), nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.0))):
        wrapped = GradSampleModule(model.double())
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.eval()
        wrapped(torch.randn(2, 4).double()).sum().backward()
        assert model[0].weight.grad_sample.shape == (2, 3, 4)
        assert GradSampleModule.is_supported(model)
