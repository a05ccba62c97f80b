"""Products on a device, recorded once and replayed: one launch in place of many (CUDA graphs).

Recorded are calls of the core alone, whose launches read and write memory by address: the tape's own, which stays where it is for the
tape's life, and what a recording holds on to. So a replay reads the parameters that the tape stands at now; only other inputs, which are
other memory, end the recordings. What torch computes around a call (damping, parameters computed from others, preconditioners) is launched
as ever.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

import influence_ext._C as _C
from influence_ext.checks import is_one_of
from influence_ext.errors import ArgumentError
from influence_ext.params import PRECISIONS, Precision

if TYPE_CHECKING:
    from influence_ext.losses import OutputHessian
    from influence_ext.plan import Plan

Graphs = Literal["auto", "always", "never"]
LIMIT = 16
"""Recordings that a tape keeps; of more, the least recently used goes."""
LAUNCH_SECONDS, LAUNCHES_A_NODE, LAUNCHES_A_CHAIN, LAUNCHES_A_STEP = 3e-6, 4, 2, 5
LAUNCHES_A_REPLAY = 3
OPERATIONS_A_SECOND = 1e13
WORKSPACE_BYTES = 64 * 2**20
"""What "auto" estimates with: a product, or a solver's step around it, is replayed if it has more launches than a replay with its copies in
and out, these take longer than the arithmetic, and the workspace is small."""

_log = logging.getLogger("influence_ext")


@dataclass(frozen=True, eq=False)
class Call:
    """A product ``[V, ...] -> [V, ...]`` by launches of the core alone.

    Attributes:
        key: calls of one tape with equal keys enqueue the same launches.
        run: enqueues them, and holds whatever they read.
    """

    key: Hashable
    run: Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class RecordableProduct:
    """``A v + damping·v`` as launches of the core, and where recordings of what contains it are kept."""

    call: Call
    damping: float
    recordings: Recordings


class Recordings:
    """What a tape's products have recorded, by what they enqueue, their sizes and their stream.

    A call runs as it is the first time, which also brings to the device what it needs there, is recorded the second time, and replayed from
    then on. Replays of one recording share its memory: they are enqueued one at a time, on the stream that they were recorded for.

    Attributes:
        mode: "auto", which goes back to ordinary launches (and says why at WARNING level, once) where a recording fails, or "always", which
            raises.
    """

    def __init__(self, mode: Graphs, pays: Callable[[int, int], bool]):
        """``pays(V, beside)``: whether a product onto V vectors with so many launches beside it is worth replaying."""
        self.mode = mode
        self._pays = pays
        self._refused = False
        self._moves = 0
        self._kept: OrderedDict[Hashable, Any] = OrderedDict()  # None: seen once, or taken
        self._lock = threading.RLock()
        self._busy = False  # a recording's memory is in use: by this thread, if it is asked with the lock, from a signal handler then

    def product(self, call: Call, v: Tensor) -> Tensor:
        """``call.run(v)``, by a replay if it is recorded; outside of autograd, as launches are."""
        v = v.detach()
        key = self._key(call.key, v)
        if key is None:
            return call.run(v)
        with self._lock:
            if self._busy:
                return call.run(v)
            self._busy = True
            try:
                seen, recorded = self._look_up(key)
                if recorded is None and seen:
                    recorded = self._made(lambda: _RecordedProduct(call, v))
                    self._keep(key, recorded)
                if recorded is not None:
                    product: Tensor = recorded(v)
                    return product
            finally:
                self._busy = False
        return call.run(v)

    def take(self, key: Hashable, v: Tensor, make: Callable[[], Any]) -> tuple[Hashable, Any]:
        """What :meth:`put` gave back under this key for vectors like v, or ``make()`` from the second time on; None: launch as ever.

        Returns:
            The full key, to give it back under, and what it is. Nobody else has it until then.
        """
        full = self._key(key, v, LAUNCHES_A_STEP)
        if full is None:
            return None, None
        with self._lock:
            if self._busy:
                return None, None
            self._busy = True
            try:
                seen, found = self._look_up(full)
                self._kept[full] = None
                return full, self._made(make) if found is None and seen else found
            finally:
                self._busy = False

    def put(self, key: Hashable, taken: Any) -> None:
        """Let others have it."""
        with self._lock:
            if key[0] == self._moves:  # type: ignore[index]  # else what it reads has moved meanwhile
                self._keep(key, taken)

    def clear(self) -> None:
        """Forget all, for what they read has moved."""
        with self._lock:
            self._kept.clear()
            self._moves += 1  # what somebody has taken is not found again

    def replays(self, V: int, beside: int = 0) -> bool:
        """Are products onto V vectors, with so many launches beside them, replayed from their second call on?"""
        return not self._refused and V > 0 and (self.mode == "always" or self._pays(V, beside))

    def num_launches(self) -> dict[tuple[Any, int], int]:
        """Launches of recorded products, by their call's key and the number of vectors."""
        with self._lock:
            return {kept.key: kept.num_launches for kept in list(self._kept.values()) if isinstance(kept, _RecordedProduct)}

    def _key(self, key: Hashable, v: Tensor, beside: int = 0) -> Hashable:
        """None where a call is not to be recorded: also while somebody else records the stream."""
        if not self.replays(v.shape[0], beside):
            return None
        stream = _C.recordable_stream(v.device)
        return None if stream is None else (self._moves, key, v.shape, stream)

    def _look_up(self, key: Hashable) -> tuple[bool, Any]:
        seen, found = key in self._kept, self._kept.get(key)
        self._keep(key, found)
        return seen, found

    def _keep(self, key: Hashable, what: Any) -> None:
        self._kept[key] = what
        self._kept.move_to_end(key)
        while len(self._kept) > LIMIT:
            self._kept.popitem(last=False)

    def _made(self, make: Callable[[], Any]) -> Any:
        if self._refused:
            return None
        try:
            with torch.inference_mode(False):  # its buffers are written again, inside or outside of it
                return make()
        except (RuntimeError, MemoryError) as reason:
            if self.mode == "always":
                raise
            self._refused = True
            _log.warning("products are launched one kernel at a time, since they could not be recorded as a graph: %s", reason)
            return None


