"""Run the benchmarks: verify every contender against float64, then time them in turn, and append the results.

    python -m bench.run                     all cases, about ten minutes on two cores
    python -m bench.run --cases 'ggn-*'     some
    python -m bench.run --smoke             tiny networks: checks the code, measures nothing, writes nothing

Exit status: 0 all answers right, 1 a contender of this library failed or was wrong, 2 usage.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench import machine, memory
from bench.cases import Case, error, reference, select
from bench.floor import Rates, floor, measure_rates, waiter
from bench.peers import Call, Contender, contenders
from bench.timing import interleave

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    cases = select(args.cases, smoke=args.smoke)
    if not cases:
        print(f"bench: expected --cases to match a case, got {args.cases}; --list shows them all.", file=sys.stderr)
        return 2
    if args.list:
        print("\n".join(c.name for c in cases))
        return 0
    if args.threads:
        torch.set_num_threads(args.threads)
    header = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "bench.run", *(sys.argv[1:] if argv is None else argv)]),
        "commit": machine.commit(ROOT),
        "machine": machine.description(args.device),
        "versions": machine.versions(),
        "threads": torch.get_num_threads(),
        "seed": args.seed,
    }
    rates = measure_rates(device=args.device, **({"sizes": (64,), "seconds": 0.01} if args.smoke else {}))
    say = (lambda text: print(text, file=sys.stderr)) if args.json else print
    say(describe(header, rates))
    path = Path(args.out) if args.out else RESULTS / header["machine"]["name"] / "results.jsonl"
    failed = False
    for case in cases:
        if not args.smoke:
            rates = rates.best(measure_rates(seconds=0.1, device=args.device))
        record = header | {"rates": asdict(rates)} | run_case(case, rates, args)
        failed |= any(c["ours"] and c["failure"] for c in record["contenders"])
        say(summary(record))
        if args.json:
            print(json.dumps(record))
        if not args.smoke or args.out:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
    if not args.smoke or args.out:
        say(f"results: {path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}")
    return 1 if failed else 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.run", description="Benchmarks of influence_ext against its peers.")
    parser.add_argument("--cases", nargs="+", default=[], metavar="PATTERN", help="cases to run, with shell wildcards (default: all)")
    parser.add_argument("--list", action="store_true", help="print the names of the cases and stop")
    parser.add_argument("--smoke", action="store_true", help="tiny networks, to check that everything works")
    parser.add_argument("--seconds", type=float, default=20.0, help="time for all turns of a case (default 20)")
    parser.add_argument("--threads", type=int, default=0, help="torch threads (default: torch's own choice)")
    parser.add_argument("--seed", type=int, default=0, help="of networks, data and vectors (default 0)")
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory (of the CPU alone)")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--device", type=torch.device, default="cpu", help="where data and networks lie: cpu (default), cuda, cuda:1")
    parser.add_argument("--out", help="file to append to (default bench/results/<machine>/results.jsonl)")
    parser.add_argument("--json", action="store_true", help="print the records on stdout, everything else on stderr")
    args = parser.parse_args(argv)
    if args.seconds <= 0:
        parser.error("--seconds must be positive")
    if args.device.type not in ("cpu", "cuda") or (args.device.type == "cuda" and not torch.cuda.is_available()):
        parser.error(f"expected --device cpu, or cuda where torch sees a GPU, got {args.device}")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # peers compute in full precision too
    return args


def run_case(case: Case, rates: Rates, args: argparse.Namespace) -> dict[str, Any]:
    """Verify, time and weigh the contenders of one case."""
    torch._dynamo.reset()
    problem = case.problem(args.seed).on(args.device)
    expected = reference(case, problem)
    calls: dict[str, Call] = {}
    rows: dict[str, dict[str, Any]] = {}
    for contender in contenders(case):
        if args.no_compile and "compile" in contender.name:
            continue
        rows[contender.name] = row = {"name": contender.name, "ours": contender.ours, "error": None, "failure": None}
        try:
            calls[contender.name] = verified_call(case, problem, contender, expected, row)
        except Exception as problem_found:  # a peer that cannot do it is a result, not a reason to stop
            row["failure"] = f"{type(problem_found).__name__}: {str(problem_found).strip().splitlines()[0]}"
    del expected
    if calls:
        short = {"min_sample": 0.0, "max_rounds": 5} if args.smoke else {}
        timings = interleave(calls, seconds=args.seconds, wait=waiter(args.device), **short)
        for name, timing in timings.items():
            rows[name] |= asdict(timing)
    calls.clear()
    if not (args.no_memory or args.smoke or args.device.type != "cpu"):
        for name, row in rows.items():
            if row["failure"] is None:
                row["peak_bytes"] = weighed(case, name, args.seed)
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
        "contenders": list(rows.values()),
        **compare(list(rows.values()), case, rates),
    }


def verified_call(case: Case, problem: Any, contender: Contender, expected: torch.Tensor, row: dict[str, Any]) -> Call:
    """The contender's call, after its answer has met the reference; raises where it does not."""
    call = contender.prepare(case, problem)
    row["error"] = error(case, problem, contender.flat(call()), expected)
    if not row["error"] <= contender.limit:
        raise ArithmeticError(f"relative error {row['error']:.1e} against float64, allowed {contender.limit:.0e}")
    return call


