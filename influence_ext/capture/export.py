"""A model as an ATen graph with a free batch size: ``torch.export`` in evaluation mode, the model left as found."""

from __future__ import annotations

import copy
import io
import logging
import operator
import os
import random
import sys
import traceback
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.autograd.function import BackwardCFunction
from torch.export import Dim, ExportedProgram
from torch.nn.modules.batchnorm import _BatchNorm

from influence_ext.capture.dependence import contributing, parameter_dependence
from influence_ext.capture.graph import Problem
from influence_ext.errors import UnsupportedModelError

# Not one and not a usual layer width, so that no size of the model coincides with the number of examples.
PROBE_EXAMPLES = 7


@dataclass(frozen=True, eq=False)
class Exported:
    """An exported program and what only the trace can tell about it.

    Attributes:
        program: inputs in the order they were given.
        names: name of a parameter or buffer in the program -> its (first) name in the model.
        problems: found while tracing.
    """

    program: ExportedProgram
    names: dict[str, str]
    problems: tuple[Problem, ...]


def _is_functional(program: ExportedProgram, names: dict[str, str], known: Collection[str]) -> bool:
    """Whether no operator writes into its arguments, and those that read parameters are known by name."""
    depends = parameter_dependence(program, names)
    for node in program.graph.nodes:
        if node.op != "call_function" or node.target is operator.getitem or not isinstance(node.meta.get("val"), (Tensor, list, tuple)):
            continue
        if not isinstance(node.target, torch._ops.OpOverload) or node.target._schema.is_mutable:
            return False
        if depends[node] and str(node.target) not in known:
            return False
    return True


class NotExportable(Exception):
    """torch.export cannot trace a model that runs."""


class _Traced(nn.Module):
    """The model as a function of a list of tensors, since torch.export wants its inputs named or positional, not
    either.

    It also looks at the output while it still has its autograd history: the exported graph forgets which
    ``torch.autograd.Function`` an operator came from; and it compares the parameters before and after.
    """

    def __init__(self, model: nn.Module, keys: tuple[str, ...] | None, watch: Callable[[Any], None], replaced: Callable[[list[str]], None]):
        super().__init__()
        self.model = model
        self._keys = keys
        self._watch, self._replaced = watch, replaced

    def forward(self, *inputs: Tensor) -> Any:
        before = dict(self.model.named_parameters())
        output = self.model(*inputs) if self._keys is None else self.model(**dict(zip(self._keys, inputs, strict=True)))
        self._watch(output)
        self._replaced([name for name, p in self.model.named_parameters() if p is not before.get(name)])
        return output


