"""The adapters for backward passes in half precision and under autocast, against a loop over examples in float64."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from influence_ext.adapters.backpack import BatchGrad, backpack, extend
from influence_ext.adapters.opacus import GradSampleModule, register_grad_samplers
from influence_ext.testing import assert_close
from tests.cases.backward import WIDE, expected
from tests.test_adapter_opacus import samples

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")


@pytest.mark.parametrize(
    ("layer", "autocast"),
    [
        (nn.Linear(4, 3).bfloat16(), False),
        (nn.LayerNorm(4).bfloat16(), False),
        (nn.Conv1d(4, 3, 1).bfloat16(), False),
        (nn.Embedding(5, 4).bfloat16(), False),
        (nn.Linear(4, 3), True),
    ],
    ids=["Linear", "LayerNorm", "Conv1d", "Embedding", "autocast"],
)
def test_samplers_in_half_precision(layer: nn.Module, autocast: bool) -> None:
    opacus = pytest.importorskip("opacus.grad_sample")
    torch.manual_seed(0)
    x = torch.randint(5, (3, 2)) if isinstance(layer, nn.Embedding) else torch.randn(3, 4)
    x = x[:, :, None] if isinstance(layer, nn.Conv1d) else x
    x = x.bfloat16() if x.is_floating_point() and not autocast else x
    exact = copy.deepcopy(layer).double()
    with torch.no_grad():
        g = torch.randn(layer(x).shape).bfloat16()
    restore = register_grad_samplers()
    try:
        wrapped = opacus.GradSampleModule(layer)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = wrapped(x)
        assert output.dtype == torch.bfloat16
        output.backward(g)
    finally:
        restore()
    x = x.bfloat16().double() if x.is_floating_point() else x
    for n in range(3):
        # Opacus undoes the mean over the batch.
        grads = torch.autograd.grad(exact(x[n : n + 1]), list(exact.parameters()), 3 * g[n : n + 1].double())
        for p, like in zip(layer.parameters(), grads, strict=True):
            assert p.grad_sample.dtype == p.dtype
            assert torch.allclose(p.grad_sample[n].double(), like, rtol=0, atol=2e-2 * float(like.abs().max()))


def test_samples_have_the_dtype_of_their_parameters() -> None:
    """In half precision too; autocast of the caller changes nothing."""
    model, X, y = WIDE.problem()
    model, X = model.float(), X.float()
    wrapped = GradSampleModule(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = F.cross_entropy(wrapped(X), y)
    loss.backward()
    like = samples(wrapped)
    half = GradSampleModule(copy.deepcopy(model).bfloat16())
    F.cross_entropy(half(X.bfloat16()), y).backward()
    for name, rows in samples(half).items():
        assert (like[name].dtype, rows.dtype) == (torch.float32, torch.bfloat16)
        assert (rows - like[name]).norm() < 0.05 * like[name].norm()
    for name, rows in expected(WIDE, copy.deepcopy(model).double(), X.double(), y).items():
        assert_close(like[name], rows, scope="model")


def test_autocast_around_everything() -> None:
    """Layers before the wrapper compute in bfloat16, the wrapped network in float32; so does its backward pass."""
    model, X, y = WIDE.problem()
    model, X = model.float(), X.float()
    wrapped, plain = GradSampleModule(model), copy.deepcopy(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        arrives = (X @ torch.eye(X.shape[1])).requires_grad_()
        output = wrapped(arrives)
        loss = F.cross_entropy(output, y)
        loss.backward()
        empty = wrapped(arrives[:0])
    assert (arrives.dtype, output.dtype, empty.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    leaf = arrives.detach().float().requires_grad_()
    F.cross_entropy(plain(leaf), y).backward()
    assert arrives.grad.dtype == torch.bfloat16
    assert torch.equal(arrives.grad, leaf.grad.bfloat16())
    for name, rows in expected(WIDE, plain.double(), leaf.detach().double(), y).items():
        assert_close(samples(wrapped)[name], rows, scope="model")
    half = GradSampleModule(copy.deepcopy(model).bfloat16())
    assert half(arrives.detach()[:0]).dtype == half(arrives.detach()).dtype == torch.float32


def partly_frozen(dtype: torch.dtype) -> nn.Module:
    """With a frozen parameter and buffers, which are half precision too."""
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))
    model[1].eval().running_mean.normal_()
    model[3].bias.requires_grad_(False)
    return model.to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("adapter", ["opacus", "backpack", "graph"])
def test_inputs_of_half_precision_get_gradients(dtype: torch.dtype, adapter: str) -> None:
    """Rounded once: computed in float32, as the samples are."""
    torch.manual_seed(0)
    model = partly_frozen(dtype)
    exact = copy.deepcopy(model).double()
    x, y = torch.randn(6, 4, dtype=dtype, requires_grad=True), torch.arange(6) % 3
    wrapped = GradSampleModule(model) if adapter == "opacus" else extend(model)
    with backpack(BatchGrad()):
        F.cross_entropy(wrapped(x), y).backward(create_graph=adapter == "graph")
    leaf = x.detach().double().requires_grad_()
    F.cross_entropy(exact(leaf), y).backward()
    trained = [(p, like) for p, like in zip(model.parameters(), exact.parameters(), strict=True) if p.requires_grad]
    for p, like in [(x, leaf), *trained]:
        assert p.grad.dtype == dtype
        assert torch.allclose(p.grad.double(), like.grad, rtol=torch.finfo(dtype).eps, atol=1e-6)
    for n in range(6):
        loss = F.cross_entropy(exact(x[n : n + 1].detach().double()), y[n : n + 1])
        rows = torch.autograd.grad(loss, [like for _, like in trained])
        for (p, _), row in zip(trained, rows, strict=True):
            found = p.grad_sample[n] if adapter == "opacus" else 6 * p.grad_batch[n].double()  # a mean over the batch
            assert torch.allclose(found.double(), row, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_batches_with_and_without_examples_take_the_same_inputs(dtype: torch.dtype) -> None:
    wrapped = GradSampleModule(partly_frozen(dtype))
    for given in (torch.float32, dtype):
        for count in (6, 0):
            x = torch.randn(count, 4, dtype=given, requires_grad=True)
            output = wrapped(x)
            output.square().sum().backward()
            assert (output.dtype, x.grad.dtype, x.grad.shape) == (torch.float32, given, x.shape)
            assert {(rows.dtype, len(rows)) for rows in samples(wrapped).values()} == {(dtype, count)}
            wrapped.zero_grad()
