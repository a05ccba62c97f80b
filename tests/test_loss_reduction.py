"""The denominator of a weighted mean, from the operators' side; and what losses without curvature are still good for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import influence_ext as ie
from influence_ext import reference
from influence_ext.testing import assert_close
from tests.cases import generator
from tests.cases.models import mlp

F64 = torch.float64
WEIGHT = torch.tensor([0.5, 2.0, 1.25, 1.0], dtype=F64)
PADDED = -100


class Tokens(nn.Module):
    """``[N, T, 3]`` to logits ``[N, 4, T]``."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(3, 5, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Classes on axis 1."""
        return self.net(x).transpose(1, 2)


def sequences() -> tuple[nn.Module, Tensor, Tensor]:
    """A network, seven sequences of three tokens, and labels of which a third is padding; the last sequence is all padding."""
    rng = generator("sequences")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Tokens().to(F64)
    X = torch.randn(7, 3, 3, generator=rng, dtype=F64)
    y = torch.randint(0, 4, (7, 3), generator=rng)
    y[torch.rand(7, 3, generator=rng) < 0.3] = PADDED
    y[6] = PADDED
    return model, X, y


def terms(z: Tensor, t: Tensor) -> Tensor:
    """The sum of the weighted terms."""
    return F.cross_entropy(z, t, weight=WEIGHT, reduction="sum")


def test_ggn_divides_by_the_weights_of_the_whole_data_set() -> None:
    model, X, y = sequences()
    loss = nn.CrossEntropyLoss(weight=WEIGHT)
    G = ie.GGN(model, loss, (X, y)).to_dense()
    total = float(WEIGHT[y[y != PADDED]].sum())
    assert_close(G, reference.ggn(model, terms, X, y, reduction=1 / total))
    batches = [(X[:4], y[:4]), (X[4:6], y[4:6]), (X[6:], y[6:])]  # the last one has no label at all
    assert_close(ie.GGN(model, loss, batches).to_dense(), G)
    assert_close(ie.GGN(model, nn.CrossEntropyLoss(weight=WEIGHT, reduction="sum"), (X, y)).to_dense(), total * G)


def test_gradients_with_their_factor_are_the_gradient_of_the_batch() -> None:
    model, X, y = sequences()
    loss = nn.CrossEntropyLoss(weight=WEIGHT)
    inf = ie.Influence(model, loss, (X, y), damping=0.1)
    grads = torch.cat([g.flatten(1) for g in ie.per_example_grads(model, loss, (X, y)).values()], dim=1)
    assert_close(inf.factor * grads.sum(dim=0), reference.batch_gradient(model, loss, X, y))
    assert torch.equal(grads[6], torch.zeros_like(grads[6]))


def test_influence_of_a_weighted_mean() -> None:
    model, X, y = sequences()
    inf = ie.Influence(model, nn.CrossEntropyLoss(weight=WEIGHT), (X, y), damping=0.1, solver=ie.solvers.Direct())
    total = float(WEIGHT[y[y != PADDED]].sum())
    expected = reference.parameter_change(model, terms, (X, y), [1, 3], 0.1, reduction=1 / total)
    assert_close(inf.parameter_change([1, 3]), expected)


def test_training_descends_the_weighted_mean_of_the_whole_data_set() -> None:
    """One full-batch step is a step along the gradient of the module itself."""
    _, X, y = sequences()
    recipe = ie.Recipe(lambda: Tokens().to(F64), nn.CrossEntropyLoss(weight=WEIGHT), lr=0.5, momentum=0.0, epochs=1, batch_size=7)
    run = ie.train(recipe, (X, y))
    start = reference.with_parameters(run.model, run.initial_params)
    step = reference.batch_gradient(start, nn.CrossEntropyLoss(weight=WEIGHT), X, y)
    assert_close(run.params - run.initial_params, -0.5 * step)


def test_exact_hessian_of_a_likelihood_of_log_probabilities() -> None:
    """The split after log_softmax has no Gauss-Newton matrix, but the cost has the Hessian of the cross-entropy."""
    rng = generator("likelihood")
    net = mlp(3, 4, 3).to(F64)
    X, y = torch.randn(6, 3, generator=rng, dtype=F64), torch.randint(0, 3, (6,), generator=rng)
    model = nn.Sequential(net, nn.LogSoftmax(dim=1))
    assert_close(ie.Hessian(model, nn.NLLLoss(), (X, y)).to_dense(), ie.Hessian(net, nn.CrossEntropyLoss(), (X, y)).to_dense())
    left, right = (ie.per_example_grads(m, loss, (X, y)) for m, loss in ((model, nn.NLLLoss()), (net, nn.CrossEntropyLoss())))
    for mine, theirs in zip(left.values(), right.values(), strict=True):
        assert_close(mine, theirs)


def test_a_callable_is_found_out_from_the_first_data_it_meets() -> None:
    rng = generator("callable")
    net = mlp(3, 4, 2).to(F64)
    X, y = torch.randn(6, 3, generator=rng, dtype=F64), torch.randn(6, 2, generator=rng, dtype=F64)
    for function, named in (
        (lambda z, t: (z - t).square().mean(), nn.MSELoss()),
        (lambda z, t: (z - t).square().sum(), nn.MSELoss(reduction="sum")),
    ):
        assert_close(ie.GGN(net, function, (X, y)).to_dense(), ie.GGN(net, named, (X, y)).to_dense())
        single = ie.GGN(net, function, (X[:1], y[:1])).to_dense()  # a mean and a sum are one and the same here
        assert_close(single, ie.GGN(net, named, (X[:1], y[:1])).to_dense())
    unstated = ie.losses.resolve(lambda z, t: (z - t).square().mean())
    with pytest.raises(ie.errors.ArgumentError, match="reduction='mean' or reduction='sum'"):
        unstated.factor(y)
