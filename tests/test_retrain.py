"""Retraining branches: the base run's batches with the removed examples masked out, and exact minima where asked for."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import influence_ext as ie
from influence_ext import reference
from influence_ext.bregman import ResponseStatus
from influence_ext.bregman.training import Trainer
from influence_ext.data import load
from influence_ext.errors import ArgumentError, DataError, NumericalWarning, ShapeError
from influence_ext.losses import HalfMSE, resolve
from influence_ext.testing import assert_close
from tests.cases import generator

F64 = torch.float64
N = 23
REMOVED = [4, 17]


def mlp(width: int = 6) -> nn.Module:
    return nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 1)).double()


def linear() -> nn.Module:
    return nn.Linear(3, 1, bias=False).double()


def data() -> tuple[Tensor, Tensor]:
    g = generator("retrain")
    X = torch.randn(N, 3, generator=g, dtype=F64)
    return X, torch.sin(X[:, :1]) + 0.3 * torch.randn(N, 1, generator=g, dtype=F64)


SGD = ie.Recipe(mlp, nn.MSELoss(), lr=0.05, epochs=5, batch_size=6, seed=1)
RECIPES = {
    "sgd": SGD,
    "sgd-decay": replace(SGD, weight_decay=0.02),
    "sgd-batches-of-one": replace(SGD, batch_size=1, epochs=2, lr=0.01),
    "adam-decay": replace(SGD, optimizer="adam", lr=0.01, weight_decay=0.02),
}
rows = pytest.mark.parametrize("row", RECIPES)


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def loop(
    recipe: ie.Recipe,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    epochs: range,
    removed: Sequence[int] = (),
    penalty: Callable[[], Tensor | float] = lambda: 0.0,
) -> None:
    """The textbook loop without the removed examples: their terms go, the divisor of the batch stays."""
    X, y = data()
    for epoch in epochs:
        for batch in recipe.batch_order(epoch, N).split(recipe.batch_size):
            optimizer.zero_grad()
            kept = [i for i in batch.tolist() if i not in removed]
            loss = sum(((model(X[i : i + 1]) - y[i : i + 1]) ** 2).sum() for i in kept) / len(batch) + penalty()
            if isinstance(loss, Tensor) and loss.requires_grad:
                loss.backward()
            else:  # a batch that is empty now: what is left is the weight decay
                for p in model.parameters():
                    p.grad = torch.zeros_like(p)
            optimizer.step()


def started(recipe: ie.Recipe) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = ie.train(replace(recipe, epochs=1, lr=1e-300), data()).model
    if recipe.optimizer == "adam":
        return model, torch.optim.Adam(model.parameters(), recipe.lr, recipe.betas, recipe.eps, recipe.weight_decay)
    return model, torch.optim.SGD(model.parameters(), recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay)


@rows
def test_cold_start_repeats_the_run_without_the_examples(row: str) -> None:
    recipe = RECIPES[row]
    model, optimizer = started(recipe)
    loop(recipe, model, optimizer, range(recipe.epochs + recipe.branch_epochs), REMOVED)
    response = ie.retrain(ie.train(recipe, data()), REMOVED, start="cold")
    assert_close(response.params, flat(model))
    assert response.status is ResponseStatus.TRAINED
    assert response.num_steps == recipe.epochs + recipe.branch_epochs


@rows
def test_warm_start_goes_on_without_the_examples(row: str) -> None:
    recipe = RECIPES[row]
    model, optimizer = started(recipe)
    loop(recipe, model, optimizer, range(recipe.epochs))
    loop(recipe, model, optimizer, range(recipe.epochs, recipe.epochs + recipe.branch_epochs), REMOVED)
    assert_close(ie.retrain(ie.train(recipe, data()), REMOVED, start="warm").params, flat(model))


@rows
def test_proximal_response_is_held_back(row: str) -> None:
    recipe, damping = RECIPES[row], 0.7
    model, optimizer = started(recipe)
    loop(recipe, model, optimizer, range(recipe.epochs))
    anchor = [p.detach().clone() for p in model.parameters()]

    def penalty() -> Tensor:
        return damping / 2 * sum(((p - a) ** 2).sum() for p, a in zip(model.parameters(), anchor, strict=True))

    loop(recipe, model, optimizer, range(recipe.epochs, recipe.epochs + recipe.branch_epochs), REMOVED, penalty)
    assert_close(ie.proximal_response(ie.train(recipe, data()), REMOVED, damping).params, flat(model))


@rows
def test_nothing_removed_gives_the_run_gone_on_bit_for_bit(row: str) -> None:
    recipe = RECIPES[row]
    run = ie.train(recipe, data())
    longer = ie.train(replace(recipe, epochs=recipe.epochs + recipe.branch_epochs), data())
    assert torch.equal(ie.retrain(run, [], start="cold").params, longer.params)
    assert torch.equal(ie.retrain(run, [], start="warm").params, longer.params)


def test_epochs_of_the_branch_can_be_given() -> None:
    run = ie.train(SGD, data())
    longer = ie.train(replace(SGD, epochs=6), data())
    for start in ("cold", "warm"):
        assert torch.equal(ie.retrain(run, [], start=start, epochs=1).params, longer.params)


def test_branches_are_repeatable_and_independent_of_each_other() -> None:
    run = ie.train(SGD, data())
    first = ie.retrain(run, [3], start="warm")
    ie.retrain(run, [5], start="cold")
    ie.proximal_response(run, [7])
    assert torch.equal(ie.retrain(run, [3], start="warm").params, first.params)


@pytest.mark.parametrize("kind", ["cold", "warm", "proximal"])
def test_reported_gradient_norm_is_that_of_the_literal_objective(kind: str) -> None:
    recipe, damping = replace(SGD, weight_decay=0.02), 0.3
    run = ie.train(recipe, data())
    response = ie.proximal_response(run, REMOVED, damping) if kind == "proximal" else ie.retrain(run, REMOVED, start=kind)
    X, y = data()
    kept = [i for i in range(N) if i not in REMOVED]

    def gradient_norm(at: Tensor) -> Tensor:
        theta = at.clone().requires_grad_()
        z = functional_call(run.model, unflattened(run.model, theta), X[kept])
        objective = ((z - y[kept]) ** 2).sum() / N + 0.01 * (theta**2).sum()
        if kind == "proximal":
            objective = objective + damping / 2 * ((theta - run.params) ** 2).sum()
        return torch.autograd.grad(objective, theta)[0].norm()

    norm = gradient_norm(response.params)
    assert response.gradient_norm == pytest.approx(float(norm), rel=1e-9)
    assert response.relative_gradient_norm == pytest.approx(float(norm / gradient_norm(run.params)), rel=1e-9)


def unflattened(model: nn.Module, theta: Tensor) -> dict[str, Tensor]:
    named, start = {}, 0
    for name, p in model.named_parameters():
        named[name] = theta[start : start + p.numel()].view_as(p)
        start += p.numel()
    return named


RIDGE = ie.Recipe(linear, HalfMSE(), lr=0.1, momentum=0.5, weight_decay=0.3, epochs=4, batch_size=8)


@pytest.mark.parametrize("start", ["cold", "warm"])
def test_solved_to_convergence_is_leave_one_out_of_ridge_regression(start: str) -> None:
    run = ie.train(RIDGE, data())  # far from its minimum
    X, y = data()
    full = reference.ridge_fit(X, y[:, 0], RIDGE.weight_decay)
    oracle = full + reference.ridge_leave_one_out(X, y[:, 0], RIDGE.weight_decay)
    for i in (0, 9):
        response = ie.retrain(run, [i], start=start, converge=True, rtol=1e-12)
        assert response.status is ResponseStatus.CONVERGED
        assert response.relative_gradient_norm is not None
        assert response.relative_gradient_norm <= 1e-12
        assert_close(response.params, oracle[i], factor=1e3, because="the gradient is brought down to 1e-12, not to rounding")


def test_proximal_response_solved_to_convergence_is_a_linear_system() -> None:
    run = ie.train(RIDGE, data())
    X, y = data()
    damping, kept = 0.2, [i for i in range(N) if i not in REMOVED]
    A = X[kept].T @ X[kept] / N + (RIDGE.weight_decay + damping) * torch.eye(3, dtype=F64)
    oracle = torch.linalg.solve(A, X[kept].T @ y[kept, 0] / N + damping * run.params)
    response = ie.proximal_response(run, REMOVED, damping, converge=True, rtol=1e-12)
    assert_close(response.params, oracle, factor=1e3, because="the gradient is brought down to 1e-12, not to rounding")


def test_solving_a_network_to_convergence_reaches_the_gradient_norm_it_reports() -> None:
    recipe = replace(SGD, weight_decay=0.05, epochs=20)
    run = ie.train(recipe, data())
    X, y = data()
    for start in ("cold", "warm"):
        response = ie.retrain(run, REMOVED, start=start, converge=True)
        kept = [i for i in range(N) if i not in REMOVED]
        theta = response.params.clone().requires_grad_()
        z = functional_call(run.model, unflattened(run.model, theta), X[kept])
        objective = ((z - y[kept]) ** 2).sum() / N + 0.025 * (theta**2).sum()
        norm = torch.autograd.grad(objective, theta)[0].norm()
        assert response.status is ResponseStatus.CONVERGED
        assert float(norm) < 1e-5
        assert response.gradient_norm == pytest.approx(float(norm), rel=1e-3, abs=1e-12)


def test_what_a_response_tells() -> None:
    run = ie.train(SGD, data())
    X, y = data()
    response, other = ie.retrain(run, [2], start="warm"), ie.retrain(run, [8], start="warm")
    changed = copy.deepcopy(run.model)
    changed.load_state_dict(response.named_params)
    z, z_s = changed(X).detach(), run.model(X).detach()
    assert_close(response.outputs, z, what="outputs")
    assert_close(response.displacement, response.params - run.params, factor=1e3, because="the difference cancels")
    X_test, y_test = X[:5] + 0.3, y[:5]
    losses = [((m(X_test) - y_test) ** 2)[:, 0].detach() for m in (changed, run.model)]
    assert_close(response.loss_change((X_test, y_test)), losses[0] - losses[1], scale=1.0, what="loss change")
    assert response.output_distance() == pytest.approx(float((z - z_s).norm(dim=1).mean()), rel=1e-9)
    z_other = other.outputs
    assert response.output_distance(other) == pytest.approx(float((z - z_other).norm(dim=1).mean()), rel=1e-9)
    assert response.parameter_distance(other) == pytest.approx(float((response.params - other.params).norm()), rel=1e-9)
    assert response.summary().startswith("warm_start: trained, relative gradient norm ")


def test_running_statistics_belong_to_the_response() -> None:
    recipe = replace(SGD, build_model=lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double())
    run = ie.train(recipe, data())
    response = ie.retrain(run, REMOVED, start="cold")
    X, _ = data()
    assert response.buffers is not None
    oracle = functional_call(run.model, {**response.named_params, **response.buffers}, X).detach()
    assert_close(response.outputs, oracle)
    assert not torch.allclose(response.buffers["1.running_mean"], run.model.state_dict()["1.running_mean"])
    with pytest.raises(ArgumentError, match="expected a network without running statistics for converge=True"):
        ie.retrain(run, REMOVED, converge=True)


def snapshot(run: ie.Run) -> list[Any]:
    return [torch.get_rng_state(), run.params.clone(), flat(run.model).clone(), run.model.training, run.initial_params.clone()]


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_nothing_is_modified(error: type[BaseException] | None) -> None:
    def stop(label: str, done: int, total: int) -> None:
        if error is not None and done == 1:
            raise error

    run = ie.train(SGD, data())
    run.model.train()
    before = snapshot(run)
    for call in (
        lambda: ie.retrain(run, REMOVED, start="cold", progress=stop),
        lambda: ie.retrain(run, REMOVED, start="warm", progress=stop),
        lambda: ie.proximal_response(run, REMOVED, converge=True, progress=stop),
    ):
        if error is None:
            call()
        else:
            with pytest.raises(error):
                call()
        for was, now in zip(before, snapshot(run), strict=True):
            assert torch.equal(was, now) if isinstance(was, Tensor) else was == now
        assert all(p.grad is None for p in run.model.parameters())


def test_a_branch_that_misses_its_goal_says_so() -> None:
    run = ie.train(replace(SGD, weight_decay=0.05), data())
    with pytest.warns(NumericalWarning, match=r"retrain: relative gradient norm .* steps; used up its steps .*raise max_steps"):
        response = ie.retrain(run, [1], start="warm", converge=True, max_steps=2, rtol=1e-14)
    assert response.status is ResponseStatus.MAX_STEPS


ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "start": ({"remove": [1], "start": "hot"}, "retrain: expected start to be 'cold' or 'warm', got 'hot'"),
    "range": ({"remove": [N]}, f"retrain: expected example indices from 0 to {N - 1}, got {N}"),
    "negative": ({"remove": [-1]}, "retrain: expected example indices from 0 to 22, got -1"),
    "repeated": ({"remove": [3, 3]}, "retrain: expected every index once, got 3 twice"),
    "number": ({"remove": 3}, "retrain: expected a list of example indices, got 3"),
    "all": ({"remove": range(N)}, "expected remove to leave at least one training example, got all 23"),
    "epochs": ({"remove": [1], "epochs": 0}, "expected epochs to be a whole number of at least 1, got 0"),
    "rtol": ({"remove": [1], "converge": True, "rtol": 2.0}, r"retrain: expected rtol to be a number between 0 and 1, got 2\.0"),
    "steps": (
        {"remove": [1], "converge": True, "max_steps": 2.5},
        r"retrain: expected max_steps to be a whole number of at least 1, got 2\.5",
    ),
    "both": ({"remove": [1], "epochs": 2, "converge": True}, "expected either epochs or converge=True, got both"),
}


@pytest.mark.parametrize("row", ERRORS)
def test_options_that_make_no_sense(row: str) -> None:
    options, message = ERRORS[row]
    with pytest.raises(ArgumentError, match=message):
        ie.retrain(ie.train(SGD, data()), **options)


def test_a_proximity_that_sgd_cannot_hold_is_refused_before_training() -> None:
    run = ie.train(replace(SGD, lr=0.5, momentum=0.5, weight_decay=0.25), data())
    assert torch.isfinite(ie.proximal_response(run, [1], damping=5.7, epochs=40).params).all()
    for retrain in (
        partial(ie.proximal_response, remove=[1]),
        partial(ie.proximal_response_many, remove=[[1]]),
        partial(ie.decompose, remove=[[1]]),
    ):
        with pytest.raises(ArgumentError, match=r"expected damping \+ weight_decay below 2 \(1 \+ momentum\) / lr = 6, .* got 6; lower"):
            retrain(run, damping=5.75)
    assert ie.proximal_response(run, [1], damping=5.75, converge=True).status is ResponseStatus.CONVERGED


def test_a_proximity_that_smaller_steps_come_to_hold_is_taken() -> None:
    X, y = data()
    base = replace(SGD, build_model=lambda: nn.Linear(X.shape[1], 1).double(), lr=0.1, momentum=0.0, weight_decay=0.0, epochs=40)
    run = ie.train(replace(base, batch_size=len(X), schedule="cosine"), (X, y))
    found, exact = (ie.proximal_response(run, [1], damping=22.0, converge=converge) for converge in (False, True))
    assert float((found.params - exact.params).norm()) < 1e-2 * float(exact.displacement.norm())
    halving = ie.train(replace(base, schedule=lambda epoch: 0.5 if epoch % 2 else 1.0), (X, y))
    with pytest.raises(ArgumentError, match=r"/ lr = 40 \(at the least lr of schedule '<lambda>'\), beyond which"):
        ie.proximal_response(halving, [1], damping=41.0)
    pausing = ie.train(replace(base, schedule=lambda epoch: 0.0 if epoch == 41 else 1.0), (X, y))
    with pytest.raises(ArgumentError, match=r"/ lr = 20 \(at the least lr of schedule '<lambda>'\), beyond which"):
        ie.proximal_response(pausing, [1], damping=21.0)


def test_what_cannot_be_compared_is_refused() -> None:
    run = ie.train(SGD, data())
    response = ie.retrain(run, [1], "warm")
    other = ie.retrain(ie.train(replace(SGD, build_model=lambda: mlp(width=7)), data()), [1], "warm")
    with pytest.raises(ArgumentError, match=r"Response\.output_distance: expected a response of the same network .* got one with P = "):
        response.output_distance(other)
    with pytest.raises(ArgumentError, match=r"Response\.parameter_distance: expected another Response or None, got Tensor"):
        response.parameter_distance(response.params)  # type: ignore[arg-type]
    X, y = data()
    with pytest.raises(DataError, match=r"Response\.loss_change: expected inputs that the network takes, got RuntimeError: mat1"):
        response.loss_change((X[:, :1], y))
    with pytest.raises(ShapeError, match=r"Response\.loss_change: expected targets shaped like the outputs \[23, 1\], got \[23\]"):
        response.loss_change((X, y[:, 0]))
    run.model.float()
    with pytest.raises(ArgumentError, match=r"expected run\.model to hold the parameters it was trained to"):
        ie.retrain(run, [1])


def test_only_runs_can_be_retrained() -> None:
    with pytest.raises(ArgumentError, match="retrain: expected a Run, got Sequential"):
        ie.retrain(mlp(), [1])  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="proximal_response: expected a Run, got Sequential"):
        ie.proximal_response(mlp(), [1])  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"proximal_response: expected damping \+ weight_decay > 0"):
        ie.proximal_response(ie.train(SGD, data()), [1], damping=0.0)
    run = ie.train(SGD, data())
    with torch.no_grad():
        next(run.model.parameters()).add_(1.0)
    with pytest.raises(ArgumentError, match=r"expected run\.model to hold the parameters it was trained to"):
        ie.retrain(run, [1])


def test_the_branches_are_trained_on_the_data_of_the_run() -> None:
    """Whatever the caller does with the tensors afterwards, also behind torch's back."""
    X, y = data()
    expected = ie.retrain(ie.train(SGD, data()), REMOVED)
    run = ie.train(SGD, (X, y))
    X.numpy()[:] = 0.0
    y.fill_(7.0)
    assert torch.equal(ie.retrain(run, REMOVED).params, expected.params)
    assert_close(ie.pbrf(run, remove=REMOVED, damping=0.1).outputs, ie.pbrf(ie.train(SGD, data()), remove=REMOVED, damping=0.1).outputs)


