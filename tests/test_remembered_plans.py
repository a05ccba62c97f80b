"""A plan made of a live model is used again exactly as long as it is right: every change is seen, and values are read at every call."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import influence_ext as ie
from influence_ext import capture, reference
from influence_ext.errors import ArgumentError, DataError, DeviceError, DTypeError, ShapeError, UnsupportedModelError
from influence_ext.testing import assert_close

N = 5
LOSS = nn.MSELoss(reduction="sum")


class Model(nn.Module):
    """Reads whatever a forward pass can read: parameters, buffers, attributes plain and nested."""

    def __init__(self, factor: float = 2.0) -> None:
        super().__init__()
        self.first = nn.Linear(4, 3)
        self.norm = nn.BatchNorm1d(3)
        self.second = nn.Linear(3, 2)
        self.register_buffer("mask", torch.tensor([1.0, 0.5, 2.0]))
        self.factor = factor
        self.plain = torch.ones(3, dtype=torch.float64)
        self.array = np.array([0.5, 1.5])
        self.options = {"shift": [1.0]}
        self.setting = SimpleNamespace(power=2)
        self.function: Callable[[Tensor], Tensor] = torch.tanh
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        h = self.function(self.norm(self.first(x))) * self.mask * self.factor * self.plain + self.options["shift"][0]
        return self.second(h**self.setting.power) * float(self.array[0])


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return (torch.randn(N, 4, generator=generator, dtype=torch.float64), torch.randn(N, 2, generator=generator, dtype=torch.float64))


def found(model: nn.Module, **options: Any) -> Tensor:
    grads = ie.per_example_grads(model, LOSS, data(), **options)
    return torch.cat([g.reshape(N, -1) for g in grads.values()], dim=1)


def expected(model: nn.Module) -> Tensor:
    """A loop over examples with torch's own autograd, on the model itself."""
    X, y = data()
    parameters = [p for p in dict.fromkeys(model.parameters()) if p.requires_grad]
    rows = []
    for n in range(N):
        loss = LOSS(model(X[n : n + 1]), y[n : n + 1])
        grads = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        rows.append(torch.cat([g.reshape(-1) for g in grads]))
    return torch.stack(rows)


