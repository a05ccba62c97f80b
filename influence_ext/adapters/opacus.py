"""Opacus' ``GradSampleModule``, and its samplers, on this library's kernels.

``GradSampleModule(model)`` fills ``p.grad_sample`` in ``loss.backward()``. ``register_grad_samplers()`` gives Opacus' own module, and with
it ``PrivacyEngine``, our kernels for the layers they exist for. Scale, as in Opacus: ``grad_sample[n]`` is the gradient of the unreduced
loss of example n; a loss that averages over the batch has its 1/N undone.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from influence_ext.adapters.backward import ForwardPass, before_autocast, named, one_way, recording, run, widened_call, without
from influence_ext.context import standalone
from influence_ext.errors import ArgumentError, DTypeError, ShapeError, UnsupportedModelError
from influence_ext.plan import Plan

LAYERS: tuple[type[nn.Module], ...] = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.Embedding,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
    nn.RMSNorm,
)
"""Layers that :func:`register_grad_samplers` registers kernels for."""

GradSampler = Callable[[nn.Module, list[Tensor], Tensor], dict[nn.Parameter, Tensor]]
_WHO = "GradSampleModule"


class GradSampleModule(nn.Module):
    """A model whose parameters get ``.grad_sample`` (``[N, *shape]``) beside ``.grad`` in every backward pass.

    As in Opacus: recorded in training mode, with gradients enabled and hooks not disabled; else the wrapped model runs as it is. Several
    forward passes before their backward passes (a network used twice) add up; further rounds make ``grad_sample`` a list. Tied parameters
    have one ``grad_sample``, cross terms included. Attributes that are no module's are looked up among the wrapped model's modules.

    Unlike in Opacus: any model works whose examples do not see each other, since the whole network is linearised; active dropout and batch
    norm in training mode are refused. A parameter that the output does not depend on keeps ``grad_sample`` None, as there.

    Args:
        m: the model; its parameters get attributes, nothing else is changed.
        batch_first: True: the first axis of inputs and output counts examples; False: the second one does.
        loss_reduction: ``"mean"`` or ``"sum"`` over the examples of a batch, what the loss does.
        strict: refuse batch norm in training mode now rather than in the first forward pass.
        force_functorch: takes no effect; there is one way to compute gradients.

    Raises:
        DTypeError (a TypeError): ``m`` is no module.
        ArgumentError (a ValueError): another ``loss_reduction``.
        UnsupportedModelError (a NotImplementedError): with ``strict``, batch norm in training mode.

    Cost of a backward pass: two cotangent sweeps, and N·P elements written once, into memory that is used again when no ``grad_sample``
    lies in it any more (:func:`influence_ext.set_cache_limit`).
    """

    def __init__(
        self,
        m: nn.Module,
        *,
        batch_first: bool = True,
        loss_reduction: str = "mean",
        strict: bool = True,
        force_functorch: bool = False,
    ):
        super().__init__()
        if not isinstance(m, nn.Module):
            raise DTypeError(f"{_WHO}: expected an nn.Module, got {m!r}; pass an instance.")
        if loss_reduction not in ("mean", "sum"):
            raise ArgumentError(f"{_WHO}: expected loss_reduction 'mean' or 'sum', got {loss_reduction!r}; say what the loss does.")
        self._module = m
        self._start()
        self.batch_first, self.loss_reduction, self.force_functorch = batch_first, loss_reduction, force_functorch
        self.grad_accumulation_allowed = True
        self.hooks_enabled = True
        self.validate(m, strict=strict)
        for p in self._trainable():
            p.grad_sample = None  # type: ignore[attr-defined]

    def _start(self) -> None:
        """What belongs to this object alone, with nothing recorded."""
        self._waiting: weakref.WeakSet[Any] = weakref.WeakSet()
        self._current: dict[nn.Parameter, Tensor] = {}
        self.__dict__["_turned"] = _Turned(self._module)  # past nn.Module, which would count its parameters twice

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped model's output.

        Raises:
            DTypeError, ShapeError, DeviceError, UnsupportedModelError: see :func:`influence_ext.adapters.backward.run`.
        """
        if not (self.hooks_enabled and self.training and recording() and any(True for _ in self._trainable())):
            return self._module(*args, **kwargs)
        axis = 0 if self.batch_first else 1
        inputs = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        if any(x.dim() > axis and x.shape[axis] == 0 for x in inputs):
            return self._of_no_examples(*before_autocast(self._module, args, kwargs))
        if self.batch_first:
            output, call = run(self._module, args, kwargs, self._record, _WHO)
        else:
            if any(x.dim() < 2 for x in inputs):
                raise ShapeError(f"{_WHO}: expected inputs [K, N, ...] with batch_first=False, got {[list(x.shape) for x in inputs]}.")
            args, kwargs = one_way(self._module, args, kwargs, _WHO)
            args, kwargs = tuple(map(_turn, args)), {key: _turn(x) for key, x in kwargs.items()}
            output, call = run(self.__dict__["_turned"], args, kwargs, self._record, _WHO)
            output = _turn(output)
        self._waiting.add(call)
        return output

    @standalone
    def _of_no_examples(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Of an empty batch, as Poisson sampling draws them: torch computes, and no row is recorded for any parameter."""
        output: Tensor = widened_call(self._module, {}, args, kwargs)

        def record(_: Tensor) -> None:
            self._waiting.discard(record)
            if self.hooks_enabled:
                for p in self._trainable():
                    self._current.setdefault(p, p.detach().new_zeros(0, *p.shape))
                if not self._waiting:
                    self._promote()

        if output.requires_grad:
            output.register_hook(record)
            self._waiting.add(record)
        return output

    def _record(self, call: ForwardPass, cotangents: Tensor) -> None:
        """Called in the backward pass."""
        if not self.hooks_enabled:
            return
        N = call.num_examples
        unreduced = cotangents * N if self.loss_reduction == "mean" else cotangents
        for name, rows in call.rows(call.factors(unreduced)).items():
            p = call.parameters[name]
            other = self._current.get(p)
            if other is None:
                self._current[p] = rows
            else:
                longer, shorter = (other, rows) if len(other) >= len(rows) else (rows, other)
                longer[: len(shorter)] += shorter
                self._current[p] = longer
        self._waiting.discard(call)
        if not self._waiting:
            self._promote()

    def _promote(self) -> None:
        """One batch is complete: what it gave goes to the parameters."""
        current, self._current = self._current, {}
        p: Any
        for p, rows in current.items():
            rows = rows.to(p.dtype)
            before = getattr(p, "grad_sample", None)
            p.grad_sample = rows if before is None else [*before, rows] if isinstance(before, list) else [before, rows]
            if not self.grad_accumulation_allowed and isinstance(p.grad_sample, list):
                raise ArgumentError(
                    f"{_WHO}: expected one backward pass between steps while gradient accumulation is forbidden, got "
                    f"{len(p.grad_sample)}; call zero_grad() after each step, or allow_grad_accumulation()."
                )

    def set_grad_sample_to_none(self) -> None:
        """``p.grad_sample = None`` for every parameter."""
        for p in self._module.parameters():
            p.grad_sample = None  # type: ignore[attr-defined]

    def del_grad_sample(self) -> None:
        """Take the attribute off every parameter."""
        for p in self._module.parameters():
            if hasattr(p, "grad_sample"):
                del p.grad_sample

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Clear ``p.grad`` (to zero, or to None) and set ``p.grad_sample`` to None."""
        self.set_grad_sample_to_none()
        super().zero_grad(set_to_none)

    def forbid_grad_accumulation(self) -> None:
        """From now on a second backward pass without ``zero_grad`` raises an ArgumentError (a ValueError)."""
        self.grad_accumulation_allowed = False

    def allow_grad_accumulation(self) -> None:
        """The opposite of :meth:`forbid_grad_accumulation`."""
        self.grad_accumulation_allowed = True

    def enable_hooks(self) -> None:
        """Record again after :meth:`disable_hooks`."""
        self.hooks_enabled = True

    def disable_hooks(self) -> None:
        """From now on nothing is recorded, also in backward passes through earlier forward passes."""
        self.hooks_enabled = False

    def add_hooks(self, *, loss_reduction: str = "mean", batch_first: bool = True, force_functorch: bool = False) -> None:
        """Record again after :meth:`remove_hooks`.

        Raises:
            ArgumentError (a ValueError): it is recording already.
        """
        if self.hooks_enabled:
            raise ArgumentError(f"{_WHO}.add_hooks: expected a module that does not record, got one that does; call remove_hooks() first.")
        self.loss_reduction, self.batch_first, self.force_functorch = loss_reduction, batch_first, force_functorch
        self.enable_hooks()

    def remove_hooks(self) -> None:
        """The same as :meth:`disable_hooks`: no hook hangs on the model's modules."""
        self.disable_hooks()

    def to_standard_module(self) -> nn.Module:
        """The wrapped model, its parameters without ``grad_sample``."""
        self.remove_hooks()
        self.del_grad_sample()
        return self._module

    @classmethod
    def validate(cls, module: nn.Module, *, strict: bool = False) -> list[NotImplementedError]:
        """What would be refused in the first forward pass in the present mode: batch norm in training mode.

        Raises:
            UnsupportedModelError (a NotImplementedError): there is some, and ``strict`` is set.
        """
        errors: list[NotImplementedError] = [
            UnsupportedModelError(
                f"{_WHO}: expected a model whose examples do not see each other, got {named(name, m)} in training mode; call "
                "eval() on it, or use group norm."
            )
            for name, m in module.named_modules()
            if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training
        ]
        if errors and strict:
            raise errors[0]
        return errors

    @classmethod
    def is_supported(cls, module: nn.Module) -> bool:
        """Whether :meth:`validate` finds nothing."""
        return not cls.validate(module)

    def _trainable(self) -> Iterator[nn.Parameter]:
        return (p for p in self._module.parameters() if p.requires_grad)

    def __getstate__(self) -> dict[str, Any]:
        """Without the passes that wait for their backward pass: a copy has none."""
        return {key: value for key, value in self.__dict__.items() if key not in ("_waiting", "_current", "_turned")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._start()

    def __getattr__(self, item: str) -> Any:
        try:
            return super().__getattr__(item)
        except AttributeError:
            module = self.__dict__.get("_modules", {}).get("_module")
            modules = {} if module is None else dict(module.named_modules())
            if item and item in modules:
                return modules[item]
            raise

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._module!r})"


