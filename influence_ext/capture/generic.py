"""The generic rule: an operator without a native rule, differentiated by torch on its own.

One object serves a node of the graph (``NodeOperator``) or a whole model (``ModelOperator``). Both give the methods of a rule on tensors as
rules see them: values ``[n, width]``, tangents and cotangents ``[V, n, width]``, parameters ``[size]`` and ``[V, size]``. Everything is
exact: forward mode where the operator has it, else reverse mode applied twice, else one row of the Jacobian at a time; all V at once where
``vmap`` can and agrees with a single vector, else one by one.
"""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from influence_ext.capture.layout import Layout
from influence_ext.context import exclusive, unforkable
from influence_ext.errors import UnsupportedModelError

_log = logging.getLogger("influence_ext")

Function = Callable[..., Tensor]


@contextmanager
def differentiable() -> Iterator[None]:
    """Make torch take kernels that can be differentiated twice and in forward mode: no fused attention, no oneDNN recurrent layers."""
    reference = torch.backends.mkldnn.flags(enabled=False, allow_tf32=None)
    with exclusive, unforkable, torch.enable_grad(), sdpa_kernel([SDPBackend.MATH]), reference:
        yield


def call(target: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """``target(*args, **kwargs)``, with the derivative that torch's reverse mode gives in every mode.

    The padding row of an embedding takes no derivative, which torch's forward mode forgets.
    """
    if target is torch.ops.aten.embedding.default and len(args) > 2 and args[2] >= 0:
        weight, indices, padding = args[:3]
        rows = target(weight, indices, -1, *args[3:], **kwargs)
        return torch.where((indices == padding)[..., None], rows.detach(), rows)
    return target(*args, **kwargs)


class Operator:
    """A function of n examples and of parameters. Subclasses say what is computed; the derivatives are here.

    ``function(n)`` returns ``f(*x, *theta) -> [n, width]`` where the x are ``[n, width]`` and the theta ``[size]``.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._vectorises = True
        self._checked: set[tuple[str, tuple[bool, ...]]] = set()
        self._modes = ["forward mode", "reverse mode applied twice", "a reverse pass for each output"]
        self._second_modes = ["forward over reverse mode", "reverse over reverse mode"]

    def function(self, n: int) -> Function:
        """What is computed for n examples."""
        raise NotImplementedError

    def without_forward_mode(self) -> None:
        """From now on take reverse mode applied twice, where torch's forward mode differentiates in another way than its reverse mode."""
        self._modes, self._second_modes = self._modes[-2:], self._second_modes[-1:]

    def forward(self, n: int, x: list[Tensor], theta: list[Tensor]) -> Tensor:
        """``[n, width]``."""
        with torch.no_grad():
            return self.function(n)(*x, *theta).detach().contiguous()

    def jvp(self, n: int, x: list[Tensor], theta: list[Tensor], t_x: list[Tensor | None], t_theta: list[Tensor | None]) -> Tensor:
        """``[V, n, width]`` from the tangents that are given."""
        f = self.function(n)
        primals, tangents = [*x, *theta], [*t_x, *t_theta]
        moving = [i for i, t in enumerate(tangents) if t is not None]
        directions = [t for t in tangents if t is not None]
        restricted = _restrict(f, primals, moving)
        points = tuple(primals[i] for i in moving)

        def forward_mode(*t: Tensor) -> Tensor:
            return torch.func.jvp(restricted, points, t)[1]

        def reverse_twice(*t: Tensor) -> Tensor:
            # The transpose of the transpose: u -> J^T u is linear, and its own vjp at any u is J.
            y, pull = torch.func.vjp(restricted, *points)[:2]
            return torch.func.vjp(pull, torch.zeros_like(y))[1](t)[0]

        with differentiable():
            while len(self._modes) > 1:
                mode = forward_mode if len(self._modes) == 3 else reverse_twice
                try:
                    return self._over(self._modes[0], mode, directions).detach()
                except (NotImplementedError, RuntimeError) as reason:
                    missing = self._modes.pop(0)
                    _log.info("%s: no %s (%s); %s takes its place", self.name, missing, _first_line(reason), self._modes[0])
            return _by_rows(restricted, points, directions)

    def vjp(self, n: int, x: list[Tensor], theta: list[Tensor], g_y: Tensor, wanted: list[bool]) -> list[Tensor | None]:
        """Cotangents of the operands that are wanted (inputs first), ``[V, n, width]`` and ``[V, size]``; None for the others."""
        f = self.function(n)
        primals = [*x, *theta]
        moving = [i for i, want in enumerate(wanted) if want]
        with differentiable():
            pull = torch.func.vjp(_restrict(f, primals, moving), *(primals[i] for i in moving))[1]
            found = self._over("vjp", pull, [g_y])
        results: list[Tensor | None] = [None] * len(primals)
        for i, g in zip(moving, found, strict=True):
            results[i] = g.detach()
        return results

    def second_order(
        self,
        n: int,
        x: list[Tensor],
        theta: list[Tensor],
        g_y: Tensor,
        t_x: list[Tensor | None],
        t_theta: list[Tensor | None],
        wanted: list[bool],
    ) -> list[Tensor | None]:
        """What ``vjp`` at the cotangent ``g_y [n, width]`` changes by along tangents ``[V, ...]``: ``∂²(g_yᵀ f) · t`` of what is wanted.

        Raises:
            UnsupportedModelError: PyTorch has no second derivative of the operator.
        """
        f = self.function(n)
        primals, tangents = [*x, *theta], [*t_x, *t_theta]
        moving = [i for i, t in enumerate(tangents) if t is not None]
        asked = [i for i, want in enumerate(wanted) if want]
        directions = [t for t in tangents if t is not None]

        def gradient(of: list[int], by: list[int]) -> Callable[..., tuple[Tensor, ...]]:
            """``∇ g_yᵀ f`` in the operands ``of``, as a function of those ``by``."""

            def pulled(*some: Tensor) -> tuple[Tensor, ...]:
                operands = list(primals)
                for i, value in zip(by, some, strict=True):
                    operands[i] = value
                return tuple(torch.func.vjp(_restrict(f, operands, of), *(operands[i] for i in of))[1](g_y))

            return pulled

        def forward_over_reverse(*t: Tensor) -> tuple[Tensor, ...]:
            return tuple(torch.func.jvp(gradient(asked, moving), tuple(primals[i] for i in moving), t)[1])

        def reverse_over_reverse(*t: Tensor) -> tuple[Tensor, ...]:
            # The second derivative is symmetric.
            return tuple(torch.func.vjp(gradient(moving, asked), *(primals[i] for i in asked))[1](t))

        results: list[Tensor | None] = [None] * len(primals)
        with differentiable():
            while True:
                mode = forward_over_reverse if len(self._second_modes) == 2 else reverse_over_reverse
                try:
                    found = self._over(self._second_modes[0], mode, directions)
                    break
                except (NotImplementedError, RuntimeError) as reason:
                    if len(self._second_modes) == 1:
                        raise UnsupportedModelError(
                            f"Hessian: expected operators that PyTorch differentiates twice, got {self.name} ({_first_line(reason)}); "
                            "write it with others, freeze what it depends on, or take the GGN."
                        ) from reason
                    missing = self._second_modes.pop(0)
                    _log.info("%s: no %s (%s); %s takes its place", self.name, missing, _first_line(reason), self._second_modes[0])
        for i, s in zip(asked, found, strict=True):
            results[i] = s.detach()
        return results

    def per_example(self, n: int, x: list[Tensor], theta: list[Tensor], g_y: Tensor, wanted: list[bool]) -> list[Tensor | None]:
        """The same for parameters, not summed over examples: ``[V, n, size]``."""
        f = self.function(1)
        moving = [i for i, want in enumerate(wanted) if want]

        def gradient(g: Tensor, *row: Tensor) -> tuple[Tensor, ...]:
            single = [r[None] for r in row]
            restricted = _restrict(f, [*single, *theta], [len(x) + i for i in moving])
            return torch.func.vjp(restricted, *(theta[i] for i in moving))[1](g[None])

        with differentiable():
            found = self._over("per_example", gradient, [g_y], x)
        results: list[Tensor | None] = [None] * len(theta)
        for i, g in zip(moving, found, strict=True):
            results[i] = g.detach()
        return results

    def _over(self, kind: str, fn: Callable[..., Any], stacked: Sequence[Tensor], inner: Sequence[Tensor] | None = None) -> Any:
        """``fn`` for every entry of the first axis of ``stacked``: at once where vmap can and is right, else in a loop.

        With ``inner``, also for every entry of the second axis, which is the first of ``inner``.
        """
        shape = tuple(stacked[0].shape[: 1 if inner is None else 2])

        def one(*index: int) -> Any:
            return fn(*(s[index] for s in stacked), *(s[index[-1]] for s in inner or ()))

        if self._vectorises:
            try:
                if inner is None:
                    result = torch.func.vmap(fn)(*stacked)
                else:
                    result = torch.func.vmap(torch.func.vmap(fn), in_dims=(0,) * len(stacked) + (None,) * len(inner))(*stacked, *inner)
            except (NotImplementedError, RuntimeError, ValueError) as reason:
                if 0 in shape:
                    raise
                one(*(0 for _ in shape))  # an error of the operator itself is raised here
                self._loop(_first_line(reason))
            else:
                if self._confirmed(kind, shape, one, result):
                    return result
                self._loop("its batching rule gives other numbers than single vectors do")
        results = [one(*index) for index in itertools.product(*map(range, shape))]
        return _stack(results, shape)

    def _confirmed(self, kind: str, shape: tuple[int, ...], one: Callable[..., Any], result: Any) -> bool:
        """Whether the last entry computed on its own is the same; asked once, since torch has batching rules that are wrong."""
        key = (kind, tuple(size > 1 for size in shape))
        if key in self._checked or max(shape) < 2:
            return True
        last = tuple(size - 1 for size in shape)
        many = result if isinstance(result, tuple) else (result,)
        alone = one(*last)
        alone = alone if isinstance(alone, tuple) else (alone,)
        if all(_agree(a[last], b) for a, b in zip(many, alone, strict=True)):
            self._checked.add(key)
            return True
        return False

    def _loop(self, reason: str) -> None:
        self._vectorises = False
        _log.info("%s: vmap does not take it (%s); vectors run one by one", self.name, reason)


@dataclass(frozen=True)
class Reference:
    """A place in a step's arguments: the k-th batched input (``kind`` "input"), slot or earlier step, or a size that depends on N."""

    kind: str
    index: int = 0
    size: Callable[[int], int | float] | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Step:
    """One call of an operator.

    Attributes:
        name: of its node.
        target, args, kwargs: the call; ``Reference`` in place of tensors and sizes.
        hidden: why its result is no value of the plan, for the report; empty for the last step.
    """

    name: str
    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    hidden: str = ""


class NodeOperator(Operator):
    """One tensor of an exported graph: its operator, after those of its operands that are no values of the plan.

    Args:
        steps: in order of execution; the last one gives the output.
        inputs: layout and dtype of the batched operands.
        slots: shape and dtype of the others.
        output: how the result lies.
        dtype: of the plan.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        inputs: Sequence[tuple[Layout, torch.dtype]],
        slots: Sequence[tuple[tuple[int, ...], torch.dtype]],
        output: Layout,
        dtype: torch.dtype,
    ):
        super().__init__(steps[-1].name)
        self.steps = tuple(steps)
        self._inputs, self._slots, self._output, self._dtype = inputs, slots, output, dtype

    def function(self, n: int) -> Function:
        """What is computed for n examples."""

        def f(*operands: Tensor) -> Tensor:
            x, theta = operands[: len(self._inputs)], operands[len(self._inputs) :]
            known = {
                "input": [
                    layout.scatter(v.reshape(n, *layout.shape)).to(dtype) for v, (layout, dtype) in zip(x, self._inputs, strict=True)
                ],
                "slot": [_restored(t, shape, dtype) for t, (shape, dtype) in zip(theta, self._slots, strict=True)],
                "step": [],
            }

            def fill(argument: Any) -> Any:
                if isinstance(argument, Reference):
                    return argument.size(n) if argument.size is not None else known[argument.kind][argument.index]
                if isinstance(argument, (list, tuple)):
                    return type(argument)(fill(a) for a in argument)
                return argument

            for step in self.steps:
                result = call(step.target, fill(step.args), {key: fill(value) for key, value in step.kwargs.items()})
                known["step"].append(result)
            return self._output.gather(result).reshape(n, -1).to(self._dtype)

        return f


class ModelOperator(Operator):
    """A whole model. Holds a copy of its modules, so that the user's model is never touched."""

    def __init__(self, model: nn.Module, shapes: Sequence[tuple[int, ...]], dtypes: Sequence[torch.dtype], keys: tuple[str, ...] | None,
                 names: Sequence[str], read: Callable[[Any], Tensor]):  # fmt: skip
        super().__init__(type(model).__name__)
        self._model = copy.deepcopy(model).eval().requires_grad_(False)
        self._shapes, self._dtypes, self._keys, self._names, self._read = shapes, dtypes, keys, names, read
        state = {**dict(self._model.named_parameters()), **dict(self._model.named_buffers())}
        self._kinds = [(state[name].shape, state[name].dtype) for name in names]

    def function(self, n: int) -> Function:
        """What is computed for n examples."""

        def f(*operands: Tensor) -> Tensor:
            x, theta = operands[: len(self._shapes)], operands[len(self._shapes) :]
            tensors = [v.reshape(n, *shape).to(dtype) for v, shape, dtype in zip(x, self._shapes, self._dtypes, strict=True)]
            kinds = zip(self._names, theta, self._kinds, strict=True)
            state = {name: _restored(t, shape, dtype) for name, t, (shape, dtype) in kinds}
            args, kwargs = (tuple(tensors), {}) if self._keys is None else ((), dict(zip(self._keys, tensors, strict=True)))
            result = self._read(torch.func.functional_call(self._model, state, args, kwargs))
            return result.reshape(n, -1)

        return f


def _restored(flat: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A parameter or buffer from its slot."""
    return torch.view_as_complex(flat.reshape(*shape, 2)).to(dtype) if dtype.is_complex else flat.reshape(shape).to(dtype)


def _restrict(f: Function, primals: Sequence[Tensor], moving: Sequence[int]) -> Function:
    """``f`` as a function of the operands ``moving``, the others held."""

    def restricted(*some: Tensor) -> Tensor:
        operands = list(primals)
        for i, value in zip(moving, some, strict=True):
            operands[i] = value
        return f(*operands)

    return restricted


def _by_rows(f: Function, points: tuple[Tensor, ...], directions: Sequence[Tensor]) -> Tensor:
    """``J t`` for the stacked directions, from one row of J at a time."""
    y, pull = torch.func.vjp(f, *points)[:2]
    units = torch.eye(y.numel(), dtype=y.dtype, device=y.device)
    rows = [pull(unit.view_as(y)) for unit in units]
    columns = [sum(t.flatten(1) @ r.flatten() for t, r in zip(directions, row, strict=True)) for row in rows]
    return torch.stack(columns, dim=1).view(-1, *y.shape).detach()


def _stack(results: list[Any], shape: tuple[int, ...]) -> Any:
    if isinstance(results[0], tuple):
        return tuple(_stack(list(column), shape) for column in zip(*results, strict=True))
    return torch.stack(results).view(*shape, *results[0].shape)


def _agree(first: Tensor, second: Tensor) -> bool:
    """Equal up to rounding."""
    tolerance = 1e-9 if second.dtype == torch.float64 else 1e-3
    distance = (first.detach() - second.detach()).abs()
    scale = torch.maximum(first.detach().abs(), second.detach().abs()).nan_to_num(posinf=0).max() if second.numel() else 0.0
    return bool((distance <= tolerance * scale).logical_or(second.isnan()).all())


def _first_line(reason: Exception) -> str:
    return next((line.strip() for line in str(reason).splitlines() if line.strip()), type(reason).__name__)
