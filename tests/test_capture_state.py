"""Capture leaves everything as found, and a captured graph is used again exactly as long as it is right."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from influence_ext.capture import capture, clear_cache
from influence_ext.testing import assert_close
from tests.cases.capture import Net, dense, interpret, normal


def snapshot(model: nn.Module) -> Any:
    return (
        [(n, m.training, {k: id(v) for k, v in m.__dict__.items()}) for n, m in model.named_modules()],
        [(n, id(p), p.requires_grad, id(p.grad), p.detach().clone()) for n, p in model.named_parameters()],
        [(n, id(b), b.clone()) for n, b in model.named_buffers()],
    )


def assert_same(before: Any, after: Any) -> None:
    assert before[0] == after[0]
    for old, new in zip(before[1] + before[2], after[1] + after[2], strict=True):
        assert old[:-1] == new[:-1]
        assert torch.equal(old[-1], new[-1])


@pytest.mark.parametrize("failure", [None, ValueError("no"), KeyboardInterrupt()], ids=["returns", "raises", "Ctrl-C"])
def test_the_model_and_the_random_state_are_left_as_found(failure: BaseException | None) -> None:
    def run(n: Any, x: Tensor) -> Tensor:
        torch.rand(3), random.random(), np.random.rand()  # noqa: NPY002
        n.calls.add_(1)
        n.seen = x
        n.log.append(x)
        n.kinds["x"] = x
        n.drop.p = 0.1
        n.fc.weight.requires_grad_(False)
        if failure is not None:
            raise failure
        return n.fc(n.drop(x))

    model = Net(run, fc=dense(4, 2), drop=nn.Dropout(0.5), calls=torch.zeros(()), other=dense(1, 1).eval())
    model.log, model.kinds = [1], {"a": 2}
    model.fc.bias.requires_grad_(False)
    model.fc.weight.grad = normal(2, 4)
    before = snapshot(model)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    clear_cache()
    if failure is None:
        capture(model, torch.zeros(3, 4).double())
    else:
        expected = KeyboardInterrupt if isinstance(failure, KeyboardInterrupt) else NotImplementedError
        with pytest.raises(expected):
            capture(model, torch.zeros(3, 4).double())
    assert_same(before, snapshot(model))
    assert (model.log, model.kinds, model.drop.p) == ([1], {"a": 2}, 0.5)
    assert not hasattr(model, "seen")
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert states[2] == np.random.get_state()[1].tolist()  # noqa: NPY002
    assert torch.is_grad_enabled()
    assert_close(model.fc(torch.ones(1, 4).double()), model.fc.weight.sum(1)[None] + model.fc.bias)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_surrounding_grad_mode_does_not_matter(context: Any) -> None:
    clear_cache()
    model = Net(lambda n, x: torch.tanh(n.fc(x)), fc=dense(4, 2))
    half = nn.Linear(4, 2).bfloat16()
    ids = nn.Embedding(5, 3).double()
    with context():
        graph = capture(model, normal(3, 4))
        rounded = capture(half, normal(3, 4).bfloat16())
        rows = capture(ids, torch.tensor([[1], [2], [4]]))
    assert [node.rule for node in graph.nodes] == ["linear", "activation"]
    assert [node.rule for node in rounded.nodes] == ["linear"]
    assert [node.rule for node in rows.nodes] == ["embedding"]


@pytest.fixture
def exports(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with every call of torch.export."""
    clear_cache()
    calls: list[int] = []
    real = torch.export.export

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(torch.export, "export", counted)
    return calls


def tiny(width: int = 3, activation: nn.Module | None = None) -> nn.Sequential:
    return nn.Sequential(dense(4, width), activation or nn.Tanh(), dense(width, 2))


