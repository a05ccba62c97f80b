"""The contenders: this library, torch.func eager and compiled, and curvlinops, each in the form that suits it best.

``prepare(case, problem)`` does all that a user does once (data resident, vectors in the peer's own layout, compilation
left to the first call) and returns the call that is timed; ``flat`` turns the call's result into the layout of
:func:`bench.cases.reference` and is not timed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, grad, jvp, linearize, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.cases import LOSS_MODULES, Case, Problem

OURS = "influence_ext"
Call = Callable[[], Any]
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Contender:
    """One way to compute a case's quantity."""

    name: str
    prepare: Callable[[Case, Problem], Call]
    flat: Callable[[Any], Tensor]
    limit: float = 1e-4  # largest error against float64 that still counts as the right answer

    @property
    def ours(self) -> bool:
        return self.name.startswith(OURS)


def contenders(case: Case) -> list[Contender]:
    """All contenders of a case, ours first."""
    return _CONTENDERS[case.quantity](case)


# ---------------------------------------------------------------------------------------------------------------------
# Layouts


def _parameters(problem: Problem) -> Tensors:
    return {name: p.detach() for name, p in problem.model.named_parameters()}


def _unflatten(problem: Problem, V: Tensor) -> Tensors:
    """``[V, P]`` → name → ``[V, *shape]``, contiguous."""
    parameters = _parameters(problem)
    pieces = V.split([p.numel() for p in parameters.values()], dim=-1)
    shapes = ((name, p.shape) for name, p in parameters.items())
    return {name: t.reshape(*V.shape[:-1], *shape).contiguous() for (name, shape), t in zip(shapes, pieces, strict=True)}


def _stacked(result: Tensors) -> Tensor:
    """name → ``[V, *shape]`` to ``[V, P]``; also per-example gradients to ``[N, P]``."""
    return torch.cat([t.flatten(1) for t in result.values()], dim=1)


def _stacked_one(result: Tensors) -> Tensor:
    return torch.cat([t.flatten() for t in result.values()])[None]


def _trailing(result: list[Tensor]) -> Tensor:
    """curvlinops' ``[*shape, V]`` to ``[V, P]``."""
    return torch.cat([t.flatten(0, -2) for t in result]).T


def _same(result: Tensor) -> Tensor:
    return result


def _transposed(result: Tensor) -> Tensor:
    return result.T


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


def _ours_per_example(case: Case, problem: Problem) -> Call:
    import influence_ext as ie

    loss, data = LOSS_MODULES[problem.loss](), (problem.X, problem.y)
    function = {
        "grads": ie.per_example_grads,
        "norms": ie.per_example_norms,
        "gram": ie.grad_gram,
        "dots": partial(_dots, ie.per_example_dots, problem.vectors),
    }[case.quantity]
    return lambda: function(problem.model, loss, data)


def _dots(function: Callable[..., Tensor], V: Tensor, model: Any, loss: Any, data: Any) -> Tensor:
    return function(model, loss, data, V)


def _ours_solve(solver_name: str, case: Case, problem: Problem) -> Call:
    import influence_ext as ie

    options = {"Dual": {}, "CG": {"rtol": 1e-6, "max_steps": 5000}}[solver_name]

    def solve() -> Tensor:
        # Operator and solver are new each time: forward pass and factorisation belong to the price.
        G = ie.GGN(problem.model, LOSS_MODULES[problem.loss](), (problem.X, problem.y), damping=case.damping)
        return getattr(ie.solvers, solver_name)(**options).solve(G, problem.vectors).value

    return solve


# ---------------------------------------------------------------------------------------------------------------------
# torch.func


def compile_static(function: Callable[..., Any]) -> Callable[..., Any]:
    """For these very shapes: fastest, and forward mode under symbolic shapes does not compile at all."""
    return torch.compile(function, dynamic=False)


def _functional_ggn(problem: Problem) -> Callable[[Tensors], Tensors]:
    parameters, X, y, loss = _parameters(problem), problem.X, problem.y, problem.loss_fn

    def product(v: Tensors) -> Tensors:
        def outputs(p: Tensors) -> Tensor:
            with sdpa_kernel(SDPBackend.MATH):  # the fused attention kernel has no forward mode
                return functional_call(problem.model, p, (X,))

        z, t_z = jvp(outputs, (parameters,), (v,))
        _, pull_gradient = vjp(grad(lambda z: loss(z, y)), z)
        (g_z,) = pull_gradient(t_z)
        _, pull = vjp(outputs, parameters)
        return pull(g_z)[0]

    return product


def _functional_gradient(problem: Problem) -> Callable[[Tensors], Tensors]:
    def cost(p: Tensors) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return problem.loss_fn(functional_call(problem.model, p, (problem.X,)), problem.y)

    return grad(cost)


def _functional_hessian(problem: Problem) -> Callable[[Tensors], Tensors]:
    parameters, gradient = _parameters(problem), _functional_gradient(problem)
    return lambda v: jvp(gradient, (parameters,), (v,))[1]


def _linearized_hessian(problem: Problem) -> Callable[[Tensors], Tensors]:
    """What does not depend on v is computed once, as ours is."""
    _, product = linearize(_functional_gradient(problem), _parameters(problem))
    return product


Products = Callable[[Problem], Callable[[Tensors], Tensors]]


