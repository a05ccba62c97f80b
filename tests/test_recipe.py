"""Recipes and base training: PyTorch's own updates in the recipe's batch order, everything from the seed, nothing disturbed."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import influence_ext as ie
from influence_ext.errors import ArgumentError, DataError, DivergenceError, DTypeError
from influence_ext.testing import assert_close
from tests.cases import generator

F64 = torch.float64
N = 23  # not a multiple of the batch size


def mlp(outputs: int = 1, width: int = 5) -> nn.Module:
    return nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, outputs)).double()


def regression() -> tuple[Tensor, Tensor]:
    g = generator("recipe")
    X = torch.randn(N, 3, generator=g, dtype=F64)
    return X, torch.sin(X[:, :1]) + 0.1 * torch.randn(N, 1, generator=g, dtype=F64)


def classes() -> tuple[Tensor, Tensor]:
    X, y = regression()
    return X, (y[:, 0] > 0).long() + (y[:, 0] > 0.5).long()


BASE = ie.Recipe(mlp, nn.MSELoss(), lr=0.05, epochs=4, batch_size=6, seed=3)
ROWS = {
    "sgd": (BASE, regression),
    "sgd-plain": (replace(BASE, momentum=0.0), regression),
    "sgd-decay": (replace(BASE, weight_decay=0.03), regression),
    "sgd-cosine": (replace(BASE, schedule="cosine"), regression),
    "sgd-function": (replace(BASE, schedule=lambda epoch: 0.5**epoch), regression),
    "adam": (replace(BASE, optimizer="adam", lr=0.01), regression),
    "adam-decay": (replace(BASE, optimizer="adam", lr=0.01, weight_decay=0.1, betas=(0.8, 0.9), eps=1e-6), regression),
    "classes": (replace(BASE, build_model=lambda: mlp(3), loss=nn.CrossEntropyLoss()), classes),
    "one-batch": (replace(BASE, batch_size=1000), regression),
}


def by_torch_optim(recipe: ie.Recipe, data: tuple[Tensor, Tensor]) -> tuple[nn.Module, list[float]]:
    """The textbook loop: same network, same order of the batches, torch.optim."""
    model = ie.train(replace(recipe, epochs=1, lr=1e-300), data).model  # the initial values, moved by nothing
    if recipe.optimizer == "adam":
        optimizer: Any = torch.optim.Adam(model.parameters(), recipe.lr, recipe.betas, recipe.eps, recipe.weight_decay)
    else:
        optimizer = torch.optim.SGD(model.parameters(), recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay)
    losses = []
    for epoch in range(recipe.epochs):
        factor = {"constant": 1.0, "cosine": 0.5 * (1 + math.cos(math.pi * epoch / recipe.epochs))}.get(str(recipe.schedule))
        optimizer.param_groups[0]["lr"] = recipe.lr * (recipe.schedule(epoch) if factor is None else factor)
        total = 0.0
        for batch in recipe.batch_order(epoch, N).split(recipe.batch_size):
            optimizer.zero_grad()
            loss = recipe.loss(model(data[0][batch]), data[1][batch])
            loss.backward()
            optimizer.step()
            total += loss.item() * len(batch)
        losses.append(total / N)
    return model, losses


@pytest.mark.parametrize("row", ROWS)
def test_training_is_the_textbook_loop(row: str) -> None:
    recipe, data = ROWS[row]
    run = ie.train(recipe, data())
    oracle, losses = by_torch_optim(recipe, data())
    flat = torch.cat([p.detach().reshape(-1) for p in oracle.parameters()])
    assert_close(run.params, flat, what="parameters")
    assert_close(torch.tensor(run.history["loss"], dtype=F64), torch.tensor(losses, dtype=F64), what="history")
    assert_close(torch.cat([p.detach().reshape(-1) for p in run.model.parameters()]), flat, what="the model's parameters")
    assert not run.model.training
    assert all(p.grad is None for p in run.model.parameters())


def test_a_sum_is_the_mean_with_the_learning_rate_divided_by_n() -> None:
    mean = ie.train(BASE, regression())
    total = ie.train(replace(BASE, loss=nn.MSELoss(reduction="sum"), lr=BASE.lr / N), regression())
    assert_close(total.params, mean.params)


def test_the_seed_decides_everything() -> None:
    recipe = replace(BASE, build_model=lambda: nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 1)).double())
    first = ie.train(recipe, regression())
    torch.rand(7)  # moves the global state
    again = ie.train(recipe, regression())
    other = ie.train(replace(recipe, seed=4), regression())
    assert torch.equal(first.params, again.params)
    assert first.history == again.history
    assert torch.equal(first.initial_params, again.initial_params)
    assert not torch.equal(first.initial_params, other.initial_params)
    assert not torch.equal(first.batch_order(0), other.batch_order(0))


def test_dropout_is_active_in_training() -> None:
    def build(p: float) -> nn.Module:
        return nn.Sequential(nn.Linear(3, 8), nn.Dropout(p), nn.Linear(8, 1)).double()

    dropped = ie.train(replace(BASE, build_model=lambda: build(0.5)), regression())
    kept = ie.train(replace(BASE, build_model=lambda: build(0.0)), regression())
    assert torch.equal(dropped.initial_params, kept.initial_params)
    assert not torch.allclose(dropped.params, kept.params)


def test_batch_orders_are_permutations_that_differ_by_epoch() -> None:
    orders = [BASE.batch_order(epoch, N) for epoch in range(6)]
    assert all(torch.equal(order.sort().values, torch.arange(N)) for order in orders)
    assert len({tuple(order.tolist()) for order in orders}) == 6
    neighbours = [replace(BASE, seed=seed).batch_order(epoch, N) for seed in range(4) for epoch in range(4)]
    assert len({tuple(order.tolist()) for order in neighbours}) == 16


def test_batches_are_one_data_set() -> None:
    X, y = regression()
    assert torch.equal(ie.train(BASE, [(X[:9], y[:9]), (X[9:], y[9:])]).params, ie.train(BASE, (X, y)).params)


def test_cosine_runs_out_and_starts_again_in_the_branches() -> None:
    recipe = replace(BASE, schedule="cosine", epochs=5)
    assert recipe.branch_epochs == 3
    factors = [recipe.lr_factor(epoch) for epoch in range(9)]
    expected = [0.5 * (1 + math.cos(math.pi * t)) for t in (0, 0.2, 0.4, 0.6, 0.8, 0, 1 / 3, 2 / 3, 1)]
    assert factors == pytest.approx(expected, abs=1e-15)


def test_dtype_of_the_recipe_converts_network_and_data() -> None:
    X, y = regression()
    run = ie.train(replace(BASE, build_model=lambda: mlp().float(), dtype=F64), (X.float(), y.float()))
    assert run.params.dtype == F64
    assert run.data.inputs[0].dtype == run.data.targets.dtype == F64


def test_the_points_of_a_run_do_not_share_memory_with_its_model() -> None:
    run = ie.train(BASE, regression())
    before = run.params.clone()
    with torch.no_grad():
        next(run.model.parameters()).zero_()
    assert torch.equal(run.params, before)


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, RuntimeError])
def test_the_global_random_state_is_left_alone(error: type[BaseException] | None) -> None:
    def stop(label: str, done: int, total: int) -> None:
        if error is not None and done == 2:
            raise error

    torch.manual_seed(11)
    before = torch.get_rng_state()
    if error is None:
        ie.train(BASE, regression())
    else:
        with pytest.raises(error):
            ie.train(BASE, regression(), progress=stop)
    assert torch.equal(torch.get_rng_state(), before)


def test_progress_counts_epochs(capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[tuple[str, int, int]] = []
    ie.train(BASE, regression(), progress=lambda *args: seen.append(args))
    assert seen == [("training", done, 4) for done in range(5)]
    assert capsys.readouterr().err == ""
    ie.train(BASE, regression(), progress=True)
    err = capsys.readouterr().err
    assert "training" in err
    assert err.endswith("4/4\n")


ERRORS = {
    "adamw": ({"optimizer": "adamw"}, r"got 'adamw', whose decoupled weight decay minimises no \(w/2\)‖θ‖².*use 'adam'"),
    "optimizer": ({"optimizer": "lbfgs"}, "expected optimizer 'sgd' or 'adam', got 'lbfgs'"),
    "lr": ({"lr": 0.0}, "expected lr to be a positive number, got 0.0"),
    "lr-nan": ({"lr": math.nan}, "expected lr to be a positive number, got nan"),
    "momentum": ({"momentum": 1.0}, r"expected momentum to be a number in \[0, 1\), got 1.0"),
    "betas": ({"betas": (0.9, 1.0)}, r"expected betas to be two numbers in \[0, 1\)"),
    "eps": ({"eps": 0}, "expected eps to be a positive number"),
    "weight_decay": ({"weight_decay": -1.0}, "expected weight_decay to be a number of at least 0, got -1.0"),
    "epochs": ({"epochs": 0}, "expected epochs to be a whole number of at least 1, got 0"),
    "batch_size": ({"batch_size": 2.5}, "expected batch_size to be a whole number of at least 1, got 2.5"),
    "seed": ({"seed": -1}, "expected seed to be a whole number of at least 0, got -1"),
    "schedule": ({"schedule": "linear"}, "expected schedule 'constant', 'cosine' or a function of the epoch, got 'linear'"),
    "build_model": ({"build_model": nn.Linear(2, 2).weight}, "expected build_model to be a function that returns a new network, got Par"),
}


@pytest.mark.parametrize("row", ERRORS)
def test_options_that_make_no_sense(row: str) -> None:
    options, message = ERRORS[row]
    with pytest.raises(ArgumentError, match=message):
        replace(BASE, **options)


def test_unusable_training() -> None:
    X, y = regression()
    with pytest.raises(ArgumentError, match=r"expected build_model to return an nn\.Module, got int"):
        ie.train(replace(BASE, build_model=lambda: 3), (X, y))
    with pytest.raises(DTypeError, match=r"expected inputs of the parameters' dtype torch\.float64, got torch\.float32"):
        ie.train(BASE, (X.float(), y))
    with pytest.raises(DataError, match="at least one example"):
        ie.train(BASE, (X[:0], y[:0]))
    with pytest.raises(DivergenceError, match=r"training: expected finite parameters .* after epoch 1; lower lr \(now 1e\+200\)"):
        ie.train(replace(BASE, lr=1e200), (X, y))
