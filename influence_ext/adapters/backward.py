"""A network whose backward pass also hands out per-example gradients: what the adapters for ``loss.backward()`` users share.

The forward pass linearises the plan of the network; autograd sees one node, whose inputs are the network's inputs and parameters. When the
loss's cotangents arrive at the output, the tape gives the batch gradient of every parameter, and an observer gets the per-example factors.
"""

from __future__ import annotations

import bisect
import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from influence_ext.capture import Remembered, differentiable
from influence_ext.capture.probe import same
from influence_ext.context import standalone
from influence_ext.data import ModelInput, call_arguments
from influence_ext.errors import DTypeError, UnsupportedModelError
from influence_ext.params import is_half, widened
from influence_ext.plan import Plan
from influence_ext.tape import Tape


@dataclass(eq=False)
class ForwardPass:
    """One call of a network, linearised.

    Attributes:
        network: what was called.
        tape: at the parameters and inputs of the call.
        X: the inputs.
        parameters: the trained parameters that the output depends on, by name.
        observer: called in every backward pass through the call with the pass itself and the cotangents ``[N, *out]``; with gradients
            enabled if it is to build a graph of what it computes.
    """

    network: nn.Module
    tape: Tape
    X: ModelInput
    parameters: dict[str, nn.Parameter]
    observer: Callable[[ForwardPass, Tensor], None]
    _second_order: int = -1

    @property
    def num_examples(self) -> int:
        """N."""
        return self.tape.num_examples

    @property
    def second_order(self) -> bool:
        """Whether the backward pass that is running has come through derivatives made with ``create_graph=True``."""
        return self._second_order == torch._C._current_graph_task_id()

    def factors(self, cotangents: Tensor) -> Any:
        """Per-example factors of ``J_nᵀ g_n``. Cost: a cotangent sweep."""
        return self.tape.factors(cotangents[None])

    def rows(self, factors: Any) -> dict[str, Tensor]:
        """``J_nᵀ g_n`` by parameter, ``[N, *shape]``: views of one buffer. Cost: N·P elements written once."""
        return self._used(self.tape.plan.space.unflatten(factors.materialise()[0]))

    def square_norms(self, factors: Any) -> dict[str, Tensor]:
        """``‖J_nᵀ g_n‖²`` by parameter, ``[N]``; gradients of layers on vectors are not formed."""
        space, norms = self.tape.plan.space, dict[str, Tensor]()
        for begin, found in factors.square_norms_by_region().items():
            name = space.names[bisect.bisect_right(space.offsets, begin) - 1]
            norms[name] = norms[name] + found[0] if name in norms else found[0]
        return self._used(norms)

    def square_sums(self, factors: Any) -> dict[str, Tensor]:
        """``Σ_n (J_nᵀ g_n)²`` by parameter, ``[*shape]``, elementwise. Cost: one product of squares a layer."""
        return self._used(self.tape.plan.space.unflatten(factors.square_sum()))

    def sums(self, cotangents: Tensor) -> dict[str, Tensor]:
        """``Σ_n J_nᵀ g_n`` by parameter: what autograd gives. Cost: a cotangent sweep."""
        return self._used(self.tape.plan.space.unflatten(self.tape.vjp(cotangents[None])[0]))

    def input_gradients(self, cotangents: Tensor, wanted: Sequence[bool]) -> list[Tensor | None]:
        """What autograd gives for those inputs that need it, from a forward and a backward pass of torch's own."""
        if not any(wanted):
            return [None] * len(wanted)
        inputs = [x.detach().requires_grad_(needs) for x, needs in zip(_tensors(self.X), wanted, strict=True)]
        X: ModelInput = dict(zip(self.X, inputs, strict=True)) if isinstance(self.X, Mapping) else tuple(inputs)
        with torch.enable_grad():
            output = self._torch(X, self.tape.plan.space.unflatten(self.tape.theta))
            leaves = [x for x, needs in zip(inputs, wanted, strict=True) if needs]
            found = iter(torch.autograd.grad(output, leaves, cotangents, allow_unused=True))
        return [next(found) if needs else None for needs in wanted]

    def differentiable_rows(self, cotangents: Tensor) -> dict[str, Tensor]:
        """:meth:`rows` with a graph to parameters, inputs and cotangents, by torch, one example after another.

        Not by ``torch.func.vmap``: second derivatives through its batch norm are wrong in torch 2.13.
        """
        names = list(self.parameters)
        columns: list[list[Tensor]] = [[] for _ in names]
        with differentiable():
            X, theta = self._aliases()
            for n in range(self.num_examples):
                output = self._torch(_each(X, lambda x, n=n: x[n : n + 1]), theta)  # type: ignore[misc]
                rows = torch.autograd.grad(output, list(theta.values()), cotangents[n : n + 1], create_graph=True, materialize_grads=True)
                for column, row in zip(columns, rows, strict=True):
                    column.append(row)
        return self._marked({name: torch.stack(column) for name, column in zip(names, columns, strict=True)})

    def differentiable_sums(self, cotangents: Tensor, wanted: Sequence[bool]) -> list[Tensor | None]:
        """Gradients of those inputs and parameters that need them, with their graph, by torch."""
        with differentiable():
            X, theta = self._aliases()
            leaves = (*_tensors(X), *theta.values())
            output = self._torch(X, theta)
            needed = [leaf for leaf, needs in zip(leaves, wanted, strict=True) if needs]
            gradients = torch.autograd.grad(output, needed, cotangents, create_graph=True, materialize_grads=True)
        found = iter(self._marked(dict(enumerate(gradients))).values())
        return [next(found) if needs else None for needs in wanted]

    def _aliases(self) -> tuple[ModelInput, dict[str, Tensor]]:
        """Inputs and parameters where derivatives of this pass end although a graph goes on: inputs may depend on the parameters."""
        return _each(self.X, lambda x: x.view_as(x)), {name: p.view_as(p) for name, p in self.parameters.items()}

    def _torch(self, X: ModelInput, theta: Mapping[str, Tensor]) -> Tensor:
        return widened_call(self.network, theta, *call_arguments(X))

    def _marked(self, derivatives: dict[Any, Tensor]) -> dict[Any, Tensor]:
        """The same; a backward pass through one of them counts as one of second order."""
        for value in derivatives.values():
            if value.requires_grad:
                value.register_hook(self._note)
        return derivatives

    def _note(self, _: Tensor) -> None:
        self._second_order = torch._C._current_graph_task_id()

    def _used(self, by_name: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: by_name[name] for name in self.parameters if name in by_name}


