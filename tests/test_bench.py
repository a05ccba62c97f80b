"""The benchmark's own parts: counted floors, fair turns, verified answers, honest tables. Nothing here is timed."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bench import cases, machine, measure, memory, peers, process, run, tables
from bench.cases import CASES, GPU_CASES, NUM_SIZES, SMOKE_CASES, Case, select
from bench.contender import OURS, Contender
from bench.floor import Rates, count, floor
from bench.measure import Options
from bench.peers import contenders
from bench.problem import mse
from bench.records import expected_seconds, load
from bench.reference import error, reference
from bench.scaling import linearity
from bench.solves import LIMIT, conjugate_gradients
from bench.timing import interleave, summarise
from bench.workloads import CLASSIFIER, REGRESSION, RETRAINED, SENTENCES, VOCABULARY
from influence_ext import reference as oracle
from influence_ext.plan import Plan

SMALL = {case.name: case for case in SMOKE_CASES}
EAGER = [(c, k) for c in SMOKE_CASES for k in contenders(c) if "compile" not in k.name]
INSTALLED_WITH = {"Opacus": "opacus.grad_sample", "BackPACK": "backpack.extensions"}
SINGLE = [c for c in SMOKE_CASES if not c.is_sweep and c.quantity != "retrain"]


# ---------------------------------------------------------------------------------------------------------------------
# Cases and reference answers


def test_names_are_unique_and_selectable() -> None:
    for table in ((*CASES, *SMOKE_CASES), GPU_CASES):
        names = [c.name for c in table]
        assert len(set(names)) == len(names)
    assert [c.name for c in select(["ggn-v1-*"])][:2] == ["ggn-v1-regression-n1000", "ggn-v1-classifier-n4096"]
    assert select([]) == list(CASES)
    assert [c.name for c in select(["*vocabulary*", "ggn-v32-*"], gpu=True)] == [
        *(f"ggn-v32-{name}" for name in ("regression-n1000", "wide-n16384", "resnet18-n512", "gpt2-n8")),
        *(f"loss-hessian-v{V}-vocabulary-n4096" for V in (1, 8)),
    ]
    assert select([], main=True) == [c for c in CASES if c.main]


def test_problem_depends_on_the_seed_alone() -> None:
    a, b, c = (SMOKE_CASES[0].problem(seed) for seed in (1, 1, 2))
    assert torch.equal(a.X, b.X)
    assert torch.equal(a.model[0].weight, b.model[0].weight)
    assert not torch.equal(a.X, c.X)


def test_the_encoder_has_the_size_of_minilm() -> None:
    assert SENTENCES.num_parameters - 2 * 385 == 22_713_216  # without its head of two classes
    X, y = SENTENCES.data(2, torch.Generator())
    assert SENTENCES.build(0)(X).shape == (2, 2)
    assert y.shape == (2,)


@pytest.mark.parametrize("case", SINGLE, ids=lambda c: c.name)
def test_reference_agrees_with_the_dense_oracle(case: Case) -> None:
    problem = case.problem(seed=3).to(torch.float64)
    loss = mse if case.workload.loss == "mse" else torch.nn.functional.cross_entropy
    if case.quantity in ("ggn", "solve"):
        G = oracle.ggn(problem.model, loss, problem.X, problem.y)
        expected = problem.vectors @ G if case.quantity == "ggn" else problem.vectors
    elif case.quantity == "hessian":
        expected = oracle.hessian_products(problem.model, loss, problem.X, problem.y, problem.vectors)
    elif case.quantity == "loss-hessian":
        H = torch.autograd.functional.hessian(lambda z: loss(z, problem.y), problem.X)
        expected = problem.vectors.flatten(1) @ H.reshape(problem.X.numel(), -1)
    else:
        g = oracle.per_example_grads(problem.model, loss, problem.X, problem.y)
        norms, dots = g.norm(dim=1), g @ problem.vectors.T
        expected = {"grads": g, "grads-out": g, "norms": norms, "dots": dots, "gram": g @ g.T}[case.quantity]
    torch.testing.assert_close(reference(case, problem)[""], expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("case", [c for c in SMOKE_CASES if c.is_sweep], ids=lambda c: c.name)
def test_reference_of_a_sweep_agrees_with_the_dense_oracle(case: Case) -> None:
    problem = case.problem(seed=3).to(torch.float64)
    found = reference(case, problem)
    assert len(found) == len(case.steps) == NUM_SIZES
    for step in case.steps:
        N, V = step.num_examples, step.num_vectors
        G = oracle.ggn(problem.model, torch.nn.functional.cross_entropy, problem.X[:N], problem.y[:N])
        torch.testing.assert_close(found[step.name], problem.vectors[:V] @ G, rtol=1e-11, atol=1e-13)
    assert case.steps[-1].num_examples == case.num_examples
    assert case.steps[-1].num_vectors == case.num_vectors


def test_right_hand_sides_are_gradients_of_other_examples() -> None:
    case = SMALL["solve-v4-smoke-classifier-n12"]
    problem = case.problem(seed=3)
    X, y = case.workload.data(12, generator := torch.Generator().manual_seed(3))
    assert torch.equal(problem.X, X)
    X, y = case.workload.data(4, generator)
    model = problem.model.double()
    expected = oracle.per_example_grads(model, torch.nn.functional.cross_entropy, X.double(), y)
    torch.testing.assert_close(problem.vectors.double(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("case", [c for c in SMOKE_CASES if c.quantity == "solve"], ids=lambda c: c.name)
def test_error_of_a_solve_is_its_relative_residual(case: Case) -> None:
    problem = case.problem().to(torch.float64)
    loss = mse if case.workload.loss == "mse" else torch.nn.functional.cross_entropy
    A = oracle.ggn(problem.model, loss, problem.X, problem.y) + case.damping * torch.eye(case.workload.num_parameters, dtype=torch.float64)
    exact = torch.linalg.solve(A, problem.vectors.T).T
    assert error(case, problem, exact, problem.vectors) < 1e-10
    assert error(case, problem, 1.5 * exact, problem.vectors) == pytest.approx(0.5)


@pytest.mark.parametrize(("case", "contender"), EAGER, ids=[f"{c.name}-{k.name}" for c, k in EAGER])
def test_contenders_give_the_right_answer(case: Case, contender: Contender) -> None:
    if contender.name in INSTALLED_WITH:
        pytest.importorskip(INSTALLED_WITH[contender.name])
    problem = case.problem(seed=5)
    call = contender.prepare(case, problem)
    if "in place" not in contender.name:
        call()  # a second call must not depend on the first
    measure.verified_call(case, problem, replace(contender, prepare=lambda *_: call), reference(case, problem), {})


@pytest.mark.slow
@pytest.mark.parametrize("case", SMOKE_CASES, ids=lambda c: c.name)
def test_compiled_contenders_give_the_right_answer(case: Case) -> None:
    torch._dynamo.reset()
    problem = case.problem(seed=5)
    for contender in contenders(case):
        if "compile" in contender.name:
            measure.verified_call(case, problem, contender, reference(case, problem), {})


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
        (Case("loss-hessian", VOCABULARY, 10, 3), 4 * 3 * 10 * 50_257, 4 * 3 * 10 * 50_257),
        # 784-128-10: 101,632 multiply-adds, 100,352 of them in the first layer; five epochs.
        (Case("retrain", RETRAINED, 10, 3), 3 * 5 * 10 * 2 * (3 * 101_632 - 100_352), 3 * 4 * 101_770),
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
    vocabulary = floor(Case("loss-hessian", VOCABULARY, 10, 3), replace(rates, gemm=1e15, write=1e15))
    assert vocabulary.seconds == (3 * 2 + 1) * 10 * 4 * 50_257 / 1e9
    assert floor(Case("solve", REGRESSION, 10), rates) is None


def test_large_answers_are_compared_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    case = SMALL["ggn-v3-smoke-classifier-n12"]
    problem = case.problem()
    exact = reference(case, problem)[""]
    assert len(exact) == 3
    monkeypatch.setattr(cases, "CHECKED_BYTES", 2 * 8 * case.workload.num_parameters)
    expected = reference(case, problem)[""]
    assert torch.equal(expected, exact[:2])
    assert error(case, problem, exact, expected) == 0
    assert error(case, problem, torch.cat([exact[:1], 2 * exact[1:]]), expected) > 0.1
    with pytest.raises(ValueError, match="expected an answer of shape"):
        error(case, problem, exact[:1], expected)


def test_rates_keep_what_was_fastest() -> None:
    slow, fast = Rates(1.0, "slow", copy=4.0, write=1.0), Rates(2.0, "fast", copy=3.0, write=1.5)
    assert slow.best(fast) == fast.best(slow) == Rates(2.0, "fast", copy=4.0, write=1.5)


def test_contenders_take_turns_and_short_calls_are_repeated() -> None:
    now, order = [0.0], []

    def contender(name: str, seconds: float) -> Callable[[], None]:
        def call() -> None:
            now[0] += seconds if name in order else 100 * seconds  # a first call that says nothing of the others
            order.append(name)

        return call

    found = interleave(
        {"a": contender("a", 0.25), "b": contender("b", 1.0)}, seconds=6.0, min_sample=0.5, min_rounds=2, max_rounds=9, clock=lambda: now[0]
    )
    tried = ["a"] + ["a"] + ["a", "a"] + ["b"] + ["b"]
    assert order == tried + ["a", "a", "b"] * 4
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


@pytest.mark.skipif(not memory.available(), reason="the high-water mark cannot be reset on this system")
def test_peak_memory_counts_what_a_call_adds_and_what_it_keeps() -> None:
    case = Case("ggn", REGRESSION, 10)
    mib = 2**18  # float32 elements

    def adds() -> torch.Tensor:
        return torch.ones(64 * mib).mul_(2)

    def keeping(held: torch.Tensor) -> Callable[[], torch.Tensor]:
        return lambda: torch.ones(8 * mib).mul_(held[0])

    tape = Plan.of(nn.Linear(1024, 1, bias=False), torch.zeros(1, 1024)).linearize(torch.zeros(2**14, 1024))
    g = torch.zeros(1, 2**14, 1)

    prepared = memory.Prepared(case.problem())
    prepared.calls |= {"adds": adds, "keeps": keeping(torch.ones(32 * mib)), "nothing": lambda: None}
    prepared.calls["freed and kept"] = lambda: tape.factors(g).materialise()  # 64 MiB each time, the same
    for call in prepared.calls.values():
        call()
    found = {name: memory.peak(prepared, name) for name in prepared.calls}
    assert prepared.calls.keys() == found.keys()
    for name, expected in (("adds", 64), ("keeps", 40), ("nothing", 0), ("freed and kept", 64)):
        assert found[name] is not None
        assert abs(found[name] / 2**20 - expected) < 4, name


@pytest.mark.skipif(not memory.available(), reason="the high-water mark cannot be reset on this system")
def test_peak_memory_of_a_call_that_fails_or_hangs_is_unknown() -> None:
    prepared = memory.Prepared(Case("ggn", REGRESSION, 10).problem())
    prepared.calls |= {"dies": lambda: os.kill(os.getpid(), signal.SIGKILL), "hangs": lambda: time.sleep(60)}
    assert memory.peak(prepared, "dies") is None
    assert memory.peak(prepared, "hangs", timeout=0.2) is None


# ---------------------------------------------------------------------------------------------------------------------
# Processes


def test_a_function_in_a_process_of_its_own() -> None:
    assert process.isolated(os.path.join, "a", "b", timeout=600) == "a/b"
    with pytest.raises(process.ProcessFailure, match=r"^ValueError: "):
        process.isolated(math.log, -1.0, timeout=600)
    with pytest.raises(process.ProcessFailure, match="ended with exit code -9"):
        process.isolated(signal.raise_signal, signal.SIGKILL, timeout=600)
    with pytest.raises(process.ProcessFailure, match="took longer than 0 s"):
        process.isolated(time.sleep, 60, timeout=0.2)


@pytest.mark.slow
def test_a_case_in_processes_of_its_own(tmp_path: Path) -> None:
    options = ["--seconds", "0.1", "--rounds", "2", "--no-compile", "--out", str(tmp_path / "r.jsonl")]
    assert run.main(["--cases", "ggn-v1-smallest-*", *options]) == 0
    (record,) = load(tmp_path / "r.jsonl")
    assert all(c["failure"] is None and c["peak_bytes"] is not None for c in record["contenders"])


def test_a_case_that_dies_does_not_lose_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(function: Any, case: Case, *args: Any, timeout: float) -> Any:
        if case.quantity == "ggn":
            raise process.ProcessFailure("its process ended with exit code -9")
        return function(case, *args)

    monkeypatch.setattr(run, "isolated", dies)
    two = [SMALL["ggn-v1-smoke-regression-n12"], SMALL["norms-smoke-regression-n12"]]
    monkeypatch.setattr(run, "select", lambda patterns, *, smoke, main, gpu: two)
    monkeypatch.setattr(run, "measure_rates", lambda **options: Rates(1e9, "none", 1e9, 1e9))
    out = tmp_path / "r.jsonl"
    assert run.main(["--seconds", "0.01", "--rounds", "2", "--no-compile", "--no-memory", "--out", str(out)]) == 1
    first, second = load(out)
    assert first["contenders"] == [{"name": OURS, "ours": True, "error": None, "failure": "its process ended with exit code -9"}]
    assert first["case"] == "ggn-v1-smoke-regression-n12"
    assert second["ours"] == OURS
    assert "failed" in tables.cells(first)


def test_resuming_leaves_out_what_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    commit = {"id": "abc", "dirty": False}
    monkeypatch.setattr(machine, "commit", lambda root: commit)
    header = run.described(torch.device("cpu"), "command", 0)
    done = header | {"case": CASES[0].name, "ours": OURS}
    failed = header | {"case": CASES[1].name, "ours": None}
    other = header | {"case": CASES[2].name, "ours": OURS, "commit": {"id": "abd", "dirty": False}}
    out = tmp_path / "r.jsonl"
    out.write_text("".join(json.dumps(r) + "\n" for r in (done, failed, other)))
    assert run.main(["--list", "--resume", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert CASES[0].name + "\n" not in text
    assert all(case.name + "\n" in text for case in CASES[1:])
    assert f"{len(CASES) - 1} cases, about " in text
    commit["dirty"] = True
    assert run.main(["--list", "--resume", "--out", str(out)]) == 0
    assert f"{len(CASES)} cases, about " in capsys.readouterr().out


def test_expected_time_follows_the_last_record() -> None:
    case, options = Case("ggn", REGRESSION, 10, seconds=12.0), Options(seconds=5.0, rounds=4)
    assert expected_seconds(case, None, options) == 14.0
    assert expected_seconds(case, {"elapsed": {"total": 30.0, "timing": 20.0, "round": 2.0}}, options) == 10.0 + 8.0
    assert expected_seconds(case, {"elapsed": {"total": 30.0, "timing": 20.0, "round": 1.0}}, options) == 10.0 + 5.0


# ---------------------------------------------------------------------------------------------------------------------
# Sweeps, solves


def test_linearity_of_a_straight_line_with_a_fixed_cost() -> None:
    case = SMALL["sweep-n-smoke-classifier-n64"]
    sizes = [1, 2, 4, 8, 16, 32, 64]
    found = linearity(case, [3.0 + 2.0 * n for n in sizes])
    assert found["sizes"] == sizes
    assert found["affine"] == pytest.approx(0.0, abs=1e-12)
    assert found["fixed"] == pytest.approx(3.0)
    assert found["proportional"] == pytest.approx(5.0 / ((3.0 + 128.0) / 64) - 1)
    assert linearity(case, [0.5 * n for n in sizes])["proportional"] == pytest.approx(0.0, abs=1e-12)


def test_plain_conjugate_gradients_reach_the_tolerance() -> None:
    g = torch.Generator().manual_seed(0)
    root = torch.randn(12, 12, generator=g, dtype=torch.float64)
    A, B = root @ root.T + 0.1 * torch.eye(12, dtype=torch.float64), torch.randn(3, 12, generator=g, dtype=torch.float64)
    X = conjugate_gradients(lambda D: D @ A, B)
    assert float(((X @ A - B).norm(dim=1) / B.norm(dim=1)).max()) <= LIMIT


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
        ours = min(c["median"] for c in record["contenders"] if c["ours"])
        assert record["ratio"] == pytest.approx(best / ours)
    smoke(tmp_path, "--cases", "ggn-v1-smoke-regression-*")
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == len(records) + 1
    assert "GGN product, V = 1" in capsys.readouterr().out


def test_a_wrong_answer_is_not_timed_and_fails_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = Contender(OURS, lambda case, problem: lambda: 1.01 * reference(case, problem)[""], lambda answer: answer)
    monkeypatch.setattr(measure, "contenders", lambda case: [wrong, *[c for c in contenders(case) if c.name == "torch.func"]])
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

    refusing = Contender("curvlinops", refuse, lambda answer: answer)
    monkeypatch.setattr(measure, "contenders", lambda case: [peers.contenders(case)[0], refusing])
    status, (record,) = smoke(tmp_path, "--cases", "ggn-v1-smoke-regression-*")
    assert status == 0
    assert record["contenders"][1]["failure"] == "NotImplementedError: no forward mode"
    assert record["best_peer"] is None


def test_json_records_go_to_stdout_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--smoke", "--no-compile", "--json", "--cases", "norms-smoke-classifier-*"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["case"] == "norms-smoke-classifier-n12"
    assert "GEMM" in captured.err


def test_ctrl_c_keeps_what_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(case: Case, *rest: Any) -> Any:
        if case.name == "gram-smoke-classifier-n12":
            raise KeyboardInterrupt
        return measured(case, *rest)

    measured, out = run.result, tmp_path / "results.jsonl"
    monkeypatch.setattr(run, "result", interrupted)
    names = ["norms-smoke-classifier-*", "gram-smoke-classifier-n12"]
    assert run.main(["--smoke", "--no-compile", "--out", str(out), "--cases", *names]) == 130
    text = capsys.readouterr().out
    assert "interrupted in gram-smoke-classifier-n12" in text
    assert f"1 case is kept in {out}" in text
    assert [record["case"] for record in load(out)] == ["norms-smoke-classifier-n12"]


def test_unknown_cases_are_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--cases", "nothing"]) == 2
    assert "expected --cases to match a case, got ['nothing']" in capsys.readouterr().err


def test_every_smoke_case_runs(tmp_path: Path) -> None:
    _, records = smoke(tmp_path, "--cases", "sweep-*", "retrain-*", "grads-out-*")
    assert {r["quantity"] for r in records} == {"sweep-n", "sweep-v", "retrain", "grads-out"}
    for r in records:
        assert all(c["failure"] is None for c in r["contenders"] if c["name"] not in INSTALLED_WITH)
        assert (r["linearity"] is not None) == r["quantity"].startswith("sweep")
