"""The layers of docs/design.md: who may import whom, where torch and device names may appear, how long a file may be."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "influence_ext"
CSRC = ROOT / "csrc"
MAX_LINES = {".py": 500, ".pyi": 500, ".cpp": 600, ".h": 600, ".cu": 600, ".cuh": 600}

# What a Python layer may use; what those use is allowed too, except the extension, which must be named.
EVERYTHING = {"bregman", "influence"}
MAY_USE: dict[str, set[str]] = {
    "binary": set(),
    "checks": {"errors"},
    "errors": set(),
    "context": {"errors"},
    "files": {"errors"},
    "finite": {"_C"},
    "memory": {"_C", "errors"},
    "params": {"checks", "errors", "finite"},
    "data": {"checks", "errors", "finite"},
    "capture": {"errors", "context", "params"},
    "losses": {"_C", "capture", "errors", "finite", "params", "data"},
    "derived": {"capture", "params"},
    "chunks": set(),
    "ensemble": {"_C", "context", "losses"},
    "graphs": {"_C", "checks", "errors", "params"},
    "tape": {"capture", "checks", "chunks", "context", "derived", "finite", "graphs", "losses", "errors", "params"},
    "plan": {"_C", "checks", "capture", "chunks", "context", "derived", "ensemble", "losses", "errors", "params", "data", "tape"},
    "operators.base": {"checks", "errors", "context"},
    "operators": {"checks", "operators.base", "plan", "tape", "losses"},
    "krylov": {"_C", "context"},
    "solvers": {"checks", "operators.base", "errors", "context", "krylov"},
    "influence": {"checks", "files", "operators", "solvers"},
    "bregman": {"checks", "files", "operators", "solvers"},
    "adapters": EVERYTHING,
    "cli": EVERYTHING | {"__init__"},
    "reference": set(),
    "testing": set(),
    "__init__": EVERYTHING | {"_C", "binary"},
    "__main__": {"cli"},
}
TORCH_ONLY = ("solvers", "reference", "testing")  # third-party packages beside torch are not for these

# layers/node.h and per_example/factor.h are the plain data that rules and factors hand each other.
CPP_MAY_USE: dict[str, set[str]] = {
    "math": {"math", "common/macros.h"},
    "common": {"common"},
    "kernels": {"kernels", "math", "common"},
    "layers": {"layers", "kernels", "common", "per_example/factor.h"},
    "losses": {"losses", "kernels", "common"},
    "per_example": {"per_example", "layers/node.h", "kernels", "common"},
    "plan": {"plan", "layers", "losses", "per_example", "kernels", "common"},
    "bindings.cpp": {
        "bindings_ensemble.h",
        "bindings_generic.h",
        "bindings_graph.h",
        "bindings_interruption.h",
        "bindings_losses.h",
        "bindings_tensors.h",
        "plan",
        "layers",
        "losses",
        "per_example",
        "kernels",
        "common",
    },
    "bindings_ensemble.h": {"bindings_losses.h", "plan"},
    "bindings_generic.h": {"bindings_tensors.h", "layers"},
    "bindings_graph.h": {"bindings_tensors.h", "kernels"},
    "bindings_interruption.h": {"common"},
    "bindings_losses.h": {"bindings_tensors.h", "losses"},
    "bindings_tensors.h": {"bindings_cuda.h", "common"},
    "bindings_cuda.h": {"common"},
    "bindings_cuda.cpp": {"bindings_cuda.h", "common"},
}
BINDINGS = (
    "bindings.cpp",
    "bindings_cuda.cpp",
    "bindings_cuda.h",
    "bindings_ensemble.h",
    "bindings_generic.h",
    "bindings_graph.h",
    "bindings_interruption.h",
    "bindings_losses.h",
    "bindings_tensors.h",
)
TORCH_HEADER = re.compile(r"^(torch|ATen|c10|pybind11|Python\.h)")
DEVICE = re.compile(r"cuda|cudnn|cublas|__device__|__global__|__host__|Device::|\bgpu\b", re.IGNORECASE)


def layer_of(module: str) -> str:
    """``influence_ext.operators.ggn`` -> ``operators``; ``operators.base`` stands alone."""
    parts = module.split(".")[1:]
    if not parts:
        return "__init__"
    return "operators.base" if parts[:2] == ["operators", "base"] else parts[0]


def module_name(path: Path) -> str:
    """Dotted name of a file of the package."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)


