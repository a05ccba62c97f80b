"""Plan: a captured network on the C++ executor."""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import influence_ext._C as _C
from influence_ext.capture import CapturedGraph, capture, format_table, named_tensors, plan_key, remembered
from influence_ext.checks import is_iterable
from influence_ext.chunks import ChunkedTape, first_rows, free_bytes
from influence_ext.context import exclusive
from influence_ext.data import Examples, StreamedExamples
from influence_ext.derived import DerivedParameters
from influence_ext.ensemble import Ensemble
from influence_ext.errors import ArgumentError, DataError, DeviceError, DTypeError, ShapeError, UnsupportedModelError
from influence_ext.losses import Loss
from influence_ext.params import ParameterSpace, Precision, Selection, check_precision, is_half, widened
from influence_ext.tape import SCHEDULES, Tape


class Plan:
    """The structure of a network as nodes with C++ rules, and the parameters that are differentiated.

    Attributes:
        space: layout of the flat vectors ``[P]``.
        graph: the captured nodes.
        output_shape: of one example, ``*out``.
        slot_offsets: where each slot of the graph begins in the vectors that nodes see; −1 if it is not differentiated.
        parameters_read: those of ``space.names`` that the output is computed from.
    """

    _model: nn.Module
    _who = "Plan"

    def __init__(self, model: nn.Module, graph: CapturedGraph, space: ParameterSpace):
        self.space = space
        self.graph = graph
        self.output_shape = graph.output_shape
        self._model = model
        self._half = is_half(model)
        offsets = dict(zip(space.names, space.offsets, strict=True))
        self._derived = DerivedParameters.of(graph.slots, space)
        slots = []
        for index, slot in enumerate(graph.slots):
            name = space.aliases.get(slot.name, slot.name)
            offset = offsets.get(name, -1) if slot.kind == "parameter" else -1
            offset += (slot.begin or 0) * (offset >= 0)
            if self._derived is not None:
                offset = self._derived.offsets.get(index, offset)
            slots.append((math.prod(slot.shape), offset))
        self.slot_offsets = [offset for _, offset in slots]
        read = {name for node in graph.nodes for index in node.slots if index >= 0 for name in graph.slots[index].names()}
        self.parameters_read = frozenset(map(space.canonical, read)).intersection(space.names)
        aliases = [-1] * graph.num_values
        nodes = []
        for node in graph.nodes:
            if node.rule == "view":
                aliases[node.output] = node.inputs[0]
                continue
            fields = ("rule", "name", "inputs", "output", "slots", "ints", "floats", "lists", "width", "operator")
            nodes.append({field: getattr(node, field) for field in fields})
        widths = [math.prod(shape) for shape in graph.prologue.shapes]
        kind = _C.Plan32 if space.dtype == torch.float32 else _C.Plan64
        size = space.num_parameters if self._derived is None else self._derived.num_parameters
        self._compile = functools.partial(kind, nodes, slots, widths, aliases, graph.output, size)
        self._natives: dict[tuple[bool, bool], Any] = {}
        if not self._native.output_depends_on_parameters:
            raise UnsupportedModelError(
                f"{graph.model_name}: expected an output that depends on a trainable parameter, got none among "
                f"{space.describe()}; train a parameter that the forward pass reads."
            )

    @classmethod
    def of(cls, model: nn.Module, X: Any, params: Selection | None = None, who: str = "Plan") -> Plan:
        """Capture ``model`` as it behaves in evaluation mode.

        Args:
            model: not modified.
            X: example input (a tensor, a tuple or a dict of tensors); shapes and dtypes count, values do not.
            params: see :meth:`ParameterSpace.of`.
            who: the caller's name for messages.

        Raises:
            UnsupportedModelError: operators without a rule (all of them are listed) or a model that torch.export cannot trace.
            ArgumentError, DTypeError, DeviceError, DataError: see :meth:`ParameterSpace.of`.

        Cost: one ``torch.export`` the first time a structure is seen (about a second; a recurrent layer: about 25 ms a step); half a
        millisecond the first time for another model of that structure, or after a change to it; microseconds for an unchanged model.
        """
        if isinstance(params, Iterable) and not isinstance(params, (str, Tensor)):
            items: Iterable[Any] = params if is_iterable(params) else (params,)
            params = tuple(items)
        with exclusive:
            key = plan_key(X, params)
            plan = None if key is None else cls._remembered(model, key)
            if plan is None:
                space = ParameterSpace.of(model, params, who)
                plan = cls(model, capture(model, X, trainable=space.names, who=who), space)
                if key is not None:
                    remembered.keep(model, key, {name: value for name, value in plan.__dict__.items() if name != "_model"})
            plan._who = who
        return plan

    @classmethod
    def _remembered(cls, model: nn.Module, key: Hashable) -> Plan | None:
        """The plan made of this model before, if nothing that it depends on has changed since."""
        attributes = remembered.find(model, key)
        if attributes is None:
            return None
        plan = object.__new__(cls)
        plan.__dict__.update(attributes)
        plan._model = model
        return plan

    def linearize(
        self,
        X: Any,
        theta: Tensor | None = None,
        *,
        memory_budget: int | None = None,
        second_order: bool = False,
        precision: Precision = "full",
    ) -> Tape:
        """The forward pass at ``theta`` and all that products need.

        Args:
            X: inputs of N examples, the structure the plan was captured with, or ``Examples``.
            theta: ``[P]``; by default the model's own parameters at this moment. Frozen parameters and buffers are read now.
            memory_budget: bytes that the forward state and one product's workspace may take, at most three quarters of those that a
                CUDA device has left. What does not fit is recomputed in every product, a chunk of examples at a time; a schedule that
                takes more than it runs by operator.
            second_order: also keep what ``Tape.hvp`` needs.
            precision: how products multiply float32 matrices, see :meth:`Tape.at_precision`.

        Raises:
            ShapeError, DTypeError, DeviceError: inputs or theta do not fit.
            DataError: outputs are not finite.
            ArgumentError: not even one example fits the budget; a precision that the device has not.
            MemoryError: the forward state does not fit; for a CUDA device it names a budget that does, and its chunks. With a budget: not
                even one example fits what the device has free.

        Cost: one forward pass; memory ``Tape.cached_bytes``.
        """
        with exclusive:
            check_precision(precision, self.space, self._who)
            try:
                return self._linearize(X, theta, memory_budget, second_order).at_precision(precision)
            except MemoryError as error:
                shortage = error.with_traceback(None)  # whose frames hold what was allocated so far
            raise shortage if memory_budget is not None else self._with_chunk(shortage, X, self._compiled(second_order))

    def _linearize(self, X: Any, theta: Tensor | None, memory_budget: int | None, second_order: bool) -> Tape:
        tensors = named_tensors(self._model)
        theta = self.space.gather(tensors, self._who) if theta is None else self._copied(theta)
        native = self._second_order_native if second_order else self._native
        curved = tuple(native.curved_nodes) if second_order else None
        examples = X if isinstance(X, Examples) else None
        if memory_budget is None and isinstance(examples, StreamedExamples):
            memory_budget = examples.memory_budget
        if examples is None and memory_budget is not None:
            examples = Examples.of_inputs(X)
        if examples is not None and examples.num_examples == 0:
            memory_budget = None  # nothing to recompute
        make = functools.partial(self._make, native, shortcuts=memory_budget is None)
        if memory_budget is None:
            return Tape(self, make(self._inputs(X if examples is None else examples.X, tensors)), theta, tensors, curved)
        assert examples is not None
        room, budget = self._room(), int(memory_budget)
        chunk = self._chunk(native, examples, budget, room)
        budget = budget if room is None else min(budget, room)
        if chunk >= examples.num_examples and examples.resident:
            tape = Tape(self, make(self._inputs(examples.X, tensors)), theta, tensors, curved)
        else:
            tape = Tape(self, ChunkedTape(make, self._inputs, examples.blocks, examples.num_examples, chunk), theta, tensors, curved)
        if _taken(tape) > budget:
            tape.set_schedule("by_operator")  # the sums of each thread, or of a chain's blocks in one kernel, take more
        return tape

    def ensemble(self, examples: Examples, loss: Loss) -> Ensemble | None:
        """The network at several parameter sets that take training steps on batches of ``examples``.

        None where a step needs torch: for a node without a native rule, a parameter that is computed from others, a loss without kernels.
        Frozen parameters and buffers are read now. Cost: the prologue on all examples.
        """
        if self._derived is not None or any(node.operator is not None for node in self.graph.nodes):
            return None
        one = torch.zeros(1, *self.output_shape, dtype=self.space.dtype, device=self.space.device)
        if loss.as_kernel(one, examples.targets[:1]) is None:
            return None
        tensors = named_tensors(self._model)
        inputs, constants = self._inputs(examples.X, tensors), self._constants(tensors)
        return Ensemble(self._native, inputs, constants, self.output_shape, loss, examples.targets)

    def _copied(self, theta: Tensor) -> Tensor:
        """A copy of a user's θ, checked."""
        space = self.space
        if theta.shape != (space.num_parameters,):
            raise ShapeError(
                f"Tape: expected theta of shape [P] = [{space.num_parameters}], got {list(theta.shape)}; parameters: {space.describe()}."
            )
        if theta.dtype != space.dtype:
            raise DTypeError(f"Tape: expected theta of dtype {space.dtype}, got {theta.dtype}; convert it with .to({space.dtype}).")
        return theta.detach().clone(memory_format=torch.contiguous_format)

    @property
    def has_derived_parameters(self) -> bool:
        """Whether nodes read expressions of trained parameters."""
        return self._derived is not None

    @property
    def output_is_transposed(self) -> bool:
        """Whether the network ends by moving its innermost axis to the front, which products may leave out.

        Not where a reshape behind that makes another axis of it: classes of a loss would be others then.
        """
        shape, classes = self.output_shape, self._native.untransposed_classes
        return len(shape) > 1 and shape[0] == classes

    @property
    def _on_device(self) -> bool:
        """Whether tapes are on a device now: the parameters', or an emulated one in its place."""
        return self.space.device.type != "cpu" or _C.emulates_device()

    @property
    def _native(self) -> Any:
        return self._compiled(second_order=False)

    @property
    def _second_order_native(self) -> Any:
        return self._compiled(second_order=True)

    def _compiled(self, second_order: bool) -> Any:
        """The extension's plan for where tapes are now."""
        key = second_order, self._on_device
        if key not in self._natives:
            self._natives[key] = self._compile(second_order=second_order, on_device=self._on_device)
        return self._natives[key]

    def _make(self, native: Any, sources: list[Tensor], shortcuts: bool = False) -> Any:
        """A tape of the extension."""
        tape = (_C.Tape32 if self.space.dtype == torch.float32 else _C.Tape64)(native, sources)
        tape.set_shortcuts(shortcuts)
        return tape

    def _room(self) -> int | None:
        """Bytes for a forward state and workspace on a CUDA device: a quarter of what is free is left to vectors and results."""
        free = free_bytes(self.space.device)
        return None if free is None else free * 3 // 4

    def _bytes(self, native: Any, examples: Examples) -> tuple[int, int]:
        """Of the forward state and the workspace of a product onto one vector: what is taken in any case, and by each example.

        By operator, where all examples are one tile: both grow in proportion, and the vector is packed a node at a time.
        """
        one, two = (self._taken_by_operator(native, examples, count) for count in (1, 2))
        return 2 * one - two, two - one

    def _taken_by_operator(self, native: Any, examples: Examples, count: int) -> int:
        """By so many examples; by the first one as often where they are not in memory, or not so many."""
        whole = examples.resident and count <= examples.num_examples
        _, X = next(examples.blocks(count if whole else 1))
        tape = self._make(native, self._inputs(X if whole else first_rows(X, 1, repeat=count)))
        tape.set_schedule(SCHEDULES["by_operator"])
        return _taken(tape)

    def _chunk(self, native: Any, examples: Examples, budget: int, room: int | None) -> int:
        """Examples whose forward state and workspace, for one vector, take at most ``budget`` bytes, and ``room`` if that is less."""
        fixed, each = self._bytes(native, examples)
        if room is not None and fixed + each > room:
            raise MemoryError(
                f"{self.graph.model_name}: expected {fixed + each} bytes on {self.space.device} for the weights and one example, got "
                f"{room}, three quarters of those that are free there; free memory on the device or move the model to another."
            )
        if fixed + each > budget:
            several = 64 if room is None else min(64, (room - fixed) // each)
            raise ArgumentError(
                f"{self.graph.model_name}: expected memory_budget to hold at least one example, got {budget} bytes where the weights take "
                f"{fixed} and an example {each}; raise it to {fixed + several * each} for chunks of {several} examples."
            )
        budget = budget if room is None else min(budget, room)
        chunk = min(examples.most_at_once, (budget - fixed) // each)
        while chunk > 1:  # in several tiles the whole vector is packed at once
            excess = self._taken_by_operator(native, examples, chunk) - budget
            if excess <= 0:
                break
            chunk = max(1, chunk - -(-excess // each))
        return chunk

    def _with_chunk(self, shortage: MemoryError, X: Any, native: Any) -> MemoryError:
        """The same with the examples that do fit; as it is where that is not known."""
        room = self._room()
        examples = X if isinstance(X, Examples) else Examples.of_inputs(X)
        if room is None or isinstance(examples, StreamedExamples):
            return shortage
        try:
            fixed, each = self._bytes(native, examples)
        except MemoryError:
            return shortage
        chunk = min(examples.num_examples, (room - fixed) // each)
        if chunk < 1:
            return shortage
        return MemoryError(
            f"{str(shortage).removesuffix('.')}; memory_budget={fixed + chunk * each} holds {chunk} of {examples.num_examples} examples "
            "at a time and fits what is free."
        )

    def report(self, second_order: bool = False) -> str:
        """A table of the nodes and the rule that runs each, in a tape for second-order products or another."""
        fused = set((self._second_order_native if second_order else self._native).fused_nodes)
        table = format_table(self.graph, notes=dict.fromkeys(fused, "fused into the product before it"))
        if self._half:
            table += "\nhalf precision: parameters and inputs are read as they are, all between is float32 without the model's roundings"
        return table

    def _inputs(self, X: Any, state: Mapping[str, Tensor] | None = None) -> list[Tensor]:
        """The plan's inputs for inputs as the user gives them; ``state`` by name, if the caller has looked it up."""
        tensors = [X] if isinstance(X, Tensor) else list(X.values() if isinstance(X, Mapping) else X)
        graph = self.graph
        if len(tensors) != graph.num_inputs:
            raise ShapeError(f"{graph.model_name}: expected {graph.num_inputs} input tensors, got {len(tensors)}; pass X as captured.")
        inputs = []
        for name, shape, dtype, x in zip(graph.input_names, graph.input_shapes, graph.input_dtypes, tensors, strict=True):
            if self._half:
                x = widened(x)
            if x.dim() == 0 or x.shape[1:] != shape:
                raise ShapeError(
                    f"{graph.model_name}: expected {name} of shape [N, {', '.join(map(str, shape))}], got {list(x.shape)}; "
                    "pass examples of one shape."
                )
            if len(x) != len(tensors[0]):
                raise ShapeError(
                    f"{graph.model_name}: expected as many examples in {name} as in {graph.input_names[0]}, {len(tensors[0])}, "
                    f"got {len(x)}; pass one row of each an example."
                )
            if x.dtype != dtype:
                raise DTypeError(
                    f"{graph.model_name}: expected {name} of dtype {dtype} as captured, got {x.dtype}; convert it with .to({dtype})."
                )
            if x.device != self.space.device:
                raise DeviceError(
                    f"{graph.model_name}: expected {name} on the parameters' device {self.space.device}, got {x.device}; "
                    f"move it with .to('{self.space.device}')."
                )
            inputs.append(x.detach())
        if state is None:
            state = named_tensors(self._model) if graph.prologue.reads_model else {}
        return self._sources(inputs, state)

    def _sources(self, inputs: list[Tensor], state: Mapping[str, Tensor]) -> list[Tensor]:
        """What the prologue makes of the inputs, as numbers of the network's dtype."""
        sources = []
        graph = self.graph
        results = graph.prologue.compute(inputs, state)
        for name, source in zip(graph.prologue.names, results, strict=True):
            if not source.is_floating_point() and source.dtype != torch.bool and self.space.dtype == torch.float32 and source.numel():
                largest = int(source.abs().max())
                if largest > 2**24:
                    raise DataError(
                        f"{graph.model_name}: expected integers up to 2^24 in {name}, which float32 holds exactly, got {largest}; use a "
                        "float64 model or smaller numbers."
                    )
            sources.append(source.to(self.space.dtype).contiguous())
        return sources

    def _constants(self, tensors: Mapping[str, Tensor]) -> list[Tensor | None]:
        """Values of the slots that are not differentiated; None for the others."""
        dtype, slots = self.space.dtype, zip(self.graph.slots, self.slot_offsets, strict=True)
        return [None if offset >= 0 else slot.read(tensors).to(dtype).contiguous() for slot, offset in slots]


def _taken(tape: Any) -> int:
    """Bytes of a tape's forward state and of the workspace of a product onto one vector."""
    return int(tape.cached_bytes + tape.workspace_bytes(1))
