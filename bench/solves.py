"""Solving ``(G + λI) x = b`` to a residual: this library's solvers, and conjugate gradients as other libraries run them.

Operators and solvers are made anew in each call: forward passes and factorisations belong to the price. The answer's true residual is
computed in float64 before anything is timed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, grad, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, TensorDataset

from bench.cases import TOLERANCE, Case
from bench.contender import OURS, Call, Contender, compile_static, parameters, same, stacked, unflatten
from bench.problem import LOSS_MODULES, Problem
from bench.products import functional_ggn

MAX_STEPS = 5000
MAX_ROOTS = 4000  # beyond that the exact solve, of order (NC)³, is no contender
LIMIT = 1.05 * TOLERANCE  # rounding lets the true residual drift from the one that a recurrence sees


# ---------------------------------------------------------------------------------------------------------------------
# This library


def _ours(name: str, case: Case, problem: Problem) -> Call:
    import influence_ext as ie

    options: dict[str, Any] = {"rtol": TOLERANCE} | ({} if name == "Dual" else {"max_steps": MAX_STEPS})

    def solve() -> Tensor:
        G = ie.GGN(problem.model, LOSS_MODULES[problem.loss](), (problem.X, problem.y), damping=case.damping)
        return getattr(ie.solvers, name)(**options).solve(G, problem.vectors).value

    return solve


# ---------------------------------------------------------------------------------------------------------------------
# Plain PyTorch


def conjugate_gradients(multiply: Callable[[Tensor], Tensor], B: Tensor) -> Tensor:
    """All rows of ``B`` ``[V, P]`` at once, each with its own recurrence, until the last has converged."""
    X, R = torch.zeros_like(B), B.clone()
    D, squares = R.clone(), R.square().sum(1)
    goal = (TOLERANCE**2) * squares
    for _ in range(MAX_STEPS):
        if bool((squares <= goal).all()):
            break
        Q = multiply(D)
        alpha = squares / (D * Q).sum(1)
        X += alpha[:, None] * D
        R -= alpha[:, None] * Q
        before, squares = squares, R.square().sum(1)
        D = R + (squares / before)[:, None] * D
    return X


def _compiled_cg(case: Case, problem: Problem) -> Call:
    """What a user would write: the batched product under torch.compile, and the recurrence above."""
    product = compile_static(vmap(functional_ggn(problem)))

    def multiply(D: Tensor) -> Tensor:
        return stacked(product(unflatten(problem, D))) + case.damping * D

    return lambda: conjugate_gradients(multiply, problem.vectors)


def _pydvl(case: Case, problem: Problem) -> Call:
    """pyDVL's ``CgInfluence``: Hessian products by reverse mode over reverse mode, one right-hand side after another."""
    theta = parameters(problem)

    def cost(p: dict[str, Tensor]) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return problem.loss_fn(functional_call(problem.model, p, (problem.X,)), problem.y)

    def multiply(D: Tensor) -> Tensor:
        _, pull = vjp(grad(cost), theta)
        (product,) = pull({name: t[0] for name, t in unflatten(problem, D).items()})
        return torch.cat([t.flatten() for t in product.values()])[None] + case.damping * D

    return lambda: torch.cat([conjugate_gradients(multiply, b[None]) for b in problem.vectors])


# ---------------------------------------------------------------------------------------------------------------------
# Libraries


def _curvlinops(case: Case, problem: Problem) -> Call:
    from curvlinops import CGInverseLinearOperator, GGNLinearOperator
    from curvlinops.examples import IdentityLinearOperator

    theta, columns = [p for p in problem.model.parameters() if p.requires_grad], problem.vectors.T.contiguous()

    def solve() -> Tensor:
        loss, data = LOSS_MODULES[problem.loss](), [(problem.X, problem.y)]
        G = GGNLinearOperator(problem.model, loss, theta, data, check_deterministic=False)
        damped = G + case.damping * IdentityLinearOperator([tuple(p.shape) for p in theta], problem.X.device, case.dtype)
        # it stops at the mean residual over the columns: half the tolerance brings the worst of them below it
        inverse = CGInverseLinearOperator(damped, tolerance=TOLERANCE / 2, max_iter=MAX_STEPS, max_tridiag_iter=0, stop_updating_after=0.0)
        return (inverse @ columns).T

    return solve


def _torch_influence(case: Case, problem: Problem) -> Call:
    """torch-influence's ``CGInfluenceModule(gnh=True)``: double backward, differentiated anew in each product, under SciPy's CG."""
    from bench.adapters.autograd_influence import CGInfluenceModule

    objective = SimpleNamespace(
        train_outputs=lambda model, batch: model(batch[0]),
        train_loss_on_outputs=lambda outputs, batch: problem.loss_fn(outputs, batch[1]),
        train_regularization=lambda theta: 0.0 * theta.square().sum(),
    )
    loader = DataLoader(TensorDataset(problem.X, problem.y), batch_size=len(problem.X))
    module = CGInfluenceModule(
        model=copy.deepcopy(problem.model),
        objective=objective,
        train_loader=loader,
        test_loader=loader,
        device=problem.X.device,
        damp=case.damping,
        gnh=True,
        rtol=TOLERANCE,
        atol=0.0,
        maxiter=MAX_STEPS,
    )
    return lambda: torch.stack([module.inverse_hvp(b) for b in problem.vectors])


# ---------------------------------------------------------------------------------------------------------------------


def solve_contenders(case: Case) -> list[Contender]:
    names = ["CG"] if case.num_vectors == 1 else ["CG", "BlockCG"]
    if case.num_examples * case.workload.num_outputs <= MAX_ROOTS:
        names.append("Dual")
    found = [Contender(f"{OURS} {name}", partial(_ours, name), same, LIMIT) for name in names]
    found.append(Contender("torch.compile, CG", _compiled_cg, same, LIMIT))
    found.append(Contender("curvlinops, CG", _curvlinops, same, LIMIT))
    found.append(Contender("as torch-influence, CG", _torch_influence, same, LIMIT))
    if case.workload.is_linear:  # the Hessian, which is pyDVL's matrix, is then the Gauss-Newton matrix
        found.append(Contender("as pyDVL, CG", _pydvl, same, LIMIT))
    return found
