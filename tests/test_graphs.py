"""Recorded products and steps of CG on the emulated device, whose recordings hold launches with their arguments and run them at a replay.

While it records, nothing runs, a copy from or to the host is an error, and memory belongs to the recording; a replay starts with NaN in
that memory, and freed memory holds NaN, so a pointer that means something else by then shows.
"""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import influence_ext as ie
import influence_ext._C as _C
from influence_ext import graphs
from influence_ext.errors import ArgumentError
from influence_ext.plan import Plan
from influence_ext.solvers import CG
from influence_ext.testing import assert_close
from tests.cases import NetworkCase, build
from tests.cases.families import FAMILIES
from tests.emulation import emulated_device

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _on_the_device() -> Iterator[None]:
    with emulated_device():
        yield


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Launches of each replay, as they happen; torch's and other launches are not among them."""
    counts: list[int] = []

    class Counting(_C.Graph):  # type: ignore[misc]
        def replay(self, times: int = 1) -> None:
            super().replay(times)
            counts.extend([self.num_launches] * times)

    monkeypatch.setattr(_C, "Graph", Counting)
    return counts


def problem(seed: int = 0, N: int = 12) -> tuple[nn.Module, Any, tuple[Tensor, Tensor]]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    return model, nn.CrossEntropyLoss(), (torch.randn(N, 4, dtype=torch.float64), torch.randint(3, (N,)))


