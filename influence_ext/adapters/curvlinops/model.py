"""What curvlinops takes for a model, as a module that the library captures, and whether its numbers have changed since."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from influence_ext.adapters.curvlinops.data import Structure
from influence_ext.errors import ArgumentError

Parameters = Sequence[Tensor] | Mapping[str, Tensor]


class Subject:
    """A model, the parameters that are differentiated, in the user's order, and the values both had when last looked at.

    Args:
        model: a module, or for a dictionary of parameters also ``function(params, X) -> prediction``.
        params: parameters of the module, as a list; or a dictionary name -> tensor of the values at which to evaluate.
        structure: how one batch's input is passed.
        who: the caller's name for messages.

    Raises:
        ArgumentError: parameters that are none of the module's or occur twice, or a function without a dictionary.
    """

    def __init__(self, model: Any, params: Parameters, structure: Structure, who: str):
        self.tensors: tuple[Tensor, ...] = tuple(params.values() if isinstance(params, Mapping) else params)
        self._structure = structure
        if not self.tensors:
            raise ArgumentError(f"{who}: expected at least one parameter, got none; pass list(model.parameters()).")
        if isinstance(model, nn.Module):
            self._model = model
            self._names = _known_names(model, params, who) if isinstance(params, Mapping) else _names_of(model, self.tensors, who)
        elif isinstance(params, Mapping) and callable(model):
            self._model = _Function(model, params)
            self._names = tuple(f"values.{k}" for k in range(len(self.tensors)))
        else:
            raise ArgumentError(
                f"{who}: expected model_func to be an nn.Module, or with a dictionary of parameters a function (params, X) -> prediction, "
                f"got {type(model).__name__} with params as a {type(params).__name__}; pass one of these."
            )
        self._watched = (*self.tensors, *_others(self._model, self._names))
        self._prefix = "" if structure.single else "model."
        self._twin: nn.Module | None = None
        self.look()

    @property
    def names(self) -> tuple[str, ...]:
        """Of the differentiated parameters in ``module``, in the user's order."""
        return tuple(self._prefix + name for name in self._names)

    def look(self) -> nn.Module:
        """Remember the present values; the module that computes with them."""
        self._seen = tuple(t.detach().clone() for t in self._watched)
        model = self._model
        present = dict(model.named_parameters(remove_duplicate=False))
        if not all(present.get(name) is t and t.requires_grad for name, t in zip(self._names, self.tensors, strict=True)):
            model = self._at_values()
        return model if self._structure.single else _Packed(model, self._structure)

    def changed(self) -> bool:
        """Whether a parameter or a buffer, trained or not, has other values than when last looked at.

        Compares the numbers: what is written through ``p.data`` leaves no other trace. Cost: one pass over the parameters.
        """
        return not all(_equal(now, then) for now, then in zip(self._watched, self._seen, strict=True))

    def _at_values(self) -> nn.Module:
        """The model with the given tensors in place of its own parameters; everything else is shared with it."""
        if self._twin is None:
            present = dict(self._model.named_parameters(remove_duplicate=False))
            shared = {id(t): t for t in (*present.values(), *self._model.buffers())}
            for name, t in zip(self._names, self.tensors, strict=True):
                shared[id(present[name])] = nn.Parameter(t.detach())
            self._twin = copy.deepcopy(self._model, shared)
        twins = dict(self._twin.named_parameters(remove_duplicate=False))
        for name, t in zip(self._names, self.tensors, strict=True):
            twins[name].data = t.detach()
        return self._twin


class _Packed(nn.Module):
    """A model that takes a mapping or a sequence as its one argument, called with the tensors in it."""

    def __init__(self, model: nn.Module, structure: Structure):
        super().__init__()
        self.model = model
        self.structure = structure
        self.training = model.training

    def forward(self, *tensors: Tensor) -> Any:
        return self.model(self.structure.pack(tensors))


class _Function(nn.Module):
    """``function(params, X)`` with the parameters as its own; they keep their memory."""

    def __init__(self, function: Callable[..., Any], params: Mapping[str, Tensor]):
        super().__init__()
        self.function = function
        self.keys = tuple(params)
        self.values = nn.ParameterList(nn.Parameter(t.detach()) for t in params.values())
        self.eval()

    def forward(self, X: Any) -> Any:
        return self.function(dict(zip(self.keys, self.values, strict=True)), X)


def _names_of(model: nn.Module, params: Sequence[Tensor], who: str) -> tuple[str, ...]:
    found = {id(p): name for name, p in model.named_parameters()}
    missing = [list(p.shape) for p in params if id(p) not in found]
    if missing:
        raise ArgumentError(
            f"{who}: expected params to hold the model's own parameters, got tensors of shapes {missing} that are none of them; pass "
            "list(model.parameters()), or a dictionary by name for other values."
        )
    names = tuple(found[id(p)] for p in params)
    if len(set(names)) < len(names):
        raise ArgumentError(f"{who}: expected every parameter once, got {', '.join(names)}; drop the repetition.")
    return names


def _known_names(model: nn.Module, params: Mapping[str, Tensor], who: str) -> tuple[str, ...]:
    present = dict(model.named_parameters(remove_duplicate=False))
    wrong = [name for name, t in params.items() if name not in present or present[name].shape != t.shape]
    if wrong:
        raise ArgumentError(
            f"{who}: expected params to name parameters of the model with their shapes, got {', '.join(wrong)}, which do not fit; pass "
            "dict(model.named_parameters()) or a part of it."
        )
    first = {id(p): name for name, p in model.named_parameters()}
    names = tuple(first[id(present[name])] for name in params)
    if len(set(names)) < len(names):
        raise ArgumentError(f"{who}: expected every parameter once, got several names of one tied parameter; keep one of them.")
    return names


def _others(model: nn.Module, names: Sequence[str]) -> tuple[Tensor, ...]:
    """Frozen parameters and buffers."""
    return (*(p for name, p in model.named_parameters() if name not in names), *model.buffers())


def _equal(now: Tensor, then: Tensor) -> bool:
    return now.dtype == then.dtype and now.shape == then.shape and torch.equal(now, then)
