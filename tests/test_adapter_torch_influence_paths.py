"""The interface of torch-influence: what cannot run natively, what loaders may yield, and the private names that others use."""

from __future__ import annotations

import logging
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from bench.adapters import torch_influence as benchmark
from influence_ext.adapters.torch_influence import AutogradInfluenceModule, BaseInfluenceModule, CGInfluenceModule, LiSSAInfluenceModule
from influence_ext.adapters.torch_influence import batches as batches_module
from influence_ext.adapters.torch_influence import curvature as curvature_module
from influence_ext.adapters.torch_influence import network as network_module
from influence_ext.adapters.torch_influence.curvature import sampled_indices
from influence_ext.adapters.torch_influence.regulariser import Regulariser
from influence_ext.losses.hessian import DIAGONAL, SOFTMAX
from tests.objectives import CPU, D, N, Objective, close, damped, dense, gradient, linear, logistic, make, network, seeded, theta_of, vector

# What cannot run natively


class Overridden(Objective):
    def train_loss(self, model: nn.Module, params: Tensor, batch: Any) -> Tensor:
        return super().train_loss(model, params, batch) + 0.2 * (model(batch[0]) ** 4).mean()


def unusual(kind: str) -> tuple[tuple, str]:
    model, _, X, y = network()
    if kind == "weighted":
        loss = lambda z, t: F.cross_entropy(z, t, weight=torch.tensor([1.0, 2.0, 5.0], dtype=z.dtype))  # noqa: E731
        return (model, Objective(loss), X, y), "mean or the sum"
    if kind == "sum":
        return (model, Objective(lambda z, t: F.cross_entropy(z, t, reduction="sum")), X, y), "but: sum"
    if kind == "mixing":
        return (model, Objective(F.cross_entropy, lambda z: z - z.mean(dim=0)), X, y), "mixes|mix"
    if kind == "mixed inputs":
        layer, _, X, y = linear()
        centred = Objective(F.mse_loss)
        centred.train_outputs = lambda model, batch: model(batch[0] - batch[0].mean(dim=0))  # type: ignore[method-assign]
        return (layer, centred, X, y), "mix"
    assert kind == "overridden"
    return (model, Overridden(F.cross_entropy), X, y), "overridden"