def weighed(case: Case, name: str, seed: int) -> int | None:
    try:
        return memory.measure(case.name, name, seed=seed)
    except (RuntimeError, subprocess.TimeoutExpired) as problem_found:
        print(problem_found, file=sys.stderr)
        return None


def compare(rows: list[dict[str, Any]], case: Case, rates: Rates) -> dict[str, Any]:
    """Ours against the fastest other contender and against the floor."""
    timed = [r for r in rows if "median" in r]
    ours = min((r for r in timed if r["ours"]), key=lambda r: r["median"], default=None)
    others = [r for r in timed if not r["ours"]]
    if case.quantity == "solve":  # both are this library's: the exact dual solve against CG
        ours, others = next((r for r in timed if "Dual" in r["name"]), None), [r for r in timed if "CG" in r["name"]]
    best = min(others, key=lambda r: r["median"], default=None)
    limit = floor(case, rates)
    return {
        "floor": asdict(limit) if limit else None,
        "best_peer": best["name"] if best else None,
        "ratio": best["median"] / ours["median"] if best and ours else None,
        "percent_of_floor": 100 * limit.seconds / ours["median"] if limit and ours else None,
    }


def describe(header: dict[str, Any], rates: Rates) -> str:
    load = header["machine"]["load"]
    busy = f"\nload average {load}: other work is running here, expect noise" if load and load > 0.7 else ""
    memory_rates = f"copy {rates.copy / 1e9:.0f} GB/s, write {rates.write / 1e9:.0f} GB/s"
    return (
        f"{header['machine']['name']} · torch {header['versions']['torch']} · {header['threads']} threads · "
        f"GEMM {rates.gemm / 1e9:.0f} GFLOP/s ({rates.gemm_route}) · {memory_rates}{busy}"
    )


def summary(record: dict[str, Any]) -> str:
    """A few lines on one case, the losing contenders included."""
    lines = [f"\n{record['title']} · {record['workload']} · N = {record['num_examples']} · {record['dtype']}"]
    for row in sorted(record["contenders"], key=lambda r: r.get("median", float("inf"))):
        if row["failure"]:
            lines.append(f"  {row['name']:<28} failed: {row['failure'][:90]}")
            continue
        peak = row.get("peak_bytes")
        memory_text = f"  peak {peak / 2**20:7.1f} MiB" if peak is not None else ""
        lines.append(
            f"  {row['name']:<28}{row['median'] * 1e3:10.3f} ms  [{row['q1'] * 1e3:.3f}, {row['q3'] * 1e3:.3f}]"
            f"  error {row['error']:.0e}{memory_text}"
        )
    if record["ratio"]:
        text = f"  {record['ratio']:.2f}× {record['best_peer']}"
        if record["percent_of_floor"]:
            text += f", {record['percent_of_floor']:.0f} % of the floor ({record['floor']['seconds'] * 1e3:.3f} ms)"
        lines.append(text)
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
