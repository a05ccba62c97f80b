"""The operators as guests: of SciPy and torch.lobpcg, of the caller's contexts, of threads and of forked processes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from scipy.sparse import linalg as sparse
from torch import Tensor, nn
from torch.nn.utils import parametrize

import influence_ext as ie
from influence_ext.capture import clear_cache
from influence_ext.operators.base import rows_of
from influence_ext.testing import assert_close

F64 = torch.float64
CURVATURES = (ie.GGN, ie.Hessian, ie.EmpiricalFisher)
curvatures = pytest.mark.parametrize("curvature", CURVATURES)


class Bessel(nn.Module):
    """Has no native rule."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.special.i0e(x)


class Softened(nn.Module):
    """Makes a weight an expression of a parameter."""

    def forward(self, w: Tensor) -> Tensor:
        return w.sinh()


def network(dtype: torch.dtype = F64) -> nn.Module:
    """Native nodes, a generic one, and a derived parameter."""
    torch.manual_seed(0)
    first = parametrize.register_parametrization(nn.Linear(4, 5), "weight", Softened())
    return nn.Sequential(first, nn.Tanh(), nn.Linear(5, 6), Bessel(), nn.Linear(6, 3)).to(dtype)


def data(dtype: torch.dtype = F64, num_examples: int = 9) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(num_examples, 4, generator=generator).to(dtype), torch.randint(3, (num_examples,), generator=generator)


def operator(curvature: Any = ie.GGN, dtype: torch.dtype = F64, **options: Any) -> Any:
    return curvature(network(dtype), nn.CrossEntropyLoss(), data(dtype), 0.5, **options)


def vectors(operator: Any, count: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(count, operator.shape[0], generator=generator, dtype=F64).to(operator.dtype)


@pytest.mark.parametrize("count", [0, 1, 3, 40])
def test_columns_become_rows_bit_for_bit(count: int) -> None:
    generator = torch.Generator().manual_seed(3)
    blocks = [torch.randn(size, count, generator=generator) for size in (7, 1, 200_001)]  # the last in several pieces
    blocks[0] = torch.randn(count, 7, generator=generator).T.requires_grad_()
    rows = rows_of(blocks)
    assert rows.is_contiguous()
    assert not rows.requires_grad
    assert torch.equal(rows, torch.cat(blocks).T)
    assert rows_of([blocks[0], blocks[1].double()]).dtype == F64


# SciPy and torch.lobpcg


def test_scipy_solves_and_finds_eigenvalues() -> None:
    G = operator()
    D, b, A = G.to_dense(), vectors(G)[0].numpy(), G.to_scipy()
    assert A.dtype == np.float64
    for solver in (sparse.cg, sparse.minres):
        x, info = solver(A, b, rtol=1e-12)
        assert info == 0
        assert np.linalg.norm(D.numpy() @ x - b) < 1e-9 * np.linalg.norm(b)
    expected = torch.linalg.eigvalsh(D)
    found = sparse.eigsh(A, k=3, which="LA", return_eigenvectors=False)
    assert_close(torch.as_tensor(np.sort(found)), expected[-3:])
    start = np.random.default_rng(0).standard_normal((len(D), 3))
    values, _ = sparse.lobpcg(A, start, tol=1e-9, maxiter=500)
    assert np.allclose(np.sort(values), expected[-3:].numpy(), rtol=1e-7)
    assert np.allclose((A.T @ start), D.numpy() @ start)
    assert np.allclose(sparse.svds(A, k=2, return_singular_vectors=False), expected[-2:].numpy())
    assert operator(dtype=torch.float32).to_scipy().dtype == np.float32


@pytest.mark.parametrize(("method", "k"), [("ortho", 3), ("basic", 1)])  # the basic method is not for repeated eigenvalues
def test_torch_lobpcg_takes_the_operator(method: str, k: int) -> None:
    G = operator()
    D = G.to_dense()
    torch.manual_seed(0)
    values, columns = torch.lobpcg(G, k=k, method=method, tol=1e-10, niter=500)
    assert torch.allclose(values, torch.linalg.eigvalsh(D).flip(0)[:k], rtol=1e-8)
    assert float((D @ columns - columns * values).norm()) < 1e-6
    preconditioned, _ = torch.lobpcg(A=G, k=1, iK=torch.diag(1 / D.diagonal()), largest=True, niter=500)
    assert torch.allclose(preconditioned, values[:1], rtol=1e-6)


def test_torch_multiplies_with_the_operator() -> None:
    G = operator()
    V = vectors(G).T.contiguous()
    assert torch.equal(torch.matmul(G, V), G @ V)
    assert torch.equal(torch.mv(G, V[:, 0]), G @ V[:, 0])
    for refused in (lambda: torch.add(G, V), lambda: V.T @ G, lambda: torch.linalg.eigh(G)):
        with pytest.raises(TypeError):
            refused()


# The caller's contexts

CONTEXTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": partial(torch.autocast, "cpu", dtype=torch.bfloat16),
    "default_dtype": lambda: _default_dtype(torch.float64),
}