def vectors(operator: Any, V: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(V, operator.num_parameters, dtype=operator.dtype, generator=generator)


KINDS = {"GGN": ie.GGN, "Hessian": ie.Hessian, "EmpiricalFisher": ie.EmpiricalFisher, "MonteCarloFisher": ie.MonteCarloFisher}


@pytest.mark.parametrize("kind", KINDS)
def test_replays_follow_the_vectors(kind: str, replays: list[int]) -> None:
    """The third product is a replay as is every later one, for each number of vectors, in turns, with any damping."""
    model, loss, data = problem()
    G = KINDS[kind](model, loss, data, damping=0.1, graphs="always")
    plain = KINDS[kind](model, loss, data, damping=0.1, graphs="never")
    for turn in range(4):
        for V in (1, 3):
            v = vectors(G, V, seed=10 * turn + V)
            before = len(replays)
            assert torch.equal(G.matmat(v), plain.matmat(v))
            assert (len(replays) > before) == (turn > 0)
    v, before = vectors(G, 3, seed=99), len(replays)
    assert torch.equal(G.damped(0.7).matmat(v), plain.damped(0.7).matmat(v))
    assert len(replays) > before, "another damping launches anew"


@pytest.mark.parametrize("case", FAMILIES[::9], ids=lambda case: case.id)
def test_every_family(case: NetworkCase, replays: list[int]) -> None:
    """What a replay gives is what the launches gave, with all that nodes bring to the device."""
    network = build(case, torch.float64)
    generic = any(node.operator is not None for node in Plan.of(network.model, network.X).graph.nodes)
    G = ie.GGN(network.model, network.loss, (network.X, network.y), graphs="auto" if generic else "always")
    plain = ie.GGN(network.model, network.loss, (network.X, network.y), graphs="never")
    for turn in range(3):
        V = network.random(f"V{turn}", 2, network.P)
        assert torch.equal(G.matmat(V), plain.matmat(V))
    assert_close(G.matmat(V), network.ggn_matmat(V), scope=case.scope)
    assert bool(replays) != generic
    assert ("replayed as a graph" in G.report()) != generic


def test_a_subclass_is_solved_with_its_own_products(replays: list[int]) -> None:
    class Doubled(ie.GGN):
        def _undamped(self, V: torch.Tensor) -> torch.Tensor:
            return 2 * super()._undamped(V)

    model, loss, data = problem()
    A, b = Doubled(model, loss, data, damping=0.5, graphs="always"), vectors(ie.GGN(model, loss, data), 2)
    for _ in range(3):
        found = CG(rtol=1e-10).solve(A, b)
    assert float((A.matmat(found.value) - b).norm()) < 1e-9 * float(b.norm())


def test_another_schedule_ends_recordings(replays: list[int]) -> None:
    model, loss, data = problem()
    G = ie.GGN(model, loss, data, graphs="always")
    v = vectors(G, 2)
    chain = [G.matmat(v) for _ in range(3)][-1]
    G.tape.set_schedule("by_operator")
    for _ in range(3):
        assert_close(G.matmat(v), chain)
    assert replays[-1] > replays[0], "a chain is fewer launches than its nodes"


def test_other_parameters_are_read_at_a_replay(replays: list[int]) -> None:
    model, loss, data = problem()
    G = ie.GGN(model, loss, data, graphs="always")
    v = vectors(G, 2)
    old = [G.matmat(v) for _ in range(3)][-1]
    theta = torch.randn(G.num_parameters, dtype=torch.float64)
    G.tape.relinearize(theta)
    G._prepare()
    with torch.no_grad():
        nn.utils.vector_to_parameters(theta, model.parameters())
    new = ie.GGN(model, loss, data, graphs="never").matmat(v)
    for _ in range(3):
        assert torch.equal(G.matmat(v), new)
    assert not torch.allclose(old, new)


def test_a_tape_at_other_parameters_keeps_its_recordings(replays: list[int]) -> None:
    """Jacobian products read nothing but the tape, which stays where it is."""
    model, _, (X, _) = problem()
    tape, plain = Plan.of(model, X).linearize(X), Plan.of(model, X).linearize(X)
    tape.replayed("always")
    v = torch.randn(2, tape.plan.space.num_parameters, dtype=torch.float64)
    for _ in range(3):
        tape.jvp(v)
    theta, before = torch.randn(v.shape[1], dtype=torch.float64), len(replays)
    tape.relinearize(theta)
    plain.relinearize(theta)
    assert torch.equal(tape.jvp(v), plain.jvp(v))
    assert len(replays) == before + 1


def test_other_inputs_end_recordings(replays: list[int]) -> None:
    """Those of the other precisions, too: their memory is one and the same."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    X = torch.randn(12, 4)
    plan = Plan.of(model, X)
    tape = plan.linearize(X)
    tape.replayed("always")
    rounded = tape.at_precision("bfloat16")
    v = torch.randn(2, plan.space.num_parameters)
    for _ in range(3):
        tape.jvp(v), rounded.jvp(v)
    assert len(replays) == 4
    others = torch.randn(12, 4)
    theta = tape.theta
    tape.relinearize(theta, others)
    del X
    gc.collect()
    plain = plan.linearize(others)
    for _ in range(3):
        assert torch.equal(tape.jvp(v), plain.jvp(v))
        assert torch.equal(rounded.jvp(v), plain.at_precision("bfloat16").jvp(v))
    assert len(replays) == 8


def test_operators_in_turns_keep_their_memory_apart(replays: list[int]) -> None:
    """Two operators whose recordings replay one after another, and one that is gone in between."""
    first, second = (ie.GGN(*problem(seed), damping=0.1, graphs="always") for seed in (0, 1))
    plain = [ie.GGN(*problem(seed), damping=0.1, graphs="never") for seed in (0, 1)]
    for turn in range(4):
        v = vectors(first, 2, seed=turn)
        a, b = first.matmat(v), second.matmat(v)
        assert torch.equal(a, plain[0].matmat(v))
        assert torch.equal(b, plain[1].matmat(v))
    del first
    gc.collect()
    junk = [torch.full((5000,), torch.nan) for _ in range(20)]
    assert torch.equal(second.matmat(v), b)
    assert len(junk) == 20
    assert replays


def test_results_are_the_callers_own() -> None:
    G = ie.GGN(*problem(), graphs="always")
    found = [G.matmat(vectors(G, 2, seed)) for seed in range(5)]
    kept = [f.clone() for f in found]
    for f in found[:-1]:
        f.fill_(7)
    assert torch.equal(found[-1], kept[-1])
    assert torch.equal(G.matmat(vectors(G, 2, 0)), kept[0])


def test_under_inference_mode_and_outside() -> None:
    G = ie.GGN(*problem(), damping=0.1, graphs="always")
    v = vectors(G, 2)
    expected = G.matmat(v)
    for inside in (True, True, False, True, False):
        with torch.inference_mode(inside):
            assert torch.equal(G.matmat(v.clone()), expected)


def test_recordings_are_bounded() -> None:
    G = ie.GGN(*problem(), graphs="always")
    plain = ie.GGN(*problem(), graphs="never")
    for _ in range(2):
        for V in range(1, graphs.LIMIT + 5):
            for _ in range(2):
                v = vectors(G, V)
                assert torch.equal(G.matmat(v), plain.matmat(v))
    recordings = G.tape._native.recordings
    assert len(recordings._kept) == graphs.LIMIT
    assert len(recordings.num_launches()) <= graphs.LIMIT


@pytest.mark.parametrize("preconditioner", [None, "jacobi"])
@pytest.mark.parametrize("kind", ["GGN", "Hessian"])
def test_steps_of_cg_are_replayed(kind: str, preconditioner: Any, replays: list[int]) -> None:
    """Solutions, statuses, steps and products are those of ordinary launches, to the last digit; columns that end go their way."""
    model, loss, data = problem()
    model[2].weight.data *= 0.1  # next to no curvature beside the Gauss-Newton part: definite with damping
    options = {"damping": 1.0 if kind == "Hessian" else 2**-6}  # a power of two: the product with it rounds nothing, in one pass or in two
    G, plain = (KINDS[kind](model, loss, data, **options, graphs=mode) for mode in ("always", "never"))
    B = vectors(G, 5)
    B[2] = 0
    B[3] *= 1e-3
    for check_every in (1, 4, 8):
        solver = CG(rtol=1e-9, preconditioner=preconditioner, check_every=check_every, reorthogonalise=0)
        for scale in (1.0, -2.0):
            before = len(replays)
            found, expected = solver.solve(G, scale * B), solver.solve(plain, scale * B)
            assert torch.equal(found.value, expected.value)
            assert found.status == expected.status
            assert found.num_products == expected.num_products
            assert found.stats == expected.stats
            assert len(replays) > before
    stiffer = [solver.solve(operator.damped(4.0), B).value for operator in (G, plain)]
    assert torch.equal(*stiffer), "steps with another damping"
    residual = plain.matmat(found.value) + 2 * B
    assert float(residual.norm() / B.norm()) < 1e-8


def test_a_whole_step_is_one_replay(replays: list[int]) -> None:
    """In a second solve of the same size, every step is a replay: direction, product, damping, inner products, update, judgement."""
    G = ie.GGN(*problem(), damping=1e-2, graphs="always")
    b = vectors(G, 1)
    solver = CG(rtol=1e-8, check_every=8, reorthogonalise=0)
    solver.solve(G, b)
    product = G.matmat(b), G.matmat(b)
    assert torch.equal(*product)
    launches = replays[-1]
    replays.clear()
    solution = solver.solve(G, b)
    steps = -(-solution.stats["iterations"][0] // 8) * 8
    assert replays.count(launches + 5) == steps
    assert len(replays) == steps + 1  # the product that verifies


def test_solves_in_threads() -> None:
    """Each has the recordings that it replays to itself."""
    G = ie.GGN(*problem(), damping=2**-6, graphs="always")
    plain = ie.GGN(*problem(), damping=2**-6, graphs="never")
    Bs = [vectors(G, 2, seed) for seed in range(6)]
    solver = CG(rtol=1e-9, check_every=4, reorthogonalise=0)
    expected = [(solver.solve(plain, B).value, plain.matmat(B)) for B in Bs]
    found: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def work(which: int) -> None:
        found[which] = [(solver.solve(G, Bs[which]).value, G.matmat(Bs[which])) for _ in range(4)]

    threads = [threading.Thread(target=work, args=(which,)) for which in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for which, results in found.items():
        assert len(results) == 4
        for solution, product in results:
            assert torch.equal(solution, expected[which][0])
            assert torch.equal(product, expected[which][1])
    assert len(found) == 6


def test_lists_come_to_the_device_before_a_recording() -> None:
    """A first use, which uploads, cannot be recorded; a second can."""
    pooled = nn.Sequential(nn.Linear(4, 4), nn.Unflatten(1, (1, 4)), nn.AdaptiveAvgPool1d(3), nn.Flatten(), nn.Linear(3, 2)).double()
    rolled = nn.Sequential(nn.Linear(4, 4), Rolled(), nn.Linear(4, 2)).double()
    X = torch.randn(3, 4, dtype=torch.float64)
    for network in (pooled, rolled):
        tape = Plan.of(network, X).linearize(X)
        tape.replayed("always")
        v = torch.randn(2, tape.plan.space.num_parameters, dtype=torch.float64)
        g = torch.randn(2, 3, 2, dtype=torch.float64)
        first = tape.jvp(v), tape.vjp(g)
        for _ in range(2):
            assert torch.equal(tape.jvp(v), first[0])
            assert torch.equal(tape.vjp(g), first[1])
    fresh = Plan.of(nn.Sequential(nn.Linear(4, 4), Rolled(), nn.Linear(4, 2)).double(), X).linearize(X)
    with pytest.raises(RuntimeError, match="got a copy from the host"):
        _C.Graph(CPU, lambda: fresh.vjp(g))


class Rolled(nn.Module):
    """A gather, whose transpose needs the inverse of its index."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.roll(x, 1, dims=1)[:, [0, 0, 1, 3]]


class Failing(Exception):
    """Raised in the middle of a recording."""


def test_an_exception_in_a_recording_leaves_the_device_as_it_was() -> None:
    G = ie.GGN(*problem(), graphs="never")
    v = vectors(G, 2)
    expected = G.matmat(v)

    def body() -> None:
        G.matmat(v)
        raise Failing

    with pytest.raises(Failing):
        _C.Graph(CPU, body)
    assert _C.recordable_stream(CPU) is not None
    assert torch.equal(G.matmat(v), expected)


def test_what_cannot_be_recorded_is_refused_by_the_device() -> None:
    """Reading back and uploading are errors while launches are recorded, and the recording is lost even if somebody swallows them."""
    model = nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(6, 2)).double()
    X = torch.randint(5, (4, 2))
    plan = Plan.of(model, X)
    tape = plan.linearize(X)

    def body() -> None:
        with pytest.raises(RuntimeError, match="expected launches alone while they are recorded, got a copy to the host"):
            tape.relinearize(tape.theta)  # checks the indices

    with pytest.raises(RuntimeError, match="that nothing has broken"):
        _C.Graph(CPU, body)
    tape.relinearize(tape.theta)


