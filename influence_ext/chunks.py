"""A tape that does not fit its memory: one chunk of examples at a time, recomputed in every product.

``ChunkedTape`` and ``ChunkedFactors`` have the methods of the extension's ``Tape`` and ``Factors``: nothing above knows the difference.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


def free_bytes(device: torch.device) -> int | None:
    """Memory that a CUDA device has left: the driver's, and what torch keeps there unused. None for a CPU, whose system does not say."""
    if device.type != "cuda":
        return None
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


@dataclass
class _Point:
    """Where a tape stands; its copies share it.

    Attributes:
        values: of the slots that are not differentiated.
        theta: ``[P]``.
        outputs: ``[N, C]``; none while it moves.
        cotangents: ``[N, *out]``, if some are kept.
    """

    values: list[Tensor | None] = field(default_factory=list)
    theta: Tensor | None = None
    outputs: Tensor | None = None
    cotangents: Tensor | None = None


class ChunkedTape:
    """The forward state of at most ``chunk`` examples, made anew for each chunk in each product.

    Args:
        make: inputs of some examples -> a tape of the extension, not yet linearised.
        prepare: inputs as the user gives them -> those that ``make`` takes.
        blocks: ``blocks(size)`` yields ``(first example, inputs)`` of consecutive chunks.
        num_examples: N.
        chunk: examples at a time.

    Cost: a product costs one forward pass more than on a resident tape.
    """

    def __init__(
        self,
        make: Callable[[list[Tensor]], Any],
        prepare: Callable[[Any], list[Tensor]],
        blocks: Callable[[int], Iterator[tuple[int, Any]]],
        num_examples: int,
        chunk: int,
    ):
        self._make, self._prepare, self._blocks = make, prepare, blocks
        self.num_examples, self.chunk = num_examples, chunk
        self._point = _Point()
        self._schedule = self._precision = self._largest = 0
        self._spares: list[Any] = []

    def at_precision(self, precision: int) -> ChunkedTape:
        """The same point, also where it moves to, whose products multiply otherwise."""
        other = copy.copy(self)
        other._precision, other._spares = precision, []
        return other

    def linearize(self, values: Sequence[Tensor | None], theta: Tensor | None = None) -> None:
        """Move to other parameters; one forward pass over the data, which keeps the outputs alone."""
        self._point.outputs = self._point.cotangents = None  # those of the point before: also for whom this pass does not end
        self._point.values = [None if t is None else t.clone() for t in values]
        self._point.theta = None if theta is None else theta.clone()
        outputs: Tensor | None = None

        def keep(tape: Any, start: int, stop: int) -> None:
            nonlocal outputs
            part = tape.outputs()
            if outputs is None:
                outputs = part.new_empty(self.num_examples, part.shape[1])
            outputs[start:stop] = part
            if tape.num_examples > self._largest:
                self._measure(tape)

        self.each(keep)
        self._point.outputs = outputs

    def each(self, body: Callable[[Any, int, int], None]) -> None:
        """``body(linearised tape, first example, end)`` of each chunk; a tape is valid during the call, and must not be kept.

        One tape's memory serves all chunks of one size: two states are never held at once. A second pass inside the first, or in another
        thread, takes a second one.
        """
        try:
            tape = self._spares.pop()  # whoever gets it has it alone
        except IndexError:
            tape = None
        for start, inputs in self._blocks(self.chunk):
            sources = self._prepare(inputs)
            if tape is not None and tape.num_examples == sources[0].shape[0]:
                tape.rebind(sources)
                tape.set_schedule(self._schedule)
            else:
                tape = None  # its memory is free before the next is taken
                tape = self._new(sources)
            tape.linearize(self._point.values, self._point.theta)
            body(tape, start, start + tape.num_examples)
        self._spares[:] = [tape]

    def _new(self, sources: list[Tensor]) -> Any:
        tape = self._make(sources).at_precision(self._precision)
        tape.set_schedule(self._schedule)
        return tape

    def _measure(self, tape: Any) -> None:
        """Remember the sizes of the largest chunk's tape."""
        self._largest = tape.num_examples
        self._sizes = int(tape.cached_bytes), {V: int(tape.workspace_bytes(V)) for V in (1, 8, 64)}
        self._tilings = {V: tape.tiling(V) for V in (1, 8)}

    def outputs(self) -> Tensor:
        """``[N, C]``."""
        assert self._point.outputs is not None
        return self._point.outputs.clone()

    @property
    def cached_bytes(self) -> int:
        """Of the largest chunk."""
        return self._sizes[0]

    def workspace_bytes(self, V: int) -> int:
        """Of one product on the largest chunk, at most."""
        known = self._sizes[1]
        most = max(known)
        return known[min(size for size in known if size >= V)] if most >= V else known[most] * math.ceil(V / most)

    def tiling(self, V: int) -> tuple[bool, int, int]:
        """Of the largest chunk."""
        found: tuple[bool, int, int] = self._tilings.get(V) or self._tilings[1]
        return found

    def set_schedule(self, choice: int) -> None:
        """For every chunk."""
        self._schedule = choice
        self._spares.clear()
        _, first = next(self._blocks(1))
        tape = self._new(self._prepare(first_rows(first, 1, repeat=self._largest)))
        self._measure(tape)
        self._spares[:] = [tape]

    def jvp(self, v: Tensor) -> Tensor:
        """``[V, P] -> [V, N, C]``."""
        out: Tensor | None = None

        def push(tape: Any, start: int, stop: int) -> None:
            nonlocal out
            part = tape.jvp(v)
            out = part.new_empty(part.shape[0], self.num_examples, part.shape[2]) if out is None else out
            out[:, start:stop] = part

        self.each(push)
        assert out is not None
        return out

    def vjp(self, g: Tensor) -> Tensor:
        """``[V, N, *out] -> [V, P]``."""
        return self.sum(lambda tape, start, stop: tape.vjp(g[:, start:stop].contiguous()))

    def ggn(self, v: Tensor, shape: int, scale: float, state: Tensor | None, weights: Tensor | None) -> Tensor:
        """``[V, P] -> [V, P]``."""
        return self.sum(lambda tape, start, stop: tape.ggn(v, shape, scale, *_rows(start, stop, state, weights)))

    def keep_cotangents(self, g: Tensor) -> None:
        """Cotangents ``[N, *out]`` of the outputs, pulled back anew for each chunk in each ``hvp``."""
        self._point.cotangents = g

    def hvp(self, v: Tensor, shape: int, scale: float, state: Tensor | None, weights: Tensor | None) -> Tensor:
        """``[V, P] -> [V, P]``."""

        def part(tape: Any, start: int, stop: int) -> Tensor:
            tape.keep_cotangents(*_rows(start, stop, self._point.cotangents))
            product: Tensor = tape.hvp(v, shape, scale, *_rows(start, stop, state, weights))
            return product

        return self.sum(part)

    def factors(self, g: Tensor) -> ChunkedFactors:
        """Per-example factors, chunk by chunk when they are asked for."""
        return ChunkedFactors(self, g)

    def sum(self, part: Callable[[Any, int, int], Tensor]) -> Tensor:
        """The sum of ``part(linearised tape, first example, end)`` over the chunks."""
        total: Tensor | None = None

        def add(tape: Any, start: int, stop: int) -> None:
            nonlocal total
            found = part(tape, start, stop)
            total = found if total is None else total.add_(found)

        self.each(add)
        assert total is not None
        return total


