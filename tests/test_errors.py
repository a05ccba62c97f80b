"""Bad input gets one sentence: who, what was expected, what came, how to fix it. And whatever happens, nothing is modified."""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import influence_ext as ie
from influence_ext import errors, plan
from tests.cases import build, generator
from tests.cases.models import NETWORKS, mlp

F64 = torch.float64
BASE = build(NETWORKS["mlp-tanh"], F64)  # 3-6-5-2, P = 71, N = 5, mean squared error
CLASSES = build(NETWORKS["mlp-ce"], F64)  # 3-6-4, cross-entropy
TOKENS = build(NETWORKS["sequence-outputs"], F64)  # outputs [N, 4, 3]
LABELS = build(NETWORKS["mlp-bce"], F64)  # 3-6-3, binary cross-entropy
MSE, CE, BCE = nn.MSELoss(), nn.CrossEntropyLoss(), nn.BCEWithLogitsLoss()


def ggn(**changes: Any) -> Any:
    """``ie.GGN`` of the base network with some arguments changed."""
    arguments = {"model": BASE.model, "loss": MSE, "data": BASE.data, **changes}
    return ie.GGN(**arguments)


def saturated(output: float = 1e4) -> nn.Module:
    """A linear layer whose outputs are far beyond what a sigmoid resolves."""
    layer = nn.Linear(3, 2).to(F64)
    with torch.no_grad():
        layer.bias.fill_(output)
    return layer


def influence(**changes: Any) -> Any:
    """``ie.Influence`` of the base network with some arguments changed."""
    arguments = {"model": BASE.model, "loss": MSE, "train_data": BASE.data, "damping": 0.1, **changes}
    return ie.Influence(**arguments)


def changed(x: Tensor, index: tuple[int, ...], value: float) -> Tensor:
    """A copy of ``x`` with one entry replaced."""
    x = x.clone()
    x[index] = value
    return x


def with_parameter(value: float) -> nn.Module:
    """The base network with one entry of its second weight replaced."""
    model = copy.deepcopy(BASE.model)
    with torch.no_grad():
        model[2].weight[1, 1] = value
    return model


def vector(length: int = 71, dtype: torch.dtype = F64) -> Tensor:
    """Ones."""
    return torch.ones(length, dtype=dtype)


def normalised() -> nn.Module:
    """A network with batch norm."""
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).to(F64)


