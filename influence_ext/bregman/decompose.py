"""The five-term decomposition of the gap between influence and retraining."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from influence_ext import solvers
from influence_ext.bregman.checks import check_damping
from influence_ext.bregman.correlation import Correlation, correlate
from influence_ext.bregman.objective import Reference
from influence_ext.bregman.pbrf import linear_responses, solve_pbrf
from influence_ext.bregman.progress import Progress, reporter
from influence_ext.bregman.recipe import Run
from influence_ext.bregman.response import Response, TrainedNetwork, in_double
from influence_ext.bregman.retrain import Branches, removed_sets
from influence_ext.checks import is_one_of
from influence_ext.context import standalone
from influence_ext.data import load
from influence_ext.errors import ArgumentError, DataError
from influence_ext.files import check_path, whole_file
from influence_ext.plan import Plan
from influence_ext.solvers.base import check_solver

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS = ("cold_start", "warm_start", "proximal", "pbrf", "linearized_pbrf", "influence")
TERMS = ("warm-start gap", "proximity gap", "non-convergence gap", "linearization error", "solver error")
"""Term ``k`` is the distance between ``KINDS[k]`` and ``KINDS[k + 1]``."""

Measure = Literal["output", "parameter"]
MEASURES: tuple[Measure, ...] = ("output", "parameter")
NO_END_POINT = ("diverged", "training_diverged", "non_finite")
"""Statuses of a search or a training whose last point depends on where it was stopped."""
FORMAT = "influence_ext.decomposition/1"


@dataclass(frozen=True)
class Distance:
    """Between two responses: ``output`` is ``(1/N) Σ_i ‖f(θ, x_i) − f(θ', x_i)‖₂``, ``parameter`` is ``‖θ − θ'‖₂``."""

    output: float
    parameter: float


@dataclass(frozen=True, eq=False, repr=False)
class Decomposition:
    """The five terms of every removed set, with how well each branch was solved.

    Attributes:
        removed: The removed sets.
        terms: One dict a removed set: term name -> :class:`Distance`, in the paper's order.
        quality: One dict a removed set: kind of response -> ``status``, ``relative_gradient_norm``, ``relative_residual``,
            ``num_steps``, ``num_products`` and ``one_by_one``, why a set was trained by itself.
        protocol: Recipe, λ, ``N``, ``P``, solver and whether the branches were solved to convergence.
        responses: One dict a removed set: kind -> :class:`Response`; ``None`` after :meth:`load`.
    """

    removed: tuple[tuple[int, ...], ...]
    terms: tuple[dict[str, Distance], ...]
    quality: tuple[dict[str, dict[str, Any]], ...]
    protocol: dict[str, Any]
    responses: tuple[dict[str, Response], ...] | None = field(default=None, repr=False)

    def values(self, term: str, measure: Measure = "output") -> Tensor:
        """``[num_sets]`` in float64: one term's distance for every removed set, without those of :meth:`left_out`."""
        if not is_one_of(term, TERMS) or not is_one_of(measure, MEASURES):
            raise ArgumentError(
                f"Decomposition.values: expected a term of {', '.join(TERMS)} and measure 'output' or 'parameter', got {term!r} and "
                f"{measure!r}; correct the name."
            )
        failed = self.left_out(term)
        kept = [terms[term] for k, terms in enumerate(self.terms) if k not in failed]
        return torch.tensor([getattr(distance, measure) for distance in kept], dtype=torch.float64)

    def left_out(self, term: str) -> list[int]:
        """Positions of the removed sets where one side of the term has no end point: its search diverged, so no distance is defined."""
        if not is_one_of(term, TERMS):
            raise ArgumentError(f"Decomposition.left_out: expected a term of {', '.join(TERMS)}, got {term!r}; correct the name.")
        k = TERMS.index(term)
        return self._failed(KINDS[k], KINDS[k + 1])

    def mean(self, term: str, measure: Measure = "output") -> float:
        """Mean over the removed sets; NaN if there is none."""
        return float(self.values(term, measure).mean())

    def spread(self, term: str, measure: Measure = "output") -> float:
        """Sample standard deviation over the removed sets; 0 for a single one."""
        values = self.values(term, measure)
        return float(values.std()) if len(values) > 1 else 0.0

    def table(self) -> str:
        """The five terms as aligned plain text, mean ± spread over the removed sets, and how well each branch was solved."""
        header = ["#", "term", "between", "output distance", "parameter distance"]
        lines = [header]
        for k, term in enumerate(TERMS):
            defined = len(self.values(term)) > 0
            cells = [f"{self.mean(term, m):.3e} ± {self.spread(term, m):.1e}" if defined else "not defined" for m in MEASURES]
            lines.append([str(k + 1), term, f"{_words(KINDS[k])} - {_words(KINDS[k + 1])}", *cells])
        widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
        text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
        text.insert(1, "  ".join("-" * width for width in widths))
        return "\n".join([self.title(), "", *text, "", *(self._solved(kind) for kind in KINDS), *self._omissions()])

    def plot(self, path: str | Path, *, measure: Measure = "output") -> None:
        """A bar chart of the five terms with their spread over the removed sets, as in the paper; the format follows the suffix.

        Folders that are missing are made.
        """
        check_path(path, "Decomposition.plot").parent.mkdir(parents=True, exist_ok=True)
        self.figure(measure).savefig(path, dpi=150)

    def figure(self, measure: Measure = "output") -> Figure:
        """The chart of :meth:`plot` as a matplotlib figure."""
        from influence_ext.bregman.chart import bar_chart

        return bar_chart(TERMS, [self.values(term, measure).tolist() for term in TERMS], measure, self.title())

    def __repr__(self) -> str:
        return f"Decomposition({self.title()})"

    def __str__(self) -> str:
        return self.table()

    def title(self) -> str:
        """Network, ``N``, ``P``, λ and the number of removed sets in one line."""
        p = self.protocol
        sizes = {len(group) for group in self.removed}
        s, a = ("", "a ") if len(self.removed) == 1 else ("s", "")
        what = f"single example{s}" if sizes == {1} else f"group{s} of {min(sizes)}" + (f" to {max(sizes)}" if len(sizes) > 1 else "")
        decay = f" + weight decay {p['recipe']['weight_decay']:g}" if p["recipe"]["weight_decay"] else ""
        return (
            f"{p['network']}: N = {p['num_examples']}, P = {p['num_parameters']}, damping {p['damping']:g}{decay}, "
            f"{len(self.removed)} removal{s} of {a}{what}"
        )

    def correlations(self, test_data: Any) -> dict[str, Correlation]:
        r"""How the influence estimate of test-loss changes agrees with what each response really does.

        The prediction for test example ``t`` is ``∇ℓ_tᵀ (θ_influence − θs)``; the change itself is ``ℓ_t(response) − ℓ_t(θs)``.
        Removed sets whose response or influence estimate diverged are left out.

        Args:
            test_data: ``(X, y)`` or a re-iterable of batches; ``n`` examples.

        Returns:
            kind of response -> :class:`Correlation`, over ``[num_sets, n]`` values.

        Raises:
            ArgumentError: this decomposition was loaded from a file, which holds no parameters.
            DataError, ShapeError, DTypeError: the test data are unusable, or do not fit the network or the loss.

        Cost:
            One forward pass over the test data per response, one tangent sweep per removed set.
        """
        if self.responses is None:
            raise ArgumentError(
                "Decomposition.correlations: expected the responses' parameters, got a decomposition loaded from a file, which holds "
                "numbers only; call correlations on the result of decompose."
            )
        examples = load(test_data, who="Decomposition.correlations")
        network = self.responses[0]["influence"].network
        exact = in_double(examples)
        tape = Plan.of(network.exact_model, exact.X, who="Decomposition.correlations").linearize(exact.X, network.exact_theta)
        network.loss.check(tape.outputs, exact.targets, "Decomposition.correlations")
        g = network.loss.gradient(tape.outputs, exact.targets)
        steps = torch.stack([responses["influence"].displacement for responses in self.responses])
        predicted = (tape.jvp(steps) * g).reshape(len(steps), tape.num_examples, -1).sum(dim=2)
        base = network.losses_at(network.exact_theta, examples)
        found = {}
        for kind in KINDS:
            kept = [k for k in range(len(self.removed)) if k not in self._failed(kind, "influence")]
            responses = [self.responses[k][kind] for k in kept]
            changes = [network.losses_at(r.exact_params, examples, r.buffers) - base for r in responses]
            found[kind] = correlate(predicted[kept], torch.stack(changes) if changes else predicted[:0])
        return found

    def save(self, path: str | Path) -> None:
        """Write protocol, terms and quality as JSON; folders that are missing are made. The file appears whole or not at all."""
        content = {
            "format": FORMAT,
            "protocol": self.protocol,
            "removed": [list(group) for group in self.removed],
            "terms": [{name: asdict(distance) for name, distance in terms.items()} for terms in self.terms],
            "quality": list(self.quality),
            "summary": {
                term: {m: {"mean": _number(self.mean(term, m)), "spread": self.spread(term, m)} for m in MEASURES} for term in TERMS
            },
        }
        with whole_file(check_path(path, "Decomposition.save")) as file:
            file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Decomposition:
        """Read what :meth:`save` wrote.

        Raises:
            ArgumentError: ``path`` is none.
            DataError: the file is missing or holds something else.
        """
        source = check_path(path, "Decomposition.load")
        try:
            content = json.loads(source.read_text(encoding="utf-8"))
            if content["format"] != FORMAT:
                raise KeyError("format")
            return cls(
                tuple(tuple(group) for group in content["removed"]),
                tuple({name: Distance(**d) for name, d in terms.items()} for terms in content["terms"]),
                tuple(content["quality"]),
                content["protocol"],
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"Decomposition.load: expected a file written by Decomposition.save ({FORMAT}), got {path} ({type(error).__name__}); check "
                "the path."
            ) from error

    def _failed(self, *kinds: str) -> list[int]:
        """Positions of the removed sets where one of the responses has no end point."""
        return [k for k, quality in enumerate(self.quality) if any(quality[kind]["status"] in NO_END_POINT for kind in kinds)]

    def _omissions(self) -> list[str]:
        counts = {k + 1: len(self.left_out(term)) for k, term in enumerate(TERMS)}
        return [f"term {k}: {count} of {len(self.removed)} removals left out" for k, count in counts.items() if count]

    def _solved(self, kind: str) -> str:
        reports = [quality[kind] for quality in self.quality]
        counts: dict[str, int] = {}
        for report in reports:
            counts[report["status"]] = counts.get(report["status"], 0) + 1
        line = f"{_words(kind)}: " + ", ".join(f"{count} {status}" for status, count in counts.items())
        for name, label in (
            ("relative_gradient_norm", "relative gradient norm"),
            ("relative_residual", "relative residual"),
        ):
            found = [report[name] for report in reports if report[name] is not None]
            if found:
                line += f"; {label} at most {max(found):.1e}"
        return line


@standalone
@torch.inference_mode(False)
def decompose(
    run: Run,
    remove: Iterable[Iterable[int]],
    damping: float = 1e-3,
    solver: solvers.Solver | None = None,
    *,
    epochs: int | None = None,
    converge: bool = False,
    rtol: float | None = None,
    max_steps: int = 200,
    memory_budget: int | None = None,
    progress: bool | Progress = False,
) -> Decomposition:
    r"""Split the gap between the influence estimate and cold-start retraining into the paper's five terms.

    For every removed set: cold start, warm start, proximal response, PBRF, linearised PBRF and the influence estimate, and the distance
    from each to the next.

    Args:
        run: The base run.
        remove: The removed sets, each a list of indices; the spread is over them.
        damping: λ.
        solver: Of the influence estimate; ``None`` is :class:`~influence_ext.solvers.LiSSA` with its defaults.
        epochs: Epochs of the branches after the first ``K``; ``None`` is ``K/2``.
        converge: Solve the retraining branches to convergence instead.
        rtol: Goal of the PBRF (and of ``converge``) for the relative gradient norm; ``None`` is 1e-6 in float64, 1e-4 in float32.
        max_steps: Bound on Newton steps.
        memory_budget: Bytes that sets in training may take together; see :func:`retrain_many`.
        progress: ``True`` for a line on stderr, or a function ``(label, done, total)``; ``total`` counts the responses found.

    Returns:
        The decomposition. A branch that misses its goal is reported in ``quality`` and in the table, and the others go on.

    Raises:
        ArgumentError: no set, an empty set, an index out of range or repeated, ``λ + w`` not positive or beyond what SGD's steps bear (see
            :func:`proximal_response`), or an option that makes no sense.
        DataError, UnsupportedModelError, UnsupportedLossError: see :func:`pbrf`.
        DivergenceError: a retraining branch left the finite numbers.

    Cost:
        Per removed set ``2.5 K`` epochs of training, the sets together as in :func:`retrain_many`, and one PBRF; two linear solves for all
        sets; one tape more than a PBRF.

    Reference:
        Bae et al. 2022, section 3 and figure 1.
    """
    groups = removed_sets(run, remove, who="decompose", allow_empty=False)
    check_damping(damping, run.recipe.weight_decay, who="decompose")
    check_solver(solver, "decompose")
    network = TrainedNetwork.of(run, None, None, who="decompose")
    reference = Reference(network)
    branches = Branches(
        run,
        who="decompose",
        epochs=epochs,
        converge=converge,
        rtol=rtol,
        max_steps=max_steps,
        memory_budget=memory_budget,
        reference=reference,
    )
    branches.check_proximity(damping)
    solver = solvers.LiSSA() if solver is None else solver
    report, done, total = reporter(progress, "decompose"), 0, len(groups) * len(KINDS)

    def part(name: str) -> Progress:
        """Epochs of all sets as responses found, counted from ``done`` on."""
        return lambda label, step, steps: report(name, done + len(groups) * step // steps, total)

    report("linearized PBRF", 0, total)
    exact = linear_responses(reference, groups, damping + network.weight_decay, None, "linearized_pbrf")
    report("influence estimate", len(groups), total)
    estimates = linear_responses(reference, groups, damping + network.weight_decay, solver, "influence")
    done = 2 * len(groups)
    cold = branches.cold(groups, part("cold-start retraining"))
    done += len(groups)
    warm = branches.warm(groups, part("warm-start retraining"))
    done += len(groups)
    proximal = branches.proximal(groups, damping, part("proximal response"))
    done += len(groups)
    minima: list[Response] = []
    for group, linear in zip(groups, exact, strict=True):
        report("PBRF", done + len(minima), total)
        minima.append(solve_pbrf(reference, group, damping, rtol=rtol, max_steps=max_steps, first_step=linear.displacement))
    found = [dict(zip(KINDS, row, strict=True)) for row in zip(cold, warm, proximal, minima, exact, estimates, strict=True)]
    report("decompose", total, total)
    protocol = {
        "network": type(run.model).__name__,
        "num_examples": network.num_examples,
        "num_parameters": network.space.num_parameters,
        "damping": float(damping),
        "solver": type(solver).__name__,
        "converge": bool(converge),
        "epochs": None if epochs is None else int(epochs),
        "recipe": run.recipe.describe(),
    }
    return Decomposition(
        tuple(groups),
        tuple(_terms(responses) for responses in found),
        tuple({kind: _quality(responses[kind]) for kind in KINDS} for responses in found),
        protocol,
        tuple(found),
    )


def _terms(responses: dict[str, Response]) -> dict[str, Distance]:
    found = {}
    for term, first, second in zip(TERMS, KINDS[:-1], KINDS[1:], strict=True):
        a, b = responses[first], responses[second]
        found[term] = Distance(a.output_distance(b), a.parameter_distance(b))
    return found


def _quality(response: Response) -> dict[str, Any]:
    return {
        "status": response.status.value,
        "relative_gradient_norm": _number(response.relative_gradient_norm),
        "relative_residual": _number(response.relative_residual),
        "num_steps": response.num_steps,
        "num_products": response.num_products,
        "one_by_one": response.one_by_one,
    }


def _number(x: float | None) -> float | None:
    """JSON has no NaN and no infinity."""
    return x if x is not None and math.isfinite(x) else None


def _words(kind: str) -> str:
    return {"pbrf": "PBRF", "linearized_pbrf": "linearized PBRF"}.get(kind, kind.replace("_", " "))
