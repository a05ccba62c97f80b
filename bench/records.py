"""The records: reading them, the latest of each case, how long a case will take, a summary for the terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.cases import CASES, GPU_CASES, Case
from bench.measure import Options

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
Record = dict[str, Any]


def load(path: Path) -> list[Record]:
    """All records of a file, or of all machines in a folder."""
    files = sorted(path.glob("*/*.jsonl")) if path.is_dir() else [path] if path.exists() else []
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [json.loads(line) for line in lines]


def latest(records: list[Record]) -> list[Record]:
    """The newest record of each case that there still is, in the order of the table of cases."""
    newest: dict[str, Record] = {}
    for record in sorted(records, key=lambda r: r["date"]):
        newest[record["case"]] = record
    return [newest[name] for name in dict.fromkeys(case.name for case in (*CASES, *GPU_CASES)) if name in newest]


def expected_seconds(case: Case, previous: Record | None, options: Options) -> float:
    """From what the case took the last time on this machine, or from the table's rough figure."""
    elapsed = (previous or {}).get("elapsed")
    if not elapsed:
        return max(case.seconds + options.seconds - 3, 3.0)
    return elapsed["total"] - elapsed["timing"] + max(options.seconds, options.rounds * elapsed["round"])


def timed(record: Record, name: str | None) -> Record | None:
    """The row of a contender that was timed."""
    return next((c for c in record["contenders"] if c["name"] == name and "median" in c), None)


def summary(record: Record) -> str:
    """A few lines on one case, the losing contenders included."""
    lines = [f"\n{record['title']} · {record['workload']} · N = {record['num_examples']} · {record['dtype']}"]
    rows = record["contenders"]
    for row in rows if record["linearity"] else sorted(rows, key=lambda r: r.get("median", float("inf"))):
        if row["failure"]:
            lines.append(f"  {row['name']:<34} failed: {row['failure'][:110]}")
            continue
        peak = row.get("peak_bytes")
        memory_text = f"  peak {peak / 2**20:7.1f} MiB" if peak is not None else ""
        lines.append(
            f"  {row['name']:<34}{row['median'] * 1e3:10.3f} ms  [{row['q1'] * 1e3:.3f}, {row['q3'] * 1e3:.3f}]"
            f"  error {row['error']:.0e}{memory_text}"
        )
    parts = []
    if record["ratio"]:
        parts.append(f"{record['ratio']:.2f}× {record['best_peer']}")
    if record["percent_of_floor"]:
        parts.append(f"{record['percent_of_floor']:.0f} % of the floor ({record['floor']['seconds'] * 1e3:.3f} ms)")
    if line := record["linearity"]:
        parts.append(f"off proportional by at most {100 * line['proportional']:.0f} %, off a + b · size by {100 * line['affine']:.0f} %")
    return "\n".join([*lines, *(["  " + ", ".join(parts)] if parts else [])])