def away(make: Callable[[], nn.Module], **options: Any) -> ie.Recipe:
    return ie.Recipe(make, nn.CrossEntropyLoss(), lr=10.0, epochs=4, batch_size=10, **options)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_training_that_diverges_within_the_finite_numbers_says_so(optimizer: str) -> None:
    """Its loss is worse than that of guessing, by plain PyTorch; and the branches are named and left out of the terms."""
    X = torch.randn(60, 5, generator=generator("away"))
    y = X[:, :3].argmax(1)
    recipe = away(lambda: nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)), optimizer=optimizer)
    with pytest.warns(
        NumericalWarning, match=r"train: expected a training that learns, got an objective of .* lower lr \(now 10\)"
    ) as told:
        run = ie.train(recipe, (X, y))
    assert told[0].filename == __file__
    assert float(nn.functional.cross_entropy(run.model(X).detach(), y)) > 2 * float(torch.tensor(3.0).log())
    with pytest.warns(NumericalWarning, match=r"retrain_many: .*lower the recipe's lr") as told:
        responses = ie.retrain_many(run, [[1], [2]], "warm")
    for call in (ie.proximal_response, ie.retrain):
        with pytest.warns(NumericalWarning, match=f"^{call.__name__}: ") as more:
            call(run, [1], **({} if call is ie.retrain else {"damping": 1e-3}))
        assert more[0].filename == told[0].filename == __file__  # neither one of torch, whose decorators are between, nor one of ours
    assert [r.status for r in responses] == [ResponseStatus.TRAINING_DIVERGED] * 2
    assert not responses[0].status.success
    found = ie.decompose(run, [[1], [2]], damping=1e-2, max_steps=20)
    assert [found.quality[0][kind]["status"] for kind in ("cold_start", "warm_start", "proximal")] == ["training_diverged"] * 3
    assert found.left_out("proximity gap") == [0, 1]
    assert "cold start: 2 training_diverged" in found.table()
    assert "not defined" in found.table()


