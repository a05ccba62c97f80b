"""GGN products through the curvlinops adapter, against our own operator and against curvlinops, in one interleaved run.

    python -m bench.adapters.curvlinops             the networks of bench/, a minute each on two cores
    python -m bench.adapters.curvlinops --smoke     tiny networks: checks the code, measures nothing

Every answer is checked against float64 before it is timed. Exit status: 0 all answers right and the adapter at most 5 % slower than our own
operator, 1 otherwise (with --smoke the answers alone count).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import curvlinops
import torch
from torch import Tensor

import influence_ext as ie
from bench.cases import CASES, SMOKE_CASES, Case
from bench.problem import LOSS_MODULES, Problem
from bench.reference import error, reference
from bench.timing import interleave
from bench.workloads import MLP, SMALLEST
from influence_ext.adapters import curvlinops as adapter

LIMIT = 1.05
TOLERANCE = 1e-4


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.adapters.curvlinops", description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="tiny networks, to check that everything works")
    parser.add_argument("--seconds", type=float, default=20.0, help="time for all turns of a case (default 20)")
    args = parser.parse_args(argv)
    print("| GGN product | adapter / own operator | curvlinops / adapter |\n|---|--:|--:|")
    failed = False
    for case in SMOKE_CASES if args.smoke else CASES:
        if case.quantity != "ggn" or not isinstance(case.workload, MLP) or case.workload is SMALLEST:
            continue
        problem = case.problem()
        calls = contenders(problem)
        expected = reference(case, problem)[""]
        for name, (call, flat) in calls.items():
            deviation = error(case, problem, flat(call()), expected)
            if deviation > TOLERANCE:
                print(f"{case.name}: {name} is wrong by {deviation:.1e}", file=sys.stderr)
                failed = True
        options: dict[str, Any] = {"min_sample": 0.0, "max_rounds": 5} if args.smoke else {}
        timings = interleave({name: call for name, (call, _) in calls.items()}, seconds=args.seconds, **options)
        own = timings["own operator"].median
        for layout in ("flat", "list"):
            ours, theirs = timings[f"adapter, {layout}"].median, timings[f"curvlinops, {layout}"].median
            print(f"| {title(case)}, {layout} | {ours / own:.3f} | {theirs / ours:.2f} |")
            failed |= not args.smoke and ours > LIMIT * own
    return int(failed)


def title(case: Case) -> str:
    return f"{case.workload.title}, N = {case.num_examples}, V = {case.num_vectors}"


def contenders(problem: Problem) -> dict[str, tuple[Callable[[], Any], Callable[[Any], Tensor]]]:
    """Name -> the call that is timed, and what makes ``[V, P]`` of its result. One vector is passed as a vector."""
    loss, data = LOSS_MODULES[problem.loss](), [(problem.X, problem.y)]
    params = list(problem.model.parameters())
    V = problem.vectors
    single = V.shape[0] == 1
    columns = V[0] if single else V.T.contiguous()
    pieces = [
        piece.reshape(*p.shape) if single else piece.reshape(*p.shape, V.shape[0]).contiguous()
        for piece, p in zip(columns.split([p.numel() for p in params]), params, strict=True)
    ]
    own = ie.GGN(problem.model, loss, (problem.X, problem.y))
    operators = {
        "adapter": adapter.GGNLinearOperator(problem.model, loss, params, data),
        "curvlinops": curvlinops.GGNLinearOperator(problem.model, loss, params, data, check_deterministic=False),
    }
    flat: Callable[[Tensor], Tensor] = lambda product: product[None] if single else product.T  # noqa: E731
    found: dict[str, tuple[Callable[[], Any], Callable[[Any], Tensor]]] = {"own operator": (lambda: own.matmat(V), lambda product: product)}
    for name, operator in operators.items():
        found[f"{name}, flat"] = (lambda operator=operator: operator @ columns), flat
        found[f"{name}, list"] = (
            (lambda operator=operator: operator @ pieces),
            lambda product: flat(torch.cat([t.reshape(-1) if single else t.reshape(-1, len(V)) for t in product])),
        )
    return found


if __name__ == "__main__":
    raise SystemExit(main())
