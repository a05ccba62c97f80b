"""Progress of long runs: one callback ``(label, done, total)``."""

from __future__ import annotations

import sys
from collections.abc import Callable

Progress = Callable[[str, int, int], None]


def reporter(progress: bool | Progress) -> Progress:
    """The callback to call: the caller's own, a line on stderr for ``True``, or one that does nothing for ``False``."""
    if callable(progress):
        return progress
    return _print_line if progress else _ignore


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
