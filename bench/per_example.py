"""Per-example gradients, their norms, dots and Gram matrix: this library, torch.func eager and compiled, Opacus and BackPACK."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap

from bench.cases import Case
from bench.contender import OURS, Call, Contender, Tensors, compile_static, parameters, same, stacked, transposed, unflatten
from bench.problem import LOSS_MODULES, Problem

# ---------------------------------------------------------------------------------------------------------------------
# This library


def _ours(case: Case, problem: Problem) -> Call:
    import influence_ext as ie

    model, loss, data, V = problem.model, LOSS_MODULES[problem.loss](), (problem.X, problem.y), problem.vectors
    if case.quantity == "grads-out":
        buffer = torch.empty(len(problem.X), V.shape[1], dtype=case.dtype, device=V.device)
        return lambda: ie.per_example_grads(model, loss, data, out=buffer)
    calls: dict[str, Call] = {
        "grads": lambda: ie.per_example_grads(model, loss, data),
        "norms": lambda: ie.per_example_norms(model, loss, data),
        "gram": lambda: ie.grad_gram(model, loss, data),
        "dots": lambda: ie.per_example_dots(model, loss, data, V),
    }
    return calls[case.quantity]


# ---------------------------------------------------------------------------------------------------------------------
# torch.func


def _example_loss(problem: Problem) -> Callable[[Tensors, Tensor, Tensor], Tensor]:
    def loss(p: Tensors, x: Tensor, t: Tensor) -> Tensor:
        return problem.loss_fn(functional_call(problem.model, p, (x[None],)), t[None])

    return loss


def _torch(case: Case, problem: Problem, *, compiled: bool) -> Call:
    theta, X, y, V = parameters(problem), problem.X, problem.y, problem.vectors
    gradients = vmap(grad(_example_loss(problem)), in_dims=(None, 0, 0))

    def norms(p: Tensors) -> Tensor:
        return sum(g.flatten(1).square().sum(1) for g in gradients(p, X, y).values()).sqrt()  # type: ignore[union-attr]

    def gram(p: Tensors) -> Tensor:
        return sum(g.flatten(1) @ g.flatten(1).T for g in gradients(p, X, y).values())  # type: ignore[return-value]

    pieces = unflatten(problem, V)

    def dots(p: Tensors) -> Tensor:
        return sum(g.flatten(1) @ pieces[name].flatten(1).T for name, g in gradients(p, X, y).items())  # type: ignore[return-value]

    every: Callable[[Tensors], Any] = lambda p: gradients(p, X, y)  # noqa: E731
    function = {"grads": every, "grads-out": every, "norms": norms, "gram": gram, "dots": dots}[case.quantity]
    if compiled:
        function = compile_static(function)
    return lambda: function(theta)


def _torch_forward_dots(case: Case, problem: Problem, *, compiled: bool) -> Call:
    """Per-example dots as directional derivatives of the vector of losses: nothing is materialised."""
    theta, X, y = parameters(problem), problem.X, problem.y

    def losses(p: Tensors) -> Tensor:
        return vmap(_example_loss(problem), in_dims=(None, 0, 0))(p, X, y)

    def dots(V: Tensors) -> Tensor:
        return vmap(lambda v: jvp(losses, (theta,), (v,))[1])(V)

    function = compile_static(dots) if compiled else dots
    tangents = unflatten(problem, problem.vectors)
    return lambda: function(tangents)


# ---------------------------------------------------------------------------------------------------------------------
# Libraries that hook into a backward pass


def _quiet() -> None:
    warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)  # it always does where inputs need no gradient


def _opacus(case: Case, problem: Problem) -> Call:
    from opacus.grad_sample import GradSampleModule

    _quiet()
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in problem.model.modules()):
        raise NotImplementedError("Opacus records gradients of modules in training mode, where batch norm has none of single examples")
    module = GradSampleModule(copy.deepcopy(problem.model), loss_reduction="mean").train()
    loss = LOSS_MODULES[problem.loss]()

    def gradients() -> Tensors:
        module.zero_grad(set_to_none=True)
        loss(module(problem.X), problem.y).backward()
        return {name: p.grad_sample for name, p in module.named_parameters()}

    return gradients


def _backpack(extension: str, field: str, convert: bool, case: Case, problem: Problem) -> Call:
    import backpack
    import backpack.extensions

    _quiet()
    module = backpack.extend(copy.deepcopy(problem.model), use_converter=convert)
    module.eval()  # the converter's copy begins in training mode
    loss = backpack.extend(LOSS_MODULES[problem.loss]())
    theta = dict(module.named_parameters())  # the converter keeps names, not their order
    ordered = {name: theta[name] for name, _ in problem.model.named_parameters()}

    def quantities() -> Tensors:
        for p in ordered.values():
            p.grad = None
            p.__dict__.pop(field, None)
        with backpack.backpack(getattr(backpack.extensions, extension)()):
            loss(module(problem.X), problem.y).backward()
        return {name: getattr(p, field) for name, p in ordered.items()}

    return quantities


def _unscaled(result: Tensors) -> Tensor:
    """BackPACK's gradients are those of the mean loss."""
    every = stacked(result)
    return every * len(every)


def _norms_of_squares(result: Tensors) -> Tensor:
    squares = torch.stack(list(result.values())).sum(0)
    return squares.sqrt() * len(squares)


# ---------------------------------------------------------------------------------------------------------------------


def per_example_contenders(case: Case) -> list[Contender]:
    materialised = case.quantity in ("grads", "grads-out")
    flat = stacked if materialised else same
    found = [Contender(OURS, _ours, flat)]
    for name, compiled in (("torch.func", False), ("torch.compile", True)):
        found.append(Contender(f"{name}, vmap", partial(_torch, compiled=compiled), flat))
        if case.quantity == "dots":
            found.append(Contender(f"{name}, jvp", partial(_torch_forward_dots, compiled=compiled), transposed))
    convert = not isinstance(case.workload.build(0), nn.Sequential)
    if materialised:
        found.append(Contender("Opacus", _opacus, flat))
        found.append(Contender("BackPACK", partial(_backpack, "BatchGrad", "grad_batch", convert), _unscaled))
    if case.quantity == "norms":
        found.append(Contender("BackPACK", partial(_backpack, "BatchL2Grad", "batch_l2", convert), _norms_of_squares))
    return found
