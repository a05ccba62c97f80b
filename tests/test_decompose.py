"""The five-term decomposition: the distances are what they say, each solve happens once, and the numbers survive a file."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor, nn
from torch.func import functional_call

import influence_ext as ie
from influence_ext import reference
from influence_ext.bregman.chart import bar_chart
from influence_ext.bregman.correlation import correlate, ranks
from influence_ext.bregman.decompose import KINDS, TERMS, Decomposition, Distance
from influence_ext.errors import ArgumentError, DataError, ShapeError
from influence_ext.files import whole_file
from influence_ext.losses import HalfMSE
from influence_ext.testing import assert_close
from tests.cases import generator

F64 = torch.float64
N = 24
GROUPS = [[2], [7], [11, 19]]
DAMPING = 0.05


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2)).double()


def data(count: int = N, key: str = "decompose") -> tuple[Tensor, Tensor]:
    g = generator(key)
    X = torch.randn(count, 3, generator=g, dtype=F64)
    return X, torch.sin(X[:, :2]) + 0.2 * torch.randn(count, 2, generator=g, dtype=F64)


RECIPE = ie.Recipe(mlp, nn.MSELoss(), lr=0.1, weight_decay=0.01, epochs=6, batch_size=7, seed=2)


@pytest.fixture(scope="module")
def run() -> ie.Run:
    return ie.train(RECIPE, data())


@pytest.fixture(scope="module")
def found(run: ie.Run) -> Decomposition:
    return ie.decompose(run, GROUPS, DAMPING, ie.solvers.LiSSA(num_steps=20))


def test_distances_are_those_of_plain_forward_passes(run: ie.Run, found: Decomposition) -> None:
    X, _ = data()
    assert found.responses is not None
    for terms, responses in zip(found.terms, found.responses, strict=True):
        assert tuple(terms) == TERMS
        for term, a, b in zip(TERMS, KINDS[:-1], KINDS[1:], strict=True):
            z, z_other = (functional_call(run.model, responses[kind].named_params, X).detach() for kind in (a, b))
            assert terms[term].output == pytest.approx(float((z - z_other).norm(dim=1).mean()), rel=1e-8)
            distance = float((responses[a].params - responses[b].params).norm())
            assert terms[term].parameter == pytest.approx(distance, rel=1e-8)


def test_branches_are_those_of_the_single_functions(run: ie.Run, found: Decomposition) -> None:
    assert found.responses is not None
    for group, responses in zip(GROUPS, found.responses, strict=True):
        assert_close(responses["cold_start"].params, ie.retrain(run, group, start="cold").params)
        assert_close(responses["warm_start"].params, ie.retrain(run, group, start="warm").params)
        assert_close(responses["proximal"].params, ie.proximal_response(run, group, DAMPING).params)
        length = float(responses["pbrf"].displacement.norm())
        by_itself = ie.pbrf(run, remove=group, damping=DAMPING)
        assert float((by_itself.params - responses["pbrf"].params).norm()) < 1e-5 * length
        oracle = reference.parameter_change(run.model, nn.functional.mse_loss, data(), group, DAMPING + RECIPE.weight_decay)
        exact = responses["linearized_pbrf"].displacement
        assert float((exact - oracle).norm()) < 1e-8 * float(oracle.norm())
        assert {kind: response.kind for kind, response in responses.items()} == {kind: kind for kind in KINDS}


def test_sets_trained_one_by_one_are_reported() -> None:
    recipe = replace(RECIPE, build_model=lambda: nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.2), nn.Linear(4, 2)).double(), epochs=2)
    found = ie.decompose(ie.train(recipe, data()), [[1], [2]], DAMPING)
    for quality in found.quality:
        for kind in ("cold_start", "warm_start", "proximal"):
            assert "dropout" in quality[kind]["one_by_one"]
        assert all(quality[kind]["one_by_one"] is None for kind in ("pbrf", "linearized_pbrf", "influence"))


def test_mean_and_spread_over_the_removed_sets(found: Decomposition) -> None:
    for term in TERMS:
        for measure in ("output", "parameter"):
            values = [getattr(terms[term], measure) for terms in found.terms]
            assert found.mean(term, measure) == pytest.approx(np.mean(values))
            assert found.spread(term, measure) == pytest.approx(np.std(values, ddof=1))


@dataclass(frozen=True)
class Counting(ie.solvers.Direct):
    """Direct, with a list of the shapes it was asked for."""

    calls: tuple[list[Any], ...] = ([],)

    def solve(self, operator: Any, B: Tensor) -> ie.solvers.Solution:
        self.calls[0].append(tuple(B.shape))
        return super().solve(operator, B)


def test_all_removed_sets_are_solved_for_in_one_call(run: ie.Run) -> None:
    solver = Counting(calls=([],))
    found = ie.decompose(run, GROUPS, DAMPING, solver)
    assert solver.calls[0] == [(len(GROUPS), len(run.params))]
    assert found.mean("solver error", "parameter") < 1e-8  # Direct is exact
    assert found.protocol["solver"] == "Counting"


def test_more_solver_steps_mean_less_solver_error_and_change_nothing_else(run: ie.Run, found: Decomposition) -> None:
    better = ie.decompose(run, GROUPS, DAMPING, ie.solvers.LiSSA(num_steps=400))
    for few, many in zip(found.terms, better.terms, strict=True):
        assert many["solver error"].output < 0.5 * few["solver error"].output
        assert all(many[term] == few[term] for term in TERMS[:-1])


def test_at_a_minimum_of_a_linear_model_the_proximal_response_is_the_pbrf() -> None:
    # There J(θ) = J(θs) + c Σ D_i, so the two objectives are one; and warm start is Sherman-Morrison from any start.
    recipe = ie.Recipe(lambda: nn.Linear(3, 1, bias=False).double(), HalfMSE(), lr=0.3, momentum=0.0, epochs=400, batch_size=N)
    X, y = data()
    run = ie.train(recipe, (X, y[:, :1]))
    found = ie.decompose(run, [[1], [4]], 0.02, ie.solvers.Direct(), converge=True, rtol=1e-10)
    for terms in found.terms:
        assert terms["non-convergence gap"].parameter < 1e-8
        assert terms["warm-start gap"].parameter < 1e-8  # convex: both starts reach the one minimum
        assert terms["proximity gap"].parameter > 1e-5
        assert terms["linearization error"].parameter > 1e-5  # εh of the influence, though the model is linear
        assert terms["solver error"].parameter < 1e-9
    assert found.protocol["converge"] is True


def test_table(found: Decomposition) -> None:
    lines = found.table().splitlines()
    assert lines[0] == "Sequential: N = 24, P = 38, damping 0.05 + weight decay 0.01, 3 removals of groups of 1 to 2"
    header = lines[2]
    for k, term in enumerate(TERMS):
        row = lines[4 + k]
        assert row.startswith(f"{k + 1}  {term} ")
        assert row[header.index("output distance") :].startswith(f"{found.mean(term):.3e} ± {found.spread(term):.1e}")
        assert row[header.index("parameter distance") :] == f"{found.mean(term, 'parameter'):.3e} ± {found.spread(term, 'parameter'):.1e}"
    assert "PBRF: 3 converged; relative gradient norm at most" in found.table()
    assert "cold start: 3 trained" in found.table()
    assert "influence: 3 truncated; relative residual at most" in found.table()
    assert all(line == line.rstrip() for line in lines)


def test_the_title_counts(found: Decomposition) -> None:
    one = dataclasses.replace(found, removed=found.removed[:1])
    assert one.title().endswith("1 removal of a single example")
    assert dataclasses.replace(found, removed=found.removed[2:]).title().endswith("1 removal of a group of 2")


def test_saved_and_loaded(found: Decomposition, tmp_path: Path) -> None:
    path = tmp_path / "terms.json"
    found.save(path)
    loaded = Decomposition.load(path)
    assert loaded.table() == found.table()
    assert loaded.removed == found.removed == ((2,), (7,), (11, 19))
    assert loaded.terms == found.terms
    assert loaded.protocol == found.protocol
    content = json.loads(path.read_text())
    assert content["protocol"]["recipe"]["epochs"] == 6
    assert content["protocol"]["recipe"]["branch_epochs"] == 3
    assert content["summary"]["proximity gap"]["output"]["mean"] == pytest.approx(found.mean("proximity gap"))
    with pytest.raises(ArgumentError, match="got a decomposition loaded from a file"):
        loaded.correlations(data())


def test_numbers_of_numpy_are_numbers(tmp_path: Path) -> None:
    run = ie.train(replace(RECIPE, epochs=1), data())
    found = ie.decompose(run, [[np.int64(2)]], np.float32(0.5), epochs=np.int64(2), max_steps=np.int32(50), rtol=np.float32(1e-3))
    found.save(tmp_path / "terms.json")
    assert Decomposition.load(tmp_path / "terms.json").protocol == found.protocol
    assert found.protocol["epochs"] == 2
    by_numpy, by_python = (ie.pbrf(run, remove=[2], damping=0.5, epsilon=epsilon) for epsilon in (np.float32(2**-5), 2**-5))
    assert torch.equal(by_numpy.params, by_python.params)


def test_a_missing_file_is_told_and_a_missing_folder_made(found: Decomposition, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"Decomposition\.load: .* got .*nowhere\.json \(FileNotFoundError\); check the path"):
        Decomposition.load(tmp_path / "nowhere.json")
    found.save(tmp_path / "a" / "b" / "terms.json")
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["terms.json"]


def test_files_appear_whole_or_not_at_all(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.touch()
    permissions = target.stat().st_mode
    link.symlink_to(target)
    with whole_file(link) as first, whole_file(target) as second:  # at once
        second.write_text("second")
        first.write_text("first")
        assert target.read_text() == ""
    assert link.is_symlink()
    assert target.read_text() == "first"
    with pytest.raises(TypeError), whole_file(target) as file:
        file.write_text(None)  # type: ignore[arg-type]
    assert target.read_text() == "first"
    assert target.stat().st_mode == permissions
    assert set(tmp_path.iterdir()) == {link, target}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "other"}', '{"format": "influence_ext.decomposition/1"}'])
def test_other_files_are_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(DataError, match=r"Decomposition\.load: expected a file written by Decomposition\.save"):
        Decomposition.load(path)


def test_correlations_are_those_of_scipy(run: ie.Run, found: Decomposition) -> None:
    X, y = data(5, "test set")
    assert found.responses is not None
    theta_s = found.responses[0]["pbrf"].network.theta
    base = ((run.model(X) - y) ** 2).mean(dim=1)
    gradients = torch.stack(
        [torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(run.model.parameters()), retain_graph=True)]) for loss in base]
    )
    predicted = torch.stack([gradients @ (r["influence"].params - theta_s) for r in found.responses])
    correlations = found.correlations((X, y))
    assert tuple(correlations) == KINDS
    for kind, correlation in correlations.items():
        actual = []
        for responses in found.responses:
            z = functional_call(run.model, responses[kind].named_params, X)
            actual.append((((z - y) ** 2).mean(dim=1) - base).detach())
        changes = torch.stack(actual)
        assert_close(correlation.predicted, predicted.detach(), factor=1e3, because="the displacement cancels")
        assert_close(correlation.actual, changes, scale=1.0)
        pearson = [scipy.stats.pearsonr(predicted[:, t].detach(), changes[:, t]).statistic for t in range(5)]
        spearman = [scipy.stats.spearmanr(predicted[:, t].detach(), changes[:, t]).statistic for t in range(5)]
        assert correlation.pearson_by_test.tolist() == pytest.approx(pearson, abs=1e-8)
        assert correlation.spearman_by_test.tolist() == pytest.approx(spearman, abs=1e-12)
        assert correlation.pearson == pytest.approx(np.mean(pearson), abs=1e-8)
        assert correlation.spearman == pytest.approx(np.mean(spearman), abs=1e-12)
        pooled = (predicted.detach().reshape(-1), changes.reshape(-1))
        assert correlation.pearson_pooled == pytest.approx(scipy.stats.pearsonr(*pooled).statistic, abs=1e-8)
        assert correlation.spearman_pooled == pytest.approx(scipy.stats.spearmanr(*pooled).statistic, abs=1e-12)
        assert correlation.num_sets == 3
    assert correlations["influence"].pearson > 0.9


def test_ranks_share_ties_and_constants_have_no_correlation() -> None:
    values = torch.tensor([[3.0, 1.0], [1.0, 1.0], [3.0, 1.0], [-2.0, 1.0]], dtype=F64)
    assert ranks(values)[:, 0].tolist() == [2.5, 1.0, 2.5, 0.0]
    found = correlate(values, values)
    assert found.pearson_by_test[0] == pytest.approx(1.0)
    assert math.isnan(found.pearson_by_test[1])
    assert found.pearson == pytest.approx(1.0)  # the undefined one is left out


def synthetic(statuses: list[str]) -> Decomposition:
    """Terms 1, 2, 3, ... for the removed sets in turn, the PBRF with the given statuses."""
    quality = {"relative_gradient_norm": 1e-7, "relative_residual": None, "num_steps": 3, "num_products": 9}
    return Decomposition(
        tuple((k,) for k in range(len(statuses))),
        tuple({term: Distance(k + 1.0, 10.0 * (k + 1)) for term in TERMS} for k in range(len(statuses))),
        tuple({kind: quality | {"status": status if kind == "pbrf" else "converged"} for kind in KINDS} for status in statuses),
        {"network": "Net", "num_examples": 9, "num_parameters": 5, "damping": 0.1, "recipe": {"weight_decay": 0.0}},
    )


def test_a_response_that_diverged_has_no_distance() -> None:
    found = synthetic(["converged", "diverged", "stalled", "non_finite"])
    assert found.values("proximity gap").tolist() == [1.0, 2.0, 3.0, 4.0]
    for term in ("non-convergence gap", "linearization error"):
        assert found.values(term).tolist() == [1.0, 3.0]
        assert found.left_out(term) == [1, 3]
        assert found.mean(term, "parameter") == 20.0
    assert "term 3: 2 of 4 removals left out\nterm 4: 2 of 4 removals left out" in found.table()
    assert "PBRF: 1 converged, 1 diverged, 1 stalled, 1 non_finite" in found.table()


def test_nothing_left_still_prints_and_saves(tmp_path: Path) -> None:
    found = synthetic(["diverged"])
    assert math.isnan(found.mean("linearization error"))
    assert found.spread("proximity gap") == 0.0
    found.save(tmp_path / "none.json")
    assert json.loads((tmp_path / "none.json").read_text())["summary"]["linearization error"]["output"]["mean"] is None
    found.plot(tmp_path / "none.png")
    text = str(Decomposition.load(tmp_path / "none.json"))
    assert "PBRF - linearized PBRF       not defined" in text
    assert "nan" not in text


def test_plot_writes_a_chart_and_leaves_pyplot_alone(found: Decomposition, tmp_path: Path) -> None:
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    found.plot(tmp_path / "terms.png")
    found.plot(tmp_path / "terms.svg", measure="parameter")
    assert (tmp_path / "terms.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "terms.svg").read_text()[:1000]
    assert plt.get_fignums() == before


def test_the_axis_is_logarithmic_where_bars_would_vanish() -> None:
    close = bar_chart(TERMS, [[1.0, 1.2], [0.8, 0.9], [0.5, 0.4], [0.3, 0.3], [0.2, 0.1]], "output", "close")
    far = bar_chart(TERMS, [[1.0, 1.2], [0.8, 0.9], [0.5, 0.4], [1e-3, 4e-3], [1e-4, 1e-3]], "parameter", "far")
    for figure, scale in ((close, "linear"), (far, "log")):
        axes = figure.axes[0]
        assert axes.get_yscale() == scale
        heights = [patch.get_height() for patch in axes.patches]
        assert len(heights) == 5
        assert heights[0] == pytest.approx(1.1)
        labels = [label.get_text().replace("\n", " ") for label in axes.get_xticklabels()]
        assert labels == [f"{k + 1}. {term}" for k, term in enumerate(TERMS)]
    assert far.axes[0].get_ylim()[0] > 0
    assert "parameters (log scale)" in far.axes[0].get_ylabel()


def test_progress_counts_responses(run: ie.Run) -> None:
    seen: list[tuple[str, int, int]] = []
    ie.decompose(run, GROUPS[:2], DAMPING, ie.solvers.Direct(), progress=lambda *args: seen.append(args))
    assert all(total == 12 for _, _, total in seen)
    counts = [done for _, done, _ in seen]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (0, 12)
    assert {"cold-start retraining", "warm-start retraining", "proximal response", "PBRF"} <= {label for label, _, _ in seen}


def test_progress_of_convergence_never_goes_back(run: ie.Run) -> None:
    seen: list[tuple[str, int, int]] = []
    ie.decompose(run, GROUPS[:2], DAMPING, ie.solvers.Direct(), converge=True, progress=lambda *args: seen.append(args))
    counts = [done for _, done, _ in seen]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (0, 12)


def test_an_interruption_leaves_the_run_as_it_was(run: ie.Run) -> None:
    def stop(label: str, done: int, total: int) -> None:
        if label == "PBRF":
            raise KeyboardInterrupt

    before = [torch.get_rng_state(), run.params.clone(), *(p.detach().clone() for p in run.model.parameters())]
    with pytest.raises(KeyboardInterrupt):
        ie.decompose(run, GROUPS, DAMPING, progress=stop)
    now = [torch.get_rng_state(), run.params, *(p.detach() for p in run.model.parameters())]
    assert all(torch.equal(a, b) for a, b in zip(before, now, strict=True))
    assert not run.model.training


def test_a_float32_network_is_measured_in_float64(run: ie.Run) -> None:
    single = ie.train(replace(RECIPE, dtype=torch.float32), data())
    found = ie.decompose(single, GROUPS[:1], DAMPING, ie.solvers.CG(rtol=1e-6))
    double = ie.decompose(run, GROUPS[:1], DAMPING, ie.solvers.CG(rtol=1e-6))
    for term in TERMS[:4]:
        assert found.mean(term) == pytest.approx(double.mean(term), rel=2e-2)
    assert found.mean("solver error") < 1e-3 * found.mean("linearization error")


ERRORS: dict[str, tuple[Any, str]] = {
    "none": ([], "decompose: expected remove to be a list of removed sets, each a list of indices, got none"),
    "flat": ([3, 17], r"got 3; write remove=\[\[3\], \[17\]\]"),
    "empty": ([[1], []], "decompose: expected remove to name at least one example, got none"),
    "range": ([[1], [N]], f"decompose: expected example indices from 0 to {N - 1}, got {N}"),
    "repeated": ([[5, 5]], "decompose: expected every index once, got 5 twice"),
    "all": ([range(N)], "expected remove to leave at least one training example"),
}


@pytest.mark.parametrize("row", ERRORS)
def test_removed_sets_that_make_no_sense(row: str, run: ie.Run) -> None:
    remove, message = ERRORS[row]
    with pytest.raises(ArgumentError, match=message):
        ie.decompose(run, remove, DAMPING)


def test_arguments_that_make_no_sense(run: ie.Run, found: Decomposition) -> None:
    with pytest.raises(ArgumentError, match="decompose: expected a Run, got Sequential"):
        ie.decompose(mlp(), [[1]])  # type: ignore[arg-type]
    undamped = ie.train(replace(RECIPE, weight_decay=0.0, epochs=1), data())
    with pytest.raises(ArgumentError, match=r"decompose: expected damping \+ weight_decay > 0"):
        ie.decompose(undamped, [[1]], damping=0.0)
    with pytest.raises(ArgumentError, match=r"decompose: expected solver .* got 'lissa'; pass an instance"):
        ie.decompose(run, [[1]], DAMPING, solver="lissa")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"Decomposition\.left_out: expected a term of warm-start gap, .* got 'gap'"):
        found.left_out("gap")
    with pytest.raises(ShapeError, match=r"Decomposition\.correlations: expected targets shaped like the outputs"):
        found.correlations((data()[0], data()[1][:, :1]))
    with pytest.raises(ArgumentError, match=r"Decomposition\.values: expected a term of warm-start gap, .* got 'gap' and 'output'"):
        found.values("gap")
