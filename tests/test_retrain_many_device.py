"""Many parameter sets on the emulated device: the trajectories of one by one, one launch for all sets, no waiting, memory as charged."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import influence_ext as ie
from influence_ext.bregman import stacks, together
from influence_ext.data import load
from influence_ext.losses import resolve
from influence_ext.plan import Plan
from influence_ext.testing import assert_close
from tests.cases import generator
from tests.emulation import Traffic, emulated_device, most_bytes
from tests.test_retrain_many import F64, GROUPS, ROWS, check_trajectories, routes, trainer_of

__all__ = ["routes"]

ON_THE_DEVICE = [
    "sgd-decay",
    "adam-decay",
    "weighted-classes",
    "weighted-elements",
    "tied",
    "sequence",
    "frozen-first",
    "embedding",
    "residual",
    "matrix",
    "convolution",
    pytest.param("lenet", marks=pytest.mark.slow),  # half a minute each in the emulation; "convolution" and "residual" are quick
    pytest.param("residual-images", marks=pytest.mark.slow),
    "layer-norm",
]


@pytest.mark.parametrize("row", ON_THE_DEVICE)
def test_every_trajectory_on_the_device_is_the_one_by_itself(row: str, routes: list[str]) -> None:
    with emulated_device():
        check_trajectories(row)
    assert set(routes) == {"NativeStack"}


@pytest.mark.parametrize("row", ["sgd-decay", "adam-decay", "embedding", "convolution", "lenet", "residual-images", "layer-norm"])
def test_a_step_on_the_device_takes_as_many_launches_for_any_number_of_sets(row: str) -> None:
    recipe, examples = ROWS[row]
    run = ie.train(recipe, examples())
    trainer = trainer_of(run)
    batch = torch.arange(6)
    asked = {}
    with emulated_device():
        trainer.model.eval()
        ensemble = Plan.of(trainer.model, trainer.examples.X).ensemble(trainer.examples, trainer.loss)
        assert ensemble is not None
        for sets in (2, 9):
            theta = run.params.repeat(sets, 1)
            moments = stacks.no_moments(recipe, theta)
            for _ in range(2):  # the first makes what later ones use again
                before = Traffic.now()
                numbers = stacks.descent(recipe, 1, 0.01, 0.5)
                kept = torch.ones(sets, len(batch), dtype=torch.bool)
                ensemble.step(theta, moments, batch, scale=1.0, kept=kept, descent=numbers, anchor=run.params)
                asked[sets] = Traffic.now().since(before)
    assert asked[2] == asked[9]
    assert asked[9].copies == (row == "embedding")  # indices are checked, once for all sets
    if row == "sgd-decay":  # two layers: two products forward, three backward
        assert asked[9] == Traffic(launches=11, products=5, copies=0)


def test_gradients_on_the_device_are_those_of_autograd() -> None:
    """More examples than a block has threads, wide outputs, most rows dropped, one of them infinite."""
    g = generator("ensemble on the device")
    sets, size, width = 3, 300, 40
    model = nn.Linear(3, width).double()
    X, y = torch.randn(size, 3, generator=g, dtype=F64), torch.randn(size, width, generator=g, dtype=F64)
    theta = torch.randn(sets, 4 * width, generator=g, dtype=F64)
    anchor, kept = torch.randn(4 * width, generator=g, dtype=F64), torch.rand(sets, size, generator=g) < 0.3
    kept[:, 7] = False
    batches = torch.arange(size).split(290)
    expected = []
    for k in range(sets):
        at = theta[k].clone().requires_grad_()
        z = X[kept[k]] @ at[: 3 * width].view(width, 3).T + at[3 * width :]
        value = 0.5 * ((z - y[kept[k]]) ** 2).mean(dim=1).sum() + 0.1 * (at**2).sum() + 0.35 * ((at - anchor) ** 2).sum()
        expected.append(torch.autograd.grad(value, at)[0])
    y[7] = torch.inf
    with emulated_device():
        ensemble = Plan.of(model, X).ensemble(load((X, y.nan_to_num(posinf=0.0)), "test"), resolve(nn.MSELoss()))
        assert ensemble is not None
        ensemble._loss = replace(ensemble._loss, target=y)
        found = ensemble.gradients(
            theta, batches, scale=0.5, kept=[kept[:, batch].contiguous() for batch in batches], decay=0.2, damping=0.7, anchor=anchor
        )
    assert_close(found, torch.stack(expected))


LONG_MEMORY = [pytest.param("residual-images", marks=pytest.mark.slow)]


@pytest.mark.parametrize("row", ["sgd-decay", "classes", "sequence", "embedding", "convolution", "lenet", *LONG_MEMORY, "layer-norm"])
def test_the_memory_of_a_set_on_the_device_is_charged(row: str) -> None:
    recipe, examples = ROWS[row]
    recipe = replace(recipe, batch_size=14)  # and a last batch of 9
    gc.collect()
    with emulated_device():
        most_bytes()
        before = most_bytes()  # of plans that other tests have captured
        run = ie.train(recipe, examples())
        probe = together._probe(trainer_of(run), run.final)
        assert probe.ensemble is not None
        stack = stacks.NativeStack(trainer_of(run), run.final, [[]] * 40, None, probe.ensemble)
        most_bytes()
        stack.walk(0)
        needed = most_bytes() - before
    charged = 40 * (probe.bytes_per_set - 4 * run.params.nbytes)  # without parameters, moments and ends, which are torch's
    assert charged / 4 < needed < charged


class Readings(TorchDispatchMode):
    """Counts what has the host wait for a device."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("row", ["sgd-decay", "weighted-classes"])
def test_an_epoch_waits_for_the_device_at_its_end_only(row: str) -> None:
    counts = []
    for size in (2, 12):
        recipe, examples = ROWS[row]
        run = ie.train(replace(recipe, batch_size=size), examples())
        with emulated_device(), Readings() as readings:
            ie.retrain_many(run, GROUPS)
        counts.append(readings.count)
    assert counts[0] == counts[1] > 0