def test_noise_around_a_trained_network_is_no_divergence() -> None:
    """From a minimum every training goes uphill."""
    X, _ = data()
    trained = nn.Linear(3, 1).double()
    y = trained(X).detach() + 0.01 * torch.randn(N, 1, generator=generator("noise"), dtype=F64)
    recipe = replace(SGD, build_model=lambda: trained, lr=0.003, batch_size=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", NumericalWarning)
        assert ie.retrain(ie.train(recipe, (X, y)), [1], "warm").status is ResponseStatus.TRAINED


def test_a_training_that_its_weight_decay_ends_at_a_higher_loss_has_not_diverged(recwarn: pytest.WarningsRecorder) -> None:
    """It starts where the loss alone is least, and converges to the minimum of the objective."""
    X = torch.randn(60, 5, generator=generator("decay"), dtype=F64)
    y = X.sum(1, keepdim=True) + 5

    def fitted() -> nn.Module:
        model = nn.Linear(5, 1).double()
        with torch.no_grad():
            model.weight.fill_(1)
            model.bias.fill_(5)
        return model

    run = ie.train(ie.Recipe(fitted, nn.MSELoss(), lr=0.01, epochs=50, batch_size=60, weight_decay=20.0, dtype=F64), (X, y))
    assert run.history["loss"][-1] > run.history["loss"][0] + 1
    assert not [w for w in recwarn if issubclass(w.category, NumericalWarning)]


def test_whether_trainings_diverged_costs_one_pass_a_branch() -> None:
    """The start's outputs are those of all branches; verdicts are those of the definition, by plain PyTorch."""
    X, y = torch.randn(150, 5, generator=generator("passes")), torch.randn(150, 1, generator=generator("targets"))
    model, seen = nn.Linear(5, 1), [0]
    trainer = Trainer(replace(SGD, weight_decay=0.5), model, resolve(nn.MSELoss()), load((X, y)))
    model.register_forward_pre_hook(lambda module, args: seen.__setitem__(0, seen[0] + len(args[0])))
    start = trainer.starting_point()
    removed = [(3,), (4, 5), ()]
    for scale, few in ((0.9, True), (30.0, False)):
        seen[0] = 0
        end = replace(start, theta=scale * start.theta)
        for group in removed:
            found = trainer.ran_away(start, end, group)
            kept = [n for n in range(150) if n not in group]
            losses = [(X[kept] @ p.theta[:5, None] + p.theta[5] - y[kept]).square().mean() + 0.25 * p.theta.square().sum()
                      for p in (start, end)]  # fmt: skip
            mean = (X @ start.theta[:5, None] + start.theta[5]).mean()
            losses.append((mean - y[kept]).square().mean() + 0.25 * start.theta.square().sum())
            assert (found is not None) == bool(losses[1] > max(losses[0], losses[2]))
            if found is not None:
                assert found.objective == pytest.approx(float(losses[1]), rel=1e-5)
                assert found.limit == pytest.approx(float(max(losses[0], losses[2])), rel=1e-5)
        assert found is None or not few
        assert seen[0] == (64 + 3 * 64 if few else 150 + 3 * 64 + sum(150 - len(group) for group in removed))
