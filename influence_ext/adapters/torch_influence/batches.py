"""What a loader yields: nested containers of tensors, read once and kept as one block where that changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

from influence_ext.errors import ArgumentError

MAX_BYTES = 4 * 2**30
"""Training data beyond this size are not kept but read again for every product."""


class NotNative(Exception):
    """Why something has to run batch by batch in torch, in words."""


@dataclass(frozen=True, eq=False)
class Block:
    """Examples in the structure of the loader's batches; example n is row n of every tensor.

    Attributes:
        leaves: the tensors, ``[size, ...]`` each.
        spec: the containers around them.
        size: the number of examples.
    """

    leaves: list[Tensor]
    spec: TreeSpec
    size: int

    @classmethod
    def of(cls, batch: Any, size: int) -> Block:
        """A batch of ``size`` examples.

        Raises:
            NotNative: a tensor does not have the examples on its first axis.
        """
        leaves, spec = tree_flatten(batch)
        for leaf in leaves:
            if leaf.dim() == 0 or leaf.shape[0] != size:
                raise NotNative(f"a tensor {list(leaf.shape)} in a batch of {size} examples does not have them on its first axis")
        return cls(leaves, spec, size)

    @property
    def batch(self) -> Any:
        """The examples as the loader yields them."""
        return tree_unflatten(self.leaves, self.spec)

    def rows(self, index: Tensor | slice) -> Block:
        """The examples at ``index``, which may repeat."""
        leaves = [leaf[index] for leaf in self.leaves]
        return Block(leaves, self.spec, int(leaves[0].shape[0]))

    def same(self, other: Block) -> bool:
        """Whether structure and values agree (NaN equals NaN)."""
        return self.spec == other.spec and all(
            a.shape == b.shape and a.dtype == b.dtype and bool(torch.isclose(a, b, rtol=0.0, atol=0.0, equal_nan=True).all())
            for a, b in zip(self.leaves, other.leaves, strict=True)
        )


def to_device(batch: Any, device: torch.device | str) -> Any:
    """The same containers with their tensors on ``device``.

    Raises:
        NotImplementedError: something in the batch is neither a tensor nor a tuple, list or dict of tensors.
    """
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(item, device) for item in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(to_device(item, device) for item in batch)
    if isinstance(batch, Mapping):
        return {key: to_device(item, device) for key, item in batch.items()}
    raise NotImplementedError(
        f"torch_influence: expected batches of tensors in tuples, lists and dicts, got {type(batch).__name__}; convert it in the "
        "loader's collate_fn."
    )


def check_subset(subset: Any, size: int) -> list[int]:
    """Indices of examples, each in range and none twice.

    Raises:
        ValueError: they are no list of integers, or one occurs twice.
        IndexError: one is not in [0, size).
    """
    indices = np.asarray(subset.cpu() if isinstance(subset, Tensor) else subset)
    if indices.ndim != 1 or (indices.size and not np.issubdtype(indices.dtype, np.integer)):
        raise ArgumentError(f"torch_influence: expected a list of example indices, got {subset!r}; pass integers, such as [0, 3].")
    found: list[int] = indices.astype(np.int64).tolist()
    if len(set(found)) < len(found):
        twice = next(index for index in found if found.count(index) > 1)
        raise ArgumentError(f"torch_influence: expected every index once, got {twice} twice; remove the repetition.")
    for index in found:
        if not 0 <= index < size:
            raise IndexError(f"torch_influence: expected example indices from 0 to {size - 1}, got {index}; correct or drop it.")
    return found


def read_block(loader: DataLoader, device: torch.device | str, batches: Callable[[], Iterator[tuple[Any, int]]]) -> Block:
    """A loader's data set as one block.

    Args:
        loader: whose data set is read.
        device: where the block goes.
        batches: reads the loader once: ``(batch on the device, its number of examples)``.

    Raises:
        NotNative: the block would not stand for the batches: shapes differ between them, an example alone is collated to something
            else than its row of a batch, a second reading gives other values, or there is too much of it.

    Cost: one pass over the data, two with a ``collate_fn`` of one's own; none for a ``TensorDataset``. The random state is kept.
    """
    dataset: Dataset = loader.dataset
    count = len(dataset)  # type: ignore[arg-type]
    default = loader.collate_fn is default_collate
    with random_state_kept():
        if default and type(dataset) is TensorDataset:
            leaves = [tensor.to(device) for tensor in dataset.tensors]
            return Block(leaves, tree_flatten(to_device(loader.collate_fn([dataset[0]]), device))[1], count)
        block = _concatenated(batches(), count)
        for index in (0, count // 2, count - 1) if default else range(count):
            alone = Block.of(to_device(loader.collate_fn([dataset[index]]), device), 1)
            if not alone.same(block.rows(slice(index, index + 1))):
                raise NotNative(f"example {index} read once more and alone is not what it was in its batch")
    return block


def _concatenated(batches: Iterator[tuple[Any, int]], count: int) -> Block:
    blocks: list[Block] = []
    total = 0
    for batch, size in batches:
        block = Block.of(batch, size)
        first = blocks[0] if blocks else block
        if block.spec != first.spec or any(
            a.shape[1:] != b.shape[1:] or a.dtype != b.dtype for a, b in zip(block.leaves, first.leaves, strict=True)
        ):
            raise NotNative("batches differ in structure or in the shape of their examples")
        blocks.append(block)
        total += sum(leaf.nbytes for leaf in block.leaves)
        if total > MAX_BYTES:
            raise NotNative(f"the data take more than {MAX_BYTES / 2**30:g} GiB")
    return Block([torch.cat(leaves) for leaves in zip(*(b.leaves for b in blocks), strict=True)], blocks[0].spec, count)


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Readings of our own draw nothing from the generators, torch's and numpy's, that the caller's readings draw from."""
    state, numpy_state = torch.get_rng_state(), np.random.get_state()  # noqa: NPY002
    try:
        yield
    finally:
        torch.set_rng_state(state)
        np.random.set_state(numpy_state)  # noqa: NPY002
