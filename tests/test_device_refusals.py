"""What a device, or a build without one, refuses: a sentence each, and nothing is lost. The emulated device is short of memory here."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import influence_ext as ie
import influence_ext._C as _C
from influence_ext import reference
from influence_ext.errors import ArgumentError
from influence_ext.plan import Plan
from influence_ext.testing import assert_close
from tests.emulation import emulated_device, most_bytes

ROOT = Path(__file__).resolve().parents[1]
N = 600
FREE = 400_000  # bytes; the forward state of all examples takes some 660,000


def problem() -> tuple[nn.Module, nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 3)).double()
    return model, nn.CrossEntropyLoss(), torch.randn(N, 20, dtype=torch.float64), torch.randint(3, (N,))


@pytest.fixture
def small_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Of which ``FREE`` bytes are left, as a CUDA device would say."""
    with emulated_device():
        most_bytes()
        monkeypatch.setenv("INFL_EMULATION_MEMORY", str(most_bytes() + FREE))
        monkeypatch.setattr("influence_ext.plan.free_bytes", lambda device: FREE)
        yield


@pytest.mark.usefixtures("small_device")
def test_shortage_names_a_budget_that_fits() -> None:
    """The sentence has the bytes wanted, those free, and a budget with its chunk; with that budget the product is that of plain PyTorch."""
    model, loss, X, y = problem()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(
        MemoryError, match=rf"expected \d+ bytes .* \(\d+ bytes are free there\); .*; memory_budget=\d+ holds \d+ of {N} examples"
    ) as error:
        ie.GGN(model, loss, (X, y))
    budget, chunk = map(int, re.search(r"memory_budget=(\d+) holds (\d+) of", str(error.value)).groups())  # type: ignore[union-attr]
    assert 1 < chunk < N
    assert budget <= FREE
    G = ie.GGN(model, loss, (X, y), memory_budget=budget)
    assert G.tape.chunk == chunk
    V = torch.randn(1, G.num_parameters, dtype=torch.float64)
    assert_close(G.matmat(V), reference.ggn_products(model, nn.functional.cross_entropy, X, y, V))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.usefixtures("small_device")
def test_a_budget_beyond_what_is_free_takes_smaller_chunks() -> None:
    model, _, X, _ = problem()
    plan = Plan.of(model, X)
    tape = plan.linearize(X, memory_budget=10**9)
    assert tape.chunk is not None
    assert 1 < tape.chunk < N
    v = torch.randn(1, plan.space.num_parameters, dtype=torch.float64)
    parameters = dict(model.named_parameters())
    _, expected = torch.func.jvp(lambda p: torch.func.functional_call(model, p, (X,)), (parameters,), (plan.space.unflatten(v[0]),))
    assert_close(tape.jvp(v)[0], expected.detach())


def test_products_in_chunks_take_no_more_than_the_budget() -> None:
    """Forward state, workspace and vectors, by the device's own count; 600 examples are no multiple of the chunks."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(100, 200), nn.Tanh(), nn.Linear(200, 3))
    X, g = torch.randn(N, 100), torch.randn(1, N, 3)
    with emulated_device():
        plan = Plan.of(model, X)
        v = torch.randn(1, plan.space.num_parameters)
        for budget in (400_000, 700_000):
            most_bytes()
            before = most_bytes()
            tape = plan.linearize(X, memory_budget=budget)
            assert tape.chunk is not None
            assert N % tape.chunk
            tape.jvp(v)
            tape.vjp(g)
            assert 0.9 * budget < most_bytes() - before <= budget + 4096  # each buffer is rounded up
            del tape


def test_a_device_without_room_for_one_example_is_what_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a budget that nobody gave."""
    model, _, X, _ = problem()
    plan = Plan.of(model, X)
    monkeypatch.setattr("influence_ext.plan.free_bytes", lambda device: 20_000)
    with pytest.raises(MemoryError, match=r"expected \d+ bytes on cpu for the weights and one example, got 15000, three quarters of those"):
        plan.linearize(X, memory_budget=10**9)
    monkeypatch.setattr("influence_ext.plan.free_bytes", lambda device: 60_000)
    with pytest.raises(ArgumentError, match=r"got 10 bytes .*; raise it to \d+ for chunks of \d+ examples") as error:
        plan.linearize(X, memory_budget=10)
    budget, chunk = map(int, re.search(r"raise it to (\d+) for chunks of (\d+)", str(error.value)).groups())  # type: ignore[union-attr]
    assert budget <= 45_000
    assert plan.linearize(X, memory_budget=budget).chunk == chunk


def test_shortage_of_which_nobody_knows_what_is_free_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, X, _ = problem()
    with emulated_device():
        most_bytes()
        monkeypatch.setenv("INFL_EMULATION_MEMORY", str(most_bytes() + FREE))
        plan = Plan.of(model, X)
        with pytest.raises(MemoryError, match=r"fewer examples in one call\.$"):
            plan.linearize(X)
        monkeypatch.delenv("INFL_EMULATION_MEMORY")
        assert_close(plan.linearize(X).outputs, model(X).detach())


def test_tensors_on_a_device_without_kernels() -> None:
    model, _, X, _ = problem()
    native = Plan.of(model, X)._native
    with pytest.raises(RuntimeError, match=r"on a device this build has kernels for, got meta; .* build with INFLUENCE_EXT_CUDA=1"):
        _C.Tape64(native, [X.to("meta")])


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_a_build_asked_for_cuda_that_this_torch_has_not() -> None:
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT,
        env=os.environ | {"INFLUENCE_EXT_CUDA": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert re.search(r"setup\.py: INFLUENCE_EXT_CUDA=1 needs a CUDA build of torch.*; use auto or 0 to build for the CPU\.", done.stderr)


PRODUCTS = """
#include <cstdio>
#include "emulation/product.h"
int main() {
  using namespace infl;
  float a[64] = {}, b[64] = {}, c[64] = {};
  const MatrixProduct<float> good{.batch = 2, .M = 3, .N = 2, .K = 4, .a = a, .b = b, .c = c, .lda = 4, .ldb = 2, .ldc = 2, .c_batch = 6};
  const auto check = [](const MatrixProduct<float>& p) {
    try {
      emulation::check(p);
      std::puts("taken");
    } catch (const std::exception& e) { std::puts(e.what()); }
  };
  check(good);
  auto p = good; p.a_transposed = p.b_transposed = true; p.lda = 3; p.ldb = 4; check(p);
  p = good; p.ldc = 4; p.c_batch = 2; check(p);
  p = good; p.lda = 3; check(p);
  p = good; p.b_transposed = true; p.ldb = 3; check(p);
  p = good; p.ldc = 1; check(p);
  p = good; p.c_batch = 5; check(p);
  p = good; p.N = int64_t{1} << 31; check(p);
}
"""


def test_the_emulated_vendor_refuses_what_the_vendor_does(tmp_path: Path) -> None:
    (tmp_path / "it.cpp").write_text(PRODUCTS)
    include = [f"-I{ROOT / folder}" for folder in ("csrc", "tests/emulation")]
    subprocess.run(["c++", "-std=c++20", "-O0", *include, "-o", str(tmp_path / "it"), str(tmp_path / "it.cpp")], check=True)
    said = subprocess.run([str(tmp_path / "it")], capture_output=True, text=True, check=True).stdout.splitlines()
    assert said[:3] == ["taken"] * 3
    for line, what in zip(
        said[3:], ("of A of 3 where 4", "of B of 3 where 4", "of C of 1 where 2", "results 5 elements", "a size of 2147483648"), strict=True
    ):
        assert what in line
