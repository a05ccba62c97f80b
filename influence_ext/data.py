"""User data -> tensors: one ``(X, y)`` or a re-iterable of such batches becomes resident ``Examples``."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torch.utils.data.distributed import DistributedSampler
from torch.utils.data.sampler import RandomSampler, SubsetRandomSampler, WeightedRandomSampler

from influence_ext.checks import check_budget, is_answer, is_iterable
from influence_ext.errors import ArgumentError, DataError, DeviceError, DTypeError, ShapeError
from influence_ext.finite import all_finite

Convention = Literal["tensor", "tuple", "dict"]
ModelInput = Tensor | tuple[Tensor, ...] | dict[str, Tensor]
_SHUFFLING = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


@dataclass(frozen=True, eq=False)
class Examples:
    """A data set in memory; example n is row n of every tensor.

    Attributes:
        inputs: the model's input tensors, each ``[N, ...]``.
        targets: ``[N, ...]``.
        keys: names of the inputs when X is a dict, else None.
        convention: how the model is called: ``"tensor"`` is ``model(X)``, ``"tuple"`` is ``model(*X)``, ``"dict"`` is
            ``model(**X)``.
    """

    inputs: tuple[Tensor, ...]
    targets: Tensor
    convention: Convention
    keys: tuple[str, ...] | None = None

    @property
    def X(self) -> ModelInput:
        """The inputs as the model takes them: a tensor, a tuple or a dict."""
        if self.keys is not None:
            return dict(zip(self.keys, self.inputs, strict=True))
        return self.inputs[0] if self.convention == "tensor" else self.inputs

    @property
    def num_examples(self) -> int:
        """N."""
        return int(self.targets.shape[0])

    @property
    def resident(self) -> bool:
        """Whether the inputs are in memory."""
        return True

    @property
    def most_at_once(self) -> int:
        """Examples of the largest block that :meth:`blocks` can give."""
        return self.num_examples

    def blocks(self, size: int) -> Iterator[tuple[int, ModelInput]]:
        """``(first example, X)`` of consecutive blocks of at most ``size`` examples."""
        for start in range(0, self.num_examples, size):
            yield start, self._rows(start, start + size)

    @classmethod
    def of_inputs(cls, X: ModelInput) -> Examples:
        """Inputs alone; the first of them stands in for the targets."""
        if isinstance(X, Tensor):
            return cls((X,), X, "tensor")
        if isinstance(X, Mapping):
            return cls(tuple(X.values()), next(iter(X.values())), "dict", tuple(X))
        return cls(tuple(X), X[0], "tuple")

    def _rows(self, start: int, stop: int) -> ModelInput:
        return Examples(tuple(x[start:stop] for x in self.inputs), self.targets[start:stop], self.convention, self.keys).X

    def subset(self, indices: Iterable[int] | Tensor, who: str = "Examples.subset") -> Examples:
        """The examples at ``indices``, in that order, copied; an index may occur more than once.

        Raises:
            ArgumentError: an index is out of range or not an integer.
        """
        checked = _to_indices(indices, self.num_examples, who)
        index = torch.tensor(checked, dtype=torch.long, device=self.targets.device)
        return Examples(
            tuple(x.index_select(0, index) for x in self.inputs),
            self.targets.index_select(0, index),
            self.convention,
            self.keys,
        )


@dataclass(frozen=True, eq=False)
class StreamedExamples(Examples):
    """A data set that is read again in every pass: targets in memory, inputs batch by batch.

    ``inputs`` are those of the first batch that has examples, for their shapes.

    Attributes:
        batches: the user's re-iterable of ``(X, y)``.
        memory_budget: bytes.
        largest_batch: examples.
    """

    batches: Iterable[Any] = ()
    memory_budget: int = 0
    largest_batch: int = 0

    @property
    def resident(self) -> bool:
        """Whether the inputs are in memory."""
        return False

    @property
    def most_at_once(self) -> int:
        """Examples of the largest batch."""
        return self.largest_batch

    def blocks(self, size: int) -> Iterator[tuple[int, ModelInput]]:
        """``(first example, X)`` of consecutive blocks of at most ``size`` examples, none across two batches."""
        start = 0
        with _random_state_kept():
            for k, batch in enumerate(self.batches):
                parsed = _parse(batch, f"batch {k}", "StreamedExamples")
                examples = Examples(parsed.inputs, parsed.targets, parsed.convention, parsed.keys)
                for first, X in examples.blocks(size):
                    yield start + first, X
                start += examples.num_examples
        if start != self.num_examples:
            raise DataError(
                f"StreamedExamples: expected the same {self.num_examples} examples in every pass over the data, got {start}; give data in "
                "a fixed order and number."
            )

    def subset(self, indices: Iterable[int] | Tensor, who: str = "Examples.subset") -> Examples:
        """The examples at ``indices`` in memory. Cost: one pass over the data."""
        checked = _to_indices(indices, self.num_examples, who)
        places = {index: place for place, index in enumerate(dict.fromkeys(checked))}
        rows: dict[int, tuple[Tensor, ...]] = {}
        for start, X in self.blocks(256):
            block = Examples.of_inputs(X)
            for offset in range(block.num_examples):
                if start + offset in places:
                    rows[start + offset] = tuple(x[offset].clone() for x in block.inputs)
        inputs = tuple(torch.stack([rows[index][k] for index in checked]) for k in range(len(self.inputs)))
        return Examples(inputs, self.targets[torch.tensor(checked, dtype=torch.long)], self.convention, self.keys)


def call_model(model: nn.Module, X: ModelInput) -> Any:
    """``model(X)``, ``model(*X)`` or ``model(**X)`` for a tensor, a tuple or a dict."""
    args, kwargs = call_arguments(X)
    return model(*args, **kwargs)


def call_arguments(X: ModelInput) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Positional and named arguments for a tensor, a tuple or a dict."""
    if isinstance(X, Mapping):
        return (), dict(X)
    return ((X,) if isinstance(X, Tensor) else tuple(X)), {}


