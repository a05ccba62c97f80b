"""Peak memory of one call: the bytes beyond network, data and vectors, what is kept between calls and what the call adds.

Measured in a fork of the process that has just timed the call, so nothing is captured or compiled again. The fork drops the other
contenders, hands free memory back to the system, this library's cache included, and has new buffers mapped one by one, so that the
high-water mark of its resident set holds what this call takes and nothing that earlier calls left behind. The mark is that of two calls:
what a library keeps of the first for the second counts. What is kept beside is what goes away when the call, its network and its data are
dropped.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import select
import signal
import threading
from pathlib import Path

import torch

from bench.contender import Call
from bench.problem import Problem
from influence_ext.memory import empty_cache

RESET = Path("/proc/self/clear_refs")
STATUS = Path("/proc/self/status")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt


class Prepared:
    """The calls of a case and their problem; nothing else may hold either when memory is measured."""

    def __init__(self, problem: Problem):
        self.problem: Problem | None = problem
        self.calls: dict[str, Call] = {}


def available() -> bool:
    """Whether this system can reset the high-water mark and trim its heap (Linux with glibc)."""
    return STATUS.exists() and os.access(RESET, os.W_OK) and hasattr(ctypes.CDLL(None), "malloc_trim")


def peak(prepared: Prepared, name: str, timeout: float = 120.0) -> int | None:
    """Bytes at the peak of ``prepared.calls[name]()``, a call that has been made before; ``None`` where it cannot be measured."""
    if not available():
        return None
    reading, writing = os.pipe()
    threads = torch.get_num_threads()
    child = os.fork()
    if child == 0:
        try:
            # A thread of its own: the parent's OpenMP threads do not exist here, and only a new master starts new ones.
            thread = threading.Thread(target=_report, args=(prepared, name, threads, writing))
            thread.start()
            thread.join()
        finally:
            os._exit(0)
    os.close(writing)
    try:
        ready, _, _ = select.select([reading], [], [], timeout)
        text = os.read(reading, 4096) if ready else b""
        if not ready:
            os.kill(child, signal.SIGKILL)
    finally:
        os.close(reading)
        os.waitpid(child, 0)
    return json.loads(text) if text else None


def _report(prepared: Prepared, name: str, threads: int, writing: int) -> None:
    os.write(writing, json.dumps(_measured(prepared, name, threads)).encode())


def _measured(prepared: Prepared, name: str, threads: int) -> int:
    torch.set_num_threads(threads)
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, 65536)
    libc.mallopt(M_TRIM_THRESHOLD, 0)
    call = prepared.calls[name]
    prepared.calls.clear()
    call()
    _collect(libc)
    RESET.write_text("5")
    before = _resident("VmRSS")
    for _ in range(2):
        call()  # its result is freed before the next
    added = _resident("VmHWM") - before
    _collect(libc)
    assert prepared.problem is not None
    known, held = prepared.problem.nbytes, _resident("VmRSS")
    prepared.problem = None
    del call
    _collect(libc)
    return max(0, added) + max(0, held - _resident("VmRSS") - known)


def _collect(libc: ctypes.CDLL) -> None:
    gc.collect()
    empty_cache()
    libc.malloc_trim(0)


def _resident(field: str) -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"bench.memory: no {field} in {STATUS}")
