"""Progress of long runs: one callback ``(label, done, total)``."""

from __future__ import annotations

import sys
from collections.abc import Callable

from influence_ext.checks import is_answer
from influence_ext.errors import ArgumentError

Progress = Callable[[str, int, int], None]


def reporter(progress: bool | Progress, who: str) -> Progress:
    """The callback to call: the caller's own, a line on stderr for ``True``, or one that does nothing for ``False``.

    Raises:
        ArgumentError: it is none of these.
    """
    if is_answer(progress):
        return _print_line if progress else _ignore
    if not callable(progress) or isinstance(progress, type):
        raise ArgumentError(
            f"{who}: expected progress to be True, False or a function (label, done, total), got {progress!r}; True prints a line."
        )
    return progress


def onward(report: Progress) -> Progress:
    """``report`` that never counts back: what is done a second time, in another way, counts from where the first got to."""
    most = 0

    def forward(label: str, done: int, total: int) -> None:
        nonlocal most
        most = max(most, done)
        report(label, most, total)

    return forward


def portion(report: Progress, before: int, total: int) -> Progress:
    """``report`` for a part of the work: after ``before`` of ``total``."""
    return lambda label, done, _: report(label, before + done, total)


def _ignore(label: str, done: int, total: int) -> None:
    pass


def _print_line(label: str, done: int, total: int) -> None:
    filled = 30 * done // max(total, 1)
    sys.stderr.write(f"\r\x1b[K{label:<28} [{'#' * filled}{'.' * (30 - filled)}] {done}/{total}")
    if done >= total:
        sys.stderr.write("\n")
    sys.stderr.flush()