class _default_dtype:
    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype

    def __enter__(self) -> None:
        self.before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)

    def __exit__(self, *_: object) -> None:
        torch.set_default_dtype(self.before)


@pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS)
@curvatures
def test_products_do_not_depend_on_the_context(curvature: Any, context: Callable[[], AbstractContextManager[Any]]) -> None:
    """In float32, which autocast would change."""
    outside = operator(curvature, torch.float32)
    V = vectors(outside)
    expected = outside.matmat(V)
    model, examples = network(torch.float32), data(torch.float32)
    with context():
        assert torch.equal(outside.matmat(V), expected)
        clear_cache()
        inside = curvature(model, nn.CrossEntropyLoss(), examples, 0.5)
        assert_close(inside.matmat(V), expected.double(), eager=expected)
        columns = inside @ V.T
        solved = ie.solvers.Direct().solve(inside, V).value if curvature is ie.GGN else None
    assert columns.dtype == torch.float32
    assert_close(inside.matmat(V), expected.double(), eager=expected)
    if solved is not None:
        assert float((inside.matmat(solved) - V).norm() / V.norm()) < 1e-4
        assert_close(inside.diagonal(), outside.diagonal().double(), eager=outside.diagonal())


@pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS)
def test_functions_do_not_depend_on_the_context(context: Callable[[], AbstractContextManager[Any]]) -> None:
    model, (X, y), loss = network(torch.float32), data(torch.float32), nn.CrossEntropyLoss()
    V = vectors(operator(dtype=torch.float32))
    generator = torch.Generator().manual_seed(3)
    cotangents = torch.randn(9, 3, generator=generator)
    calls: list[Callable[[], Tensor]] = [
        lambda: ie.jvp(model, X, V),
        lambda: ie.vjp(model, X, cotangents),
        lambda: ie.per_example_dots(model, loss, (X, y), V),
        lambda: ie.per_example_norms(model, loss, (X, y)),
        lambda: ie.grad_gram(model, loss, (X, y)),
        lambda: torch.cat([g.flatten(1) for g in ie.per_example_grads(model, loss, (X, y)).values()], 1),
        lambda: ie.Influence(model, loss, (X, y), damping=0.5, solver=ie.solvers.Dual()).scores((X, y)).values,
    ]
    for call in calls:
        expected = call()
        with context():
            found = call()
        assert_close(found, expected.double(), eager=expected)


@curvatures
def test_a_compiled_caller_breaks_its_graph(curvature: Any) -> None:
    A = operator(curvature)
    V = vectors(A)

    def caller(v: Tensor) -> Tensor:
        return (A @ (2 * v)).sin() + 1

    torch._dynamo.reset()
    compiled = torch.compile(caller, backend="eager")
    for v in V:
        assert_close(compiled(v), caller(v))


@pytest.mark.slow
def test_a_compiled_caller_of_everything_else() -> None:
    model, (X, y), loss = network(), data(), nn.CrossEntropyLoss()

    def caller(v: Tensor) -> tuple[Tensor, ...]:
        G = ie.GGN(model, loss, (X, y), 0.5)
        return (
            ie.jvp(model, X, 2 * v).exp(),
            ie.solvers.CG(rtol=1e-10).solve(G, v).value + 1,
            ie.per_example_dots(model, loss, (X, y), v[None]) - 1,
        )

    v = vectors(operator())[0]
    torch._dynamo.reset()
    for found, expected in zip(torch.compile(caller, backend="eager")(v), caller(v), strict=True):
        assert_close(found, expected)


# Threads and processes


