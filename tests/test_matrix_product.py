"""The CPU's matrix product by itself, through one linear layer: every shape's edge, bfloat16 factors, denormal numbers, threads."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import influence_ext as ie
from influence_ext import reference
from influence_ext.plan import Plan
from influence_ext.tape import Tape
from influence_ext.testing import deviation

ROOT = Path(__file__).resolve().parents[1]

# rows, terms, columns: ends of register tiles (12 and 6 rows), of panels (32, 16 and 8 columns), of vectors, of pairs, of runs (512
# steps); few columns
SHAPES = (
    (1, 1, 1), (1, 2, 33), (5, 3, 1), (12, 16, 32), (13, 17, 31), (7, 64, 2), (25, 31, 17), (40, 513, 9), (3, 1027, 40), (200, 5, 100),
    (97, 130, 66), (50, 64, 2), (7, 100, 1), (70, 515, 3), (9, 33, 4), (66, 8200, 1),
)  # fmt: skip


def factors(rows: int, terms: int, columns: int, scale: float = 1.0) -> tuple[Tape, Tensor, Tensor, Tensor]:
    """The tape of ``x Wᵀ`` in full precision, with x ``[rows, terms]``, ``v [columns, terms]`` and ``g [rows, columns]``."""
    torch.manual_seed(rows + terms + columns)
    X, v, g = (torch.randn(*shape) * scale for shape in ((rows, terms), (columns, terms), (rows, columns)))
    return Plan.of(nn.Linear(terms, columns, bias=False), X).linearize(X), X, v, g


def close(found: Tensor, a: Tensor, b: Tensor, terms: int) -> bool:
    """Whether ``found`` is ``a b`` up to float32 summation, ``a`` and ``b`` in float64."""
    return bool(((found.double() - a @ b).abs() <= (8 + terms) * torch.finfo(torch.float32).eps * (a.abs() @ b.abs())).all())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("precision", ["full", "bfloat16"])
def test_products_are_of_the_rounded_factors(shape: tuple[int, int, int], precision: Any) -> None:
    """Jv = x vᵀ reads its first factor along rows, Jᵀg = gᵀ x along columns; torch's own rounding is the oracle."""
    tape, X, v, g = factors(*shape)
    tape = tape.at_precision(precision)
    x_, v_, g_ = ((t.bfloat16() if precision == "bfloat16" else t).double() for t in (X, v, g))
    assert close(tape.jvp(v.reshape(1, -1))[0], x_, v_.T, shape[1])
    assert close(tape.vjp(g[None])[0].view_as(v), g_.T, x_, shape[0])


@pytest.mark.parametrize("columns", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_networks_of_few_outputs(columns: int, dtype: torch.dtype, threads: Callable[[int], None]) -> None:
    """Their last layers have products of few columns, with both terms, bias and scale."""
    torch.manual_seed(columns)
    model = nn.Sequential(
        nn.Linear(8, 40), nn.Tanh(), nn.Linear(40, columns), nn.Tanh(), nn.Linear(columns, 37), nn.Tanh(), nn.Linear(37, columns)
    )
    X, y = torch.randn(203, 8, dtype=dtype), torch.randn(203, columns, dtype=dtype)
    model = model.to(dtype)
    V = torch.randn(3, sum(p.numel() for p in model.parameters()), dtype=dtype)
    oracle = reference.ggn_products(model, nn.functional.mse_loss, X, y, V)
    for schedule, count in itertools.product(("by_example", "by_operator"), (1, 3)):
        threads(count)
        found = ie.GGN(model, nn.MSELoss(), (X, y), schedule=schedule).matmat(V)  # type: ignore[arg-type]
        assert deviation(found, oracle).frobenius < (1e-12 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("width", [31, 256, 300, 513])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_tangents_whose_terms_share_a_run(width: int, dtype: torch.dtype) -> None:
    """Both terms of a tangent are summed in runs of 512 steps: less than one, exactly one, one that cuts the second term, or the first."""
    torch.manual_seed(width)
    model = nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 33), nn.Tanh(), nn.Linear(33, 5)).to(dtype)
    X, y = torch.randn(14, 3, dtype=dtype), torch.randn(14, 5, dtype=dtype)
    V = torch.randn(2, sum(p.numel() for p in model.parameters()), dtype=dtype)
    found = ie.GGN(model, nn.MSELoss(), (X, y)).matmat(V)
    oracle = reference.ggn_products(model, nn.functional.mse_loss, X, y, V)
    assert deviation(found, oracle).frobenius < (1e-12 if dtype == torch.float64 else 1e-6)


def test_bfloat16_keeps_what_is_not_a_number() -> None:
    tape, X, v, _ = factors(20, 9, 5)
    X[3, 4], X[5, 6], X[7, 0] = float("nan"), float("inf"), 3.4e38  # the last is infinite in bfloat16
    tape = Plan.of(nn.Linear(9, 5, bias=False), X).linearize(X, precision="bfloat16")
    found = tape.jvp(v.reshape(1, -1))[0]
    expected = X.bfloat16().float() @ v.bfloat16().float().T
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.isinf(), expected.isinf())
    assert found[torch.tensor([0, 1, 2, 4, 6])].isfinite().all()


