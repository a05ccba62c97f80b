"""Progress bars on stderr; on a terminal they vanish when the work is done."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

from influence_ext.errors import ArgumentError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

T = TypeVar("T")


def require_rich() -> None:
    """The demo's tables and bars need rich.

    Raises:
        ArgumentError: it is not installed.
    """
    try:
        import rich  # noqa: F401
    except ImportError as reason:
        raise ArgumentError("expected the package rich for tables and progress bars, found none; run pip install rich.") from reason


class Bar(AbstractContextManager["Bar"]):
    """One bar: ``with Bar("training") as bar: train(..., progress=bar)``.

    A bar is itself a progress callback ``(label, done, total)`` as the library's long functions take it.

    Args:
        title: What is being done.
        console: Where; ``None`` is stderr. A quiet one shows nothing.
    """

    def __init__(self, title: str, console: Console | None = None):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        self._console = console or Console(stderr=True)
        self.title = title
        self.seconds = 0.0
        self._started = 0.0
        self._bars: Progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.fields[title]:<44}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.description}"),
            console=self._console,
            transient=True,
            disable=self._console.quiet,
        )
        self._task: TaskID = self._bars.add_task("", title=title, total=None)

    def __enter__(self) -> Bar:
        self._started = time.perf_counter()
        self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bars.stop()
        self.seconds = time.perf_counter() - self._started

    def __call__(self, label: str, done: int, total: int) -> None:
        """Show ``done`` of ``total``; ``label`` says which part is running."""
        self._bars.update(self._task, completed=done, total=total, description="" if label == self.title else label)

    def track(self, items: Iterable[T], total: int) -> Iterator[T]:
        """Yield ``items`` and count them."""
        self("", 0, total)
        for done, item in enumerate(items, start=1):
            yield item
            self("", done, total)