@curvatures
@pytest.mark.parametrize("options", [{}, {"memory_budget": 20_000}], ids=["resident", "chunked"])
def test_threads_share_an_operator(curvature: Any, options: dict[str, Any]) -> None:
    A = operator(curvature, **options)
    V = vectors(A, 24)
    expected = A.matmat(V)
    flags = torch.backends.mkldnn.enabled, torch.backends.cuda.math_sdp_enabled(), torch.backends.cuda.flash_sdp_enabled()
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            found = torch.stack(list(pool.map(A.matvec, V)))
            assert_close(found, expected)
    assert flags == (torch.backends.mkldnn.enabled, torch.backends.cuda.math_sdp_enabled(), torch.backends.cuda.flash_sdp_enabled())


def test_threads_make_their_own_operators() -> None:
    clear_cache()
    expected = {curvature: operator(curvature) for curvature in CURVATURES}
    V = vectors(expected[ie.GGN])
    clear_cache()

    def product(curvature: Any) -> Tensor:
        return operator_of(curvature).matmat(V)

    models = {curvature: network() for curvature in CURVATURES}  # built here: the seed is the process's

    def operator_of(curvature: Any) -> Any:
        return curvature(models[curvature], nn.CrossEntropyLoss(), data(), 0.5)

    with ThreadPoolExecutor(4) as pool:
        kinds = CURVATURES * 4
        for curvature, found in zip(kinds, pool.map(product, kinds), strict=True):
            assert_close(found, expected[curvature].matmat(V))


FORKED = """
import multiprocessing, os, signal, threading, torch
from torch import nn
import influence_ext as ie
from influence_ext import context
from influence_ext.context import exclusive
context.FORK_WAITS_SECONDS = 300.0  # a capture may take long on a busy machine, and no fork here waits in vain
torch.set_num_threads(2)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 2))
X, y = torch.randn(1000, 8), torch.randint(2, (1000,))
G = ie.GGN(model, nn.CrossEntropyLoss(), (X, y), 0.1)
v = torch.randn(G.shape[0])
expected = G @ v  # on two threads
def right(_=None):
    found = G @ v
    again = ie.GGN(model, nn.CrossEntropyLoss(), (X, y), 0.1) @ v
    large = (torch.ones(2000, 2000) * 2).sum()  # torch's own threads
    close = lambda a: bool((a - expected).norm() < 1e-5 * expected.norm())
    return close(found) and close(again) and float(large) == 8e6
pid = os.fork()
if pid == 0:
    os._exit(0 if right() else 1)
assert os.waitpid(pid, 0)[1] == 0
with multiprocessing.get_context("fork").Pool(2) as pool:
    assert all(pool.map(right, range(2)))
assert right() and torch.get_num_threads() == 2

# while another thread has the lock of captures, which the child is without
expected = ie.per_example_grads(model, nn.CrossEntropyLoss(), (X[:5], y[:5]))
inside, stop = threading.Event(), threading.Event()
def captures():
    while not stop.is_set():
        with exclusive:
            inside.set()
            ie.per_example_grads(nn.Linear(8, 2), nn.CrossEntropyLoss(), (X[:5], y[:5]))
busy = threading.Thread(target=captures)
busy.start()
for _ in range(3):
    inside.clear()
    inside.wait()
    pid = os.fork()
    if pid == 0:
        signal.alarm(300)
        found = ie.per_example_grads(model, nn.CrossEntropyLoss(), (X[:5], y[:5]))
        os._exit(0 if all(torch.allclose(found[name], expected[name], atol=1e-6) for name in found) else 1)
    assert os.waitpid(pid, 0)[1] == 0
stop.set()
busy.join()
with exclusive:
    pid = os.fork()
    if pid == 0:
        exclusive.release()  # as often as this thread has taken it
        taken = []
        other = threading.Thread(target=lambda: taken.append(exclusive.acquire(blocking=False)))
        other.start()
        other.join()
        os._exit(0 if taken == [True] else 1)
    assert os.waitpid(pid, 0)[1] == 0

# while another thread is in the middle of an epoch
class Waiting(nn.Linear):
    def forward(self, x):
        if self.training and threading.current_thread() is busy:
            inside.set()
            stop.wait()
        return super().forward(x)
inside.clear()
stop.clear()
recipe = ie.Recipe(lambda: Waiting(8, 2), nn.CrossEntropyLoss(), epochs=1)
expected = ie.train(recipe, (X, y)).params
busy = threading.Thread(target=lambda: ie.train(recipe, (X, y)))
busy.start()
inside.wait()
pid = os.fork()
if pid == 0:
    signal.alarm(300)
    os._exit(0 if torch.allclose(ie.train(recipe, (X, y)).params, expected, atol=1e-6) else 1)
assert os.waitpid(pid, 0)[1] == 0
stop.set()
busy.join()
print("right")
"""