@dataclass(frozen=True, eq=False)
class ChunkedFactors:
    """Factors of a chunked tape for cotangents ``g [V, N, *out]``."""

    tape: ChunkedTape
    g: Tensor

    def materialise(self, out: Tensor | None = None) -> Tensor:
        """``[V, N, P]``."""

        def write(factors: Any, start: int, stop: int) -> None:
            nonlocal out
            part = factors.materialise(None)
            if out is None:
                out = part.new_empty(part.shape[0], self.tape.num_examples, part.shape[2])
            out.view(part.shape[0], self.tape.num_examples, part.shape[2])[:, start:stop] = part

        self._each(write)
        assert out is not None
        return out

    def dots(self, u: Tensor) -> Tensor:
        """``[W, P] -> [V, W, N]``."""
        return torch.cat(self._results(lambda factors: factors.dots(u)), dim=2)

    def square_norms(self) -> Tensor:
        """``[V, N]``."""
        return torch.cat(self._results(lambda factors: factors.square_norms()), dim=1)

    def square_norms_by_region(self) -> dict[int, Tensor]:
        """Where a region of the flat vector begins, which lies within one parameter -> ``[V, N]``."""
        parts = self._results(lambda factors: factors.square_norms_by_region())
        return {offset: torch.cat([part[offset] for part in parts], dim=1) for offset in parts[0]}

    def square_sum(self) -> Tensor:
        """``[P]``."""
        return self.tape.sum(lambda tape, start, stop: self._of(tape, start, stop).square_sum())

    def gram(self, other: Any) -> Tensor:
        """``[V·N, V'·N']``, a pair of chunks at a time."""
        V, N = self.g.shape[:2]
        W, M = other.g.shape[:2] if isinstance(other, ChunkedFactors) else (None, None)
        out: Tensor | None = None

        def row(mine: Any, start: int, stop: int) -> None:
            nonlocal out

            def pair(theirs: Any, first: int, last: int) -> None:
                nonlocal out
                block = mine.gram(theirs)
                out = block.new_empty(V, N, W, M) if out is None else out
                out[:, start:stop, :, first:last] = block.view(V, stop - start, W, last - first)

            if isinstance(other, ChunkedFactors):
                other._each(pair)
                return
            block = mine.gram(other)
            out = block.new_empty(V, N, block.shape[1]) if out is None else out
            out[:, start:stop] = block.view(V, stop - start, -1)

        self._each(row)
        assert out is not None
        return out.view(V * N, -1)

    def _of(self, tape: Any, start: int, stop: int) -> Any:
        """The factors of one chunk."""
        return tape.factors(self.g[:, start:stop].contiguous())

    def _each(self, body: Callable[[Any, int, int], None]) -> None:
        """``body(factors, first example, end)`` of each chunk; factors hold their tape, and must not be kept either."""
        self.tape.each(lambda tape, start, stop: body(self._of(tape, start, stop), start, stop))

    def _results(self, of: Callable[[Any], Any]) -> list[Any]:
        """What ``of`` makes of each chunk's factors."""
        found: list[Any] = []
        self._each(lambda factors, start, stop: found.append(of(factors)))
        return found


def _rows(start: int, stop: int, *tensors: Tensor | None) -> list[Tensor | None]:
    """Those of the examples ``start`` to ``stop``."""
    return [None if t is None else t[start:stop] for t in tensors]


def first_rows(X: Any, count: int, repeat: int = 1) -> Any:
    """The first ``count`` examples of X, repeated."""
    if isinstance(X, Tensor):
        return torch.cat([X[:count]] * repeat)
    if isinstance(X, Mapping):
        return {key: first_rows(x, count, repeat) for key, x in X.items()}
    return tuple(first_rows(x, count, repeat) for x in X)
