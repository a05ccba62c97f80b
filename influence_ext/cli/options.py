"""Options that several commands share, and what they mean to the library."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch

from influence_ext import solvers
from influence_ext.cli.output import DTYPES
from influence_ext.errors import ArgumentError

SOLVERS = ("auto", "cg", "dual", "direct", "lissa")


def add_model(parser: argparse.ArgumentParser, required: bool) -> None:
    """The user's own network, data and loss."""
    group = parser.add_argument_group("your own network and data")
    group.add_argument(
        "--model",
        metavar="FILE:FACTORY",
        required=required,
        help="function that returns the network: model.py:build or package.module:build",
    )
    group.add_argument(
        "--train",
        metavar="FILE",
        required=required,
        help="training data: .npz with arrays X and y, or .pt with a dict or a pair of tensors",
    )
    group.add_argument(
        "--loss",
        default="cross_entropy",
        help="functional name: cross_entropy (default), mse_loss, huber_loss, binary_cross_entropy_with_logits, ...",
    )
    group.add_argument("--dtype", choices=DTYPES, default="float32", help="of parameters and inputs (default float32)")


def add_solver(parser: argparse.ArgumentParser, default: str) -> None:
    """Which linear solver, and how far it goes."""
    group = parser.add_argument_group("solver")
    group.add_argument("--solver", choices=SOLVERS, default=default, help=f"of (G + λI) x = b (default {default})")
    group.add_argument("--rtol", type=positive, help="relative residual to reach (default: the solver's own)")
    group.add_argument("--steps", type=count, help="most steps of cg, steps of lissa")


def solver(args: argparse.Namespace) -> solvers.Solver | None:
    """The solver of ``--solver``; ``None`` for ``auto``.

    Raises:
        ArgumentError: ``--rtol`` or ``--steps`` given to a solver that has none.
    """
    taken = {
        "cg": ("rtol", "max_steps"),
        "lissa": ("rtol", "num_steps"),
        "dual": ("rtol", None),
        "direct": ("rtol", None),
        "auto": (None, None),
    }
    rtol, steps = taken[args.solver]
    options = {}
    for option, name, value in (("--rtol", rtol, args.rtol), ("--steps", steps, args.steps)):
        if value is not None and name is None:
            raise ArgumentError(f"{option}: expected none with --solver {args.solver}, got {value:g}; choose cg or lissa, or leave it out.")
        if value is not None and name is not None:
            options[name] = value
    makers: dict[str, Callable[..., solvers.Solver]] = {
        "cg": solvers.CG,
        "lissa": solvers.LiSSA,
        "dual": solvers.Dual,
        "direct": solvers.Direct,
    }
    return makers[args.solver](**options) if args.solver in makers else None


def dtype(args: argparse.Namespace) -> torch.dtype:
    """That of ``--dtype``."""
    return DTYPES[args.dtype]


def positive(text: str) -> float:
    """A number above zero, for argparse."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return value


def not_negative(text: str) -> float:
    """A number of at least zero, for argparse."""
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, got {text}")
    return value


def count(text: str) -> int:
    """A whole number of at least one, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text}")
    return value


def counts(text: str) -> tuple[int, ...]:
    """``"128,128"``: whole numbers of at least one, for argparse."""
    return tuple(count(part) for part in text.split(","))


def indices(text: str) -> tuple[int, ...]:
    """``"3,17"``: indices of training examples, for argparse."""
    return tuple(int(part) for part in text.split(","))
