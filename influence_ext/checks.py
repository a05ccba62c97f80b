"""Which numbers and words an option takes: one answer for every entry; numbers are Python's and NumPy's, and no others."""

from __future__ import annotations

import math
from collections.abc import Collection
from numbers import Integral, Real
from typing import Any


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
    """Whether ``x`` is a whole number of at least 1."""
    return is_whole(x) and x >= 1


def is_seed(x: Any) -> bool:
    """Whether ``x`` is a whole number that a generator of torch can be seeded with."""
    return is_whole(x) and -(2**63) <= x < 2**64


def is_one_of(x: Any, names: Collection[str]) -> bool:
    """Whether ``x`` is one of these words; arrays and lists are none."""
    return isinstance(x, str) and x in names
