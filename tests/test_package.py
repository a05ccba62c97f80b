"""What a user installs: stubs that tell the truth, types that check, an import that is cheap and says what is wrong with it."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tarfile
import time
import tomllib
from pathlib import Path

import pytest
import torch

import influence_ext as ie
import influence_ext._C as _C
from influence_ext import binary

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "influence_ext"
HEAVY = (
    "IPython",
    "matplotlib",
    "openpyxl",
    "pandas",
    "rich",
    "scipy",
    "sklearn",
    "sympy",
    "torch._dynamo",
    "torch._inductor",
    "transformers",
)


def python(code: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own that imports from ``folder``."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, timeout=600)


# --- stubs ---------------------------------------------------------------------------------------------------------------------


def stub_functions(body: list[ast.stmt]) -> dict[str, list[str] | None]:
    """Name -> parameters without self; None for a property or a constant."""
    found: dict[str, list[str] | None] = {}
    for node in body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found[node.target.id] = None
        if isinstance(node, ast.FunctionDef):
            is_property = any(isinstance(d, ast.Name) and d.id == "property" for d in node.decorator_list)
            found[node.name] = None if is_property else [a.arg for a in node.args.args if a.arg != "self"]
    return found


def stub() -> tuple[dict[str, list[str] | None], dict[str, dict[str, list[str] | None]]]:
    """Functions and classes of the stub; a class has the members of its bases."""
    tree = ast.parse((PACKAGE / "_C.pyi").read_text(encoding="utf-8"))
    classes: dict[str, dict[str, list[str] | None]] = {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            members: dict[str, list[str] | None] = {}
            for base in node.bases:
                assert isinstance(base, ast.Name)
                members |= classes[base.id]
            classes[node.name] = members | stub_functions(node.body)
    return stub_functions(tree.body), {name: members for name, members in classes.items() if not name.startswith("_")}


def signature(function: object) -> list[str] | None:
    """Parameters without self that pybind11 writes into the docstring's first line; None for what it did not make."""
    line = (function.__doc__ or "").split("\n")[0]
    if ") ->" not in line:
        return None
    tree = ast.parse(f"def {line[: line.index(') ->')]}): ...")  # the result may be a C++ type
    assert isinstance(tree.body[0], ast.FunctionDef)
    return [a.arg for a in tree.body[0].args.args if a.arg != "self"]


def actual(members: dict[str, object]) -> dict[str, list[str] | None]:
    """The same for the compiled module; a class that Python cannot make has no constructor."""
    found: dict[str, list[str] | None] = {}
    for name, member in members.items():
        thing = member.__func__ if isinstance(member, staticmethod) else member
        if isinstance(thing, (property, int)):
            found[name] = None
        elif (name == "__init__" or not name.startswith("_")) and (parameters := signature(thing)) is not None:
            found[name] = parameters
    return found


def test_stub_is_the_compiled_module() -> None:
    functions, classes = stub()
    public = {name: thing for name, thing in vars(_C).items() if not name.startswith("_")}
    assert functions == actual({name: thing for name, thing in public.items() if not isinstance(thing, type)})
    assert {name: actual(dict(vars(thing))) for name, thing in public.items() if isinstance(thing, type)} == classes


def test_types_are_shipped() -> None:
    assert (PACKAGE / "py.typed").exists()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert {"py.typed", "*.pyi"} <= set(project["tool"]["setuptools"]["package-data"]["influence_ext"])


USER_SCRIPT = """
import torch
from torch import Tensor, nn
import influence_ext as ie

X, y = torch.randn(30, 4), torch.randint(3, (30,))

def build_model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))

recipe = ie.Recipe(build_model, nn.CrossEntropyLoss(), lr=0.1, epochs=2, batch_size=10)
run = ie.train(recipe, (X, y))
influence = ie.Influence(run.model, nn.CrossEntropyLoss(), (X, y), damping=1e-3, solver=ie.solvers.CG(rtol=1e-4))
scores: ie.Scores = influence.scores((X, y))
top: list[tuple[int, float]] = scores.top(5, test=0)
change: Tensor = influence.parameter_change([3, 17])
G = ie.GGN(run.model, "cross_entropy", (X, y), damping=1e-3)
products: Tensor = G.matmat(torch.randn(8, G.shape[0]))
diagonal: Tensor = G.diagonal()
grads: dict[str, Tensor] = ie.per_example_grads(run.model, nn.CrossEntropyLoss(), (X, y))
response: ie.Response = ie.pbrf(run, remove=[0])
table: str = ie.decompose(run, remove=[[3], [17]]).table()
try:
    ie.solvers.CG(max_steps=1).solve(G, torch.ones(G.shape[0]))
except ie.errors.SolverFailure as failure:
    status: list[ie.solvers.Status] = failure.solution.status
"""


