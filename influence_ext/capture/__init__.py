"""Capture: a ``torch.nn.Module`` becomes a list of rule applications over its ATen graph."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from influence_ext.capture.export import NotExportable, batch_norm_problems, export_model, time_first_problem
from influence_ext.capture.generic import differentiable
from influence_ext.capture.graph import CapturedGraph, Expression, Node, Problem, Slot, named_tensors
from influence_ext.capture.lowering import ACTIVATION_KINDS, LOWERINGS, PART_LOWERINGS, Unlowered, lower
from influence_ext.capture.probe import mixing_node
from influence_ext.capture.report import format_table
from influence_ext.capture.signature import call_signature, structure_key
from influence_ext.capture.watch import Remembered
from influence_ext.capture.whole import whole_model
from influence_ext.context import exclusive, unforkable
from influence_ext.errors import DeviceError, DTypeError, ShapeError, UnsupportedModelError
from influence_ext.params import HALF_DTYPES, is_half, widened, widened_dtype, widened_model

__all__ = [
    "ACTIVATION_KINDS",
    "LOWERINGS",
    "CapturedGraph",
    "Expression",
    "Node",
    "Problem",
    "Remembered",
    "Slot",
    "call_signature",
    "capture",
    "clear_cache",
    "differentiable",
    "format_table",
    "named_inputs",
    "named_tensors",
    "plan_key",
    "remembered",
]

_log = logging.getLogger("influence_ext")

_CACHE_SIZE = 64
_cache: OrderedDict[Hashable, CapturedGraph] = OrderedDict()
remembered: Remembered[Any] = Remembered()
"""What later layers make of the graph of a live model."""


def capture(
    model: nn.Module,
    X: Tensor | tuple[Tensor, ...] | Mapping[str, Tensor],
    trainable: Collection[str] | None = None,
    who: str = "capture",
) -> CapturedGraph:
    """The network as rule applications, valid for every number of examples and for every model of the same structure.

    Operators with a native rule run natively; others, and whole models that cannot be traced or split into nodes, run in
    the generic rule, exactly (one log line and ``format_table`` say which). The model is traced in evaluation mode and
    left exactly as found (modules, training flags, gradients, plain attributes, random state), also after an exception.
    A second capture of the same structure and input shapes costs a comparison, not a trace.

    Args:
        model: called as ``model(X)``, ``model(*X)`` or ``model(**X)``.
        X: at least one example, the examples on the first axis of every tensor.
        trainable: names of the parameters that are differentiated; default all with ``requires_grad``. A parameter not
            among them may be used in ways that have no derivative rule.
        who: the caller's name for messages.

    Raises:
        UnsupportedModelError: the model mixes the examples of a batch, draws random numbers, branches on tensor values, hides derivatives
            or does not run; the message lists every problem found.
        ShapeError: an input without examples or with a number of examples of its own.
        DTypeError, DeviceError: a floating-point input of another dtype, or an input on another device, than the
            parameters.

    Cost: half a second for a small network the first time, seconds for a transformer (one symbolic forward pass; and one of three
    examples, if torch computes any of it); for a recurrent layer about 25 ms a step, in ``torch.export``; about a millisecond from
    the cache.
    """
    inputs, by_name = named_inputs(X)
    tensors, names = tuple(inputs.values()), tuple(inputs)
    keys = names if by_name else None
    dtype = _check_inputs(model, inputs, who)
    if is_half(model):
        tensors = tuple(widened(x) for x in tensors)
    key = structure_key(model, inputs, by_name)
    if trainable is None:
        trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    with exclusive, unforkable, torch.inference_mode(False):  # what is made here is saved for backward passes of any mode
        graph = _cache.get(key)
        if graph is not None:
            _cache.move_to_end(key)
            problems = [*batch_norm_problems(model), *graph.conditions]
        else:
            graph, problems = _capture(model, tensors, keys, names, dtype, who)
            if graph is not None:
                _cache[key] = graph
                while len(_cache) > _CACHE_SIZE:
                    _cache.popitem(last=False)
                _log_generic(graph)
    standing = [problem.text for problem in problems if problem.applies(trainable)]
    if any("examples" in text for text in standing) and (hint := time_first_problem(model)) is not None:
        standing.append(hint.text)
    if graph is None or standing:
        raise UnsupportedModelError(_problems_text(who, model, standing))
    return graph


def named_inputs(X: Tensor | Sequence[Tensor] | Mapping[str, Tensor]) -> tuple[dict[str, Tensor], bool]:
    """Inputs under the names that messages use, and whether the model takes them by these names."""
    if isinstance(X, Mapping):
        return dict(X), True
    if isinstance(X, Tensor):
        return {"X": X}, False
    return {f"X[{i}]": x for i, x in enumerate(X)}, False


def _capture(
    model: nn.Module, tensors: tuple[Tensor, ...], keys: tuple[str, ...] | None, names: tuple[str, ...], dtype: torch.dtype, who: str
) -> tuple[CapturedGraph | None, list[Problem]]:
    """Node by node where that is possible, as a whole where it is not; and the problems found."""
    model = widened_model(model)
    try:
        exported = export_model(model, tensors, keys, who, known=LOWERINGS.keys() | PART_LOWERINGS.keys())
        graph, problems, context = lower(exported, type(model).__name__, dtype, names)
        if graph is not None and (mixed := mixing_node(context, tensors, named_tensors(model))) is not None:
            # Bookkeeping over the batch, such as offsets of flattened examples, may still cancel in the output.
            graph, found = whole_model(model, tensors, keys, names, dtype, mixed)
            return graph, [*problems, *found]
        return graph, problems
    except (NotExportable, Unlowered) as reason:
        return whole_model(model, tensors, keys, names, dtype, str(reason))


def _log_generic(graph: CapturedGraph) -> None:
    generic = [node for node in graph.nodes if node.rule == "generic"]
    if graph.fallback is not None:
        _log.info("%s runs as a whole in the generic rule (%s)", graph.model_name, graph.fallback)
    elif generic:
        _log.info(
            "%s: %d of %d nodes run in the generic rule, for want of a native one: %s",
            graph.model_name,
            len(generic),
            len(graph.nodes),
            ", ".join(f"{node.name} ({node.target})" for node in generic),
        )


def clear_cache() -> None:
    """Forget all captured graphs, and what was made of them."""
    _cache.clear()
    remembered.clear()


def _check_inputs(model: nn.Module, inputs: Mapping[str, Tensor], who: str) -> torch.dtype:
    """Check the inputs against the parameters and return the dtype of the computation."""
    reference = next((p for p in model.parameters() if p.is_floating_point()), None)
    floating = [x for x in inputs.values() if x.is_floating_point()]
    devices: dict[torch.device, str] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        devices.setdefault(tensor.device, name)
    if len(devices) > 1:
        listed = ", ".join(f"{device} ({name})" for device, name in devices.items())
        raise DeviceError(f"{who}: expected a model on one device, got {listed}; move it with model.to(device).")
    for name, x in inputs.items():
        if x.dim() == 0 or x.shape[0] == 0:
            raise ShapeError(f"{who}: expected {name} of shape [N, ...] with N >= 1, got {list(x.shape)}; pass at least one example.")
        allowed = () if reference is None else (reference.dtype, torch.float32, *HALF_DTYPES) if is_half(model) else (reference.dtype,)
        if reference is not None and x.is_floating_point() and x.dtype not in allowed:
            raise DTypeError(
                f"{who}: expected {name} of the parameters' dtype {reference.dtype}, got {x.dtype}; convert it with .to({reference.dtype})."
            )
        if reference is not None and x.device != reference.device:
            raise DeviceError(
                f"{who}: expected {name} on the parameters' device {reference.device}, got {x.device}; move it with "
                f".to('{reference.device}')."
            )
    sizes = {name: x.shape[0] for name, x in inputs.items()}
    if len(set(sizes.values())) > 1:
        found = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise ShapeError(f"{who}: expected the same number of examples in all inputs, got {found}; align them.")
    return widened_dtype(reference.dtype) if reference is not None else floating[0].dtype if floating else torch.get_default_dtype()


def _problems_text(who: str, model: nn.Module, problems: list[str]) -> str:
    count = "one problem" if len(problems) == 1 else f"{len(problems)} problems"
    listed = "\n".join(f"  - {text}" for text in problems)
    return (
        f"{who}: expected a model that maps each example on its own to an output, got {count} in {type(model).__name__}; each is listed "
        f"with its remedy.\n{listed}"
    )


def plan_key(X: Any, params: str | Tensor | tuple[str | Tensor, ...] | None) -> Hashable:
    """What a plan depends on besides the model; None where ``X`` has to be refused.

    A selected tensor counts by its address: it is one of the model's own parameters, or selecting it fails.
    """
    inputs, by_name = named_inputs(X)
    sizes = [x.shape[0] if x.dim() else 0 for x in inputs.values()]
    if not sizes or min(sizes) == 0 or sizes.count(sizes[0]) != len(sizes):
        return None
    selected = params if isinstance(params, tuple) or params is None else (params,)
    chosen = None if selected is None else tuple(p if isinstance(p, str) else id(p) for p in selected)
    return (by_name, chosen, call_signature(inputs))
