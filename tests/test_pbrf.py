"""The proximal Bregman response: exact where a closed form exists, stationary by an independent gradient, honest where there is none."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import influence_ext as ie
from influence_ext import reference
from influence_ext.bregman import ResponseStatus
from influence_ext.bregman.objective import BregmanObjective, Reference
from influence_ext.bregman.pbrf import linear_responses, solve_pbrf
from influence_ext.bregman.response import TrainedNetwork
from influence_ext.errors import ArgumentError, DataError, DivergenceError, NumericalWarning
from influence_ext.losses import HalfMSE
from influence_ext.testing import assert_close
from tests.cases import generator
from tests.cases.losses import log_cosh

F64 = torch.float64


def half_mse(z: Tensor, t: Tensor) -> Tensor:
    return 0.5 * F.mse_loss(z, t)


CLASS_WEIGHTS = torch.tensor([0.5, 2.0, 1.0], dtype=F64)


def weighted(z: Tensor, t: Tensor) -> Tensor:
    """A term of the weighted mean, without its denominator."""
    return F.cross_entropy(z, t, weight=CLASS_WEIGHTS.to(z.dtype), reduction="sum")


def half_mse_sum(z: Tensor, t: Tensor) -> Tensor:
    return 0.5 * F.mse_loss(z, t, reduction="sum")


@dataclass(frozen=True)
class Case:
    """A network at parameters that are no minimum, its loss, and the same loss literally."""

    make: Callable[[], nn.Module]
    loss: Any
    literal: Callable[[Tensor, Tensor], Tensor]
    targets: Callable[[Tensor, torch.Generator], Tensor]
    remove: tuple[int, ...]
    damping: float = 0.05


def mlp(outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, outputs))


def noisy(X: Tensor, g: torch.Generator) -> Tensor:
    return torch.sin(X[:, :2]) + 0.2 * torch.randn(len(X), 2, generator=g, dtype=F64)


def labels(X: Tensor, g: torch.Generator) -> Tensor:
    return torch.randint(0, 3, (len(X),), generator=g)


def bits(X: Tensor, g: torch.Generator) -> Tensor:
    return torch.randint(0, 2, (len(X), 2), generator=g).double()


CASES = {
    "mse": Case(lambda: mlp(2), nn.MSELoss(), F.mse_loss, noisy, (3,)),
    "half-mse-group": Case(lambda: mlp(2), HalfMSE(), half_mse, noisy, (0, 5, 11)),
    "half-mse-sum": Case(lambda: mlp(2), HalfMSE(reduction="sum"), half_mse_sum, noisy, (2,), damping=2.0),
    "cross-entropy": Case(lambda: mlp(3), nn.CrossEntropyLoss(), F.cross_entropy, labels, (7,)),
    "cross-entropy-group": Case(lambda: mlp(3), nn.CrossEntropyLoss(), F.cross_entropy, labels, (1, 2, 3, 4)),
    "cross-entropy-weighted": Case(lambda: mlp(3), nn.CrossEntropyLoss(weight=CLASS_WEIGHTS), weighted, labels, (7, 8)),
    "huber": Case(lambda: mlp(2), nn.HuberLoss(), F.huber_loss, noisy, (3,)),
    "callable": Case(lambda: mlp(2), log_cosh, log_cosh, noisy, (3, 4)),
    "binary": Case(lambda: mlp(2), nn.BCEWithLogitsLoss(), F.binary_cross_entropy_with_logits, bits, (9, 10)),
}
N = 20
rows = pytest.mark.parametrize("row", CASES)


def problem(row: str, dtype: torch.dtype = F64) -> tuple[Case, nn.Module, Tensor, Tensor]:
    case, g = CASES[row], generator(row)
    X = torch.randn(N, 3, generator=g, dtype=F64)
    y = case.targets(X, g)
    model = case.make().double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g, dtype=F64) * 0.6)
    return case, model.to(dtype), X.to(dtype), y.to(dtype) if y.is_floating_point() else y


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def factor(case: Case, y: Tensor) -> float:
    if case.literal is weighted:
        return 1.0 / float(CLASS_WEIGHTS[y].sum())
    return 1.0 if case.literal is half_mse_sum else 1.0 / N


def literal_pbo(
    case: Case, model: nn.Module, X: Tensor, y: Tensor, theta: Tensor, epsilon: float | None = None, damping: float | None = None
) -> Tensor:
    """The objective as written in the paper, by autograd, differentiable in ``theta``."""
    c = factor(case, y)
    epsilon = c if epsilon is None else epsilon

    def outputs(at: Tensor) -> Tensor:
        named, start = {}, 0
        for name, p in model.named_parameters():
            named[name] = at[start : start + p.numel()].view_as(p)
            start += p.numel()
        return functional_call(model, named, X)

    theta_s = flat(model)
    z, z_s = outputs(theta), outputs(theta_s).detach().requires_grad_()
    total = torch.zeros((), dtype=theta.dtype)
    for i in range(N):
        at, anchor, t = z[i : i + 1], z_s[i : i + 1], y[i : i + 1]
        value = case.literal(anchor, t)
        (slope,) = torch.autograd.grad(value, z_s, retain_graph=True)
        total = total + c * (case.literal(at, t) - value.detach() - (slope[i : i + 1] * (at - anchor.detach())).sum())
        if i in case.remove:
            total = total - epsilon * case.literal(at, t)
    return total + (case.damping if damping is None else damping) / 2 * ((theta - theta_s) ** 2).sum()


def objective(case: Case, model: nn.Module, X: Tensor, y: Tensor, epsilon: float | None = None) -> BregmanObjective:
    network = TrainedNetwork.of(model, case.loss, (X, y), who="test")
    return BregmanObjective.proximal_bregman(Reference(network), case.remove, network.factor if epsilon is None else epsilon, case.damping)


@rows
@pytest.mark.parametrize("epsilon", [None, 0.02], ids=["removed", "down-weighted"])
def test_value_and_gradient_are_those_of_the_literal_objective(row: str, epsilon: float | None) -> None:
    case, model, X, y = problem(row)
    theta_s = flat(model)
    delta = 0.3 * torch.randn(theta_s.shape, generator=generator(row + "delta"), dtype=F64)
    theta = (theta_s + delta).requires_grad_()
    literal = literal_pbo(case, model, X, y, theta, epsilon)
    (gradient,) = torch.autograd.grad(literal, theta)
    found = objective(case, model, X, y, epsilon).evaluate(delta)
    at_start = literal_pbo(case, model, X, y, theta_s, epsilon)
    assert_close(torch.tensor(found.value, dtype=F64), (literal - at_start).detach(), what="value")
    assert_close(found.gradient, gradient, what="gradient")


def test_the_librarys_own_oracle_agrees_with_the_literal_objective() -> None:
    case, model, X, y = problem("cross-entropy")
    theta = flat(model) + 0.1
    oracle = reference.pbo(model, case.literal, (X, y), theta, case.remove, case.damping)
    assert_close(oracle, literal_pbo(case, model, X, y, theta).detach())


@rows
def test_curvature_and_hessian(row: str) -> None:
    case, model, X, y = problem(row)
    g = generator(row + "hessian")
    theta_s = flat(model)
    delta, v = (0.3 * torch.randn(theta_s.shape, generator=g, dtype=F64) for _ in range(2))
    hessian = torch.autograd.functional.hessian(lambda theta: literal_pbo(case, model, X, y, theta), theta_s + delta)
    found = objective(case, model, X, y)
    at = found.evaluate(delta)
    full = found.hessian_product(v, at, 0.0, full=True)
    assert float((full - hessian @ v).norm() / (hessian @ v).norm()) < 1e-6
    # Without `full` only the removed examples' own curvature is there: closer than Gauss-Newton at θs, where they are all there is.
    start = found.evaluate(torch.zeros_like(delta))
    exact = torch.autograd.functional.hessian(lambda theta: literal_pbo(case, model, X, y, theta), theta_s) @ v
    assert float((found.hessian_product(v, start, 0.0, full=False) - exact).norm() / exact.norm()) < 1e-6
    assert float((found.curvature_product(v, start) - exact).norm() / exact.norm()) > 1e-4
    # Gauss-Newton by explicit Jacobians, the removed examples' weight being zero.
    kept = [i for i in range(N) if i not in case.remove]
    G = reference.ggn(model, case.literal, X[kept], y[kept], reduction=factor(case, y)) + case.damping * torch.eye(len(v), dtype=F64)
    assert_close(found.curvature_product(v, start), G @ v, what="curvature")


@rows
def test_pbrf_is_the_minimum_that_lbfgs_finds(row: str) -> None:
    case, model, X, y = problem(row)
    response = ie.pbrf(model, case.loss, (X, y), case.remove, case.damping, rtol=1e-9)
    theta = flat(model).clone().requires_grad_()
    lbfgs = torch.optim.LBFGS(
        [theta], max_iter=3000, tolerance_grad=1e-13, tolerance_change=0, history_size=50, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        lbfgs.zero_grad()
        value = literal_pbo(case, model, X, y, theta)
        value.backward()
        return value

    lbfgs.step(closure)
    assert response.status is ResponseStatus.CONVERGED
    length = float((theta.detach() - flat(model)).norm())
    assert length > 1e-3
    assert float((response.params - theta.detach()).norm()) < 1e-5 * length


@rows
def test_reported_gradient_norms_are_true(row: str) -> None:
    case, model, X, y = problem(row)
    response = ie.pbrf(model, case.loss, (X, y), case.remove, case.damping)
    norms = []
    for at in (response.params, flat(model)):
        theta = at.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(literal_pbo(case, model, X, y, theta), theta)
        norms.append(float(gradient.norm()))
    assert norms[0] <= 1e-6 * norms[1]
    assert response.gradient_norm == pytest.approx(norms[0], rel=1e-3, abs=1e-14)
    assert response.relative_gradient_norm == pytest.approx(norms[0] / norms[1], rel=1e-3, abs=1e-12)
    assert response.num_steps > 0
    assert response.num_products > 0


@rows
def test_float32_reaches_its_goal_by_a_float64_gradient(row: str) -> None:
    case, model, X, y = problem(row, torch.float32)
    response = ie.pbrf(model, case.loss, (X, y), case.remove, case.damping)
    double = copy.deepcopy(model).double()
    X, y = X.double(), y.double() if y.is_floating_point() else y
    norms = []
    for at in (response.exact_params, flat(double)):
        theta = at.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(literal_pbo(case, double, X, y, theta), theta)
        norms.append(float(gradient.norm()))
    assert response.status is ResponseStatus.CONVERGED
    assert norms[0] <= 1e-4 * norms[1]
    assert response.params.dtype == torch.float32
    assert torch.equal(response.params, response.exact_params.float())


def ridge(weight_decay: float = 0.0) -> tuple[nn.Module, Tensor, Tensor]:
    g = generator("ridge")
    X = torch.randn(30, 4, generator=g, dtype=F64)
    y = X @ torch.randn(4, 1, generator=g, dtype=F64) + torch.randn(30, 1, generator=g, dtype=F64)
    model = nn.Linear(4, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.randn(1, 4, generator=g, dtype=F64))  # far from the minimum
    return model, X, y


@pytest.mark.parametrize("weight_decay", [0.0, 0.07])
def test_ridge_pbrf_is_influence_over_one_minus_epsilon_h(weight_decay: float) -> None:
    model, X, y = ridge()
    damping, epsilon = 0.03, 1 / 30
    A = X.T @ X / 30 + (damping + weight_decay) * torch.eye(4, dtype=F64)
    for i in (0, 7, 29):
        residual = X[i] @ model.weight[0].detach() - y[i, 0]
        influence = epsilon * torch.linalg.solve(A, X[i]) * residual
        h = X[i] @ torch.linalg.solve(A, X[i])
        response = ie.pbrf(model, HalfMSE(), (X, y), [i], damping, weight_decay=weight_decay, rtol=1e-12)
        linear = ie.linearized_pbrf(model, HalfMSE(), (X, y), [i], damping, weight_decay=weight_decay)
        assert float((response.displacement - influence / (1 - epsilon * h)).norm() / influence.norm()) < 1e-8
        assert float((linear.displacement - influence).norm() / influence.norm()) < 1e-8


def test_ridge_pbrf_of_a_group() -> None:
    model, X, y = ridge()
    oracle = reference.ridge_response(X, y[:, 0], model.weight[0].detach(), [1, 4, 20], 0.03)
    response = ie.pbrf(model, HalfMSE(), (X, y), [1, 4, 20], 0.03, rtol=1e-12)
    assert float((response.displacement - oracle).norm() / oracle.norm()) < 1e-8


def product(a: float, b: float) -> nn.Module:
    """``f(x) = a b x``."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)).double()
    with torch.no_grad():
        model[0].weight.fill_(a)
        model[1].weight.fill_(b)
    return model


