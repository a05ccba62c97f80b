"""Peak memory of a product: the tape, two widest activations a right-hand side, a few vectors of length P. Freed memory serves again."""

from __future__ import annotations

import copy
import ctypes
import mmap
import os
import pickle
import queue
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import influence_ext as ie
from influence_ext.errors import ArgumentError
from influence_ext.plan import Plan
from influence_ext.reference import per_example_grads as reference_grads
from influence_ext.testing import assert_close

# Run in a process of its own: its peak resident memory is then that of this product.
PRODUCT = """
import sys
import torch
from torch import nn
import influence_ext as ie

schedule, V = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(2)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 1024), nn.ReLU(), nn.Linear(1024, 512), nn.Tanh(), nn.Linear(512, 10))
G = ie.GGN(model, nn.CrossEntropyLoss(), (torch.randn(8192, 64), torch.randint(10, (8192,))), schedule=schedule)
vectors = torch.randn(V, G.shape[0])

def resident(kind):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(kind))

G.matmat(vectors[:1, :])  # threads, code pages and thread-local buffers of a small product are there before the measurement
with open("/proc/self/clear_refs", "w") as control:
    control.write("5")  # the peak starts anew
before = resident("VmRSS")
result = G.matmat(vectors)
print(resident("VmHWM") - before, G.tape.workspace_bytes(V), G.tape.cached_bytes, G.shape[0])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("schedule", ["by_example", "by_operator"])
def test_peak_memory_of_a_product_stays_within_the_stated_bytes(schedule: str) -> None:
    N, widest, V, threads, size = 8192, 1024, 6, 2, 4
    run = subprocess.run([sys.executable, "-c", PRODUCT, schedule, str(V)], capture_output=True, text=True, check=True)
    peak, stated, cached, P = map(int, run.stdout.split())
    result = V * P * size
    slack = 4 * 2**20  # the allocator's and the runtime's own
    assert peak <= stated + result + slack
    assert stated <= 2 * V * N * widest * size + (threads + 2) * V * P * size
    # The tape holds what is needed and no more: two activations and two derivatives, and the weights three times.
    assert cached <= (2 * N * (1024 + 512) + N * 10) * size + 3.2 * P * size


def test_workspace_grows_no_faster_than_the_number_of_vectors() -> None:
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
    G = ie.GGN(model, nn.MSELoss(), (torch.randn(500, 8), torch.randn(500, 1)), schedule="by_operator")
    one, eight = G.tape.workspace_bytes(1), G.tape.workspace_bytes(8)
    assert eight <= 8 * one


def test_the_same_memory_serves_another_point() -> None:
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
    G = ie.GGN(model, nn.MSELoss(), (torch.randn(500, 8), torch.randn(500, 1)))
    before = G.tape.cached_bytes
    G.tape.relinearize(G.tape.theta * 0.5)
    assert G.tape.cached_bytes == before


FRESH = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
"""With these in its environment glibc maps every large block anew: what it kept of earlier ones decides nothing."""


# In a process of its own, which an exception inside a parallel region would end. What fails is what each thread allocates: a padded copy of
# the input of a convolution that reads much and writes little, where the calling thread has its workspace already; or the tiles of another
# network.
SHORTAGE = r"""
import re
import resource
import sys
import torch
from torch import nn
from influence_ext import _C
from influence_ext.capture import named_tensors
from influence_ext.plan import Plan

def short_of_memory(run):
    _C.empty_cache()
    with open("/proc/self/statm") as sizes:
        used = int(sizes.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 8 * 2**20, resource.RLIM_INFINITY))
    try:
        run()
    except MemoryError as error:
        return re.search(r"expected \d+ bytes .* on the CPU, got none; give memory_budget=", str(error)) is not None
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return False

class Scaled(nn.Module):
    def __init__(self, then):
        super().__init__()
        self.w, self.then = nn.Parameter(torch.ones(1)), then
    def forward(self, x):
        return self.then((self.w * x).tanh())