def imports(source: str, module: str) -> Iterator[str]:
    """Dotted names a module imports, inside functions too, without what only type checkers see."""
    tree = ast.parse(source)
    hidden = {
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for statement in block.body
        for node in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if node in hidden:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*module.split(".")[: -node.level], *([base] if base else [])])
            if base in ("influence_ext", "influence_ext.operators"):
                yield from (f"{base}.{alias.name}" for alias in node.names)
            else:
                yield base


def allowed(layer: str) -> set[str]:
    """Layers that ``layer`` may import, directly or through others."""
    found: set[str] = {layer}
    todo = list(MAY_USE[layer])
    while todo:
        other = todo.pop()
        if other not in found:
            found.add(other)
            todo += MAY_USE.get(other, set()) - {"_C"}
    return found


def violations(source: str, module: str) -> list[str]:
    """Imports of ``source`` that its layer may not make."""
    layer = layer_of(module)
    if layer not in MAY_USE:
        return [f"{module}: belongs to no layer of docs/design.md"]
    bad = []
    for name in imports(source, module):
        top = name.split(".")[0]
        if top == "influence_ext":
            target = layer_of(name)
            # `from influence_ext import GGN` would go through the top of the package and make a circle
            if target not in allowed(layer) or (target == "__init__" and layer not in ("__init__", "cli")):
                bad.append(f"{module} imports {name}")
        elif top in ("torch", "numpy", "scipy") and name.startswith("torch.distributed") and layer != "distributed":
            bad.append(f"{module} imports {name}: only distributed.py may")
        elif layer in TORCH_ONLY and top not in ("torch", "__future__") and not is_standard(top):
            bad.append(f"{module} imports {name}: only torch and the standard library are for this layer")
        elif top in ("tests", "bench"):
            bad.append(f"{module} imports {name}: the package stands without its tests and benchmarks")
    return bad


def is_standard(name: str) -> bool:
    """Whether ``name`` belongs to the standard library."""
    return name in sys.stdlib_module_names


def without_comments(source: str) -> str:
    """C++ text without comments; line numbers survive."""
    source = re.sub(r"/\*.*?\*/", lambda m: "\n" * m.group().count("\n"), source, flags=re.DOTALL)
    return re.sub(r"//[^\n]*", "", source)


def cpp_violations(source: str, path: str) -> list[str]:
    """What a C++ file at ``path`` (relative to csrc) may not include or mention."""
    layer = path.split("/")[0]
    if layer not in CPP_MAY_USE:
        return [f"{path}: belongs to no layer of docs/design.md"]
    bad = []
    for line in source.splitlines():
        match = re.match(r"\s*#\s*include\s*([<\"])([^>\"]+)", line)
        if match is None:
            continue
        bracket, header = match.groups()
        if TORCH_HEADER.match(header):
            if path not in BINDINGS:
                bad.append(f"{path} includes {header}: only the bindings may")
        elif (path, header) in {("kernels/cuda/launch.h", "emulation/cuda.h"), ("kernels/cuda/mma.h", "emulation/mma.h")}:
            continue  # stands in for the CUDA runtime in the tests
        elif bracket == '"' and not {header, header.split("/")[0]} & CPP_MAY_USE[layer]:
            bad.append(f"{path} includes {header}")
    if layer not in ("kernels", "common"):
        code = without_comments(source)
        bad += [f"{path}: names a device: {m.group()}" for m in DEVICE.finditer(code) if path not in BINDINGS]
    return bad


def files(folder: Path, *suffixes: str) -> list[Path]:
    """Source files below ``folder``."""
    return sorted(path for path in folder.rglob("*") if path.suffix in suffixes and "__pycache__" not in path.parts)


def test_python_layers() -> None:
    paths = files(PACKAGE, ".py")
    assert len(paths) > 20
    assert [text for path in paths for text in violations(path.read_text(), module_name(path))] == []


def test_cpp_layers() -> None:
    paths = files(CSRC, ".cpp", ".h", ".cu", ".cuh")
    assert len(paths) > 20
    found = [text for path in paths for text in cpp_violations(path.read_text(), path.relative_to(CSRC).as_posix())]
    assert found == []


