"""What `make gpu` says and does without a GPU: refusals, steps that are left out, and tests that go on where they were cut short."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

TORCH = """
class cuda:
    is_available = staticmethod(lambda: {sees_gpu})
    get_device_capability = staticmethod(lambda: (9, 0))
class version:
    cuda = "13.0"
"""
TESTS = """
import os, sys, time, types
import pytest

def test_first(): pass

def test_second():
    assert os.environ["SECOND"] == "passes"

def test_that_loses_the_device():
    if os.environ["SECOND"] == "loses":
        def synchronize(): raise RuntimeError("CUDA error: an illegal memory access was encountered")
        sys.modules["torch"] = types.SimpleNamespace(cuda=types.SimpleNamespace(is_available=lambda: True, synchronize=synchronize))
        raise RuntimeError("the first to be told")

def test_last(): pass
"""


def steps(folder: Path, *which: str, sees_gpu: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    """``tools/gpu.sh`` with a torch that says what is asked here and has nothing else."""
    (folder / "torch.py").write_text(TORCH.format(sees_gpu=sees_gpu))
    python = {"PYTHON": sys.executable, "PYTHONPATH": str(folder)}
    command = ["bash", str(ROOT / "tools" / "gpu.sh"), *which]
    return subprocess.run(command, env={**os.environ, **python, **environment}, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize(
    ("which", "environment", "code", "said"),
    [
        pytest.param([], {"sees_gpu": False}, 1, "to have a torch that sees a GPU, got none; say PYTHON=", id="no GPU"),
        pytest.param(["test"], {}, 2, "expected steps among build, tests, sanitizer and bench, got 'test'.", id="no step"),
        pytest.param(["build"], {"MINUTES": "soon"}, 2, "expected MINUTES to be a whole number from 1 on, got 'soon'.", id="no number"),
        pytest.param(["build"], {"CUDA_HOME": "/nowhere"}, 1, "expected the CUDA toolkit, found no nvcc in /nowhere/bin;", id="no toolkit"),
    ],
)
def test_refusals(which: list[str], environment: dict[str, str], code: int, said: str, tmp_path: Path) -> None:
    done = steps(tmp_path, *which, **environment)  # type: ignore[arg-type]
    assert (done.returncode, said in done.stderr) == (code, True), done.stderr


def test_steps_without_an_extension_are_left_out(tmp_path: Path) -> None:
    """The library does not load with that torch, so there is nothing to test."""
    done = steps(tmp_path, "tests", "sanitizer", "bench", MINUTES="1")
    assert done.returncode == 0
    assert done.stderr.count("expected the extension built with CUDA kernels, got none") == 3
    assert done.stdout.count("left out") == 3


def run(folder: Path, *options: str, second: str = "passes", until: str = "") -> subprocess.CompletedProcess[str]:
    (folder / "test_it.py").write_text(TESTS)
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT / "tools"),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "SECOND": second,
        "GPU_TESTS": str(folder / "progress"),
        "GPU_TESTS_UNTIL": until,
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "gpu_tests", "-c", os.devnull, *options, "test_it.py"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=60)


def test_a_run_goes_on_with_what_has_not_passed(tmp_path: Path) -> None:
    cut_short = run(tmp_path, until="1")
    assert (cut_short.returncode, "1 passed" in cut_short.stdout) == (75, True), cut_short.stdout
    failing = run(tmp_path, second="fails")
    assert (failing.returncode, "1 failed, 2 passed, 1 deselected" in failing.stdout) == (1, True), failing.stdout
    passing = run(tmp_path)
    assert (passing.returncode, "1 passed, 3 deselected" in passing.stdout) == (0, True), passing.stdout


def test_a_test_that_loses_the_device_ends_only_its_process(tmp_path: Path) -> None:
    done = run(tmp_path, "-p", "xdist", "-n", "1", second="loses")
    assert "2 failed, 2 passed" in done.stdout, done.stdout
    assert "the first to be told" in (tmp_path / "progress" / "lost").read_text()
    assert (tmp_path / "progress" / "passing").read_text().splitlines() == ["test_it.py::test_first", "test_it.py::test_last"]
