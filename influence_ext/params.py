"""Flat vectors and named parameters: one ``[P]`` vector in the order of ``model.named_parameters()``."""

from __future__ import annotations

import copy
import difflib
import fnmatch
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from influence_ext.checks import is_iterable, is_one_of
from influence_ext.errors import ArgumentError, DataError, DeviceError, DTypeError, ShapeError
from influence_ext.finite import all_finite, flatten_finite

SUPPORTED_DTYPES = (torch.float32, torch.float64)
DEVICES = ("cpu", "cuda")
HALF_DTYPES = (torch.bfloat16, torch.float16)
"""Parameters of these are read as they are; everything is computed, and returned, in float32."""
Selection = str | Tensor | Iterable[str | Tensor]
Precision = Literal["full", "tf32", "bfloat16"]
PRECISIONS: dict[str, int] = {"full": 0, "tf32": 1, "bfloat16": 2}


@dataclass(frozen=True)
class ParameterSpace:
    """The parameters that are differentiated, laid out one after the other in a flat vector ``[P]``.

    Attributes:
        names: one name a parameter, in ``model.named_parameters()`` order; a tied parameter counts once, under its
            first name.
        shapes: their shapes.
        offsets: where each begins in the flat vector.
        num_parameters: P.
        dtype: of the computation: the parameters' own, float32 or float64, and float32 where they are in half precision.
        device: their common device.
        aliases: further names of tied parameters -> the name used here.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    offsets: tuple[int, ...]
    num_parameters: int
    dtype: torch.dtype
    device: torch.device
    aliases: dict[str, str]

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Elements of each parameter."""
        return tuple(math.prod(shape) for shape in self.shapes)

    @classmethod
    def of(cls, model: nn.Module, params: Selection | None = None, who: str = "ParameterSpace") -> ParameterSpace:
        """The trainable parameters of ``model``.

        Args:
            model: not modified.
            params: None for all with ``requires_grad``, else a name, a pattern (``"layers.*.weight"``), one of the
                model's parameters, or several of these; the order is always the model's.
            who: the caller's name for messages.

        Raises:
            ArgumentError: nothing to train, a selection that names no trainable parameter, or an uninitialised
                parameter.
            DTypeError: a complex, integer or sparse parameter, or several dtypes.
            DeviceError: parameters on several devices, or on one that there are no kernels for.
            DataError: a parameter holds NaN or an infinity.

        Cost: one pass over the selected parameters (the finiteness check).
        """
        if not isinstance(model, nn.Module):
            raise ArgumentError(f"{who}: expected model to be an nn.Module, got {type(model).__name__}; pass the network itself.")
        by_name = dict(model.named_parameters(remove_duplicate=False))
        first = {id(p): name for name, p in model.named_parameters()}
        aliases = {name: first[id(p)] for name, p in by_name.items() if name != first[id(p)]}
        chosen = None if params is None else _select(params, by_name, aliases, first, who)
        named = {name: p for name, p in model.named_parameters() if p.requires_grad and (chosen is None or name in chosen)}
        if not named:
            raise ArgumentError(
                f"{who}: expected at least one trainable parameter, got {_count_text(by_name, chosen)}; set requires_grad_(True) on the "
                "parameters to be analysed."
            )
        _check_parameters(named, who)
        kept = {alias: name for alias, name in aliases.items() if name in named}
        shapes = tuple(tuple(p.shape) for p in named.values())
        offsets, total = [], 0
        for shape in shapes:
            offsets.append(total)
            total += math.prod(shape)
        some = next(iter(named.values()))
        return cls(tuple(named), shapes, tuple(offsets), total, widened_dtype(some.dtype), some.device, kept)

    def flatten(self, tensors: Sequence[Tensor] | Mapping[str, Tensor]) -> Tensor:
        """Concatenate per-parameter tensors into flat vectors.

        Args:
            tensors: one a parameter, as a sequence in order or a mapping by name, of shape ``[*lead, *shape]`` with the
                same leading axes for all (none for one vector, ``[V]`` for several).

        Returns:
            ``[*lead, P]``.

        Raises:
            ShapeError: a tensor is missing, superfluous or of the wrong shape.
            DTypeError: a tensor is not a tensor or of another dtype.
            DeviceError: another device.
        """
        ordered = self._in_order(tensors)
        problems: list[str] = []
        lead: tuple[int, ...] | None = None
        for name, shape, tensor in zip(self.names, self.shapes, ordered, strict=True):
            if not isinstance(tensor, Tensor):
                raise DTypeError(
                    f"ParameterSpace.flatten: expected a tensor for {name}, got {type(tensor).__name__}; pass zeros for a parameter that "
                    "plays no part."
                )
            extra = tensor.dim() - len(shape)
            if extra < 0 or tuple(tensor.shape[extra:]) != shape:
                problems.append(f"{name} {list(tensor.shape)} instead of {[*(lead or ()), *shape]}")
                continue
            lead = tuple(tensor.shape[:extra]) if lead is None else lead
            if tuple(tensor.shape[:extra]) != lead:
                problems.append(f"{name} {list(tensor.shape)} instead of {[*lead, *shape]}")
            if tensor.dtype != self.dtype:
                raise DTypeError(
                    f"ParameterSpace.flatten: expected {name} of dtype {self.dtype}, got {tensor.dtype}; convert it with .to({self.dtype})."
                )
            if tensor.device != self.device:
                raise DeviceError(
                    f"ParameterSpace.flatten: expected {name} on {self.device}, got {tensor.device}; move it with .to('{self.device}')."
                )
        if problems or lead is None:
            raise ShapeError(
                "ParameterSpace.flatten: expected tensors shaped like the parameters, with the same leading axes for all, got "
                f"{', '.join(problems)}; reshape them."
            )
        flats = [t.reshape((*lead, math.prod(shape))) for t, shape in zip(ordered, self.shapes, strict=True)]
        return torch.cat(flats, dim=-1)

    def unflatten(self, flat: Tensor) -> dict[str, Tensor]:
        """Views of flat vectors, one a parameter: ``[..., P] -> {name: [..., *shape]}``.

        Raises:
            ShapeError: the last axis is not P.
        """
        if flat.dim() == 0 or flat.shape[-1] != self.num_parameters:
            raise ShapeError(
                f"ParameterSpace.unflatten: expected a tensor of shape [..., P] with P = {self.num_parameters}, got {list(flat.shape)}; "
                f"parameters: {self.describe()}."
            )
        lead = flat.shape[:-1]
        return {
            name: flat.narrow(-1, offset, size).view((*lead, *shape))
            for name, shape, offset, size in zip(self.names, self.shapes, self.offsets, self.sizes, strict=True)
        }

    def values(self, model: nn.Module) -> Tensor:
        """``[P]``, a detached copy of the model's parameters as they are now.

        Raises:
            ArgumentError: the model lacks one of the parameters.
            ShapeError, DTypeError, DeviceError: a parameter changed its shape, dtype or device.
            DataError: a parameter holds NaN or an infinity.
        """
        return self.gather(dict(model.named_parameters(remove_duplicate=False)))

    def gather(self, tensors: Mapping[str, Tensor], who: str = "ParameterSpace.values") -> Tensor:
        """``[P]``, a detached copy of the parameters among a model's tensors by name. Raises as :meth:`values`, in the name of ``who``."""
        missing = [name for name in self.names if name not in tensors]
        if missing:
            raise ArgumentError(
                f"{who}: expected a model with the parameters {', '.join(self.names)}, got one without "
                f"{', '.join(missing)}; pass the model this space was made of, or one of the same structure."
            )
        found = [tensors[name] for name in self.names]
        if any(p.dtype in HALF_DTYPES for p in found):
            found = [widened(p.detach()) for p in found]
        if any(p.shape != s or p.dtype != self.dtype or p.device != self.device for p, s in zip(found, self.shapes, strict=True)):
            self.flatten([p.detach() for p in found])  # raises
        flat, finite = flatten_finite(found)
        if not finite:
            _check_finite({name: tensors[name] for name in self.names}, who)
        return flat

    def canonical(self, name: str) -> str:
        """The name a parameter has here: a further name of a tied parameter becomes its first one."""
        first: str = self.aliases.get(name, name)
        return first

    def describe(self, limit: int = 6) -> str:
        """``"0.weight (100352), 0.bias (128), ..."`` for messages."""
        items = [f"{n} ({math.prod(s)})" for n, s in zip(self.names[:limit], self.shapes[:limit], strict=True)]
        return ", ".join(items + ["..."] * (len(self.names) > limit))

    def _in_order(self, tensors: Any) -> list[Tensor]:
        if isinstance(tensors, Tensor) or not isinstance(tensors, (Sequence, Mapping)):
            raise DTypeError(
                f"ParameterSpace.flatten: expected a list of tensors in order or a dict by parameter name, got {type(tensors).__name__}; "
                "wrap it accordingly."
            )
        if not isinstance(tensors, Mapping):
            if len(tensors) != len(self.names):
                raise ShapeError(
                    f"ParameterSpace.flatten: expected {len(self.names)} tensors ({self.describe()}), got {len(tensors)}; pass one for "
                    "every parameter, in order."
                )
            return list(tensors)
        renamed: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            canonical = self.canonical(name)
            if canonical in renamed:
                raise ShapeError(
                    f"ParameterSpace.flatten: expected every parameter once, got {canonical} under several of its names ({name} is one); "
                    f"pass only {canonical}."
                )
            renamed[canonical] = tensor
        missing = [name for name in self.names if name not in renamed]
        extra = [name for name in renamed if name not in self.names]
        if missing or extra:
            found = "; ".join(
                f"{label} {', '.join(map(str, names))}" for label, names in (("without", missing), ("with unknown", extra)) if names
            )
            raise ShapeError(
                f"ParameterSpace.flatten: expected one tensor for each of {', '.join(self.names)}, got a dict {found}; use exactly these "
                "names."
            )
        return [renamed[name] for name in self.names]