def test_a_structure_is_exported_once(exports: list[int]) -> None:
    model = tiny()
    first = capture(model, normal(3, 4))
    with torch.no_grad():
        model[0].weight.add_(1)
    model.train()
    assert capture(model, normal(9, 4)) is first
    assert capture(model.eval(), normal(1, 4)) is first
    assert capture(tiny(), normal(3, 4)) is first
    assert len(exports) == 1


def set_attribute(model: Any) -> None:
    model[1].slope = 2


def change_closure(factor: float) -> nn.Module:
    return Net(lambda n, x: n.fc(x) * factor, fc=dense(4, 2))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.__setitem__(1, nn.ReLU()),
        lambda m: m.__setitem__(0, nn.Sequential(dense(4, 3))),
        lambda m: m.__setitem__(2, dense(3, 5)),
        lambda m: m.append(nn.Tanh()),
        lambda m: setattr(m[0], "bias", None),
        lambda m: setattr(m[0], "bias", m[0].bias.requires_grad_(False)),
        lambda m: m[1].register_forward_hook(lambda *a: a[-1] * 2),
        set_attribute,
    ],
)
def test_a_changed_structure_is_exported_anew(exports: list[int], change: Callable[[Any], Any]) -> None:
    model = tiny()
    capture(model, normal(3, 4))
    change(model)
    graph = capture(model, normal(3, 4))
    assert len(exports) == 2
    X = normal(5, 4)
    assert_close(interpret(graph, model, [X]), model(X).detach())


class Scaled(nn.Module):
    """Reads every kind of plain attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = dense(4, 2)
        self.factor = 2.0
        self.plain = torch.ones(2, dtype=torch.float64)
        self.options = {"shift": [1.0]}
        self.function: Callable[[Tensor], Tensor] = torch.tanh

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.fc(x)) * self.factor * self.plain + self.options["shift"][0]


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m, "factor", 3.0),
        lambda m: m.plain.add_(1),
        lambda m: m.options["shift"].insert(0, 5.0),
        lambda m: setattr(m, "function", torch.relu),
        lambda m: setattr(m, "function", lambda z, k=2: k * z),
        lambda m: setattr(m, "forward", lambda x: m.fc(x) + 1),
    ],
)
def test_plain_attributes_count_by_value(exports: list[int], change: Callable[[Any], Any]) -> None:
    model = Scaled()
    capture(model, normal(3, 4))
    assert capture(Scaled(), normal(3, 4)) is capture(model, normal(3, 4))
    assert len(exports) == 1
    change(model)
    graph = capture(model, normal(3, 4))
    assert len(exports) == 2
    X = normal(5, 4)
    assert_close(interpret(graph, model, [X]), model(X).detach())


def test_closures_and_patched_classes_count(exports: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    X = normal(5, 4)
    for factor in (2.0, 3.0):
        model = change_closure(factor)
        assert_close(interpret(capture(model, X), model, [X]), model(X).detach())
    scaled = Scaled()
    capture(scaled, X)
    monkeypatch.setattr(Scaled, "forward", lambda self, x: self.fc(x) - 1)
    assert_close(interpret(capture(scaled, X), scaled, [X]), scaled(X).detach())
    assert len(exports) == 4


def test_input_shapes_and_dtypes_count(exports: list[int]) -> None:
    model = nn.Tanh()
    for X in (normal(3, 4), normal(3, 5), normal(3, 4).float(), {"input": normal(3, 4)}):
        capture(model, X)
    assert len(exports) == 4


def test_failures_are_not_cached(exports: list[int]) -> None:
    model = Net(lambda n, x: torch.bernoulli(torch.sigmoid(n.fc(x))), fc=dense(4, 2))
    for _ in range(2):
        with pytest.raises(NotImplementedError):
            capture(model, normal(3, 4))
    assert len(exports) == 2


def test_capture_holds_no_model(exports: list[int]) -> None:
    model = tiny()
    model.owner = [model]
    alive = weakref.ref(model)
    capture(model, normal(3, 4))
    del model
    gc.collect()
    assert alive() is None
