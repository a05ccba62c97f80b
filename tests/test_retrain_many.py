"""Retraining without each of several sets at once: the trajectories are those of one by one, and what cannot be shared is told."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import influence_ext as ie
from influence_ext.bregman import stacks, together
from influence_ext.bregman.training import Trainer
from influence_ext.errors import ArgumentError, DivergenceError
from influence_ext.testing import assert_close
from tests.cases import generator
from tests.cases.models import ResidualImages

F64 = torch.float64
N = 23  # not a multiple of the batch size
GROUPS = [[4], [17], [0, 4, 9, 22], []]
DAMPING = 0.7


def data() -> tuple[Tensor, Tensor]:
    g = generator("retrain many")
    X = torch.randn(N, 3, generator=g, dtype=F64)
    return X, torch.sin(X[:, :1]) + 0.3 * torch.randn(N, 1, generator=g, dtype=F64)


def classes() -> tuple[Tensor, Tensor]:
    X, y = data()
    return X, (y[:, 0] > 0).long() + (y[:, 0] > 0.5).long()


def images() -> tuple[Tensor, Tensor]:
    return torch.randn(N, 1, 6, 6, generator=generator("images"), dtype=F64), classes()[1]


def mlp(outputs: int = 1) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, outputs)).double()


class Tied(nn.Module):
    """One matrix used twice, a frozen parameter, and a trained one that nothing depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 1)
        self.second.weight = self.first.weight
        self.head.bias.requires_grad_(False)
        self.unused = nn.Parameter(torch.ones(2))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))
        return z


class Sum(nn.Module):
    """Two parameters that autograd may hand one and the same gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.zeros(3, 1, dtype=F64)), nn.Parameter(torch.ones(3, 1, dtype=F64))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.a + self.b)


def frozen_first() -> nn.Module:
    network = mlp()
    network[0].requires_grad_(False)  # type: ignore[index]
    return network


def convolutional() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 3)).double()


def lenet() -> nn.Module:
    """A convolution under a max pool that is one node with it where there is AVX-512, and another that no pool reads."""
    layers = nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3)
    return nn.Sequential(*layers).double()


def larger_images() -> tuple[Tensor, Tensor]:
    return torch.randn(N, 1, 12, 12, generator=generator("larger images"), dtype=F64), classes()[1]


def normalised() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.GELU(), nn.Linear(4, 1)).double()


class Matrix(nn.Module):
    """A product with a matrix stored the other way round."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Parameter(torch.linspace(-1, 1, 18, dtype=F64).view(3, 6)), nn.Linear(6, 1).double()

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.last(torch.tanh(x @ self.first))
        return z


def wide() -> nn.Module:
    """A weight whose gradient takes several blocks."""
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 500, bias=False), nn.Tanh(), nn.Linear(500, 3)).double()


class Sequence(nn.Module):
    """Several positions an example, a linear layer without bias and a frozen one between trained ones."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.frozen, self.last = nn.Linear(1, 4, bias=False), nn.Linear(4, 4), nn.Linear(4, 1)
        self.frozen.requires_grad_(False)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.last(torch.tanh(self.frozen(torch.tanh(self.first(x[:, :, None]))))).mean(dim=1)
        return z


class Residual(nn.Module):
    """Values of all sets meet such that are the same for all: the input, and what a frozen layer makes of it."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.inner, self.last = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 1)
        self.frozen.requires_grad_(False)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.frozen(x))
        z: Tensor = self.last(torch.tanh(self.inner(h)) * h + x)
        return z


def indices() -> tuple[Tensor, Tensor]:
    return torch.randint(5, (N, 2), generator=generator("indices")), data()[1]


