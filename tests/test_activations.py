"""Activations in float32 against float64: values keep their digits where they are small, derivatives theirs up to the scale of one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from influence_ext.plan import Plan


@pytest.mark.parametrize(
    ("activation", "oracle"),
    [
        pytest.param(nn.GELU(), lambda x: x * torch.special.log_ndtr(x).exp(), id="gelu"),
        pytest.param(nn.Softplus(), lambda x: torch.log1p(x.exp()), id="softplus"),
        pytest.param(nn.LogSigmoid(), lambda x: -torch.log1p((-x).exp()), id="log_sigmoid"),
        pytest.param(nn.Mish(), lambda x: x * torch.log1p(x.exp()).tanh(), id="mish"),
        pytest.param(nn.ELU(), lambda x: torch.where(x > 0, x, torch.expm1(x)), id="elu"),
    ],
)
def test_small_values_keep_their_digits(activation: nn.Module, oracle: Callable[[Tensor], Tensor]) -> None:
    near = torch.logspace(-6, 0, 61)
    x = torch.cat([torch.linspace(-12, 20, 641), near, -near])[:, None]
    model = nn.Sequential(nn.Linear(1, 1, bias=False), activation)
    nn.init.ones_(model[0].weight)
    expected = oracle(x.double())
    error = (Plan.of(model, x).linearize(x).outputs.double() - expected).abs()
    # x²/2 of the normal density, at most 72, is rounded before its exponential is taken.
    assert (error <= 80 * torch.finfo(torch.float32).eps * expected.abs()).all()


def gelu_tanh(x: Tensor) -> Tensor:
    """Without the cancellation of 1 + tanh."""
    return x * torch.sigmoid((8 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))


@pytest.mark.parametrize(
    ("activation", "oracle"),
    [
        pytest.param(nn.Tanh(), torch.tanh, id="tanh"),
        pytest.param(nn.Sigmoid(), torch.sigmoid, id="sigmoid"),
        pytest.param(nn.GELU(), lambda x: x * torch.special.ndtr(x), id="gelu"),
        pytest.param(nn.GELU(approximate="tanh"), gelu_tanh, id="gelu_tanh"),
        pytest.param(nn.SiLU(), lambda x: x * torch.sigmoid(x), id="silu"),
        pytest.param(nn.Mish(), lambda x: x * F.softplus(x).tanh(), id="mish"),
        pytest.param(nn.Softplus(), lambda x: torch.log1p(x.exp()), id="softplus"),
        pytest.param(nn.LogSigmoid(), F.logsigmoid, id="log_sigmoid"),
        pytest.param(nn.ELU(), F.elu, id="elu"),
    ],
)
def test_derivatives_are_within_a_few_units_of_one(activation: nn.Module, oracle: Callable[[Tensor], Tensor]) -> None:
    x = torch.linspace(-30, 19.9, 5003)
    model = nn.Sequential(nn.Linear(1, len(x)), activation)
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.copy_(x)
    tape = Plan.of(model, torch.zeros(1, 1)).linearize(torch.zeros(1, 1), second_order=True)
    tape.keep_cotangents(torch.ones(1, len(x)))
    along_bias = torch.cat([torch.zeros(len(x)), torch.ones(len(x))])[None]  # parameters: weight, bias
    exact = x.double().requires_grad_()
    (first,) = torch.autograd.grad(oracle(exact).sum(), exact, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), exact)
    limit = 4 * torch.finfo(torch.float32).eps
    assert (tape.jvp(along_bias)[0, 0].double() - first.detach()).abs().max() <= limit
    assert (tape.hvp(along_bias, None)[0, len(x) :].double() - second).abs().max() <= limit
