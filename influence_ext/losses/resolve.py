"""From what a user calls a loss to a :class:`Loss`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from influence_ext.errors import ArgumentError, UnsupportedLossError
from influence_ext.losses.base import Loss, check_reduction
from influence_ext.losses.cross_entropy import CrossEntropy, NegativeLogLikelihood
from influence_ext.losses.elementwise import (
    AbsoluteError,
    BinaryCrossEntropy,
    ElementwiseLoss,
    GaussianNLL,
    PoissonNLL,
    ProbabilityCrossEntropy,
)
from influence_ext.losses.generic import CallableLoss
from influence_ext.losses.moved import MovedLoss
from influence_ext.losses.trace import NUM_EXAMPLES, called_loss, one_example

LossLike = str | nn.Module | Callable[..., Any]


class HalfMSE(nn.Module):
    """``½ (z − t)²``, averaged over all elements or summed: the squared loss whose Hessian is the identity.

    Args:
        reduction: ``"mean"`` (over examples and elements) or ``"sum"``.
    """

    def __init__(self, reduction: str = "mean"):
        super().__init__()
        self.reduction = reduction

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """``[N, *out], [N, *out] -> scalar``."""
        return half_mse_loss(output, target, reduction=self.reduction)


def half_mse_loss(output: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    """Functional form of :class:`HalfMSE`."""
    return F.mse_loss(output, target, reduction=reduction) / 2


@dataclass(frozen=True)
class Native:
    """How a PyTorch loss maps onto one of the library's own.

    Attributes:
        module, functional: PyTorch's two forms.
        make: ``(name, reduction, options) -> Loss``.
        options: those the loss has, with their defaults; attributes of the module and keywords of the functional.
        kernels: names of the C++ losses it runs.
    """

    module: type[nn.Module]
    functional: Callable[..., Tensor]
    make: Callable[[str, str, dict[str, Any]], Loss]
    options: Mapping[str, Any]
    kernels: tuple[str, ...]


def _squared_error(scale: float) -> Callable[[str, str, dict[str, Any]], Loss]:
    return lambda name, reduction, _: ElementwiseLoss(name, reduction, "squared_error", scale)


def _absolute_error(name: str, reduction: str, _: dict[str, Any]) -> Loss:
    return AbsoluteError(name, reduction, "absolute_error")


def _huber(name: str, reduction: str, options: dict[str, Any]) -> Loss:
    delta = _number(options["delta"], "delta", name, lambda x: x > 0, "> 0")
    return ElementwiseLoss(name, reduction, "huber", parameter=delta)


def _smooth_l1(name: str, reduction: str, options: dict[str, Any]) -> Loss:
    beta = _number(options["beta"], "beta", name, lambda x: x >= 0, ">= 0")
    if beta == 0:
        return _absolute_error(name, reduction, {})
    return ElementwiseLoss(name, reduction, "huber", 1 / beta, parameter=beta)


def _cross_entropy(name: str, reduction: str, options: dict[str, Any]) -> Loss:
    smoothing = _number(options["label_smoothing"], "label_smoothing", name, lambda x: 0 <= x <= 1, "in [0, 1]")
    weight = _nonnegative(options["weight"], "weight", name)
    return CrossEntropy(name, reduction, weight, int(options["ignore_index"]), label_smoothing=smoothing)


def _nll(name: str, reduction: str, options: dict[str, Any]) -> Loss:
    return NegativeLogLikelihood(name, reduction, _nonnegative(options["weight"], "weight", name), int(options["ignore_index"]))


def _bce_with_logits(name: str, reduction: str, options: dict[str, Any]) -> Loss:
    weight, positive = (_nonnegative(options[key], key, name) for key in ("weight", "pos_weight"))
    return BinaryCrossEntropy(name, reduction, "binary_cross_entropy", weight=weight, pos_weight=positive)


def _bce(name: str, reduction: str, options: dict[str, Any]) -> Loss:
    weight = _nonnegative(options["weight"], "weight", name)
    return ProbabilityCrossEntropy(name, reduction, "probability_cross_entropy", weight=weight)


def _poisson(name: str, reduction: str, options: dict[str, Any]) -> Loss:
    eps = _number(options["eps"], "eps", name, lambda x: x >= 0, ">= 0")
    native = "poisson_log_rate" if options["log_input"] else "poisson_rate"
    return PoissonNLL(name, reduction, native, parameter=eps, full=bool(options["full"]))


def _gaussian(name: str, reduction: str, options: dict[str, Any]) -> Loss:
    eps = _number(options["eps"], "eps", name, lambda x: x > 0, "> 0")
    return GaussianNLL(name, reduction, "squared_error", 0.5, full=bool(options["full"]), eps=eps)


_CLASSES = {"weight": None, "ignore_index": -100}
NATIVE: dict[str, Native] = {
    "mse_loss": Native(nn.MSELoss, F.mse_loss, _squared_error(1.0), {}, ("squared_error",)),
    "half_mse_loss": Native(HalfMSE, half_mse_loss, _squared_error(0.5), {}, ("squared_error",)),
    "l1_loss": Native(nn.L1Loss, F.l1_loss, _absolute_error, {}, ("absolute_error",)),
    "smooth_l1_loss": Native(nn.SmoothL1Loss, F.smooth_l1_loss, _smooth_l1, {"beta": 1.0}, ("huber",)),
    "huber_loss": Native(nn.HuberLoss, F.huber_loss, _huber, {"delta": 1.0}, ("huber",)),
    "cross_entropy": Native(nn.CrossEntropyLoss, F.cross_entropy, _cross_entropy, {**_CLASSES, "label_smoothing": 0.0}, ("cross_entropy",)),
    "nll_loss": Native(nn.NLLLoss, F.nll_loss, _nll, _CLASSES, ()),
    "binary_cross_entropy_with_logits": Native(
        nn.BCEWithLogitsLoss,
        F.binary_cross_entropy_with_logits,
        _bce_with_logits,
        {"weight": None, "pos_weight": None},
        ("binary_cross_entropy",),
    ),
    "binary_cross_entropy": Native(nn.BCELoss, F.binary_cross_entropy, _bce, {"weight": None}, ("probability_cross_entropy",)),
    "poisson_nll_loss": Native(
        nn.PoissonNLLLoss,
        F.poisson_nll_loss,
        _poisson,
        {"log_input": True, "full": False, "eps": 1e-8},
        ("poisson_log_rate", "poisson_rate"),
    ),
    "gaussian_nll_loss": Native(nn.GaussianNLLLoss, F.gaussian_nll_loss, _gaussian, {"full": False, "eps": 1e-6}, ("squared_error",)),
}
"""Losses with a native implementation, by the name of their functional."""

_BY_MODULE: dict[type[nn.Module], str] = {entry.module: name for name, entry in NATIVE.items()}
_SHORT_NAMES = {
    "mse": "mse_loss",
    "half_mse": "half_mse_loss",
    "l1": "l1_loss",
    "smooth_l1": "smooth_l1_loss",
    "huber": "huber_loss",
    "nll": "nll_loss",
    "bce": "binary_cross_entropy",
    "bce_with_logits": "binary_cross_entropy_with_logits",
    "poisson_nll": "poisson_nll_loss",
    "gaussian_nll": "gaussian_nll_loss",
}


def resolve(loss: LossLike | Loss, reduction: str | None = None, who: str = "loss") -> Loss:
    """Turn what a user calls a loss into a :class:`Loss`.

    Args:
        loss: an instance of an ``nn`` loss module or :class:`HalfMSE`, the name of its functional (``"mse_loss"``, ``"cross_entropy"``,
            ...), the functional itself, also as a ``functools.partial`` that fixes options, any other callable ``loss(output, target)``
            that returns a mean or a sum over examples, or a ``Loss``. ``NATIVE`` lists the losses with formulas of their own; a callable
            that only rearranges outputs and targets before it returns one of them, such as a language model's shifted cross-entropy,
            is recognised when it is first checked with data (its ``name`` then says so); every other one is differentiated by PyTorch.
            ``gaussian_nll_loss`` takes targets ``torch.stack([y, variance], dim=1)``.
        reduction: ``"mean"`` or ``"sum"`` over examples; by default the module's own, ``"mean"`` for names and functionals, and what a
            callable turns out to be when it is first checked with outputs.
        who: the caller's name for messages.

    Raises:
        UnsupportedLossError: no loss, a class instead of an instance, or an unknown reduction.
        ArgumentError: an option of the loss out of range.
    """
    if reduction is not None and not isinstance(reduction, str):
        raise UnsupportedLossError(
            f"{who}: expected reduction to be 'mean', 'sum' or None, got {reduction!r}; None reads it from the loss."
        )
    if isinstance(loss, Loss):
        return loss if reduction is None else loss.with_reduction(check_reduction(reduction, loss.name, who))
    if isinstance(loss, type) and issubclass(loss, nn.Module):
        raise UnsupportedLossError(f"{who}: expected an instance of a loss, got the class {loss.__name__}; write {loss.__name__}().")
    found = _find(loss)
    if found is not None:
        name, options = found
        entry, label = NATIVE[name], type(loss).__name__ if isinstance(loss, nn.Module) else name
        chosen = check_reduction(options.pop("reduction", "mean") if reduction is None else reduction, label, who)
        return entry.make(name, chosen, {**entry.options, **options})
    if isinstance(loss, str) or not callable(loss):
        found_text = repr(loss) if loss is None or isinstance(loss, (str, int, float)) else type(loss).__name__
        raise UnsupportedLossError(
            f"{who}: expected a loss as nn module, functional, name ({', '.join(NATIVE)}) or callable loss(output, target), got "
            f"{found_text}; use one of these."
        )
    function = loss.func if isinstance(loss, partial) else loss
    name = getattr(function, "__name__", type(function).__name__).replace("<lambda>", "callable")
    stated = _attribute(loss, "reduction") if reduction is None else reduction
    called: Callable[..., Any] = loss
    return CallableLoss(called, name, None if stated is None else check_reduction(stated, name, who), recognise)


def recognise(function: Callable[[Tensor, Tensor], Any], name: str, z: Tensor, target: Tensor) -> Loss | None:
    """The callable as a native loss of rearranged outputs ``z`` and targets; None where it is not seen to be one.

    What it calls must be cross-entropy (with every option), negative log-likelihood, or a loss that pairs elements, without weights.
    """
    functionals = {entry.functional: key for key, entry in NATIVE.items()}
    found: list[tuple[Tensor, Tensor]] = []
    calls = [called_loss(function, functionals, z, target, N) for N in NUM_EXAMPLES]
    for N, call in zip(NUM_EXAMPLES, calls, strict=True):
        if call is None:
            return None
        sizes = z[:1].numel(), target[:1].numel()
        outputs, targets = call.outputs, call.targets - N * sizes[0]
        by_class = call.name in ("cross_entropy", "nll_loss")
        if by_class and outputs.dim() < 2:
            return None
        paired = outputs.shape == targets.shape
        if not paired and not (by_class and targets.shape == outputs.shape[:1] + outputs.shape[2:]):
            return None
        rows = outputs.movedim(1, -1).reshape(-1, outputs.shape[1]) if by_class else outputs.reshape(-1, 1)
        own = targets.movedim(1, -1).reshape(rows.shape) if by_class and paired else targets.reshape(-1, 1)
        one = one_example(rows, own, sizes, N)
        if one is None:
            return None
        found.append(one)
    assert call is not None
    options = {"reduction": "mean", **call.options}
    entry = NATIVE[call.name]
    if options.keys() - {*entry.options, "reduction"} or options["reduction"] not in ("mean", "sum"):
        return None
    if not all(torch.equal(a, b) for a, b in zip(found[0], found[1], strict=True)):
        return None
    if not by_class and any(isinstance(value, Tensor) for value in options.values()):
        return None
    # [positions, classes] -> [classes, positions], and [classes] where there is one position; [elements] of others.
    outputs, targets = (x.T.squeeze(1) if by_class else x[:, 0] for x in found[0])
    if by_class and not paired:
        targets = targets.reshape(outputs.shape[1:])
    dtype = call.target_dtype
    if dtype.is_floating_point:
        if torch.promote_types(dtype, z.dtype) != z.dtype:
            return None
        dtype = z.dtype
    reduction = options.pop("reduction")
    inner = entry.make(call.name, reduction, {**entry.options, **options})
    return MovedLoss(f"{call.name} (found in {name})", inner, outputs, targets, dtype)


def _find(loss: Any) -> tuple[str, dict[str, Any]] | None:
    """The entry that is this loss, and the options it states."""
    if isinstance(loss, str):
        name = _SHORT_NAMES.get(loss, loss)
        return (name, {}) if name in NATIVE else None
    if isinstance(loss, nn.Module):
        cls = type(loss)
        found = next((_BY_MODULE[base] for base in cls.__mro__ if base in _BY_MODULE and cls.forward is base.forward), None)
        return None if found is None else (found, {option: getattr(loss, option) for option in _options(found)})
    function, keywords = (loss.func, dict(loss.keywords)) if isinstance(loss, partial) and not loss.args else (loss, {})
    found = next((name for name, entry in NATIVE.items() if entry.functional is function), None)
    return (found, keywords) if found is not None and keywords.keys() <= set(_options(found)) else None


def _options(name: str) -> tuple[str, ...]:
    return (*NATIVE[name].options, "reduction")


def _attribute(loss: Any, name: str) -> str | None:
    """What the callable says of itself, or the keyword a ``partial`` fixes."""
    stated = getattr(loss, name, None)
    if stated is None and isinstance(loss, partial):
        stated = loss.keywords.get(name)
    return stated if isinstance(stated, str) else None


def _number(value: Any, option: str, name: str, accepts: Callable[[float], bool], expected: str) -> float:
    if not accepts(float(value)):
        raise ArgumentError(f"{name}: expected {option} {expected}, got {value}; correct it.")
    return float(value)


def _nonnegative(weight: Tensor | None, option: str, name: str) -> Tensor | None:
    if weight is None:
        return None
    if not isinstance(weight, Tensor) or not bool((torch.isfinite(weight) & (weight >= 0)).all()):
        shown = f"minimum {float(weight.min()):g}" if isinstance(weight, Tensor) else type(weight).__name__
        raise ArgumentError(f"{name}: expected {option} as a tensor, finite and none negative, got {shown}; correct it.")
    return weight.detach()
