"""PBRF and its linearisation in chunks of examples. The oracle is the objective's gradient, written out in plain PyTorch."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import influence_ext as ie
from influence_ext import reference
from influence_ext.bregman.objective import Reference
from influence_ext.bregman.response import TrainedNetwork
from influence_ext.errors import ArgumentError
from influence_ext.testing import assert_close
from tests.cases import generator

N, REMOVED, DAMPING = 120, [3, 50, 119], 0.05


def problem(dtype: torch.dtype) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).to(dtype)
    X = torch.randn(N, 6, generator=generator("budget"), dtype=torch.float64).to(dtype)
    return model, X, X[:, :3].argmax(1)


def smallest_budget(model: nn.Module, X: Tensor, y: Tensor) -> int:
    """What the refusal says."""
    with pytest.raises(ArgumentError, match="expected memory_budget to hold at least one example, got 10 bytes") as refusal:
        ie.pbrf(model, nn.CrossEntropyLoss(), (X, y), REMOVED, DAMPING, memory_budget=10)
    found = re.search(r"weights take (\d+) and an example (\d+)", str(refusal.value))
    assert found is not None
    return int(found[1]) + 8 * int(found[2])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_in_chunks_of_a_few_examples(dtype: torch.dtype) -> None:
    model, X, y = problem(dtype)
    budget = smallest_budget(model, X, y)
    chunk = Reference(TrainedNetwork.of(model, nn.CrossEntropyLoss(), (X, y), who="test"), budget).exact.chunk
    assert chunk is not None
    assert 1 <= chunk <= 8
    response = ie.pbrf(model, nn.CrossEntropyLoss(), (X, y), REMOVED, DAMPING, memory_budget=budget)
    assert response.status.success
    exact = model.double()
    X = X.double()
    named = {name: p.detach() for name, p in exact.named_parameters()}
    at = {name: p.double().requires_grad_() for name, p in response.network.space.unflatten(response.exact_params).items()}
    z, z_s = functional_call(exact, at, X), exact(X).detach().requires_grad_()
    losses, slopes = F.cross_entropy(z, y, reduction="none"), torch.autograd.grad(F.cross_entropy(z_s, y, reduction="sum"), z_s)[0]
    objective = (losses - (slopes * (z - z_s.detach())).sum(1)).sum() / N - losses[REMOVED].sum() / N
    objective = objective + DAMPING / 2 * sum((at[name] - named[name]).square().sum() for name in named)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(objective, list(at.values()))])
    start = torch.autograd.grad(F.cross_entropy(exact(X)[REMOVED], y[REMOVED], reduction="sum") / N, list(exact.parameters()))
    assert float(gradient.norm()) < (1e-6 if dtype == torch.float64 else 1e-4) * 1.01 * float(
        torch.cat([g.flatten() for g in start]).norm()
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_linearised_response_in_chunks(dtype: torch.dtype) -> None:
    model, X, y = problem(dtype)
    budget = smallest_budget(model, X, y)
    found = ie.linearized_pbrf(model, nn.CrossEntropyLoss(), (X, y), REMOVED, DAMPING, memory_budget=budget)
    expected = reference.linearized_pbrf(model, F.cross_entropy, (X, y), REMOVED, DAMPING)
    assert found.status.success
    assert_close(found.exact_params if dtype == torch.float64 else found.params, expected)


def test_a_budget_that_is_none() -> None:
    model, X, y = problem(torch.float64)
    for call in (ie.pbrf, ie.linearized_pbrf):
        with pytest.raises(ArgumentError, match="expected memory_budget to be None or a finite number of bytes of at least 0, got '1 GiB'"):
            call(model, nn.CrossEntropyLoss(), (X, y), REMOVED, DAMPING, memory_budget="1 GiB")  # type: ignore[operator]
