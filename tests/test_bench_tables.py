"""The benchmark's records as tables and charts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import goals, plot, tables
from bench.cases import CASES, GPU_CASES
from bench.contender import OURS
from bench.records import ROOT


def record(case: str, ours: float, peer: float, date: str = "2026-01-02", **changes: Any) -> dict[str, Any]:
    def row(name: str, median: float) -> dict[str, Any]:
        quartiles = {"q1": 0.9 * median, "median": median, "q3": 1.1 * median}
        return {"name": name, "ours": name == OURS, "error": 1e-7, "failure": None, "peak_bytes": 3 * 2**20, **quartiles}

    return {
        "case": case,
        "quantity": "ggn",
        "title": f"title of {case}",
        "ours": OURS,
        "linearity": None,
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


MAIN, MORE = [c.name for c in CASES if c.main and not c.is_sweep][:2], [c.name for c in CASES if not c.main and not c.is_sweep][:1]


def test_tables_show_the_latest_record_of_each_case_losing_rows_too(tmp_path: Path) -> None:
    (a, b), (c,) = MAIN, MORE
    later = record(a, 1e-4, 5e-4, date="2026-01-03")
    folder = results(tmp_path, record(a, 9.0, 1.0), record(b, 2e-3, 1e-3), later, record(c, 1.0, 2.0), record("no longer there", 1.0, 2.0))
    readme = tmp_path / "README.md"
    readme.write_text(f"head\n{plot.BEGIN}\nSTALE\n{plot.END}\ntail\n")
    assert plot.main(["--results", str(folder), "--readme", str(readme)]) == 0
    text, page = readme.read_text(), (folder / "m-2c" / "README.md").read_text()
    assert text.startswith("head\n")
    assert text.endswith(f"{plot.END}\ntail\n")
    assert "STALE" not in text
    for place in (text, page):
        assert f"| title of {a} | MLP, N = 7 | 100 µs | 500 µs (torch.func) | **5.00×** | 40 % | 3 MiB / 3 MiB |" in place
        assert f"| title of {b} | MLP, N = 7 | 2 ms | 1 ms (torch.func) | 0.50× (slower) | 40 % | 3 MiB / 3 MiB |" in place
        assert "no longer there" not in place
    assert "(bench/results/m-2c/README.md)" in text
    assert f"title of {c}" in page
    assert f"title of {c}" not in text
    assert f"| `{c}` | curvlinops | failed | no | – | – |" in page
    assert (folder / "m-2c" / "rows.svg").read_text().count("title of") == 3
    plot.main(["--results", str(folder), "--readme", str(readme)])
    assert readme.read_text() == text


def test_sweeps_and_solves_have_tables_and_charts_of_their_own(tmp_path: Path) -> None:
    sweep, solve = (next(c for c in CASES if c.quantity == q) for q in ("sweep-n", "solve"))
    line = {"proportional": 0.08, "affine": 0.034, "fixed": 2e-5, "sizes": [1, 64], "seconds": [1e-3, 0.064]}
    swept = record(sweep.name, 1.0, 1.0, quantity="sweep-n", linearity=line, best_peer=None, ratio=None)
    solved = record(solve.name, 1.0, 2.0, quantity="solve")
    folder = results(tmp_path, swept, solved)
    readme = tmp_path / "README.md"
    readme.write_text(f"{plot.BEGIN}{plot.END}")
    assert plot.main(["--results", str(folder), "--readme", str(readme)]) == 0
    assert f"| title of {sweep.name} | MLP | 1 ms an example | 8 % | 3 % | 20 µs |" in readme.read_text()
    assert "![scaling](scaling.svg)" in (folder / "m-2c" / "README.md").read_text()
    assert {p.name for p in (folder / "m-2c").glob("*.svg")} == {"scaling.svg", "solves.svg"}


def test_a_case_that_failed_is_shown_as_failed() -> None:
    failed = record(MAIN[0], 1.0, 1.0, ratio=None, percent_of_floor=None)
    failed["contenders"][0] = {"name": OURS, "ours": True, "failure": "boom"}
    assert "| failed | 1.00 s (torch.func) | – | – | – / 3 MiB |" in tables.main_table([failed])


@pytest.mark.parametrize(
    ("readme", "records", "message"),
    [
        ("no markers", [record(CASES[0].name, 1.0, 1.0)], "expected the markers <!-- bench:begin --> and <!-- bench:end --> in"),
        (f"{plot.BEGIN}{plot.END}", [], "found none; run 'make bench' first"),
    ],
)
def test_plot_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str], readme: str, records: list[Any], message: str) -> None:
    (tmp_path / "README.md").write_text(readme)
    folder = results(tmp_path, *records)
    options = ["--results", str(folder), "--readme", str(tmp_path / "README.md")]
    assert plot.main(options) == 2
    assert message in capsys.readouterr().err
    assert (tmp_path / "README.md").read_text() == readme


def test_a_gpu_heads_its_page() -> None:
    name = next(c.name for c in GPU_CASES if c.quantity == "loss-hessian")
    found = record(name, 1e-3, 2e-3, machine={"name": "gpu", "gpu": "NVIDIA H100", "cpu": "M", "cores": 2})
    assert name in tables.MAIN
    assert tables.page([found], []).startswith("# NVIDIA H100, beside M, 2 cores\n")


def test_goals_stand_beside_what_is_reached() -> None:
    """Products against whom the goal names, and against everyone; a dash where nothing was measured."""
    product, retraining = goals.PRODUCTS[0], goals.RETRAINING
    rows = [(OURS, 2.0), ("torch.func", 9.0), ("curvlinops", 7.0), ("torch.func.linearize", 5.0)]
    contenders = [{"name": name, "ours": name == OURS, "median": median} for name, median in rows]
    measured = record(product.case, 2.0, 5.0, num_vectors=1, contenders=contenders, floor={"seconds": 1.0})
    contenders = [{"name": name, "ours": name == OURS, "median": median} for name, median in ((OURS, 1.0), ("plain PyTorch", 3.0))]
    trained = record(retraining.case, 1.0, 1.5, contenders=[*contenders, {"name": "torch.func, vmap", "ours": False, "median": 1.5}])
    gram = record("gram-lenet-n256", 1.0, 21.0, best_peer="torch.func, vmap")
    gram["contenders"][1]["name"] = "torch.func, vmap"
    text = goals.goals([measured, trained, gram])
    assert f"| MLP, N = 7, V = 1 | {product.speed_up:g} × | 3.50 × | 2.50 × | {product.floor} % | 40 % | 7.0 × |" in text
    assert f"| title of {retraining.case}, N = 7 | 5 × | 3.00 × | 1.50 × | – | 40 % | 7.5 × |" in text
    assert "| MLP | –, – | – | – | 21.0 × |" in text
    assert "| classifier | –, – | – | – | – |" in text


def test_tables_are_those_of_the_records(tmp_path: Path) -> None:
    """What README, the page of limits and the machine's page show is what was measured last."""
    machine = "amd-epyc-2c"
    pages = ("README.md", "bench/notes/limits.md", f"bench/results/{machine}/README.md")
    for path in (*pages, f"bench/results/{machine}/results.jsonl"):
        copy = tmp_path / path
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes((ROOT / path).read_bytes())
    arguments = ["--machine", machine, "--results", str(tmp_path / "bench" / "results"), "--readme", str(tmp_path / "README.md")]
    assert plot.main([*arguments, "--limits", str(tmp_path / "bench" / "notes" / "limits.md")]) == 0
    for path in pages:
        drawn, kept = (folder / path for folder in (tmp_path, ROOT))
        assert drawn.read_text(encoding="utf-8") == kept.read_text(encoding="utf-8"), f"{path}: run python -m bench.plot"