@pytest.mark.parametrize("error", [RuntimeError("operation not permitted"), MemoryError("no memory")])
def test_a_refused_recording_is_a_warning_and_ordinary_launches(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*args: Any) -> Any:
        raise error

    G = ie.GGN(*problem(), damping=1e-2)
    strict = ie.GGN(*problem(), damping=1e-2, graphs="always")
    v = vectors(G, 2)
    expected, _ = G.matmat(v), strict.matmat(v)
    monkeypatch.setattr(_C, "Graph", refuse)
    with caplog.at_level(logging.WARNING, "influence_ext"):
        for _ in range(3):
            assert torch.equal(G.matmat(v), expected)
            assert CG(rtol=1e-8).solve(G, v).success
    assert [record.getMessage() for record in caplog.records] == [
        f"products are launched one kernel at a time, since they could not be recorded as a graph: {error}"
    ]
    assert "launched kernel by kernel" in G.report()
    with pytest.raises(type(error), match=str(error)):
        strict.matmat(v)


def test_inside_somebody_elses_recording(replays: list[int]) -> None:
    """A product is recorded along as launches, not as a replay, and follows its operand and the parameters."""
    G = ie.GGN(*problem(), graphs="always")
    plain = ie.GGN(*problem(), graphs="never")
    v = vectors(G, 2)
    for _ in range(3):
        G.matmat(v)
    results = []
    outer = _C.Graph(CPU, lambda: results.append(G.matmat(v)))
    before = len(replays)
    v.copy_(vectors(G, 2, seed=5))
    outer.replay()
    assert torch.equal(results[0], plain.matmat(v))
    assert len(replays) == before + 1