class _RecordedProduct:
    """A call on an operand and a result of its own."""

    def __init__(self, call: Call, v: Tensor):
        self._call = call
        self._operand = v.clone()
        self._graph = _C.Graph(v.device, self._enqueue)
        self.key = (call.key, len(v))
        self.num_launches = self._graph.num_launches

    def _enqueue(self) -> None:
        self._result = self._call.run(self._operand)

    def __call__(self, v: Tensor) -> Tensor:
        self._operand.copy_(v)
        self._graph.replay()
        return self._result.clone()


class ReplayedTape:
    """A tape of the extension whose products are replayed; it has that one's methods, so nothing above knows the difference."""

    def __init__(self, native: Any, recordings: Recordings, precision: int):
        self._native, self.recordings, self.precision = native, recordings, precision

    def __getattr__(self, name: str) -> Any:
        """What does not run again and again is the tape's own."""
        return getattr(self._native, name)

    def at_precision(self, precision: int) -> ReplayedTape:
        """The same point, whose products multiply otherwise; recordings are kept together, since they end together."""
        return ReplayedTape(self._native.at_precision(precision), self.recordings, precision)

    def set_schedule(self, choice: Any) -> None:
        """What is recorded was scheduled otherwise."""
        self.recordings.clear()
        self._native.set_schedule(choice)

    def rebind(self, inputs: list[Tensor]) -> None:
        """Other examples, in other memory."""
        self.recordings.clear()
        self._native.rebind(inputs)

    def call(self, method: str, *arguments: Any) -> Call:
        """``method(v, *arguments)`` for any v; tensors among the arguments are known by their memory, which the call holds."""
        run = getattr(self._native, method)
        known = tuple(a.data_ptr() if isinstance(a, Tensor) else a for a in arguments)
        return Call((method, self.precision, known), lambda v: run(v, *arguments))

    def jvp(self, v: Tensor) -> Tensor:
        """``[V, P] -> [V, N, C]``."""
        return self.recordings.product(self.call("jvp"), v)

    def vjp(self, g: Tensor) -> Tensor:
        """``[V, N, *out] -> [V, P]``."""
        return self.recordings.product(self.call("vjp"), g)

    def ggn(self, v: Tensor, *hessian: Any) -> Tensor:
        """``[V, P] -> [V, P]``."""
        return self.recordings.product(self.call("ggn", *hessian), v)

    def hvp(self, v: Tensor, *hessian: Any) -> Tensor:
        """``[V, P] -> [V, P]``."""
        return self.recordings.product(self.call("hvp", *hessian), v)