SGD = ie.Recipe(mlp, nn.MSELoss(), lr=0.05, epochs=5, batch_size=6, seed=1)
ADAM = replace(SGD, optimizer="adam", lr=0.01)
ROWS: dict[str, tuple[ie.Recipe, Callable[[], tuple[Tensor, Tensor]]]] = {
    "sgd": (SGD, data),
    "sgd-plain": (replace(SGD, momentum=0.0), data),
    "sgd-decay": (replace(SGD, weight_decay=0.02), data),
    "sgd-cosine": (replace(SGD, schedule="cosine"), data),
    "sgd-function": (replace(SGD, schedule=lambda epoch: 0.8**epoch), data),
    "batches-of-one": (replace(SGD, batch_size=1, epochs=2, lr=0.01), data),
    "one-batch": (replace(SGD, batch_size=100), data),
    "adam": (ADAM, data),
    "adam-decay": (replace(ADAM, weight_decay=0.1, betas=(0.8, 0.9), eps=1e-6), data),
    "sum": (replace(SGD, loss=nn.MSELoss(reduction="sum"), lr=0.05 / N), data),
    "classes": (replace(SGD, build_model=lambda: mlp(3), loss=nn.CrossEntropyLoss(label_smoothing=0.1)), classes),
    "weighted-classes": (
        replace(SGD, build_model=lambda: mlp(3), loss=nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5], dtype=F64))),
        classes,
    ),
    "callable": (replace(SGD, loss=lambda z, t: ((z - t) ** 4).mean(), reduction="mean"), data),
    "tied": (replace(SGD, build_model=Tied, weight_decay=0.02), data),
    "sequence": (replace(SGD, build_model=Sequence), data),
    "matrix": (replace(SGD, build_model=Matrix, weight_decay=0.02), data),
    "wide": (replace(ADAM, build_model=wide, loss=nn.CrossEntropyLoss(), weight_decay=0.02, epochs=3, batch_size=16), images),
    "frozen-first": (replace(SGD, build_model=frozen_first), data),
    "shared-gradient": (replace(SGD, build_model=Sum, weight_decay=0.02), data),
    "convolution": (replace(SGD, build_model=convolutional, loss=nn.CrossEntropyLoss()), images),
    "lenet": (replace(SGD, build_model=lenet, loss=nn.CrossEntropyLoss()), larger_images),
    "residual-images": (replace(SGD, build_model=ResidualImages, loss=nn.CrossEntropyLoss(), weight_decay=0.02), images),
    "layer-norm": (replace(SGD, build_model=normalised), data),
    "residual": (replace(SGD, build_model=Residual), data),
    "embedding": (replace(SGD, build_model=lambda: nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(6, 1)).double()), indices),
    "weighted-elements": (
        replace(SGD, build_model=lambda: mlp(2), loss=nn.BCEWithLogitsLoss(pos_weight=torch.tensor([2.0, 0.5], dtype=F64))),
        lambda: (data()[0], (data()[0][:, :2] > 0).double()),
    ),
}
IN_TORCH = {"callable", "shared-gradient"}
"""Rows that the C++ core has not all of: the loss, and a parameter that is computed from others."""