torch.set_num_threads(2)
kernel = sys.argv[1] == "kernel"
X, V = (torch.randn(2, 1, 2000, 2000), torch.ones(1, 1)) if kernel else (torch.randn(8, 1, 512, 1024), torch.randn(8, 1))
sums = Scaled(nn.AvgPool2d(X.shape[2:]))
model = Scaled(nn.Conv2d(1, 1, 3, stride=4).requires_grad_(False)) if kernel else sums
more = X.repeat(2, 1, 1, 1) if kernel else X[:2, :, :9, :9]
warm = Plan.of(Scaled(nn.AvgPool2d(more.shape[2:])), more).linearize(more)
warm.set_schedule("by_operator")
warm.jvp(V[:1])  # the threads exist, and in the first case the workspace
if kernel:
    plan = Plan.of(model, X)
    tape = _C.Tape32(plan._native, [X])
    tape.set_schedule(2)
    theta = [slot.read(named_tensors(model)) for slot in plan.graph.slots]
    expected = model(X).detach()
    assert short_of_memory(lambda: tape.linearize(theta))
    tape.linearize(theta)
    result = tape.outputs().view(expected.shape)
else:
    tape = Plan.of(model, X).linearize(X)
    tape.set_schedule("by_example")
    tangent = torch.func.jvp(lambda w: torch.func.functional_call(model, {"w": w}, (X,)), (model.w.detach(),), (torch.ones(1),))[1]
    expected = V.reshape(-1, 1, 1, 1, 1) * tangent.detach()
    assert short_of_memory(lambda: tape.jvp(V))
    result = tape.jvp(V)
