"""Draw what was measured: the table in README.md (between its two markers) and a chart under docs/.

    python -m bench.plot [--machine NAME]       the machine measured last, or the one named

Always the latest record of each case. Rows that this library loses are drawn like all others.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from bench.cases import CASES

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
MARKS = (
    ("influence_ext", "#1b6ca8", "o", "influence_ext"),
    ("torch.func", "#e07b39", "s", "torch.func"),
    ("torch.compile", "#8a5fbf", "^", "torch.compile"),
    ("curvlinops", "#5a9e6f", "D", "curvlinops"),
)
Record = dict[str, Any]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.plot", description="Table and chart from bench/results.")
    parser.add_argument("--machine", help="folder under bench/results (default: the one with the latest record)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of results (default bench/results)")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="file with the two markers (default README.md)")
    parser.add_argument("--chart", type=Path, default=ROOT / "docs" / "bench.svg", help="chart to write: .svg or .png")
    args = parser.parse_args(argv)
    records = load(args.results)
    if args.machine:
        records = [r for r in records if r["machine"]["name"] == args.machine]
    if not records:
        print(f"bench.plot: expected results under {args.results}, found none; run 'make bench' first.", file=sys.stderr)
        return 2
    newest = max(records, key=lambda r: r["date"])
    chosen = latest([r for r in records if r["machine"]["name"] == newest["machine"]["name"]])
    text = args.readme.read_text(encoding="utf-8") if args.readme.exists() else ""
    if BEGIN not in text or END not in text:
        print(f"bench.plot: expected the markers {BEGIN} and {END} in {args.readme}, found none; add them.", file=sys.stderr)
        return 2
    args.readme.write_text(between_markers(text, table(chosen)), encoding="utf-8")
    args.chart.parent.mkdir(parents=True, exist_ok=True)
    chart(chosen, args.chart)
    print(f"table in {args.readme.name}, chart in {args.chart} ({len(chosen)} cases, {newest['machine']['name']})")
    return 0


def load(folder: Path) -> list[Record]:
    return [
        json.loads(line)
        for file in sorted(folder.glob("*/*.jsonl"))
        for line in file.read_text(encoding="utf-8").splitlines()
        if line.strip()
    ]


def latest(records: list[Record]) -> list[Record]:
    """The newest record of each case, in the order of the table of cases."""
    newest: dict[str, Record] = {}
    for record in sorted(records, key=lambda r: r["date"]):
        newest[record["case"]] = record
    order = {case.name: k for k, case in enumerate(CASES)}
    return sorted(newest.values(), key=lambda r: order.get(r["case"], len(order)))


def between_markers(text: str, table_text: str) -> str:
    head, rest = text.split(BEGIN, 1)
    _, tail = rest.split(END, 1)
    return f"{head}{BEGIN}\n{table_text}\n{END}{tail}"


def ours(record: Record) -> Record | None:
    timed = [c for c in record["contenders"] if c["ours"] and "median" in c]
    if record["quantity"] == "solve":
        timed = [c for c in timed if "Dual" in c["name"]]
    return min(timed, key=lambda c: c["median"], default=None)


def table(records: list[Record]) -> str:
    """GitHub Markdown: ours, the best peer, the ratio, the distance to the floor, peak memory of a call."""
    lines = [
        "| quantity | workload | influence_ext | best peer | speed-up | of the floor | peak memory, ours / peer |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for record in records:
        mine = ours(record)
        peer = next((c for c in record["contenders"] if c["name"] == record["best_peer"]), None)
        ratio, percent = record["ratio"], record["percent_of_floor"]
        lines.append(
            "| "
            + " | ".join(
                [
                    record["title"],
                    f"{record['workload']}, N = {record['num_examples']}",
                    seconds(mine["median"]) if mine else "failed",
                    f"{seconds(peer['median'])} ({peer['name'].removeprefix('influence_ext ')})" if peer else "–",
                    f"**{ratio:.2f}×**" if ratio and ratio >= 1 else f"{ratio:.2f}× (slower)" if ratio else "–",
                    f"{percent:.0f} %" if percent else "–",
                    f"{mib(mine)} / {mib(peer)}",
                ]
            )
            + " |"
        )
    return "\n".join([*lines, "", caption(records)])


def caption(records: list[Record]) -> str:
    newest = max(records, key=lambda r: r["date"])
    machine, versions = newest["machine"], newest["versions"]
    commits = sorted({r["commit"]["id"] + (" with changes" if r["commit"]["dirty"] else "") for r in records})
    where = f"{machine['cpu']}, {machine['cores']} cores ({newest['threads']} threads)"
    what = f"torch {versions['torch']}, curvlinops {versions['curvlinops-for-pytorch']}, {newest['date'][:10]}, commit {', '.join(commits)}"
    return (
        f"Medians of interleaved runs on {where}, {what}; every answer checked against float64 first. Peak memory is what a call needs "
        "beyond network, data and vectors, kept state included. The floor is the count of unavoidable operations over the fastest "
        f"matrix product measured in the same run ({newest['rates']['gemm'] / 1e9:.0f} GFLOP/s), or of unavoidable writing over the "
        "speed of memory. Reproduce with `make bench`."
    )


def seconds(value: float) -> str:
    if value < 1e-3:
        return f"{value * 1e6:.0f} µs"
    return f"{value * 1e3:.3g} ms" if value < 1 else f"{value:.2f} s"


def mib(row: Record | None) -> str:
    peak = (row or {}).get("peak_bytes")
    if peak is None:
        return "–"
    return f"{peak / 2**20:.0f} MiB" if peak >= 2**20 else "< 1 MiB"


def chart(records: list[Record], path: Path) -> None:
    """One row a case: the median of every contender with its quartiles on a logarithmic axis, the floor as a bar."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 1.4 + 0.46 * len(records)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for row, record in enumerate(records):
        axes.axhline(row, color="#e6e6e6", linewidth=0.8, zorder=0)
        for contender in record["contenders"]:
            if "median" not in contender:
                continue
            color, marker = mark(contender["name"])
            axes.plot([contender["q1"], contender["q3"]], [row, row], color=color, linewidth=2, alpha=0.5, zorder=2)
            hollow = record["quantity"] == "solve" and "CG" in contender["name"]
            axes.plot(contender["median"], row, marker, color=color, markersize=7, markerfacecolor="white" if hollow else color, zorder=3)
        if record["floor"]:
            axes.plot(record["floor"]["seconds"], row, "|", color="black", markersize=15, markeredgewidth=2, zorder=4)
    axes.set_xscale("log")
    axes.set_yticks(range(len(records)), [f"{r['title']}\n{r['workload']}, N = {r['num_examples']}" for r in records], fontsize=7.5)
    axes.invert_yaxis()
    axes.set_xlabel("seconds per call (median and quartiles, log scale; left is better)")
    machine = records[0]["machine"]
    axes.set_title(f"{machine['cpu']}, {machine['cores']} cores", fontsize=10, loc="left")
    for _, color, marker, label in MARKS:
        axes.plot([], [], marker, color=color, label=label)
    if any(r["quantity"] == "solve" for r in records):
        axes.plot([], [], MARKS[0][2], color=MARKS[0][1], markerfacecolor="white", label="influence_ext, CG")
    axes.plot([], [], "|", color="black", markersize=12, markeredgewidth=2, label="floor")
    axes.legend(loc="upper center", bbox_to_anchor=(0.4, -0.1 - 0.4 / len(records)), ncols=6, frameon=False, fontsize=8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#eeeeee", zorder=0)
    with matplotlib.rc_context({"svg.hashsalt": "influence_ext", "svg.fonttype": "none"}):
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)


def mark(name: str) -> tuple[str, str]:
    return next((color, marker) for prefix, color, marker, _ in MARKS if name.startswith(prefix))


if __name__ == "__main__":
    raise SystemExit(main())
