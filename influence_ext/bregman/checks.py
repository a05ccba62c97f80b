"""What every entry of this layer asks of its numbers, before anything is computed."""

from __future__ import annotations

from influence_ext.checks import is_count, is_number
from influence_ext.errors import ArgumentError


def check_damping(damping: float, weight_decay: float, *, who: str) -> None:
    """Refuse a damping under which the curvature may be singular, and a weight decay that is none.

    Raises:
        ArgumentError: not ``λ ≥ 0``, ``w ≥ 0`` and ``λ + w > 0``, all finite.
    """
    if not is_number(weight_decay) or weight_decay < 0:
        raise ArgumentError(f"{who}: expected weight_decay to be a number of at least 0, got {weight_decay!r}; pass that of the training.")
    if not is_number(damping) or damping < 0 or damping + weight_decay <= 0:
        raise ArgumentError(
            f"{who}: expected damping + weight_decay > 0 and damping >= 0, because the Gauss-Newton matrix may be singular, got "
            f"damping = {damping!r} and weight_decay = {weight_decay!r}; pass a positive damping, for example 1e-3."
        )


def check_search(rtol: float | None, max_steps: int, *, who: str) -> None:
    """Refuse a goal that no search can miss or reach, and a number of steps that is none.

    Raises:
        ArgumentError: ``rtol`` is neither ``None`` nor between 0 and 1, or ``max_steps`` is no whole number of at least 1.
    """
    if rtol is not None and not (is_number(rtol) and 0 < rtol < 1):
        raise ArgumentError(
            f"{who}: expected rtol to be a number between 0 and 1, got {rtol!r}; the relative gradient norm is 1 where the search starts, "
            "so useful goals lie well below."
        )
    if not is_count(max_steps):
        raise ArgumentError(f"{who}: expected max_steps to be a whole number of at least 1, got {max_steps!r}; correct max_steps.")