def test_the_scalar_toy() -> None:
    a, b, damping = 1.5, -0.7, 0.3
    t = torch.tensor([[0.4], [-1.2], [2.0]], dtype=F64)
    X = torch.ones(3, 1, dtype=F64)
    v = torch.tensor([b, a], dtype=F64)
    for i in range(3):
        linear = ie.linearized_pbrf(product(a, b), HalfMSE(), (X, t), [i], damping)
        effect = float(v @ linear.displacement)  # of the observable φ = a b, to first order
        expected = (a * b - t[i].item()) / 3 * float(v @ v) / (float(v @ v) + damping)
        assert effect == pytest.approx(expected, rel=1e-10)


@rows
def test_the_trained_parameters_are_stationary_whatever_their_training(row: str) -> None:
    case, model, X, y = problem(row)
    response = ie.pbrf(model, case.loss, (X, y), case.remove, case.damping, epsilon=0.0)
    assert response.status is ResponseStatus.CONVERGED
    assert response.gradient_norm == 0.0
    assert torch.equal(response.params, flat(model))


@rows
def test_damped_influence_is_the_first_order_response(row: str) -> None:
    case, model, X, y = problem(row)
    c = factor(case, y)
    linear = reference.parameter_change(model, case.literal, (X, y), case.remove, case.damping, factor(case, y))
    errors = []
    for epsilon in (1e-3 * c, 1e-4 * c):
        response = ie.pbrf(model, case.loss, (X, y), case.remove, case.damping, epsilon=epsilon, rtol=1e-10)
        errors.append(float((response.displacement * (c / epsilon) - linear).norm() / linear.norm()))
    assert errors[0] < 2e-3
    assert errors[1] < 0.2 * errors[0]