def load_inputs(X: Any, who: str = "load_inputs") -> ModelInput:
    """Check the inputs of N examples and return them as the model takes them: a tensor, a tuple or a dict, detached.

    Args:
        X: a tensor, a tuple or list of tensors, or a dict of tensors; the first axis counts examples.
        who: the caller's name for messages.

    Raises:
        DataError: no examples, or NaN or an infinity (the message names the first example).
        ShapeError, DTypeError, DeviceError: see :func:`load`.
    """
    examples = _concatenate([_parse_inputs(X, None, "the inputs", who)], who)
    _check_finite(examples, who)
    return examples.X


def load(data: Any, who: str = "load", memory_budget: int | None = None) -> Examples:
    """Read a data set once and keep it in memory.

    Args:
        data: one ``(X, y)``, or a re-iterable of such batches (a list, a ``DataLoader`` without shuffling), also of
            unequal size. ``X`` is a tensor, a tuple or list of tensors, a dict of tensors (or another mapping), or a
            dataclass with tensors in its fields, which is taken as a dict; the first axis counts examples. A list ``[X, y]``
            whose second element is a tensor is one batch.
        who: the caller's name for messages.
        memory_budget: bytes; batches that take more than half of it together are not kept but read again when they are needed.

    Returns:
        ``Examples`` with the batches concatenated, or ``StreamedExamples``. A single batch is not copied. The random state is
        left as found.

    Raises:
        DataError: no examples, an iterator that can be read only once, a shuffling loader, an element that is not ``(X,
            y)``, or NaN or an infinity (the message names the first example).
        ArgumentError: a ``memory_budget`` that is no number of bytes.
        ShapeError: numbers of examples or shapes that do not fit together.
        DTypeError: an element that is not a dense real tensor, or batches of different dtypes.
        DeviceError: tensors on several devices.

    Cost: one pass over the data, and a copy of it if it comes in batches.
    """
    memory_budget = check_budget(memory_budget, who)
    if isinstance(data, Examples):
        return data
    # Batches are pairs; a pair whose first is none is one (X, y), whatever y is.
    if isinstance(data, (tuple, list)) and len(data) == 2 and (isinstance(data[1], Tensor) or not isinstance(data[0], (tuple, list))):
        batches = [_parse(data, "data", who)]
    else:
        _check_iterable(data, who)
        if memory_budget is not None:
            return _load_within(data, who, memory_budget)
        with _random_state_kept():
            batches = [_parse(batch, f"batch {k}", who) for k, batch in enumerate(data)]
    examples = _concatenate(batches, who)
    _check_finite(examples, who)
    return examples