@pytest.fixture
def routes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The stacks that take steps, in order."""
    taken: list[str] = []
    for kind in (stacks.NativeStack, stacks.MappedStack):

        def step(self: Any, *args: Any, step: Any = kind.step) -> Tensor:
            taken.append(type(self).__name__)
            return step(self, *args)

        monkeypatch.setattr(kind, "step", step)
    return taken


@pytest.mark.parametrize("native", [True, False], ids=["native", "mapped"])
@pytest.mark.parametrize("row", ROWS)
def test_every_trajectory_is_the_one_by_itself(row: str, native: bool, routes: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if not native:
        monkeypatch.setattr(together, "_native", lambda *args: None)
    check_trajectories(row)
    assert set(routes) == {"NativeStack" if native and row not in IN_TORCH else "MappedStack"}


@pytest.mark.parametrize("threads", [2, 5])
def test_threads_take_sets_and_change_nothing(threads: int) -> None:
    recipe, examples = ROWS["convolution"]
    run, before = ie.train(recipe, examples()), torch.get_num_threads()
    alone = ie.retrain_many(run, GROUPS)
    torch.set_num_threads(threads)
    try:
        shared = ie.retrain_many(run, GROUPS)
    finally:
        torch.set_num_threads(before)
    for a, b in zip(alone, shared, strict=True):
        assert_close(a.params, b.params)


def test_results_repeat_bit_for_bit() -> None:
    recipe, examples = ROWS["wide"]
    run, before = ie.train(recipe, examples()), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first, second = (ie.retrain_many(run, GROUPS, "warm") for _ in range(2))
    finally:
        torch.set_num_threads(before)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.params, b.params)


def test_a_batch_that_takes_several_tiles_is_one_step() -> None:
    X = torch.randn(2500, 3, generator=generator("long batch"), dtype=F64)
    run = ie.train(replace(SGD, batch_size=len(X), epochs=2), (X, torch.sin(X[:, :1])))
    for group, response in zip(GROUPS, ie.retrain_many(run, GROUPS, "warm"), strict=True):
        same(response, ie.retrain(run, group, "warm"))


def check_trajectories(row: str) -> None:
    recipe, examples = ROWS[row]
    run = ie.train(recipe, examples())
    for start in ("cold", "warm"):
        many = ie.retrain_many(run, GROUPS, start)
        assert [response.removed for response in many] == [tuple(group) for group in GROUPS]
        for group, response in zip(GROUPS, many, strict=True):
            same(response, ie.retrain(run, group, start))
    for group, response in zip(GROUPS, ie.proximal_response_many(run, GROUPS, DAMPING), strict=True):
        same(response, ie.proximal_response(run, group, DAMPING))


def same(response: Any, alone: Any) -> None:
    assert response.one_by_one is None
    assert alone.one_by_one is None
    assert_close(response.params, alone.params)
    assert (response.kind, response.status, response.num_steps) == (alone.kind, alone.status, alone.num_steps)
    assert response.gradient_norm == pytest.approx(alone.gradient_norm, rel=1e-9)
    assert response.relative_gradient_norm == pytest.approx(alone.relative_gradient_norm, rel=1e-9)


@pytest.mark.parametrize("row", ["sgd-decay", "adam-decay"])
@pytest.mark.parametrize("start", ["cold", "warm"])
def test_a_set_is_trained_by_the_textbook_loop(row: str, start: str) -> None:
    recipe = ROWS[row][0]
    X, y = data()
    many = ie.retrain_many(ie.train(recipe, data()), GROUPS, start)
    for group, response in zip(GROUPS, many, strict=True):
        model = ie.train(replace(recipe, epochs=1, lr=1e-300), data()).model  # the initial values, moved by nothing
        if recipe.optimizer == "adam":
            optimizer: Any = torch.optim.Adam(model.parameters(), recipe.lr, recipe.betas, recipe.eps, recipe.weight_decay)
        else:
            optimizer = torch.optim.SGD(model.parameters(), recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay)
        for epoch in range(recipe.epochs + recipe.branch_epochs):
            removed = group if start == "cold" or epoch >= recipe.epochs else []
            for batch in recipe.batch_order(epoch, N).split(recipe.batch_size):
                kept = [i for i in batch.tolist() if i not in removed]
                optimizer.zero_grad()
                (F.mse_loss(model(X[kept]), y[kept], reduction="sum") / len(batch)).backward()
                optimizer.step()
        assert_close(response.params, torch.cat([p.detach().reshape(-1) for p in model.parameters()]))


def test_the_sets_are_really_trained_together(monkeypatch: pytest.MonkeyPatch) -> None:
    run = ie.train(SGD, data())
    steps: list[int] = []
    step = stacks.NativeStack.step
    monkeypatch.setattr(stacks.NativeStack, "step", lambda self, *args: steps.append(self.num_sets) or step(self, *args))
    monkeypatch.setattr("influence_ext.bregman.training.Trainer.advance", lambda *args, **options: pytest.fail("one by one"))
    ie.retrain_many(run, GROUPS, "warm")
    assert steps == [4] * (3 * 4)  # epochs times batches


def test_float32_follows_to_its_precision() -> None:
    recipe = replace(SGD, dtype=torch.float32)
    run, exact = ie.train(recipe, data()), ie.train(SGD, data())
    for group, response in zip(GROUPS, ie.retrain_many(run, GROUPS), strict=True):
        assert response.one_by_one is None
        assert response.params.dtype == torch.float32
        assert float((response.params - ie.retrain(exact, group).params).norm() / exact.params.norm()) < 1e-4


class Noisy(nn.Module):
    """Counts its calls in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 1).double()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        z: Tensor = self.linear(x)
        return z


