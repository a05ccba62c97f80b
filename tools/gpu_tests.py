"""A plugin of pytest for tests on a GPU, which gpu.sh loads by ``-p gpu_tests``: a run of them can be cut short and gone on with.

In the folder GPU_TESTS it keeps the names of the tests that have passed, and a later run of the same code leaves those out. After the time
GPU_TESTS_UNTIL (seconds since the epoch) no further test begins: the exit status is then 75. A test that the device does not survive, or
that waits for it without end, ends its process; under pytest-xdist another process goes on with the tests that are left.
"""

from __future__ import annotations

import faulthandler
import hashlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

UNFINISHED = 75
ROOT = Path(__file__).resolve().parents[1]


def code() -> str:
    """Of all that the outcome depends on: the library, its extension, and the tests."""
    digest = hashlib.sha256()
    for folder in ("influence_ext", "tests"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".so"):
                digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


class Progress:
    """The names of the tests that passed, a line each, below that of the code that they passed with."""

    def __init__(self, folder: Path) -> None:
        self.passed, self.passing, self.lost = folder / "passed", folder / "passing", folder / "lost"

    def begin(self) -> None:
        """By the process that begins; others, which begin later too, read the same from then on."""
        self.passed.parent.mkdir(parents=True, exist_ok=True)
        known = self.passed.read_text().splitlines() if self.passed.exists() else []
        more = self.passing.read_text().splitlines() if self.passing.exists() else []
        now = code()
        self.passed.write_text("\n".join([now, *known[1:], *more] if known[:1] == [now] else [now]) + "\n")
        self.passing.write_text("")
        self.lost.unlink(missing_ok=True)


class Plugin:
    """The hooks."""

    def __init__(self, folder: Path, until: float, longest: float, is_first: bool) -> None:
        self.progress, self.until, self.longest, self.is_first = Progress(folder), until, longest, is_first
        self.failed: set[str] = set()
        self.called: set[str] = set()

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Leave out what has passed."""
        passed = set(self.progress.passed.read_text().splitlines()[1:])
        done = [item for item in items if item.nodeid in passed]
        items[:] = [item for item in items if item.nodeid not in passed]
        if done:
            config.hook.pytest_deselected(items=done)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """In the first process, which hears of all tests."""
        if not self.is_first:
            return
        if report.failed:
            self.failed.add(report.nodeid)
        if report.when == "call" and report.passed:
            self.called.add(report.nodeid)
        if report.when != "teardown":
            return
        if report.nodeid in self.called - self.failed:
            with self.progress.passing.open("a", encoding="utf-8") as file:
                file.write(report.nodeid + "\n")
        if time.time() > self.until:
            pytest.exit("out of time; the next run goes on with the tests that are left", returncode=1 if self.failed else UNFINISHED)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[Any]:
        """A kernel that never ends is no reason to wait for it without end."""
        if self.longest:
            faulthandler.dump_traceback_later(self.longest, exit=True, file=sys.__stderr__)
        try:
            return (yield)
        finally:
            faulthandler.cancel_dump_traceback_later()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[Any]:
        """After an illegal access, say, whatever the process asks of the device fails."""
        report: pytest.TestReport = yield
        if report.failed and is_lost():
            with self.progress.lost.open("a", encoding="utf-8") as file:
                file.write(f"{item.nodeid}\n{report.longreprtext}\n")
            print(f"gpu: the device is lost to this process after {item.nodeid}; {self.progress.lost} has the error.", file=sys.__stderr__)
            os._exit(1)
        return report


def is_lost() -> bool:
    """Whether this process can no longer use the device."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def pytest_configure(config: pytest.Config) -> None:
    """Begin, in the first process of a run."""
    is_first = not hasattr(config, "workerinput")
    until, longest = (float(os.environ.get(name) or default) for name, default in (("GPU_TESTS_UNTIL", "inf"), ("GPU_TESTS_LONGEST", "0")))
    plugin = Plugin(Path(os.environ["GPU_TESTS"]), until, longest, is_first)
    if is_first:
        plugin.progress.begin()
    config.pluginmanager.register(plugin, "gpu-tests-progress")