class _Turned(nn.Module):
    """A model with the examples on the second axis of its inputs and output, as one with the examples first."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        return _turn(self.module(*map(_turn, args), **{key: _turn(x) for key, x in kwargs.items()}))


def _turn(x: Any) -> Any:
    """Exchange a tensor's first two axes."""
    return x.transpose(0, 1) if isinstance(x, Tensor) else x


def register_grad_samplers(layers: Sequence[type[nn.Module]] = LAYERS) -> Callable[[], None]:
    """Let Opacus' own ``GradSampleModule`` (and so its ``PrivacyEngine``) compute with our kernels.

    Args:
        layers: among ``LAYERS``.

    Returns:
        A function that puts back what was registered before.

    Raises:
        ImportError: Opacus is not installed.
        ArgumentError (a ValueError): a layer that there is no kernel for.
    """
    from opacus.grad_sample import GradSampleHooks, GradSampleHooksFastGradientClipping, register_grad_sampler

    unknown = [getattr(layer, "__name__", repr(layer)) for layer in layers if layer not in LAYERS]
    if unknown:
        raise ArgumentError(
            f"register_grad_samplers: expected layers among {', '.join(layer.__name__ for layer in LAYERS)}, got {', '.join(unknown)}; "
            "leave these to Opacus, or wrap the whole model in GradSampleModule."
        )
    tables = [hooks.GRAD_SAMPLERS for hooks in (GradSampleHooks, GradSampleHooksFastGradientClipping)]
    before = [(table, {layer: table.get(layer) for layer in layers}) for table in tables]
    register_grad_sampler(list(layers))(grad_sampler)

    def restore() -> None:
        for table, samplers in before:
            for layer, sampler in samplers.items():
                if sampler is None:
                    table.pop(layer, None)
                else:
                    table[layer] = sampler

    return restore


