"""Which numbers, words, answers and budgets an option takes: one answer for every entry; numbers and answers are Python's and NumPy's, and
no others.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Collection, Iterable
from numbers import Integral, Real
from typing import Any

from influence_ext.errors import ArgumentError


def is_number(x: Any) -> bool:
    """Whether ``x`` is a finite real number, of Python's or NumPy's."""
    try:
        return not isinstance(x, bool) and isinstance(x, Real) and math.isfinite(x)
    except OverflowError:  # a whole number beyond all floats
        return False


def is_whole(x: Any) -> bool:
    """Whether ``x`` is a whole number, of Python's or NumPy's."""
    return not isinstance(x, bool) and isinstance(x, Integral)


def is_count(x: Any) -> bool:
    """Whether ``x`` is a whole number of at least 1, and one of 64 bits."""
    return is_whole(x) and 1 <= x < 2**63


def is_seed(x: Any) -> bool:
    """Whether ``x`` is a whole number that a generator of torch can be seeded with."""
    return is_whole(x) and -(2**63) <= x < 2**64


def is_answer(x: Any) -> bool:
    """Whether ``x`` is true or false, of Python's or NumPy's."""
    numpy = sys.modules.get("numpy")
    return isinstance(x, bool) or (numpy is not None and isinstance(x, numpy.bool_))


def is_one_of(x: Any, names: Collection[str]) -> bool:
    """Whether ``x`` is one of these words; arrays and lists are none."""
    return isinstance(x, str) and x in names


def is_iterable(x: Any) -> bool:
    """Whether ``x`` can be iterated over; arrays and tensors without an axis say that they can."""
    return isinstance(x, Iterable) and getattr(x, "ndim", 1) != 0


def check_damping(damping: Any, who: str) -> float:
    """λ as a float; one that is a tensor or an array counts too.

    Raises:
        ArgumentError: it is negative, infinite or not a number.
    """
    try:
        value = math.nan if is_answer(damping) or isinstance(damping, (str, bytes)) else float(damping)
    except (TypeError, ValueError, RuntimeError, OverflowError):  # RuntimeError: a tensor of several elements
        value = math.nan
    if not 0 <= value < math.inf:
        raise ArgumentError(f"{who}: expected damping >= 0 and finite, got {damping!r}; for instance damping=1e-3.")
    return value


def check_budget(memory_budget: Any, who: str) -> int | None:
    """A ``memory_budget`` in whole bytes; None is none. Whoever spends it says what it does not suffice for, 0 included.

    Raises:
        ArgumentError: it is neither None nor a number of at least 0, such as ``2e9``.
    """
    if memory_budget is None:
        return None
    if not is_number(memory_budget) or memory_budget < 0:
        raise ArgumentError(
            f"{who}: expected memory_budget to be None or a finite number of bytes of at least 0, got {memory_budget!r}; 2e9 is 2 GB."
        )
    return int(memory_budget)