def widened_dtype(dtype: torch.dtype) -> torch.dtype:
    """What is computed in: float32 for half precision, else ``dtype``."""
    return torch.float32 if dtype in HALF_DTYPES else dtype


def widened(tensor: Tensor) -> Tensor:
    """The same numbers in the dtype that is computed in."""
    return tensor.to(widened_dtype(tensor.dtype))


def is_half(model: nn.Module) -> bool:
    """Whether a parameter of the model is in half precision, so that the model is computed as :func:`widened_model` is."""
    return any(p.dtype in HALF_DTYPES for p in model.parameters())


def widened_model(model: nn.Module) -> nn.Module:
    """The model itself, or a copy with its half-precision parameters and buffers in float32. Cost: a copy of the model, if any."""
    return copy.deepcopy(model)._apply(widened) if is_half(model) else model


def _select(params: Selection, by_name: Mapping[str, Tensor], aliases: Mapping[str, str], first: Mapping[int, str], who: str) -> set[str]:
    """Names of the selected trainable parameters."""
    chosen: set[str] = set()
    if not is_iterable(params):
        raise ArgumentError(f"{who}: expected params= to be a name, a parameter or a list of them, got {params!r}; leave it out for all.")
    for item in [params] if isinstance(params, (str, Tensor)) else params:
        if isinstance(item, Tensor):
            if id(item) not in first:
                raise ArgumentError(
                    f"{who}: expected params= to hold the model's own parameters, got a tensor of shape {list(item.shape)} that is none of "
                    "them; pass a name, or the parameter object itself rather than a copy or a view."
                )
            matches = [first[id(item)]]
        elif isinstance(item, str):
            names = [item] if item in by_name else fnmatch.filter(by_name, item)
            matches = [aliases.get(name, name) for name in names]
            if not matches:
                near = difflib.get_close_matches(item, by_name, n=3, cutoff=0.5) or list(by_name)[:3]
                raise ArgumentError(
                    f"{who}: expected params= to name parameters of the model, got {item!r}, which matches none; the nearest are "
                    f"{', '.join(near)}."
                )
        else:
            raise ArgumentError(
                f"{who}: expected params= to hold names, patterns or the model's parameters, got {type(item).__name__}; pass for instance "
                "params=['fc.weight'] or params=list(model.fc.parameters())."
            )
        trainable = [name for name in matches if by_name[name].requires_grad]
        if not trainable:
            raise ArgumentError(
                f"{who}: expected params= to name trainable parameters, got {', '.join(matches)} with requires_grad=False; set "
                "requires_grad_(True) on it or leave it out."
            )
        chosen.update(trainable)
    return chosen


