"""Retraining without each of several examples: together (``retrain_many``), one by one (``retrain``), and in plain PyTorch.

    python -m bench.retraining                      the row of the table, an MLP 784-128-10 on 1,280 images, batches of 128
    python -m bench.retraining --float64 --sets 8   other sizes; --help lists them
    OMP_NUM_THREADS=1 python -m bench.retraining --cpu-time    processor time, on a machine that is busy with other things

The warm start: a base training of one epoch, then five more for each removed example. Whoever takes part is compared with a plain loop in
float64 before anything is timed. Exit status: 0 the answers agree, 1 they do not.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap

import influence_ext as ie
from bench import machine
from bench.cases import EPOCHS, Case
from bench.contender import OURS, Call, Contender, compile_static, same
from bench.floor import count, measure_rates
from bench.problem import LOSS_MODULES, Problem
from bench.reference import error
from bench.timing import interleave
from bench.workloads import MLP

LR, MOMENTUM = 0.01, 0.9


@dataclass(frozen=True)
class Schedule:
    """Epochs of a branch, and examples in a batch."""

    epochs: int = EPOCHS
    batch_size: int = 128


TABLE = Schedule()


def recipe_of(problem: Problem, schedule: Schedule) -> ie.Recipe:
    loss = LOSS_MODULES[problem.loss]()
    return ie.Recipe(lambda: copy.deepcopy(problem.model), loss, lr=LR, momentum=MOMENTUM, epochs=1, batch_size=schedule.batch_size)


def batches(problem: Problem, schedule: Schedule) -> tuple[list[Tensor], list[Tensor]]:
    """Those of the base training and those of a branch, in the order that the recipe draws."""
    recipe, N = recipe_of(problem, schedule), len(problem.X)
    orders = [recipe.batch_order(epoch, N).to(problem.X.device) for epoch in range(1 + schedule.epochs)]
    base, *branch = [order.split(schedule.batch_size) for order in orders]
    return list(base), [batch for order in branch for batch in order]


def trained(problem: Problem, order: list[Tensor]) -> tuple[nn.Module, torch.optim.SGD]:
    """The base training as a user writes it; the branches go on from here."""
    model = copy.deepcopy(problem.model).train()
    optimizer = torch.optim.SGD(model.parameters(), LR, MOMENTUM)
    for batch in order:
        _step(problem, model, optimizer, batch, len(batch))
    return model, optimizer


def _step(problem: Problem, model: nn.Module, optimizer: torch.optim.SGD, kept: Tensor, size: int) -> None:
    optimizer.zero_grad()
    (F.cross_entropy(model(problem.X[kept]), problem.y[kept], reduction="sum") / size).backward()
    optimizer.step()


def retrained(case: Case, problem: Problem, schedule: Schedule = TABLE) -> Tensor:
    """``[V, P]``, one plain loop for each removed example: an ``nn.Module`` and ``torch.optim.SGD``, the example left out of its batch."""
    return _plain(schedule, case, problem)()


def _plain(schedule: Schedule, case: Case, problem: Problem) -> Call:
    base, order = batches(problem, schedule)
    model, optimizer = trained(problem, base)

    def one(removed: int) -> Tensor:
        branch = copy.deepcopy(model)
        stepper = torch.optim.SGD(branch.parameters(), LR, MOMENTUM)
        stepper.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for batch in order:
            _step(problem, branch, stepper, batch[batch != removed], len(batch))
        return torch.cat([p.detach().flatten() for p in branch.parameters()])

    return lambda: torch.stack([one(i) for i in range(case.num_vectors)])


def _vmapped(schedule: Schedule, case: Case, problem: Problem, *, compiled: bool) -> Call:
    """All sets in one batch of parameters under ``vmap``, as torch's guide to ensembles does it; the removed example has weight 0."""
    base, order = batches(problem, schedule)
    model, optimizer = trained(problem, base)
    theta, _ = stack_module_state([model] * case.num_vectors)
    momenta = {name: optimizer.state[p]["momentum_buffer"] for name, p in model.named_parameters()}
    removed = torch.arange(case.num_vectors, device=problem.X.device)

    def cost(p: dict[str, Tensor], weights: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return (weights * F.cross_entropy(functional_call(model, p, (x,)), t, reduction="none")).mean()

    def step(p: Any, v: Any, weights: Tensor, x: Tensor, t: Tensor) -> tuple[Any, Any]:
        g = vmap(grad(cost), in_dims=(0, 0, None, None))(p, weights, x, t)
        v = {name: MOMENTUM * v[name] + g[name] for name in p}
        return {name: p[name] - LR * v[name] for name in p}, v

    function = compile_static(step) if compiled else step

    def call() -> Tensor:
        p = {name: t.detach() for name, t in theta.items()}
        v = {name: m.expand(case.num_vectors, *m.shape) for name, m in momenta.items()}
        for batch in order:
            weights = (batch != removed[:, None]).to(case.dtype)
            p, v = function(p, v, weights, problem.X[batch], problem.y[batch])
        return torch.cat([t.flatten(1) for t in p.values()], dim=1)

    return call


def _ours(schedule: Schedule, case: Case, problem: Problem, *, together: bool) -> Call:
    run = ie.train(recipe_of(problem, schedule), (problem.X, problem.y))
    sets, epochs = [[i] for i in range(case.num_vectors)], schedule.epochs
    if together:
        return lambda: torch.stack([r.params for r in ie.retrain_many(run, sets, "warm", epochs=epochs)])
    return lambda: torch.stack([ie.retrain(run, group, "warm", epochs=epochs).params for group in sets])


def retraining_contenders(case: Case, schedule: Schedule = TABLE) -> list[Contender]:
    limit = 1e-10 if case.dtype == torch.float64 else 1e-4
    return [
        Contender(f"{OURS} together", partial(_ours, schedule, together=True), same, limit),
        Contender(f"{OURS} one by one", partial(_ours, schedule, together=False), same, limit),
        Contender("plain PyTorch", partial(_plain, schedule), same, limit),
        Contender("torch.func, vmap", partial(_vmapped, schedule, compiled=False), same, limit),
        Contender("torch.compile, vmap", partial(_vmapped, schedule, compiled=True), same, limit),
    ]


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    schedule = Schedule(args.epochs, args.batch_size)
    network = MLP("retrained", (784, args.hidden, 10), "relu", "cross_entropy")
    case = Case("retrain", network, args.examples, args.sets, torch.float64 if args.float64 else torch.float32)
    problem = case.problem()
    oracle = retrained(case, problem.to(torch.float64), schedule)
    chosen = [c for c in retraining_contenders(case, schedule) if args.compile or "compile" not in c.name]
    calls = {c.name: c.prepare(case, problem) for c in chosen}
    errors = {name: error(case, problem, call(), oracle) for name, call in calls.items()}
    rates = measure_rates(case.dtype)
    clock = time.process_time if args.cpu_time else time.perf_counter
    times = interleave(calls, seconds=args.seconds, max_rounds=15, clock=clock)
    counted = count(case)
    assert counted is not None
    base, floor = times["plain PyTorch"].median, counted[0] * schedule.epochs / EPOCHS / rates.gemm
    print(
        f"{machine.cpu_model()}, {torch.get_num_threads()} threads; torch {torch.__version__}; {args.sets} x {network.title} {case.dtype}, "
        f"N = {args.examples}, {schedule}; {rates.gemm / 1e9:.0f} GFLOP/s ({rates.gemm_route})"
    )
    for name, timing in times.items():
        spread, share = f"{timing.q1:.3g} to {timing.q3:.3g}", f"{100 * floor / timing.median:3.0f} % of the floor"
        print(f"{name:26s} {timing.median:8.3g} s ({spread})  {base / timing.median:5.2f}x  {share}  relative error {errors[name]:.1e}")
    print(f"{'floor':26s} {floor:8.3g} s  {base / floor:5.2f}x")
    wrong = [c.name for c in chosen if not errors[c.name] <= c.limit]
    if wrong:
        print(
            f"bench.retraining: expected a relative error of at most {chosen[0].limit:g}, got more from {', '.join(wrong)}.",
            file=sys.stderr,
        )
    return 1 if wrong else 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.retraining", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--examples", type=int, default=1280, help="training examples (1280)")
    parser.add_argument("--sets", type=int, default=20, help="removed examples, a training each (20)")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="epochs of each training (5)")
    parser.add_argument("--batch-size", type=int, default=128, help="examples in a batch (128)")
    parser.add_argument("--hidden", type=int, default=128, help="units of the hidden layer (128)")
    parser.add_argument("--float64", action="store_true", help="in float64 instead of float32")
    parser.add_argument("--compile", action="store_true", help="torch.compile takes part too")
    parser.add_argument("--cpu-time", action="store_true", help="processor time of all threads instead of the clock's")
    parser.add_argument("--seconds", type=float, default=60.0, help="time for all rounds together (60)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())