def test_auto_replays_small_products_only(replays: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model, loss, data = problem()
    chain = ie.GGN(model, loss, data)
    assert "V = 1: by example" in chain.report()
    assert "launched kernel by kernel" in chain.report(), "one launch is not worth a replay"
    G = ie.GGN(model, loss, data, schedule="by_operator")
    v = vectors(G, 1)
    assert "V = 1: by operator" in G.report()
    assert "replayed as a graph from the second call on" in G.report()
    for _ in range(2):
        G.matmat(v)
    assert len(replays) == 1
    assert f"replayed as a graph of {replays[0]} launches" in G.report()
    monkeypatch.setattr(graphs, "OPERATIONS_A_SECOND", 1e6)
    for _ in range(3):
        G.matmat(v)
    assert len(replays) == 1
    assert "launched kernel by kernel" in G.report()
    budgeted = ie.GGN(model, loss, data, memory_budget=2**30)
    for _ in range(3):
        budgeted.matmat(v)
    assert len(replays) == 1
    assert "kernel by kernel" not in budgeted.report()
    assert "graph" not in budgeted.report().split("\n")[-1]


class Exponential(nn.Module):
    """An operator without a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4).double()

    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.matrix_exp(self.inner(x).unflatten(1, (2, 2))).flatten(1)[:, :3]


def test_bad_arguments() -> None:
    model, loss, data = problem()
    with pytest.raises(ArgumentError, match="GGN: expected graphs among auto, always, never, got 'yes'; choose one"):
        ie.GGN(model, loss, data, graphs="yes")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="got a forward state that a memory budget has recomputed"):
        ie.GGN(model, loss, problem(N=400)[2], graphs="always", memory_budget=20_000)
    with pytest.raises(ArgumentError, match=r"got nodes that run in torch \(.*\); use graphs=\"auto\""):
        ie.GGN(Exponential(), loss, data, graphs="always")
    _C.emulate_device(None)
    with pytest.raises(ArgumentError, match="got tensors on cpu, where nothing is launched"):
        ie.GGN(model, loss, data, graphs="always")
    assert "graph" not in ie.GGN(model, loss, data).report().split("\n")[-1]
