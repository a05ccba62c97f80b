"""What a fork or a signal may come across: locks that are held, a tape that moves, shortcuts that are being made."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import influence_ext as ie
from influence_ext import context
from influence_ext.adapters.backpack import extend
from influence_ext.adapters.curvlinops import GGNLinearOperator
from influence_ext.adapters.opacus import GradSampleModule
from influence_ext.capture.generic import Operator
from influence_ext.errors import ArgumentError
from influence_ext.operators import LinearOperator
from influence_ext.plan import Plan
from influence_ext.tape import Tape
from tests.cases import budget_of


class Bessel(nn.Module):
    """Runs in torch, node by node: where a test can step in."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.special.i0e(x)


class Softened(nn.Module):
    """Makes a weight an expression of a parameter."""

    def forward(self, w: Tensor) -> Tensor:
        return w.sinh()


FORKING = """
import faulthandler, os, queue, signal, threading, time, torch
from torch import nn
import influence_ext as ie
from influence_ext import context
faulthandler.dump_traceback_later(300, exit=True)  # a wait in vain is longer
context.FORK_WAITS_SECONDS = 600.0
torch.set_num_threads(1)
torch.manual_seed(0)
model, batches = nn.Linear(4, 2), [(torch.randn(256, 4), torch.randn(256, 2)) for _ in range(3)]

class Loader:
    # reads in a thread of its own, which has a process made for each batch
    def __len__(self):
        return len(batches)

    def __iter__(self):
        read = queue.Queue()
        def reads():
            for batch in batches:
                pid = os.fork()
                if pid == 0:
                    os._exit(0)
                os.waitpid(pid, 0)
                read.put(batch)
        threading.Thread(target=reads).start()
        for _ in batches:
            yield read.get()

streamed = ie.GGN(model, nn.MSELoss(), Loader(), 0.1, memory_budget=12000)
assert streamed.tape.chunk is not None
v = torch.randn(streamed.shape[0])
whole = ie.GGN(model, nn.MSELoss(), tuple(torch.cat(x) for x in zip(*batches)), 0.1)
assert torch.allclose(streamed @ v, whole @ v, rtol=1e-4)

# a thread that holds the lock and waits for the thread that forks: the fork goes on, and the child has all locks free
context.FORK_WAITS_SECONDS = 0.2
inside, forked = threading.Event(), threading.Event()
def waits():
    with context.exclusive, context.unforkable:
        inside.set()
        forked.wait()
other = threading.Thread(target=waits)
other.start()
inside.wait()
def acquired(lock):
    # by a thread that holds nothing
    taken = []
    def tries():
        taken.append(lock.acquire(blocking=False))
        if taken[0]:
            lock.release()
    thread = threading.Thread(target=tries)
    thread.start()
    thread.join()
    return taken[0]
pid = os.fork()
if pid == 0:
    free = acquired(context.exclusive) and acquired(context.unforkable)
    os._exit(0 if free else 1)
assert not acquired(context.exclusive) and not acquired(context.unforkable)  # the parent's thread still holds them
forked.set()
other.join()
assert os.waitpid(pid, 0)[1] == 0

# a thread that forks with the locks held has them in both processes, until it gives them back
with context.exclusive, context.unforkable:
    pid = os.fork()
    held = not acquired(context.exclusive) and not acquired(context.unforkable)
free = acquired(context.exclusive) and acquired(context.unforkable)
if pid == 0:
    os._exit(0 if held and free else 1)
assert held and free and os.waitpid(pid, 0)[1] == 0

# a signal whose handler raises does not end the wait
signal.signal(signal.SIGINT, signal.default_int_handler)
context.FORK_WAITS_SECONDS = 600.0
parent, lock = os.getpid(), context.unforkable
inside, asked, let_go = threading.Event(), threading.Event(), []
class Told:
    # the lock, with a word when somebody is about to wait for it
    def __getattr__(self, name):
        return getattr(lock, name)
    def acquire(self, **options):
        asked.set()
        return lock.acquire(**options)
context.unforkable = Told()
def signals():
    with context.exclusive, lock:
        inside.set()
        asked.wait()
        asked.clear()
        os.kill(parent, signal.SIGINT)
        asked.wait()  # again, after the signal
        let_go.append(time.monotonic())
other = threading.Thread(target=signals)
other.start()
inside.wait()
reading, writing = os.pipe()
if os.fork() == 0:
    os.write(writing, str(time.monotonic()).encode())
    os._exit(0)
other.join()
assert os.wait()[1] == 0
assert let_go[0] < float(os.read(reading, 100))
print("right")
os._exit(0)
"""


