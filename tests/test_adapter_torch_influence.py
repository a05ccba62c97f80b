"""The interface of torch-influence against closed forms and dense matrices in plain torch, float64."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from influence_ext.adapters.torch_influence import (
    AutogradInfluenceModule,
    BaseObjective,
    CGInfluenceModule,
    LiSSAInfluenceModule,
)
from influence_ext.adapters.torch_influence import curvature as curvature_module
from tests.objectives import (
    CPU,
    DAMP,
    L2,
    MODULES,
    D,
    N,
    Objective,
    close,
    damped,
    dense,
    gradient,
    linear,
    logistic,
    make,
    network,
    theta_of,
    vector,
)


@pytest.mark.parametrize(("cls", "options", "gnh"), MODULES)
@pytest.mark.parametrize("problem", [linear, logistic, network])
def test_inverse_products_and_scores(cls: type, options: dict, gnh: bool, problem: Callable[[], tuple]) -> None:
    case = problem()
    damp = 2.0 if problem is network else DAMP  # the Hessian of an untrained network is indefinite
    module = make(cls, case, **{**options, "damp": damp})
    H = damped(dense(case, gnh), damp)
    v = vector(len(H))
    close(module.inverse_hvp(v), torch.linalg.solve(H, v))
    stest = torch.linalg.solve(H, gradient(case, [4, 9, 2], train=False))
    close(module.stest([4, 9, 2]), stest)
    expected = torch.stack([gradient(case, [i], train=True) @ stest for i in (3, 0, 40, 11)]) / N
    close(module.influences([3, 0, 40, 11], [4, 9, 2]), expected)
    everything = torch.stack([gradient(case, [i], train=True) @ v for i in range(N)]) / N
    close(module.influences(range(N), [0], stest=v), everything)
    close(copy.deepcopy(module).influences(None, [0], stest=v), everything)


def test_closed_forms() -> None:
    case = linear()
    X1 = torch.cat([case[2], torch.ones(N, 1, dtype=torch.float64)], dim=1)
    v = vector(D + 1)
    H = 2 / N * X1.T @ X1 + (L2 + DAMP) * torch.eye(D + 1, dtype=torch.float64)
    close(make(CGInfluenceModule, case, rtol=1e-13).inverse_hvp(v), torch.linalg.solve(H, v))
    case = logistic()
    p = torch.sigmoid(case[0](case[2])).detach()
    H = (X1 * p * (1 - p)).T @ X1 / N + (L2 + DAMP) * torch.eye(D + 1, dtype=torch.float64)
    close(make(CGInfluenceModule, case, rtol=1e-13).inverse_hvp(v), torch.linalg.solve(H, v))
    # at probabilities, J = p(1-p) x and the loss's second derivative is y/p² + (1-y)/(1-p)²
    y = case[3]
    weights = (p * (1 - p)) ** 2 * (y / p**2 + (1 - y) / (1 - p) ** 2)
    H = (X1 * weights).T @ X1 / N + (L2 + DAMP) * torch.eye(D + 1, dtype=torch.float64)
    close(make(CGInfluenceModule, case, rtol=1e-13, gnh=True).inverse_hvp(v), torch.linalg.solve(H, v))


def test_sign_and_scale_are_those_of_leaving_one_out() -> None:
    model, objective, X, y = linear()
    X1 = torch.cat([X, torch.ones(N, 1, dtype=torch.float64)], dim=1)

    def fit(rows: list[int]) -> Tensor:
        A = 2 / N * X1[rows].T @ X1[rows] + L2 * torch.eye(D + 1, dtype=torch.float64)
        return torch.linalg.solve(A, 2 / N * X1[rows].T @ y[rows])

    def test_loss(w: Tensor) -> Tensor:
        return ((X1[:3] @ w - y[:3]) ** 2).mean()

    w = fit(list(range(N)))
    with torch.no_grad():
        model.weight.copy_(w[:-1].T)
        model.bias.copy_(w[-1])
    scores = make(CGInfluenceModule, (model, objective, X, y), damp=0.0, rtol=1e-12).influences(range(N), [0, 1, 2])
    truth = torch.stack([test_loss(fit([i for i in range(N) if i != left])) - test_loss(w) for left in range(N)])
    assert torch.corrcoef(torch.stack([scores, truth]))[0, 1] > 0.98
    assert 0.7 < float((scores * truth).sum() / (truth * truth).sum()) < 1.3


@pytest.mark.parametrize("problem", [linear, network])
@pytest.mark.parametrize("gnh", [False, True])
@pytest.mark.parametrize("spare_work", [0, 10**9])
def test_lissa_draws_the_batches_of_a_sampling_loader(
    problem: Callable[[], tuple], gnh: bool, spare_work: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(curvature_module, "SPARE_WORK", spare_work)
    case, size, repeat, depth, scale = problem(), 6, 2, 4, 30.0
    steps: list[tuple[int, int, Tensor]] = []
    options = {"repeat": repeat, "depth": depth, "scale": scale, "gnh": gnh}
    module = make(LiSSAInfluenceModule, case, size, debug_callback=lambda r, t, h: steps.append((r, t, h)), **options)
    v = vector(theta_of(case[0]).numel())
    torch.manual_seed(7)
    found = module.inverse_hvp(v)
    torch.manual_seed(7)
    expected, trace = torch.zeros_like(v), []
    dataset = TensorDataset(case[2], case[3])
    for r in range(repeat):
        h = v
        sampler = RandomSampler(dataset, replacement=True, num_samples=depth * size)
        for t, batch in enumerate(DataLoader(dataset, batch_size=size, sampler=sampler)):
            h = v + h - damped(dense(case, gnh, batches=[batch])) @ h / scale
            trace.append((r, t, h))
        expected += h / scale / repeat
    close(found, expected)
    assert [step[:2] for step in steps] == [step[:2] for step in trace]
    for step, other in zip(steps, trace, strict=True):
        close(step[2], other[2])


def test_lissa_converges_and_reports_divergence(caplog: pytest.LogCaptureFixture) -> None:
    case = linear()
    v = vector(D + 1)
    found = make(LiSSAInfluenceModule, case, 200, repeat=2, depth=4000, scale=20.0).inverse_hvp(v)
    close(found, torch.linalg.solve(damped(dense(case, False)), v), rtol=0.05)
    assert caplog.messages == []
    make(LiSSAInfluenceModule, case, 8, repeat=1, depth=100, scale=0.1).inverse_hvp(v)
    assert "diverged with scale = 0.1" in caplog.text


@pytest.mark.parametrize(("cls", "options", "gnh"), MODULES)
def test_batch_size_plays_no_part(cls: type, options: dict, gnh: bool) -> None:
    scores = [make(cls, network(), size, **{**options, "damp": 2.0}).influences(range(N), [1, 2]) for size in (1, 7, N, 1000)]
    for other in scores[1:]:
        close(other, scores[0])


def test_loss_gradients() -> None:
    case = network()
    module = make(CGInfluenceModule, case, 4)
    rows = [7, 1, 30, 2, 9, 11]
    close(module.train_loss_grad(rows), gradient(case, rows, train=True))
    close(module.test_loss_grad(torch.tensor(rows)), gradient(case, rows, train=False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_is_kept(dtype: torch.dtype) -> None:
    for cls, options, _ in MODULES[:1] + [
        (LiSSAInfluenceModule, {"repeat": 1, "depth": 3, "scale": 50.0}, False),
        (CGInfluenceModule, {}, 0),
    ]:
        module = make(cls, linear(dtype), **options)
        assert module.inverse_hvp(vector(D + 1, dtype)).dtype == dtype
        scores = module.influences([0, 1], [2])
        assert (scores.dtype, scores.device, scores.shape) == (dtype, CPU, (2,))
        assert module.train_loss_grad([0]).dtype == module.test_loss_grad([0]).dtype == dtype


def test_exceptions() -> None:
    module = make(CGInfluenceModule, linear())
    for call in (module.train_loss_grad, module.test_loss_grad, module.stest, lambda idxs: module.influences(idxs, [0])):
        for index in (-1, N):
            with pytest.raises(IndexError, match="from 0 to 40"):
                call([index])
        for bad in ([2, 2], [[1]], [0.5]):
            with pytest.raises(ValueError, match="expected"):
                call(bad)
    with pytest.raises(ValueError, match="at least one"):
        module.train_loss_grad([])
    assert module.influences([], [0]).shape == (0,)
    with pytest.raises(ValueError, match=r"P = 6"):
        module.inverse_hvp(torch.zeros(5, dtype=torch.float64))
    with pytest.raises(TypeError, match="float64"):
        module.inverse_hvp(torch.zeros(6))
    with pytest.raises(ValueError, match=r"P = 6"):
        module.influences([0], [0], stest=torch.zeros(5))
    with pytest.raises(TypeError):
        make(CGInfluenceModule, linear(), nonsense=1).inverse_hvp(vector(6))
    with pytest.raises(TypeError):
        BaseObjective()  # type: ignore[abstract]
    with pytest.raises(NotImplementedError, match="str"):
        make(CGInfluenceModule, linear(), loader=DataLoader([(torch.zeros(D), "a")] * 3)).train_loss_grad([0])


def test_bad_arguments() -> None:
    case = network()
    model, objective, X, y = case
    loader = DataLoader(TensorDataset(X, y), batch_size=5)
    module = make(CGInfluenceModule, case, damp=2.0)
    with pytest.raises(TypeError, match=r"stest of the parameters' dtype torch.float64, got torch.float32"):
        module.influences([0], [], stest=torch.ones(len(theta_of(model))))
    with pytest.raises(ValueError, match="expected training examples, got an empty data set"):
        CGInfluenceModule(model, objective, DataLoader(TensorDataset(X[:0], y[:0])), loader, CPU, damp=2.0)
    with pytest.raises(ValueError, match="expected train_loader to be a DataLoader, got list"):
        CGInfluenceModule(model, objective, [(X, y)], loader, CPU, damp=2.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected test_loader to be a DataLoader, got NoneType"):
        CGInfluenceModule(model, objective, loader, None, CPU, damp=2.0).stest([0])  # type: ignore[arg-type]
    for wrong in ({"repeat": 0}, {"depth": 0}, {"scale": 0.0}):
        with pytest.raises(ValueError, match="expected repeat and depth of at least 1 and a positive scale"):
            make(LiSSAInfluenceModule, case, **{"damp": 2.0, "repeat": 1, "depth": 3, "scale": 10.0, **wrong})
    vectors = Objective(lambda z, t: F.cross_entropy(z, t, reduction="none"))
    for gnh in (False, True):
        with pytest.raises(ValueError, match=r"train_loss: expected a scalar, the mean over the batch, got \["):
            make(CGInfluenceModule, (model, vectors, X, y), damp=2.0, gnh=gnh).inverse_hvp(vector(len(theta_of(model))))
    with pytest.raises(ValueError, match="expected parameters with requires_grad"):
        make(CGInfluenceModule, (model.requires_grad_(False), objective, X, y), damp=2.0)


def test_scipy_is_asked_for_when_the_module_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.sparse.linalg", None)
    make(LiSSAInfluenceModule, linear(), repeat=1, depth=2, scale=10.0).stest([0])
    with pytest.raises(ImportError, match=r"CGInfluenceModule: expected the package scipy .*; run pip install scipy"):
        make(CGInfluenceModule, linear())


def test_negative_eigenvalues_are_a_value_error() -> None:
    case = linear()
    case[1].l2 = -10.0
    with pytest.raises(ValueError, match="negative eigenvalues"):
        make(AutogradInfluenceModule, case, check_eigvals=True)
    make(AutogradInfluenceModule, case)


def test_nothing_of_the_model_changes() -> None:
    case = network()
    model = case[0]
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    model[0].bias.grad = torch.ones(4, dtype=torch.float64)
    before = {name: (id(p), p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}
    for cls, options, _ in MODULES:
        module = make(cls, case, **{**options, "damp": 2.0})
        state = torch.get_rng_state()
        module.inverse_hvp(vector(len(theta_of(model))))
        module.influences(range(N), [1], stest=vector(len(theta_of(model))))
        assert torch.equal(state, torch.get_rng_state())
    for name, p in model.named_parameters():
        identity, value, requires_grad = before[name]
        assert id(p) == identity
        assert torch.equal(p, value)
        assert p.requires_grad == requires_grad
    assert torch.equal(model[0].bias.grad, torch.ones(4, dtype=torch.float64))
    assert len(model._forward_hooks) == 1
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model)
    assert calls


def test_what_changes_is_read_again() -> None:
    case = linear()
    module = make(CGInfluenceModule, case, rtol=1e-13)
    v = vector(D + 1)
    for change in (lambda: None, lambda: setattr(case[1], "l2", 0.5), lambda: case[0].weight.data.mul_(2)):
        change()
        close(module.inverse_hvp(v), torch.linalg.solve(damped(dense(case, False)), v))
        expected = torch.stack([gradient(case, [i], train=True) @ v for i in range(N)]) / N
        close(module.influences(range(N), [0], stest=v), expected)


def test_several_vectors_at_once() -> None:
    case = network()
    for cls, options, gnh in [*MODULES, (CGInfluenceModule, {"rtol": 1e-13, "atol": 1.0}, False)]:
        module = make(cls, case, **{**options, "damp": 2.0})
        V = torch.stack([vector(len(theta_of(case[0]))), *(module.test_loss_grad([i]) for i in (3, 5))])
        found = module.inverse_hvp(V)
        close(found, torch.stack([module.inverse_hvp(v) for v in V]))
        if "atol" not in options:
            close(found, torch.linalg.solve(damped(dense(case, gnh), 2.0), V.T).T)
            close(module.influences(range(N), [], stest=found)[1:], torch.stack([module.influences(range(N), [i]) for i in (3, 5)]))


@pytest.mark.parametrize(
    ("options", "damp"),
    [
        ({"maxiter": 2}, -0.05),
        ({"rtol": 0.3, "atol": 0.1, "maxiter": 6}, -0.05),
        ({"maxiter": 5, "M": np.diag(1 + np.arange(39.0))}, -0.05),
        ({"tol": 1e-2}, 2.0),
        ({"rtol": 1e-4, "atol": 0.5}, 2.0),
    ],
)
def test_cg_is_scipys_also_on_an_indefinite_hessian(options: dict, damp: float) -> None:
    case = network()
    H = damped(dense(case, False), damp)
    assert (torch.linalg.eigvalsh(H)[0] < 0) == (damp < 0)
    v = vector(len(H))
    known = {"rtol" if name == "tol" else name: value for name, value in options.items()}
    expected = torch.tensor(scipy.sparse.linalg.cg(H.numpy(), v.numpy(), **known)[0])
    module = make(CGInfluenceModule, case, **options, damp=damp)
    close(module.inverse_hvp(v), expected)
    close(module.inverse_hvp(torch.stack([v, v / 8]))[0], expected)