def _load_within(data: Iterable[Any], who: str, memory_budget: int) -> Examples:
    """All batches, or where they exceed the budget their targets and the first batch that has examples."""
    batches: list[_Batch] = []
    total, shown = 0, None
    streaming = False
    with _random_state_kept():
        for k, batch in enumerate(data):
            parsed = _parse(batch, f"batch {k}", who)
            _check_finite(Examples(parsed.inputs, parsed.targets, parsed.convention, parsed.keys), who)
            total += sum(x.nbytes for x in parsed.inputs)
            if not streaming and total > memory_budget // 2:
                streaming, batches = True, [b.without_inputs() for b in batches]
            batches.append(parsed.without_inputs() if streaming else parsed)
            if shown is None or not shown.inputs[0].shape[0]:
                shown = parsed  # the first that has examples
    if not streaming or shown is None:
        return _concatenate(batches, who)
    _concatenate([b.without_inputs() for b in batches], who)  # raises if they differ in structure
    targets = torch.cat([b.targets for b in batches])
    largest = max(len(b.targets) for b in batches)
    return StreamedExamples(shown.inputs, targets, shown.convention, shown.keys, data, memory_budget, largest)


def check_indices(indices: Iterable[int] | Tensor, num_examples: int, who: str) -> list[int]:
    """Indices of training examples as a list of ints, each in range and none twice.

    Raises:
        ArgumentError: an index is not an integer, out of range or repeated; the message names it.
    """
    checked = _to_indices(indices, num_examples, who)
    seen: set[int] = set()
    for index in checked:
        if index in seen:
            raise ArgumentError(f"{who}: expected every index once, got {index} twice; remove the repetition.")
        seen.add(index)
    return checked


def _to_indices(indices: Any, num_examples: int, who: str) -> list[int]:
    if isinstance(indices, (str, bytes)) or not is_iterable(indices):
        raise ArgumentError(f"{who}: expected a list of example indices, got {indices!r}; put a single index into a list.")
    if isinstance(indices, Tensor):
        if indices.dim() != 1 or indices.is_meta or indices.layout != torch.strided:
            found = f"{indices.layout} of shape {list(indices.shape)} on {indices.device}"
            raise ArgumentError(f"{who}: expected a list of example indices, got a tensor ({found}); pass a dense one-dimensional one.")
        indices = indices.tolist()
    checked: list[int] = []
    for index in indices:
        try:
            is_mask = is_answer(index) or (isinstance(index, Tensor) and index.dtype == torch.bool)
            value = None if is_mask else operator.index(index)
        except TypeError:
            value = None
        if value is None:
            shown = f"{type(index).__name__} of shape {list(index.shape)}" if hasattr(index, "shape") else repr(index)
            raise ArgumentError(
                f"{who}: expected example indices as integers, got {shown}; turn a mask into indices with mask.nonzero()[:, 0]."
            )
        if not 0 <= value < num_examples:
            raise ArgumentError(f"{who}: expected example indices from 0 to {num_examples - 1}, got {value}; correct or drop it.")
        checked.append(value)
    return checked


