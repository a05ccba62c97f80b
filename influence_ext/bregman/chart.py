"""The bar chart of the five terms."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

COLORS = ("#4477aa", "#66ccee", "#228833", "#ccbb44", "#ee6677")
LOG_RATIO = 30.0
"""Linear axes hide bars this many times smaller than the largest."""

AXIS = {"output": "mean L2 distance of network outputs", "parameter": "L2 distance of parameters"}


def bar_chart(names: Sequence[str], values: Sequence[Sequence[float]], measure: str, title: str) -> Figure:
    """Bars of the means with the standard deviation as error bars and every removed set as a dot.

    The axis is logarithmic where the largest bar is over 30 times the smallest; there a lower error bar that would reach zero
    ends at the smallest dot.
    """
    means = [statistics.fmean(v) if v else 0.0 for v in values]
    spreads = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in values]
    positive = [m for m in means if m > 0]
    logarithmic = bool(positive) and max(positive) > LOG_RATIO * min(positive)
    lower = [min(s, m - min(v)) if logarithmic and v and s >= m else s for v, m, s in zip(values, means, spreads, strict=True)]
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    places = range(len(names))
    axes.bar(places, means, width=0.62, color=COLORS, zorder=2)
    axes.errorbar(places, means, yerr=[lower, spreads], fmt="none", ecolor="#333333", elinewidth=1.2, capsize=4, zorder=4)
    for place, found in zip(places, values, strict=True):
        offsets = [0.36 * ((k * 0.618034) % 1 - 0.5) for k in range(len(found))]
        axes.scatter([place + o for o in offsets], found, s=9, color="#222222", alpha=0.35, linewidths=0, zorder=3)
    if logarithmic:
        axes.set_yscale("log")
    axes.set_xticks(list(places), [f"{k + 1}. {name}".replace(" ", "\n").replace("\n", " ", 1) for k, name in enumerate(names)])
    axes.tick_params(axis="x", length=0, labelsize=8)
    axes.set_ylabel(AXIS[measure] + (" (log scale)" if logarithmic else ""))
    axes.set_title(title, fontsize=9, loc="left")
    axes.grid(axis="y", color="#dddddd", linewidth=0.7, zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    return figure
