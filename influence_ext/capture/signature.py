"""When may a captured graph be used again? A key of everything a forward pass can read, compared by value where
possible.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import sys
import types
import weakref
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

# Attributes of nn.Module that no forward pass reads, or that are described separately.
IGNORED = frozenset(
    {
        "training",
        "_parameters",
        "_buffers",
        "_modules",
        "_non_persistent_buffers_set",
        "_is_full_backward_hook",
        "_backward_hooks",
        "_backward_pre_hooks",
        "_state_dict_hooks",
        "_state_dict_pre_hooks",
        "_load_state_dict_pre_hooks",
        "_load_state_dict_post_hooks",
    }
)
HOOKS = frozenset(
    {
        "_forward_hooks",
        "_forward_hooks_with_kwargs",
        "_forward_hooks_always_called",
        "_forward_pre_hooks",
        "_forward_pre_hooks_with_kwargs",
    }
)
_PLAIN = (
    bool,
    int,
    str,
    bytes,
    type(None),
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
    type,
    enum.Enum,
)

# Containers and objects nested deeper than this count as equal only to themselves.
_MAX_DEPTH = 6


def structure_key(model: nn.Module, inputs: Mapping[str, Tensor], by_name: bool) -> Hashable:
    """A hashable key: equal keys mean equal graphs.

    It holds the module tree (types, their code, plain attributes by value, forward hooks), shape, dtype, device,
    ``requires_grad`` and tying of every parameter and buffer, the inputs' names, per-example shapes and dtypes, and
    torch's default dtype and autocast state. It does not hold the number of examples, training flags, or values of
    parameters and buffers. Objects that have no value of their own to compare (functions, arbitrary classes) count as
    equal only to themselves. Module-level globals that a forward pass reads are taken to be constant.

    Cost: one pass over the module tree; plain (unregistered) tensor attributes are hashed by content.
    """
    describe = Describer.of(model)
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    tensors = tuple((name, describe.registered[id(t)], tuple(t.shape), t.dtype, t.device, t.requires_grad) for name, t in named)
    modules = tuple((name, describe.module(m)) for name, m in model.named_modules(remove_duplicate=False))
    return (modules, tensors, by_name, call_signature(inputs))


def call_signature(inputs: Mapping[str, Tensor]) -> Hashable:
    """What a graph depends on besides the model: shapes and dtypes of the inputs by name, without the number of examples, and torch's
    default dtype and autocast state.
    """
    shapes = tuple((name, x.shape[1:], x.dtype, x.device) for name, x in inputs.items())
    autocast = tuple((torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda"))
    return (shapes, torch.get_default_dtype(), autocast)


class _Same:
    """Equal only to itself, and only while the object lives, so a recycled address never matches."""

    def __init__(self, value: Any):
        self._hash = id(value)
        self._value: Callable[[], Any]
        try:
            self._value = weakref.ref(value)
        except TypeError:
            self._value = lambda: value

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and (value := self._value()) is not None and value is other._value()


class Describer:
    """Turns what hangs on a module tree into hashable descriptions.

    ``registered`` names its parameters, buffers and modules by their addresses.
    """

    def __init__(self, registered: Mapping[int, str]):
        self.registered = registered
        self._types: dict[type, Hashable] = {}
        self._seen: dict[int, int] = {}
        self._depth = 0

    @classmethod
    def of(cls, model: nn.Module) -> Describer:
        """For what hangs on ``model`` as it is now."""
        registered: dict[int, str] = {}
        tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        for name, item in [*tensors, *model.named_modules(remove_duplicate=False)]:
            registered.setdefault(id(item), name)
        return cls(registered)

    def module(self, module: nn.Module) -> Hashable:
        """A registered module without its children, parameters and buffers, which the key lists by name."""
        attributes = tuple(
            (key, self.hooks(value) if key in HOOKS else self.value(value))
            for key, value in sorted(module.__dict__.items())
            if key not in IGNORED
        )
        children = tuple(module.__dict__["_modules"])
        return (self._type(type(module)), self.registered[id(module)], children, attributes)

    def value(self, value: Any) -> Hashable:
        """Any attribute."""
        if isinstance(value, _PLAIN):
            return (type(value), value)
        if isinstance(value, (float, complex)):
            return (type(value), repr(value))
        if id(value) in self.registered and isinstance(value, (Tensor, nn.Module)):
            return ("registered", self.registered[id(value)])
        if isinstance(value, Tensor):
            return ("tensor", tuple(value.shape), value.dtype, value.device, _digest(value))
        if id(value) in self._seen:  # shared or cyclic: described where it was met first
            return ("again", self._seen[id(value)])
        if self._depth == _MAX_DEPTH:
            return _Same(value)
        self._seen[id(value)] = len(self._seen)
        self._depth += 1
        try:
            return self._compound(value)
        finally:
            self._depth -= 1

    def _compound(self, value: Any) -> Hashable:
        if isinstance(value, (list, tuple)):
            return (type(value), tuple(self.value(v) for v in value))
        if isinstance(value, (set, frozenset)):
            return (type(value), frozenset(self.value(v) for v in value))
        if isinstance(value, dict):
            return (type(value), tuple((self.value(k), self.value(v)) for k, v in value.items()))
        if isinstance(value, functools.partial):
            return ("partial", self.value(value.func), self.value(value.args), self.value(value.keywords))
        if isinstance(value, types.MethodType):
            return ("method", self.value(value.__func__), self.value(value.__self__))
        if isinstance(value, types.FunctionType):
            cells = tuple(self._cell(cell) for cell in value.__closure__ or ())
            return ("function", _Same(value), cells, self.value(value.__defaults__), self.value(value.__kwdefaults__))
        numpy = sys.modules.get("numpy")
        if numpy is not None and isinstance(value, (numpy.ndarray, numpy.generic)) and not value.dtype.hasobject:
            return ("numpy", str(value.dtype), value.shape, hashlib.blake2b(value.tobytes()).hexdigest())
        state = self.value(vars(value)) if hasattr(value, "__dict__") else None
        if isinstance(value, (nn.Module, types.SimpleNamespace)) or dataclasses.is_dataclass(value):
            return (self._type(type(value)), state)
        return (self._type(type(value)), _Same(value), state)

    def _cell(self, cell: types.CellType) -> Hashable:
        try:
            return self.value(cell.cell_contents)
        except ValueError:
            return ("empty cell",)

    def hooks(self, hooks: Any) -> Hashable:
        """Hooks without their registration numbers, which differ between equal models."""
        return tuple(self.value(hook) for hook in hooks.values())

    def _type(self, cls: type) -> Hashable:
        """A class with its code as it is now, so that a method patched onto the class counts."""
        if cls not in self._types:
            self._types[cls] = cls
            self._types[cls] = (cls, tuple((c, tuple((k, _code(v)) for k, v in vars(c).items())) for c in user_classes(cls)))
        return self._types[cls]


def user_classes(cls: type) -> list[type]:
    """``cls`` and its bases as far as they are not torch's: methods may be patched onto them."""
    return [c for c in cls.__mro__ if c is not object and not c.__module__.startswith(("torch.", "builtins"))]


def _code(member: Any) -> Hashable:
    if isinstance(member, _PLAIN):
        return (type(member), member)
    return repr(member) if isinstance(member, (float, complex)) else _Same(member)


def _digest(tensor: Tensor) -> str:
    data = tensor.detach().cpu().contiguous().reshape(-1)
    return hashlib.blake2b(data.view(torch.uint8).numpy().tobytes() if data.numel() else b"").hexdigest()
