"""Where and with what a result was obtained."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "numpy", "curvlinops-for-pytorch", "backpack-for-pytorch", "opacus", "scipy", "influence-ext")


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.lower().startswith(("model name", "hardware")):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def slug(model: str, cores: int) -> str:
    """A folder name: ``"Intel(R) Xeon(R) CPU @ 2.20GHz", 4`` → ``"intel-xeon-4c"``."""
    text = re.sub(r"\((?:R|TM|C)\)|®|™|@.*$|\bCPU\b|\bProcessor\b|\b\d+-Core\b", " ", model, flags=re.IGNORECASE)
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") + f"-{cores}c"


def machine_name() -> str:
    return slug(cpu_model(), num_cores())


def description(device: torch.device) -> dict[str, Any]:
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "name": re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") if gpu else machine_name(),
        "cpu": cpu_model(),
        "gpu": gpu,
        "cores": num_cores(),
        "system": f"{platform.system()} {platform.machine()}",
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "absent"
    return found


def commit(root: Path) -> dict[str, Any]:
    """The commit of the source tree and whether it has changes; unknown outside a git checkout."""
    try:
        head = _git(root, "rev-parse", "--short=12", "HEAD")
        dirty = bool(_git(root, "status", "--porcelain", "--", "csrc", "influence_ext", "bench/*.py", "setup.py"))
    except (OSError, subprocess.CalledProcessError):
        return {"id": "unknown", "dirty": None}
    return {"id": head, "dirty": dirty}


def _git(root: Path, *args: str) -> str:
    return subprocess.run(["git", *args], cwd=root, capture_output=True, text=True, check=True).stdout.strip()