class Replayable:
    """What a :class:`~influence_ext.tape.Tape` has to do with graphs."""

    plan: Plan
    precision: Precision
    _native: Any
    _at_point: Any

    def replayed(self, graphs: Graphs, budgeted: bool = False) -> None:
        """Record and replay products from now on where ``graphs`` says so.

        Args:
            graphs: "auto": on a device, if launches take longer than arithmetic; "always": at any size, and what cannot be is an error;
                "never".
            budgeted: whether memory is limited, which "auto" then leaves to products.

        Raises:
            ArgumentError: another word, or "always" where products cannot be recorded.
        """
        who = self.plan._who
        if not is_one_of(graphs, get_args(Graphs)):
            raise ArgumentError(f"{who}: expected graphs among {', '.join(get_args(Graphs))}, got {graphs!r}; choose one.")
        if graphs == "never" or (graphs == "auto" and budgeted):
            return
        obstacle = self._obstacle()
        if obstacle is None:
            recordings = Recordings(graphs, functools.partial(_pays, self.plan, self._native))
            self._native = ReplayedTape(self._native, recordings, PRECISIONS[self.precision])
        elif graphs == "always":
            raise ArgumentError(f'{who}: expected products that can be recorded with graphs="always", got {obstacle}; use graphs="auto".')

    @property
    def graphs(self) -> Graphs:
        """How its products are launched."""
        return self._native.recordings.mode if isinstance(self._native, ReplayedTape) else "never"

    def recordable(self, method: Literal["ggn", "hvp"], hessian: OutputHessian | None, damping: float) -> RecordableProduct | None:
        """``A v + damping·v`` for what records more than a product; None if torch takes part in it, or nothing is to be recorded."""
        if not isinstance(self._native, ReplayedTape) or self.plan.has_derived_parameters or (hessian is not None and not hessian.native):
            return None
        return RecordableProduct(self._at_point.call(method, *self.as_native(hessian)), damping, self._native.recordings)

    def as_native(self, hessian: OutputHessian | None) -> tuple[int, float, Tensor | None, Tensor | None]:
        """What the core takes for a native Hessian, or for none."""
        if hessian is None:
            return 0, 0.0, None, None
        state = hessian.state
        if state is not None and not self.plan.output_is_transposed:
            state = state.contiguous()  # one made of outputs in another order in memory
        return hessian.shape, hessian.scale, state, hessian.weights

    def launches(self, V: int) -> str:
        """How a product onto V vectors is launched, in words; empty where there is nothing to choose."""
        if not isinstance(self._native, ReplayedTape):
            return ""
        recordings = self._native.recordings
        if not recordings.replays(V):
            return ", launched kernel by kernel"
        precision = self._native.precision
        counts = [count for (call, size), count in recordings.num_launches().items() if size == V and call[1] == precision]
        return ", replayed as a graph" + (f" of {max(counts)} launches" if counts else " from the second call on")

    def _obstacle(self) -> str | None:
        """Why products cannot be recorded."""
        device = self.plan.space.device
        if getattr(self._native, "chunk", None) is not None:
            return "a forward state that a memory budget has recomputed in every product"
        generic = [node.name for node in self.plan.graph.nodes if node.operator is not None]
        if generic:
            return f"nodes that run in torch ({', '.join(generic[:3])}{', ...' if len(generic) > 3 else ''})"
        return f"tensors on {device}, where nothing is launched" if _C.recordable_stream(device) is None else None


def _pays(plan: Plan, native: Any, V: int, beside: int) -> bool:
    nodes = plan.graph.nodes
    operations = 4.0 * native.num_examples * V * sum(node.operations for node in nodes)
    by_example, _, _ = native.tiling(V)  # a chain in one kernel
    launches = beside + (LAUNCHES_A_CHAIN if by_example else LAUNCHES_A_NODE * len(nodes))
    is_small = operations / OPERATIONS_A_SECOND < launches * LAUNCH_SECONDS and native.workspace_bytes(V) <= WORKSPACE_BYTES
    return is_small and launches > LAUNCHES_A_REPLAY
