"""A memory budget: the same numbers, a chunk of examples at a time, and no more memory than was said."""

from __future__ import annotations

import subprocess
import sys
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import influence_ext as ie
from influence_ext import errors
from influence_ext.chunks import ChunkedTape
from influence_ext.data import StreamedExamples, load
from influence_ext.plan import Plan
from influence_ext.testing import assert_close
from tests.cases import Network, budget_of, build
from tests.cases.models import NETWORKS

F64 = torch.float64


def wide() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 3)).double()


X, Y = torch.randn(101, 5, dtype=F64, generator=torch.Generator().manual_seed(1)), torch.arange(101) % 3
BUDGET = 25_000  # bytes: the weights thrice, and some twenty examples


@pytest.fixture(scope="module")
def pair() -> tuple[ie.GGN, ie.GGN]:
    """The same matrix, resident and in chunks."""
    model = wide()
    return tuple(ie.GGN(model, nn.CrossEntropyLoss(), (X, Y), damping=0.1, memory_budget=b) for b in (None, BUDGET))  # type: ignore[return-value]


def test_every_product_is_the_same(pair: tuple[ie.GGN, ie.GGN]) -> None:
    whole, parts = pair
    assert parts.tape.chunk is not None
    assert 1 < parts.tape.chunk < 51  # several chunks, the last one smaller
    V = torch.randn(4, whole.shape[0], dtype=F64)
    assert_close(parts.matmat(V), whole.matmat(V))
    assert_close(parts.diagonal(), whole.diagonal())
    assert_close(parts.root_gram(), whole.root_gram())
    assert_close(parts.tape.jvp(V), whole.tape.jvp(V))
    G = torch.randn(2, 101, 3, dtype=F64)
    assert_close(parts.tape.vjp(G), whole.tape.vjp(G))
    assert_close(parts.tape.factors(G).materialise(None), whole.tape.factors(G).materialise(None))
    assert_close(parts.tape.factors(G).dots(V), torch.einsum("vnp,wp->vwn", whole.tape.factors(G).materialise(None), V))
    assert_close(parts.tape.factors(G).square_norms(), whole.tape.factors(G).square_norms())
    assert torch.equal(parts.tape.outputs, whole.tape.outputs)


def test_chunks_against_resident_factors(pair: tuple[ie.GGN, ie.GGN]) -> None:
    whole, parts = pair
    G = torch.randn(1, 101, 3, dtype=F64)
    expected = whole.tape.factors(G).gram(whole.tape.factors(G))
    assert_close(parts.tape.factors(G).gram(whole.tape.factors(G)), expected)
    assert_close(parts.tape.factors(G).gram(parts.tape.factors(G)), expected)


def test_the_state_stays_within_the_budget(pair: tuple[ie.GGN, ie.GGN]) -> None:
    whole, parts = pair
    assert whole.cached_bytes > BUDGET
    assert parts.cached_bytes + parts.tape.workspace_bytes(1) <= BUDGET
    assert f"recomputed in chunks of {parts.tape.chunk} examples" in parts.report()