class _Node(torch.autograd.Function):
    """The network as one node of the autograd graph."""

    @staticmethod
    def forward(ctx: Any, call: ForwardPass, *leaves: Tensor) -> Tensor:
        ctx.call = call
        return call.tape.outputs.clone(memory_format=torch.contiguous_format)  # the tape must not hold what holds the tape

    @staticmethod
    @once_differentiable
    @standalone
    def backward(ctx: Any, cotangents: Tensor) -> tuple[Tensor | None, ...]:
        call: ForwardPass = ctx.call
        cotangents = cotangents.contiguous()
        count = len(_tensors(call.X))
        with _alone():
            of_inputs = call.input_gradients(cotangents, ctx.needs_input_grad[1 : 1 + count])
            of_parameters = call.sums(cotangents)
            call.observer(call, cotangents)
        return (None, *of_inputs, *(of_parameters[name] for name in call.parameters))


class _TwiceNode(_Node):
    """The same, with a graph of the derivatives where the backward pass asks for it."""

    @staticmethod
    def forward(ctx: Any, call: ForwardPass, *leaves: Tensor) -> Tensor:
        frozen = (p for p in call.network.parameters() if not p.requires_grad)
        ctx.save_for_backward(*leaves, *call.network.buffers(), *frozen)  # torch then sees to it that they are what they were
        return _Node.forward(ctx, call, *leaves)

    @staticmethod
    @standalone
    def backward(ctx: Any, cotangents: Tensor) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled():
            found: tuple[Tensor | None, ...] = _Node.backward(ctx, cotangents)
            return found
        call: ForwardPass = ctx.call
        _ = ctx.saved_tensors
        with _alone():
            gradients = call.differentiable_sums(cotangents, ctx.needs_input_grad[1:])
            call.observer(call, cotangents)
        return (None, *gradients)


