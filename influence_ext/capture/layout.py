"""Where the examples lie in a batched tensor: what makes any tensor of a graph a value ``[N, *shape]`` in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

# Operators whose output holds the input's elements in the same order.
# fmt: off
VIEWS = frozenset((
    "aten.view.default", "aten.reshape.default", "aten._unsafe_view.default", "aten._reshape_alias.default", "aten.alias.default",
    "aten.clone.default", "aten.contiguous.default", "aten.squeeze.default", "aten.squeeze.dim", "aten.squeeze.dims",
    "aten.unsqueeze.default", "aten.flatten.using_ints", "aten.unflatten.int", "aten.view_as.default",
))
# fmt: on


NO_AXIS = "the examples on no single axis"
"""Why a tensor has no layout, for people."""


@dataclass(frozen=True)
class Layout:
    """A tensor whose axis ``axis`` has ``pre * N * post`` entries, the examples in the middle, in memory ``[N, *shape]``.

    ``shape`` has the rank of the tensor: the batch axis is replaced by its fold, ``pre * post`` (1 for most). A tensor ``[T, N, E]`` is the
    value ``(T, 1, E)`` with ``axis`` 1; windows ``[N * W, E]`` are the value ``(W, E)`` with ``axis`` 0 and ``post`` W.
    """

    shape: tuple[int, ...]
    axis: int
    pre: int = 1
    post: int = 1

    @property
    def fold(self) -> int:
        """Entries of the batch axis that belong to one example."""
        return self.pre * self.post

    @property
    def before(self) -> int:
        """Elements of the tensor that one step along the examples passes over on the slower side: what a reshape must keep."""
        return math.prod(self.shape[: self.axis]) * self.pre

    def gather(self, tensor: Tensor) -> Tensor:
        """The tensor as graphs have it -> ``[N, *shape]``, contiguous."""
        sizes = tensor.shape
        N = sizes[self.axis] // self.fold
        split = tensor.reshape(*sizes[: self.axis], self.pre, N, self.post, *sizes[self.axis + 1 :])
        return split.movedim(self.axis + 1, 0).reshape(N, *self.shape)

    def scatter(self, value: Tensor) -> Tensor:
        """``[N, *shape]`` -> the tensor as graphs have it."""
        N = value.shape[0]
        split = value.reshape(N, *self.shape[: self.axis], self.pre, self.post, *self.shape[self.axis + 1 :])
        merged = (*self.shape[: self.axis], self.pre * N * self.post, *self.shape[self.axis + 1 :])
        return split.movedim(0, self.axis + 1).reshape(merged)


def is_free(size: Any) -> bool:
    """Whether a size varies with the number of examples; a symbol that tracing has fixed does not."""
    return isinstance(size, torch.SymInt) and not size.node.expr.is_Integer


def layout_of(node: fx.Node, known: Callable[[fx.Node], Layout | None], sources: list[fx.Node], symbols: Collection[Any]) -> Layout | None:
    """The layout of a node, from its shape and the layouts of what it reads; None where no single axis holds the examples.

    Args:
        node: its ``meta["val"]`` is a tensor.
        known: layout of an earlier node.
        sources: the batched tensors it reads.
        symbols: that stand for the number of examples.
    """
    sizes = node.meta["val"].shape
    free = [axis for axis, size in enumerate(sizes) if is_free(size)]
    if len(free) != 1:
        return None
    (axis,) = free
    folds = [sizes[axis].node.expr / symbol for symbol in symbols]
    fold = next((int(fold) for fold in folds if fold.is_Integer), None)
    if fold is None:
        return None
    shape = tuple(fold if i == axis else int(size) for i, size in enumerate(sizes))
    if fold == 1 and (str(node.target) not in VIEWS or not sources):
        return Layout(shape, axis)
    inputs = [layout for layout in map(known, sources) if layout is not None]
    if str(node.target) in VIEWS:
        # A reshape keeps what lies on the slower side of the examples.
        if not inputs:
            return None
        outside = math.prod(shape[:axis])
        pre, rest = divmod(inputs[0].before, outside) if outside else (0, 1)
        return Layout(shape, axis, pre, fold // pre) if rest == 0 and pre > 0 and fold % pre == 0 else None
    if str(node.target) == "aten.repeat.default":
        return Layout(shape, axis, fold, 1) if inputs and inputs[0].fold == 1 else None
    same = next((layout for layout in inputs if layout.fold == fold), None)
    return None if same is None else Layout(shape, axis, same.pre, same.post)