def _count_text(by_name: Mapping[str, Tensor], chosen: set[str] | None) -> str:
    if chosen is not None:
        return "an empty params="
    return f"{len(by_name)} parameters with requires_grad=False" if by_name else "a model without parameters"


def _check_parameters(named: Mapping[str, nn.Parameter], who: str) -> None:
    lazy = [name for name, p in named.items() if isinstance(p, UninitializedParameter)]
    if lazy:
        raise ArgumentError(f"{who}: expected initialised parameters, got {', '.join(lazy)} of a lazy module; run one forward pass first.")
    for name, p in named.items():
        if p.dtype not in SUPPORTED_DTYPES + HALF_DTYPES or p.layout != torch.strided:
            found = str(p.dtype) if p.layout == torch.strided else f"{p.dtype} {p.layout}"
            raise DTypeError(
                f"{who}: expected dense parameters of a real floating-point dtype, got {name} of {found}; convert the model with "
                "model.float() or model.double(), or leave this parameter out with params=."
            )
    for what, error, fix in (
        ("dtype", DTypeError, "convert the model with model.float() or model.double()"),
        ("device", DeviceError, "move the model to one device with model.to(device)"),
    ):
        groups: dict[str, str] = {}
        for name, p in named.items():
            value = getattr(p, what)
            groups.setdefault(str(widened_dtype(value) if isinstance(value, torch.dtype) else value), name)
        if len(groups) > 1:
            listed = ", ".join(f"{value} ({name})" for value, name in groups.items())
            raise error(f"{who}: expected all parameters of one {what}, got {listed}; {fix}, or select with params=.")
    elsewhere = [f"{name} on {p.device}" for name, p in named.items() if p.device.type not in DEVICES]
    if elsewhere:
        raise DeviceError(
            f"{who}: expected parameters on the CPU or a CUDA device, got {', '.join(elsewhere)}; move the model with model.to('cpu'), or "
            "load its values first if they are on no device yet."
        )
    _check_finite(named, who)