def test_a_fork_never_waits_for_who_waits_for_it() -> None:
    run = subprocess.run([sys.executable, "-u", "-c", FORKING], capture_output=True, text=True, timeout=600, check=False)
    assert run.stdout.strip() == "right", run.stderr
    assert "KeyboardInterrupt" in run.stderr  # told, once


TRAINED = """
X, y = torch.randn(2000, 300), torch.arange(2000) % 3
def build():
    return nn.Sequential(nn.Linear(300, 300), nn.Tanh(), nn.Linear(300, 3))
recipe = ie.Recipe(build, nn.CrossEntropyLoss(), epochs=1, batch_size=1000)
def result():
    return ie.train(recipe, (X, y)).params
"""
MORE_THREADS = """
torch.set_num_threads(1)
X, y = torch.randn(500, 30), torch.arange(500) % 3
G = ie.GGN(nn.Sequential(nn.Linear(30, 30), nn.Tanh(), nn.Linear(30, 3)), nn.CrossEntropyLoss(), (X, y), 0.1)
v = torch.randn(G.shape[0])
torch.set_num_threads(2)
def result():
    return G @ v
"""
IN_A_CHILD = """
expected = result()
pid = os.fork()
if pid == 0:
    signal.alarm(300)
    os._exit(0 if torch.allclose(result(), expected, rtol=1e-4, atol=1e-6) else 1)
assert os.waitpid(pid, 0)[1] == 0
assert torch.get_num_threads() == 2
print("right")
"""


@pytest.mark.parametrize("computes", [TRAINED, MORE_THREADS], ids=["training alone", "more threads than at first"])
def test_a_child_computes_what_its_parent_did(computes: str) -> None:
    begin = "import os, signal, torch\nfrom torch import nn\nimport influence_ext as ie\ntorch.set_num_threads(2)\ntorch.manual_seed(0)"
    run = subprocess.run([sys.executable, "-c", begin + computes + IN_A_CHILD], capture_output=True, text=True, timeout=600, check=False)
    assert run.stdout.strip() == "right", run.stderr


class Dense(LinearOperator):
    """A matrix of the user's own."""

    def __init__(self, A: Tensor):
        self.A, self.num_parameters, self.dtype, self.device = A, len(A), A.dtype, A.device

    def _matmat(self, V: Tensor) -> Tensor:
        return V @ self.A.T


def _entries() -> dict[str, Callable[[], object]]:
    torch.manual_seed(0)
    model, loss, data = nn.Linear(4, 2), nn.MSELoss(), (torch.randn(9, 4), torch.randn(9, 2))
    dense, B, V = Dense(torch.eye(10)), torch.randn(2, 10), torch.randn(3, 10)
    recipe = ie.Recipe(lambda: nn.Linear(4, 2), loss, epochs=1)
    run = ie.train(recipe, data)
    return {
        "build_info": ie.build_info,
        "operator": lambda: ie.GGN(model, loss, data),
        "product": lambda: dense @ B.T,
        "eigenvalue": lambda: ie.solvers.top_eigenvalue(dense),
        "jvp": lambda: ie.jvp(model, data[0], V),
        "per_example": lambda: ie.per_example_dots(model, loss, data, V),
        "direct": lambda: ie.solvers.Direct().solve(dense, B),
        "factorise": lambda: ie.solvers.Direct().factorise(dense),
        "cg": lambda: ie.solvers.CG().solve(dense, B),
        "nystrom": lambda: ie.solvers.Nystrom(2).factorise(dense),
        "train": lambda: ie.train(recipe, data),
        "retrain": lambda: ie.retrain(run, [1], "warm"),
        "retrain_many": lambda: ie.retrain_many(run, [[1]], "warm"),
        "influence": lambda: ie.Influence(model, loss, data, damping=0.1),
        "opacus": lambda: GradSampleModule(nn.Linear(4, 2))(data[0]),
        "opacus of no examples": lambda: GradSampleModule(nn.Linear(4, 2))(data[0][:0]),
        "backpack": lambda: extend(nn.Linear(4, 2))(data[0]),
        "curvlinops": lambda: GGNLinearOperator(model, loss, dict(model.named_parameters()), [data]),
    }


def test_every_entry_is_noted_for_forks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, call in _entries().items():
        monkeypatch.setattr(context, "_has_computed", False)
        call()
        assert context._has_computed, name


