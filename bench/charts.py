"""The records as charts: all contenders of each row, cost against size, and the solves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bench.contender import OURS
from bench.records import Record
from bench.tables import is_sweep, seconds

MARKS = (
    (OURS, "#1b6ca8", "o"),
    ("torch.func", "#e07b39", "s"),
    ("torch.compile", "#8a5fbf", "^"),
    ("curvlinops", "#5a9e6f", "D"),
    ("Opacus", "#b23a48", "v"),
    ("BackPACK", "#8c6d31", "P"),
    ("plain PyTorch", "#777777", "X"),
    ("as torch-influence", "#c25b9c", "<"),
    ("as pyDVL", "#2a9d9d", ">"),
)
LINE_COLORS = ("#1b6ca8", "#e07b39", "#5a9e6f", "#8a5fbf", "#b23a48")


def draw(records: list[Record], folder: Path) -> list[str]:
    """Write the charts that there are records for; their file names."""
    sweeps = [r for r in records if is_sweep(r) and r["linearity"]]
    solves = [r for r in records if r["quantity"] == "solve"]
    rows = [r for r in records if not is_sweep(r) and r["quantity"] != "solve"]
    wanted = (("rows.svg", chart, rows), ("scaling.svg", scaling, sweeps), ("solves.svg", bars, solves))
    written = []
    for name, function, chosen in wanted:
        if chosen:
            save(function(chosen), folder / name)
            written.append(name)
    return written


def save(figure: Figure, path: Path) -> None:
    """The same bytes from the same records."""
    FigureCanvasAgg(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "influence_ext", "svg.fonttype": "none"}):
        figure.savefig(path, dpi=150, metadata={"Date": None})


def chart(records: list[Record]) -> Figure:
    """One row a case: the median of every contender with its quartiles on a logarithmic axis, the floor as a bar."""
    figure = Figure(figsize=(9.5, 1.4 + 0.46 * len(records)), layout="constrained")
    axes = figure.add_subplot()
    seen: dict[str, tuple[str, str]] = {}
    for row, record in enumerate(records):
        axes.axhline(row, color="#e6e6e6", linewidth=0.8, zorder=0)
        for contender in record["contenders"]:
            if "median" not in contender:
                continue
            label, color, marker = mark(contender["name"])
            seen[label] = (color, marker)
            axes.plot([contender["q1"], contender["q3"]], [row, row], color=color, linewidth=2, alpha=0.5, zorder=2)
            axes.plot(contender["median"], row, marker, color=color, markersize=7, zorder=3)
        if (record["percent_of_floor"] or 0) >= 1:  # a floor further away would only stretch the axis
            axes.plot(record["floor"]["seconds"], row, "|", color="black", markersize=15, markeredgewidth=2, zorder=4)
    axes.set_xscale("log")
    axes.set_yticks(range(len(records)), [f"{r['title']}\n{r['workload']}, N = {r['num_examples']}" for r in records], fontsize=7.5)
    axes.invert_yaxis()
    axes.set_xlabel("seconds per call (median and quartiles, log scale; left is better)")
    title(axes, records)
    for label, (color, marker) in seen.items():
        axes.plot([], [], marker, color=color, label=label)
    axes.plot([], [], "|", color="black", markersize=12, markeredgewidth=2, label="floor")
    axes.legend(loc="upper center", bbox_to_anchor=(0.4, -0.1 - 0.4 / len(records)), ncols=5, frameon=False, fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#eeeeee", zorder=0)
    return figure


def scaling(records: list[Record]) -> Figure:
    """The cost of one example, and of one vector, relative to that at the largest size; the band is 10 %."""
    kinds = [(kind, label) for kind, label in (("sweep-n", "N"), ("sweep-v", "V")) if any(r["quantity"] == kind for r in records)]
    figure = Figure(figsize=(4.8 * len(kinds), 3.6), layout="constrained")
    for axes, (kind, label) in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        axes.axhspan(0.9, 1.1, color="#eeeeee", zorder=0)
        for color, record in zip(LINE_COLORS, (r for r in records if r["quantity"] == kind), strict=False):
            line = record["linearity"]
            units = [t / size for t, size in zip(line["seconds"], line["sizes"], strict=True)]
            name = record["workload"] if kind == "sweep-n" else f"{record['workload']}, N = {record['num_examples']}"
            axes.plot(line["sizes"], [u / units[-1] for u in units], "o-", color=color, label=name)
        axes.set_xscale("log", base=2)
        axes.set_ylim(bottom=0)
        axes.set_xlabel(label)
        axes.set_ylabel(f"cost / {label}, relative to the largest {label}")
        title(axes, records)
        axes.legend(frameon=False, fontsize=7.5)
    return figure


def bars(records: list[Record]) -> Figure:
    """Seconds of every contender, a panel for each system."""
    counts = [len(r["contenders"]) for r in records]
    figure = Figure(figsize=(9.5, 0.8 * len(records) + 0.28 * sum(counts)), layout="constrained")
    panels = figure.subplots(len(records), 1, squeeze=False, height_ratios=[n + 1.5 for n in counts])[:, 0]
    for axes, record in zip(panels, records, strict=True):
        rows = [c for c in record["contenders"] if "median" in c]
        rows.sort(key=lambda c: c["median"])
        names = [c["name"] for c in rows]
        axes.barh(names, [c["median"] for c in rows], color=[mark(name)[1] for name in names], height=0.65)
        for place, row in enumerate(rows):
            axes.text(row["median"], place, f" {seconds(row['median'])}", va="center", fontsize=8)
        axes.set_xscale("log")
        axes.margins(x=0.12)
        axes.invert_yaxis()
        axes.tick_params(axis="y", length=0, labelsize=8)
        axes.set_title(f"{record['title']} · {record['workload']}, N = {record['num_examples']}", fontsize=9, loc="left")
        axes.spines[["top", "right", "left"]].set_visible(False)
    panels[-1].set_xlabel("seconds to the same true residual (log scale; left is better)")
    return figure


def title(axes: Axes, records: list[Record]) -> None:
    machine: dict[str, Any] = records[0]["machine"]
    axes.set_title(f"{machine['cpu']}, {machine['cores']} cores", fontsize=10, loc="left")
    axes.spines[["top", "right", "left"]].set_visible(False)


def mark(name: str) -> tuple[str, str, str]:
    """Label, colour and marker of a contender."""
    return next(found for found in MARKS if name.startswith(found[0]))
