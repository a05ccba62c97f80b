"""Is a live model still what it was? Answered by comparing identities, at a hundredth of what describing it anew costs."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter, is_, itemgetter
from typing import Any, Generic, TypeVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from influence_ext.capture.signature import HOOKS, IGNORED, Describer, user_classes

# Their values never change and `is` tells them apart at least as finely as `==`.
_IMMUTABLE = frozenset(
    (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)
)  # fmt: skip
_registered = itemgetter("_parameters", "_buffers", "_modules")
_traits = attrgetter("shape", "dtype", "device", "requires_grad")
Holder = Callable[[], Any]
T = TypeVar("T")


class Watch:
    """What ``structure_key`` describes of a model, remembered so that a second look is cheap.

    Modules, parameters and buffers are compared by identity (held weakly, so that a recycled address never matches and the model may
    die); plain immutable attributes and the members of the modules' classes likewise; shape, dtype, device and ``requires_grad`` of every
    tensor by value. Attributes that can change inside (lists, dicts, plain tensors, functions, objects) and hooks are described again
    each time. Values of parameters and buffers play no part: they are read at every call. ``unchanged`` may say no to a model that is the
    same after all, never yes to one that is not.
    """

    def __init__(self, model: nn.Module):
        modules = list(model.modules())
        self._modules = [_WatchedModule(module) for module in modules]
        self._classes = [(cls, _Members(vars(cls))) for cls in dict.fromkeys(c for m in modules for c in user_classes(type(m)))]
        self._normalisations = [weakref.ref(module) for module in modules if isinstance(module, _BatchNorm)]
        tensors = dict.fromkeys([*(p for m in modules for p in m._parameters.values()), *(b for m in modules for b in m._buffers.values())])
        self._tensors = [weakref.ref(t) for t in tensors if t is not None]
        self._traits = [_traits(t) for t in tensors if t is not None]
        # Addresses, good as long as the identities hold.
        self._registered = Describer.of(model).registered
        self._described = self._describe(modules)

    def unchanged(self) -> bool:
        """Whether a graph captured when the watch was made still holds."""
        modules = [watched.module() for watched in self._modules]
        for watched, module in zip(self._modules, modules, strict=True):
            if module is None or not watched.matches(module):
                return False
        if [_traits(reference()) for reference in self._tensors] != self._traits:
            return False
        for cls, members in self._classes:
            if not members.match(vars(cls)):
                return False
        for reference in self._normalisations:
            module = reference()
            if module is None or module.training:
                return False
        return not self._described or self._describe(modules) == self._described

    def _describe(self, modules: Sequence[Any]) -> list[Hashable]:
        describe = Describer(self._registered)
        found: list[Hashable] = []
        for watched, module in zip(self._modules, modules, strict=True):
            attributes = module.__dict__
            found += [describe.value(attributes[key]) for key in watched.mutable]
            if watched.has_hooks:
                found += [describe.hooks(attributes[key]) for key in watched.hooks]
        return found


class Remembered(Generic[T]):
    """Values worked out from the structure of live models, each kept until its model changes or dies.

    Args:
        limit: values kept for one model; the oldest goes first.
    """

    def __init__(self, limit: int = 64):
        self._limit = limit
        self._by_model: dict[int, _Entry[T]] = {}

    def find(self, model: nn.Module, key: Hashable) -> T | None:
        """What was kept for ``model`` under ``key``; None if nothing was, or the model has changed since."""
        entry = self._by_model.get(id(model))
        if entry is None or key not in entry.values:
            return None
        if entry.model() is not model or not entry.watch.unchanged():
            self._by_model.pop(id(model), None)
            return None
        return entry.values.get(key)

    def keep(self, model: nn.Module, key: Hashable, value: T) -> None:
        """Keep a value worked out from ``model`` as it is now. It must not hold the model."""
        entry = self._by_model.get(id(model))
        if entry is None or entry.model() is not model or not entry.watch.unchanged():
            address = id(model)
            entry = _Entry(weakref.ref(model, lambda _: self._by_model.pop(address, None)), Watch(model), {})
            self._by_model[address] = entry
        entry.values[key] = value
        while len(entry.values) > self._limit:
            entry.values.pop(next(iter(entry.values)))

    def clear(self) -> None:
        """Forget everything."""
        self._by_model.clear()


@dataclass(frozen=True, eq=False)
class _Entry(Generic[T]):
    model: weakref.ref[nn.Module]
    watch: Watch
    values: dict[Hashable, T]


class _WatchedModule:
    """One module without its children."""

    def __init__(self, module: nn.Module):
        attributes = module.__dict__
        self.module = weakref.ref(module)
        self._type = type(module)
        self._keys = tuple(attributes)
        others = [key for key in attributes if key not in IGNORED and key not in HOOKS]
        plain = [key for key in others if _is_immutable(attributes[key])]
        self.mutable = tuple(key for key in others if key not in plain)
        self.hooks = tuple(key for key in attributes if key in HOOKS)
        self._plain, self._hooks = _getter(plain), _getter(self.hooks)
        self._values = self._plain(attributes)
        self.has_hooks = any(self._hooks(attributes))
        self._parameters, self._buffers, self._children = map(_Members, _registered(attributes))

    def matches(self, module: nn.Module) -> bool:
        """Whether ``module``, the one that was watched, is unchanged as far as identities tell."""
        attributes = module.__dict__
        if type(module) is not self._type or tuple(attributes) != self._keys:
            return False
        parameters, buffers, children = _registered(attributes)
        return (
            all(map(is_, self._values, self._plain(attributes)))
            and any(self._hooks(attributes)) == self.has_hooks
            and self._parameters.match(parameters)
            and self._buffers.match(buffers)
            and self._children.match(children)
        )


class _Members:
    """The entries of a mapping by key and identity."""

    def __init__(self, mapping: Mapping[str, Any]):
        self._keys = tuple(mapping)
        self._holders = [_holder(value) for value in mapping.values()]
        # A reference to what is gone gives None too.
        self._is_none = [value is None for value in mapping.values()]

    def match(self, mapping: Mapping[str, Any]) -> bool:
        """Whether ``mapping`` holds the same objects under the same names."""
        if not mapping:
            return not self._keys
        values = mapping.values()
        return (
            tuple(mapping) == self._keys
            and all(map(is_, [holder() for holder in self._holders], values))
            and [value is None for value in values] == self._is_none
        )


def _getter(keys: Sequence[str]) -> Callable[[Mapping[str, Any]], tuple[Any, ...]]:
    """``itemgetter`` that returns a tuple whatever the number of keys."""
    if len(keys) > 1:
        return itemgetter(*keys)
    return lambda mapping: tuple(mapping[key] for key in keys)


def _is_immutable(value: Any) -> bool:
    return type(value) in _IMMUTABLE or (type(value) is tuple and all(map(_is_immutable, value)))


def _holder(value: Any) -> Holder:
    """A weak reference where there can be one."""
    try:
        return weakref.ref(value)
    except TypeError:
        return lambda: value
