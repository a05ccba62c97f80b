"""``influence-ext scores``: influence of training examples on the test losses of a user's network."""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass

import influence_ext as ie
from influence_ext.cli import networks, options
from influence_ext.cli.output import OK, aligned, emit

EPILOG = """example:
  # model.py holds a function `build()` that returns the network
  influence-ext scores --model model.py:build --checkpoint state.pt \\
      --train train.npz --test test.npz --loss cross_entropy --damping 1e-3 --out scores.npz

A positive score means that removing the training example raises the test loss: it helps.
--model runs the file that you name."""


@dataclass(frozen=True)
class Shown:
    """The strongest training examples of one test example, ``(training index, score)``."""

    test: int
    helpful: list[tuple[int, float]]
    harmful: list[tuple[int, float]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Network, data, loss, damping, solver and what to do with the scores."""
    parser.epilog, parser.formatter_class = EPILOG, argparse.RawDescriptionHelpFormatter
    options.add_model(parser, required=True)
    parser.add_argument("--test", metavar="FILE", required=True, help="test data, like --train")
    parser.add_argument("--checkpoint", metavar="FILE", help="state_dict of the trained network (default: the factory's own parameters)")
    parser.add_argument("--reduction", choices=("mean", "sum"), default="mean", help="of the training loss over examples (default mean)")
    parser.add_argument("--damping", type=options.positive, default=1e-3, help="λ; add the weight decay of training to it (default 1e-3)")
    parser.add_argument(
        "--top", type=options.count, default=5, help="most helpful and harmful examples to print per test example (default 5)"
    )
    parser.add_argument("--tests", type=options.count, default=5, help="test examples to print (default 5; the file holds all)")
    parser.add_argument("--out", metavar="FILE.npz", help="write all scores with their error bounds; ie.load_scores reads it")
    options.add_solver(parser, "auto")


def run(args: argparse.Namespace) -> int:
    """Compute, print and save the scores."""
    dtype = options.dtype(args)
    model = networks.build(networks.load_factory(args.model), args.checkpoint, dtype)
    train = networks.load_arrays(args.train, "--train", dtype)
    test = networks.load_arrays(args.test, "--test", dtype)
    loss = ie.losses.resolve(args.loss, args.reduction)
    influence = ie.Influence(model, loss, train, damping=args.damping, solver=options.solver(args))
    scores = influence.scores(test)
    path = scores.save(args.out) if args.out else None
    num_test, num_train = scores.values.shape
    top = min(args.top, num_train)
    shown = [Shown(t, scores.top(top, t), scores.top(top, t, harmful=True)) for t in range(min(args.tests, num_test))]
    if args.json:
        emit(
            {
                "command": "scores",
                "info": scores.info,
                "largest_relative_residual": float(scores.residual_norm.max()),
                "largest_error_bound": float(scores.error_bound.max()),
                "top": [asdict(row) for row in shown],
                "out": str(path) if path else None,
            }
        )
        return OK
    size, bound = f"P = {scores.info['num_parameters']}, λ = {args.damping:g}", float(scores.error_bound.max())
    print(f"{num_test} test x {num_train} training examples, {size}, solved with {scores.info['solver']}")
    print(f"largest relative residual {float(scores.residual_norm.max()):.1e}; no score is off by more than {bound:.1e}\n")
    rows = [["test example", *(f"helps {k + 1}" for k in range(top)), *(f"harms {k + 1}" for k in range(top))]]
    for row in shown:
        rows.append([str(row.test), *(f"{i}: {value:+.2e}" for i, value in [*row.helpful, *row.harmful])])
    print(aligned(rows))
    print(f"\nall scores in {path}" if path else "\n--out FILE.npz keeps all scores")
    return OK