@pytest.mark.parametrize("N", [3000, 6000])
def test_the_vectors_of_a_product_are_within_the_budget(N: int) -> None:
    """Wide layers, whose packed vectors are of the weights' size; with more examples than a tile takes, those of all layers at once."""
    model = nn.Sequential(nn.Linear(200, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    inputs, targets = torch.randn(N, 200), torch.arange(N) % 10
    for budget in (2_000_000, 6_000_000, 10_000_000):
        G = ie.GGN(model, nn.CrossEntropyLoss(), (inputs, targets), memory_budget=budget)
        assert G.tape.chunk is not None
        native: Any = G.tape._native
        taken = []
        native.each(lambda tape, start, stop, taken=taken: taken.append(tape.cached_bytes + tape.workspace_bytes(1)))
        assert 0.7 * budget < max(taken) <= budget
        assert G.cached_bytes + G.tape.workspace_bytes(1) == taken[0]


def test_two_states_are_never_held_at_once(monkeypatch: pytest.MonkeyPatch, pair: tuple[ie.GGN, ie.GGN]) -> None:
    """The last chunk is smaller, so each pass takes a tape of another size twice: what was made before is gone by then."""
    whole, parts = pair
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    before: list[int] = []
    new = ChunkedTape._new

    def counted(self: ChunkedTape, sources: list[Tensor]) -> Any:
        before.append(len(alive))
        tape = new(self, sources)
        alive.add(tape)
        return tape

    monkeypatch.setattr(ChunkedTape, "_new", counted)
    native: Any = parts.tape._native
    native._spares.clear()
    V, g = torch.randn(1, whole.shape[0], dtype=F64), torch.randn(1, 101, 3, dtype=F64)
    factors = parts.tape.factors(g)
    passes = [
        lambda: parts.tape.relinearize(parts.tape.theta),
        lambda: parts.tape.jvp(V),
        lambda: parts.tape.vjp(g),
        lambda: parts.matmat(V),
        lambda: factors.materialise(None),
        lambda: factors.dots(V),
        factors.square_norms,
        factors.square_norms_by_region,
        factors.square_sum,
        lambda: factors.gram(whole.tape.factors(g)),
        lambda: parts.tape.set_schedule("auto"),
    ]
    for one in passes:
        one()
    assert len(before) >= 2 * len(passes) - 1
    assert set(before) == {0}


@pytest.mark.parametrize("rest", [0, 1])
def test_a_schedule_is_that_of_every_chunk(rest: int) -> None:
    """Whether or not the last chunk is as large as the others, whose memory the next pass takes again."""
    data = torch.randn(40 + rest, 5, dtype=F64), torch.arange(40 + rest) % 3
    budget = budget_of(10, lambda budget: ie.GGN(wide(), nn.CrossEntropyLoss(), data, memory_budget=budget))
    G = ie.GGN(wide(), nn.CrossEntropyLoss(), data, memory_budget=budget)
    assert G.tape.chunk == 10
    native: Any = G.tape._native
    for schedule in ("by_example", "by_operator", "by_example"):
        G.tape.set_schedule(schedule)  # type: ignore[arg-type]
        truly = []
        native.each(lambda tape, start, stop, truly=truly: truly.append((tape.tiling(1)[0], tape.workspace_bytes(1))))
        assert {by_example for by_example, _ in truly} == {schedule == "by_example"}
        assert schedule.replace("_", " ") in G.tape.schedule(1)
        assert G.tape.workspace_bytes(1) == truly[0][1]


def test_a_large_budget_keeps_everything() -> None:
    G = ie.GGN(wide(), nn.CrossEntropyLoss(), (X, Y), memory_budget=10**8)
    assert G.tape.chunk is None


def test_a_budget_for_less_than_one_example_is_refused() -> None:
    with pytest.raises(errors.ArgumentError, match=r"memory_budget to hold at least one example, got 5000 bytes.*raise it to \d+"):
        ie.GGN(wide(), nn.CrossEntropyLoss(), (X, Y), memory_budget=5000)


@pytest.mark.parametrize("name", ["tied-layer", "named-inputs", "sequence-outputs", "frozen-middle"])
@pytest.mark.parametrize("curvature", [ie.GGN, ie.Hessian, ie.EmpiricalFisher])
def test_other_curvatures_and_inputs(curvature: type, name: str) -> None:
    network: Network = build(NETWORKS[name], F64)
    whole = curvature(network.model, network.loss, network.data)

    def chunked(budget: int) -> Any:
        return curvature(network.model, network.loss, network.data, memory_budget=budget)

    parts = chunked(budget_of(3, chunked))
    assert parts.tape.chunk == 3
    v = network.random("v", network.P)
    assert_close(parts @ v, whole @ v)


class Loader:
    """Batches of unequal size that count how often they are read."""

    def __init__(self, sizes: tuple[int, ...] = (30, 30, 41)) -> None:
        self.sizes, self.passes = sizes, 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.passes += 1
        start = 0
        for size in self.sizes:
            yield X[start : start + size], Y[start : start + size]
            start += size


def test_batches_that_do_not_fit_are_read_again(pair: tuple[ie.GGN, ie.GGN]) -> None:
    loader = Loader()
    examples = load(loader, "test", memory_budget=2000)
    assert isinstance(examples, StreamedExamples)
    assert torch.equal(examples.targets, Y)
    assert torch.equal(examples.subset([77, 3, 3]).inputs[0], X[[77, 3, 3]])
    passes = loader.passes
    G = ie.GGN(wide(), nn.CrossEntropyLoss(), examples, damping=0.1, memory_budget=BUDGET)
    v = torch.randn(G.shape[0], dtype=F64)
    assert_close(G @ v, pair[0] @ v)
    assert loader.passes > passes + 1
    H = ie.Hessian(wide(), nn.CrossEntropyLoss(), examples, memory_budget=BUDGET)
    assert_close(H @ v, ie.Hessian(wide(), nn.CrossEntropyLoss(), (X, Y)) @ v)


def test_data_that_change_between_passes_are_noticed() -> None:
    loader = Loader()
    examples = load(loader, "test", memory_budget=2000)
    loader.sizes = (30, 30)
    with pytest.raises(errors.DataError, match="the same 101 examples in every pass over the data, got 60"):
        list(examples.blocks(10))


@pytest.mark.parametrize("sizes", [(1, 60, 40), (0, 60, 41), (60, 0, 41), (0, 0, 101)])
def test_small_and_empty_first_batches_take_the_budget_that_others_do(sizes: tuple[int, ...]) -> None:
    budget = budget_of(20, lambda budget: ie.GGN(wide(), nn.CrossEntropyLoss(), (X, Y), memory_budget=budget))
    examples = load(Loader(sizes), "test", memory_budget=2000)
    assert isinstance(examples, StreamedExamples)
    G = ie.GGN(wide(), nn.CrossEntropyLoss(), examples, memory_budget=float(budget))
    assert G.tape.chunk == 20
    v = torch.randn(G.shape[0], dtype=F64)
    assert_close(G @ v, ie.GGN(wide(), nn.CrossEntropyLoss(), (X, Y)) @ v)
    native: Any = G.tape._native
    taken: list[int] = []
    native.each(lambda tape, start, stop: taken.append(tape.cached_bytes + tape.workspace_bytes(1)))
    assert max(taken) <= budget
    assert G.cached_bytes + G.tape.workspace_bytes(1) == max(taken)


def test_chunks_of_a_stream_are_no_larger_than_its_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """However much larger the budget: what measures a chunk holds its inputs."""
    most = []

    def counted(self: Plan, X: Any, *state: Any) -> list[Tensor]:
        most.append(len(X))
        return inputs(self, X, *state)

    inputs = Plan._inputs
    monkeypatch.setattr(Plan, "_inputs", counted)
    G = ie.GGN(wide(), nn.CrossEntropyLoss(), load(Loader((10,) * 10 + (1,)), "test", memory_budget=2000), memory_budget=BUDGET)
    assert G.tape.chunk == max(most) == 10


@pytest.mark.parametrize("budget", [float("nan"), float("inf"), True, "1e6"])
def test_what_is_no_number_of_bytes_is_refused(budget: Any) -> None:
    with pytest.raises(errors.ArgumentError, match="expected memory_budget to be None or a finite number of bytes of at least 0, got"):
        ie.GGN(wide(), nn.CrossEntropyLoss(), (X, Y), memory_budget=budget)


def test_no_examples_have_nothing_to_recompute() -> None:
    tape = Plan.of(wide(), X).linearize(X[:0], memory_budget=1)
    assert tape.outputs.shape == (0, 3)
    assert tape.chunk is None


# Run in a process of its own: its peak resident memory is then that of these products.
PRODUCT = """
import torch
from torch import nn
import influence_ext as ie

torch.set_num_threads(2)
torch.manual_seed(0)
budget = 24 * 2**20
model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 10))

class Loader:
    def __iter__(self):
        generator = torch.Generator().manual_seed(0)
        for _ in range(240):
            yield torch.randn(512, 64, generator=generator), torch.randint(10, (512,), generator=generator)

def resident(kind):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(kind))

X, y = torch.randn(600, 64), torch.randint(10, (600,))
v = torch.randn(1, sum(p.numel() for p in model.parameters()))
ie.GGN(model, nn.CrossEntropyLoss(), (X, y)).matmat(v)  # threads, code pages, torch.export
with open("/proc/self/clear_refs", "w") as control:
    control.write("5")
before = resident("VmRSS")
G = ie.GGN(model, nn.CrossEntropyLoss(), Loader(), memory_budget=budget)
G.matmat(v)
outputs = 3 * G.num_examples * 10 * 4 + G.num_examples * 8  # outputs, their check, the loss Hessian's state; targets
needed = G.num_examples * (256 * 4 + 64) * 4  # what a resident tape would hold
print(resident("VmHWM") - before, budget, outputs, needed)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_ten_times_more_data_than_the_budget_holds() -> None:
    run = subprocess.run([sys.executable, "-c", PRODUCT], capture_output=True, text=True, check=True)
    peak, budget, outputs, needed = map(int, run.stdout.split())
    assert needed > 10 * budget
    assert peak <= budget + outputs + 12 * 2**20  # a batch, the allocator's and the runtime's own
