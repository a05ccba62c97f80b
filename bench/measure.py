"""One case: verify every contender against float64, time them in turn, weigh them, compare."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import memory
from bench.cases import Case
from bench.contender import Call, Contender
from bench.floor import Rates, floor, waiter
from bench.peers import contenders
from bench.problem import Problem
from bench.process import one_line
from bench.reference import error, reference
from bench.scaling import linearity
from bench.timing import interleave

LONG, TOO_LONG = 1.0, 5.0
"""Seconds of a call: beyond the first it is not tried for its length, beyond the second its memory is not measured (two calls more)."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """How to measure.

    Attributes:
        seconds: of timing for a case, all contenders together.
        rounds: fewest turns of each contender, also where they take longer than that.
        threads: of torch; 0 for torch's own choice.
        seed: of networks, data and vectors.
        memory: whether to measure peak memory.
        compile: whether ``torch.compile`` takes part.
        smoke: shortest calls, to check the code.
        device: where networks and data lie.
    """

    seconds: float = 20.0
    rounds: int = 5
    threads: int = 0
    seed: int = 0
    memory: bool = True
    compile: bool = True
    smoke: bool = False
    device: str = "cpu"

    def problem(self, case: Case) -> Problem:
        if self.threads:
            torch.set_num_threads(self.threads)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # peers compute in full precision too
        return case.problem(self.seed).on(torch.device(self.device))


def write_reference(case: Case, options: Options, path: Path) -> None:
    """The right answers into a file: what they take stays out of the process that measures."""
    found = reference(case, options.problem(case))
    torch.save({name: answer.cpu() for name, answer in found.items()}, path)


def measured(case: Case, options: Options, rates: Rates, path: Path) -> Row:
    """:func:`run_case` with the right answers from a file, mapped and not read."""
    return run_case(case, options, rates, torch.load(path, mmap=True))


def run_case(case: Case, options: Options, rates: Rates, expected: dict[str, Tensor]) -> Row:
    """The part of a record that the case determines."""
    start = time.perf_counter()
    if options.smoke:  # in one process with others
        torch._dynamo.reset()
    prepared = memory.Prepared(options.problem(case))
    rows: dict[str, Row] = {}
    for contender in contenders(case):
        if "compile" in contender.name and not options.compile:
            continue
        rows[contender.name] = row = {"name": contender.name, "ours": contender.ours, "error": None, "failure": None}
        try:
            prepared.calls[contender.name] = verified_call(case, prepared.problem, contender, expected, row)
        except Exception as problem_found:  # a peer that cannot do it is a result, not a reason to stop
            row["failure"] = one_line(problem_found)
    eager = {name: row["first"] for name, row in rows.items() if name in prepared.calls and not (row["ours"] or "compile" in name)}
    known = {name: first for name, first in eager.items() if first > LONG}  # others compile or capture in their first calls
    timing_start = time.perf_counter()
    if prepared.calls:
        short = {"min_sample": 0.0, "max_rounds": 5} if options.smoke else {"min_rounds": options.rounds}
        timings = interleave(prepared.calls, seconds=options.seconds, wait=waiter(torch.device(options.device)), known=known, **short)
        for name, timing in timings.items():
            rows[name] |= asdict(timing)
    timing_seconds = time.perf_counter() - timing_start
    if options.memory and options.device == "cpu":
        for name in [name for name in prepared.calls if rows[name]["median"] < TOO_LONG]:
            rows[name]["peak_bytes"] = memory.peak(prepared, name)
    return described(case) | {
        "contenders": list(rows.values()),
        "elapsed": {"total": time.perf_counter() - start, "timing": timing_seconds, "round": round_seconds(rows)},
        **compare(list(rows.values()), case, rates),
    }


def described(case: Case) -> Row:
    """What a record says of the case itself."""
    return {
        "case": case.name,
        "quantity": case.quantity,
        "title": case.title,
        "workload": case.workload.title,
        "loss": case.workload.loss,
        "num_examples": case.num_examples,
        "num_parameters": case.workload.num_parameters,
        "num_vectors": case.num_vectors,
        "dtype": str(case.dtype).removeprefix("torch."),
    }


def verified_call(case: Case, problem: Problem | None, contender: Contender, expected: dict[str, Tensor], row: Row) -> Call:
    """The contender's call, after its answer has met the reference; raises where it does not."""
    assert problem is not None
    call = contender.prepare(case, problem)
    wanted = next((answer for name, answer in expected.items() if contender.name.endswith(name)))
    start = time.perf_counter()
    answer = call()
    row["first"] = time.perf_counter() - start
    row["error"] = error(case, problem, contender.flat(answer), wanted)
    if not row["error"] <= contender.limit:
        raise ArithmeticError(f"relative error {row['error']:.1e} against float64, allowed {contender.limit:.0e}")
    return call


def round_seconds(rows: dict[str, Row]) -> float:
    """Of one turn of everybody."""
    return sum(row["median"] * row["calls_per_sample"] for row in rows.values() if "median" in row)


def compare(rows: list[Row], case: Case, rates: Rates) -> Row:
    """Ours against the fastest other contender and against the floor; a sweep against a straight line."""
    timed = [r for r in rows if "median" in r]
    ours = min((r for r in timed if r["ours"]), key=lambda r: r["median"], default=None)
    best = min((r for r in timed if not r["ours"]), key=lambda r: r["median"], default=None)
    limit = floor(case, rates)
    line = None
    if case.is_sweep:
        ours = timed[-1] if len(timed) == len(rows) else None  # the largest size
        limit = floor(case.steps[-1], rates)
        line = linearity(case, [r["median"] for r in timed]) if ours else None
    return {
        "ours": ours["name"] if ours else None,
        "floor": asdict(limit) if limit else None,
        "best_peer": best["name"] if best else None,
        "ratio": best["median"] / ours["median"] if best and ours else None,
        "percent_of_floor": 100 * limit.seconds / ours["median"] if limit and ours else None,
        "linearity": line,
    }