@pytest.fixture
def descriptions(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Grows by one whenever a model is described in full."""
    capture.clear_cache()
    calls: list[int] = []
    real = capture.structure_key

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(capture, "structure_key", counted)
    yield calls
    capture.clear_cache()


def in_place(tensor: Tensor) -> None:
    with torch.no_grad():
        tensor.mul_(1.5)


def assign(tensor: nn.Parameter) -> None:
    tensor.data = tensor.data * 3


VALUES: dict[str, Callable[[Any], Any]] = {
    "a parameter in place": lambda m: in_place(m.first.weight),
    "a parameter behind autograd's back": lambda m: m.first.weight.data.mul_(2),
    "a parameter through NumPy": lambda m: m.first.weight.detach().numpy().__imul__(2),
    "a parameter's memory": lambda m: assign(m.second.bias),
    "a buffer in place": lambda m: in_place(m.mask),
    "a buffer through NumPy": lambda m: m.mask.numpy().__iadd__(1),
    "running statistics": lambda m: in_place(m.norm.running_var),
    "load_state_dict": lambda m: m.load_state_dict({k: v * 2 for k, v in m.state_dict().items()}),
    "a step of an optimiser": lambda m: (
        [p.grad for p in m.parameters() if p.sum().backward() is None] and torch.optim.SGD(m.parameters(), lr=0.1).step()
    ),
}
STRUCTURE: dict[str, Callable[[Any], Any]] = {
    "a module": lambda m: setattr(m, "first", nn.Linear(4, 3).double()),
    "a module's kind": lambda m: setattr(m, "norm", nn.LayerNorm(3).double()),
    "a parameter": lambda m: setattr(m.first, "weight", nn.Parameter(torch.ones(3, 4).double())),
    "a buffer": lambda m: setattr(m, "mask", torch.zeros(3).double()),
    "state dict by assignment": lambda m: m.load_state_dict({k: v * 2 for k, v in m.state_dict().items()}, assign=True),
    "no bias": lambda m: setattr(m.first, "bias", None),
    "a frozen parameter": lambda m: m.first.weight.requires_grad_(False),
    "tied parameters": lambda m: setattr(m.norm, "bias", m.first.bias),
    "a float": lambda m: setattr(m, "factor", 3.0),
    "a float that is equal as an integer": lambda m: setattr(m, "factor", 7),
    "a plain tensor in place": lambda m: m.plain.add_(1),
    "a plain tensor behind autograd's back": lambda m: m.plain.data.add_(1),
    "a plain tensor through NumPy": lambda m: m.plain.numpy().__iadd__(1),
    "another plain tensor": lambda m: setattr(m, "plain", torch.full((3,), 4.0).double()),
    "an array": lambda m: m.array.__setitem__(0, 9.0),
    "inside a list in a dict": lambda m: m.options["shift"].__setitem__(0, 5.0),
    "inside an object": lambda m: setattr(m.setting, "power", 3),
    "a function": lambda m: setattr(m, "function", torch.sigmoid),
    "the method of one model": lambda m: setattr(m, "forward", lambda x: m.second(m.first(x))),
    "a hook": lambda m: m.first.register_forward_hook(lambda *a: a[-1] * 2),
    "a hook before": lambda m: m.second.register_forward_pre_hook(lambda module, args: (args[0] * 2,)),
    "a parametrisation": lambda m: parametrize.register_parametrization(m.first, "weight", Doubled()),
}


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


@pytest.mark.parametrize("change", VALUES.values(), ids=VALUES.keys())
def test_values_are_read_at_every_call(descriptions: list[int], change: Callable[[Any], Any]) -> None:
    model = Model()
    before = found(model)
    assert_close(before, expected(model))
    change(model)
    after = found(model)
    assert_close(after, expected(model))
    assert (after - before).abs().max() > 1e-6
    assert len(descriptions) == 1, "the plan was made anew although only values had changed"


@pytest.mark.parametrize("change", STRUCTURE.values(), ids=STRUCTURE.keys())
def test_a_changed_model_gets_a_fresh_plan(change: Callable[[Any], Any]) -> None:
    model = Model()
    before = found(model)
    change(model)
    after = found(model)
    assert_close(after, expected(model))
    assert after.shape != before.shape or (after - before).abs().max() > 1e-6


def test_a_method_patched_onto_the_class_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model()
    found(model)
    monkeypatch.setattr(Model, "forward", lambda self, x: self.second(self.first(x)))
    assert_close(found(model), expected(model))


def test_a_change_and_its_reversal() -> None:
    model = Model()
    before = found(model)
    model.first.weight.requires_grad_(False)
    assert found(model).shape[1] == before.shape[1] - 12
    model.first.weight.requires_grad_(True)
    assert torch.equal(found(model), before)
    handle = model.first.register_forward_hook(lambda *a: a[-1] * 2)
    assert_close(found(model), expected(model))
    handle.remove()
    assert torch.equal(found(model), before)


def test_a_hook_that_replaces_another_counts() -> None:
    model = Model()
    model.first.register_forward_hook(lambda *a: a[-1] * 2).remove()
    for factor in (2, 3):
        handle = model.first.register_forward_hook(lambda *a, factor=factor: a[-1] * factor)
        assert_close(found(model), expected(model))
        handle.remove()


def test_batch_norm_in_training_mode_is_refused_after_evaluation_mode_was_not() -> None:
    model = Model()
    before = found(model)
    model.train()
    with pytest.raises(UnsupportedModelError, match="norm is in training mode"):
        found(model)
    assert torch.equal(found(model.eval()), before)


def test_values_that_are_not_finite_are_refused_by_the_callers_name() -> None:
    model = Model()
    found(model)
    with torch.no_grad():
        model.second.weight[0, 0] = float("nan")
    with pytest.raises(DataError, match=r"per_example_grads: expected finite parameters.*second\.weight"):
        found(model)


def test_inputs_and_settings_count(descriptions: list[int]) -> None:
    model = nn.Sequential(nn.Tanh(), nn.Conv1d(1, 2, 3)).double()
    for width in (5, 7, 5, 7):
        X = torch.randn(3, 1, width, dtype=torch.float64)
        grads = ie.per_example_grads(model, LOSS, (X, torch.zeros(3, 2, width - 2).double()))
        like = reference.per_example_grads(model, LOSS, X, torch.zeros(3, 2, width - 2).double())
        assert_close(torch.cat([g.reshape(3, -1) for g in grads.values()], dim=1), like)
    assert len(descriptions) == 2
    model.float()
    X = torch.randn(3, 1, 5)
    assert ie.per_example_norms(model, LOSS, (X, torch.zeros(3, 2, 3))).dtype == torch.float32
    assert len(descriptions) == 3


def test_inputs_by_name_and_by_position_are_told_apart() -> None:
    model = nn.Linear(4, 2).double()
    X, y = data()
    as_tensor = ie.per_example_norms(model, LOSS, (X, y))
    assert torch.equal(ie.per_example_norms(model, LOSS, ({"input": X}, y)), as_tensor)
    with pytest.raises(UnsupportedModelError, match=r"unexpected keyword argument .X."):
        ie.per_example_norms(model, LOSS, ({"X": X}, y))


def test_selections_count(descriptions: list[int]) -> None:
    model = Model()
    everything = ie.per_example_grads(model, LOSS, data())
    selections: list[Any] = ["first.*", ["first.*"], model.second.weight, [model.second.weight], lambda: model.second.parameters()]
    for _ in range(2):
        for selection in selections:
            grads = ie.per_example_grads(model, LOSS, data(), params=selection() if callable(selection) else selection)
            assert all(torch.equal(g, everything[name]) for name, g in grads.items())
            assert len(grads) in (1, 2)
    assert list(ie.per_example_grads(model, LOSS, data(), params="second.bias")) == ["second.bias"]
    # A pattern and a list of it are one selection, and so is a tensor; the generator's is another.
    assert len(descriptions) == 5


def test_a_parameter_of_another_model_is_refused_every_time() -> None:
    model, other = Model(), Model()
    for _ in range(2):
        with pytest.raises(ArgumentError, match="none of them"):
            found(model, params=[other.first.weight])


def test_nothing_is_kept_alive() -> None:
    model = Model()
    model.owner = [model]
    found(model)
    alive = weakref.ref(model), weakref.ref(model.first.weight)
    del model
    gc.collect()
    assert [reference() for reference in alive] == [None, None]


def test_addresses_that_are_used_again_do_not_matter() -> None:
    for factor in range(20):
        model = Model(float(factor))
        assert_close(found(model), expected(model))
        model.plain = torch.full((3,), float(factor)).double()
        model.first = nn.Linear(4, 3).double()
        assert_close(found(model), expected(model))
        del model


def test_operators_keep_the_values_they_were_made_at() -> None:
    model = Model()
    G = ie.GGN(model, LOSS, data(), damping=0.1)
    v = torch.ones(G.shape[0], dtype=torch.float64)
    before = G @ v
    in_place(model.first.weight)
    in_place(model.mask)
    found(model)
    assert torch.equal(G @ v, before)


@pytest.mark.parametrize("N", [1, 6])
def test_an_output_buffer_is_filled_and_viewed(N: int) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    X, y = torch.randn(N, 4).double(), torch.randn(N, 2).double()
    fresh = ie.per_example_grads(model, LOSS, (X, y))
    out = torch.full((N, 23), float("nan"), dtype=torch.float64)
    for _ in range(2):
        grads = ie.per_example_grads(model, LOSS, (X, y), out=out)
        assert all(g.untyped_storage().data_ptr() == out.untyped_storage().data_ptr() for g in grads.values())
        assert {name: g.tolist() for name, g in grads.items()} == {name: g.tolist() for name, g in fresh.items()}
        assert torch.equal(out, torch.cat([g.reshape(N, -1) for g in fresh.values()], dim=1))
        out.fill_(7)


@pytest.mark.parametrize(
    ("out", "error", "text"),
    [
        (torch.empty(3, 10).double(), ShapeError, r"shape \[4, 10\], got contiguous \[3, 10\]"),
        (torch.empty(40).double(), ShapeError, r"got contiguous \[40\]"),
        (torch.empty(10, 4).double().T, ShapeError, "got non-contiguous"),
        (torch.empty(4, 10), DTypeError, "float64, got torch.float32"),
        (torch.empty(4, 10, device="meta").double(), DeviceError, "cpu, got meta"),
        ([0.0], DTypeError, "got list"),
    ],
)
def test_an_output_buffer_that_does_not_fit_is_refused(out: Any, error: type[Exception], text: str) -> None:
    model = nn.Linear(4, 2).double()
    with pytest.raises(error, match=rf"per_example_grads: expected out .*{text}"):
        ie.per_example_grads(model, LOSS, (torch.ones(4, 4).double(), torch.ones(4, 2).double()), out=out)
