"""The curvlinops adapter: data in mappings and of several shapes, and copies of operators."""

from __future__ import annotations

import copy
import pickle
from collections import UserDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from influence_ext.adapters import curvlinops as adapter
from influence_ext.errors import DataError
from influence_ext.testing import assert_close
from tests.test_adapter_curvlinops import batches, both, names, network, random


class Fields(nn.Module):
    """Takes a mapping as its one argument."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, fields: Any) -> Tensor:
        return self.net(fields["x"]) * fields["scale"]


@names
@pytest.mark.parametrize("kinds", [(dict, UserDict), (UserDict, dict)])
def test_mappings_as_input(name: str, kinds: tuple[type, type]) -> None:
    model, loss = Fields(), nn.CrossEntropyLoss()
    data = [(kind({"x": X, "scale": X[:, :1].exp()}), y) for kind, (X, y) in zip(kinds, batches(loss, (3, 5)), strict=True)]
    ours, theirs = both(name, model, loss, list(model.parameters()), data, batch_size_fn=lambda X: len(X["x"]))
    V = random(ours.shape[0], 2)
    assert_close(ours @ V, theirs @ V)
    with pytest.raises(ValueError, match="batch_size_fn"):
        getattr(adapter, name)(model, loss, list(model.parameters()), data)


class Pooled(nn.Module):
    """Takes sequences of any length, padded to the longest of their batch, in a mapping."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(9, 4).double(), nn.Linear(4, 3).double()

    def forward(self, fields: Any) -> Tensor:
        mask = fields["attention_mask"][..., None]
        return self.head((self.embedding(fields["input_ids"]).tanh() * mask).sum(dim=1) / mask.sum(dim=1))


@names
def test_lengths_may_differ_between_batches(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    data = []
    for n, T in ((3, 4), (2, 6), (4, 4)):
        mask = (torch.arange(T) < torch.randint(1, T + 1, (n, 1), generator=generator)).double()
        ids = torch.randint(9, (n, T), generator=generator)
        data.append(({"input_ids": ids, "attention_mask": mask}, torch.randint(3, (n,), generator=generator)))
    model, loss = Pooled(), nn.CrossEntropyLoss()
    params = [model.head.weight, model.embedding.weight]
    ours, theirs = both(name, model.train(), loss, params, data, batch_size_fn=lambda fields: len(fields["input_ids"]))
    V = random(ours.shape[0], 2)
    assert_close(ours @ V, theirs @ V)
    (gradient, value), (their_gradient, their_value) = ours.gradient_and_loss(), theirs.gradient_and_loss()
    assert_close(value, their_value)
    for g, h in zip(gradient, their_gradient, strict=True):
        assert_close(g, h)
    model.embedding.weight.data.mul_(2)
    assert_close(ours @ V, theirs @ V)


@names
def test_empty_batches(name: str) -> None:
    """They add nothing to a sum, wherever they stand, and have no mean."""
    model, loss = network(), nn.MSELoss(reduction="sum")
    data = batches(loss, (0, 3, 0, 2))
    ours, theirs = both(name, model, loss, list(model.parameters()), data)
    V = random(ours.shape[0], 2)
    assert_close(ours @ V, theirs @ V)
    assert_close(ours.gradient_and_loss()[1], theirs.gradient_and_loss()[1])
    for reduction, wrong, text in (
        ("mean", data, "at least one example with reduction='mean', got y of shape"),
        ("sum", data[:1], "got empty data"),
    ):
        with pytest.raises(DataError, match=text):
            getattr(adapter, name)(model, nn.MSELoss(reduction=reduction), list(model.parameters()), wrong)


@names
def test_a_copy_is_an_operator_of_its_own(name: str) -> None:
    model, loss = network(), nn.CrossEntropyLoss()
    ours = getattr(adapter, name)(model, loss, list(model.parameters()), batches(loss))
    V = random(ours.shape[0], 2)
    like = ours @ V
    copies = copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))
    model[0].weight.data.zero_()
    assert all(torch.equal(other @ V, like) for other in copies)
    assert not torch.equal(ours @ V, like)
