"""The command line: ``influence-ext`` or ``python -m influence_ext``.

Exit status: 0 done, 1 a check, a solve or a training failed, 2 the command or its input is unusable, 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence

import torch

import influence_ext as ie
from influence_ext.cli import bench, decompose, demo, info, scores
from influence_ext.cli.output import FAILED, INTERRUPTED, OK, USAGE, complain, emit
from influence_ext.errors import DivergenceError, InfluenceExtError, SolverFailure

COMMANDS = {
    "info": (info, "what this build is and what it found on this machine"),
    "demo": (demo, "influence, mislabelled data and the five terms on real data, with plots"),
    "scores": (scores, "influence of training examples on the test losses of your model"),
    "decompose": (decompose, "the five-term decomposition on a built-in data set or on your data"),
    "bench": (bench, "benchmarks against torch.func, torch.compile and curvlinops"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Arguments without the program's name; ``None`` is ``sys.argv[1:]``.

    Returns:
        The exit status.
    """
    args = parser().parse_args(argv)
    command, _ = COMMANDS[args.command]
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(args.seed)
            status = command.run(args)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        complain(args.command, "interrupted.")
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has gone, as with `| head`; keep the interpreter from saying so at exit
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except (SolverFailure, DivergenceError) as error:
        return _failure(args, error, FAILED)
    except (InfluenceExtError, OSError) as error:
        return _failure(args, error, USAGE)


def parser() -> argparse.ArgumentParser:
    """The parser with all commands."""
    top = argparse.ArgumentParser(
        prog="influence-ext",
        description="Influence functions, proximal Bregman responses and their five-term decomposition.",
        epilog="exit status: 0 done, 1 a check, a solve or a training failed, 2 the command or its input is unusable, 130 Ctrl-C",
    )
    top.add_argument("--version", action="version", version=f"influence-ext {ie.__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, summary) in COMMANDS.items():
        sub = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        sub.add_argument("--json", action="store_true", help="print one JSON document on stdout")
        sub.add_argument("--seed", type=_seed, default=0, metavar="N", help="of everything random (default 0)")
        module.add_arguments(sub)
    return top


def _seed(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError("expected a whole number of at least 0")
    return value


def _failure(args: argparse.Namespace, error: Exception, status: int) -> int:
    complain(args.command, str(error))
    if args.json:
        emit({"command": args.command, "error": {"type": type(error).__name__, "message": str(error)}})
    return status