@dataclass(frozen=True, eq=False)
class _Batch:
    label: str
    inputs: tuple[Tensor, ...]
    targets: Tensor
    convention: Convention
    keys: tuple[str, ...] | None

    def without_inputs(self) -> _Batch:
        return replace(self, inputs=tuple(x[:0].clone() for x in self.inputs))

    def named(self) -> list[tuple[str, Tensor]]:
        return [
            *zip(_input_names(self.convention, len(self.inputs), self.keys), self.inputs, strict=True),
            ("y", self.targets),
        ]


def _input_names(convention: Convention, count: int, keys: tuple[str, ...] | None) -> list[str]:
    if keys is not None:
        return [f"X[{key!r}]" for key in keys]
    return ["X"] if convention == "tensor" else [f"X[{i}]" for i in range(count)]


def _check_iterable(data: Any, who: str) -> None:
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        raise DataError(
            f"{who}: expected (X, y) or batches (X, y), got the data set {type(data).__name__}, which yields single examples; wrap it in "
            "torch.utils.data.DataLoader(dataset, batch_size=256)."
        )
    if isinstance(data, (Tensor, Mapping, str, bytes)) or not is_iterable(data):
        raise DataError(f"{who}: expected one tuple (X, y) or a re-iterable of such tuples, got {type(data).__name__}; pass (X, y).")
    if isinstance(data, DataLoader):
        samplers = (data.sampler, getattr(data.batch_sampler, "sampler", None))
        for sampler in samplers:
            if isinstance(sampler, _SHUFFLING) or (isinstance(sampler, DistributedSampler) and sampler.shuffle):
                raise DataError(
                    f"{who}: expected data in a fixed order, since the order identifies the examples, got a DataLoader with "
                    f"{type(sampler).__name__}; build it with shuffle=False."
                )
    elif iter(data) is data:
        raise DataError(
            f"{who}: expected data that can be read more than once, got the one-shot iterator {type(data).__name__}; pass list(data) or "
            "the object it iterates over."
        )


def _parse(batch: Any, label: str, who: str) -> _Batch:
    """One ``(X, y)``, checked on its own."""
    if not (isinstance(batch, (tuple, list)) and len(batch) == 2):
        found = type(batch).__name__ + (f" of {len(batch)}" if isinstance(batch, Sequence) else "")
        raise DataError(f"{who}: expected {label} to be a tuple (X, y), got {found}; pair every input with its target.")
    X, y = batch
    _check_tensor(y, "y", label, who)
    return _parse_inputs(X, y, label, who)


def _parse_inputs(X: Any, y: Tensor | None, label: str, who: str) -> _Batch:
    """The inputs with their targets; without targets the first input stands in for them."""
    convention: Convention
    keys: tuple[str, ...] | None = None
    if dataclasses.is_dataclass(X) and not isinstance(X, (type, Mapping)):
        X = {field.name: getattr(X, field.name) for field in dataclasses.fields(X)}
    if isinstance(X, Tensor):
        convention, inputs = "tensor", (X,)
    elif isinstance(X, Mapping):
        convention, keys, inputs = "dict", tuple(X.keys()), tuple(X.values())
        if not all(isinstance(key, str) for key in keys):
            raise DTypeError(f"{who}: expected names as keys of X in {label}, got {list(keys)}; use the model's argument names.")
    elif isinstance(X, (tuple, list)):
        convention, inputs = "tuple", tuple(X)
    else:
        raise DTypeError(
            f"{who}: expected X in {label} to be a tensor, a tuple of tensors or a dict of tensors, got {type(X).__name__}; convert it "
            "with torch.as_tensor."
        )
    if not inputs:
        raise DataError(f"{who}: expected at least one input tensor in {label}, got an empty {type(X).__name__}; pass X.")
    for name, tensor in zip(_input_names(convention, len(inputs), keys), inputs, strict=True):
        _check_tensor(tensor, name, label, who)
    targets = inputs[0] if y is None else y
    parsed = _Batch(label, tuple(x.detach() for x in inputs), targets.detach(), convention, keys)
    if any(x.shape[0] != parsed.targets.shape[0] for x in parsed.inputs):
        sizes = ", ".join(f"{name} {tensor.shape[0]}" for name, tensor in parsed.named()[: None if y is not None else -1])
        raise ShapeError(f"{who}: expected the same number of examples in all tensors of {label}, got {sizes}; align them.")
    return parsed