class Dropping(nn.Module):
    """Dropout that evaluation mode does not turn off."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        """``F.dropout`` is active unless told otherwise."""
        return nn.functional.dropout(self.fc(x), 0.5)


def frozen() -> nn.Module:
    """Nothing to differentiate by."""
    return copy.deepcopy(BASE.model).requires_grad_(False)


def pbrf(**options: Any) -> Any:
    """Of one example of the base case."""
    return ie.pbrf(BASE.model, MSE, BASE.data, remove=[1], damping=0.1, **options)


@dataclass(frozen=True)
class Bad:
    """One mistake, the exception it gets, and what the message must say."""

    id: str
    call: Callable[[], Any]
    error: type[Exception]
    says: str


X, Y = BASE.X, BASE.y
ROWS = (
    Bad("vector-too-short", lambda: ggn() @ vector(70), errors.ShapeError, r"GGN: expected v .*P = 71, got \[70\]"),
    Bad("vector-names-parameters", lambda: ggn() @ vector(70), errors.ShapeError, r"0\.weight"),
    Bad("matrix-transposed", lambda: ggn().matmat(torch.ones(71, 2, dtype=F64)), errors.ShapeError,
        r"expected v of shape \[V, P\] with P = 71, got \[71, 2\]"),
    Bad("vector-of-rank-3", lambda: ggn() @ torch.ones(71, 1, 1, dtype=F64), errors.ShapeError, r"got \[71, 1, 1\]"),
    Bad("vector-dtype", lambda: ggn() @ vector(dtype=torch.float32), errors.DTypeError,
        r"expected v of dtype torch\.float64, got torch\.float32; convert it"),
    Bad("vector-device", lambda: ggn() @ vector().to("meta"), errors.DeviceError, r"expected v on cpu, got meta; move it"),
    Bad("vector-numpy", lambda: ggn() @ np.ones(71), errors.DTypeError, r"expected .*tensor.*got ndarray"),
    Bad("list-too-short", lambda: ggn() @ [torch.ones(6, 3, dtype=F64)], errors.ShapeError, r"expected 6 .*got 1"),
    Bad("list-wrong-shape", lambda: ggn() @ ([torch.ones(2, 2, dtype=F64)] * 6), errors.ShapeError,
        r"got 0\.weight \[2, 2\] instead of \[6, 3\]"),
    Bad("dict-unknown-name", lambda: ggn() @ {"nothing": vector()}, errors.ShapeError, r"0\.weight.*nothing"),
    Bad("jvp-vector", lambda: ie.jvp(BASE.model, X, vector(70)), errors.ShapeError, r"jvp: expected v .*P = 71, got \[70\]"),
    Bad("jvp-dtype", lambda: ie.jvp(BASE.model, X, vector(dtype=torch.float32)), errors.DTypeError, r"jvp.*float64.*float32"),
    Bad("vjp-shape", lambda: ie.vjp(BASE.model, X, torch.ones(5, 3, dtype=F64)), errors.ShapeError,
        r"vjp: expected .*\[5, 2\].*got \[5, 3\]"),
    Bad("vjp-dtype", lambda: ie.vjp(BASE.model, X, torch.ones(5, 2)), errors.DTypeError, r"vjp.*float64.*float32"),
    Bad("dots-shape", lambda: ie.per_example_dots(BASE.model, MSE, BASE.data, torch.ones(2, 70, dtype=F64)),
        errors.ShapeError, r"per_example_dots: expected .*\[V, P\] with P = 71, got \[2, 70\]"),
    Bad("no-examples", lambda: ggn(data=(X[:0], Y[:0])), errors.DataError, r"GGN: expected at least one example, got empty"),
    Bad("no-batches", lambda: ggn(data=[]), errors.DataError, r"GGN: expected at least one example, got empty"),
    Bad("generator", lambda: ggn(data=(b for b in [BASE.data])), errors.DataError,
        r"read more than once, got the one-shot iterator generator; pass list"),
    Bad("iterator", lambda: influence(train_data=iter([BASE.data])), errors.DataError, r"Influence.*more than once"),
    Bad("shuffling-loader", lambda: ggn(data=DataLoader(TensorDataset(X, Y), shuffle=True)), errors.DataError,
        r"fixed order.*shuffle=False"),
    Bad("data-set", lambda: ggn(data=TensorDataset(X, Y)), errors.DataError, r"single examples; wrap it in .*DataLoader"),
    Bad("no-targets", lambda: ggn(data=X), errors.DataError, r"expected .*\(X, y\).*got Tensor"),
    Bad("unequal-lengths", lambda: ggn(data=(X, Y[:4])), errors.ShapeError, r"same number of examples.*X 5, y 4"),
    Bad("nan-input", lambda: ggn(data=(changed(X, (3, 1), torch.nan), Y)), errors.DataError,
        r"finite inputs, got NaN or infinite values in X of example 3"),
    Bad("inf-target", lambda: ggn(data=(X, changed(Y, (2, 0), torch.inf))), errors.DataError, r"finite targets.*example 2"),
    Bad("nan-parameter", lambda: ggn(model=with_parameter(torch.nan)), errors.DataError, r"finite parameters.*2\.weight"),
    Bad("inf-parameter", lambda: ie.jvp(with_parameter(torch.inf), X, vector()), errors.DataError, r"jvp.*2\.weight"),
    Bad("nan-test-input", lambda: influence().scores((changed(X, (1, 1), torch.nan), Y)), errors.DataError,
        r"finite inputs.*example 1"),
    Bad("input-dtype", lambda: ggn(data=(X.float(), Y)), errors.DTypeError, r"float64.*float32"),
    Bad("input-width", lambda: ggn(data=(X[:, :2], Y)), (errors.UnsupportedModelError, errors.ShapeError), r"expected"),
    Bad("target-shape", lambda: ggn(data=(X, Y[:, :1])), errors.ShapeError, r"\[5, 2\].*\[5, 1\]"),
    Bad("class-too-large", lambda: ie.GGN(CLASSES.model, CE, (CLASSES.X, torch.tensor([0, 1, 2, 3, 4]))), errors.DataError,
        r"class indices in \[0, 4\), got 4 in example 4"),
    Bad("class-negative", lambda: ie.GGN(CLASSES.model, CE, (CLASSES.X, torch.tensor([0, -1, 2, 3, 0]))), errors.DataError,
        r"class indices in \[0, 4\), got -1 in example 1"),
    Bad("class-as-float", lambda: ie.GGN(CLASSES.model, CE, (CLASSES.X, torch.zeros(5, dtype=F64))), errors.InfluenceExtError,
        r"class ind.*float64"),
    Bad("binary-target-above-one", lambda: ie.GGN(LABELS.model, BCE, (LABELS.X, 2 * torch.ones(5, 3, dtype=F64))),
        errors.DataError, r"targets in \[0, 1\], got values from 2 to 2"),
    Bad("unequal-test-classes", lambda: ie.grad_gram(CLASSES.model, CE, CLASSES.data, (CLASSES.X, torch.full((5,), 9))),
        errors.DataError, r"got 9"),
    Bad("batch-norm-training", lambda: ggn(model=normalised().train()), errors.UnsupportedModelError,
        r"batch norm 1 is in training mode.*model\.eval\(\)"),
    Bad("active-dropout", lambda: ggn(model=Dropping().to(F64)), errors.UnsupportedModelError,
        r"dropout.*active in evaluation mode.*training=self\.training"),
    Bad("reduction-none", lambda: ggn(loss=nn.MSELoss(reduction="none")), errors.UnsupportedLossError,
        r"reduction.*'mean' or 'sum', got 'none'"),
    Bad("unknown-loss-name", lambda: ggn(loss="hinge"), errors.UnsupportedLossError, r"mse_loss.*got 'hinge'"),
    Bad("no-loss", lambda: ggn(loss=3), errors.UnsupportedLossError, r"callable loss\(output, target\), got 3"),
    Bad("absolute-error", lambda: ggn(loss=nn.L1Loss()), errors.UnsupportedLossError, r"l1_loss.*linear.*SmoothL1Loss"),
    Bad("log-likelihood", lambda: ie.GGN(CLASSES.model, nn.NLLLoss(), CLASSES.data), errors.UnsupportedLossError,
        r"linear in log-probabilities.*take log_softmax off.*cross_entropy on the logits"),
    Bad("linear-callable", lambda: ggn(loss=lambda z, t: (z * t).sum()), errors.UnsupportedLossError, r"linear in them"),
    Bad("class-weights", lambda: ie.GGN(CLASSES.model, nn.CrossEntropyLoss(weight=torch.ones(3)), CLASSES.data),
        errors.ShapeError, r"weight \[K\] = \[4\].*got \[3\]"),
    Bad("negative-class-weights", lambda: ie.GGN(CLASSES.model, nn.CrossEntropyLoss(weight=-torch.ones(4)), CLASSES.data),
        errors.ArgumentError, r"weight.*none negative, got minimum -1"),
    Bad("all-ignored", lambda: ie.GGN(CLASSES.model, CE, (CLASSES.X, torch.full((5,), -100))), errors.DataError,
        r"a target that counts, got none among 5"),
    Bad("no-class-of-weight", lambda: ie.GGN(CLASSES.model, nn.CrossEntropyLoss(weight=torch.tensor([0.0, 1, 1, 1])),
        (CLASSES.X, torch.zeros(5, dtype=torch.long))), errors.DataError, r"a target that counts, got none among 5"),
    Bad("label-smoothing", lambda: ie.GGN(CLASSES.model, nn.CrossEntropyLoss(label_smoothing=1.5), CLASSES.data),
        errors.ArgumentError, r"label_smoothing in \[0, 1\], got 1.5"),
    Bad("probabilities-of-one-class", lambda: ie.GGN(CLASSES.model, CE, (CLASSES.X, torch.full((5, 4), -0.1, dtype=F64))),
        errors.DataError, r"probabilities >= 0 as targets, got -0.1"),
    Bad("probabilities-with-ignored", lambda: ie.GGN(CLASSES.model, nn.CrossEntropyLoss(ignore_index=0),
        (CLASSES.X, torch.full((5, 4), 0.25, dtype=F64))), errors.ArgumentError, r"ignore_index = 0, got probabilities"),
    Bad("classes-on-the-last-axis", lambda: ie.GGN(TOKENS.model, CE, (TOKENS.X, torch.zeros(5, 4, dtype=torch.long))),
        errors.ShapeError, r"axis 1.*transpose\(1, 2\)"),
    Bad("negative-variance", lambda: ggn(loss=nn.GaussianNLLLoss(), data=(BASE.X, -torch.ones(5, 2, 2, dtype=F64))),
        errors.DataError, r"variances >= 0 in targets\[:, 1\], got -1"),
    Bad("no-variance", lambda: ggn(loss=nn.GaussianNLLLoss()), errors.ShapeError, r"\[5, 2, 2\].*torch.stack\(\[y, variance\], dim=1\)"),
    Bad("no-probabilities", lambda: ie.GGN(LABELS.model, nn.BCELoss(), LABELS.data), errors.DataError,
        r"probabilities in \(0, 1\) as outputs.*BCEWithLogitsLoss"),
    Bad("saturated-probabilities", lambda: ggn(model=nn.Sequential(saturated(), nn.Sigmoid()), loss=nn.BCELoss(),
        data=(BASE.X, 0 * BASE.y)), errors.DataError, r"finite values of binary_cross_entropy.*exactly 0 or 1"),
    Bad("negative-rates", lambda: ggn(model=saturated(-1e4), loss=nn.PoissonNLLLoss(log_input=False), data=(BASE.X, BASE.y.abs())),
        errors.DataError, r"rates > 0 as outputs.*softplus"),
    Bad("negative-counts", lambda: ggn(loss=nn.PoissonNLLLoss(), data=(BASE.X, -1 - BASE.y.abs())), errors.DataError, r"counts >= 0"),
    Bad("weight-of-examples", lambda: ie.GGN(LABELS.model, nn.BCEWithLogitsLoss(weight=torch.ones(5, 1)), LABELS.data), errors.ShapeError,
        r"weight that broadcasts to the outputs of one example \[3\], got \[5, 1\]"),
    Bad("mixed-examples", lambda: ggn(loss=lambda z, t: (z - t - (z - t).mean(0)).square().mean()), errors.UnsupportedLossError,
        r"mean or the sum of its values on each example alone.*mixes examples"),
    Bad("first-example-only", lambda: ggn(loss=lambda z, t: (z[0] - t[0]).square().mean()), errors.UnsupportedLossError, r"mixes examples"),
    Bad("callable-misstated", lambda: ggn(loss=lambda z, t: (z - t).square().mean(), reduction="sum"), errors.ArgumentError,
        r"to be a sum over examples as stated, got a mean"),
    Bad("callable-unreduced", lambda: ggn(loss=lambda z, t: (z - t).square()), errors.ShapeError, r"floating-point scalar.*\.mean\(\)"),
    Bad("callable-number", lambda: ggn(loss=lambda z, t: float((z - t).square().mean())), errors.UnsupportedLossError,
        r"tensor, got float"),
    Bad("callable-detached", lambda: ggn(loss=lambda z, t: (z.detach() - t).square().mean()), errors.UnsupportedLossError,
        r"can differentiate"),
    Bad("callable-infinite", lambda: ggn(loss=lambda z, t: (0 * (z - t)).log().mean()), errors.DataError, r"finite values"),
    Bad("callable-raising", lambda: ggn(loss=lambda z, t: z @ t), errors.UnsupportedLossError, r"batch of one example, got RuntimeError"),
    Bad("callable-not-convex", lambda: ggn(loss=lambda z, t: (z - t).cos().mean()).diagonal(), errors.UnsupportedLossError,
        r"convex in the outputs, got a Hessian with eigenvalue"),
    Bad("nothing-trainable", lambda: ggn(model=frozen()), errors.ArgumentError, r"6 parameters with requires_grad=False"),
    Bad("unknown-parameter", lambda: ggn(params=["0.wieght"]), errors.ArgumentError, r"'0\.wieght'.*0\.weight"),
    Bad("foreign-tensor", lambda: ggn(params=[torch.ones(6, 3)]), errors.ArgumentError, r"the model's own parameters"),
    Bad("precision-unknown", lambda: ggn(precision="half"), errors.ArgumentError,
        r"expected a precision among full, tf32, bfloat16, got 'half'"),
    Bad("precision-on-cpu", lambda: ggn(precision="tf32"), errors.ArgumentError,
        r'expected precision="full" for torch.float64 on cpu, got "tf32"'),
    Bad("data-without-values", lambda: ggn(data=(X.to("meta"), Y.to("meta"))), errors.DeviceError,
        r"with values, got a tensor on the meta"),
    Bad("half-precision-data", lambda: ggn(data=(X.half(), Y)), errors.DTypeError, r"parameters' dtype .*, got torch\.float16"),
    Bad("remove-out-of-range", lambda: influence().parameter_change([0, 5]), errors.ArgumentError, r"from 0 to 4, got 5"),
    Bad("remove-negative", lambda: influence().parameter_change([-1]), errors.ArgumentError, r"from 0 to 4, got -1"),
    Bad("remove-twice", lambda: influence().parameter_change([1, 3, 1]), errors.ArgumentError, r"got 1 twice"),
    Bad("remove-mask", lambda: influence().parameter_change([True, False]), errors.ArgumentError, r"nonzero"),
    Bad("remove-scalar", lambda: influence().parameter_change(3), errors.ArgumentError, r"list of example indices, got 3"),
    Bad("damping-zero", lambda: influence(damping=0.0), errors.ArgumentError, r"Influence: expected damping .*> 0.*got 0"),
    Bad("damping-negative", lambda: influence(damping=-1.0), errors.ArgumentError, r"damping.*got -1"),
    Bad("damping-nan", lambda: influence(damping=float("nan")), errors.ArgumentError, r"damping.*got nan"),
    Bad("ggn-damping-negative", lambda: ggn(damping=-1.0), errors.ArgumentError, r"GGN: expected damping.*got -1"),
    Bad("damping-text", lambda: influence(damping="1e-3"), errors.ArgumentError, r"Influence: expected damping.*got '1e-3'"),
    Bad("solver-name", lambda: influence(solver="cg"), errors.ArgumentError, r"Influence: expected solver to be one of .*got 'cg'"),
    Bad("budget-text", lambda: influence(memory_budget="1GB"), errors.ArgumentError, r"Influence: expected memory_budget .*got '1GB'"),
    Bad("targets-numpy", lambda: ggn(data=(X, Y.numpy())), errors.DTypeError, r"GGN: expected y in data to be a tensor, got ndarray"),
    Bad("loss-and-data-swapped", lambda: ggn(loss=(X, Y), data=MSE), errors.UnsupportedLossError, r"got tuple; use one of these"),
    Bad("top-of-no-row", lambda: influence().scores(BASE.data).top(2, test=None), errors.ArgumentError, r"Scores\.top: .*got None"),
    Bad("curvature-name", lambda: influence(curvature="fisherman"), errors.ArgumentError, r"curvature.*ggn.*fisherman"),
    Bad("pbrf-remove", lambda: ie.pbrf(BASE.model, MSE, BASE.data, remove=[7], damping=0.1), errors.ArgumentError,
        r"from 0 to 4, got 7"),
    Bad("pbrf-damping", lambda: ie.pbrf(BASE.model, MSE, BASE.data, remove=[1], damping=0.0), errors.ArgumentError,
        r"damping"),
    Bad("pbrf-rtol", lambda: pbrf(rtol=1.0), errors.ArgumentError, r"pbrf: expected rtol .* between 0 and 1, got 1\.0; .* is 1 where"),
    Bad("pbrf-rtol-text", lambda: pbrf(rtol="tight"), errors.ArgumentError, r"expected rtol .* got 'tight'"),
    Bad("pbrf-steps", lambda: pbrf(max_steps=0), errors.ArgumentError, r"expected max_steps to be a whole number of at least 1, got 0"),
    Bad("pbrf-epsilon", lambda: pbrf(epsilon=float("nan")), errors.ArgumentError, r"expected epsilon .* got nan; leave it out"),
    Bad("pbrf-remove-twice", lambda: ie.linearized_pbrf(BASE.model, MSE, BASE.data, remove=[1, 1], damping=0.1),
        errors.ArgumentError, r"got 1 twice"),
)  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
def test_bad_input(row: Bad) -> None:
    with pytest.raises(row.error, match=row.says) as caught:
        row.call()
    message = str(caught.value)
    assert isinstance(caught.value, errors.InfluenceExtError)
    assert re.match(r"^[\w.]+(\([^)]*\))?: expected ", message), f"not of the form 'who: expected ...': {message}"
    assert ", got " in message


class Fragile(nn.Module):
    """A network whose forward pass raises on demand, after drawing random numbers and touching its own mode."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(3, 4, 2)
        self.error: type[BaseException] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Misbehave, then compute."""
        if self.error is not None:
            torch.rand(3)
            np.random.rand(3)  # noqa: NPY002 - the global state is what could be disturbed
            raise self.error("on demand")
        return self.net(x)


def fragile(error: type[BaseException] | None = None) -> Fragile:
    """In training mode, with gradients, one frozen parameter and a mode that differs below."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = Fragile().to(F64).train()
    model.net[2].eval()
    model.net[0].bias.requires_grad_(False)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.full_like(parameter, 0.25)
    model.error = error
    return model


