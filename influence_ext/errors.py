"""Exceptions and warnings: each message is one sentence, *who: expected what, got what; how to fix*."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from influence_ext.solvers.base import Solution


class InfluenceExtError(Exception):
    """Base of every error this library raises on purpose."""


class ShapeError(InfluenceExtError, ValueError):
    """A tensor has the wrong shape or length."""


class DTypeError(InfluenceExtError, TypeError):
    """A tensor has the wrong data type."""


class DeviceError(InfluenceExtError, ValueError):
    """A tensor lives on the wrong device."""


class DataError(InfluenceExtError, ValueError):
    """The data cannot be used: empty, not finite, readable only once, or a target out of range."""


class ArgumentError(InfluenceExtError, ValueError):
    """An option has a value that makes no sense."""


class UnsupportedModelError(InfluenceExtError, NotImplementedError):
    """The model cannot be captured; the message lists every problem, not only the first."""


class UnsupportedLossError(InfluenceExtError, NotImplementedError):
    """The loss is none, mixes examples, has no curvature in the outputs where some is needed, or an unknown reduction."""


class SolverFailure(InfluenceExtError, RuntimeError):
    """A solve did not reach its goal; ``.solution`` holds what was reached, column by column."""

    def __init__(self, message: str, solution: Solution):
        super().__init__(message)
        self.solution = solution


class DivergenceError(InfluenceExtError, RuntimeError):
    """A training or minimisation run left the finite numbers or its objective is unbounded below."""


class NumericalWarning(UserWarning):
    """A result is usable but less accurate than asked for."""
