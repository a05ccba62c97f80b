"""Which elements of a parameter a batch-free tensor consists of, where operators only moved them: slices, rows of tables, expansions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

# Operators that keep a tensor's elements in order.
_COPIES = frozenset(f"aten.{name}.default" for name in ("clone", "contiguous", "alias", "lift_fresh_copy"))
_RESHAPES = frozenset(f"aten.{name}.default" for name in ("_reshape_alias", "_unsafe_view", "view", "reshape"))
# Operators whose output is the input's memory under other strides, or several such.
_STRIDED = frozenset(
    f"aten.{name}"
    for name in (
        *("squeeze.default", "squeeze.dim", "squeeze.dims", "unsqueeze.default", "permute.default", "transpose.int", "t.default"),
        *("swapaxes.default", "swapdims.default", "movedim.int", "numpy_T.default", "mT.default", "adjoint.default", "expand.default"),
        *("slice.Tensor", "select.int", "narrow.default", "diagonal.default", "unfold.default", "flatten.using_ints", "unflatten.int"),
        *("split.Tensor", "split_with_sizes.default", "split.sizes", "chunk.default", "unbind.int"),
        *("tensor_split.sections", "tensor_split.indices"),
    )
)
# Operators that copy elements to new places, each from one of the input's.
_MOVED = frozenset(
    f"aten.{name}"
    for name in (
        *("index_select.default", "index.Tensor", "gather.default", "flip.default", "roll.default", "repeat.default", "tile.default"),
        *("repeat_interleave.self_int", "embedding.default"),
    )
)


@dataclass(frozen=True)
class Rows:
    """Rows of ``cols`` elements, picked by ``numbers``: a literal, or a tensor of the graph and the number of rows it may count back from.

    Row ``padding`` takes no derivative (−1: none).
    """

    numbers: Tensor | fx.Node
    count_back_from: int | None
    cols: int
    padding: int = -1


@dataclass(frozen=True)
class Elements:
    """A tensor of which element i is number ``offset + Σ i_k strides_k`` of a leaf, or of the rows of it that are picked.

    Attributes:
        leaf: the placeholder.
        first: of the leaf's elements, where the rows' table begins.
        size: elements of that table.
    """

    leaf: fx.Node
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    rows: Rows | None = None
    first: int = 0
    size: int = 0

    @property
    def span(self) -> int:
        """From the first element to behind the last."""
        return 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True)) if math.prod(self.shape) else 0

    @property
    def is_run(self) -> bool:
        """Whether these are neighbours in the leaf, in order."""
        return self.rows is None and self.view().is_contiguous()

    def view(self) -> Tensor:
        """A tensor without memory that lies so."""
        return torch.empty_strided(self.shape, self.strides, device="meta")


def elements_of(tensor: fx.Node, is_leaf: Callable[[fx.Node], bool], literal: Callable[[fx.Node], Tensor | None] | None) -> Elements | None:
    """The elements that ``tensor`` consists of; None where it is computed, or they are moved in a way that has neither strides nor rows.

    Args:
        tensor: batch-free.
        is_leaf: whether a node is a parameter, a buffer or the like.
        literal: a tensor's value, if it is known whatever the model's parameters and buffers are. None: views alone are looked
            through, since an index map takes memory for every element.
    """
    chain: list[fx.Node] = []
    leaf = tensor
    while not is_leaf(leaf):
        source = leaf.args[0] if leaf.op == "call_function" and leaf.args else None
        if not isinstance(source, fx.Node) or (str(leaf.target) not in _KNOWN and _name(leaf) != "getitem"):
            return None
        chain.append(leaf)
        leaf = source
    root = torch.empty(_shape(leaf), device="meta")
    state: Any = root
    rows: Rows | None = None
    first = size = 0
    for link in reversed(chain):
        moved = _viewed(state, link)
        if moved is None or (isinstance(moved, Tensor) and moved is not root and moved._base is not root):
            if literal is None:
                return None
            numbers = _numbers(state, link, literal)
            found = None if numbers is None else strides_of(numbers)
            if found is not None and min(found[1], default=0) >= 0:
                assert numbers is not None
                moved = root.as_strided(tuple(numbers.shape), found[1], found[0])
            elif numbers is not None and rows is not None and isinstance(rows.numbers, Tensor):
                elements = (rows.numbers[:, None] * rows.cols + torch.arange(rows.cols)).reshape(-1)
                rows = _literal_rows(elements[numbers], size)
                moved = root = torch.empty(_shape(link), device="meta")
            elif rows is None:
                picked = _literal_rows(numbers, root.numel()) if numbers is not None else _picked_rows(state, link)
                if picked is None:
                    return None
                rows = picked
                # Literal numbers count from the leaf's beginning, others from where the table does.
                first, size = (0, root.numel()) if numbers is not None else (int(state.storage_offset()), state.numel())
                moved = root = torch.empty(_shape(link), device="meta")
            else:
                return None
        state = moved
    return Elements(leaf, int(state.storage_offset()), tuple(state.shape), tuple(state.stride()), rows, first, size)


_KNOWN = _COPIES | _RESHAPES | _STRIDED | _MOVED


def strides_of(index: Tensor) -> tuple[int, list[int]] | None:
    """Offset and strides of an index map, if it has them."""
    if index.numel() == 0 or int(index.min()) < 0:
        return None
    origin = (0,) * index.dim()
    offset = int(index[origin])
    strides = []
    for axis, size in enumerate(index.shape):
        one = tuple(int(axis == k) for k in range(index.dim()))
        strides.append(int(index[one]) - offset if size > 1 else 0)
    guess = torch.full((), offset)
    for axis, (size, stride) in enumerate(zip(index.shape, strides, strict=True)):
        guess = guess + (torch.arange(size) * stride).reshape([size if k == axis else 1 for k in range(index.dim())])
    return (offset, strides) if torch.equal(guess.expand(index.shape), index) else None


def _name(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target))


def _shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(int(size) for size in node.meta["val"].shape)


def _viewed(state: Any, link: fx.Node) -> Any:
    """The link of tensors without memory, if it moves nothing; None otherwise."""
    name = str(link.target)
    if name in _COPIES:
        return state
    if _name(link) == "getitem":
        return state[link.args[1]]
    if name not in _STRIDED | _RESHAPES or len(link.all_input_nodes) != 1:
        return None
    try:
        return link.target(state, *link.args[1:], **link.kwargs)  # type: ignore[operator]
    except RuntimeError:  # a reshape of what does not lie in order
        return None


def _numbers(view: Tensor, link: fx.Node, literal: Callable[[fx.Node], Tensor | None]) -> Tensor | None:
    """The numbers in memory of what a link makes of a view; None if that depends on the model's tensors.

    Computed axis by axis: a link that moves elements is linear, and of a table only what is read is ever formed.
    """
    operands: dict[fx.Node, Any] = {}
    for node in link.all_input_nodes:
        if node is not link.args[0]:
            value = literal(node)
            if value is None:
                return None
            operands[node] = value
    name = str(link.target)
    if name == "aten.embedding.default":
        padding, by_frequency = _embedding_options(link)
        if by_frequency or (padding >= 0 and bool((operands[link.args[1]] == padding).any())):  # type: ignore[index]
            return None

    def move(x: Tensor) -> Tensor:
        if name in _RESHAPES:
            return x.reshape(_shape(link))
        operands[link.args[0]] = x  # type: ignore[index]
        args: Any = fx.map_arg(link.args, operands.__getitem__)
        kwargs: Any = fx.map_arg(link.kwargs, operands.__getitem__)
        result: Tensor = link.target(*args, **kwargs)  # type: ignore[operator]
        return result

    total = move(torch.tensor(float(view.storage_offset()), dtype=torch.float64).expand(view.shape))
    for axis, (size, stride) in enumerate(zip(view.shape, view.stride(), strict=True)):
        along = torch.arange(size, dtype=torch.float64) * stride
        total = total + move(along.reshape([-1 if k == axis else 1 for k in range(view.dim())]).expand(view.shape))
    return total.long()


def _literal_rows(numbers: Tensor, size: int) -> Rows | None:
    """Elements of a leaf of ``size`` elements as rows of it, as long as they can be."""
    cols = math.prod(numbers.shape[-1:])
    starts = numbers.reshape(-1, cols)[:, 0] if cols else numbers.reshape(0)
    in_order = cols > 0 and torch.equal(starts[:, None] + torch.arange(cols), numbers.reshape(-1, cols))
    if not in_order or size % cols != 0 or bool((starts % cols != 0).any()):
        cols, starts = 1, numbers.reshape(-1)
    return Rows(starts // cols, None, cols) if len(starts) > 0 else None


def _picked_rows(table: Any, link: fx.Node) -> Rows | None:
    """A read of whole rows of a table by numbers that the model's tensors decide."""
    if not isinstance(table, Tensor) or table.dim() == 0 or not table.is_contiguous() or math.prod(_shape(link)) == 0:
        return None
    name, cols = str(link.target), math.prod(table.shape[1:])
    indices: Any
    if name == "aten.embedding.default":
        padding, by_frequency = _embedding_options(link)
        return None if by_frequency else Rows(link.args[1], None, cols, padding)  # type: ignore[arg-type]
    if name == "aten.index_select.default" and link.args[1] in (0, -table.dim()):
        return Rows(link.args[2], None, cols)  # type: ignore[arg-type]
    elif name == "aten.index.Tensor" and isinstance(link.args[1], Sequence) and len(link.args[1]) == 1:
        indices = link.args[1][0]
    else:
        return None
    is_mask = not isinstance(indices, fx.Node) or indices.meta["val"].dtype in (torch.bool, torch.uint8)
    return None if is_mask else Rows(indices, table.shape[0], cols)


def _embedding_options(link: fx.Node) -> tuple[int, bool]:
    """``padding_idx`` and ``scale_grad_by_freq`` of ``embedding(weight, indices, padding_idx, scale_grad_by_freq)``."""
    given = dict(zip(("weight", "indices", "padding_idx", "scale_grad_by_freq"), link.args, strict=False)) | dict(link.kwargs)
    return int(given.get("padding_idx", -1)), bool(given.get("scale_grad_by_freq", False))  # type: ignore[arg-type]