def state(model: nn.Module, *tensors: Tensor) -> list[Any]:
    """Everything a call could disturb, as values to compare."""
    found: list[Any] = [torch.get_rng_state().tolist(), random.getstate()]
    found.append(np.random.get_state()[1].tolist())  # noqa: NPY002 - the global state is meant
    found += [torch.is_grad_enabled(), torch.get_num_threads(), torch.get_default_dtype()]
    for name, module in model.named_modules():
        found.append((name, module.training, sorted(module.__dict__), len(module._forward_hooks)))
    for name, parameter in model.named_parameters():
        grad = None if parameter.grad is None else (id(parameter.grad), parameter.grad.tolist())
        found.append((name, id(parameter), parameter.tolist(), parameter.requires_grad, parameter._version, grad))
    found += [(tensor.tolist(), tensor._version, tensor.requires_grad) for tensor in tensors]
    return found


def data() -> tuple[Tensor, Tensor]:
    """Five examples."""
    rng = generator("state")
    return torch.randn(5, 3, generator=rng, dtype=F64), torch.randn(5, 2, generator=rng, dtype=F64)


CALLS: dict[str, Callable[[nn.Module, tuple[Tensor, Tensor]], Any]] = {
    "GGN": lambda model, data: ie.GGN(model, MSE, data, damping=0.1).to_dense(),
    "jvp": lambda model, data: ie.jvp(model, data[0], vector(sum_trainable(model))),
    "vjp": lambda model, data: ie.vjp(model, data[0], data[1]),
    "per_example_grads": lambda model, data: ie.per_example_grads(model, MSE, data),
    "per_example_norms": lambda model, data: ie.per_example_norms(model, MSE, data),
    "per_example_dots": lambda model, data: ie.per_example_dots(model, MSE, data, vector(sum_trainable(model))[None]),
    "grad_gram": lambda model, data: ie.grad_gram(model, MSE, data),
    "scores": lambda model, data: ie.Influence(model, MSE, data, damping=0.1).scores(data),
    "self_influence": lambda model, data: ie.Influence(model, MSE, data, damping=0.1).self_influence(),
    "parameter_change": lambda model, data: ie.Influence(model, MSE, data, damping=0.1).parameter_change([1]),
    "pbrf": lambda model, data: ie.pbrf(model, MSE, data, remove=[1], damping=0.5),
    "linearized_pbrf": lambda model, data: ie.linearized_pbrf(model, MSE, data, remove=[1], damping=0.5),
}
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())


