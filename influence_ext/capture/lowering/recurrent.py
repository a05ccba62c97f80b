"""Recurrent layers and cells, unrolled: each step is linear layers, activations and products, which have native rules.

The inputs' part of the gates is one linear layer for all steps; the weights of the states are read by a node at every step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from influence_ext.capture.context import Context, Value, target_of
from influence_ext.capture.layout import Layout
from influence_ext.capture.lowering.linear import bias_of
from influence_ext.capture.lowering.pointwise import ACTIVATION_KINDS
from influence_ext.capture.lowering.table import Lowering, argument, named

# Steps times layers times directions. A step is about 15 nodes, and each node costs about 0.1 ms when a model is captured.
MAX_STEPS = 512


@dataclass(frozen=True)
class _Weights:
    """Slots and sizes of one direction of one layer."""

    input: tuple[int, int]
    state: tuple[int, int]
    flipped: tuple[bool, bool]
    num_inputs: int
    num_states: int
    num_gates: int


class _Unrolled:
    """Emits nodes whose values are ``[N, width]`` (or ``[N, T, width]``) on behalf of one operator."""

    def __init__(self, context: Context, operation: fx.Node):
        self.context, self.operation = context, operation

    def _emit(self, rule: str, inputs: Sequence[Value], sizes: tuple[int, ...], name: str, operations: float = 0.0, **more: Any) -> Value:
        value = self.context.emit(self.operation, rule, inputs, suffix=name, layout=Layout((1, *sizes), 0), **more)
        assert value is not None
        if operations:
            self.context.nodes[-1] = replace(self.context.nodes[-1], operations=operations)
        return value

    def part(self, x: Value, offset: int, size: int, name: str) -> Value:
        """Elements ``offset .. offset + size`` of each example; all of them are the value itself."""
        if size == x.width:
            return x
        return self._emit("strided", [x], (size,), name, ints={"offset": offset}, lists={"shape": (1, size), "strides": (0, 1)})

    def linear(self, x: Value, slots: tuple[int, int], flipped: bool, num_inputs: int, num_outputs: int, name: str) -> Value:
        steps = x.width // num_inputs
        ints = {"in_features": num_inputs, "out_features": num_outputs, "transposed": int(flipped)}
        return self._emit("linear", [x], (steps, num_outputs), name, 2.0 * steps * num_inputs * num_outputs, slots=slots, ints=ints)

    def activation(self, x: Value, kind: str, name: str) -> Value:
        ints = {"kind": ACTIVATION_KINDS[kind]}
        return self._emit("activation", [x], (x.width,), name, x.width, ints=ints, floats={"a": 0.0, "b": 0.0})

    def add(self, x: Value, y: Value, name: str, b: float = 1.0) -> Value:
        return self._emit("add", [x, y], (x.width,), name, x.width, floats={"a": 1.0, "b": b})

    def multiply(self, x: Value, y: Value, name: str) -> Value:
        return self._emit("multiply", [x, y], (x.width,), name, x.width)

    def concat(self, values: Sequence[Value], outer: int, name: str) -> Value:
        """``[outer, widths side by side]``."""
        width = sum(value.width for value in values)
        return values[0] if len(values) == 1 else self._emit("concat", values, (width,), name, ints={"outer": outer})


# (emits, inputs' part of the gates, states' part of the gates, states before, prefix) -> states after, the one that is put out first
_Cell = Callable[[_Unrolled, Value, Value, Sequence[Value], str], list[Value]]


def _lstm(emits: _Unrolled, x: Value, r: Value, states: Sequence[Value], name: str) -> list[Value]:
    """``c = f ∘ c + i ∘ g``, ``h = o ∘ tanh(c)``; gates in the order i, f, g, o."""
    size = x.width // 4
    sums = emits.add(x, r, f"{name}_gates")
    kinds = {"i": "sigmoid", "f": "sigmoid", "g": "tanh", "o": "sigmoid"}
    i, f, g, o = (
        emits.activation(emits.part(sums, k * size, size, f"{name}_{gate}_sum"), kind, f"{name}_{gate}")
        for k, (gate, kind) in enumerate(kinds.items())
    )
    c = emits.add(emits.multiply(f, states[1], f"{name}_kept"), emits.multiply(i, g, f"{name}_written"), f"{name}_c")
    return [emits.multiply(o, emits.activation(c, "tanh", f"{name}_tanh_c"), f"{name}_h"), c]


def _gru(emits: _Unrolled, x: Value, r: Value, states: Sequence[Value], name: str) -> list[Value]:
    """``h = n + z ∘ (h − n)``, ``n = tanh(x_n + r ∘ h_n)``; gates in the order r, z, n."""
    size = x.width // 3
    sums = emits.add(emits.part(x, 0, 2 * size, f"{name}_x_rz"), emits.part(r, 0, 2 * size, f"{name}_h_rz"), f"{name}_rz_sum")
    gates = emits.activation(sums, "sigmoid", f"{name}_rz")
    reset, update = emits.part(gates, 0, size, f"{name}_r"), emits.part(gates, size, size, f"{name}_z")
    kept = emits.multiply(reset, emits.part(r, 2 * size, size, f"{name}_h_n"), f"{name}_reset")
    new = emits.activation(emits.add(emits.part(x, 2 * size, size, f"{name}_x_n"), kept, f"{name}_n_sum"), "tanh", f"{name}_n")
    moved = emits.multiply(update, emits.add(states[0], new, f"{name}_difference", -1.0), f"{name}_kept")
    return [emits.add(new, moved, f"{name}_h")]


def _plain(kind: str) -> _Cell:
    def cell(emits: _Unrolled, x: Value, r: Value, states: Sequence[Value], name: str) -> list[Value]:
        """``h = kind(x + r)``."""
        return [emits.activation(emits.add(x, r, f"{name}_sum"), kind, f"{name}_h")]

    return cell


# Name in the operators: what a step computes, gates in a row of the weights, states.
_CELLS: Mapping[str, tuple[_Cell, int, int]] = {
    "lstm": (_lstm, 4, 2),
    "gru": (_gru, 3, 1),
    "rnn_tanh": (_plain("tanh"), 1, 1),
    "rnn_relu": (_plain("relu"), 1, 1),
}


def _kind(operation: fx.Node) -> tuple[_Cell, int, int]:
    return _CELLS[target_of(operation).split(".")[1].removesuffix("_cell")]


def _weights(context: Context, given: Sequence[Any], num_gates: int) -> _Weights | None:
    """Of ``W_ih, W_hh`` and, where there are any, ``b_ih, b_hh``."""
    weights, biases = given[:2], [*given[2:], None, None][:2]
    found = [context.table.matrix(w) if context.is_batch_free(w) else None for w in weights]
    first, second = found
    if first is None or second is None or any(b is not None and not context.is_batch_free(b) for b in biases):
        return None
    rows, num_inputs = (int(size) for size in weights[0].meta["val"].shape)
    num_states = int(weights[1].meta["val"].shape[1])
    slots = [-1 if b is None else bias_of(context, b, rows) for b in biases]
    if rows != num_gates * num_states or slots[0] is None or slots[1] is None:
        return None
    return _Weights((first[0], slots[0]), (second[0], slots[1]), (first[1], second[1]), num_inputs, num_states, rows)


def _run(emits: _Unrolled, cell: _Cell, weights: _Weights, x: Value, states: list[Value], name: str, *, reverse: bool) -> list[list[Value]]:
    """The states after each step, in the order of the positions."""
    num_steps = x.width // weights.num_inputs
    gates = emits.linear(x, weights.input, weights.flipped[0], weights.num_inputs, weights.num_gates, f"{name}_inputs")
    found: list[list[Value]] = []
    for t in range(num_steps)[:: -1 if reverse else 1]:
        step = f"{name}_{t}"
        own = emits.part(gates, t * weights.num_gates, weights.num_gates, f"{step}_x")
        old = emits.linear(states[0], weights.state, weights.flipped[1], weights.num_states, weights.num_gates, f"{step}_r")
        states = cell(emits, own, old, states, step)
        found.append(states)
    return found[::-1] if reverse else found


def _unroll(context: Context, operation: fx.Node) -> list[Value] | None:
    """The outputs of ``lstm(x, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first)`` and its relatives:
    ``[N, T, D H]`` and the final states ``[N, L D, H]``; None in a form that the rules do not take.
    """
    cell, num_gates, num_states = _kind(operation)
    args: Any = operation.args
    x, hx, params, has_biases, num_layers = args[:5]
    directions = 2 if argument(operation, 7, "bidirectional", False) else 1
    time_axis = 1 if argument(operation, 8, "batch_first", False) else 0
    initial = [hx] if isinstance(hx, fx.Node) else list(hx)
    if not all(context.is_batched(tensor) for tensor in (x, *initial)) or len(initial) != num_states:
        return None
    value, given = context.value(x), [context.value(tensor) for tensor in initial]
    if len(value.shape) != 3 or value.axis != 1 - time_axis or any(h.axis != 1 for h in given):
        return None
    if any(v.layout.fold != 1 for v in (value, *given)):
        return None
    num_steps, per_layer = value.shape[time_axis], 4 if has_biases else 2
    if num_steps * num_layers * directions > MAX_STEPS or num_steps == 0 or len(params) != num_layers * directions * per_layer:
        return None
    emits = _Unrolled(context, operation)
    final: list[list[Value]] = []
    layer_input = value
    for layer in range(num_layers):
        outputs: list[Value] = []
        for direction in range(directions):
            index = layer * directions + direction
            weights = _weights(context, params[index * per_layer : (index + 1) * per_layer], num_gates)
            if weights is None:
                return None
            name = f"_{layer}" + ("_reverse" if direction else "")
            states = [emits.part(h, index * weights.num_states, weights.num_states, f"{name}_state_{k}") for k, h in enumerate(given)]
            found = _run(emits, cell, weights, layer_input, states, name, reverse=direction == 1)
            outputs.append(emits.concat([step[0] for step in found], 1, f"{name}_output"))
            final.append(found[0 if direction else -1])
        layer_input = emits.concat(outputs, num_steps, f"_{layer}_outputs")
    return [layer_input, *(emits.concat([states[k] for states in final], 1, f"_final_{k}") for k in range(num_states))]


def _step(context: Context, operation: fx.Node) -> list[Value] | None:
    """The states after ``lstm_cell(x, hx, W_ih, W_hh, b_ih, b_hh)`` and its relatives."""
    cell, num_gates, num_states = _kind(operation)
    args: Any = operation.args
    hx = [args[1]] if isinstance(args[1], fx.Node) else list(args[1])
    if not all(context.is_batched(tensor) for tensor in (args[0], *hx)) or len(hx) != num_states:
        return None
    values = [context.value(tensor) for tensor in (args[0], *hx)]
    weights = _weights(context, args[2:6], num_gates)
    if weights is None or any(len(v.shape) != 2 or v.axis != 0 or v.layout.fold != 1 for v in values):
        return None
    return _run(_Unrolled(context, operation), cell, weights, values[0], values[1:], "", reverse=False)[0]


def _cell_state(context: Context, node: fx.Node) -> Value | None:
    """The state after a cell with one."""
    states = _step(context, node)
    return None if states is None else context.emit(node, "view", states)


def _part_of(unroll: Callable[[Context, fx.Node], list[Value] | None]) -> Lowering:
    def lowering(context: Context, node: fx.Node) -> Value | None:
        """One of several outputs, which are emitted together when the first is read; ``node`` is the getitem."""
        operation: Any
        item: Any
        operation, item = node.args
        if operation not in context.parts:
            found = unroll(context, operation)
            if found is None:
                return None
            context.parts[operation] = found
        return context.emit(node, "view", [context.parts[operation][item]])

    return lowering


LOWERINGS: dict[str, Lowering] = named(_cell_state, "gru_cell.default rnn_tanh_cell.default rnn_relu_cell.default")

PART_LOWERINGS: dict[str, Lowering] = {
    **named(_part_of(_unroll), "lstm.input gru.input rnn_tanh.input rnn_relu.input"),
    **named(_part_of(_step), "lstm_cell.default"),
}