@rows
def test_linearized_pbrf_is_a_dense_solve(row: str) -> None:
    case, model, X, y = problem(row)
    change = reference.parameter_change(model, case.literal, (X, y), case.remove, case.damping, factor(case, y))
    response = ie.linearized_pbrf(model, case.loss, (X, y), case.remove, case.damping)
    assert response.status.success
    assert response.relative_residual is not None
    assert response.relative_residual < 1e-9
    assert_close(response.displacement, change, factor=1e4, because="solved to 1e-9 and amplified by the condition number")


@pytest.mark.parametrize("solver", [ie.solvers.CG(), ie.solvers.BlockCG(), ie.solvers.Dual()], ids=lambda solver: solver.name)
def test_linearized_pbrf_in_float32_is_refined_in_float64(solver: ie.solvers.Solver, monkeypatch: pytest.MonkeyPatch) -> None:
    case, model, X, y = problem("cross-entropy", torch.float32)
    choice = ie.solvers.AutoChoice(solver=solver, reason="", costs={}, memory={}, on_failure="return")
    monkeypatch.setattr(ie.solvers, "auto", lambda *args, **options: choice)
    response = ie.linearized_pbrf(model, case.loss, (X, y), case.remove, 1e-3)
    double = copy.deepcopy(model).double()
    oracle = reference.parameter_change(double, case.literal, (X.double(), y), case.remove, 1e-3)
    assert response.relative_residual is not None
    assert response.relative_residual <= 1e-5
    assert float((response.displacement - oracle).norm() / oracle.norm()) < 1e-3


