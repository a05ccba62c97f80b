"""Run the benchmarks: verify every contender against float64, then time them in turn, weigh them, and append the results.

    python -m bench.run                     all cases; --list says how long each takes
    python -m bench.run --quick             those of README's table, in short: about 25 minutes on two cores
    python -m bench.run --cases 'ggn-*'     some
    python -m bench.run --quick --minutes 20    as many of them as are expected to be done by then, the short ones first
    python -m bench.run --resume            those that this commit has no result of yet on this machine
    python -m bench.run --smoke             tiny networks: checks the code, measures nothing, writes nothing

Each case runs in a process of its own and is written as soon as it is done. Exit status: 0 all answers right, 1 a contender of this library
failed or was wrong, 2 usage, 130 Ctrl-C, after which the cases that were done are kept.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench import machine, measure
from bench.cases import Case, select
from bench.contender import OURS
from bench.floor import Rates, measure_rates
from bench.process import ProcessFailure, isolated
from bench.records import RESULTS, ROOT, Record, expected_seconds, latest, load, summary
from bench.reference import reference
from bench.tables import tables


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    cases = select(args.cases, smoke=args.smoke, main=args.main, gpu=args.device.type == "cuda")
    if not cases:
        print(f"bench: expected --cases to match a case, got {args.cases}; --list shows them all.", file=sys.stderr)
        return 2
    options = measure.Options(
        seconds=args.seconds,
        rounds=args.rounds,
        threads=args.threads,
        seed=args.seed,
        memory=not (args.no_memory or args.smoke),
        compile=not args.no_compile,
        smoke=args.smoke,
        device=str(args.device),
    )
    if args.threads:
        torch.set_num_threads(args.threads)
    command = shlex.join(["python", "-m", "bench.run", *(sys.argv[1:] if argv is None else argv)])
    header = described(args.device, command, args.seed)
    path = Path(args.out) if args.out else RESULTS / header["machine"]["name"] / "results.jsonl"
    shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    before = load(path)
    if args.resume:
        cases = [c for c in cases if not any(is_same(r, header, c) for r in before)]
    known = {r["case"]: r for r in latest(before)}
    durations = {c.name: expected_seconds(c, known.get(c.name), options) for c in cases}
    cases.sort(key=lambda c: durations[c.name])  # so that as many as possible are done where time runs out
    began = time.perf_counter()
    if args.list:
        print("\n".join(f"{durations[c.name]:6.0f} s  {'*' if c.main else ' '} {c.name}" for c in cases))
        print(f"{len(cases)} cases, about {sum(durations.values()) / 60:.0f} minutes; * in README's table")
        return 0
    say = (lambda text: print(text, file=sys.stderr, flush=True)) if args.json else (lambda text: print(text, flush=True))
    rates = measure_rates(device=args.device, **({"sizes": (64,), "seconds": 0.01} if args.smoke else {}))
    say(describe(header, rates))
    if not args.smoke:
        say(f"{len(cases)} cases, about {sum(durations.values()) / 60:.0f} minutes")
    done: list[Record] = []
    for k, case in enumerate(cases):
        if not args.smoke:
            rates = rates.best(measure_rates(seconds=0.1, device=args.device))
        start = time.perf_counter()
        if start - began + durations[case.name] > 60 * args.minutes:
            say(f"\nbench: {len(cases) - k} cases left out for want of time, among them {case.name}; --resume does them.")
            break
        try:
            record = described(args.device, command, args.seed) | {"rates": asdict(rates)} | result(case, options, rates, args.timeout)
        except KeyboardInterrupt:
            number = "1 case is" if len(done) == 1 else f"{len(done)} cases are"
            kept = "nothing was to be written" if args.smoke and not args.out else f"{number} kept in {shown}"
            say(f"\nbench: interrupted in {case.name}; {kept}, --resume does the others and `python -m bench.plot` redraws the tables.")
            return 130
        done.append(record)
        say(summary(record))
        if not args.smoke:
            took, left = time.perf_counter() - start, sum(durations[c.name] for c in cases[k + 1 :])
            say(f"  [{k + 1}/{len(cases)}] {took:.0f} s, expected {durations[case.name]:.0f} s; about {left / 60:.0f} minutes left")
        if args.json:
            print(json.dumps(record))
        if not args.smoke or args.out:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
    if not args.smoke or args.out:
        say("\n".join(["", *tables(done)]))
        say(f"results: {shown}")
    return 1 if any(c["ours"] and c["failure"] for record in done for c in record["contenders"]) else 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.run", description="Benchmarks of influence_ext against its peers.")
    parser.add_argument("--cases", nargs="+", default=[], metavar="PATTERN", help="cases to run, with shell wildcards (default: all)")
    parser.add_argument("--main", action="store_true", help="only those of README's table")
    parser.add_argument("--quick", action="store_true", help="short for --main --seconds 3 --rounds 3")
    parser.add_argument(
        "--resume", action="store_true", help="leave out what this commit has a result of, with these threads and this seed"
    )
    parser.add_argument("--list", action="store_true", help="print names and expected times of the cases and stop")
    parser.add_argument("--smoke", action="store_true", help="tiny networks, to check that everything works")
    parser.add_argument("--seconds", type=float, help="time for all turns of a case (default 20)")
    parser.add_argument("--rounds", type=int, help="fewest turns of each contender, however long they take (default 5)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no case that is expected to end later than this")
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds that a case may take altogether (default 1800)")
    parser.add_argument("--threads", type=int, default=0, help="torch threads (default: torch's own choice)")
    parser.add_argument("--seed", type=int, default=0, help="of networks, data and vectors (default 0)")
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory (of the CPU alone)")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--device", type=torch.device, default="cpu", help="where data and networks lie: cpu (default), cuda, cuda:1")
    parser.add_argument("--out", help="file to append to (default bench/results/<machine>/results.jsonl)")
    parser.add_argument("--json", action="store_true", help="print the records on stdout, everything else on stderr")
    args = parser.parse_args(argv)
    args.main |= args.quick
    if args.seconds is None:
        args.seconds = 3.0 if args.quick else 20.0
    if args.rounds is None:
        args.rounds = 3 if args.quick else 5
    if args.seconds <= 0 or args.rounds < 2:
        parser.error("--seconds must be positive and --rounds at least 2")
    if args.device.type not in ("cpu", "cuda") or (args.device.type == "cuda" and not torch.cuda.is_available()):
        parser.error(f"expected --device cpu, or cuda where torch sees a GPU, got {args.device}")
    return args


def described(device: torch.device, command: str, seed: int) -> Record:
    """The part of a record that says when, where and with what."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command,
        "commit": machine.commit(ROOT),
        "machine": machine.description(device),
        "versions": machine.versions(),
        "threads": torch.get_num_threads(),
        "seed": seed,
    }