def run(
    network: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    observer: Callable[[ForwardPass, Tensor], None],
    who: str,
    *,
    twice: bool = False,
) -> tuple[Tensor, ForwardPass]:
    """``network(*args, **kwargs)`` with gradients by the tape, and the pass that was made of it.

    Gradients of parameters and of inputs arrive as from torch. With ``twice`` they have derivatives themselves where the backward pass
    says ``create_graph=True``, computed by torch; else torch refuses to differentiate a second time. Autocast changes nothing.

    Raises:
        DTypeError: an argument is not a tensor.
        UnsupportedModelError, ShapeError, DeviceError: see :meth:`Plan.of`; or the forward pass in training mode is another than in
            evaluation mode (dropout).

    Cost: one forward pass; for a network in training mode, the first time, a copy of it and its forward pass on two examples.
    """
    X = _inputs(network, *before_autocast(network, args, kwargs), who)
    return _run(network, X, observer, who, _TwiceNode if twice else _Node)


@standalone
def _run(
    network: nn.Module, X: ModelInput, observer: Callable[[ForwardPass, Tensor], None], who: str, node: type[_Node]
) -> tuple[Tensor, ForwardPass]:
    _check_dropout(network, who)
    with _alone():
        plan = Plan.of(network, X, None, who)
        named = dict(network.named_parameters())
        parameters = {name: named[name] for name in plan.space.names if name in plan.parameters_read}
        call = ForwardPass(network, plan.linearize(X), X, parameters, observer)
        _check_training(call, who)
    outputs: Tensor = node.apply(call, *_tensors(X), *parameters.values())
    return outputs, call


_inside: ContextVar[bool] = ContextVar("inside a recorded network", default=False)


def recording() -> bool:
    """Whether a call of a network is to be recorded: gradients are wanted, and nobody traces it or computes with it already."""
    return torch.is_grad_enabled() and not _inside.get() and not torch.compiler.is_compiling()


@contextmanager
def _alone() -> Iterator[None]:
    """Networks inside the one at hand are not recorded on their own."""
    token = _inside.set(True)
    try:
        yield
    finally:
        _inside.reset(token)


_checked: Remembered[bool] = Remembered()


def _check_training(call: ForwardPass, who: str) -> None:
    """Refuse a network whose training mode computes something else than its evaluation mode, which is what plans are of."""
    flags = tuple(module.training for module in call.network.modules())
    if not any(flags) or _checked.find(call.network, flags):
        return
    few = min(call.num_examples, 2)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        output = widened_call(copy.deepcopy(call.network), {}, *call_arguments(_each(call.X, lambda x: x[:few])))
    expected = call.tape.outputs[:few]
    if output.dtype == expected.dtype:
        agree = same(output, expected)
    else:  # the network rounds its outputs
        limit = torch.finfo(output.dtype).eps ** 0.5 * float(expected.abs().max())
        agree = torch.allclose(output.to(expected.dtype), expected, rtol=0, atol=limit)
    if output.shape != expected.shape or not agree:
        raise UnsupportedModelError(
            f"{who}: expected a network that computes the same in training and in evaluation mode, got {type(call.network).__name__}, "
            "whose outputs differ; call eval() on what differs."
        )
    _checked.keep(call.network, flags, True)


def _each(X: ModelInput, function: Callable[[Tensor], Tensor]) -> ModelInput:
    if isinstance(X, Tensor):
        return function(X)
    return {key: function(x) for key, x in X.items()} if isinstance(X, Mapping) else tuple(function(x) for x in X)