@pytest.mark.parametrize("scale", [1e-21, 1e-36])
def test_products_with_denormal_numbers(scale: float) -> None:
    """Results, or the factors themselves, below 1.2e-38: right to the last denormal bit in float32, and the flags stay as they are."""
    tape, X, v, g = factors(13, 20, 7, scale)
    found, pulled = tape.jvp(v.reshape(1, -1) / scale * 1e-21)[0], tape.vjp(g[None])[0]
    smallest = 1.5e-45
    for product, oracle in ((found, X.double() @ (v / scale * 1e-21).double().T), (pulled.view_as(v), g.double().T @ X.double())):
        assert float((product.double() - oracle).abs().max()) <= 1e-5 * float(oracle.abs().max()) + 20 * smallest
    assert float(torch.tensor(1e-39) * 0.5) > 0, "the caller's denormals are flushed"


def test_bfloat16_takes_denormal_numbers_for_zero() -> None:
    tape, _, v, _ = factors(13, 20, 7, 1e-40)
    v = torch.randn(1, v.numel())
    assert not tape.at_precision("bfloat16").jvp(v).any()
    assert tape.jvp(v).any()


@pytest.mark.parametrize("precision", ["full", "bfloat16"])
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_any_number_of_threads_repeats_its_results(count: int, precision: Any, threads: Callable[[int], None]) -> None:
    """Each element is summed by one thread in a fixed order; without an accumulator per thread, their number does not matter either."""
    tape, _, v, g = factors(300, 257, 129)
    tape = tape.at_precision(precision)
    tape.set_schedule("by_operator")
    expected = tape.jvp(v.reshape(1, -1)), tape.vjp(g[None])
    threads(count)
    for _ in range(3):
        assert torch.equal(tape.jvp(v.reshape(1, -1)), expected[0])
        assert torch.equal(tape.vjp(g[None]), expected[1])


COUNT = """
import sys, torch
import influence_ext as ie
if len(sys.argv) > 1:
    torch.set_num_threads(int(sys.argv[1]))
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.Tanh(), torch.nn.Linear(64, 2))
G = ie.GGN(model, torch.nn.MSELoss(), (torch.randn(2000, 8), torch.randn(2000, 2)))
G.matmat(torch.randn(1, G.shape[0]))
with open("/proc/self/status") as status:
    used = next(int(line.split()[1]) for line in status if line.startswith("Threads"))
print(G.tape.schedule(1).split()[-2], used)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("environment", "call", "expected"), [("1", None, 1), ("2", None, 2), ("1", 2, 2), ("2", 1, 1)])
def test_thread_counts_are_the_users(environment: str, call: int | None, expected: int) -> None:
    """OMP_NUM_THREADS, and torch.set_num_threads over it; where the environment allows one thread, no other is ever started."""
    command = [sys.executable, "-c", COUNT, *([] if call is None else [str(call)])]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": environment}, cwd=ROOT, capture_output=True, text=True, check=True)
    stated, started = map(int, done.stdout.split())
    assert stated == expected
    assert started == 1 or environment != "1" or expected > 1


SAME = """
import sys, torch
import influence_ext as ie
from tests.test_matrix_product import SHAPES, factors
assert ie.build_info()["active_instruction_set"] == sys.argv[1]
for shape in SHAPES:
    tape, X, v, g = factors(*shape)
    tape = tape.at_precision("bfloat16")
    for found, a, b in (
        (tape.jvp(v.reshape(1, -1))[0], X.bfloat16().double(), v.bfloat16().double().T),
        (tape.vjp(g[None])[0].view_as(v), g.bfloat16().double().T, X.bfloat16().double()),
    ):
        assert (found.double() - a @ b).norm() <= 1e-6 * (a @ b).norm(), shape
"""


@pytest.mark.parametrize("instruction_set", ["baseline", "avx2", "avx512"])
def test_bfloat16_means_the_same_without_its_instructions(instruction_set: str) -> None:
    """In a process of its own: factors are rounded, and multiplied in float32."""
    order = ["baseline", "avx2", "avx512", "avx512_bf16"]
    if order.index(instruction_set) > order.index(ie.build_info()["active_instruction_set"]):
        pytest.skip(f"this processor has no {instruction_set}")
    environment = {**os.environ, "INFLUENCE_EXT_ISA": instruction_set}
    done = subprocess.run([sys.executable, "-c", SAME, instruction_set], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_build_info_tells_the_instructions_in_use() -> None:
    found = ie.build_info()
    assert found["active_instruction_set"] in found["instruction_sets"].split()
    lanes = {"baseline": "4", "avx2": "8", "avx512": "16", "avx512_bf16": "16"}
    assert found["float32_lanes"] == lanes[found["active_instruction_set"]]
    assert ("two terms" in found["bfloat16_products"]) == (found["active_instruction_set"] == "avx512_bf16")
    assert found["instruction_set_override"] == "INFLUENCE_EXT_ISA"