def test_removed_sets_that_share_a_reference_do_not_disturb_each_other() -> None:
    case, model, X, y = problem("cross-entropy")
    shared = Reference(TrainedNetwork.of(model, case.loss, (X, y), who="test"))
    groups = [(3,), (8, 9), (15,)]
    linear = linear_responses(shared, groups, case.damping, None, "linearized_pbrf")
    together = [solve_pbrf(shared, group, case.damping, rtol=1e-10) for group in groups]
    for group, first_order, response in zip(groups, linear, together, strict=True):
        alone = ie.pbrf(model, case.loss, (X, y), group, case.damping, rtol=1e-10)
        assert torch.equal(response.params, alone.params)
        single = ie.linearized_pbrf(model, case.loss, (X, y), group, case.damping)
        assert_close(first_order.displacement, single.displacement, factor=1e3, because="each is solved to 1e-9")
        known = solve_pbrf(shared, group, case.damping, rtol=1e-10, first_step=first_order.displacement)
        assert float((known.displacement - alone.displacement).norm() / alone.displacement.norm()) < 1e-7


def outlier() -> tuple[nn.Module, Tensor, Tensor]:
    """Only the removed example sees the product a·b, and its slope outweighs the damping: Q falls for ever."""
    return product(1.0, 1.0), torch.tensor([[1.0], [1e-4]], dtype=F64), torch.tensor([[-5.0], [0.0]], dtype=F64)