def sum_trainable(model: nn.Module) -> int:
    """P."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


@every_call
def test_success_leaves_everything_as_found(call: Callable[..., Any]) -> None:
    model, (X, y) = fragile(), data()
    before = state(model, X, y)
    call(model, (X, y))
    call(model, (X, y))
    assert state(model, X, y) == before


@every_call
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_in_the_model_leaves_everything_as_found(call: Callable[..., Any], error: type[BaseException]) -> None:
    model, (X, y) = fragile(error), data()
    before = state(model, X, y)
    with pytest.raises((errors.UnsupportedModelError, error)) as caught:
        call(model, (X, y))
    if error is KeyboardInterrupt:
        assert isinstance(caught.value, KeyboardInterrupt)
    assert state(model, X, y) == before


@pytest.mark.parametrize("step", ["linearize", "jvp", "vjp", "ggn", "factors"])
@every_call
def test_ctrl_c_in_native_code_gets_through_and_leaves_the_model_as_found(
    call: Callable[..., Any], step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, (X, y) = fragile(), data()
    before = state(model, X, y)
    happened = []

    def interrupt(*_: Any, **__: Any) -> None:
        happened.append(step)
        raise KeyboardInterrupt

    monkeypatch.setattr(plan.Plan if step == "linearize" else plan.Tape, step, interrupt)
    try:
        call(model, (X, y))
        interrupted = False
    except KeyboardInterrupt:
        interrupted = True
    assert interrupted == bool(happened)
    assert interrupted or step != "linearize"
    assert state(model, X, y) == before


def test_tied_modules_stay_tied() -> None:
    network = build(NETWORKS["tied-layer"], F64)
    model = copy.deepcopy(network.model)
    before = state(model)
    ie.GGN(model, network.loss, network.data).to_dense()
    ie.per_example_grads(model, network.loss, network.data)
    assert state(model) == before
    assert model.alias is model.hidden


def test_modules_in_training_mode_are_used_in_evaluation_mode() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2)).to(F64).eval()
    v = torch.ones(26, dtype=F64)
    expected = ie.GGN(model, MSE, BASE.data) @ v
    model.train()
    assert torch.equal(ie.GGN(model, MSE, BASE.data) @ v, expected)
    assert all(module.training for module in model.modules())


def test_calls_work_under_no_grad_and_inference_mode() -> None:
    v = BASE.random("v", 71)
    expected = ggn() @ v
    with torch.no_grad():
        assert torch.equal(ggn() @ v, expected)
        assert not torch.is_grad_enabled()
    with torch.inference_mode():
        assert torch.equal(ggn() @ v, expected)


def test_results_do_not_carry_a_graph() -> None:
    X = BASE.X.clone().requires_grad_()
    y = BASE.y.clone().requires_grad_()
    product = ie.GGN(BASE.model, MSE, (X, y)) @ BASE.random("v", 71).requires_grad_()
    grads = ie.per_example_grads(BASE.model, MSE, (X, y))
    assert not product.requires_grad
    assert not any(g.requires_grad for g in grads.values())
    assert X.grad is None
    assert y.grad is None
