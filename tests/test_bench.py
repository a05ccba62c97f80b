"""The benchmark's own parts: counted floors, fair turns, verified answers, honest tables. Nothing here is timed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import machine, memory, peers, plot, run
from bench.cases import CASES, CLASSIFIER, REGRESSION, SMOKE_CASES, Case, error, mse, reference, select
from bench.floor import Rates, count, floor
from bench.peers import OURS, Contender, contenders
from bench.timing import interleave, summarise
from influence_ext import reference as oracle

SMALL = {case.name: case for case in SMOKE_CASES}
EAGER = [(c, k) for c in SMOKE_CASES for k in contenders(c) if "compile" not in k.name]


# ---------------------------------------------------------------------------------------------------------------------
# Cases and reference answers


def test_names_are_unique_and_selectable() -> None:
    names = [c.name for c in (*CASES, *SMOKE_CASES)]
    assert len(set(names)) == len(names)
    assert [c.name for c in select(["ggn-v1-*"])][:2] == ["ggn-v1-regression-n1000", "ggn-v1-classifier-n4096"]
    assert select([]) == list(CASES)


def test_problem_depends_on_the_seed_alone() -> None:
    a, b, c = (SMOKE_CASES[0].problem(seed) for seed in (1, 1, 2))
    assert torch.equal(a.X, b.X)
    assert torch.equal(a.model[0].weight, b.model[0].weight)
    assert not torch.equal(a.X, c.X)


@pytest.mark.parametrize("case", SMOKE_CASES, ids=lambda c: c.name)
def test_reference_agrees_with_the_dense_oracle(case: Case) -> None:
    problem = case.problem(seed=3).to(torch.float64)
    loss = mse if case.workload.loss == "mse" else torch.nn.functional.cross_entropy
    if case.quantity in ("ggn", "solve"):
        G = oracle.ggn(problem.model, loss, problem.X, problem.y)
        expected = problem.vectors @ G if case.quantity == "ggn" else problem.vectors
    elif case.quantity == "hessian":
        expected = oracle.hessian_products(problem.model, loss, problem.X, problem.y, problem.vectors)
    else:
        g = oracle.per_example_grads(problem.model, loss, problem.X, problem.y)
        expected = {"grads": g, "norms": g.norm(dim=1), "dots": g @ problem.vectors.T, "gram": g @ g.T}[case.quantity]
    torch.testing.assert_close(reference(case, problem), expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("case", [c for c in SMOKE_CASES if c.quantity == "solve"], ids=lambda c: c.name)
def test_error_of_a_solve_is_its_relative_residual(case: Case) -> None:
    problem = case.problem()
    loss = mse if case.workload.loss == "mse" else torch.nn.functional.cross_entropy
    A = oracle.ggn(problem.model, loss, problem.X, problem.y) + case.damping * torch.eye(case.workload.num_parameters, dtype=torch.float64)
    exact = torch.linalg.solve(A, problem.vectors.T).T
    assert error(case, problem, exact, problem.vectors) < 1e-10
    assert error(case, problem, 1.5 * exact, problem.vectors) == pytest.approx(0.5)


@pytest.mark.parametrize(("case", "contender"), EAGER, ids=[f"{c.name}-{k.name}" for c, k in EAGER])
def test_contenders_give_the_right_answer(case: Case, contender: Contender) -> None:
    problem = case.problem(seed=5)
    call = contender.prepare(case, problem)
    call()  # a second call must not depend on the first
    assert error(case, problem, contender.flat(call()), reference(case, problem)) <= contender.limit


@pytest.mark.slow
@pytest.mark.parametrize("case", SMOKE_CASES, ids=lambda c: c.name)
def test_compiled_contenders_give_the_right_answer(case: Case) -> None:
    torch._dynamo.reset()
    problem = case.problem(seed=5)
    for contender in contenders(case):
        if "compile" in contender.name:
            answer = contender.flat(contender.prepare(case, problem)())
            assert error(case, problem, answer, reference(case, problem)) <= contender.limit


# ---------------------------------------------------------------------------------------------------------------------
# Floor and turns


@pytest.mark.parametrize(
    ("case", "flops", "written"),
    [
        # 8-128-128-1: 8·128 + 128·128 + 128 = 17,536 multiply-adds an example, 1,024 of them in the first layer.
        (Case("ggn", REGRESSION, 10, 1), 10 * 2 * (4 * 17_536 - 2 * 1_024), 4 * 17_793),
        (Case("hessian", REGRESSION, 10, 8), 8 * 10 * 2 * (6 * 17_536 - 4 * 1_024), 8 * 4 * 17_793),
        (Case("ggn", REGRESSION, 10, 8), 8 * 10 * 2 * (4 * 17_536 - 2 * 1_024), 8 * 4 * 17_793),
        (Case("grads", REGRESSION, 10), 10 * 2 * (2 * 17_536 - 1_024), 10 * 4 * 17_793),
        (Case("norms", REGRESSION, 10), 10 * 2 * (2 * 17_536 - 1_024), 4 * 10),
        (Case("dots", REGRESSION, 10, 1), 10 * 2 * (3 * 17_536 - 1_024), 4 * 10),
        (Case("dots", REGRESSION, 10, 8), 10 * 2 * (10 * 17_536 - 1_024), 4 * 80),
        (Case("gram", REGRESSION, 10), 10 * 2 * (2 * 17_536 - 1_024) + 110 * (136 + 256 + 129), 4 * 100),
    ],
    ids=lambda value: value.name if isinstance(value, Case) else None,
)
def test_counted_work(case: Case, flops: float, written: float) -> None:
    assert count(case) == (flops, written)


def test_floor_is_the_slower_of_arithmetic_and_writing() -> None:
    rates = Rates(gemm=1e9, gemm_route="", copy=1e9, write=1e9)
    ggn, grads = Case("ggn", REGRESSION, 1000), Case("grads", CLASSIFIER, 256)
    assert floor(ggn, rates).seconds == count(ggn)[0] / 1e9
    assert floor(grads, replace(rates, gemm=1e15)).seconds == 256 * 4 * CLASSIFIER.num_parameters / 1e9
    assert floor(Case("solve", REGRESSION, 10), rates) is None


def test_rates_keep_what_was_fastest() -> None:
    slow, fast = Rates(1.0, "slow", copy=4.0, write=1.0), Rates(2.0, "fast", copy=3.0, write=1.5)
    assert slow.best(fast) == fast.best(slow) == Rates(2.0, "fast", copy=4.0, write=1.5)


def test_contenders_take_turns_and_short_calls_are_repeated() -> None:
    now, order = [0.0], []

    def contender(name: str, seconds: float) -> Callable[[], None]:
        def call() -> None:
            order.append(name)
            now[0] += seconds

        return call

    found = interleave(
        {"a": contender("a", 0.25), "b": contender("b", 1.0)}, seconds=6.0, min_sample=0.5, min_rounds=2, max_rounds=9, clock=lambda: now[0]
    )
    assert order == ["a", "b"] + ["a", "a", "b"] * 4
    assert (found["a"].median, found["b"].median) == (0.25, 1.0)
    assert (found["a"].calls_per_sample, found["b"].calls_per_sample, found["a"].samples) == (2, 1, 4)


def test_summary_statistics() -> None:
    timing = summarise([5.0, 1.0, 2.0, 4.0, 3.0], 1)
    assert (timing.best, timing.q1, timing.median, timing.q3, timing.samples) == (1.0, 2.0, 3.0, 4.0, 5)


# ---------------------------------------------------------------------------------------------------------------------
# Machine, memory


@pytest.mark.parametrize(
    ("model", "cores", "name"),
    [
        ("AMD EPYC", 2, "amd-epyc-2c"),
        ("AMD EPYC 9R14 96-Core Processor", 8, "amd-epyc-9r14-8c"),
        ("Intel(R) Xeon(R) CPU E5-2686 v4 @ 2.30GHz", 4, "intel-xeon-e5-2686-v4-4c"),
        ("Apple M2 Pro", 10, "apple-m2-pro-10c"),
    ],
)
def test_machine_names(model: str, cores: int, name: str) -> None:
    assert machine.slug(model, cores) == name


def test_versions_and_commit_outside_git(tmp_path: Path) -> None:
    assert machine.versions()["torch"] == torch.__version__
    assert machine.commit(tmp_path) == {"id": "unknown", "dirty": None}


@pytest.mark.slow
@pytest.mark.skipif(not memory.available(), reason="the high-water mark cannot be reset on this system")
def test_peak_memory_sees_materialised_gradients() -> None:
    case = next(c for c in CASES if c.name == "grads-regression-n256")
    materialised = 256 * case.workload.num_parameters * 4
    peak = memory.measure(case.name, OURS)
    assert materialised <= peak <= 4 * materialised


# ---------------------------------------------------------------------------------------------------------------------
# Run and plot


def smoke(tmp_path: Path, *options: str) -> tuple[int, list[dict[str, Any]]]:
    out = tmp_path / "results.jsonl"
    status = run.main(["--smoke", "--no-compile", "--out", str(out), *options])
    return status, [json.loads(line) for line in out.read_text().splitlines()]


def test_run_appends_verified_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, records = smoke(tmp_path, "--cases", "ggn-*", "solve-*")
    assert status == 0
    assert [r["case"] for r in records] == [c.name for c in select(["ggn-*", "solve-*"], smoke=True)]
    for record in records:
        assert all(c["failure"] is None and c["median"] > 0 and c["q1"] <= c["median"] <= c["q3"] for c in record["contenders"])
        assert {"date", "command", "commit", "machine", "versions", "rates", "threads"} <= record.keys()
        best = min(c["median"] for c in record["contenders"] if c["name"] == record["best_peer"])
        ours = next(c["median"] for c in record["contenders"] if c["ours"] and "CG" not in c["name"])
        assert record["ratio"] == pytest.approx(best / ours)
    smoke(tmp_path, "--cases", "ggn-v1-smoke-regression-*")
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == len(records) + 1
    assert "GGN product, V = 1" in capsys.readouterr().out


def test_a_wrong_answer_is_not_timed_and_fails_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = Contender(OURS, lambda case, problem: lambda: 1.01 * reference(case, problem), lambda answer: answer)
    monkeypatch.setattr(run, "contenders", lambda case: [wrong, *[c for c in contenders(case) if c.name == "torch.func"]])
    status, (record,) = smoke(tmp_path, "--cases", "ggn-v1-smoke-regression-*")
    ours = record["contenders"][0]
    assert status == 1
    assert ours["error"] == pytest.approx(0.01)
    assert "relative error 1.0e-02 against float64, allowed 1e-04" in ours["failure"]
    assert "median" not in ours
    assert record["ratio"] is None


def test_a_peer_that_fails_is_recorded_and_does_not_fail_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(case: Case, problem: Any) -> Any:
        raise NotImplementedError("no forward mode\nsecond line")

    monkeypatch.setattr(run, "contenders", lambda case: [peers.contenders(case)[0], Contender("curvlinops", refuse, lambda answer: answer)])
    status, (record,) = smoke(tmp_path, "--cases", "ggn-v1-smoke-regression-*")
    assert status == 0
    assert record["contenders"][1]["failure"] == "NotImplementedError: no forward mode"
    assert record["best_peer"] is None


def test_json_records_go_to_stdout_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--smoke", "--no-compile", "--json", "--cases", "norms-smoke-classifier-*"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["case"] == "norms-smoke-classifier-n12"
    assert "GEMM" in captured.err


def test_unknown_cases_are_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--cases", "nothing"]) == 2
    assert "expected --cases to match a case, got ['nothing']" in capsys.readouterr().err


def record(case: str, ours: float, peer: float, date: str = "2026-01-02", **changes: Any) -> dict[str, Any]:
    def row(name: str, median: float) -> dict[str, Any]:
        quartiles = {"q1": 0.9 * median, "median": median, "q3": 1.1 * median}
        return {"name": name, "ours": name == OURS, "error": 1e-7, "failure": None, "peak_bytes": 3 * 2**20, **quartiles}

    return {
        "case": case,
        "quantity": "ggn",
        "title": f"title of {case}",
        "workload": "MLP",
        "num_examples": 7,
        "date": date,
        "contenders": [row(OURS, ours), row("torch.func", peer), {"name": "curvlinops", "ours": False, "failure": "no"}],
        "best_peer": "torch.func",
        "ratio": peer / ours,
        "percent_of_floor": 40.0,
        "floor": {"seconds": 0.4 * ours},
        "rates": {"gemm": 2e11},
        "machine": {"name": "m-2c", "cpu": "M", "cores": 2},
        "versions": {"torch": "2", "curvlinops-for-pytorch": "3"},
        "threads": 2,
        "commit": {"id": "abc", "dirty": False},
    } | changes


def results(folder: Path, *records: dict[str, Any]) -> Path:
    (folder / "m-2c").mkdir()
    (folder / "m-2c" / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


def test_table_shows_the_latest_record_of_each_case_losing_rows_too(tmp_path: Path) -> None:
    folder = results(tmp_path, record("a", 9.0, 1.0), record("b", 2e-3, 1e-3), record("a", 1e-4, 5e-4, date="2026-01-03"))
    readme = tmp_path / "README.md"
    readme.write_text(f"head\n{plot.BEGIN}\nold\n{plot.END}\ntail\n")
    assert plot.main(["--results", str(folder), "--readme", str(readme), "--chart", str(tmp_path / "c.svg")]) == 0
    text = readme.read_text()
    assert text.startswith("head\n")
    assert text.endswith(f"{plot.END}\ntail\n")
    assert "old" not in text
    assert "| title of a | MLP, N = 7 | 100 µs | 500 µs (torch.func) | **5.00×** | 40 % | 3 MiB / 3 MiB |" in text
    assert "| title of b | MLP, N = 7 | 2 ms | 1 ms (torch.func) | 0.50× (slower) | 40 % | 3 MiB / 3 MiB |" in text
    assert (tmp_path / "c.svg").read_text().count("title of") == 2
    plot.main(["--results", str(folder), "--readme", str(readme), "--chart", str(tmp_path / "c.svg")])
    assert readme.read_text() == text


def test_a_case_that_failed_is_shown_as_failed() -> None:
    failed = record("a", 1.0, 1.0, ratio=None, percent_of_floor=None)
    failed["contenders"][0] = {"name": OURS, "ours": True, "failure": "boom"}
    assert "| failed | 1.00 s (torch.func) | – | – | – / 3 MiB |" in plot.table([failed])


@pytest.mark.parametrize(
    ("readme", "records", "message"),
    [
        ("no markers", [record("a", 1.0, 1.0)], "expected the markers <!-- bench:begin --> and <!-- bench:end --> in"),
        (f"{plot.BEGIN}{plot.END}", [], "found none; run 'make bench' first"),
    ],
)
def test_plot_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str], readme: str, records: list[Any], message: str) -> None:
    (tmp_path / "README.md").write_text(readme)
    folder = results(tmp_path, *records)
    options = ["--results", str(folder), "--readme", str(tmp_path / "README.md"), "--chart", str(tmp_path / "c.svg")]
    assert plot.main(options) == 2
    assert message in capsys.readouterr().err
    assert (tmp_path / "README.md").read_text() == readme