def _check_dropout(network: nn.Module, who: str) -> None:
    active = [named(name, module) for name, module in network.named_modules() if module.training and _dropout(module) > 0]
    if active:
        raise UnsupportedModelError(
            f"{who}: expected a network without active dropout, whose derivatives are those of one forward pass, got {', '.join(active)} "
            "in training mode; set p=0, or call eval() on these modules."
        )


def named(name: str, module: nn.Module) -> str:
    """A module of a network as messages call it."""
    return f"{type(module).__name__} ({name})" if name else type(module).__name__


def _dropout(module: nn.Module) -> float:
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p
    if isinstance(module, nn.MultiheadAttention):
        return float(module.dropout)
    return float(module.dropout) if isinstance(module, nn.RNNBase) and module.num_layers > 1 else 0.0


def without(module: nn.Module, *attributes: str) -> nn.Module:
    """A module that shares parameters, buffers and children with ``module``, without hooks and without some attributes of the instance."""
    twin = copy.copy(module)
    fresh = nn.Module().__dict__
    for key in fresh:
        if "hook" in key and key in twin.__dict__:
            twin.__dict__[key] = fresh[key]
    for key in ("_parameters", "_buffers", "_modules"):
        twin.__dict__[key] = module.__dict__[key]
    for key in attributes:
        twin.__dict__.pop(key, None)
    return twin


def _inputs(network: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], who: str) -> ModelInput:
    values = (*args, *kwargs.values())
    if not values or not all(isinstance(value, Tensor) for value in values):
        found = ", ".join([*(type(a).__name__ for a in args), *(f"{key}={type(a).__name__}" for key, a in kwargs.items())]) or "nothing"
        raise DTypeError(f"{who}: expected tensors as arguments of the network, got {found}; bind other arguments in a module around it.")
    args, kwargs = one_way(network, args, kwargs, who)
    return kwargs if kwargs else args[0] if len(args) == 1 else tuple(args)


def one_way(network: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], who: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments all by position or all by name, as plans take them.

    Raises:
        DTypeError: both, for a network that takes ``*args``.
    """
    if not (args and kwargs):
        return args, dict(kwargs)
    bound = inspect.signature(network.forward).bind(*args, **kwargs).arguments
    named = {key: x for name, value in bound.items() for key, x in (value.items() if isinstance(value, dict) else [(name, value)])}
    if any(isinstance(x, tuple) for x in named.values()):
        raise DTypeError(f"{who}: expected tensors by position or by name, got both for a network that takes *args; give them one way.")
    return (), named


def widened_call(network: nn.Module, theta: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """``network(*args, **kwargs)`` by torch at the parameters ``theta``, in the dtype that tapes compute in.

    Derivatives arrive in the dtypes of inputs and parameters as given. Cost of half precision: a float32 copy of parameters and buffers.
    """
    tensors = dict(theta)
    if is_half(network):
        held = {**dict(network.named_parameters()), **dict(network.named_buffers()), **theta}
        tensors = {name: widened(x) for name, x in held.items()}
        args = tuple(widened(x) if isinstance(x, Tensor) else x for x in args)
        kwargs = {key: widened(x) if isinstance(x, Tensor) else x for key, x in kwargs.items()}
    return torch.func.functional_call(network, tensors, args, dict(kwargs))


def before_autocast(network: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Under ``torch.autocast``: arguments that layers before the network made half precision, in the dtype of its parameters again."""
    dtypes = {p.dtype for p in network.parameters() if p.is_floating_point()}
    if len(dtypes) != 1:
        return args, dict(kwargs)
    dtype = dtypes.pop()

    def cast(x: Any) -> Any:
        half = isinstance(x, Tensor) and x.dtype in (torch.bfloat16, torch.float16)
        return x.to(dtype) if half and torch.is_autocast_enabled(x.device.type) else x

    return tuple(map(cast, args)), {key: cast(x) for key, x in kwargs.items()}


def _tensors(X: ModelInput) -> tuple[Tensor, ...]:
    return (X,) if isinstance(X, Tensor) else tuple(X.values()) if isinstance(X, Mapping) else tuple(X)
