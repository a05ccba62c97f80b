"""Matrix products by themselves, on one thread: ours against MKL (``torch.mm``) and oneDNN, over the shapes of the workloads.

``python -m bench.gemm [--seconds 2] [--precision bfloat16]``: verified against float64, then contenders in turn, the shortest CPU time of
each. What is ours is the product of one linear layer through a tape, ``x vᵀ`` (the tangent through a parameter, v packed anew as every
product must) and ``gᵀ x`` (its cotangent), so it bears the tape's few microseconds and a copy of the result too. Ratios above 1: ours is
faster.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from influence_ext.plan import Plan

# rows (examples, positions or a tile of them), features in, features out
SHAPES: dict[str, tuple[int, int, int]] = {
    "regression 1": (125, 8, 128),
    "regression 2": (125, 128, 128),
    "regression 3": (125, 128, 1),
    "classifier 1": (2048, 784, 512),
    "classifier 2": (2048, 512, 256),
    "classifier 3": (2048, 256, 10),
    "LeNet dense": (512, 400, 120),
    "LeNet head": (512, 84, 10),
    "GPT projection": (512, 128, 128),
    "GPT wide": (512, 128, 512),
    "GPT narrow": (512, 512, 128),
    "GPT head": (1024, 128, 1000),
    "ResNet head": (128, 64, 10),
    "wide": (1024, 1024, 1024),
    "one row": (1, 512, 512),
    "few rows": (5, 512, 512),
    "few terms": (2048, 2, 64),
    "two columns": (2048, 256, 2),
    "one column": (2048, 256, 1),
    "three columns": (2048, 256, 3),
    "four columns": (2048, 256, 4),
}


def shortest(contenders: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """CPU time of the fastest run of each, taken in turn; short ones in batches that a clock can see."""
    repeats = {}
    for name, run in contenders.items():
        run()
        start = time.perf_counter()
        run()
        repeats[name] = max(1, int(2e-4 / max(1e-7, time.perf_counter() - start)))
    found = dict.fromkeys(contenders, float("inf"))
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for name, run in contenders.items():
            start = time.process_time()
            for _ in range(repeats[name]):
                run()
            found[name] = min(found[name], (time.process_time() - start) / repeats[name])
    return found


def row(rows: int, terms: int, columns: int, seconds: float, precision: str) -> dict[str, dict[str, float]]:
    """Seconds of each contender for ``x vᵀ`` and ``gᵀ x``."""
    generator = torch.Generator().manual_seed(0)
    x, v, g = (torch.randn(*shape, generator=generator) for shape in ((rows, terms), (columns, terms), (rows, columns)))
    tape = Plan.of(nn.Linear(terms, columns, bias=False), x).linearize(x, precision=precision)  # type: ignore[arg-type]
    tape.set_schedule("by_operator")
    native, flat, cotangent = tape._native, v.reshape(1, -1), g[None].contiguous()
    if precision == "bfloat16":
        x_, v_, g_ = x.bfloat16(), v.bfloat16(), g.bfloat16()  # theirs: rounded ahead, and results rounded too
    else:
        x_, v_, g_ = x, v, g
    forward: dict[str, Callable[[], Tensor]] = {"ours": lambda: native.jvp(flat), "MKL": lambda: torch.mm(x, v.T)}
    backward: dict[str, Callable[[], Tensor]] = {"ours": lambda: native.vjp(cotangent), "MKL": lambda: torch.mm(g.T, x)}
    if torch.backends.mkldnn.is_available():
        forward["oneDNN"] = lambda: torch.ops.mkldnn._linear_pointwise(x_, v_, None, "none", [], "")
        xt = x_.T.contiguous()
        gt = g_.T
        backward["oneDNN"] = lambda: torch.ops.mkldnn._linear_pointwise(gt, xt, None, "none", [], "")
    limit = 1e-5 if precision == "full" else 1e-2
    for runs, oracle in ((forward, x.double() @ v.double().T), (backward, g.double().T @ x.double())):
        for name, run in runs.items():
            error = float((run().double().reshape(oracle.shape) - oracle).norm() / oracle.norm())
            if not error < limit:
                raise AssertionError(f"bench.gemm: expected {name} within {limit:g} of float64, got {error:.1e}.")
    return {"x vᵀ": shortest(forward, seconds), "gᵀ x": shortest(backward, seconds)}


def main() -> None:
    """The table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each product")
    parser.add_argument("--precision", choices=("full", "bfloat16"), default="full")
    parser.add_argument("--only", default="", help="part of a shape's name")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| shape | rows × terms × columns | product | ours, GFLOP/s | against MKL | against oneDNN |\n|---|---|---|--:|--:|--:|")
    for name, (rows, terms, columns) in SHAPES.items():
        if options.only not in name:
            continue
        for product, seconds in row(rows, terms, columns, options.seconds, options.precision).items():
            ours = seconds["ours"]
            rate = 2e-9 * rows * terms * columns / ours
            ratios = [f"{seconds[peer] / ours:.2f}" if peer in seconds else "–" for peer in ("MKL", "oneDNN")]
            print(f"| {name} | {rows} × {terms} × {columns} | {product} | {rate:.1f} | {' | '.join(ratios)} |", flush=True)


if __name__ == "__main__":
    main()
