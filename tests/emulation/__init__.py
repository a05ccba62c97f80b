"""The CUDA kernels on a CPU: ``csrc/kernels/cuda`` compiled as C++ over ``emulation/cuda.h`` and installed into the extension.

``with emulated_device():`` every plan made inside runs the device's kernels on CPU tensors, one thread at a time. What a GPU adds (speed,
its memory model, the vendor's matrix product) is not tested by it; indices, arithmetic, launch sizes, barriers, uninitialised reads are.
"""

from __future__ import annotations

import ctypes
import fcntl
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

import ninja

import influence_ext._C as _C

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "emulation"

_RULES = """
cxx = {cxx}
flags = -std=c++20 -O1 -g0 -fPIC -fvisibility=hidden -Wall -Wextra -DINFL_EMULATED_CUDA -I{root}/csrc -I{root}/tests/emulation
rule compile
  command = $cxx $flags -MMD -MF $out.d -x c++ -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = $cxx -shared -o $out $in
"""


def sources() -> list[Path]:
    """The kernels of the device, and what they run on."""
    kernels = sorted((ROOT / "csrc/kernels/cuda").glob("*.cu"))
    return [*kernels, ROOT / "tests/emulation/emulation/library.cpp", ROOT / "csrc/common/context.cpp", ROOT / "csrc/common/memory.cpp"]


@cache
def library() -> Path:
    """Compiles what changed, with ninja; one process at a time."""
    cxx = sysconfig.get_config_var("CXX") or "c++"
    compiler = shutil.which("g++") or cxx.split()[0]
    lines = [_RULES.format(cxx=compiler, root=ROOT)]
    objects = []
    for source in sources():
        objects.append(str(BUILD / f"{source.stem}.o"))
        lines.append(f"build {objects[-1]}: compile {source}")
    target = BUILD / "libdevice.so"
    lines.append(f"build {target}: link {' '.join(objects)}\n")
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (BUILD / "build.ninja").write_text("\n".join(lines))
        subprocess.run([str(Path(ninja.BIN_DIR) / "ninja"), "--quiet", "-C", str(BUILD)], check=True)
    return target


@contextmanager
def emulated_device() -> Iterator[None]:
    """Run on the emulated device; the CPU comes back afterwards."""
    _C.emulate_device(str(library()))
    try:
        yield
    finally:
        _C.emulate_device(None)


class Traffic(NamedTuple):
    """What was asked of the emulated device so far."""

    launches: int
    products: int
    copies: int

    @classmethod
    def now(cls) -> Traffic:
        """Launches of kernels, the vendor's matrix products, copies to and from the host."""
        return cls(*_counts()[:3])

    def since(self, before: Traffic) -> Traffic:
        """The difference."""
        return Traffic(*(a - b for a, b in zip(self, before, strict=True)))


def most_bytes() -> int:
    """Memory of the emulated device, at most since the last time that anything was asked here."""
    return _counts()[3]


def _counts() -> list[int]:
    counts = (ctypes.c_int64 * 4)()
    ctypes.CDLL(str(library())).influence_ext_device_traffic(counts)
    return list(counts)
