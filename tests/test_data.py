"""load: one batch or many become resident examples; unusable data is refused with the place named."""

from __future__ import annotations

import dataclasses
from collections import UserDict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, SubsetRandomSampler, TensorDataset, WeightedRandomSampler

from influence_ext.data import Examples, call_model, check_indices, load, load_inputs
from influence_ext.errors import ArgumentError, DataError, DeviceError, DTypeError, ShapeError

X = torch.arange(30.0, dtype=torch.float64).view(10, 3)
Z = torch.arange(20.0, dtype=torch.float64).view(10, 2)
Y = torch.arange(10)


class Batches:
    """Re-iterable, not a sequence."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter([(X[:4], Y[:4]), (X[4:5], Y[4:5]), (X[5:], Y[5:])])


class Stream(IterableDataset):  # type: ignore[type-arg]
    """Batches from an iterable data set."""

    def __iter__(self) -> Iterator[Any]:
        return iter(Batches())


@pytest.mark.parametrize(
    "data",
    [
        (X, Y),
        [X, Y],
        [(X, Y)],
        ((X[:5], Y[:5]), (X[5:], Y[5:])),
        [[X[:5], Y[:5]], [X[5:], Y[5:]]],
        [(X[:7], Y[:7]), (X[7:7], Y[7:7]), (X[7:], Y[7:])],
        Batches(),
        Stream(),
        DataLoader(TensorDataset(X, Y), batch_size=3),
        DataLoader(TensorDataset(X, Y), batch_size=10),
        DataLoader(Stream(), batch_size=None),
    ],
    ids=lambda d: type(d).__name__,
)
def test_every_form_of_tensor_data_gives_the_same_examples(data: Any) -> None:
    examples = load(data)
    assert torch.equal(examples.targets, Y)
    assert isinstance(examples.X, Tensor)
    assert torch.equal(examples.X, X)
    assert (examples.num_examples, examples.convention, examples.keys) == (10, "tensor", None)
    assert load(examples) is examples


@pytest.mark.parametrize("data", [((X, Z), Y), ([X, Z], Y), [(X, Z), Y], [([X[:4], Z[:4]], Y[:4]), ((X[4:], Z[4:]), Y[4:])]])
def test_tuples_of_inputs(data: Any) -> None:
    examples = load(data)
    assert examples.convention == "tuple"
    assert isinstance(examples.X, tuple)
    assert torch.equal(examples.X[0], X)
    assert torch.equal(examples.X[1], Z)


@pytest.mark.parametrize("kind", [dict, UserDict])
def test_dicts_of_inputs(kind: Callable[..., Any]) -> None:
    halves = [slice(0, 6), slice(6, 10)]
    examples = load([(kind({"z": Z[h], "x": X[h]}), Y[h]) for h in halves])
    assert (examples.convention, examples.keys) == ("dict", ("z", "x"))
    assert isinstance(examples.X, dict)
    assert list(examples.X) == ["z", "x"]
    assert torch.equal(examples.X["x"], X)
    assert torch.equal(examples.inputs[0], Z)


def test_a_single_batch_is_not_copied_and_gradients_are_cut() -> None:
    inputs = X.clone().requires_grad_()
    examples = load((inputs, Y))
    assert examples.inputs[0].data_ptr() == inputs.data_ptr()
    assert not examples.inputs[0].requires_grad
    assert inputs.requires_grad


def test_call_model_follows_the_structure() -> None:
    class Difference(nn.Module):
        def forward(self, a: Tensor, b: Tensor | None = None) -> Tensor:
            return a if b is None else a - 2 * b[:, :1]

    model = Difference()
    assert torch.equal(call_model(model, X), X)
    assert torch.equal(call_model(model, (X, Z)), X - 2 * Z[:, :1])
    assert torch.equal(call_model(model, {"b": Z, "a": X}), X - 2 * Z[:, :1])


def test_reading_a_loader_leaves_the_random_state() -> None:
    state = torch.get_rng_state()
    load(DataLoader(TensorDataset(X, Y), batch_size=3))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("indices", [[7, 0, 0], torch.tensor([7, 0, 0]), np.array([7, 0, 0]), range(3)], ids=lambda i: type(i).__name__)
def test_subset(indices: Any) -> None:
    picked = [int(i) for i in indices]
    for data in ((X, Y), ((X, Z), Y), ({"x": X, "z": Z}, Y)):
        part = load(data).subset(indices)
        assert torch.equal(part.targets, Y[picked])
        assert all(torch.equal(a, b[picked]) for a, b in zip(part.inputs, load(data).inputs, strict=True))
        assert type(part.X) is type(data[0])


def test_subset_of_nothing_and_beyond() -> None:
    assert load((X, Y)).subset([]).num_examples == 0
    with pytest.raises(ArgumentError, match="indices from 0 to 9, got 10"):
        load((X, Y)).subset([10])


def bad(value: float, *rows: int) -> Tensor:
    changed = X.clone()
    changed[list(rows), 1] = value
    return changed


@pytest.mark.parametrize(
    ("data", "error", "texts"),
    [
        ((b for b in [(X, Y)]), DataError, ["one-shot iterator generator", "list(data)"]),
        (iter([(X, Y)]), DataError, ["one-shot iterator list_iterator"]),
        (zip([X], [Y], strict=True), DataError, ["one-shot iterator zip"]),
        (DataLoader(TensorDataset(X, Y), shuffle=True), DataError, ["RandomSampler", "shuffle=False"]),
        (DataLoader(TensorDataset(X, Y), sampler=SubsetRandomSampler([1, 2])), DataError, ["SubsetRandomSampler"]),
        (DataLoader(TensorDataset(X, Y), sampler=WeightedRandomSampler([1.0], 3)), DataError, ["WeightedRandomSampler"]),
        (TensorDataset(X, Y), DataError, ["data set TensorDataset, which yields single examples", "DataLoader"]),
        (X, DataError, ["got Tensor"]),
        ({"x": X}, DataError, ["got dict"]),
        (None, DataError, ["got NoneType"]),
        ("data", DataError, ["got str"]),
        ([], DataError, ["at least one example"]),
        ((X[:0], Y[:0]), DataError, ["at least one example"]),
        ([(X[:0], Y[:0])], DataError, ["at least one example"]),
        ([X, X, X], DataError, ["batch 0 to be a tuple (X, y), got Tensor"]),
        ([(X, Y), (X, Y, Z)], DataError, ["batch 1", "got tuple of 3"]),
        ([(X, Y), (X,)], DataError, ["batch 1", "tuple of 1"]),
        ((bad(torch.nan, 6, 3), Y), DataError, ["finite inputs", "in X of example 3 (2 of 10 examples)"]),
        (((X, bad(torch.inf, 9)), Y), DataError, ["in X[1] of example 9 (1 of"]),
        (({"a": X, "b": bad(-torch.inf, 0)}, Y), DataError, ["in X['b'] of example 0"]),
        ((X, bad(torch.nan, 5)), DataError, ["finite targets", "in y of example 5"]),
        ([(X[:4], Y[:4]), (bad(torch.nan, 5)[4:], Y[4:])], DataError, ["in X of example 5"]),
        ((X, Y[:9]), ShapeError, ["same number of examples in all tensors of data, got X 10, y 9"]),
        ([((X, Z[:3]), Y)], ShapeError, ["batch 0, got X[0] 10, X[1] 3, y 10"]),
        ((X, torch.tensor(1)), ShapeError, ["y in data with the examples on its first axis, got a scalar"]),
        ((torch.tensor(1.0), Y), ShapeError, ["X in data"]),
        ([(X, Y), (X[:, :2], Y)], ShapeError, ["X of shape [n, 3] in all batches, got [10, 2] in batch 1"]),
        ([(X, Y), (X, Y[:, None])], ShapeError, ["y of shape [n] in all batches, got [10, 1] in batch 1"]),
        ([(X, Y), (X.float(), Y)], DTypeError, ["X of dtype torch.float64 in all batches, got torch.float32 in batch 1"]),
        ([(X, Y), (X, Y.float())], DTypeError, ["y of dtype torch.int64"]),
        ([(X, Y), (X.to("meta"), Y)], DeviceError, ["all data on cpu, got X in batch 1 on meta"]),
        ([(X, Y), ((X,), Y)], DataError, ["a tuple of 1 in batch 1 after a tensor in batch 0"]),
        ([({"a": X}, Y), ({"b": X}, Y)], DataError, ["a dict with b in batch 1 after a dict with a"]),
        ([(X.numpy(), Y)], DTypeError, ["X in batch 0 to be a tensor, a tuple of tensors or a dict", "ndarray", "torch.as_tensor"]),
        ([(X, Y.numpy())], DTypeError, ["y in batch 0 to be a tensor, got ndarray"]),
        ([((X, 3), Y)], DTypeError, ["X[1] in batch 0 to be a tensor, got int"]),
        ([({1: X}, Y)], DTypeError, ["names as keys of X"]),
        (((), Y), DataError, ["at least one input tensor in data, got an empty tuple"]),
        ((X.to(torch.complex128), Y), DTypeError, ["X in data to be a dense real tensor, got torch.complex128"]),
        ((X.to_sparse(), Y), DTypeError, ["torch.sparse_coo"]),
    ],
)
def test_unusable_data_is_refused_with_the_place_named(data: Any, error: type[Exception], texts: list[str]) -> None:
    with pytest.raises(error) as caught:
        load(data, who="GGN")
    assert str(caught.value).startswith("GGN: expected ")
    for text in texts:
        assert text in str(caught.value)


def test_a_shuffling_distributed_sampler_is_refused() -> None:
    from torch.utils.data.distributed import DistributedSampler

    dataset = TensorDataset(X, Y)
    for shuffle in (True, False):
        loader = DataLoader(dataset, sampler=DistributedSampler(dataset, 1, 0, shuffle=shuffle), batch_size=4)
        if shuffle:
            with pytest.raises(DataError, match="DistributedSampler"):
                load(loader)
        else:
            assert torch.equal(load(loader).targets, Y)


@pytest.mark.parametrize("inputs", [X, (X, Z), [X, Z], {"a": X, "b": Z}], ids=["tensor", "tuple", "list", "dict"])
def test_inputs_without_targets(inputs: Any) -> None:
    loaded = load_inputs(inputs, "jvp")
    assert type(loaded) is (tuple if isinstance(inputs, list) else type(inputs))
    given = inputs.values() if isinstance(inputs, dict) else inputs
    found = loaded.values() if isinstance(loaded, dict) else loaded
    assert all(torch.equal(a, b) for a, b in zip(given, found, strict=True))


@pytest.mark.parametrize(
    ("inputs", "error", "text"),
    [
        (X.numpy(), DTypeError, "X in the inputs"),
        (X[:0], DataError, "at least one example"),
        (bad(torch.nan, 2), DataError, "in X of example 2"),
        ((X, Z[:4]), ShapeError, r"got X\[0\] 10, X\[1\] 4; align"),
        ((X, Z.to("meta")), DeviceError, r"got X\[1\] in the inputs on meta"),
        ((), DataError, "an empty tuple"),
    ],
)
def test_unusable_inputs_without_targets(inputs: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        load_inputs(inputs, "jvp")


@pytest.mark.parametrize("indices", [[3, 1], (3, 1), torch.tensor([3, 1]), np.array([3, 1]), [np.int64(3), torch.tensor(1)]])
def test_indices_become_a_list_of_ints(indices: Any) -> None:
    checked = check_indices(indices, 5, "pbrf")
    assert checked == [3, 1]
    assert all(type(i) is int for i in checked)


@pytest.mark.parametrize(
    ("indices", "text"),
    [
        ([0, 5], "indices from 0 to 4, got 5"),
        ([-1], "got -1"),
        ([1, 2, 1], "every index once, got 1 twice"),
        ([1.0], "integers, got 1.0"),
        (torch.tensor([True, False]), "integers, got True; turn a mask into indices"),
        (3, "a list of example indices, got 3; put a single index into a list"),
        ("3", "a list of example indices, got '3'"),
        (torch.zeros(2, 2, dtype=torch.long), "shape .2, 2."),
        (None, "got None"),
    ],
)
def test_bad_indices_are_named(indices: Any, text: str) -> None:
    with pytest.raises(ArgumentError, match=text) as caught:
        check_indices(indices, 5, "pbrf")
    assert str(caught.value).startswith("pbrf: expected ")


def test_examples_are_frozen() -> None:
    with pytest.raises(AttributeError):
        load((X, Y)).targets = Y  # type: ignore[misc]
    assert isinstance(load((X, Y)), Examples)


@dataclasses.dataclass
class Pair:
    """A batch as many data pipelines make it."""

    left: Tensor
    right: Tensor


def test_a_dataclass_counts_as_a_dict() -> None:
    batches = [(Pair(torch.ones(2, 3), torch.zeros(2)), torch.zeros(2)), (Pair(torch.ones(1, 3), torch.zeros(1)), torch.zeros(1))]
    examples = load(batches, "test")
    assert examples.keys == ("left", "right")
    assert [x.shape for x in examples.inputs] == [(3, 3), (3,)]
    assert isinstance(examples.X, dict)