print(float((result - expected).norm() / expected.norm()))
"""


@pytest.mark.parametrize("place", ["kernel", "tiles"])
def test_a_failed_allocation_is_an_exception(place: str) -> None:
    """Of any thread; and the next product is right."""
    command = [sys.executable, "-c", SHORTAGE, place]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env=os.environ | FRESH)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1e-4


# ---------------------------------------------------------------------------------------------------------------------
# Freed memory that serves again (csrc/common/memory.h)


@pytest.fixture
def limit() -> Iterator[Callable[[int], None]]:
    """Sets how much is kept, for a test that begins with an empty cache."""
    before = ie.build_info()["cache_limit"]
    ie.empty_cache()
    yield ie.set_cache_limit
    ie.set_cache_limit(before)


def cached() -> int:
    return int(ie.build_info()["cache_bytes"])


class Rows:
    """Per-example gradients of N examples, ``[N, P]``; everything else in a call is smaller than what is kept."""

    def __init__(self, N: int = 64):
        torch.manual_seed(3)
        self.model = nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 3))
        self.X, self.y = torch.randn(N, 20), torch.randint(3, (N,))
        self.nbytes = N * sum(p.numel() for p in self.model.parameters()) * 4

    def __call__(self, scale: float = 1.0) -> dict[str, torch.Tensor]:
        return ie.per_example_grads(self.model, nn.CrossEntropyLoss(), (scale * self.X, self.y))

    def factors(self) -> Any:
        return Plan.of(self.model, self.X).linearize(self.X).factors(torch.ones(1, len(self.X), 3))

    def expected(self, scale: float = 1.0) -> torch.Tensor:
        return reference_grads(self.model, nn.CrossEntropyLoss(reduction="none"), scale * self.X, self.y)


def address(grads: dict[str, torch.Tensor]) -> int:
    return next(iter(grads.values())).data_ptr()


def test_a_freed_result_serves_the_next(limit: Callable[[int], None]) -> None:
    rows = Rows()
    grads = rows()
    first = address(grads)
    assert cached() == 0
    del grads
    assert rows.nbytes <= cached() < rows.nbytes + 64
    grads = rows(2.0)
    assert address(grads) == first
    assert cached() == 0
    assert_close(torch.cat([g.flatten(1) for g in grads.values()], dim=1), rows.expected(2.0))


HOLDERS: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
    "an entry": lambda grads: grads["2.bias"],
    "a row of one": lambda grads: grads["0.weight"][3],
    "a view of another type": lambda grads: grads["0.weight"].view(torch.int32),
    "numpy": lambda grads: grads["0.weight"].numpy(),
    "dlpack": lambda grads: torch.utils.dlpack.to_dlpack(grads["0.weight"]),
    "storage": lambda grads: grads["0.weight"].untyped_storage(),
    "autograd": lambda grads: grads["0.weight"] * torch.ones((), requires_grad=True),
}


@pytest.mark.parametrize("hold", HOLDERS.values(), ids=HOLDERS)
def test_memory_that_somebody_holds_is_not_used_again(hold: Callable[[dict[str, torch.Tensor]], Any], limit: Callable[[int], None]) -> None:
    rows = Rows()
    grads = rows()
    first, flat = address(grads), grads["0.weight"]._base
    assert flat is not None
    copied = flat.clone()
    held = hold(grads)
    seen = (ctypes.c_float * flat.numel()).from_address(first)
    del grads, flat
    assert cached() == 0
    others = [rows(scale) for scale in (2.0, 3.0)]
    assert first not in map(address, others)
    assert torch.equal(torch.tensor(list(seen)), copied.flatten())
    del held, others
    assert cached() == 3 * ((rows.nbytes + 63) // 64 * 64)


def test_a_block_serves_requests_of_four_fifths_of_its_size_or_more(limit: Callable[[int], None]) -> None:
    grads = Rows(100)()
    first = address(grads)
    del grads
    assert address(Rows(79)()) != first
    ie.empty_cache()
    grads = Rows(100)()
    first = address(grads)
    del grads
    assert address(Rows(81)()) == first


def test_the_limit_holds_and_the_oldest_goes_first(limit: Callable[[int], None]) -> None:
    rows = Rows()
    kept = [rows() for _ in range(4)]
    addresses = [address(grads) for grads in kept]
    each = (rows.nbytes + 63) // 64 * 64
    limit(2 * each)
    for i in range(4):
        kept[i] = {}
        assert cached() == min(i + 1, 2) * each
    again = [rows() for _ in range(2)]
    assert {address(grads) for grads in again} == set(addresses[2:])
    del again
    limit(2 * each - 1)
    assert cached() == each
    assert ie.build_info()["cache_limit"] == 2 * each - 1
    large = Rows(640)()
    del large  # larger than the limit: not kept, and nothing goes for its sake
    assert each <= cached() < 2 * each
    assert address(rows()) in addresses[2:]
    limit(0)
    assert cached() == 0
    del rows
    kept = [Rows()()]
    kept.clear()
    assert cached() == 0


@pytest.mark.parametrize("wrong", [-1, 1.5, "1G", None])
def test_a_limit_is_a_number_of_bytes(wrong: Any) -> None:
    with pytest.raises(ArgumentError, match="set_cache_limit: expected a number of bytes, 0 or more, got"):
        ie.set_cache_limit(wrong)


def test_an_emptied_cache_is_the_systems_again(limit: Callable[[int], None]) -> None:
    rows = Rows(4096)
    with open("/proc/self/statm") as sizes:

        def resident() -> int:
            sizes.seek(0)
            return int(sizes.read().split()[1]) * mmap.PAGESIZE

        grads = rows()
        before = resident()
        del grads
        assert abs(resident() - before) < rows.nbytes // 10
        ie.empty_cache()
        assert resident() < before - rows.nbytes // 10 * 9
    assert cached() == 0


def test_results_are_tensors_like_others(limit: Callable[[int], None], tmp_path: Path) -> None:
    rows = Rows()
    flat = rows()["0.weight"]._base
    assert flat is not None
    like = flat.clone()
    torch.save(flat, tmp_path / "flat.pt")
    assert torch.equal(torch.load(tmp_path / "flat.pt"), like)
    assert torch.equal(pickle.loads(pickle.dumps(flat)), like)
    assert torch.equal(copy.deepcopy(flat), like)
    assert flat.untyped_storage().nbytes() == like.untyped_storage().nbytes()
    assert flat.untyped_storage().resizable()
    assert torch.equal(flat.flatten().clone().resize_(3), like.flatten()[:3])
    shared = flat.share_memory_()
    assert shared.is_shared()
    assert torch.equal(shared, like)
    assert cached() == (rows.nbytes + 63) // 64 * 64  # what was moved into shared memory is free


def test_a_result_can_grow(limit: Callable[[int], None]) -> None:
    rows = Rows()
    flat = rows()["0.weight"]._base
    assert flat is not None
    like, size = flat.flatten().clone(), flat.numel()
    grown = flat.resize_(3 * size)
    assert torch.equal(grown[:size], like)
    grown[size:] = 1.0
    del flat, grown
    assert cached() >= 3 * rows.nbytes


def test_threads_share_the_cache(limit: Callable[[int], None]) -> None:
    """Results are taken in some threads and freed in others."""
    rows = Rows()
    like = {scale: rows.expected(scale) for scale in (1.0, 2.0, 3.0)}
    rows()
    waiting: queue.Queue[tuple[float, dict[str, torch.Tensor]]] = queue.Queue(maxsize=2)

    def make(scale: float) -> None:
        torch.set_num_threads(1)
        for _ in range(30):
            waiting.put((scale, rows(scale)))

    with ThreadPoolExecutor(3) as pool:
        jobs = [pool.submit(make, scale) for scale in like]
        for _ in range(30 * len(like)):
            scale, grads = waiting.get(timeout=600)
            assert_close(torch.cat([g.flatten(1) for g in grads.values()], dim=1), like[scale])
            del grads
        for job in jobs:
            job.result()
    assert cached() <= 8 * rows.nbytes  # as many as were ever there at once


FORK = """
import os
import threading
import torch
from influence_ext import _C
from tests.test_memory import Rows, address