def _check_tensor(tensor: Any, name: str, label: str, who: str) -> None:
    if not isinstance(tensor, Tensor):
        raise DTypeError(f"{who}: expected {name} in {label} to be a tensor, got {type(tensor).__name__}; convert it with torch.as_tensor.")
    if tensor.is_complex() or tensor.layout != torch.strided:
        raise DTypeError(
            f"{who}: expected {name} in {label} to be a dense real tensor, got {tensor.dtype} {tensor.layout}; convert it with .to_dense() "
            "or torch.view_as_real."
        )
    if tensor.dim() == 0:
        raise ShapeError(f"{who}: expected {name} in {label} with the examples on its first axis, got a scalar; add that axis with [None].")


def _concatenate(batches: list[_Batch], who: str) -> Examples:
    if sum(batch.targets.shape[0] for batch in batches) == 0:
        raise DataError(f"{who}: expected at least one example, got empty data; check the file or the filter it came from.")
    first = batches[0]
    for batch in batches:
        if batch is first and all(x.device == first.targets.device for x in first.inputs):
            continue
        if (batch.convention, len(batch.inputs), batch.keys) != (first.convention, len(first.inputs), first.keys):
            raise DataError(
                f"{who}: expected X of the same structure in all batches, got {_structure(batch)} in {batch.label} after "
                f"{_structure(first)} in {first.label}; make them alike."
            )
        for (name, tensor), (_, model) in zip(batch.named(), first.named(), strict=True):
            if tensor.shape[1:] != model.shape[1:]:
                raise ShapeError(
                    f"{who}: expected {name} of shape [{', '.join(map(str, ('n', *model.shape[1:])))}] in all batches, got "
                    f"{list(tensor.shape)} in {batch.label}; pad or crop the examples to one shape."
                )
            if tensor.dtype != model.dtype:
                raise DTypeError(
                    f"{who}: expected {name} of dtype {model.dtype} in all batches, got {tensor.dtype} in {batch.label}; convert it with "
                    f".to({model.dtype})."
                )
            if tensor.device != first.targets.device:
                raise DeviceError(
                    f"{who}: expected all data on {first.targets.device}, got {name} in {batch.label} on {tensor.device}; move it with "
                    f".to('{first.targets.device}')."
                )
    if first.targets.is_meta:
        raise DeviceError(f"{who}: expected data with values, got a tensor on the meta device; load them on the model's device.")
    if len(batches) == 1:
        return Examples(first.inputs, first.targets, first.convention, first.keys)
    inputs = tuple(torch.cat([batch.inputs[i] for batch in batches]) for i in range(len(first.inputs)))
    return Examples(inputs, torch.cat([batch.targets for batch in batches]), first.convention, first.keys)


def _structure(batch: _Batch) -> str:
    if batch.keys is not None:
        return f"a dict with {', '.join(batch.keys)}"
    return "a tensor" if batch.convention == "tensor" else f"a tuple of {len(batch.inputs)}"


def _check_finite(examples: Examples, who: str) -> None:
    if all(map(all_finite, (*examples.inputs, examples.targets))):
        return
    names = _input_names(examples.convention, len(examples.inputs), examples.keys)
    for name, tensor in [*zip(names, examples.inputs, strict=True), ("y", examples.targets)]:
        if all_finite(tensor):
            continue
        bad = (~torch.isfinite(tensor)).reshape(tensor.shape[0], -1).any(dim=1).nonzero()[:, 0]
        raise DataError(
            f"{who}: expected finite {'targets' if name == 'y' else 'inputs'}, got NaN or infinite values in {name} of example "
            f"{int(bad[0])} ({len(bad)} of {examples.num_examples} examples); drop or repair these examples."
        )


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """A ``DataLoader`` draws a base seed from the global generator each time it is iterated."""
    state = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(state)
