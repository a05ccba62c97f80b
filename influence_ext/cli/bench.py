"""``influence-ext bench``: the benchmarks of the source tree."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import influence_ext as ie
from influence_ext.cli.output import USAGE, complain


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options after the known ones are handed on."""
    parser.add_argument(
        "options", nargs=argparse.REMAINDER, metavar="...", help="options of bench/run.py, for example --cases 'ggn-*' (after --)"
    )


def run(args: argparse.Namespace) -> int:
    """Run ``bench/run.py`` where the package lies in its source tree; elsewhere say how to get there."""
    root = source_tree()
    if root is None:
        complain(
            "bench",
            "expected the source tree (the folder bench/ beside the package), got an installed package without it; "
            "clone the repository and run 'make bench' there.",
        )
        return USAGE
    options = [option for option in args.options if option != "--"]
    command = [sys.executable, "-m", "bench.run", "--seed", str(args.seed), *(["--json"] if args.json else []), *options]
    return subprocess.run(command, cwd=root, check=False).returncode


def source_tree() -> Path | None:
    """The folder that holds this package and ``bench/run.py``."""
    root = Path(ie.__file__).resolve().parent.parent
    return root if (root / "bench" / "run.py").is_file() else None
