"""A model as one node: for what torch.export cannot trace, or what does not fall into nodes of one batch axis each."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from influence_ext.capture.generic import ModelOperator
from influence_ext.capture.graph import CapturedGraph, Node, Problem, Slot, real_shape
from influence_ext.capture.layout import Layout
from influence_ext.capture.probe import mixes
from influence_ext.capture.prologue import Prologue


def whole_model(
    model: nn.Module, inputs: tuple[Tensor, ...], keys: tuple[str, ...] | None, names: tuple[str, ...], dtype: torch.dtype, reason: str
) -> tuple[CapturedGraph | None, list[Problem]]:
    """One generic node, or the problem that makes even that wrong.

    Cost: a copy of the model; passes over three examples and over one.
    """
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    operator = ModelOperator(model, [tuple(x.shape[1:]) for x in inputs], [x.dtype for x in inputs], keys, list(state), only_tensor)
    probe = copy.deepcopy(model).eval()

    def run(batch: tuple[Tensor, ...]) -> Tensor:
        with torch.no_grad():
            return only_tensor(probe(*batch) if keys is None else probe(**dict(zip(keys, batch, strict=True))))

    watch = _Watch({**dict(probe.named_parameters(remove_duplicate=False)), **dict(probe.named_buffers(remove_duplicate=False))})
    with watch:
        output = run(tuple(x[:1] for x in inputs))
    if watch.pads:
        operator.without_forward_mode()
    problem = watch.problem() or _problem(output, dtype)
    if problem is None and mixes(run, inputs):
        problem = "the model mixes the examples of a batch; keep the examples on the first axis of everything"
    slots = [Slot(name, real_shape(t), "parameter" if isinstance(t, nn.Parameter) else "buffer") for name, t in state.items()]
    if problem is None:
        theta = [slot.read(state).to(dtype).reshape(-1) for slot in slots]
        failure = _underivable(operator, inputs, theta, [isinstance(t, nn.Parameter) for t in state.values()], output, dtype)
        if failure is not None and "aten._pack_padded_sequence.default" in watch.operators:
            problem = "packed sequences cannot be differentiated; pass padded ones and select each example's last position"
        elif failure is not None:
            problem = f"torch.func cannot differentiate it ({failure}); write this part with torch operators"
    if problem is not None:
        return None, [Problem(f"{type(model).__name__}: {problem} (run as a whole, since {reason})")]
    shape = tuple(output.shape[1:])
    node = Node(
        rule="generic",
        name="model",
        target=type(model).__name__,
        inputs=tuple(range(len(inputs))),
        output=len(inputs),
        slots=tuple(range(len(slots))),
        ints={},
        floats={},
        lists={},
        width=math.prod(shape),
        layout=Layout((1, *shape), 0),
        operations=float(math.prod(shape)),
        operator=operator,
    )
    shapes = tuple(tuple(x.shape[1:]) for x in inputs)
    graph = CapturedGraph(
        model_name=type(model).__name__,
        dtype=dtype,
        input_names=names,
        input_shapes=shapes,
        input_dtypes=tuple(x.dtype for x in inputs),
        prologue=Prologue(names, shapes, lambda tensors, state: list(tensors), reads_model=False),
        nodes=(node,),
        slots=tuple(slots),
        output=len(inputs),
        output_shape=shape,
        fallback=reason,
    )
    return graph, []


class _Watch(TorchDispatchMode):
    """Finds operators that write to parameters or buffers: the generic rule hands out memory that must not change.

    Attributes:
        operators: names of all that ran.
        pads: whether an embedding has a padding row, which takes no derivative in torch's reverse mode but one in its forward mode.
    """

    def __init__(self, tensors: Mapping[str, Tensor]):
        super().__init__()
        self._names = {t.untyped_storage()._cdata: name for name, t in tensors.items() if t.numel()}
        self._found: dict[str, str] = {}
        self.operators: set[str] = set()
        self.pads = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators.add(str(func))
        self.pads |= func is torch.ops.aten.embedding.default and len(args) > 2 and args[2] >= 0
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, Tensor):
                name = self._names.get(value.untyped_storage()._cdata)
                if name is not None:
                    self._found.setdefault(name, str(func))
        return func(*args, **(kwargs or {}))

    def problem(self) -> str | None:
        """In words; None if nothing was written to."""
        if not self._found:
            return None
        listed = ", ".join(f"{name} ({operator})" for name, operator in self._found.items())
        return f"the forward pass writes to {listed}; compute with a copy, or write only if self.training"


def _problem(output: Any, dtype: torch.dtype) -> str | None:
    if not isinstance(output, Tensor):
        return "returns no single tensor; return the one the loss is computed from"
    if output.dtype != dtype:
        return f"returns {output.dtype} where the parameters are {dtype}; convert the output"
    if output.dim() == 0 or output.shape[0] != 1:
        return "the output's first axis does not count the examples; reshape it to [N, ...]"
    return None


def _underivable(
    operator: ModelOperator, inputs: Sequence[Tensor], theta: list[Tensor], trained: list[bool], output: Tensor, dtype: torch.dtype
) -> str | None:
    """What torch.func says if it cannot differentiate the model, tried on one example; None if it can."""
    x = [t[:1].reshape(1, -1).to(dtype) for t in inputs]
    cotangent = torch.ones(1, 1, output.numel(), dtype=dtype, device=output.device)
    try:
        if any(trained):
            operator.vjp(1, x, theta, cotangent, [False] * len(x) + trained)
    except Exception as error:
        return next(iter(f"{type(error).__name__}: {error}".splitlines()))
    return None


def only_tensor(result: Any) -> Any:
    """The one tensor among what a model returns."""
    leaves: Sequence[Any] = [leaf for leaf in torch.utils._pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
    return leaves[0] if len(leaves) == 1 else None