@pytest.mark.parametrize("folder", ["influence_ext", "csrc", "tests", "bench"])
def test_files_stay_readable(folder: str) -> None:
    paths = files(ROOT / folder, *MAX_LINES)
    assert paths
    long = {str(p.relative_to(ROOT)): n for p in paths if (n := len(p.read_text().splitlines())) > MAX_LINES[p.suffix]}
    assert long == {}


def test_benchmarks_do_not_use_the_tests() -> None:
    found = [
        f"{path.name} imports {name}"
        for path in files(ROOT / "bench", ".py")
        for name in imports(path.read_text(), "bench")
        if name.split(".")[0] == "tests"
    ]
    assert found == []


def test_math_headers_are_free_of_allocation() -> None:
    words = re.compile(r"\bnew\b|malloc|std::vector|std::string|#\s*pragma omp")
    for path in files(CSRC / "math", ".h"):
        assert words.findall(without_comments(path.read_text())) == [], path.name


def test_every_kernel_has_a_contract_of_the_same_name() -> None:
    sources = files(CSRC / "kernels" / "cpu", ".cpp")
    assert sources
    assert [p.name for p in sources if not (CSRC / "kernels" / f"{p.stem}.h").exists()] == []


@pytest.mark.parametrize(
    ("module", "source", "found"),
    [
        ("influence_ext.reference.ggn", "from influence_ext import _C", 1),
        ("influence_ext.reference.ggn", "from influence_ext.reference.jacobian import jacobian", 0),
        ("influence_ext.reference.ggn", "import numpy", 1),
        ("influence_ext.solvers.cg", "from influence_ext.operators.ggn import GGN", 1),
        ("influence_ext.solvers.cg", "from influence_ext.operators import ggn", 1),
        ("influence_ext.solvers.cg", "from influence_ext.operators.base import LinearOperator", 0),
        ("influence_ext.solvers.cg", "from ..operators.ggn import GGN", 1),
        ("influence_ext.solvers.cg", "import scipy.sparse", 1),
        ("influence_ext.operators.ggn", "import influence_ext._C", 1),
        ("influence_ext.plan", "import influence_ext._C", 0),
        ("influence_ext.errors", "if TYPE_CHECKING:\n    from influence_ext.solvers.base import Solution", 0),
        ("influence_ext.errors", "def f():\n    from influence_ext.solvers.base import Solution", 1),
        ("influence_ext.influence.scores", "from influence_ext.bregman.pbrf import pbrf", 1),
        ("influence_ext.influence.scores", "from influence_ext import GGN", 1),
        ("influence_ext.operators.ggn", "import torch.distributed", 1),
        ("influence_ext.plan", "from tests.cases import build", 1),
        ("influence_ext.adapters.torch_influence.base", "from influence_ext.solvers import CG\nimport scipy.sparse.linalg", 0),
        ("influence_ext.adapters.torch_influence.base", "from influence_ext import _C", 1),
        ("influence_ext.influence.scores", "from influence_ext.adapters import torch_influence", 1),
        ("influence_ext.cli.scores", "from influence_ext.adapters import torch_influence", 1),
        ("influence_ext.stray", "import torch", 1),
    ],
)
def test_the_python_rule_catches(module: str, source: str, found: int) -> None:
    assert len(violations(source, module)) == found


@pytest.mark.parametrize(
    ("path", "source", "found"),
    [
        ("layers/linear.cpp", "#include <torch/extension.h>", 1),
        ("bindings.cpp", "#include <torch/extension.h>", 0),
        ("layers/linear.cpp", '#include "kernels/gemm.h"', 0),
        ("layers/linear.cpp", '#include "plan/plan.h"', 1),
        ("kernels/cpu/gemm.cpp", '#include "layers/rule.h"', 1),
        ("math/losses.h", '#include "common/dispatch.h"', 1),
        ("math/losses.h", '#include "common/macros.h"', 0),
        ("layers/linear.cpp", "if (ctx.device == Device::cuda) {}", 2),
        ("layers/linear.cpp", "// the same on CUDA", 0),
        ("kernels/cuda/gemm.cu", "__global__ void gemm() {}", 0),
        ("stray/x.cpp", "", 1),
    ],
)
def test_the_cpp_rule_catches(path: str, source: str, found: int) -> None:
    assert len(cpp_violations(source, path)) == found
