"""Values of activations in float32 keep their digits where they are small: relative errors against float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
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
