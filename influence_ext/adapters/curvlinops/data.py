"""What curvlinops takes for data: batches ``(X, y)``, read into memory once with the weight each has in the empirical risk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import CrossEntropyLoss, Module

from influence_ext.data import Examples, load
from influence_ext.errors import ArgumentError, DataError, DTypeError
from influence_ext.losses import Loss

BatchSize = Callable[[Any], int]


@dataclass(frozen=True)
class Structure:
    """How the model takes the input of a batch: a tensor, or a mapping or sequence of tensors as its one argument.

    Attributes:
        kind: the type of the input.
        keys: of a mapping, else None.
    """

    kind: type
    keys: tuple[str, ...] | None

    @property
    def single(self) -> bool:
        """Whether it is one tensor."""
        return issubclass(self.kind, Tensor)

    def pack(self, tensors: Sequence[Tensor]) -> Any:
        """The input made of its tensors."""
        return self.kind(tensors) if self.keys is None else self.kind(dict(zip(self.keys, tensors, strict=True)))

    def tensors(self, X: Any) -> Any:
        """The tensors of an input: one, or a tuple."""
        if self.single:
            return X
        return tuple(X) if self.keys is None else tuple(X[key] for key in self.keys)

    @classmethod
    def of(cls, X: Any, who: str) -> Structure:
        """Of the first batch's input."""
        if isinstance(X, Tensor):
            return cls(Tensor, None)
        if isinstance(X, Mapping):
            return cls(type(X), tuple(X))
        if isinstance(X, (tuple, list)):
            return cls(type(X), None)
        raise DTypeError(f"{who}: expected X as a tensor, or a mapping or sequence of tensors, got {type(X).__name__}; convert it.")


@dataclass(frozen=True, eq=False)
class Batches:
    """Batches of a data set in memory whose examples have the same shapes.

    Attributes:
        examples: of all of them.
        structure: how the model takes the input of a batch.
        rows: examples of each batch.
        sizes: of each batch as the user counts it (``batch_size_fn``).
    """

    examples: Examples
    structure: Structure
    rows: tuple[int, ...]
    sizes: tuple[int, ...]

    @classmethod
    def read(
        cls, data: Iterable[Any], device: torch.device, batch_size_fn: BatchSize | None, progressbar: bool, reduction: str, who: str
    ) -> tuple[Batches, ...]:
        """One pass over ``data``: its batches by the shapes of their examples, which padding to a batch's longest makes several of.

        A batch of no examples adds nothing to a sum and is left out; the mean over it is not defined.

        Raises:
            ValueError: a mapping without ``batch_size_fn``, no data, data that can be read only once, or a mean with an empty batch.
        """
        if iter(data) is data:
            raise DataError(
                f"{who}: expected data that can be read more than once, got the one-shot iterator {type(data).__name__}; pass list(data)."
            )
        by_shapes: dict[tuple[tuple[int, ...], ...], tuple[list[Any], list[int]]] = {}
        structure: Structure | None = None
        for batch in _shown(data, who) if progressbar else data:
            if isinstance(batch, Tensor) or not isinstance(batch, Sequence) or len(batch) != 2:
                raise DataError(f"{who}: expected data as batches (X, y), got a batch of type {type(batch).__name__}; pass [(X, y)].")
            X, y = batch
            if structure is None:
                structure = Structure.of(X, who)
                if structure.keys is not None and batch_size_fn is None:
                    raise ArgumentError(
                        f"{who}: expected batch_size_fn with data whose X is a {type(X).__name__}, got None; pass for instance "
                        "batch_size_fn=lambda X: X['x'].shape[0]."
                    )
            if isinstance(y, Tensor) and y.dim() > 0 and y.shape[0] == 0:
                if reduction == "sum":
                    continue
                raise DataError(
                    f"{who}: expected batches of at least one example with reduction='mean', got y of shape {list(y.shape)}; leave empty "
                    "batches out of the data."
                )
            moved = _moved(structure.tensors(X), y, device)
            batches, sizes = by_shapes.setdefault(_shapes(*moved), ([], []))
            batches.append(moved)
            sizes.append(int(batch_size_fn(X)) if batch_size_fn is not None else int(X.shape[0]))
        if structure is None or not by_shapes:
            raise DataError(
                f"{who}: expected at least one batch (X, y) with examples, got empty data; check the file or the filter it came from."
            )
        return tuple(
            cls(load(batches, who), structure, tuple(len(y) for _, y in batches), tuple(sizes)) for batches, sizes in by_shapes.values()
        )

    def risk_weights(self, loss: Loss, num_data: int) -> Tensor:
        """``f_n [N]``, float64: the empirical risk is ``Σ_n f_n ℓ_n``.

        Each batch counts with ``size / num_data`` times its own mean for a mean, and with its sum for a sum.
        """
        if loss.reduction == "sum":
            return torch.ones(self.examples.num_examples, dtype=torch.float64)
        targets = self.examples.targets.split(self.rows)
        each = [loss.factor(t) * size / num_data for t, size in zip(targets, self.sizes, strict=True)]
        return torch.tensor(each, dtype=torch.float64).repeat_interleave(torch.tensor(self.rows))

    def gradient_weights(self, loss: Loss, num_data: int, loss_func: Module, output_shape: Sequence[int]) -> Tensor:
        """``s_n [N]``, float64: the empirical Fisher matrix is ``Σ_n Σ_t (s_n J_ntᵀ ∇ℓ_nt)(...)ᵀ`` over the terms t of an example.

        curvlinops undoes the reduction of each batch in its gradients and puts it back once: the number of terms (for a cross-entropy) or
        of elements (for the others).
        """
        weights = self.risk_weights(loss, num_data)
        if loss.reduction == "sum":
            return weights
        elements = torch.Size(output_shape).numel()
        terms = elements // output_shape[0] if isinstance(loss_func, CrossEntropyLoss) else elements
        rows = torch.tensor(self.rows, dtype=torch.float64)
        count = (rows * terms).repeat_interleave(torch.tensor(self.rows))
        share = (torch.tensor(self.sizes, dtype=torch.float64) / num_data).repeat_interleave(torch.tensor(self.rows))
        return weights * (count / share).sqrt()

    def same_as(self, other: Batches) -> bool:
        """Whether two passes gave the same batches with the same numbers."""
        if (self.rows, self.sizes, self.structure) != (other.rows, other.sizes, other.structure):
            return False
        pairs = zip((*self.examples.inputs, self.examples.targets), (*other.examples.inputs, other.examples.targets), strict=True)
        return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


def _shapes(X: Any, y: Any) -> tuple[tuple[int, ...], ...]:
    """Of one example."""
    return tuple(tuple(t.shape[1:]) for t in (*(X if isinstance(X, tuple) else (X,)), y) if isinstance(t, Tensor))


def _moved(X: Any, y: Any, device: torch.device) -> tuple[Any, Any]:
    """A batch on the parameters' device."""
    move = lambda t: t.to(device) if isinstance(t, Tensor) else t  # noqa: E731
    return (tuple(map(move, X)) if isinstance(X, tuple) else move(X)), move(y)


def _shown(data: Iterable[Any], who: str) -> Iterable[Any]:
    try:
        from tqdm import tqdm  # type: ignore[import-untyped]
    except ImportError as reason:
        raise ImportError(
            f"{who}: expected the package tqdm for progressbar=True, got {reason}; install it or leave the bar out."
        ) from reason
    shown: Iterable[Any] = tqdm(data, desc=f"{who}.data")
    return shown