def _check_finite(named: Mapping[str, Tensor], who: str) -> None:
    bad = [name for name, p in named.items() if not all_finite(p.detach())]
    if bad:
        raise DataError(
            f"{who}: expected finite parameters, got NaN or infinite values in {', '.join(bad)}; train again with a smaller step or load a "
            "sound checkpoint."
        )


def check_precision(precision: Precision, space: ParameterSpace, who: str) -> None:
    """Raise if products of such parameters cannot be made at ``precision``.

    Raises:
        ArgumentError: another word, or a precision that the device or the data type has not.
    """
    if not is_one_of(precision, PRECISIONS):
        raise ArgumentError(f"{who}: expected a precision among {', '.join(PRECISIONS)}, got {precision!r}; choose one.")
    device, dtype = space.device.type, space.dtype
    if precision == "full":
        return
    if dtype != torch.float32:
        raise ArgumentError(
            f'{who}: expected precision="full" for {dtype} on {device}, got "{precision}", which is for float32; '
            "leave it out, or convert model and data with .float()."
        )
    if device == "cpu" and precision != "bfloat16":
        raise ArgumentError(
            f'{who}: expected precision="full" or "bfloat16" for {dtype} on {device}, got "{precision}", which is for a CUDA '
            "device; choose one of them, or move model and data to one."
        )
