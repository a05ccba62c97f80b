"""Plan and Tape: a captured network on the C++ executor."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Hashable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

import influence_ext._C as _C
from influence_ext.capture import CapturedGraph, capture, format_table, named_tensors, plan_key, remembered
from influence_ext.chunks import ChunkedTape, first_rows
from influence_ext.context import about_to_start_threads, exclusive
from influence_ext.data import Examples, StreamedExamples
from influence_ext.derived import DerivedFactors, DerivedParameters, DerivedPoint
from influence_ext.ensemble import Ensemble
from influence_ext.errors import ArgumentError, DataError, DeviceError, DTypeError, ShapeError, UnsupportedModelError
from influence_ext.finite import all_finite
from influence_ext.graphs import Replayable
from influence_ext.losses import Loss, OutputHessian
from influence_ext.params import PRECISIONS, ParameterSpace, Precision, Selection, check_precision, is_half, widened

Schedule = Literal["auto", "by_example", "by_operator"]
_SCHEDULES: dict[str, int] = {"auto": 0, "by_example": 1, "by_operator": 2}


class Plan:
    """The structure of a network as nodes with C++ rules, and the parameters that are differentiated.

    Attributes:
        space: layout of the flat vectors ``[P]``.
        graph: the captured nodes.
        output_shape: of one example, ``*out``.
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
            if self._derived is not None:
                offset = self._derived.offsets.get(index, offset)
            slots.append((math.prod(slot.shape), offset))
        self.is_trained = [offset >= 0 for _, offset in slots]
        read = {name for node in graph.nodes for index in node.slots for name in graph.slots[index].names()}
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
        self._native = self._compile()
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

        Cost: one ``torch.export`` the first time a structure is seen (about a second); half a millisecond the first time for another model
        of that structure, or after a change to it; microseconds for an unchanged model.
        """
        if params is not None and not isinstance(params, (str, Tensor)):
            params = tuple(params)
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
            memory_budget: bytes that the forward state and one product's workspace may take. What does not fit is recomputed
                in every product, a chunk of examples at a time.
            second_order: also keep what ``Tape.hvp`` needs.
            precision: how products multiply float32 matrices, see :meth:`Tape.at_precision`.

        Raises:
            ShapeError, DTypeError, DeviceError: inputs or theta do not fit.
            DataError: outputs are not finite.
            ArgumentError: not even one example fits the budget; a precision that the device has not.

        Cost: one forward pass; memory ``Tape.cached_bytes``.
        """
        with exclusive:
            check_precision(precision, self.space, self._who)
            return self._linearize(X, theta, memory_budget, second_order).at_precision(precision)

    def _linearize(self, X: Any, theta: Tensor | None, memory_budget: int | None, second_order: bool) -> Tape:
        tensors = named_tensors(self._model)
        theta = self.space.gather(tensors, self._who) if theta is None else self._copied(theta)
        native = self._second_order_native if second_order else self._native
        make = functools.partial(self._make, native)
        curved = tuple(native.curved_nodes) if second_order else None
        examples = X if isinstance(X, Examples) else None
        if memory_budget is None and isinstance(examples, StreamedExamples):
            memory_budget = examples.memory_budget
        if memory_budget is None:
            return Tape(self, make(self._inputs(X if examples is None else examples.X, tensors)), theta, tensors, curved)
        if examples is None:
            examples = Examples.of_inputs(X)
        chunk = self._chunk(native, examples, memory_budget)
        if chunk >= examples.num_examples and examples.resident:
            return Tape(self, make(self._inputs(examples.X, tensors)), theta, tensors, curved)
        return Tape(self, ChunkedTape(make, self._inputs, examples.blocks, examples.num_examples, chunk), theta, tensors, curved)

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

    @functools.cached_property
    def _second_order_native(self) -> Any:
        return self._compile(second_order=True)

    def _make(self, native: Any, sources: list[Tensor]) -> Any:
        """A tape of the extension."""
        kind = _C.Tape32 if self.space.dtype == torch.float32 else _C.Tape64
        return kind(native, sources)

    def _chunk(self, native: Any, examples: Examples, budget: int) -> int:
        """Examples whose forward state and workspace, for one vector, take at most ``budget`` bytes."""
        _, first = next(examples.blocks(2))
        one = self._make(native, self._inputs(first_rows(first, 1)))
        two = self._make(native, self._inputs(first_rows(first, 1, repeat=2)))
        each = two.cached_bytes - one.cached_bytes + native.sweep_width * self.space.dtype.itemsize
        fixed = 2 * one.cached_bytes - two.cached_bytes
        if fixed + each > budget:
            raise ArgumentError(
                f"{self.graph.model_name}: expected memory_budget to hold at least one example, got {budget} bytes where the weights take "
                f"{fixed} and an example {each}; raise it to {fixed + 64 * each} for chunks of 64 examples."
            )
        return int(min(examples.num_examples, (budget - fixed) // each))

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
            if x.shape[1:] != shape:
                raise ShapeError(
                    f"{graph.model_name}: expected {name} of shape [N, {', '.join(map(str, shape))}], got {list(x.shape)}; "
                    "pass examples of one shape."
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
        dtype, slots = self.space.dtype, zip(self.graph.slots, self.is_trained, strict=True)
        return [None if is_trained else slot.read(tensors).to(dtype).contiguous() for slot, is_trained in slots]


class Tape(Replayable):
    """A network linearised at θ on N examples. Made by :meth:`Plan.linearize`.

    Attributes:
        plan: where it came from.
        num_examples: N.
        theta: ``[P]``, the parameters it stands at.
        precision: how its products multiply float32 matrices.
        curved_nodes: nodes with a second-order term; None if the tape was not made for second-order products.
    """

    def __init__(self, plan: Plan, native: Any, theta: Tensor, tensors: Mapping[str, Tensor], curved_nodes: tuple[str, ...] | None):
        about_to_start_threads()
        self.plan = plan
        self.curved_nodes = curved_nodes
        self.precision: Precision = "full"
        self._constants = plan._constants(tensors)
        self._native = native
        self._derived: DerivedPoint | None = None
        self.num_examples: int = native.num_examples
        self._move_to(theta)

    def at_precision(self, precision: Precision) -> Tape:
        """The same point, state shared, whose products multiply float32 matrices otherwise; valid until either is moved.

        "bfloat16" rounds both factors to 8 bits, an error of up to 2⁻⁹ each, "tf32", on a CUDA device, to 11; sums are float32. The point
        itself (outputs, derivatives, kept cotangents) is always computed in full.

        Raises:
            ArgumentError: another word, or a precision that the device or the data type has not.
        """
        check_precision(precision, self.plan.space, self.plan._who)
        if precision == self.precision:
            return self
        other = copy.copy(self)
        other.precision, other._native = precision, self._native.at_precision(PRECISIONS[precision])
        return other

    def relinearize(self, theta: Tensor, X: Any = None) -> None:
        """Move to another θ ``[P]``, and to other examples; memory is reused, factors and cotangents made before become invalid.

        Args:
            theta: ``[P]``.
            X: inputs of as many examples, in the structure that the plan was captured with; None: the same as before.

        Raises:
            ShapeError, DTypeError, DeviceError: theta is not ``[P]`` of the plan's dtype; X does not fit.
            ArgumentError: X for a tape that a memory budget has recompute its forward state.
        """
        theta = self.plan._copied(theta)
        if X is not None:
            if self.chunk is not None:
                raise ArgumentError("Tape: expected no other inputs for a tape that is recomputed in chunks, got some; linearize anew.")
            sources, N = self.plan._inputs(X), self.num_examples
            if sources[0].shape[0] != N:
                raise ShapeError(f"Tape: expected inputs of {N} examples, got {sources[0].shape[0]}; linearize another number anew.")
            self._native.rebind(sources)
        self._move_to(theta)

    def _move_to(self, theta: Tensor) -> None:
        plan = self.plan
        self.theta = theta
        values = self._constants
        if plan._derived is not None:
            self._derived = plan._derived.at(plan.space.unflatten(theta), named_tensors(plan._model))
            values = [self._derived.values.get(slot, value) for slot, value in enumerate(values)]
        self._native.linearize(values, theta)
        self._outputs: Tensor | None = None
        self._has_cotangents = False
        self._gradient: Tensor | None = None  # of what keep_cotangents was given, in θ̃, if there are derived parameters

    @property
    def outputs(self) -> Tensor:
        """``[N, *out]``, the network's outputs (a copy, made once)."""
        if self._outputs is None:
            self._outputs = self._native.outputs().view(self.num_examples, *self.plan.output_shape)
        return self._outputs

    @property
    def cached_bytes(self) -> int:
        """Memory the tape holds for products."""
        return int(self._native.cached_bytes)

    @property
    def chunk(self) -> int | None:
        """Examples at a time, if a memory budget has it recompute the forward state; None if that is resident."""
        return self._native.chunk if isinstance(self._native, ChunkedTape) else None

    def workspace_bytes(self, num_vectors: int) -> int:
        """Memory one product onto V vectors takes beyond operand and result."""
        return int(self._native.workspace_bytes(num_vectors))

    def set_schedule(self, schedule: Schedule) -> None:
        """Force how products run over examples: ``"by_example"``, ``"by_operator"`` or ``"auto"`` (by size).

        Raises:
            ArgumentError: another word.
        """
        if schedule not in _SCHEDULES:
            raise ArgumentError(f"Tape: expected a schedule among {', '.join(_SCHEDULES)}, got {schedule!r}; choose one.")
        self._native.set_schedule(_SCHEDULES[schedule])

    def schedule(self, num_vectors: int) -> str:
        """How a product onto V vectors runs, in words."""
        by_example, tile, threads = self._native.tiling(num_vectors)
        name = "by example" if by_example else "by operator"
        if self.chunk is not None:
            name = f"recomputed in chunks of {self.chunk} examples, {name}"
        return f"{name}, tiles of {tile} examples, {threads} thread{'s' if threads > 1 else ''}"

    def jvp(self, V: Tensor) -> Tensor:
        """``J_n v``: ``[V, P] -> [V, N, *out]``. Cost: one tangent sweep for all V."""
        out: Tensor = self._native.jvp(self._push(V))
        return out.view(V.shape[0], self.num_examples, *self.plan.output_shape)

    def vjp(self, G: Tensor) -> Tensor:
        """``Σ_n J_nᵀ g[v, n]``: ``[V, N, *out] -> [V, P]``. Cost: one cotangent sweep for all V."""
        return self._pull(self._native.vjp(G.contiguous()))

    def ggn(self, V: Tensor, hessian: OutputHessian) -> Tensor:
        """``Σ_n J_nᵀ (w_n H_n) J_n v``: ``[V, P] -> [V, P]``. Cost: one tangent and one cotangent sweep for all V.

        A Hessian that is not native takes ``V·N·C`` more memory, twice.
        """
        if not hessian.native:
            return self.vjp(hessian.matmat(self.jvp(V)))
        return self._pull(self._native.ggn(self._push(V), hessian.shape, hessian.scale, hessian.state, hessian.weights))

    def keep_cotangents(self, G: Tensor) -> None:
        """Fix the cotangents ``g [N, *out]`` of the outputs for :meth:`hvp`, until ``relinearize``.

        Raises:
            ArgumentError: the tape was not made with ``second_order=True``.

        Cost: one cotangent sweep; two if parameters are computed from others.
        """
        if self.curved_nodes is None:
            raise ArgumentError("Tape: expected a tape for second-order products, got another; linearize with second_order=True.")
        self._native.keep_cotangents(G.contiguous())
        self._has_cotangents = True
        self._gradient = None if self._derived is None else self._native.vjp(G[None].contiguous())[0]

    def hvp(self, V: Tensor, hessian: OutputHessian | None) -> Tensor:
        """``∇²_θ(Σ_n g_nᵀ f_n) v + Σ_n J_nᵀ (w_n H_n) J_n v``: ``[V, P] -> [V, P]`` at the cotangents that are kept; None: without the H_n.

        Raises:
            ArgumentError: :meth:`keep_cotangents` was not called since the last ``relinearize``.

        Cost: one tangent and one cotangent sweep for all V, in which every curved node costs about one vjp more. A Hessian that is not
        native takes a tangent and a cotangent sweep more.
        """
        if not self._has_cotangents:
            raise ArgumentError("Tape.hvp: expected the outputs' cotangents, got none at this point; call keep_cotangents first.")
        pushed = self._push(V)
        native = hessian is not None and hessian.native
        state = (hessian.shape, hessian.scale, hessian.state, hessian.weights) if native else (0, 0.0, None, None)  # type: ignore[union-attr]
        product = self._native.hvp(pushed, *state)
        if hessian is not None and not native:
            tangents = self._native.jvp(pushed).view(V.shape[0], self.num_examples, *self.plan.output_shape)
            product += self._native.vjp(hessian.matmat(tangents).contiguous())
        if self._derived is None or self._gradient is None or V.shape[0] == 0:
            return self._pull(product)
        return self._pull(product).add_(self._derived.second_order(self._gradient, V))

    def factors(self, G: Tensor) -> Any:
        """Per-example gradients ``J_nᵀ g[v, n]`` for ``G [V, N, *out]``, as factors.

        Methods: ``materialise``, ``dots``, ``square_norms``, ``square_norms_by_parameter``, ``square_sum``, ``gram``, ``outer_products``.
        They read the tape when they are called. Cost: one cotangent sweep each; factors are held for a tile of examples, by ``gram`` and
        ``outer_products`` for all: V·N times the widths of the trainable nodes.
        """
        factors = self._native.factors(G.contiguous())
        return factors if self._derived is None else DerivedFactors(factors, self._derived)

    def _push(self, V: Tensor) -> Tensor:
        return V if self._derived is None else self._derived.push(V)

    def _pull(self, G: Tensor) -> Tensor:
        return G if self._derived is None else self._derived.pull(G)

    def check_outputs(self, who: str) -> None:
        """Raise if an output is not finite.

        Raises:
            DataError: names the first such example.
        """
        if not all_finite(self.outputs):
            finite = torch.isfinite(self.outputs).reshape(self.num_examples, -1).all(dim=1)
            first = int((~finite).nonzero()[0, 0])
            raise DataError(
                f"{who}: expected finite outputs of {self.plan.graph.model_name}, got NaN or infinity for example {first} "
                f"({int((~finite).sum())} of {self.num_examples}); check the inputs' scale and the parameters."
            )