class Branching(nn.Module):
    """Asks for the value of a tensor that depends on the parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 1).double()

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.linear(x)
        return z if z.sum() > 0 else 2 * z


ALONE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "batch-norm": (lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double(), "changes the network's buffers"),
    "batch-statistics": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 1)).double(),
        "depends on the others in its batch",
    ),
    "dropout": (lambda: nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.3), nn.Linear(8, 1)).double(), "draws random numbers"),
    "buffer": (Noisy, "changes the network's buffers"),
    "branch": (Branching, r"torch\.vmap refuses it \(RuntimeError: "),
}


@pytest.mark.parametrize("row", ALONE)
def test_networks_that_cannot_share_a_step_go_one_by_one_and_say_so(row: str, caplog: pytest.LogCaptureFixture) -> None:
    build, reason = ALONE[row]
    run = ie.train(replace(SGD, build_model=build), data())
    with caplog.at_level(logging.INFO, logger="influence_ext"):
        many = ie.retrain_many(run, GROUPS)
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert caplog.records[0].getMessage().startswith("cold start: 4 removed sets are trained one by one: ")
    for group, response in zip(GROUPS, many, strict=True):
        assert response.one_by_one is not None
        assert re.search(reason, response.one_by_one)
        alone = ie.retrain(run, group)
        assert torch.equal(response.params, alone.params)
        assert response.buffers is not None
        assert alone.buffers is not None
        assert all(torch.equal(buffer, alone.buffers[name]) for name, buffer in response.buffers.items())


def test_a_memory_budget_decides_how_many_go_together(monkeypatch: pytest.MonkeyPatch) -> None:
    run = ie.train(SGD, data())
    free = ie.retrain_many(run, [[i] for i in range(5)], "warm")
    sizes: set[int] = set()
    step = stacks.NativeStack.step
    monkeypatch.setattr(stacks.NativeStack, "step", lambda self, *args: sizes.add(self.num_sets) or step(self, *args))
    probed = together._probe(trainer_of(run), run.final)
    shared, each = probed.bytes_shared, probed.bytes_per_set
    assert each == 4 * 8 * run.params.numel()  # a set has no tape of its own
    assert shared > each
    for budget, expected in ((shared + 5 * each, {5}), (shared + 4 * each, {3, 2}), (shared + 2 * each, {2, 1})):
        sizes.clear()
        tight = ie.retrain_many(run, [[i] for i in range(5)], "warm", memory_budget=budget)
        assert sizes == expected
        for a, b in zip(tight, free, strict=True):
            assert_close(a.params, b.params)
    for budget, bytes_ in ((1, 1), (0, 0), (1.5, 1), (np.uint8(255), 255)):
        alone = ie.retrain_many(run, [[1], [2]], "warm", memory_budget=budget)
        assert alone[0].one_by_one == f"two sets together take {shared + 2 * each} bytes, more than the memory budget of {bytes_}"
    assert all(r.one_by_one is None for r in ie.retrain_many(run, [[1], [2]], "warm", memory_budget=1e9))


def trainer_of(run: ie.Run) -> Any:
    return Trainer(run.recipe, copy.deepcopy(run.model), run.loss, run.data)


def test_a_single_set_is_trained_as_by_retrain() -> None:
    run = ie.train(SGD, data())
    assert torch.equal(ie.retrain_many(run, [[3]])[0].params, ie.retrain(run, [3]).params)


def test_solved_to_convergence_one_after_the_other() -> None:
    run = ie.train(replace(SGD, weight_decay=0.05), data())
    for start in ("cold", "warm"):
        for group, response in zip(GROUPS[:2], ie.retrain_many(run, GROUPS[:2], start, converge=True, rtol=1e-4), strict=True):
            alone = ie.retrain(run, group, start, converge=True, rtol=1e-4)
            assert response.status is alone.status
            assert float((response.params - alone.params).norm()) < 1e-6 * float(alone.params.norm())


def test_a_set_that_diverges_is_told_as_by_itself() -> None:
    run = replace_run(ie.train(SGD, data()), lr=1e200)
    with pytest.raises(DivergenceError, match=r"warm start: expected finite parameters .* after epoch 6; lower lr"):
        ie.retrain_many(run, GROUPS, "warm")


def replace_run(run: ie.Run, **options: Any) -> ie.Run:
    return replace(run, recipe=replace(run.recipe, **options))


def test_an_overflow_in_a_removed_example_stays_with_it() -> None:
    X, y = data()
    run = ie.train(SGD, (X, y))
    X, y = X.clone(), y.clone()
    y[4] = 1e200  # its loss, which no set counts, is infinite
    changed = replace(run, data=replace(run.data, inputs=(X,), targets=y))
    many = ie.retrain_many(changed, [[4], [4, 5]], "warm")
    for group, response in zip([[4], [4, 5]], many, strict=True):
        assert_close(response.params, ie.retrain(run, group, "warm").params)


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, RuntimeError])
def test_nothing_is_modified(error: type[BaseException] | None) -> None:
    def stop(label: str, done: int, total: int) -> None:
        if error is not None and done == 8:
            raise error

    run = ie.train(SGD, data())
    run.model.train()
    torch.manual_seed(5)

    def state() -> list[Any]:
        return [
            torch.get_rng_state(),
            run.params.clone(),
            run.initial_params.clone(),
            *(p.detach().clone() for p in run.model.parameters()),
        ]

    before = state()
    if error is None:
        ie.retrain_many(run, GROUPS, progress=stop)
    else:
        with pytest.raises(error):
            ie.retrain_many(run, GROUPS, progress=stop)
    assert all(torch.equal(was, now) for was, now in zip(before, state(), strict=True))
    assert run.model.training
    assert all(p.grad is None for p in run.model.parameters())


@pytest.mark.parametrize("build", [mlp, ALONE["dropout"][0]])
def test_progress_counts_the_epochs_of_all_sets(build: Callable[[], nn.Module]) -> None:
    run = ie.train(replace(SGD, build_model=build), data())
    seen: list[tuple[str, int, int]] = []
    ie.retrain_many(run, GROUPS, "warm", progress=lambda *args: seen.append(args))
    assert {(label, total) for label, _, total in seen} == {("warm start", 12)}
    counts = [done for _, done, _ in seen]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (0, 12)


ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "none": ({"remove": []}, "retrain_many: expected remove to be a list of removed sets, each a list of indices, got none"),
    "flat": ({"remove": [3, 17]}, r"got 3; write remove=\[\[3\], \[17\]\]"),
    "range": ({"remove": [[1], [N]]}, f"retrain_many: expected example indices from 0 to {N - 1}, got {N}"),
    "start": ({"remove": [[1]], "start": "hot"}, "retrain_many: expected start to be 'cold' or 'warm', got 'hot'"),
    "budget": (
        {"remove": [[1]], "memory_budget": -1},
        "expected memory_budget to be None or a finite number of bytes of at least 0, got -1",
    ),
    "converge": ({"remove": [[1]], "converge": "yes"}, "retrain_many: expected converge to be True or False, got 'yes'"),
}


@pytest.mark.parametrize("row", ERRORS)
def test_options_that_make_no_sense(row: str) -> None:
    options, message = ERRORS[row]
    with pytest.raises(ArgumentError, match=message):
        ie.retrain_many(ie.train(SGD, data()), **options)


def test_only_runs_can_be_retrained() -> None:
    with pytest.raises(ArgumentError, match="retrain_many: expected a Run, got Sequential"):
        ie.retrain_many(mlp(), [[1]])  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"proximal_response_many: expected damping \+ weight_decay > 0"):
        ie.proximal_response_many(ie.train(SGD, data()), [[1], [2]], damping=0.0)
