"""Recipes and base training: PyTorch's own updates in the recipe's batch order, everything from the seed, nothing disturbed."""

from __future__ import annotations

import json
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import influence_ext as ie
from influence_ext.errors import ArgumentError, DataError, DeviceError, DivergenceError, DTypeError, ShapeError
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


def test_threads_train_as_one_does_and_leave_the_random_state_alone() -> None:
    recipe = replace(BASE, build_model=lambda: nn.Sequential(nn.Linear(3, 20), nn.Dropout(0.5), nn.Linear(20, 1)).double(), lr=0.005)
    expected, state = ie.train(recipe, regression()).params, torch.get_rng_state()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: ie.train(recipe, regression()).params, range(8)))
    assert all(torch.equal(params, expected) for params in found)
    assert torch.equal(torch.get_rng_state(), state)


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
    "lr-beyond-floats": ({"lr": 10**400}, "expected lr to be a positive number, got 10000"),
    "momentum": ({"momentum": 1.0}, r"expected momentum to be a number in \[0, 1\), got 1.0"),
    "betas": ({"betas": (0.9, 1.0)}, r"expected betas to be two numbers in \[0, 1\)"),
    "eps": ({"eps": 0}, "expected eps to be a positive number"),
    "weight_decay": ({"weight_decay": -1.0}, "expected weight_decay to be a number of at least 0, got -1.0"),
    "epochs": ({"epochs": 0}, "expected epochs to be a whole number of at least 1, got 0"),
    "batch_size": ({"batch_size": 2.5}, "expected batch_size to be a whole number of at least 1, got 2.5"),
    "seed": ({"seed": -1}, "expected seed to be a whole number of at least 0, got -1"),
    "schedule": ({"schedule": "linear"}, "expected schedule 'constant', 'cosine' or a function of the epoch, got 'linear'"),
    "build_model": ({"build_model": nn.Linear(2, 2).weight}, "expected build_model to be a function that returns a new network, got Par"),
    "network": ({"build_model": nn.Linear(2, 2)}, "expected build_model to be a function that returns a new network, got Linear"),
    "momentum-none": ({"momentum": None}, r"expected momentum to be a number in \[0, 1\), got None"),
    "betas-number": ({"betas": 0.9}, r"expected betas to be two numbers in \[0, 1\), got 0.9"),
    "dtype": ({"dtype": torch.bfloat16}, r"expected dtype to be None, torch\.float32 or torch\.float64, got torch\.bfloat16"),
    "device": ({"device": "gpu"}, "expected device to be None, 'cpu' or a CUDA device, which the kernels are for, got 'gpu'"),
    "device-without-kernels": ({"device": "mps"}, "expected device to be None, 'cpu' or a CUDA device, .* got 'mps'"),
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
    with pytest.raises(DeviceError, match=r"train: expected parameters on the CPU or a CUDA device, got .*weight on meta"):
        ie.train(replace(BASE, build_model=lambda: nn.Linear(2, 1, device="meta")), (X, y))
    with pytest.raises(ArgumentError, match="train: expected a Recipe, got tuple"):
        ie.train((X, y), BASE)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"train: expected inputs that the network takes, got RuntimeError: mat1 .* cannot be multiplied"):
        ie.train(BASE, (X[:, :1], y))
    with pytest.raises(DTypeError, match="train: expected y in data to be a tensor, got ndarray"):
        ie.train(BASE, (X, y.numpy()))
    with pytest.raises(DTypeError, match="train: expected a network in float32 or float64, got parameters in half precision"):
        ie.train(replace(BASE, build_model=lambda: nn.Linear(4, 2).half()), (X.float(), y.float()))
    with pytest.raises(ShapeError, match=r"train: expected a network that returns one tensor .* got tuple"):
        ie.train(replace(BASE, build_model=lambda: nn.LSTM(X.shape[1], 2).double()), (X, y))
    with pytest.raises(ArgumentError, match="expected schedule to return a number of at least 0, got nan for epoch 1"):
        ie.train(replace(BASE, schedule=lambda epoch: math.nan if epoch else 1.0), (X, y))


def test_a_schedule_that_draws_repeats_itself_and_leaves_the_generators_alone() -> None:
    recipe, state = replace(BASE, schedule=lambda epoch: float(torch.rand(()))), torch.get_rng_state()
    first, second = (ie.train(recipe, regression()) for _ in range(2))
    assert len(set(first.history["lr"])) == recipe.epochs
    assert torch.equal(first.params, second.params)
    assert torch.equal(torch.get_rng_state(), state)