_twins: weakref.WeakKeyDictionary[nn.Module, nn.Module] = weakref.WeakKeyDictionary()
# What Opacus hangs on a layer.
_FOREIGN = ("activations", "max_batch_len", "ft_compute_sample_grad", "autograd_grad_sample_hooks")


@standalone
def grad_sampler(layer: nn.Module, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    """A sampler in Opacus' sense: ``{parameter: [N, *shape]}`` of the layer's trained parameters.

    Args:
        layer: of one of the classes in ``LAYERS``.
        activations: the layer's inputs, of which the first counts.
        backprops: cotangents of its output.

    Cost: the layer's forward pass and N·P elements written once.
    """
    x = activations[0]
    trained = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    if x.shape[0] == 0 or not trained:
        return {p: p.detach().new_zeros(x.shape[0], *p.shape) for p in trained.values()}
    x = x.to(next(iter(trained.values())).dtype) if x.is_floating_point() else x  # under autocast it arrives in half precision
    plan = Plan.of(_twin(layer), x, None, "grad_sampler")
    tape = plan.linearize(x)
    rows = tape.factors(backprops.detach().to(tape.outputs.dtype)[None]).materialise(None).view(x.shape[0], -1)
    return {trained[name]: value.to(trained[name].dtype) for name, value in plan.space.unflatten(rows).items()}


def _twin(layer: nn.Module) -> nn.Module:
    """The layer as it is now without what Opacus hangs on it; always the same object, so that its plan is kept."""
    fresh = without(layer, *_FOREIGN)
    twin = _twins.setdefault(layer, fresh)
    if twin is not fresh:
        twin.__dict__.clear()
        twin.__dict__.update(fresh.__dict__)
    return twin