def test_products_after_a_fork() -> None:
    run = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, timeout=600, check=False)
    assert run.stdout.strip() == "right", run.stderr


INTERRUPTED = """
import math, os, signal, threading, time, torch
from torch import nn
import influence_ext as ie
signal.signal(signal.SIGINT, signal.default_int_handler)  # a process that a shell started behind itself ignores it
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2))
wide = nn.Sequential(nn.Linear(8, 8192), nn.ReLU(), nn.Linear(8192, 8))
loss = nn.CrossEntropyLoss()
def data(N):
    return torch.randn(N, 8), torch.randint(2, (N,))
# CPU time of this process throughout: what the machine does beside does not count
def seconds(call):
    taken = []
    for _ in range(3):
        begin = time.process_time()
        call()
        taken.append(time.process_time() - begin)
    return min(taken)
def on_signal(what, spent, midst):
    # a signal after midst seconds of what(), and the seconds from it to the exception
    begin, sent = time.process_time(), []
    def send():
        while time.process_time() - begin < midst:
            time.sleep(0.002)
        sent.append(time.process_time())
        os.kill(os.getpid(), signal.SIGINT)
    sender = threading.Thread(target=send)
    try:
        sender.start()
        what()
    except KeyboardInterrupt:
        spent.append(time.process_time() - sent[0])
    sender.join()
def check(name, call):
    # call(scale): so many times the work of call(1), and its answer; for some seconds, and many times what lies between two looks
    expected, one = call(1), seconds(lambda: call(1))
    scale = max(int(4 / one) + 1, 36)
    before = {n: p.clone() for n, p in model.named_parameters()}
    spent = []
    on_signal(lambda: call(scale), spent, scale * one / 40)
    assert spent and spent[0] < scale * one / 4, (name, spent, scale, one)
    assert torch.equal(call(1), expected), name
    assert model.training
    for n, p in model.named_parameters():
        assert torch.equal(p, before[n]) and p.grad is None
for schedule, threads in (("by_example", 1), ("by_example", 2), ("by_operator", 1)):
    torch.set_num_threads(threads)
    G = ie.GGN(model, loss, data(16000), 0.1, schedule=schedule)
    v = torch.randn(8, G.shape[0])
    check((schedule, threads), lambda scale: G.matmat(v.repeat(scale, 1)))
torch.set_num_threads(1)
X, y = data(500)
check("gram", lambda scale: ie.grad_gram(wide, loss, (X.repeat(k := math.isqrt(scale), 1), y.repeat(k))))
for name, conv, size in (("rows", nn.Conv2d(16, 32, 5), 8), ("pairs", nn.Conv2d(16, 64, 5, padding=2), 2)):
    shared = nn.Sequential(conv, nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(conv.out_channels, 2))
    planes = torch.randn(500, 16, size, size)
    check(name, lambda scale: ie.grad_gram(shared, loss, (planes.repeat(k := math.isqrt(scale), 1, 1, 1), y.repeat(k))))

# in another thread a call goes on, and so it does in this one if the handler raises nothing
G = ie.GGN(model, loss, data(4000), 0.1)
v = torch.randn(40, G.shape[0])
expected, found, spent = G.matmat(v), [], []
one = seconds(lambda: G.matmat(v))
scale = int(2 / one) + 1
many = v.repeat(scale, 1)
worker = threading.Thread(target=lambda: found.append(G.matmat(many)))
worker.start()
on_signal(lambda: threading.Event().wait(300), spent, scale * one / 20)
assert worker.is_alive()
worker.join()
assert spent and torch.equal(found[0], expected.repeat(scale, 1))
heard, begin = [], time.process_time()
signal.signal(signal.SIGINT, lambda number, frame: heard.append(time.process_time()))
on_signal(lambda: found.append(G.matmat(many)), spent, scale * one / 20)
assert torch.equal(found[1], found[0]) and heard[0] - begin < (time.process_time() - begin) / 2
print("right")
"""


def test_calls_are_interrupted() -> None:
    """Ctrl-C ends a call of seconds within a quarter of its CPU time, and leaves all as it was."""
    run = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, timeout=600, check=False)
    assert run.stdout.strip() == "right", run.stderr
