"""The floor: operations that must be done, over the speed at which this machine does them, both taken in the same run."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from bench.cases import EPOCHS, Case


@dataclass(frozen=True)
class Rates:
    """What the machine gives now.

    Attributes:
        gemm: Floating-point operations a second of the fastest matrix product that torch offers here.
        gemm_route: Which product that was.
        copy: Bytes a second, read and write counted, of a copy that leaves the caches.
        write: Bytes a second of filling memory.
    """

    gemm: float
    gemm_route: str
    copy: float
    write: float

    def best(self, other: Rates) -> Rates:
        """The faster of both in each respect: a rate is what the machine can do, and other work only ever hides it."""
        faster = self if self.gemm >= other.gemm else other
        return Rates(faster.gemm, faster.gemm_route, max(self.copy, other.copy), max(self.write, other.write))


@dataclass(frozen=True)
class Floor:
    """Multiply-adds count as two operations; ``seconds`` is the largest of arithmetic, unavoidable writing and unavoidable traffic."""

    flops: float
    bytes_written: float
    bytes_moved: int
    seconds: float


CPU = torch.device("cpu")


def waiter(device: torch.device) -> Callable[[], None]:
    """What returns when the device has done what it was given."""
    return partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None


def measure_rates(
    dtype: torch.dtype = torch.float32, sizes: tuple[int, ...] = (), seconds: float = 0.4, device: torch.device = CPU
) -> Rates:
    """Best of ``at::mm`` and, where this torch has it, oneDNN, over square matrices, in the full precision of ``dtype``."""
    best, route = 0.0, ""
    wait = waiter(device)
    for size in sizes or ((1024, 2048) if device.type == "cpu" else (4096, 8192)):
        a, b = torch.randn(2, size, size, dtype=dtype, device=device)
        bias, out = torch.zeros(size, dtype=dtype, device=device), torch.empty(size, size, dtype=dtype, device=device)
        for name, product in _routes(a, b, bias, out).items():
            rate = 2 * size**3 / fastest(product, seconds, wait)
            if rate > best:
                best, route = rate, f"{name} {size}³"
    source, target = torch.ones(2**26, device=device), torch.empty(2**26, device=device)
    copy = 2 * source.nbytes / fastest(lambda: target.copy_(source), seconds, wait)
    write = target.nbytes / fastest(lambda: target.fill_(1.0), seconds, wait)
    return Rates(best, route, copy, write)


def _routes(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor, out: torch.Tensor) -> dict[str, Callable[[], object]]:
    routes: dict[str, Callable[[], object]] = {
        "at::mm": lambda: torch.mm(a, b, out=out),
        "F.linear": lambda: F.linear(a, b, bias),
    }
    if a.device.type == "cpu" and torch.backends.mkldnn.is_available() and a.dtype == torch.float32:
        routes["oneDNN"] = lambda: torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")
    return routes


def fastest(function: Callable[[], object], seconds: float, wait: Callable[[], None] = lambda: None) -> float:
    """The shortest of as many calls as fit into ``seconds``, at least three: a rate is what the machine can do at its best."""
    function()
    wait()
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        start = time.perf_counter()
        function()
        wait()
        times.append(time.perf_counter() - start)
    return min(times)


def count(case: Case) -> tuple[float, float] | None:
    """``(operations, bytes that must be written)`` of one call, ``None`` where no simple count is a floor (solves, sweeps).

    One GGN product costs four forward passes less two of the first layer: the tangent through parameters and through
    inputs, the cotangent of inputs and of parameters, of which the first layer's inputs need neither. Its own forward
    pass is done once, before. A Hessian product costs two forward passes more, without the first layer: either cotangent's
    second-order term. The per-example quantities include their forward pass.
    """
    N, V = case.num_examples, case.num_vectors
    forward = N * case.workload.forward_operations
    first = N * case.workload.first_operations
    item = case.dtype.itemsize
    gradients = forward + (forward - first)  # activations and the cotangent of every layer's output
    if case.quantity == "ggn":
        return V * (4 * forward - 2 * first), V * case.workload.num_parameters * item
    if case.quantity == "hessian":
        return V * (6 * forward - 4 * first), V * case.workload.num_parameters * item
    if case.quantity == "loss-hessian":  # p (x − Σ p x)
        outputs = N * case.workload.num_outputs
        return 4.0 * V * outputs, V * outputs * item
    if case.quantity in ("grads", "grads-out"):
        return gradients, N * case.workload.num_parameters * item
    if case.quantity == "norms":
        return gradients, N * item
    if case.quantity == "dots":
        return min(gradients + V * forward, forward + V * (2 * forward - first)), N * V * item
    if case.quantity == "retrain":  # as grads, and every layer's parameters besides
        return V * EPOCHS * (gradients + forward), V * case.workload.num_parameters * item
    if case.quantity == "gram" and case.workload.gram_width is not None:
        return gradients + N * (N + 1) * case.workload.gram_width, N * N * item
    return None


def traffic(case: Case) -> int:
    """Bytes that must be read and written, of calls that do little else: the vectors twice, and p once for all of them."""
    if case.quantity != "loss-hessian":
        return 0
    return (2 * case.num_vectors + 1) * case.num_examples * case.workload.num_outputs * case.dtype.itemsize


def floor(case: Case, rates: Rates) -> Floor | None:
    """The counted work of ``case`` at the measured ``rates``."""
    counted = count(case)
    if counted is None:
        return None
    flops, written = counted
    moved = traffic(case)
    return Floor(flops, written, moved, max(flops / rates.gemm, written / rates.write, moved / rates.copy))