def test_what_does_not_fit_is_said_before_training_in_the_order_of_the_data() -> None:
    X, y = torch.randn(9, 4), torch.arange(9) % 3
    y[7] = 3
    recipe = ie.Recipe(lambda: nn.Linear(4, 3), nn.CrossEntropyLoss(), epochs=1, batch_size=4)
    with pytest.raises(DataError, match=r"train: expected class indices in \[0, 3\), got 3 in example 7 \(1 of 9 examples\)"):
        ie.train(recipe, (X, y))


def test_what_a_network_says_in_training_mode_is_told_in_a_sentence() -> None:
    class Pair(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            return (super().forward(x),) if self.training else super().forward(x)

    class Vast(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + torch.empty(10**15))

    with pytest.raises(ShapeError, match=r"training: expected a network that returns one tensor .* got tuple"):
        ie.train(replace(BASE, build_model=lambda: Pair(3, 1).double()), regression())
    normed = replace(BASE, build_model=lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double(), batch_size=11)
    with pytest.raises(DataError, match=r"training: .* got ValueError: Expected more than 1 value .* no batch of a single example"):
        ie.train(normed, regression())
    with pytest.raises(RuntimeError, match="allocate memory") as caught:
        ie.train(replace(BASE, build_model=lambda: Vast(3, 1).double()), regression())
    assert not isinstance(caught.value, DataError)
    weight_norm = replace(BASE, build_model=lambda: nn.utils.weight_norm(nn.Linear(3, 1).double()))
    with pytest.warns(FutureWarning), pytest.raises(ArgumentError, match=r"that copy\.deepcopy copies, got .*use torch\.nn\.utils\.param"):
        ie.train(weight_norm, regression())


def test_training_in_inference_mode_is_training() -> None:
    expected = ie.retrain(ie.train(BASE, regression()), [1])
    with torch.inference_mode():
        found = ie.retrain(ie.train(BASE, regression()), [1])
        assert torch.equal(found.params, expected.params)
        assert found.gradient_norm == expected.gradient_norm


def test_a_callable_is_checked_on_outputs_with_their_own_targets() -> None:
    class Carrying(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([super().forward(x), x[:, :1]], dim=1)

    def near(z: Tensor, t: Tensor) -> Tensor:  # finite where the example's own input is the second target
        return ((z[:, 0] - t[:, 0]) ** 2 / (1e-3 - (z[:, 1] - t[:, 1]).abs()).sqrt()).mean()

    X, y = regression()
    recipe = replace(BASE, build_model=lambda: Carrying(3, 1).double(), loss=near, lr=1e-4, batch_size=1)
    assert ie.train(recipe, (X, torch.cat([y, X[:, :1]], dim=1))).loss.reduction == "mean"


def test_a_callable_says_itself_whether_it_is_a_mean_or_a_sum() -> None:
    def steep(z: Tensor, t: Tensor) -> Tensor:
        return (z - t).cosh().log().sum(dim=1).mean()

    def steep_sum(z: Tensor, t: Tensor) -> Tensor:
        return (z - t).cosh().log().sum()

    data = regression()
    stated = ie.train(replace(BASE, loss=steep, reduction="mean"), data)
    assert torch.equal(ie.train(replace(BASE, loss=steep), data).params, stated.params)
    sums = ie.train(replace(BASE, loss=steep_sum, lr=BASE.lr / len(data[0])), data)
    assert sums.loss.reduction == "sum"
    assert_close(sums.params, stated.params)
    assert_close(ie.retrain(sums, [1], "warm").params, ie.retrain(stated, [1], "warm").params)
    with pytest.raises(ArgumentError, match="train: expected steep to be a sum over examples as stated, got a mean"):
        ie.train(replace(BASE, loss=steep, reduction="sum"), data)


def test_a_network_that_exists_is_a_starting_point_and_stays_as_it_is() -> None:
    network = BASE.build_model()
    before, mode = [p.detach().clone() for p in network.parameters()], network.training
    recipe = replace(BASE, build_model=lambda: network)
    first, second = (ie.train(recipe, regression()).params for _ in range(2))
    assert torch.equal(first, second)
    assert network.training is mode
    assert all(torch.equal(was, now) for was, now in zip(before, network.parameters(), strict=True))


def test_numbers_of_numpy_are_numbers() -> None:
    recipe = replace(BASE, epochs=np.int64(2), lr=np.float32(0.5))
    assert json.loads(json.dumps(recipe.describe()))["epochs"] == 2
    assert type(recipe.lr) is float