def mypy(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    (folder / "script.py").write_text(script, encoding="utf-8")
    environment = {**os.environ, "MYPYPATH": str(ROOT)}
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file", os.devnull, "--follow-imports=silent", "script.py"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_a_users_script_type_checks(tmp_path: Path) -> None:
    pytest.importorskip("mypy", reason="mypy is not installed; make lint installs it")
    done = mypy(USER_SCRIPT, tmp_path)
    assert done.returncode == 0, done.stdout
    wrong = mypy("import influence_ext as ie\nscores: int = ie.load_scores('x.npz')\nie.nonsense\n", tmp_path)
    assert "Incompatible types in assignment" in wrong.stdout
    assert '"nonsense"' in wrong.stdout


# --- import --------------------------------------------------------------------------------------------------------------------


def test_all_names_are_there_and_those_that_type_checkers_see() -> None:
    assert [name for name in ie.__all__ if not hasattr(ie, name)] == []
    assert set(ie.__all__) <= set(dir(ie))
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = ie.nonsense
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    guards = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    declared = {a.name: n.module for g in guards for n in g.body if isinstance(n, ast.ImportFrom) for a in n.names}
    assert set(declared) == set(ie.__all__) - {"__version__", "build_info"}
    for name, module in declared.items():
        assert getattr(sys.modules[str(module)], name) is getattr(ie, name)


def test_import_loads_the_extension_and_no_layer() -> None:
    code = "import torch, sys; before = set(sys.modules); import influence_ext; print(*sorted(set(sys.modules) - before))"
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) <= {"influence_ext", "influence_ext._C", "influence_ext.binary"}


