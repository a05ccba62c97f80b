"""The demo's plots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from influence_ext.bregman.chart import bar_chart
from influence_ext.cli.experiments import Detection, Neighbours, Terms, Trained

HELPFUL, HARMFUL, MISLABELLED = "#1b6ca8", "#c8553d", "#e0a100"
RESPONSES = {"pbrf": ("PBRF", "#1b6ca8"), "cold_start": ("cold-start retraining", "#c8553d")}
RANKINGS = {"self-influence": ("#1b6ca8", "-"), "training loss": ("#5a9e6f", "--"), "random (expected)": ("#888888", ":")}


def five_terms(terms: Terms, path: Path) -> None:
    """Bars of the five terms, mean output distance and spread over the removed points."""
    decomposition = terms.decomposition
    names = list(decomposition.terms[0])
    values = [decomposition.values(name).tolist() for name in names]
    removed = f", {len(decomposition.removed)} removed points"
    _save(bar_chart(names, values, "output", terms.trained.title + removed), path)


def correlations(terms: Terms, path: Path) -> None:
    """What influence predicts for the test losses against what the PBRF and cold-start retraining do."""
    figure = _figure(9.0, 4.6)
    for column, (kind, (label, color)) in enumerate(RESPONSES.items()):
        axes = figure.add_subplot(1, 2, column + 1)
        found = terms.correlations[kind]
        predicted, actual = found.predicted.flatten().tolist(), found.actual.flatten().tolist()
        axes.scatter(predicted, actual, s=7, color=color, alpha=0.35, linewidths=0, rasterized=True)
        limits = [min(predicted, default=0.0), max(predicted, default=0.0)]
        axes.plot(limits, limits, color="#444444", linewidth=1, linestyle="--", label="prediction = truth")
        axes.set_xlabel("rise of a test loss predicted by influence")
        axes.set_ylabel(f"actual rise, {label}")
        axes.set_title(f"{label}: Spearman {found.spearman:.2f}, Pearson {found.pearson:.2f}", fontsize=10, loc="left")
        axes.legend(frameon=False, fontsize=8, loc="upper left")
        for axis in (axes.xaxis, axes.yaxis):
            axis.get_offset_text().set_fontsize(8)
        axes.ticklabel_format(style="sci", scilimits=(-2, 2))
        _tidy(axes)
    figure.suptitle(
        f"{terms.trained.title}\n(one dot a removed point and test example; correlations are means over test examples)", fontsize=9
    )
    _save(figure, path)


def detection(found: Detection, trained: Trained, path: Path) -> None:
    """Fraction of the mislabelled examples found against the fraction inspected."""
    figure = _figure(5.6, 4.4)
    axes = figure.add_subplot()
    for name, curve in found.curves.items():
        color, style = RANKINGS[name]
        N = len(curve) - 1
        axes.plot(
            [k / N for k in range(N + 1)],
            curve.tolist(),
            color=color,
            linestyle=style,
            linewidth=2,
            label=f"{name}: {found.found[name]:.0%}",
        )
    axes.axvline(found.inspected, color="#bbbbbb", linewidth=1)
    axes.set_xlabel("fraction of the training set inspected")
    axes.set_ylabel("fraction of the mislabelled examples found")
    axes.set_title(f"{len(found.flipped)} planted mislabels\n{trained.title}", fontsize=9, loc="left")
    axes.legend(frameon=False, title=f"found in the first {found.inspected:.0%}", fontsize=9, loc="lower right")
    axes.set(xlim=(0, 1), ylim=(0, 1.02))
    _tidy(axes)
    _save(figure, path)


def image_grid(rows: Sequence[Neighbours], trained: Trained, flipped: set[int], path: Path) -> None:
    """One row a test image: the image, its most helpful and its most harmful training images; mislabelled ones are framed."""
    data = trained.data
    assert data.image_shape is not None
    k = len(rows[0].helpful)
    figure = _figure(1.05 * (2 * k + 2.2), 1.4 * len(rows) + 1.0)
    grid = figure.add_gridspec(len(rows), 2 * k + 3, width_ratios=[1.15, 0.25, *[1] * k, 0.25, *[1] * k])
    predicted = trained.predictions(trained.outputs(data.X_test))
    for r, row in enumerate(rows):
        axes = figure.add_subplot(grid[r, 0])
        axes.imshow(data.X_test[row.test].reshape(data.image_shape).numpy(), cmap="gray_r")
        truth, guess = data.label(data.y_test[row.test]), data.label(predicted[row.test])
        _frame(axes, "black", 1.2)
        axes.set_title(f"test: {truth}, read as {guess}", fontsize=8)
        for offset, color, found in ((2, HELPFUL, row.helpful), (3 + k, HARMFUL, row.harmful)):
            for column, (i, score) in enumerate(found):
                axes = figure.add_subplot(grid[r, offset + column])
                axes.imshow(data.X[i].reshape(data.image_shape).numpy(), cmap="gray_r")
                axes.set_title(f"“{data.label(data.y[i])}”  {score:+.1e}", fontsize=7, color=color)
                _frame(axes, MISLABELLED if i in flipped else "#cccccc", 3.0 if i in flipped else 0.8)
    figure.suptitle(
        f"{trained.title}\nleft: test images; then the training images that help most and those that harm most, with their label "
        "and score (yellow frame: planted mislabel)",
        fontsize=9,
    )
    _save(figure, path)


def _frame(axes: Axes, color: str, width: float) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color(color)
        spine.set_linewidth(width)


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#eeeeee", linewidth=0.7)
    axes.set_axisbelow(True)


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=150)
