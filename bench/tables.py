"""The records as Markdown: the main rows for README.md, and a page for the machine with every row and every contender."""

from __future__ import annotations

from typing import Any

from bench.cases import CASES, GPU_CASES
from bench.contender import OURS
from bench.records import Record, timed

MAIN = {case.name for case in (*CASES, *GPU_CASES) if case.main}
HEAD = [
    "| quantity | workload | influence_ext | best peer | speed-up | of the floor | peak memory, ours / peer |",
    "|---|---|--:|--:|--:|--:|--:|",
]
SWEEP_HEAD = [
    "| sweep | workload | cost of one at the largest size | off proportional by at most | off a + b · size by at most | a |",
    "|---|---|--:|--:|--:|--:|",
]


def main_table(records: list[Record]) -> str:
    """What README shows, the losing rows included."""
    machine = newest(records)["machine"]["name"]
    shown = [r for r in records if r["case"] in MAIN]
    link = f"All rows, contenders and charts: [bench/results/{machine}](bench/results/{machine}/README.md)."
    return "\n".join([*tables(shown), "", caption(shown), link])


def page(records: list[Record], charts: list[str]) -> str:
    """Everything about a machine."""
    lines = [f"# {hardware(newest(records)['machine'])}", "", caption(records)]
    lines += ["", *tables(records)]
    lines += [line for name in charts for line in ("", f"![{name.removesuffix('.svg')}]({name})")]
    lines += ["", "## Every contender", "", "| case | contender | median | quartiles | error | peak memory |", "|---|---|--:|--:|--:|--:|"]
    for record in records:
        for row in record["contenders"]:
            lines.append(f"| `{record['case']}` | {row['name']} | {details(row)} |")
    return "\n".join(lines) + "\n"


def details(row: Record) -> str:
    if "median" not in row:
        reason = row["failure"].replace("|", "\\|")
        return f"failed | {reason} | – | –"
    return f"{seconds(row['median'])} | {seconds(row['q1'])} to {seconds(row['q3'])} | {row['error']:.0e} | {mib(row)}"


def tables(records: list[Record]) -> list[str]:
    """The comparisons, then the sweeps if there are any."""
    compared, sweeps = [r for r in records if not is_sweep(r)], [r for r in records if is_sweep(r)]
    lines = [*HEAD, *(f"| {' | '.join(cells(r))} |" for r in compared)] if compared else []
    if sweeps:
        lines += [*([""] if lines else []), *SWEEP_HEAD, *(f"| {' | '.join(sweep_cells(r))} |" for r in sweeps)]
    return lines


def is_sweep(record: Record) -> bool:
    return record["quantity"].startswith("sweep")


def ours(record: Record) -> Record | None:
    """The fastest of this library's rows."""
    rows = [c for c in record["contenders"] if c["ours"] and "median" in c]
    return min(rows, key=lambda c: c["median"], default=None)


def cells(record: Record) -> list[str]:
    mine, peer = ours(record), timed(record, record["best_peer"])
    ratio, percent = record["ratio"], record["percent_of_floor"]
    return [
        record["title"],
        f"{record['workload']}, N = {record['num_examples']}",
        f"{seconds(mine['median'])}{which(mine['name'])}" if mine else "failed",
        f"{seconds(peer['median'])} ({peer['name']})" if peer else "–",
        f"**{ratio:.2f}×**" if ratio and ratio >= 1 else f"{ratio:.2f}× (slower)" if ratio else "–",
        percentage(percent),
        f"{mib(mine)} / {mib(peer)}",
    ]


def percentage(percent: float | None) -> str:
    if percent is None:
        return "–"
    return f"{percent:.0f} %" if percent >= 1 else "< 1 %"


def which(name: str) -> str:
    """Which of this library's ways it was, where there are several."""
    way = name.removeprefix(OURS).strip()
    return f" ({way})" if way else ""


def sweep_cells(record: Record) -> list[str]:
    line: dict[str, Any] | None = record["linearity"]
    if line is None:
        return [record["title"], record["workload"], "failed", "–", "–", "–"]
    over_examples = record["quantity"] == "sweep-n"
    unit = seconds(line["seconds"][-1] / line["sizes"][-1])
    return [
        record["title"],
        record["workload"] if over_examples else f"{record['workload']}, N = {record['num_examples']}",
        f"{unit} an example" if over_examples else f"{unit} a vector",
        f"{100 * line['proportional']:.0f} %",
        f"{100 * line['affine']:.0f} %",
        seconds(line["fixed"]),
    ]


def hardware(machine: dict[str, Any]) -> str:
    """The GPU if there is one, the processor and its cores."""
    gpu = machine.get("gpu")
    return (f"{gpu}, beside " if gpu else "") + f"{machine['cpu']}, {machine['cores']} cores"


def newest(records: list[Record]) -> Record:
    return max(records, key=lambda r: r["date"])


def caption(records: list[Record]) -> str:
    last = newest(records)
    machine, versions = last["machine"], last["versions"]
    commits = sorted({r["commit"]["id"] + (" with changes" if r["commit"]["dirty"] else "") for r in records})
    where = f"{hardware(machine)} ({last['threads']} threads)"
    what = f"torch {versions['torch']}, curvlinops {versions['curvlinops-for-pytorch']}, {last['date'][:10]}, commit {', '.join(commits)}"
    older = (
        ""
        if all("elapsed" in r for r in records)
        else ("Rows without peak memory are older: all cases in one process, without torch.func.linearize among the peers. ")
    )
    return (
        f"Medians of interleaved runs on {where}, {what}; each case in a process of its own, every answer checked against "
        f"float64 first. {older}Peak memory is what a call needs beyond network, data and vectors, kept state included. "
        "The floor is the count of the "
        "operations of plain sums in a tangent and a cotangent sweep (Winograd's algorithm and shortcuts need fewer, and may pass it) "
        f"over the fastest matrix product measured in the same run ({last['rates']['gemm'] / 1e9:.0f} GFLOP/s), or of "
        "unavoidable traffic over the speed of memory. Reproduce with `make bench`."
    )


def seconds(value: float) -> str:
    if abs(value) < 1e-3:
        return f"{value * 1e6:.3g} µs"
    return f"{value * 1e3:.3g} ms" if abs(value) < 1 else f"{value:.2f} s"


def mib(row: Record | None) -> str:
    peak = (row or {}).get("peak_bytes")
    if peak is None:
        return "–"
    return f"{peak / 2**20:.0f} MiB" if peak >= 2**20 else "< 1 MiB"
