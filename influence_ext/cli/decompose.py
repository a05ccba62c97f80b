"""``influence-ext decompose``: the five terms between influence and retraining."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import influence_ext as ie
from influence_ext.cli import datasets, networks, options
from influence_ext.cli.output import FAILED, OK, emit
from influence_ext.errors import ArgumentError

EPILOG = """examples:
  influence-ext decompose --dataset diabetes --hidden 128,128 --activation tanh --epochs 100
  influence-ext decompose --model model.py:build --train train.npz --test test.npz --loss mse_loss --remove 3,17"""

Arrays = datasets.Arrays
Progress = Callable[[str, int, int], None]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Data, network, recipe, what to remove and where to write."""
    parser.epilog, parser.formatter_class = EPILOG, argparse.RawDescriptionHelpFormatter
    built_in = parser.add_argument_group("built-in data and networks")
    built_in.add_argument("--dataset", choices=datasets.names(), help="data set that an installed package ships")
    built_in.add_argument("--num-train", type=options.count, help="training examples of the data set (default four fifths of it)")
    built_in.add_argument(
        "--hidden", type=options.counts, default=(128, 128), metavar="W,W", help="hidden widths of the MLP (default 128,128)"
    )
    built_in.add_argument("--activation", choices=networks.ACTIVATIONS, default="tanh", help="of the MLP (default tanh)")
    options.add_model(parser, required=False)
    parser.add_argument("--test", metavar="FILE", help="test data for the correlations, like --train")
    recipe = parser.add_argument_group("recipe")
    recipe.add_argument("--optimizer", choices=("sgd", "adam"), default="sgd", help="default sgd")
    recipe.add_argument("--lr", type=options.positive, default=0.03, help="learning rate (default 0.03)")
    recipe.add_argument("--momentum", type=options.not_negative, default=0.9, help="of sgd (default 0.9)")
    recipe.add_argument("--weight-decay", type=options.not_negative, default=0.0, help="w (default 0)")
    recipe.add_argument("--epochs", type=options.count, default=100, help="K epochs; the branches take K/2 more (default 100)")
    recipe.add_argument("--batch-size", type=options.count, default=128, help="default 128")
    what = parser.add_argument_group("removals")
    what.add_argument("--damping", type=options.positive, default=1e-3, help="λ (default 1e-3)")
    what.add_argument(
        "--num-removed", type=options.count, default=20, help="single training examples to remove, chosen by --seed (default 20)"
    )
    what.add_argument("--remove", type=options.indices, metavar="I,J", help="these examples instead, one by one")
    what.add_argument("--converge", action="store_true", help="solve the retraining branches to convergence instead of K/2 epochs")
    options.add_solver(parser, "lissa")
    parser.add_argument("--out", metavar="FOLDER", help="write decomposition.json and terms.png there")


def run(args: argparse.Namespace) -> int:
    """Train, decompose, print the table."""
    recipe, train, test = protocol(args)
    solver = options.solver(args)
    if args.out and importlib.util.find_spec("matplotlib") is None:
        raise ArgumentError("--out: expected the package matplotlib for the plot, found none; run pip install matplotlib.")
    with progress("base training", args) as report:
        trained = ie.train(recipe, train, progress=report)
    groups = [[i] for i in args.remove] if args.remove else choose(trained.data.num_examples, args.num_removed, args.seed)
    with progress("decomposition", args) as report:
        found = ie.decompose(trained, groups, args.damping, solver, converge=args.converge, progress=report)
    correlations = {kind: {"pearson": c.pearson, "spearman": c.spearman} for kind, c in found.correlations(test).items()} if test else {}
    files = write(found, args.out) if args.out else []
    failed = any(found.left_out(term) for term in found.terms[0])
    if args.json:
        terms = {t: {m: {"mean": found.mean(t, m), "spread": found.spread(t, m)} for m in ("output", "parameter")} for t in found.terms[0]}
        emit(
            {
                "command": "decompose",
                "protocol": found.protocol,
                "removed": found.removed,
                "terms": terms,
                "correlations": correlations,
                "quality": found.quality,
                "files": files,
            }
        )
    else:
        print(found.table())
        if correlations:
            print("\ncorrelation of influence with the real change of the test losses (mean over test examples)")
            for kind, c in correlations.items():
                print(f"  {kind.replace('_', ' '):<16} Pearson {c['pearson']:6.3f}   Spearman {c['spearman']:6.3f}")
        for path in files:
            print(f"wrote {path}")
    return FAILED if failed else OK


def protocol(args: argparse.Namespace) -> tuple[ie.Recipe, Arrays, Arrays | None]:
    """``(recipe, train, test)`` of the options; ``test`` may be ``None``."""
    if bool(args.dataset) == bool(args.model):
        raise ArgumentError(
            "expected either --dataset or --model with --train, got " + ("both" if args.dataset else "neither") + "; give one."
        )
    dtype = options.dtype(args)
    train: Arrays
    test: Arrays | None
    build: Callable[[], torch.nn.Module]
    if args.dataset:
        data = datasets.load(args.dataset, num_train=args.num_train, seed=args.seed, dtype=dtype)
        sizes = (data.num_inputs, *args.hidden, data.num_outputs)
        build, loss, train, test = (lambda: networks.mlp(sizes, args.activation)), data.loss, data.train, data.test
    else:
        if not args.train:
            raise ArgumentError("--train: expected training data with --model, got none; name a .npz or .pt file.")
        build, loss = networks.load_factory(args.model), args.loss
        train = networks.load_arrays(args.train, "--train", dtype)
        test = networks.load_arrays(args.test, "--test", dtype) if args.test else None
    recipe = ie.Recipe(
        build,
        loss,
        optimizer=args.optimizer,
        lr=args.lr,
        momentum=args.momentum,
        weight_decay=args.weight_decay,
        epochs=args.epochs,
        batch_size=args.batch_size,
        seed=args.seed,
        dtype=dtype,
    )
    return recipe, train, test


def choose(num_examples: int, num_removed: int, seed: int) -> list[list[int]]:
    """``num_removed`` different training examples, one a set."""
    if num_removed > num_examples:
        raise ArgumentError(f"--num-removed: expected at most the {num_examples} training examples, got {num_removed}; remove fewer.")
    order = torch.randperm(num_examples, generator=torch.Generator().manual_seed(seed))
    return [[i] for i in order[:num_removed].tolist()]


def write(found: ie.Decomposition, folder: str) -> list[str]:
    """Save numbers and chart; returns the paths."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    found.save(target / "decomposition.json")
    found.plot(target / "terms.png")
    return [str(target / "decomposition.json"), str(target / "terms.png")]


@contextlib.contextmanager
def progress(title: str, args: argparse.Namespace) -> Iterator[bool | Progress]:
    """A bar where rich is installed, the library's own line otherwise; nothing where nobody watches."""
    if args.json or not sys.stderr.isatty():
        yield False
    elif importlib.util.find_spec("rich") is None:
        yield True
    else:
        from influence_ext.cli.progress import Bar

        with Bar(title) as bar:
            yield bar
