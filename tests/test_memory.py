"""Peak memory of a product: the tape, two widest activations a right-hand side, and a few vectors of length P."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

import influence_ext as ie

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
    done = subprocess.run([sys.executable, "-c", SHORTAGE, place], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1e-4
