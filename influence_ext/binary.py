"""Whether the torch that is imported is the one that the extension was compiled against."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypedDict


class Record(TypedDict):
    """What setup.py writes beside the extension."""

    torch: str
    cxx11_abi: bool
    cuda: str | None


def compiled_against(path: Path | None = None) -> Record | None:
    """The record beside the extension; None where somebody copied the extension without it."""
    path = Path(__file__).with_name("_C.json") if path is None else path
    if not path.exists():
        return None
    record: Record = json.loads(path.read_text(encoding="utf-8"))
    return record


def mismatch(record: Record | None, torch_version: str, cxx11_abi: bool, cuda: str | None) -> str | None:
    """What keeps an extension with this record from running on such a torch, as one sentence; None if nothing does.

    Torch keeps its C++ interface within a release (2.13.x) and changes it between releases, where the extension would fail with an
    undefined symbol or, worse, load. An extension with CUDA kernels needs a torch with CUDA of the same major version; one without runs
    on any.
    """
    if record is None:
        return None
    same_cuda = record["cuda"] is None or (cuda is not None and cuda.split(".")[0] == record["cuda"].split(".")[0])
    if _release(record["torch"]) == _release(torch_version) and record["cxx11_abi"] == cxx11_abi and same_cuda:
        return None
    needed = f"torch {_release(record['torch'])}.* with {_abi(record['cxx11_abi'])}" + (
        f" and CUDA {record['cuda']}" if record["cuda"] else ""
    )
    found = f"torch {torch_version} with {_abi(cxx11_abi)}" + (f" and CUDA {cuda}" if cuda else "")
    return (
        f"influence_ext: expected {needed}, which its extension was compiled against, got {found}; install that torch, or rebuild "
        "influence_ext in this environment with `pip install --no-build-isolation --force-reinstall --no-deps .` in its source folder."
    )


def failure(record: Record | None, torch_version: str, reason: ImportError) -> str:
    """The sentence for an extension that does not load although nothing speaks against it."""
    built = f"compiled against torch {record['torch']}" if record else "which has no record of its torch beside it"
    return (
        f"influence_ext: expected the compiled extension influence_ext._C ({built}) to load with torch {torch_version}, got: {reason}; "
        "rebuild it in this environment with `pip install --no-build-isolation --force-reinstall --no-deps .` in its source folder."
    )


def _release(version: str) -> str:
    """``"2.13.0+cpu"`` -> ``"2.13"``."""
    return ".".join(version.split("+")[0].split(".")[:2])


def _abi(cxx11: bool) -> str:
    return "the C++11 ABI" if cxx11 else "the C++ ABI before C++11"
