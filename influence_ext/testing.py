"""The one tolerance policy of the tests: every numerical comparison goes through :func:`assert_close`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

LIMITS = {"layer": 1e-12, "model": 1e-10}
"""Largest relative Frobenius error in float64, for one layer and for a whole network."""


@dataclass(frozen=True)
class Deviation:
    """How far a result is from its oracle: relative Frobenius and maximal error, and where the latter occurs."""

    frobenius: float
    maximum: float
    worst_index: tuple[int, ...]


def deviation(actual: Tensor, oracle: Tensor, scale: float | None = None) -> Deviation:
    """Distance of ``actual`` from ``oracle``, both of one shape, measured in float64.

    Args:
        actual: The result under test.
        oracle: What it should be.
        scale: What the Frobenius error is divided by; ``None`` means ``‖oracle‖_F``. Give it where the oracle is small
            by cancellation. An oracle that is zero leaves the error absolute.
    """
    actual, oracle = actual.detach().to(torch.float64), oracle.detach().to(torch.float64)
    if actual.numel() == 0:
        return Deviation(0.0, 0.0, ())
    difference = (actual - oracle).abs()
    difference[(actual == oracle) | (actual.isnan() & oracle.isnan())] = 0.0  # equal infinities would give nan
    finite = oracle[oracle.isfinite()]
    norm = scale if scale is not None else float(finite.norm())
    top = float(finite.abs().max()) if finite.numel() else 0.0
    worst = int(difference.nan_to_num(nan=torch.inf).argmax())
    return Deviation(
        frobenius=float(difference.norm()) / (norm or 1.0),
        maximum=float(difference.reshape(-1)[worst]) / (top or 1.0),
        worst_index=tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), actual.shape)),
    )


def floor(dtype: torch.dtype) -> float:
    """``8 ε(accumulation type) + ε(storage type)``: the error always allowed; half types accumulate in float32."""
    accumulation = torch.float64 if dtype == torch.float64 else torch.float32
    return 8 * torch.finfo(accumulation).eps + torch.finfo(dtype).eps


def assert_close(
    actual: Tensor,
    oracle: Tensor,
    *,
    scope: str = "model",
    eager: Tensor | Callable[[], Tensor] | None = None,
    scale: float | None = None,
    factor: float = 1.0,
    because: str = "",
    what: str = "result",
) -> None:
    """Fail unless ``actual`` is as close to the float64 ``oracle`` as its data type allows.

    float64: relative Frobenius error at most ``LIMITS[scope]``. Lower types: at most twice the error of ``eager``,
    plain PyTorch's result in that same type, plus :func:`floor`.

    Args:
        actual: The result under test; its dtype decides the rule.
        oracle: float64, the same shape.
        scope: ``"layer"`` or ``"model"``.
        eager: Plain PyTorch's result in the dtype of ``actual``, or a function that computes it when it is needed;
            without it only the floor is allowed.
        scale: See :func:`deviation`.
        factor: Widens the limit; needs ``because``.
        because: One sentence on why this comparison needs a wider limit.
        what: Name in the failure message.

    Raises:
        AssertionError: too far away, not finite where the oracle is, or another shape. The message has both errors, the
            worst index and the ratio to the limit.
        ValueError: the oracle is not float64, or ``factor`` comes without a reason.
    """
    __tracebackhide__ = True  # pytest shows the caller
    if oracle.dtype != torch.float64:
        raise ValueError(f"assert_close: expected a float64 oracle, got {oracle.dtype}; compute it with .double().")
    if factor != 1.0 and not because:
        raise ValueError(f"assert_close: expected a reason beside factor = {factor}, got none; pass because='...'.")
    if actual.shape != oracle.shape:
        raise AssertionError(f"{what}: expected shape {list(oracle.shape)}, got {list(actual.shape)}.")
    ours = deviation(actual, oracle, scale)
    if actual.dtype == torch.float64:
        limit, peer = LIMITS[scope], None
    else:
        peer = None if eager is None else deviation(eager() if callable(eager) else eager, oracle, scale)
        limit = (2 * peer.frobenius if peer else 0.0) + floor(actual.dtype)
    limit *= factor
    if ours.frobenius <= limit:
        return
    index = ours.worst_index
    raise AssertionError(
        f"{what}: relative Frobenius error {ours.frobenius:.3e} is {ours.frobenius / limit:.3g} times the limit "
        f"{limit:.3e} ({actual.dtype}, {scope}); relative maximal error {ours.maximum:.3e} at {list(index)}: expected "
        f"{oracle[index].item():.17g}, got {actual[index].item():.17g}"
        + (f"; eager PyTorch's errors {peer.frobenius:.3e} and {peer.maximum:.3e}" if peer else "")
        + (f"; limit widened {factor:g} times because {because}" if because else "")
        + "."
    )