torch.set_num_threads(1)
rows = Rows()
kept, freed = rows(), rows()
block = address(freed)
copied = kept["0.weight"].clone()
del freed

def forked(check):
    child = os.fork()
    if child == 0:
        os._exit(0 if check() else 1)
    assert os.waitpid(child, 0)[1] == 0

def computes():
    grads = rows(2.0)
    flat = torch.cat([g.flatten(1) for g in grads.values()], dim=1).double()
    return address(grads) == block and torch.allclose(flat, rows.expected(2.0), rtol=1e-4, atol=1e-5)

def empties():
    _C.empty_cache()
    return _C.cache_size()[0] == 0

forked(computes)
factors = Rows().factors()
stop = threading.Event()
busy = threading.Thread(target=lambda: [factors.materialise() for _ in iter(stop.is_set, True)])
busy.start()
for _ in range(50):
    forked(empties)
stop.set()
busy.join()
assert torch.equal(kept["0.weight"], copied)
"""

SHUTDOWN = """
import atexit
import builtins
from tests.test_memory import Rows

rows = Rows()
builtins.kept_to_the_end = [rows() for _ in range(3)]
del builtins.kept_to_the_end[1]
module_level = rows()
atexit.register(lambda: rows())
"""

REFUSED = """
import resource
import sys
from tests.test_memory import Rows, cached
import influence_ext as ie

large, other = Rows(10000), Rows(7000)  # 60 and 42 MB
other(), large()
ie.empty_cache()
large()
assert cached() >= large.nbytes
with open("/proc/self/statm") as sizes:
    used = int(sizes.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 16 * 2**20, resource.RLIM_INFINITY))
grads = other()  # neither fits what is kept nor beside it
assert cached() < large.nbytes
try:
    Rows(70000)()
except MemoryError as error:
    assert "on the CPU, got none; give memory_budget=" in str(error), error
else:
    raise AssertionError("expected a MemoryError")
del grads
grads = other()
"""


@pytest.mark.parametrize("script", [FORK, SHUTDOWN, REFUSED], ids=["fork", "shutdown", "refused"])
def test_the_cache_outlasts(script: str) -> None:
    """Forks beside threads that use it, tensors that are freed last, and a system that has no more memory."""
    command, folder = [sys.executable, "-c", script], Path(__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, cwd=folder, env=os.environ | FRESH)
    assert done.returncode == 0, done.stderr
    assert not done.stderr


def test_the_variable_of_the_environment_is_the_limit() -> None:
    script = "import influence_ext as ie; print(ie.build_info()['cache_limit'])"

    def run(value: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "INFLUENCE_EXT_CACHE_LIMIT": value}
        return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, env=environment)

    assert run("123456").stdout.strip() == "123456"
    wrong = run("1G")
    assert "INFLUENCE_EXT_CACHE_LIMIT: expected a number of bytes, 0 or more, got '1G'; correct or unset it." in wrong.stderr
