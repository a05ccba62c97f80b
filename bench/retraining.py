"""Retraining without each of 20 examples: together (``retrain_many``), one by one (``retrain``), and a loop in plain PyTorch.

    python -m bench.retraining                      an MLP 784-128-10 on 1,280 images, batches of 128
    python -m bench.retraining --float64 --sets 8   other sizes; --help lists them
    OMP_NUM_THREADS=1 python -m bench.retraining --cpu-time    processor time, on a machine that is busy with other things

Every contender's parameters are compared with the plain loop's before anything is timed. The contenders take turns in one run; the table
has medians, ratios, and the floor: the products of forward and backward pass over the fastest matrix product measured in the same run.
Exit status: 0 the answers agree, 1 they do not.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import influence_ext as ie
from bench import machine
from bench.floor import measure_rates
from bench.timing import interleave


@dataclass(frozen=True)
class Task:
    """What is trained and how often."""

    num_examples: int
    num_sets: int
    epochs: int
    batch_size: int
    hidden: int
    dtype: torch.dtype

    @property
    def flops(self) -> float:
        """Of the products that cannot be left out: two of the first layer (its input needs no cotangent), three of the second."""
        per_example = 2 * (2 * 784 * self.hidden + 3 * self.hidden * 10)
        return float(per_example * self.num_examples * self.epochs * self.num_sets)


def build(task: Task) -> nn.Module:
    return nn.Sequential(nn.Linear(784, task.hidden), nn.ReLU(), nn.Linear(task.hidden, 10)).to(task.dtype)


def images(task: Task, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Standardised pixels and labels as dense as such data are; only their shapes matter to the time."""
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(task.num_examples, 784, generator=g, dtype=task.dtype)
    return X, (X @ torch.randn(784, 10, generator=g, dtype=task.dtype)).argmax(dim=1)


def plain(run: ie.Run, removed: int, epochs: int) -> Tensor:
    """A user's loop over the warm start's epochs: an ``nn.Module`` and ``torch.optim.SGD``, the removed example masked out of its batch."""
    recipe = run.recipe
    model = copy.deepcopy(run.model).train()
    optimizer = torch.optim.SGD(model.parameters(), recipe.lr, recipe.momentum)
    with torch.no_grad():
        start = dict(zip(run_names(run), run.final.moments[0].split([p.numel() for p in model.parameters()]), strict=True))
    for name, p in model.named_parameters():
        optimizer.state[p]["momentum_buffer"] = start[name].view_as(p).clone()
    X, y = run.data.inputs[0], run.data.targets
    for epoch in range(recipe.epochs, recipe.epochs + epochs):
        for batch in recipe.batch_order(epoch, len(X)).split(recipe.batch_size):
            kept = batch[batch != removed]
            optimizer.zero_grad()
            (F.cross_entropy(model(X[kept]), y[kept], reduction="sum") / len(batch)).backward()
            optimizer.step()
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def run_names(run: ie.Run) -> list[str]:
    return [name for name, _ in run.model.named_parameters()]


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    task = Task(args.examples, args.sets, args.epochs, args.batch_size, args.hidden, torch.float64 if args.float64 else torch.float32)
    recipe = ie.Recipe(lambda: build(task), nn.CrossEntropyLoss(), lr=0.01, epochs=1, batch_size=task.batch_size)
    run = ie.train(recipe, images(task))
    sets = [[i] for i in range(task.num_sets)]
    calls = {
        "plain PyTorch": lambda: [plain(run, i, task.epochs) for (i,) in sets],
        "one by one (retrain)": lambda: [ie.retrain(run, group, "warm", epochs=task.epochs).params for group in sets],
        "together (retrain_many)": lambda: [r.params for r in ie.retrain_many(run, sets, "warm", epochs=task.epochs)],
    }
    found = {name: torch.stack(call()) for name, call in calls.items()}
    oracle, limit = found["plain PyTorch"], 1e-10 if args.float64 else 1e-4
    errors = {name: float((theta - oracle).norm() / oracle.norm()) for name, theta in found.items()}
    rates = measure_rates(task.dtype)
    clock = time.process_time if args.cpu_time else time.perf_counter
    times = interleave(calls, seconds=args.seconds, max_rounds=15, clock=clock)
    base, floor = times["plain PyTorch"].median, task.flops / rates.gemm
    print(
        f"{machine.cpu_model()}, {torch.get_num_threads()} threads, load {machine.description(torch.device('cpu'))['load']}; torch "
        f"{torch.__version__}; {task.num_sets} x MLP 784-{task.hidden}-10 {task.dtype}, N = {task.num_examples}, batches of "
        f"{task.batch_size}, {task.epochs} epochs; {rates.gemm / 1e9:.0f} GFLOP/s ({rates.gemm_route})"
    )
    for name, timing in times.items():
        spread = f"{timing.q1:.3g} to {timing.q3:.3g}"
        share = f"{100 * floor / timing.median:3.0f} % of the floor"
        print(f"{name:24s} {timing.median:8.3g} s ({spread})  {base / timing.median:5.2f}x  {share}  relative error {errors[name]:.1e}")
    print(f"{'floor':24s} {floor:8.3g} s  {base / floor:5.2f}x")
    wrong = [name for name, e in errors.items() if not e <= limit]
    if wrong:
        print(f"bench.retraining: expected a relative error of at most {limit:g}, got more from {', '.join(wrong)}.", file=sys.stderr)
    return 1 if wrong else 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.retraining", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--examples", type=int, default=1280, help="training examples (1280)")
    parser.add_argument("--sets", type=int, default=20, help="removed examples, a training each (20)")
    parser.add_argument("--epochs", type=int, default=5, help="epochs of each training (5)")
    parser.add_argument("--batch-size", type=int, default=128, help="examples in a batch (128)")
    parser.add_argument("--hidden", type=int, default=128, help="units of the hidden layer (128)")
    parser.add_argument("--float64", action="store_true", help="in float64 instead of float32")
    parser.add_argument("--cpu-time", action="store_true", help="processor time of all threads instead of the clock's")
    parser.add_argument("--seconds", type=float, default=60.0, help="time for all rounds together (60)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())