def export_model(
    model: nn.Module, inputs: tuple[Tensor, ...], keys: tuple[str, ...] | None, who: str, known: Collection[str] = ()
) -> Exported:
    """Export ``model(*inputs)``, or with ``keys`` as argument names, with a dynamic first axis of every tensor.

    The graph is functional (no mutation) and keeps composite operators such as ``aten.linear`` whole. Where every operator is already
    functional and among those ``known``, the pass that makes it so is spared: it takes longer than the trace.

    Raises:
        UnsupportedModelError: the model does not run, or branches on tensor values; the message carries torch's reason.
        NotExportable: the model runs, but torch cannot trace it.

    Cost: a fraction of a second for a small network, one symbolic forward pass without arithmetic; no device memory.
    """
    probes = tuple(_probe(x) for x in inputs)
    with preserved(model), _quiet(), torch.inference_mode(False), torch.enable_grad():
        problems = batch_norm_problems(model)
        custom: list[str] = []
        replaced: list[str] = []
        traced = _Traced(model, keys, lambda output: custom.extend(_custom_functions(output)), replaced.extend)
        for module in traced.modules():
            module.training = False
        names = {f"model.{name}": first for name, first in _first_names(model).items()}
        dynamic = (tuple({0: Dim.AUTO} for _ in probes),)
        try:
            program = torch.export.export(traced, probes, dynamic_shapes=dynamic, strict=False)
            problems += [_custom_problem(name) for name in dict.fromkeys(custom)]
            problems += [_replaced_problem(name) for name in dict.fromkeys(replaced)]
            problems += _no_grad_problems(program, names)
            if not _is_functional(program, names, known):
                program = program.run_decompositions({})
        except Exception as reason:
            failure = _failure(traced, probes)
            if failure is not None and not problems:
                raise UnsupportedModelError(_not_running_text(who, model, failure, inputs)) from failure
            if problems or _depends_on_data(reason):
                raise UnsupportedModelError(_failure_text(who, model, reason, problems)) from reason
            raise NotExportable(f"torch.export: {type(reason).__name__}: {_first_line(reason)}") from reason
    return Exported(program, names, tuple(problems))


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Put back, also after an exception or Ctrl-C, whatever the block does to the model's attributes and to the random
    state.

    Covered: modules, parameters, buffers and their identity, training flags, ``requires_grad``, ``.grad``, plain
    attributes and the contents of lists, dicts and sets among them; the random states of torch, Python and NumPy.
    """
    modules = [(module, dict(module.__dict__), _contents(module)) for module in model.modules()]
    parameters = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    device_states = [(device, torch.cuda.get_rng_state(device)) for device in devices]
    numpy_random = sys.modules["numpy"].random if "numpy" in sys.modules else None
    numpy_state = None if numpy_random is None else numpy_random.get_state()
    try:
        yield
    finally:
        for module, attributes, contents in modules:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            for container, saved in contents:
                _refill(container, saved)
        for p, requires_grad, grad in parameters:
            if p.requires_grad is not requires_grad:
                p.requires_grad_(requires_grad)
            if p.grad is not grad:
                p.grad = grad
        torch.set_rng_state(torch_state)
        random.setstate(python_state)
        for device, state in device_states:
            torch.cuda.set_rng_state(state, device)
        if numpy_random is not None:
            numpy_random.set_state(numpy_state)


def batch_norm_problems(model: nn.Module) -> list[Problem]:
    """Batch-norm modules found in training mode, where one example's output depends on the others."""
    return [
        Problem(
            f"batch norm {name or type(module).__name__} is in training mode and mixes the examples of a batch; call model.eval() first"
        )
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.training
    ]


def time_first_problem(model: nn.Module) -> Problem | None:
    """Modules made to read ``[T, N, ...]``: what examples that mix most often come from."""
    found = [f"{name or 'the model'} ({type(m).__name__})" for name, m in model.named_modules() if getattr(m, "batch_first", None) is False]
    if not found:
        return None
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return Problem(
        f"{', '.join(found[:3])}{more}: made with batch_first=False, to read [T, N, ...]; if its input has the examples first, make it "
        "with batch_first=True, or transpose its input and output"
    )


def output_nodes(program: ExportedProgram) -> list[fx.Node]:
    """The nodes that the model returns, without the buffers it updates on the way."""
    returned = set(program.graph_signature.user_outputs)
    (arguments,) = next(n for n in reversed(program.graph.nodes) if n.op == "output").args
    assert isinstance(arguments, (list, tuple))
    return [n for n in arguments if isinstance(n, fx.Node) and n.name in returned]


def _probe(x: Tensor) -> Tensor:
    """``PROBE_EXAMPLES`` rows of ``x``, repeated where it has fewer: only shapes and dtypes matter to the trace."""
    return x.detach()[torch.arange(PROBE_EXAMPLES, device=x.device) % x.shape[0]]


