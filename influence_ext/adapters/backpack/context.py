"""What an extended network does in its passes, and the context in which a backward pass fills fields."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from influence_ext.adapters.backpack.extensions import Extension
from influence_ext.adapters.backward import ForwardPass, recording, run, without
from influence_ext.errors import ArgumentError, DTypeError, UnsupportedModelError

_WHO = "backpack"
_MARK = "_backpack_twin"


Found = tuple[Extension, dict[str, Tensor]]
_active: list[backpack] = []
_storing: list[bool] = [True]


class backpack:
    """``with backpack(BatchGrad(), BatchL2Grad()): loss.backward()`` fills the fields of extended networks' parameters.

    After ``loss.backward(create_graph=True)`` the fields can be differentiated, by parameters and by the network's inputs; they are then
    computed by torch.

    Args:
        exts: instances of :class:`BatchGrad`, :class:`BatchL2Grad`, :class:`SumGradSquared`, :class:`Variance`.
        extension_hook: called on every module of the network that owns a parameter, last layer first, once the fields are filled.
        debug: print which quantities are computed.
        retain_graph: takes no effect; what a second backward pass needs lives as long as the graph.

    Raises:
        ArgumentError (a ValueError): not one of these, or the class in place of an instance.
    """

    def __init__(
        self,
        *exts: Any,
        extension_hook: Callable[[nn.Module], None] | None = None,
        debug: bool = False,
        retain_graph: bool = False,
    ):
        for ext in exts:
            if not isinstance(ext, Extension):
                name = ext.__name__ if isinstance(ext, type) else type(ext).__name__
                advice = "curvature is in ie.GGN and its kin"
                if name in ("BatchGrad", "BatchL2Grad", "SumGradSquared", "Variance"):
                    ours = isinstance(ext, type) and issubclass(ext, Extension)
                    advice = f"write {name}()" if ours else "import it from there"
                raise ArgumentError(
                    f"{_WHO}: expected instances of BatchGrad, BatchL2Grad, SumGradSquared or Variance from "
                    f"influence_ext.adapters.backpack, got {'the class ' if isinstance(ext, type) else ''}{name}; {advice}."
                )
        self.exts, self.extension_hook, self.debug, self.retain_graph = exts, extension_hook, debug, retain_graph

    def __enter__(self) -> None:
        _active.append(self)

    def __exit__(self, *exception: object) -> None:
        _active.remove(self)

    def fill(self, call: ForwardPass, network: nn.Module, cotangents: Tensor) -> None:
        """Compute the quantities and set them.

        Raises:
            UnsupportedModelError: in a backward pass through derivatives.
        """
        if self.exts and call.second_order:
            raise UnsupportedModelError(
                f"{_WHO}: expected a backward pass from a loss, got one through derivatives made with create_graph=True, which has no "
                "gradients of single examples here; leave the with block before it."
            )
        for p in call.parameters.values():
            for ext in self.exts:
                p.__dict__.pop(ext.savefield, None)
        found = self._with_graph if torch.is_grad_enabled() else self._without_graph
        for ext, by_name in found(call, cotangents):
            if self.debug:
                print(f"[DEBUG] {type(ext).__name__} of {type(network).__name__}")
            for name, value in by_name.items():
                p = call.parameters[name]
                setattr(p, ext.savefield, value.to(p.dtype))
        if self.extension_hook is not None:
            for module in reversed(list(network.modules())):
                if any(p.requires_grad for p in module.parameters(recurse=False)):
                    self.extension_hook(module)

    def _without_graph(self, call: ForwardPass, cotangents: Tensor) -> Iterator[Found]:
        factors = call.factors(cotangents) if self.exts else None
        return ((ext, ext.compute(call, cotangents, factors)) for ext in self.exts)

    def _with_graph(self, call: ForwardPass, cotangents: Tensor) -> Iterator[Found]:
        rows = call.differentiable_rows(cotangents) if self.exts else {}
        return ((ext, {name: ext.of_rows(row) for name, row in rows.items()}) for ext in self.exts)


class disable:
    """``with disable():`` forward passes of extended networks are torch's own, with ordinary gradients."""

    def __enter__(self) -> None:
        _storing.append(False)

    def __exit__(self, *exception: object) -> None:
        _storing.pop()

    @staticmethod
    def should_store_io() -> bool:
        """Whether forward passes are prepared for :class:`backpack`."""
        return _storing[-1]


def extend(module: nn.Module, debug: bool = False, use_converter: bool = False) -> nn.Module:
    """Let the backward passes of a network fill the fields that :class:`backpack` asks for.

    Args:
        module: a network; its ``forward`` is replaced on this instance. Modules without parameters, such as losses, are left as they are.
        debug: print the module's name.
        use_converter: takes no effect; networks need no conversion.

    Returns:
        ``module``.

    Raises:
        DTypeError (a TypeError): not a module.

    Its forward pass raises what :func:`influence_ext.adapters.backward.run` raises. Cost of a backward pass: one cotangent sweep for
    ``p.grad``, one for all quantities; with ``create_graph=True`` torch's forward and backward pass, and N of single examples.
    """
    if not isinstance(module, nn.Module):
        raise DTypeError(f"{_WHO}: expected an nn.Module to extend, got {type(module).__name__}; functions need no extension.")
    if debug:
        print(f"[DEBUG] Extending {type(module).__name__}")
    if any(True for _ in module.parameters()) and _MARK not in module.__dict__:
        module.__dict__[_MARK] = without(module)
        module.__dict__["forward"] = partial(_forward, module)  # unlike a bound method it can be pickled
    return module


def _forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    twin = _twin(module)
    trains = any(p.requires_grad for p in module.parameters())
    if not (recording() and disable.should_store_io() and trains):
        return twin.forward(*args, **kwargs)

    def fill(call: ForwardPass, cotangents: Tensor) -> None:
        if _active:
            _active[-1].fill(call, module, cotangents)

    return run(twin, args, kwargs, fill, _WHO, twice=True)[0]


def _twin(module: nn.Module) -> nn.Module:
    """The module as it is now, but for the forward pass that ``extend`` put there; always the same object, so that its plan is kept."""
    twin: nn.Module = module.__dict__[_MARK]
    own = {"forward": twin.__dict__["forward"]} if "forward" in twin.__dict__ else {}
    attributes = without(module, _MARK, "forward").__dict__
    twin.__dict__.clear()
    twin.__dict__.update(attributes, **own)
    return twin