def test_an_objective_without_a_minimum_is_reported() -> None:
    model, X, y = outlier()
    with pytest.raises(DivergenceError, match=r"pbrf: expected a local minimum near the trained parameters, got relative gradient norm .*"
                                              r"ran away from the trained parameters.*raise damping"):  # fmt: skip
        ie.pbrf(model, HalfMSE(), (X, y), [0], damping=0.1)
    with pytest.warns(NumericalWarning, match="ran away from the trained parameters"):
        response = ie.pbrf(model, HalfMSE(), (X, y), [0], damping=0.1, on_failure="return")
    assert response.status is ResponseStatus.DIVERGED
    assert not response.status.success
    held = ie.pbrf(model, HalfMSE(), (X, y), [0], damping=10.0)  # enough damping makes one
    assert held.status is ResponseStatus.CONVERGED


def test_a_kinked_network_that_stalls_says_so() -> None:
    # f(1) = relu(p) with p = 0.2: removing a target far above pulls p down, and left of the kink at 0 only the damping pulls, upwards.
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU()).double()
    with torch.no_grad():
        model[0].weight.fill_(0.2)
    X, y = torch.tensor([[1.0], [1e-3]], dtype=F64), torch.tensor([[3.0], [0.0]], dtype=F64)
    with pytest.warns(
        NumericalWarning, match="pbrf: relative gradient norm .* steps; no step lowers the objective .* kink of a ReLU network"
    ):
        response = ie.pbrf(model, HalfMSE(), (X, y), [0], damping=0.05)
    assert response.status is ResponseStatus.STALLED
    assert abs(response.params.item()) < 1e-3


def test_running_out_of_steps_is_a_warning() -> None:
    case, model, X, y = problem("mse")
    with pytest.warns(NumericalWarning, match="used up its steps") as told:
        response = ie.pbrf(model, case.loss, (X, y), case.remove, 1e-3, max_steps=1)
    assert told[0].filename == __file__
    assert response.status is ResponseStatus.MAX_STEPS


def test_a_linear_solve_that_misses_its_goal_is_a_warning() -> None:
    case, model, X, y = problem("mse")
    with pytest.warns(NumericalWarning, match="linearized_pbrf: relative residual .*The steps ran out") as told:
        response = ie.linearized_pbrf(model, case.loss, (X, y), case.remove, 1e-3, solver=ie.solvers.CG(rtol=1e-12, max_steps=2))
    assert told[0].filename == __file__
    assert response.status is ie.solvers.Status.MAX_STEPS
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a truncated series is what was asked for
        ie.linearized_pbrf(model, case.loss, (X, y), case.remove, 1e-3, solver=ie.solvers.LiSSA(num_steps=3))


