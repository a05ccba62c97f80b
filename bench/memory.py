"""Peak memory of one call, measured in a process of its own: ``python -m bench.memory CASE CONTENDER [SEED]``.

Counted are the bytes beyond network, data and vectors: what is kept between calls and what the call adds. The high-water
mark of the resident set is reset right before the call, and glibc is told to hand large buffers back to the system at
once, so the mark does not hold what earlier calls left behind.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

RESET = Path("/proc/self/clear_refs")
STATUS = Path("/proc/self/status")


def available() -> bool:
    """Whether this system can reset the high-water mark (Linux)."""
    return STATUS.exists() and os.access(RESET, os.W_OK)


def measure(case_name: str, contender: str, *, seed: int = 0, timeout: float = 600.0) -> int | None:
    """Bytes at the peak beyond network, data and vectors; ``None`` where it cannot be measured."""
    if not available():
        return None
    environment = dict(os.environ, MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="0")
    command = [sys.executable, "-m", "bench.memory", case_name, contender, str(seed)]
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=timeout, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"bench.memory: {case_name}, {contender}: {done.stderr.strip().splitlines()[-1:]}")
    return int(done.stdout.splitlines()[-1])


def _resident(field: str) -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"bench.memory: no {field} in {STATUS}")


def _main(case_name: str, contender_name: str, seed: int) -> None:
    from bench.cases import SMOKE_CASES, by_name
    from bench.peers import contenders

    case = by_name(case_name)
    contender = next(c for c in contenders(case) if c.name == contender_name)
    # A miniature first: imported code and thread pools are not what is measured.
    small = next(s for s in SMOKE_CASES if s.quantity == case.quantity and contender_name in [c.name for c in contenders(s)])
    contender.prepare(small, small.problem(seed))()
    problem = case.problem(seed)
    gc.collect()
    before = _resident("VmRSS")
    call = contender.prepare(case, problem)
    for _ in range(2):
        call()
    gc.collect()
    RESET.write_text("5")
    result = call()
    peak = _resident("VmHWM")
    del result
    print(max(0, peak - before))


if __name__ == "__main__":
    _main(sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 0)
