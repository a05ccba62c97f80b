"""Is a callable one of the losses with formulas, called on rearranged outputs and targets? Found out by calling it on numbered elements.

While it runs, every function of torch that it calls is seen. Where these only move elements, until one loss is called whose value the
callable returns as it is, the numbers that reach that loss say what moves where, and no value that torch gave out can have decided
anything. What cannot be seen here (scripted helpers, derivatives of a callable's own, states of Python) is left to the comparisons of
``generic.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

NUM_EXAMPLES = (2, 3)
"""Batches that a callable is tried on: what it does must not depend on their size."""
_DIGIT = 2**24  # float32 holds all whole numbers up to here
# fmt: off
_MOVES = frozenset((
    "flatten", "unflatten", "view", "view_as", "reshape", "reshape_as", "transpose", "permute", "movedim", "moveaxis", "swapaxes",
    "swapdims", "t", "squeeze", "unsqueeze", "contiguous", "clone", "narrow", "select", "unbind", "split", "chunk", "float", "double",
    "long", "int", "to", "type", "type_as", "size", "dim", "numel", "ndimension", "__len__",
))
# fmt: on
_ATTRIBUTES = frozenset(("shape", "dtype", "device", "ndim", "T", "mT", "is_cuda"))


class _NoMove(Exception):
    """The callable does something else than to move elements."""


@dataclass(frozen=True)
class Call:
    """The one loss that a callable is.

    Attributes:
        name: of the functional.
        options: its keywords that were given.
        outputs, targets: ``[*shape]``, numbers of the elements that reach it, over the whole batch; targets count on from the outputs.
        target_dtype: of what reaches it as targets.
    """

    name: str
    options: dict[str, Any]
    outputs: Tensor
    targets: Tensor
    target_dtype: torch.dtype


def called_loss(
    function: Callable[[Tensor, Tensor], Any],
    functionals: Mapping[Callable[..., Tensor], str],
    z: Tensor,
    target: Tensor,
    num_examples: int,
) -> Call | None:
    """What ``function`` calls on a batch of ``num_examples``, shaped and typed as ``z`` and ``target`` are; None if it is no such callable.

    Cost: the callable's own data movement, once or twice.
    """
    if target.dtype not in (torch.int64, torch.int32, torch.float32, torch.float64):
        return None
    shapes = [(num_examples, *x.shape[1:]) for x in (z, target)]
    ends = [torch.Size(shape).numel() for shape in shapes]
    total = sum(ends)
    found: Call | None = None
    place = 1
    while place < max(total, 2):
        numbers = (torch.arange(total) // place) % _DIGIT
        probes = [part.reshape(shape).to(x) for part, shape, x in zip(numbers.split(ends), shapes, (z, target), strict=True)]
        watch = _Watch(functionals)
        try:
            with torch.no_grad(), watch:
                result = function(*probes)
        except Exception:  # it may do anything with numbers that it is not made for
            return None
        if watch.refused or watch.call is None or result is not watch.value or watch.call.outputs.dtype != z.dtype:
            return None
        call = watch.call
        digits = [place * call.outputs.to(torch.int64), place * call.targets.to(torch.int64)]
        if found is not None:
            digits = [found.outputs + digits[0], found.targets + digits[1]]
        found = Call(call.name, call.options, digits[0], digits[1], call.target_dtype)
        place *= _DIGIT
    if found is None or int(found.outputs.max()) >= ends[0] or int(found.targets.min()) < ends[0]:
        return None
    return found


class _Watch(TorchFunctionMode):
    """Lets elements be moved, and takes the place of the first loss."""

    def __init__(self, functionals: Mapping[Callable[..., Tensor], str]):
        super().__init__()
        self._functionals = functionals
        self.call: Call | None = None
        self.value = torch.zeros(())
        self.refused = False
        """Also where the callable has caught the exception."""
        self._rounded = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            return self._moved(func, args, kwargs or {})
        except _NoMove:
            self.refused = True
            raise

    def _moved(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if self.call is None and func in self._functionals:
            if len(args) != 2:
                raise _NoMove
            options = {key: value for key, value in kwargs.items() if value is not None}
            self.call = Call(self._functionals[func], options, args[0], args[1], args[1].dtype)
            return self.value
        name = getattr(func, "__name__", "")
        if name == "__get__":
            moves = getattr(getattr(func, "__self__", None), "__name__", "") in _ATTRIBUTES
        elif name == "__getitem__":
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            moves = all(i is None or i is Ellipsis or (isinstance(i, (int, slice)) and not isinstance(i, bool)) for i in index)
        else:
            moves = name in _MOVES
        if not moves or self.call is not None:
            raise _NoMove
        result = func(*args, **kwargs)
        source = args[0] if args else None
        if isinstance(result, Tensor) and isinstance(source, Tensor) and result.dtype != source.dtype:
            self._convert(source.dtype, result.dtype)
        return result

    def _convert(self, given: torch.dtype, made: torch.dtype) -> None:
        """The probes' whole numbers survive conversions that round others, so what is rounded has to stay in that dtype."""
        if self._rounded:
            raise _NoMove
        self._rounded = _digits(made) < _digits(given) or (given.is_floating_point and not made.is_floating_point)


def _digits(dtype: torch.dtype) -> float:
    """Whole numbers up to here are exact."""
    return 2 / torch.finfo(dtype).eps if dtype.is_floating_point else torch.iinfo(dtype).max


def one_example(rows: Tensor, targets: Tensor, sizes: tuple[int, int], num_examples: int) -> tuple[Tensor, Tensor] | None:
    """From the whole batch to one example: ``[M, K], [M, L]`` -> ``[M/N, K], [M/N, L]``, numbers within it.

    None unless each row is of one example, and each example's rows are the same.

    Args:
        rows: numbers of elements of the outputs.
        targets: the same of the targets, counted from 0.
        sizes: elements of one example of either.
        num_examples: N.
    """
    owner = rows[:, :1] // sizes[0]
    if not bool((rows // sizes[0] == owner).all()) or not bool((targets // sizes[1] == owner).all()) or rows.shape[0] % num_examples:
        return None
    order = owner[:, 0].argsort(stable=True)
    each = rows.shape[0] // num_examples
    if each == 0 or not torch.equal(owner[order, 0], torch.arange(num_examples).repeat_interleave(each)):
        return None
    found = [(x[order] % size).reshape(num_examples, each, -1) for x, size in zip((rows, targets), sizes, strict=True)]
    if any(not bool((x == x[:1]).all()) for x in found) or found[0][0].unique().numel() != found[0][0].numel():
        return None
    return found[0][0], found[1][0]
