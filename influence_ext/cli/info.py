"""``influence-ext info``: what this build is and what it found on this machine."""

from __future__ import annotations

import argparse
import platform

import influence_ext as ie
from influence_ext.cli import datasets
from influence_ext.cli.output import OK, emit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No options of its own."""


def run(args: argparse.Namespace) -> int:
    """Print :func:`influence_ext.build_info` and which built-in data sets can be loaded."""
    info = {
        "python": platform.python_version(),
        **ie.build_info(),
        "datasets": {name: datasets.missing(name) or "available" for name in datasets.names()},
    }
    if args.json:
        emit(info)
        return OK
    rows = []
    for key, value in info.items():
        if isinstance(value, dict):
            rows += [[f"{key}.{name}", str(item)] for name, item in value.items()]
        else:
            rows.append([key, ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)])
    width = max(len(row[0]) for row in rows)
    print("\n".join(f"{key:<{width}}  {value}" for key, value in rows))
    return OK