@pytest.mark.parametrize("chunked", [False, True], ids=["resident", "chunked"])
def test_a_tape_whose_move_is_interrupted_does_not_answer(monkeypatch: pytest.MonkeyPatch, chunked: bool) -> None:
    torch.manual_seed(0)
    first = parametrize.register_parametrization(nn.Linear(4, 5), "weight", Softened())
    X, G = torch.randn(9, 4), torch.randn(9, 3)
    plan = Plan.of(nn.Sequential(first, nn.Tanh(), nn.Linear(5, 6), Bessel(), nn.Linear(6, 3)), X)
    budget = budget_of(4, lambda budget: plan.linearize(X, second_order=True, memory_budget=budget)) if chunked else None
    tape = plan.linearize(X, second_order=True, memory_budget=budget)
    assert tape.chunk == (4 if chunked else None)
    copy, there = tape.at_precision("bfloat16"), tape.theta * 1.5
    V = torch.randn(3, len(there))
    tape.keep_cotangents(G)

    before = tape.vjp(G[None])

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Operator, "forward", interrupted)  # of the derived weight, before anything has moved
        with pytest.raises(KeyboardInterrupt):
            tape.relinearize(there)
        patched.undo()
        assert torch.equal(tape.vjp(G[None]), before)
        forwards = [Operator.forward, interrupted]
        patched.setattr(Operator, "forward", lambda *arguments: forwards.pop(0)(*arguments))
        with pytest.raises(KeyboardInterrupt):
            tape.relinearize(there)
    asked: list[Callable[[Tape], object]] = [
        lambda t: t.outputs,
        lambda t: t.jvp(V),
        lambda t: t.vjp(G[None]),
        lambda t: t.hvp(V, None),
        lambda t: t.factors(G[None]),
        lambda t: t.keep_cotangents(G),
    ]
    for ask in asked:
        for moved in (tape, copy):
            with pytest.raises(ArgumentError, match=r"stands at a point, got .* did not end; relinearize it\.$"):
                ask(moved)
    tape.relinearize(there)
    expected = plan.linearize(X, there, second_order=True)
    assert torch.equal(tape.outputs, expected.outputs)
    assert torch.allclose(tape.vjp(G[None]), expected.vjp(G[None]), rtol=1e-4, atol=1e-6)

    tape.keep_cotangents(G)
    if not chunked:  # in chunks, cotangents are pulled back in every product
        with monkeypatch.context() as patched:
            patched.setattr(Operator, "vjp", interrupted)
            with pytest.raises(KeyboardInterrupt):
                tape.keep_cotangents(2 * G)
        with pytest.raises(ArgumentError, match="call keep_cotangents first"):
            tape.hvp(V, None)
    for kept in (tape, expected):
        kept.keep_cotangents(2 * G)
    assert torch.allclose(tape.hvp(V, None), expected.hvp(V, None), rtol=1e-4, atol=1e-6)


REENTERED = """
import faulthandler, signal, torch
from torch import nn
import influence_ext as ie
from influence_ext.capture.generic import Operator
faulthandler.dump_traceback_later(300, exit=True)
torch.manual_seed(0)
class Bessel(nn.Module):
    def forward(self, x):
        return torch.special.i0e(x)
model = nn.Sequential(nn.Linear(8, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 2), Bessel()).double()
X, y = torch.randn(50, 8, dtype=torch.float64), torch.randn(50, 2, dtype=torch.float64)
def made():
    G = ie.GGN(model, nn.MSELoss(), (X, y), 0.1)
    assert G.tape.schedule(8).startswith("with shortcuts")
    return G
G = made()
V = torch.randn(8, G.shape[0], dtype=torch.float64)
expected, vjp, heard = made().matmat(V), Operator.vjp, []
def handler(number, frame):
    signal.signal(number, signal.SIG_DFL)
    heard.append(G.matmat(V))
signal.signal(signal.SIGUSR1, handler)
def with_signal(*arguments):
    Operator.vjp = vjp
    before = G.tape.cached_bytes
    signal.raise_signal(signal.SIGUSR1)
    assert heard and G.tape.cached_bytes > before  # it has come while the Jacobians of the shortcuts were made
    return vjp(*arguments)
Operator.vjp = with_signal
found = G.matmat(V)
assert torch.equal(found, heard[0]) and torch.allclose(found, expected, rtol=1e-12, atol=0) and torch.equal(G.matmat(V), found)
print("right")
"""


def test_a_signal_handler_computes_with_the_operator_it_interrupts() -> None:
    run = subprocess.run([sys.executable, "-c", REENTERED], capture_output=True, text=True, timeout=600, check=False)
    assert run.stdout.strip() == "right", run.stderr
