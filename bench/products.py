"""Products with the Gauss-Newton matrix and the Hessian: this library, torch.func eager and compiled, and curvlinops."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, grad, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.cases import Case
from bench.contender import (
    OURS,
    Call,
    Contender,
    Tensors,
    compile_static,
    listed,
    parameters,
    same,
    stacked,
    stacked_one,
    trailing,
    unflatten,
)
from bench.problem import LOSS_MODULES, Problem

# ---------------------------------------------------------------------------------------------------------------------
# This library


def _ours_ggn(case: Case, problem: Problem) -> Call:
    import influence_ext as ie

    G = ie.GGN(problem.model, LOSS_MODULES[problem.loss](), (problem.X, problem.y))
    return lambda: G.matmat(problem.vectors)


def _ours_hessian(case: Case, problem: Problem) -> Call:
    import influence_ext as ie

    H = ie.Hessian(problem.model, LOSS_MODULES[problem.loss](), (problem.X, problem.y))
    return lambda: H.matmat(problem.vectors)


# ---------------------------------------------------------------------------------------------------------------------
# torch.func


def functional_ggn(problem: Problem) -> Callable[[Tensors], Tensors]:
    theta, X, y, loss = parameters(problem), problem.X, problem.y, problem.loss_fn

    def product(v: Tensors) -> Tensors:
        def outputs(p: Tensors) -> Tensor:
            with sdpa_kernel(SDPBackend.MATH):  # the fused attention kernel has no forward mode
                return functional_call(problem.model, p, (X,))

        z, t_z = jvp(outputs, (theta,), (v,))
        _, pull_gradient = vjp(grad(lambda z: loss(z, y)), z)
        (g_z,) = pull_gradient(t_z)
        _, pull = vjp(outputs, theta)
        return pull(g_z)[0]

    return product


def _linearize(function: Callable[[Tensors], Any], theta: Tensors) -> tuple[Any, Callable[[Tensors], Any]]:
    warnings.filterwarnings("ignore", "Attempted to insert a get_attr Node", UserWarning)  # about linearize's own graph
    return torch.func.linearize(function, theta)


def _linearized_ggn(problem: Problem) -> Callable[[Tensors], Tensors]:
    """The forward pass, its tangent map and its transpose are computed once, as ours are."""
    theta, loss = parameters(problem), problem.loss_fn

    def outputs(p: Tensors) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return functional_call(problem.model, p, (problem.X,))

    z, push = _linearize(outputs, theta)
    _, pull = vjp(outputs, theta)
    _, pull_gradient = vjp(grad(lambda z: loss(z, problem.y)), z)
    return lambda v: pull(*pull_gradient(push(v)))[0]


def _functional_gradient(problem: Problem) -> Callable[[Tensors], Tensors]:
    def cost(p: Tensors) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return problem.loss_fn(functional_call(problem.model, p, (problem.X,)), problem.y)

    return grad(cost)


def _functional_hessian(problem: Problem) -> Callable[[Tensors], Tensors]:
    theta, gradient = parameters(problem), _functional_gradient(problem)
    return lambda v: jvp(gradient, (theta,), (v,))[1]


def _linearized_hessian(problem: Problem) -> Callable[[Tensors], Tensors]:
    """What does not depend on v is computed once, as ours is."""
    _, product = _linearize(_functional_gradient(problem), parameters(problem))
    return product


Products = Callable[[Problem], Callable[[Tensors], Tensors]]


def _torch_products(make: Products, case: Case, problem: Problem, *, compiled: bool, batched: bool) -> Call:
    product = make(problem)
    if case.num_vectors == 1 or not batched:
        function = compile_static(product) if compiled else product
        rows = unflatten(problem, problem.vectors)
        singles = [{name: t[k] for name, t in rows.items()} for k in range(case.num_vectors)]
        if case.num_vectors == 1:
            return lambda: function(singles[0])
        return lambda: [function(v) for v in singles]
    batch = vmap(product)
    function = compile_static(batch) if compiled else batch
    tangents = unflatten(problem, problem.vectors)
    return lambda: function(tangents)


# ---------------------------------------------------------------------------------------------------------------------
# curvlinops


def _curvlinops(operator: str, case: Case, problem: Problem) -> Call:
    import curvlinops

    G = getattr(curvlinops, operator)(
        problem.model,
        LOSS_MODULES[problem.loss](),
        [p for p in problem.model.parameters() if p.requires_grad],
        [(problem.X, problem.y)],
        check_deterministic=False,
    )
    columns = [t.movedim(0, -1).contiguous() for t in unflatten(problem, problem.vectors).values()]

    def product() -> Any:
        with sdpa_kernel(SDPBackend.MATH):
            return G @ columns

    return product


# ---------------------------------------------------------------------------------------------------------------------
# The Hessian of the loss alone


def _ours_loss_hessian(case: Case, problem: Problem, *, in_place: bool) -> Call:
    from influence_ext import _C
    from influence_ext.losses import resolve

    H = resolve(LOSS_MODULES[problem.loss]()).hessian(problem.X, problem.y).scaled(1 / len(problem.X))
    if not in_place:
        return lambda: H.matmat(problem.vectors)
    U = problem.vectors.clone()  # multiplied again and again: the first call alone is right, all of them take as long

    def product() -> Tensor:
        _C.output_hessian(H.shape, H.scale, H.state, H.weights, 0, U)
        return U

    return product


def _torch_loss_hessian(case: Case, problem: Problem, *, compiled: bool) -> Call:
    """By the formula; p is computed once, as ours is."""
    p, factor = problem.X.softmax(dim=1), 1 / len(problem.X)

    def product(p: Tensor, U: Tensor) -> Tensor:
        return factor * p * (U - (p * U).sum(2, keepdim=True))

    function = compile_static(product) if compiled else product
    return lambda: function(p, problem.vectors)


def loss_hessian_contenders(case: Case) -> list[Contender]:
    def flat(result: Tensor) -> Tensor:
        return result.flatten(1)

    return [
        Contender(OURS, partial(_ours_loss_hessian, in_place=False), flat),
        Contender(f"{OURS} in place", partial(_ours_loss_hessian, in_place=True), flat),
        Contender("torch, by formula", partial(_torch_loss_hessian, compiled=False), flat),
        Contender("torch.compile, by formula", partial(_torch_loss_hessian, compiled=True), flat),
    ]


# ---------------------------------------------------------------------------------------------------------------------


def _torch_contenders(case: Case, make: Products, forms: tuple[tuple[str, bool], ...]) -> list[Contender]:
    """One of each form (name, compiled); for several vectors both under vmap and in a loop."""
    found = []
    for name, compiled in forms:
        prepare = partial(_torch_products, make, compiled=compiled)
        if case.num_vectors == 1:
            found.append(Contender(name, partial(prepare, batched=False), stacked_one))
        else:
            found.append(Contender(f"{name}, vmap", partial(prepare, batched=True), stacked))
            found.append(Contender(f"{name}, loop", partial(prepare, batched=False), listed))
    return found


_EAGER_AND_COMPILED = (("torch.func", False), ("torch.compile", True))


def ggn_contenders(case: Case) -> list[Contender]:
    return [
        Contender(OURS, _ours_ggn, same),
        *_torch_contenders(case, functional_ggn, _EAGER_AND_COMPILED),
        *_torch_contenders(case, _linearized_ggn, (("torch.func.linearize", False),)),
        Contender("curvlinops", partial(_curvlinops, "GGNLinearOperator"), trailing),
    ]


def hessian_contenders(case: Case) -> list[Contender]:
    return [
        Contender(OURS, _ours_hessian, same),
        *_torch_contenders(case, _functional_hessian, _EAGER_AND_COMPILED),
        *_torch_contenders(case, _linearized_hessian, (("torch.func.linearize", False),)),
        Contender("curvlinops", partial(_curvlinops, "HessianLinearOperator"), trailing),
    ]
