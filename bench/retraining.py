"""Retraining without each of several examples: together (``retrain_many``), one by one (``retrain``), and in plain PyTorch.

The warm start: a base training of one epoch, then five more for each removed example, in batches of 128. Whoever takes part is compared
with a plain loop in float64 before anything is timed.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap

import influence_ext as ie
from bench.cases import EPOCHS, Case
from bench.contender import OURS, Call, Contender, compile_static, same
from bench.problem import LOSS_MODULES, Problem

BATCH_SIZE = 128
LR, MOMENTUM = 0.01, 0.9


def recipe_of(problem: Problem) -> ie.Recipe:
    loss = LOSS_MODULES[problem.loss]()
    return ie.Recipe(lambda: copy.deepcopy(problem.model), loss, lr=LR, momentum=MOMENTUM, epochs=1, batch_size=BATCH_SIZE)


def batches(problem: Problem, start: int, stop: int) -> list[Tensor]:
    """The batches of the epochs ``start`` to ``stop``, in the order that the recipe draws."""
    recipe, N = recipe_of(problem), len(problem.X)
    orders = [recipe.batch_order(epoch, N).to(problem.X.device) for epoch in range(start, stop)]
    return [batch for order in orders for batch in order.split(BATCH_SIZE)]


def trained(problem: Problem) -> tuple[nn.Module, torch.optim.SGD]:
    """The base training as a user writes it; the branches go on from here."""
    model = copy.deepcopy(problem.model).train()
    optimizer = torch.optim.SGD(model.parameters(), LR, MOMENTUM)
    for batch in batches(problem, 0, 1):
        _step(problem, model, optimizer, batch, len(batch))
    return model, optimizer


def _step(problem: Problem, model: nn.Module, optimizer: torch.optim.SGD, kept: Tensor, size: int) -> None:
    optimizer.zero_grad()
    (F.cross_entropy(model(problem.X[kept]), problem.y[kept], reduction="sum") / size).backward()
    optimizer.step()


def retrained(case: Case, problem: Problem) -> Tensor:
    """``[V, P]``, one plain loop for each removed example: an ``nn.Module`` and ``torch.optim.SGD``, the example left out of its batch."""
    return _plain(case, problem)()


def _plain(case: Case, problem: Problem) -> Call:
    model, optimizer = trained(problem)
    order = batches(problem, 1, 1 + EPOCHS)

    def one(removed: int) -> Tensor:
        branch = copy.deepcopy(model)
        stepper = torch.optim.SGD(branch.parameters(), LR, MOMENTUM)
        stepper.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for batch in order:
            _step(problem, branch, stepper, batch[batch != removed], len(batch))
        return torch.cat([p.detach().flatten() for p in branch.parameters()])

    return lambda: torch.stack([one(i) for i in range(case.num_vectors)])


def _vmapped(case: Case, problem: Problem, *, compiled: bool) -> Call:
    """All sets in one batch of parameters under ``vmap``, as torch's guide to ensembles does it; the removed example has weight 0."""
    model, optimizer = trained(problem)
    theta, _ = stack_module_state([model] * case.num_vectors)
    momenta = {name: optimizer.state[p]["momentum_buffer"] for name, p in model.named_parameters()}
    order, removed = batches(problem, 1, 1 + EPOCHS), torch.arange(case.num_vectors, device=problem.X.device)

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


def _ours(case: Case, problem: Problem, *, together: bool) -> Call:
    run = ie.train(recipe_of(problem), (problem.X, problem.y))
    sets = [[i] for i in range(case.num_vectors)]
    if together:
        return lambda: torch.stack([r.params for r in ie.retrain_many(run, sets, "warm", epochs=EPOCHS)])
    return lambda: torch.stack([ie.retrain(run, group, "warm", epochs=EPOCHS).params for group in sets])


def retraining_contenders(case: Case) -> list[Contender]:
    limit = 1e-10 if case.dtype == torch.float64 else 1e-4
    return [
        Contender(f"{OURS} together", partial(_ours, together=True), same, limit),
        Contender(f"{OURS} one by one", partial(_ours, together=False), same, limit),
        Contender("plain PyTorch", _plain, same, limit),
        Contender("torch.func, vmap", partial(_vmapped, compiled=False), same, limit),
        Contender("torch.compile, vmap", partial(_vmapped, compiled=True), same, limit),
    ]