def snapshot(model: nn.Module) -> list[Any]:
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    return [flat(model).clone(), model.training, torch.get_rng_state(), *grads]


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_nothing_is_modified(error: type[BaseException] | None) -> None:
    case, model, X, y = problem("binary")
    model.train()
    model[0].weight.grad = torch.ones_like(model[0].weight)

    def stop(label: str, done: int, total: int) -> None:
        if error is not None:
            raise error

    before = snapshot(model)
    if error is None:
        ie.pbrf(model, case.loss, (X, y), case.remove, case.damping)
        ie.linearized_pbrf(model, case.loss, (X, y), case.remove, case.damping)
    else:
        with pytest.raises(error):
            ie.pbrf(model, case.loss, (X, y), case.remove, case.damping, progress=stop)
    for was, now in zip(before, snapshot(model), strict=True):
        assert torch.equal(was, now) if isinstance(was, Tensor) else was is now


def test_a_run_brings_loss_data_and_weight_decay() -> None:
    _, _, X, y = problem("mse")
    recipe = ie.Recipe(lambda: mlp(2).double(), nn.MSELoss(), lr=0.05, weight_decay=0.04, epochs=3, batch_size=5)
    run = ie.train(recipe, (X, y))
    by_run = ie.pbrf(run, remove=[2], damping=0.05)
    by_hand = ie.pbrf(run.model, nn.MSELoss(), (X, y), [2], 0.05, weight_decay=0.04)
    as_damping = ie.pbrf(run.model, nn.MSELoss(), (X, y), [2], 0.09)
    assert torch.equal(by_run.params, by_hand.params)
    assert_close(by_run.params, as_damping.params)


ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "damping": ({"damping": 0.0}, ArgumentError, r"expected damping \+ weight_decay > 0 and damping >= 0, .* singular, got damping = 0.0"),
    "negative": ({"damping": -0.1, "weight_decay": 1.0}, ArgumentError, r"damping >= 0, .* got damping = -0.1 and weight_decay = 1.0"),
    "nan": ({"damping": math.nan}, ArgumentError, "got damping = nan"),
    "range": ({"remove": [N]}, ArgumentError, f"expected example indices from 0 to {N - 1}, got {N}"),
    "repeated": ({"remove": [1, 2, 1]}, ArgumentError, "expected every index once, got 1 twice"),
    "float": ({"remove": [1.0]}, ArgumentError, "expected example indices as integers, got 1.0"),
    "loss": ({"loss": None}, ArgumentError, "expected loss and train_data beside a model"),
    "data": ({"train_data": None}, ArgumentError, "expected loss and train_data beside a model"),
    "model": ({"model_or_run": 3}, ArgumentError, "expected an nn.Module or a Run, got int"),
    "decay": ({"weight_decay": -1e-3}, ArgumentError, "expected weight_decay to be a number of at least 0, got -0.001"),
    "decay-text": ({"weight_decay": "1e-3"}, ArgumentError, "expected weight_decay to be a number of at least 0, got '1e-3'"),
}


@pytest.mark.parametrize("row", ERRORS)
@pytest.mark.parametrize("function", [ie.pbrf, ie.linearized_pbrf], ids=lambda f: f.__name__)
def test_arguments_that_make_no_sense(function: Callable[..., Any], row: str) -> None:
    case, model, X, y = problem("mse")
    options, error, message = ERRORS[row]
    arguments = {"model_or_run": model, "loss": case.loss, "train_data": (X, y), "remove": [1], "damping": 0.1} | options
    with pytest.raises(error, match=f"{function.__name__}: .*{message}"):
        function(**arguments)


def test_unusable_networks_and_data() -> None:
    case, model, X, y = problem("mse")
    with pytest.raises(ArgumentError, match=r"linearized_pbrf: expected solver .* got the class CG; pass an instance"):
        ie.linearized_pbrf(model, case.loss, (X, y), [1], solver=ie.solvers.CG)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="expected on_failure to be 'raise' or 'return', got 'warn'"):
        ie.pbrf(model, case.loss, (X, y), [1], on_failure="warn")  # type: ignore[arg-type]
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken[2].bias[0] = math.nan
    with pytest.raises(DataError, match=r"pbrf: expected finite parameters, got NaN or infinite values in 2\.bias"):
        ie.pbrf(broken, case.loss, (X, y), [1])
    bad = X.clone()
    bad[4, 0] = math.inf
    with pytest.raises(DataError, match=r"pbrf: expected finite inputs.*example 4"):
        ie.pbrf(model, case.loss, (bad, y), [1])