def _first_names(model: nn.Module) -> dict[str, str]:
    """Every name of a parameter or buffer -> its first name (they differ for tied parameters)."""
    first = {id(p): name for name, p in model.named_parameters()}
    names = {name: first[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}
    names.update({name: first.get(id(b), name) for name, b in model.named_buffers(remove_duplicate=False)})
    return names


def _custom_functions(output: Any) -> list[str]:
    """Names of the ``torch.autograd.Function`` classes in the history of the traced output."""
    leaves = torch.utils._pytree.tree_leaves(output)
    waiting: list[Any] = [leaf.grad_fn for leaf in leaves if isinstance(leaf, Tensor) and leaf.grad_fn is not None]
    seen: set[Any] = set()
    names: list[str] = []
    while waiting:
        function = waiting.pop()
        if function in seen:
            continue
        seen.add(function)
        if isinstance(function, BackwardCFunction):
            names.append(type(function)._forward_cls.__name__)  # type: ignore[attr-defined]
        waiting.extend(f for f, _ in function.next_functions if f is not None)
    return names


def _custom_problem(name: str) -> Problem:
    return Problem(f"autograd function {name}: its own backward pass cannot be seen in the graph; write the operation with torch operators")


def _replaced_problem(name: str) -> Problem:
    return Problem(f"parameter {name}: replaced by another during the forward pass; compute with a local variable instead")


def _no_grad_problems(program: ExportedProgram, names: dict[str, str]) -> list[Problem]:
    """Regions under ``torch.no_grad()`` that cut parameters off; later passes inline them without a trace."""
    depends = parameter_dependence(program, names)
    live = contributing(output_nodes(program))
    return [
        Problem(
            f"{node.name}: computed under torch.no_grad() from {', '.join(sorted(depends[node]))}, which hides derivatives; take it out of "
            "the no_grad block or freeze these parameters",
            depends[node],
        )
        for node in program.graph.nodes
        if node.op == "call_function"
        and str(node.target) == "wrap_with_set_grad_enabled"
        and node.args[0] is False
        and node in live
        and depends[node]
    ]


def _depends_on_data(reason: Exception) -> bool:
    """Whether tracing failed because the forward pass branches on, or takes sizes from, the values of tensors."""
    return "data-dependent" in str(reason).lower() or type(reason).__name__.startswith("GuardOnDataDependent")


def _failure(model: nn.Module, inputs: tuple[Tensor, ...]) -> Exception | None:
    """What a plain forward pass raises, whose words are clearer than those of a traced one."""
    try:
        with torch.no_grad():
            copy.deepcopy(model)(*inputs)  # a forward pass may write into buffers
    except Exception as reason:
        return reason
    return None


def _first_line(reason: Exception) -> str:
    return next((line.strip() for line in str(reason).splitlines() if line.strip()), "no reason given")


def _place(reason: Exception) -> str:
    """The innermost line of the forward pass that is neither torch's nor this library's; empty where torch does not tell."""
    inner = (os.path.dirname(torch.__file__) + os.sep, os.path.dirname(__file__) + os.sep, "<")
    lines = [frame for frame in traceback.extract_tb(reason.__traceback__) if not frame.filename.startswith(inner)]
    if not lines:
        return ""
    last = lines[-1]
    return f" (in {last.name}, line {last.lineno} of {os.path.basename(last.filename)}: {last.line})"


def _not_running_text(who: str, model: nn.Module, reason: Exception, inputs: tuple[Tensor, ...]) -> str:
    shapes = ", ".join(f"[{', '.join(['N', *map(str, x.shape[1:])])}] of {x.dtype}" for x in inputs)
    return (
        f"{who}: expected a model that runs on this data, X {shapes}, got {type(reason).__name__} from {type(model).__name__}"
        f"{_place(reason)}: {_first_line(reason).rstrip('.')}; give it the X that it was trained on, and try model(X) alone."
    )


def _failure_text(who: str, model: nn.Module, reason: Exception, found: list[Problem]) -> str:
    first_line = _first_line(reason).rstrip(".")
    text = (
        f"{who}: expected a model that torch.export can trace, got {type(reason).__name__} from {type(model).__name__}{_place(reason)}: "
        f"{first_line}; "
        "check that model(X) itself runs on this data and that its forward pass does not branch on tensor values."
    )
    return "\n".join([text, *(f"  - {problem.text}" for problem in found)])


def _contents(module: nn.Module) -> list[tuple[Any, Any]]:
    return [(value, value.copy()) for value in module.__dict__.values() if isinstance(value, (list, dict, set))]


def _refill(container: Any, saved: Any) -> None:
    container.clear()
    if isinstance(container, list):
        container.extend(saved)
    else:
        container.update(saved)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch's tracing diagnostics off the terminal: a failure is reported once, by the exception."""
    loggers = [
        logger
        for name, logger in logging.root.manager.loggerDict.items()
        if isinstance(logger, logging.Logger) and name.split(".")[0] == "torch" and not logger.disabled
    ]
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.disabled = True
        try:
            yield
        finally:
            for logger in loggers:
                logger.disabled = False
