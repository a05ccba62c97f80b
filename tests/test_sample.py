"""Random batches of the GGN, and LiSSA on them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import influence_ext as ie
from influence_ext.errors import ArgumentError

F64 = torch.float64


def problem(reduction: str) -> tuple[nn.Module, nn.Module, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=generator, dtype=F64) / 2
    X = torch.randn(24, 5, generator=generator, dtype=F64)
    return model, nn.CrossEntropyLoss(reduction=reduction), X, torch.arange(24) % 3


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_batches_that_make_up_the_data_average_to_the_whole(reduction: str) -> None:
    model, loss, X, y = problem(reduction)
    G = ie.GGN(model, loss, (X, y), damping=0.1)
    whole = G.to_dense()
    # All batches of one example: the average over the data is the operator itself, whatever the reduction.
    generator = torch.Generator().manual_seed(0)
    seen: dict[int, torch.Tensor] = {}
    while len(seen) < 24:
        state = generator.get_state()
        index = int(torch.randperm(24, generator=generator)[0])
        generator.set_state(state)
        seen[index] = G.sample(generator, 1).to_dense()
    average = torch.stack(list(seen.values())).mean(dim=0)
    assert torch.allclose(average, whole, rtol=1e-12, atol=1e-14)


def test_a_batch_of_everything_is_the_operator() -> None:
    model, loss, X, y = problem("mean")
    G = ie.GGN(model, loss, (X, y), damping=0.1)
    assert torch.allclose(G.sample(torch.Generator().manual_seed(1), 24).to_dense(), G.to_dense(), rtol=1e-12, atol=1e-14)


def test_lissa_on_batches_repeats_and_approaches_the_solution() -> None:
    model, loss, X, y = problem("mean")
    G = ie.GGN(model, loss, (X, y), damping=0.5)
    b = torch.ones(1, G.shape[0], dtype=F64)
    solver = ie.solvers.LiSSA(num_steps=200, num_repeats=8, batch_size=12, seed=4)
    first, again = solver.solve(G, b), solver.solve(G, b)
    exact = torch.linalg.solve(G.to_dense(), b[0])
    assert torch.equal(first.value, again.value)
    assert float((first.value[0] - exact).norm() / exact.norm()) < 0.1


@pytest.mark.parametrize("size", [0, 25])
def test_a_batch_must_fit_the_data(size: int) -> None:
    model, loss, X, y = problem("mean")
    with pytest.raises(ArgumentError, match=rf"GGN.sample: expected batch_size in \[1, 24\], got {size}"):
        ie.GGN(model, loss, (X, y)).sample(torch.Generator(), size)