def test_no_name_loads_a_heavy_package() -> None:
    code = f"""
import torch, sys
before = set(sys.modules)
import influence_ext as ie
for name in ie.__all__:
    getattr(ie, name)
new = set(sys.modules) - before
known = {{"influence_ext", "torch", *sys.stdlib_module_names}}
print(*sorted(name for name in new if name.split(".")[0] not in known or name in {HEAVY!r}))
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


@pytest.mark.slow
def test_import_costs_less_than_300_ms_beyond_torch() -> None:
    seconds: dict[str, list[float]] = {"import torch": [], "import torch, influence_ext": []}
    for _ in range(7):
        for code, found in seconds.items():
            start = time.perf_counter()
            assert python(code).returncode == 0
            found.append(time.perf_counter() - start)
    assert statistics.median(b - a for a, b in zip(*seconds.values(), strict=True)) < 0.3


# --- the torch it was compiled against -----------------------------------------------------------------------------------------

BUILT = binary.Record(torch="2.13.0+cpu", cxx11_abi=True, cuda=None)
WITH_CUDA = binary.Record(torch="2.13.0+cu130", cxx11_abi=True, cuda="13.0")


@pytest.mark.parametrize(
    ("record", "version", "abi", "cuda", "fits"),
    [
        (BUILT, "2.13.0+cpu", True, None, True),
        (BUILT, "2.13.1", True, None, True),
        (BUILT, "2.13.0+cu130", True, "13.0", True),
        (BUILT, "2.12.1+cpu", True, None, False),
        (BUILT, "2.130.0", True, None, False),
        (BUILT, "3.13.0", True, None, False),
        (BUILT, "2.13.0", False, None, False),
        (WITH_CUDA, "2.13.0+cu130", True, "13.0", True),
        (WITH_CUDA, "2.13.0+cu131", True, "13.1", True),
        (WITH_CUDA, "2.13.0+cu128", True, "12.8", False),
        (WITH_CUDA, "2.13.0+cpu", True, None, False),
        (None, "2.12.0", True, None, True),  # an extension without a record is tried
    ],
)
def test_mismatch(record: binary.Record | None, version: str, abi: bool, cuda: str | None, fits: bool) -> None:
    message = binary.mismatch(record, version, abi, cuda)
    assert (message is None) == fits
    if message:
        assert message.startswith("influence_ext: expected torch 2.13.* with the C++11 ABI")
        assert ("and CUDA 13.0, which" in message) == (record is WITH_CUDA)
        assert f"got torch {version} with" in message
        assert message.endswith(".")
        assert "\n" not in message


def copy_of_the_package(folder: Path, *, record: binary.Record | None, extension: bytes | None) -> None:
    """The top of the package in ``folder``, with an extension of our making."""
    target = folder / "influence_ext"
    target.mkdir()
    for name in ("__init__.py", "binary.py"):
        shutil.copy(PACKAGE / name, target / name)
    if record is not None:
        (target / "_C.json").write_text(json.dumps(record), encoding="utf-8")
    if extension is not None:
        (target / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}").write_bytes(extension)


@pytest.mark.parametrize(
    ("record", "extension", "expected"),
    [
        (
            binary.Record(torch="1.0.0", cxx11_abi=True, cuda=None),
            b"",
            r"expected torch 1\.0\.\* with the C\+\+11 ABI, which its extension was compiled against, got torch .*; install that torch, or",
        ),
        (
            binary.Record(torch=torch.__version__, cxx11_abi=True, cuda=None),
            b"",
            r"expected the compiled extension influence_ext\._C \(compiled against",
        ),
        (None, b"", r"which has no record of its torch beside it\) to load with torch"),
        (None, None, r"got: .*_C.*; rebuild it in this environment"),
    ],
    ids=["another torch", "does not load", "no record", "no extension"],
)
def test_import_says_what_is_wrong(tmp_path: Path, record: binary.Record | None, extension: bytes | None, expected: str) -> None:
    copy_of_the_package(tmp_path, record=record, extension=extension)
    # an editable install would lend the copy its own extension
    installed = "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in getattr(f, '__module__', '')]"
    done = python(f"{installed}; import influence_ext", tmp_path)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: influence_ext: expected ")
    assert re.search(expected, last), last


def test_build_info_names_the_torch_of_the_build() -> None:
    record = binary.compiled_against()
    assert ie.build_info()["compiled_against_torch"] == (record["torch"] if record else "unknown")


# --- distributions -------------------------------------------------------------------------------------------------------------


def test_extras() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    assert set(extras) == {"demo", "adapters", "bench", "docs", "dev"}
    pinned = {
        re.split(r"[=<>~ ]", line)[0].lower()
        for path in (ROOT / "requirements").glob("*.txt")
        for line in path.read_text(encoding="utf-8").splitlines()
        if line and line[0] not in "#-"
    }
    wanted = {re.split(r"[=<>~ \[]", item)[0].lower() for items in extras.values() for item in items} - {"influence-ext"}
    assert wanted <= pinned


@pytest.mark.slow
def test_source_distribution_is_complete(tmp_path: Path) -> None:
    source = tmp_path / "source"
    keep = shutil.ignore_patterns(
        ".git", ".venv*", "build", "dist", "*.egg-info", "__pycache__", "*.so", "_C.json", ".*_cache", "demo-results"
    )
    shutil.copytree(ROOT, source, ignore=keep)
    done = python(f"import setuptools.build_meta as b; b.build_sdist({str(tmp_path)!r})", source)
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        packed = {name.split("/", 1)[1] for name in tar.getnames() if "/" in name}
    suffixes = {".py", ".pyi", ".typed", ".h", ".cpp", ".cu", ".cuh", ".md", ".txt", ".toml", ".in", ".sh", ".png", ".svg", ".jsonl"}
    files = {
        p.relative_to(source).as_posix()
        for p in source.rglob("*")
        if p.is_file() and (p.suffix in suffixes or p.name in ("Makefile", "LICENSE"))
    }
    generated = {name for name in files if name.startswith(("build/", "influence_ext.egg-info/"))}
    assert sorted(files - generated - packed) == []
    assert not any(name.endswith((".so", ".pyc", "_C.json")) or name.startswith("build/") for name in packed)