def is_same(record: Record, header: Record, case: Case) -> bool:
    """Whether a record already says what the case would, from the same sources without changes."""
    same = all(record.get(field) == header[field] for field in ("commit", "threads", "seed"))
    return same and record["case"] == case.name and not header["commit"]["dirty"] and bool(record.get("ours"))


def result(case: Case, options: measure.Options, rates: Rates, timeout: float) -> Record:
    """What a case gives, in processes of its own; a case that cannot be measured gives a record that says so."""
    if options.smoke:
        return measure.run_case(case, options, rates, reference(case, options.problem(case)))
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "reference.pt"
            isolated(measure.write_reference, case, options, path, timeout=timeout)
            return isolated(measure.measured, case, options, rates, path, timeout=timeout)
    except ProcessFailure as failure:
        row: dict[str, Any] = {"name": OURS, "ours": True, "error": None, "failure": str(failure)}
        return measure.described(case) | {"contenders": [row], "elapsed": None} | measure.compare([row], case, rates)


def describe(header: Record, rates: Rates) -> str:
    load = header["machine"]["load"]
    busy = f"\nload average {load}: other work is running here, expect noise" if load and load > 0.7 else ""
    memory_rates = f"copy {rates.copy / 1e9:.0f} GB/s, write {rates.write / 1e9:.0f} GB/s"
    return (
        f"{header['machine']['name']} · torch {header['versions']['torch']} · {header['threads']} threads · "
        f"GEMM {rates.gemm / 1e9:.0f} GFLOP/s ({rates.gemm_route}) · {memory_rates}{busy}"
    )


if __name__ == "__main__":
    raise SystemExit(main())