def _torch_products(make: Products, case: Case, problem: Problem, *, compiled: bool, batched: bool) -> Call:
    product = make(problem)
    if case.num_vectors == 1 or not batched:
        function = compile_static(product) if compiled else product
        stacked = _unflatten(problem, problem.vectors)
        singles = [{name: t[k] for name, t in stacked.items()} for k in range(case.num_vectors)]
        if case.num_vectors == 1:
            return lambda: function(singles[0])
        return lambda: [function(v) for v in singles]
    batch = vmap(product)
    function = compile_static(batch) if compiled else batch
    tangents = _unflatten(problem, problem.vectors)
    return lambda: function(tangents)


def _listed(result: list[Tensors]) -> Tensor:
    return torch.cat([_stacked_one(r) for r in result])


def _example_loss(problem: Problem) -> Callable[[Tensors, Tensor, Tensor], Tensor]:
    def loss(p: Tensors, x: Tensor, t: Tensor) -> Tensor:
        return problem.loss_fn(functional_call(problem.model, p, (x[None],)), t[None])

    return loss


def _torch_per_example(case: Case, problem: Problem, *, compiled: bool) -> Call:
    parameters, X, y, V = _parameters(problem), problem.X, problem.y, problem.vectors
    gradients = vmap(grad(_example_loss(problem)), in_dims=(None, 0, 0))

    def norms(p: Tensors) -> Tensor:
        return sum(g.flatten(1).square().sum(1) for g in gradients(p, X, y).values()).sqrt()  # type: ignore[union-attr]

    def gram(p: Tensors) -> Tensor:
        return sum(g.flatten(1) @ g.flatten(1).T for g in gradients(p, X, y).values())  # type: ignore[return-value]

    pieces = _unflatten(problem, V)

    def dots(p: Tensors) -> Tensor:
        return sum(g.flatten(1) @ pieces[name].flatten(1).T for name, g in gradients(p, X, y).items())  # type: ignore[return-value]

    function: Callable[[Tensors], Any] = {
        "grads": lambda p: gradients(p, X, y),
        "norms": norms,
        "gram": gram,
        "dots": dots,
    }[case.quantity]
    if compiled:
        function = compile_static(function)
    return lambda: function(parameters)


def _torch_forward_dots(case: Case, problem: Problem, *, compiled: bool) -> Call:
    """Per-example dots as directional derivatives of the vector of losses: nothing is materialised."""
    parameters, X, y = _parameters(problem), problem.X, problem.y

    def losses(p: Tensors) -> Tensor:
        return vmap(_example_loss(problem), in_dims=(None, 0, 0))(p, X, y)

    def dots(V: Tensors) -> Tensor:
        return vmap(lambda v: jvp(losses, (parameters,), (v,))[1])(V)

    function = compile_static(dots) if compiled else dots
    tangents = _unflatten(problem, problem.vectors)
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
    columns = [t.movedim(0, -1).contiguous() for t in _unflatten(problem, problem.vectors).values()]

    def product() -> Any:
        with sdpa_kernel(SDPBackend.MATH):
            return G @ columns

    return product


# ---------------------------------------------------------------------------------------------------------------------


def _torch_contenders(case: Case, make: Products, forms: tuple[tuple[str, bool], ...]) -> list[Contender]:
    """One of each form (name, compiled); for several vectors both under vmap and in a loop."""
    found = []
    for name, compiled in forms:
        prepare = partial(_torch_products, make, compiled=compiled)
        if case.num_vectors == 1:
            found.append(Contender(name, partial(prepare, batched=False), _stacked_one))
        else:
            found.append(Contender(f"{name}, vmap", partial(prepare, batched=True), _stacked))
            found.append(Contender(f"{name}, loop", partial(prepare, batched=False), _listed))
    return found


_EAGER_AND_COMPILED = (("torch.func", False), ("torch.compile", True))


def _ggn_contenders(case: Case) -> list[Contender]:
    return [
        Contender(OURS, _ours_ggn, _same),
        *_torch_contenders(case, _functional_ggn, _EAGER_AND_COMPILED),
        Contender("curvlinops", partial(_curvlinops, "GGNLinearOperator"), _trailing),
    ]


def _hessian_contenders(case: Case) -> list[Contender]:
    return [
        Contender(OURS, _ours_hessian, _same),
        *_torch_contenders(case, _functional_hessian, _EAGER_AND_COMPILED),
        *_torch_contenders(case, _linearized_hessian, (("torch.func.linearize", False),)),
        Contender("curvlinops", partial(_curvlinops, "HessianLinearOperator"), _trailing),
    ]


def _per_example_contenders(case: Case) -> list[Contender]:
    flat = _stacked if case.quantity == "grads" else _same
    found = [Contender(OURS, _ours_per_example, flat)]
    for name, compiled in (("torch.func", False), ("torch.compile", True)):
        found.append(Contender(f"{name}, vmap", partial(_torch_per_example, compiled=compiled), flat))
        if case.quantity == "dots":
            found.append(Contender(f"{name}, jvp", partial(_torch_forward_dots, compiled=compiled), _transposed))
    return found


def _solve_contenders(case: Case) -> list[Contender]:
    return [
        Contender(f"{OURS} Dual", partial(_ours_solve, "Dual"), _same, limit=1e-8),
        Contender(f"{OURS} CG to 1e-6", partial(_ours_solve, "CG"), _same, limit=1.001e-6),
    ]


_CONTENDERS: dict[str, Callable[[Case], list[Contender]]] = {
    "ggn": _ggn_contenders,
    "hessian": _hessian_contenders,
    "grads": _per_example_contenders,
    "norms": _per_example_contenders,
    "dots": _per_example_contenders,
    "gram": _per_example_contenders,
    "solve": _solve_contenders,
}
