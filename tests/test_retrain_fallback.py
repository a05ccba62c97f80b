"""What trainings that go together do when something fails on the way, what they tell, and what they leave for later."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import influence_ext as ie
from influence_ext.bregman import stacks, together
from influence_ext.testing import assert_close
from tests.cases import generator

F64 = torch.float64
GROUPS = [[4], [17], [0, 4, 9, 22], []]


def data() -> tuple[Tensor, Tensor]:
    X = torch.randn(23, 3, generator=generator("retrain fallback"), dtype=F64)
    return X, torch.sin(X[:, :1])


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 1)).double()


SGD = ie.Recipe(mlp, nn.MSELoss(), lr=0.05, epochs=5, batch_size=6, seed=1)


def test_progress_goes_on_where_sets_fall_back(monkeypatch: pytest.MonkeyPatch) -> None:
    run = ie.train(SGD, data())
    fail_after(5, RuntimeError("no more"), monkeypatch)
    seen: list[tuple[str, int, int]] = []
    ie.retrain_many(run, GROUPS, "warm", progress=lambda *args: seen.append(args))
    counts = [done for _, done, _ in seen]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (0, 12)


def test_progress_of_convergence_counts_epochs_and_steps() -> None:
    run = ie.train(replace(SGD, weight_decay=0.05), data())
    seen: list[tuple[str, int, int]] = []
    ie.retrain_many(run, GROUPS[:2], converge=True, rtol=1e-4, max_steps=50, progress=lambda *args: seen.append(args))
    counts = [done for _, done, _ in seen]
    assert counts == sorted(counts)
    assert {total for _, _, total in seen} == {2 * (5 + 50)}
    assert (counts[0], counts[-1]) == (0, 110)


def fail_after(steps: int, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the core take some steps, then fail."""
    step, taken = stacks.NativeStack.step, []

    def failing(self: Any, *args: Any) -> Tensor:
        taken.append(1)
        if len(taken) > steps:
            raise error
        return step(self, *args)

    monkeypatch.setattr(stacks.NativeStack, "step", failing)


def test_what_fails_inside_is_told_as_a_warning(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    run = ie.train(SGD, data())
    fail_after(2, RuntimeError("no kernel for it"), monkeypatch)
    many = ie.retrain_many(run, GROUPS, "warm")
    [record] = [r for r in caplog.records if r.name == "influence_ext"]
    assert record.levelname == "WARNING"
    assert record.getMessage() == "warm start: 4 removed sets are trained one by one: RuntimeError: no kernel for it."
    for group, response in zip(GROUPS, many, strict=True):
        assert response.one_by_one == "RuntimeError: no kernel for it"
        assert torch.equal(response.params, ie.retrain(run, group, "warm").params)


def test_mistakes_of_the_package_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    run = ie.train(SGD, data())
    fail_after(2, AssertionError("two lists differ"), monkeypatch)
    with pytest.raises(AssertionError, match="two lists differ"):
        ie.retrain_many(run, GROUPS, "warm")


def test_gradient_norms_cost_nothing_until_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    run = ie.train(SGD, data())
    passes: list[int] = []
    gradients = together.Ensemble.gradients

    def counted(self: Any, theta: Tensor, *args: Any, **options: Any) -> Tensor:
        passes.append(len(theta))
        return gradients(self, theta, *args, **options)

    monkeypatch.setattr(together.Ensemble, "gradients", counted)
    many = ie.retrain_many(run, GROUPS, "warm")
    assert passes == []
    norms = [response.gradient_norm for response in many]
    assert passes == [4]
    again = copy.deepcopy(many[1])
    assert (again.gradient_norm, again.relative_gradient_norm) == (norms[1], many[1].relative_gradient_norm)


def test_where_the_core_fails_torch_takes_the_steps(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def failing(*args: Any) -> Any:
        raise RuntimeError("a broken build")

    monkeypatch.setattr(together.Plan, "of", failing)
    monkeypatch.setattr(stacks.NativeStack, "step", lambda *args: pytest.fail("the core took a step"))
    run = ie.train(SGD, data())
    for group, response in zip(GROUPS, ie.retrain_many(run, GROUPS, "warm"), strict=True):
        assert response.one_by_one is None
        assert_close(response.params, ie.retrain(run, group, "warm").params)
    [record] = [r for r in caplog.records if r.name == "influence_ext"]
    assert record.levelname == "WARNING"
    assert record.getMessage() == "together: the C++ core failed, torch.vmap takes the steps: RuntimeError: a broken build"