@pytest.mark.parametrize("kind", ["weighted", "sum", "mixing", "mixed inputs", "overridden"])
@pytest.mark.parametrize("budget", [0, 2**30])
def test_unusual_objectives_mean_what_their_batches_mean(
    kind: str, budget: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(curvature_module, "GRAPH_BYTES", budget)
    case, reason = unusual(kind)
    v = vector(len(theta_of(case[0])))
    with caplog.at_level(logging.INFO, logger="influence_ext"):
        for gnh in (False, True):
            module = make(CGInfluenceModule, case, damp=20.0, rtol=1e-12, gnh=gnh)
            close(module.inverse_hvp(v), torch.linalg.solve(damped(dense(case, gnh), 20.0), v))
    assert any(word in caplog.text for word in reason.split("|"))
    expected = torch.stack([gradient(case, [i], train=True) @ v for i in range(N)]) / N
    close(module.influences(range(N), [0], stest=v), expected)


def curved(kind: str) -> tuple:
    """Objectives whose Hessian is more than a Gauss-Newton matrix, with all their parameters used."""
    model, objective, X, y = network()
    if kind == "used twice":
        layer, _, X, y = linear()
        objective = Objective(F.mse_loss)
        objective.train_outputs = lambda model, batch: model(batch[0]) * model.weight.sum()  # type: ignore[method-assign]
        return layer, objective, X, y
    if kind == "an operator without a rule":
        return model, Objective(F.cross_entropy, torch.special.erfcx), X, y
    if kind == "a loss of its own":
        own = lambda z, t: ((z - F.one_hot(t, 3)).abs().pow(3).sum(dim=1) + z.prod(dim=1)).mean()  # noqa: E731
        return model, Objective(own), X, y
    if kind == "a linear loss":
        return model, Objective(lambda z, t: z.gather(1, t[:, None]).mean()), X, y
    if kind == "many outputs":  # whose Hessian is a graph instead of blocks
        wide = seeded(lambda: nn.Sequential(nn.Linear(D, 3), nn.Tanh(), nn.Linear(3, 70))).double()
        return wide, Objective(lambda z, t: (z.logsumexp(1) - z[:, 0] * t + z.sin().prod(1)).mean()), X, y
    assert kind == "plain"
    return model, objective, X, y


CURVED = ["plain", "used twice", "an operator without a rule", "a loss of its own", "a linear loss", "many outputs"]


@pytest.mark.parametrize("kind", CURVED)
def test_hessians_of_curved_networks_are_native(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    case = curved(kind)
    H = dense(case, False)
    damp = 2 - float(torch.linalg.eigvalsh(H)[0])
    v = vector(len(H))
    with caplog.at_level(logging.INFO, logger="influence_ext.adapters"):
        expected = torch.linalg.solve(damped(H, damp), v)
        close(make(CGInfluenceModule, case, damp=damp, rtol=1e-12).inverse_hvp(v), expected)
        close(make(AutogradInfluenceModule, case, damp=damp).inverse_hvp(v), expected)
        module = make(LiSSAInfluenceModule, case, 6, damp=damp, repeat=1, depth=3, scale=40.0)
        torch.manual_seed(5)
        found = module.inverse_hvp(v)
    torch.manual_seed(5)
    h = v
    for index in sampled_indices(module.train_loader, 3):
        h = v + h - damped(dense(case, False, batches=[[case[2][index], case[3][index]]]), damp) @ h / 40
    close(found, h / 40)
    assert "in torch" not in " ".join(message for message in caplog.messages if message.startswith("torch_influence"))


def test_a_hessian_within_a_budget_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network_module, "MEMORY_BUDGET", 12_000)
    case = network()
    v = vector(len(theta_of(case[0])))
    module = make(CGInfluenceModule, case, damp=2.0, rtol=1e-12)
    close(module.inverse_hvp(v), torch.linalg.solve(damped(dense(case, False), 2.0), v))
    assert module._captures.outputs().tape().chunk is not None


@torch.library.custom_op("influence_ext_tests::square", mutates_args=())
def square(z: Tensor) -> Tensor:
    return z * z


@torch.library.custom_op("influence_ext_tests::slope_of_square", mutates_args=())
def slope_of_square(z: Tensor, g: Tensor) -> Tensor:
    return 2 * z * g


square.register_fake(torch.empty_like)
slope_of_square.register_fake(lambda z, g: torch.empty_like(z))
square.register_autograd(
    lambda ctx, g: slope_of_square(*ctx.saved_tensors, g), setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
)


def test_an_operator_without_second_derivatives_is_left_to_torch_which_refuses_it(caplog: pytest.LogCaptureFixture) -> None:
    model, _, X, y = network()
    case = (model, Objective(F.cross_entropy, square), X, y)
    v = vector(len(theta_of(model)))
    with caplog.at_level(logging.INFO, logger="influence_ext"), pytest.raises(RuntimeError, match="slope_of_square"):
        make(CGInfluenceModule, case, damp=2.0).inverse_hvp(v)
    assert "products run in torch" in caplog.text


def test_a_module_in_training_mode_is_differentiated_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    model, objective, X, y = network()
    model.insert(1, nn.BatchNorm1d(4, track_running_stats=False).double())
    case = (model, objective, X, y)
    module = make(CGInfluenceModule, case, damp=2.0, rtol=1e-12, gnh=True)
    model.train()
    v = vector(len(theta_of(model)))
    with caplog.at_level(logging.INFO, logger="influence_ext"):
        close(module.inverse_hvp(v), torch.linalg.solve(damped(dense(case, True), 2.0), v))
    assert "training mode" in caplog.text
    assert model.training


# Data


class Pairs(Dataset):
    """Examples one at a time, through ``change`` at every reading."""

    def __init__(self, X: Tensor, y: Tensor, change: Callable[[Tensor, int], Tensor] = lambda x, i: x):
        self.X, self.y, self.change = X, y, change

    def __len__(self) -> int:
        return len(self.X)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.change(self.X[i], i), self.y[i]


Named = namedtuple("Named", ["x", "y"])


def in_dicts(items: list) -> dict:
    return {0: torch.stack([x for x, _ in items]), 1: torch.stack([y for _, y in items])}


def padded(items: list) -> tuple[Tensor, Tensor]:
    """As long as the longest example of the batch."""
    length = max(int(x.nonzero().max()) + 1 for x, _ in items)
    return torch.stack([x[:length] for x, _ in items]), torch.stack([y for _, y in items])


@pytest.mark.parametrize("form", ["plain", "shuffling", "dict", "named", "single", "padded", "large"])
def test_loaders(form: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    model, objective, X, y = linear()
    if form == "padded":
        X = X * (torch.arange(D) <= torch.arange(N)[:, None] % D)
        objective.train_outputs = lambda model, batch: model(F.pad(batch[0], (0, D - batch[0].shape[1])))  # type: ignore[method-assign]
    if form == "large":
        monkeypatch.setattr(batches_module, "MAX_BYTES", 100)
    case = (model, objective, X, y)
    collate = {"dict": in_dicts, "named": lambda items: Named(*in_dicts(items).values()), "padded": padded}.get(form)
    dataset = [Named(*pair) for pair in zip(X, y, strict=True)] if form == "single" else Pairs(X, y)
    loader = DataLoader(dataset, batch_size=1 if form == "single" else 6, shuffle=form == "shuffling", collate_fn=collate)
    v = vector(D + 1)
    with caplog.at_level(logging.INFO, logger="influence_ext"):
        module = make(CGInfluenceModule, case, loader=loader, rtol=1e-13)
        close(module.inverse_hvp(v), torch.linalg.solve(damped(dense(case, False)), v))
        expected = torch.stack([gradient(case, [i], train=True) @ v for i in range(N)]) / N
        close(module.influences(range(N), [0], stest=v), expected)
    assert ("batch by batch" in caplog.text) == (form in ("padded", "large"))


@pytest.mark.parametrize(("problem", "shape"), [(linear, DIAGONAL), (logistic, DIAGONAL), (network, SOFTMAX)])
def test_output_hessians_take_the_form_of_the_fused_product(problem: Callable[[], tuple], shape: int) -> None:
    module = make(CGInfluenceModule, problem(), gnh=True)
    hessian = module._captures.outputs().hessian
    assert hessian.shape == shape
    z = module._captures.outputs().tape().outputs
    blocks = module._captures.outputs().network.loss.hessian(z, torch.arange(N))
    U = vector(2 * z.numel()).view(2, *z.shape)
    close(hessian.matmat(U), blocks.matmat(U), rtol=1e-13)


def test_a_layer_with_a_frozen_part_in_lissa(monkeypatch: pytest.MonkeyPatch) -> None:
    for frozen in ("weight", "bias"):
        case = linear()
        case[0].get_parameter(frozen).requires_grad_(False)
        module = make(LiSSAInfluenceModule, case, 6, repeat=1, depth=4, scale=30.0)
        v, found = vector(len(theta_of(case[0]))), []
        for spare_work in (0, 10**9):  # rows of the batch, then the whole set weighed
            monkeypatch.setattr(curvature_module, "SPARE_WORK", spare_work)
            torch.manual_seed(4)
            found.append(module.inverse_hvp(v))
        close(found[0], found[1], rtol=1e-13)


def test_the_benchmark_runs(capsys: pytest.CaptureFixture) -> None:
    assert benchmark.main(["--cases", "linear, CG", "--seconds", "0"]) == 0
    assert "1.000000" in capsys.readouterr().out
    assert benchmark.main(["--cases", "none"]) == 2


def test_data_that_change_are_read_again_for_every_product(caplog: pytest.LogCaptureFixture) -> None:
    model, objective, X, y = linear()
    readings: list[int] = []

    def change(x: Tensor, i: int) -> Tensor:
        readings.append(i)
        return x + 1e-12 * len(readings)

    loader = DataLoader(Pairs(X, y, change), batch_size=6)
    with caplog.at_level(logging.INFO, logger="influence_ext"):
        found = make(CGInfluenceModule, (model, objective, X, y), loader=loader, rtol=1e-9, maxiter=3).inverse_hvp(vector(D + 1))
    assert "read once more" in caplog.text
    assert bool(found.isfinite().all())


def test_the_last_layer_of_a_frozen_network_needs_no_second_derivatives(caplog: pytest.LogCaptureFixture) -> None:
    model, objective, X, y = network()
    model[0].requires_grad_(False)
    case = (model, objective, X, y)
    v = vector(15)
    with caplog.at_level(logging.INFO, logger="influence_ext"):
        close(make(CGInfluenceModule, case, rtol=1e-13).inverse_hvp(v), torch.linalg.solve(damped(dense(case, False)), v))
    assert caplog.messages == []


# Private names that tests and subclasses of torch-influence use


def test_helpers() -> None:
    case = network()
    module = make(CGInfluenceModule, case)
    params = module._model_params(with_names=False)
    flat = module._flatten_params_like(params)
    assert [p.shape for p in module._reshape_like_params(flat)] == [p.shape for p in params] == list(module.params_shape)
    assert [name for name, _ in module._model_params()] == list(module.params_names)
    leaves = module._model_make_functional()
    assert module.is_model_functional
    assert list(case[0].parameters()) == []
    with pytest.raises(AssertionError):
        module._model_params()
    module._model_reinsert_params([2 * p for p in leaves])
    assert torch.equal(case[0][0].bias, 2 * leaves[1])
    module._model_reinsert_params(leaves, register=True)
    assert all(a is b for a, b in zip(params, module._model_params(with_names=False), strict=True))
    assert torch.equal(module._flatten_params_like(params), flat)
    sizes = {
        (): [7, 7, 7, 7, 7, 6],
        (("batch_size", 40),): [40, 1],
        (("sample_n_batches", 9),): [7] * 9,
        (("subset", (3, 1, 2)), ("batch_size", 2)): [2, 1],
    }
    for options, expected in sizes.items():
        found = list(module._loader_wrapper(train=True, **dict(options)))
        assert [size for _, size in found] == [len(batch[0]) for batch, _ in found] == expected
    (batch, _), *_ = module._loader_wrapper(train=True, subset=[3, 1], batch_size=2)
    assert torch.equal(batch[0], case[2][[3, 1]])


@pytest.mark.parametrize("gnh", [False, True])
def test_a_solver_of_ones_own(gnh: bool) -> None:
    class Own(BaseInfluenceModule):
        def inverse_hvp(self, vec: Tensor) -> Tensor:
            leaves = self._model_make_functional()
            theta = self._flatten_params_like(leaves)
            total = sum(size / N * self._hvp_at_batch(batch, theta, vec, gnh) for batch, size in self._loader_wrapper(train=True))
            self._model_reinsert_params(self._reshape_like_params(theta), register=True)
            return total

    model, objective, X, y = case = network()
    loader = DataLoader(TensorDataset(X, y), batch_size=7)
    v = vector(len(theta_of(model)))
    close(Own(model, objective, loader, loader, CPU).inverse_hvp(v), dense(case, gnh) @ v)


@pytest.mark.parametrize(
    ("function", "is_diagonal"),
    [
        (lambda p: torch.square(p.norm()), True),
        (lambda p: (p**4).sum() + p[0].exp(), True),
        (lambda p: 0.0, True),
        (lambda p: p.sum(), True),
        (lambda p: (p**2).sum() + 1e-4 * p[0] * p[5], False),
        (lambda p: p.norm(), False),
    ],
)
def test_regulariser(function: Callable[[Tensor], Any], is_diagonal: bool) -> None:
    theta, V = vector(9), vector(36).view(4, 9)
    regulariser = Regulariser(function, theta)
    assert (regulariser.diagonal is not None) == is_diagonal
    as_tensor = lambda p: function(p) + 0 * p.sum()  # noqa: E731
    H = torch.autograd.functional.hessian(as_tensor, theta)
    assert torch.allclose(regulariser.product(V), V @ H, rtol=1e-10, atol=1e-12)
    assert torch.allclose(regulariser.gradient, torch.autograd.functional.jacobian(as_tensor, theta))
