"""The proximal Bregman response function and its linearisation."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from influence_ext import solvers
from influence_ext.bregman.checks import check_damping, check_search
from influence_ext.bregman.minimise import Minimum, minimise
from influence_ext.bregman.objective import BregmanObjective, Reference
from influence_ext.bregman.progress import Progress, reporter
from influence_ext.bregman.recipe import Run
from influence_ext.bregman.response import Response, ResponseStatus, TrainedNetwork, removed_indices
from influence_ext.checks import check_budget, is_number, is_one_of
from influence_ext.context import standalone, warn
from influence_ext.errors import ArgumentError, DivergenceError
from influence_ext.solvers.base import check_solver

EXACT = {torch.float64: 1e-9, torch.float32: 1e-5}
"""Relative residual (in float64) up to which a linear response counts as solved exactly, by the network's dtype."""
MAX_REFINEMENTS = 8

OnFailure = Literal["raise", "return"]


@standalone
def pbrf(
    model_or_run: nn.Module | Run,
    loss: Any = None,
    train_data: Any = None,
    remove: Iterable[int] = (),
    damping: float = 1e-3,
    *,
    weight_decay: float | None = None,
    epsilon: float | None = None,
    rtol: float | None = None,
    max_steps: int = 200,
    memory_budget: int | None = None,
    on_failure: OnFailure = "raise",
    progress: bool | Progress = False,
) -> Response:
    r"""Proximal Bregman response: where θs moves when the examples ``remove`` are taken out of the proximal Bregman objective.

    The local minimum, reached downhill from θs, of

        Q(θ) = c Σ_i D_i(f(θ, x_i), f(θs, x_i)) − ε Σ_{z ∈ S} ℓ_z(θ) + (λ_eff/2) ‖θ − θs‖²,   λ_eff = λ + w,

    with ``D_i`` the Bregman divergence of the loss, ``c = 1/N`` (mean) or ``1`` (sum) and ``ε = c``. θs is stationary at ``ε = 0``
    however well it was trained, and ``dθ/dε`` there is damped Gauss-Newton influence.

    Args:
        model_or_run: Any trained network, or a run (which brings loss, data and weight decay).
        loss: Its loss.
        train_data: ``(X, y)`` or a re-iterable of batches; a pair is not copied, so leave it as it is while the response is used.
        remove: Indices of the training examples removed together.
        damping: λ.
        weight_decay: ``w`` of the training objective; ``None`` means the run's, or 0 for a network.
        epsilon: ε; ``None`` is ``c``, which removes the examples.
        rtol: Goal for ``‖∇Q‖ / ‖∇Q(θs)‖``; ``None`` is 1e-6 in float64 and 1e-4 in float32.
        max_steps: Bound on Newton steps.
        memory_budget: Bytes that one forward state with one product's workspace may take, as in :class:`influence_ext.GGN`; what does not
            fit is recomputed in chunks of examples. Two states are held, three where the network is not float64, and one of the removed
            examples; the data stay in memory (in float64 too), as do the outputs of all examples. ``None``: no limit.
        on_failure: ``"raise"`` on divergence, or ``"return"`` the last point with its status and a :class:`NumericalWarning`. A response
            that merely misses its tolerance is always returned, with that warning.
        progress: ``True`` for a line on stderr, or a function ``(label, done, total)``.

    Returns:
        The response with ``status``, ``gradient_norm``, ``relative_gradient_norm``, ``num_steps`` and ``num_products``.

    Raises:
        ArgumentError: an index out of range or repeated, all examples removed, ``λ + w`` not positive, where the curvature may be singular,
            an option that makes no sense, or a ``memory_budget`` that holds not even one example (the message says what would do).
        DataError, ShapeError, DTypeError, UnsupportedModelError, UnsupportedLossError: see :class:`influence_ext.GGN`.
        DivergenceError: the objective has no local minimum near θs.

    Cost:
        Per Newton step one forward and backward pass and the CG products of one vector (typically 5 steps, 200 products).
        Memory: a float64 tape and one in the network's dtype, a third where that is not float64. With a ``memory_budget`` that they do not
        fit, every product and every gradient costs one forward pass more.

    Reference:
        Bae et al., "If Influence Functions are the Answer, Then What is the Question?", NeurIPS 2022, section 4.
    """
    check_search(rtol, max_steps, who="pbrf")
    memory_budget = check_budget(memory_budget, "pbrf")
    _check_on_failure(on_failure, who="pbrf")
    if epsilon is not None and not is_number(epsilon):
        raise ArgumentError(f"pbrf: expected epsilon to be a finite number, got {epsilon!r}; leave it out to remove the examples.")
    network = TrainedNetwork.of(model_or_run, loss, train_data, weight_decay=weight_decay, who="pbrf")
    removed = removed_indices(remove, network.num_examples, who="pbrf")
    check_damping(damping, network.weight_decay, who="pbrf")
    report = reporter(progress, "pbrf")
    epsilon = None if epsilon is None else float(epsilon)
    response = solve_pbrf(
        Reference(network, memory_budget),
        removed,
        damping,
        epsilon,
        rtol,
        max_steps,
        on_step=lambda step: report("PBRF", step, max_steps),
    )
    report("PBRF", max_steps, max_steps)
    return checked(response, on_failure, who="pbrf")


def solve_pbrf(
    reference: Reference,
    removed: tuple[int, ...],
    damping: float,
    epsilon: float | None = None,
    rtol: float | None = None,
    max_steps: int = 200,
    *,
    first_step: Tensor | None = None,
    on_step: Callable[[int], None] = lambda step: None,
) -> Response:
    """The PBRF on a reference that many removed sets share; ``first_step`` is the linearised response where known."""
    network = reference.network
    epsilon = network.factor if epsilon is None else epsilon
    objective = BregmanObjective.proximal_bregman(reference, removed, epsilon, damping + network.weight_decay)
    minimum = minimise(
        objective,
        torch.zeros_like(network.exact_theta),
        rtol=default_rtol(network.theta.dtype) if rtol is None else rtol,
        max_steps=max_steps,
        first_step=first_step,
        local=True,
        on_step=on_step,
    )
    return response_at(minimum, "pbrf", removed, network)


@standalone
def linearized_pbrf(
    model_or_run: nn.Module | Run,
    loss: Any = None,
    train_data: Any = None,
    remove: Iterable[int] = (),
    damping: float = 1e-3,
    *,
    weight_decay: float | None = None,
    solver: solvers.Solver | None = None,
    memory_budget: int | None = None,
) -> Response:
    r"""The first-order response ``θs + c (G + λ_eff I)⁻¹ Σ_{z ∈ S} ∇ℓ_z(θs)``, solved exactly.

    Args:
        model_or_run: Any trained network, or a run.
        loss: Its loss.
        train_data: ``(X, y)`` or a re-iterable of batches; a pair is not copied, so leave it as it is while the response is used.
        remove: Indices of the training examples removed together.
        damping: λ; ``λ_eff = λ + w``.
        weight_decay: ``w``; ``None`` means the run's, or 0 for a network.
        solver: ``None`` solves to a relative residual of 1e-9 (1e-5 for a float32 network), recomputed in float64.
        memory_budget: See :func:`pbrf`; the solver may take as much beside.

    Returns:
        The response; ``relative_residual`` says how exactly it was solved.

    Raises:
        ArgumentError: an index out of range or repeated, all examples removed, ``λ + w`` not positive, a solver that is none, or a
            ``memory_budget`` that holds not even one example.
        DataError, ShapeError, DTypeError, UnsupportedModelError, UnsupportedLossError: see :class:`influence_ext.GGN`.

    Warns:
        NumericalWarning: the solver missed its tolerance.

    Cost:
        One linear solve with the Gauss-Newton matrix. Memory and what a ``memory_budget`` costs: see :func:`pbrf`.

    Reference:
        Bae et al. 2022, equation 12.
    """
    check_solver(solver, "linearized_pbrf")
    memory_budget = check_budget(memory_budget, "linearized_pbrf")
    network = TrainedNetwork.of(model_or_run, loss, train_data, weight_decay=weight_decay, who="linearized_pbrf")
    removed = removed_indices(remove, network.num_examples, who="linearized_pbrf")
    check_damping(damping, network.weight_decay, who="linearized_pbrf")
    reference = Reference(network, memory_budget)
    response = linear_responses(reference, [removed], damping + network.weight_decay, solver, "linearized_pbrf")[0]
    return checked(response, "return", who="linearized_pbrf")


def linear_responses(
    reference: Reference, groups: list[tuple[int, ...]], damping: float, solver: solvers.Solver | None, kind: str
) -> list[Response]:
    """``θs + c · solver(G + damping I, Σ_{z ∈ S} ∇ℓ_z)`` for all groups in one solve; ``None`` solves to :data:`EXACT`."""
    B = reference.loss_gradients(groups)
    # An outcome is data here: a column that missed its tolerance is reported in its response, not raised for all of them.
    if solver is None:
        solution = _solve_exactly(reference, damping, B)
    else:
        operator = reference.curvature(damping)
        solution = replace(solver, on_failure="return").solve(operator, B.to(operator.dtype))
    columns = zip(groups, solution.value, solution.status, solution.residual_norm.tolist(), strict=True)
    return [
        Response(
            kind,
            group,
            reference.network.exact_theta + reference.network.factor * x.double(),
            reference.network,
            status,
            relative_residual=residual,
            num_products=solution.num_products // len(groups),
        )
        for group, x, status, residual in columns
    ]


def _solve_exactly(reference: Reference, damping: float, B: Tensor) -> solvers.Solution:
    """By a factorisation in float64 where one is cheaper; else by conjugate gradients in the network's dtype, refined in float64."""
    exact = reference.exact_curvature(damping)
    goal = EXACT[reference.network.theta.dtype]
    solver = solvers.auto(exact, len(B), rtol=goal, on_failure="return", memory_budget=reference.memory_budget).solver
    if reference.is_double or isinstance(solver, solvers.FactorisingSolver):
        return solver.solve(exact, B)
    assert isinstance(solver, (solvers.CG, solvers.BlockCG))
    fast = reference.curvature(damping)
    X, num_products, norms = torch.zeros_like(B), 0, B.norm(dim=1).clamp(min=torch.finfo(B.dtype).tiny)
    R, residual = B, B.norm(dim=1) / norms
    for _ in range(MAX_REFINEMENTS):
        worst = float(residual.max())
        if not worst > goal:
            break
        correction = replace(solver, rtol=min(max(0.5 * goal / worst, 1e-4), 0.5), on_failure="return").solve(fast, R.to(fast.dtype))
        X += correction.value.double()
        R = B - exact.matmat(X)
        residual = R.norm(dim=1) / norms
        num_products += correction.num_products + len(B)
    status = [solvers.Status.CONVERGED if r <= goal else solvers.Status.MAX_STEPS for r in residual.tolist()]
    return solvers.Solution(X, status, residual, num_products)


def checked(response: Response, on_failure: OnFailure, *, who: str) -> Response:
    """Raise or warn as the response's status demands."""
    status = response.status
    if status.success:
        return response
    if response.relative_residual is not None:
        reached = f"relative residual {response.relative_residual:.1e}"
    else:
        reached = f"relative gradient norm {response.relative_gradient_norm:.1e} after {response.num_steps} steps"
    why = status.explanation.rstrip(".")
    if status in (ResponseStatus.DIVERGED, ResponseStatus.NON_FINITE) and on_failure == "raise":
        raise DivergenceError(f"{who}: expected a local minimum near the trained parameters, got {reached}; {why}.")
    warn(f"{who}: {reached}; {why}.")
    return response


def _check_on_failure(on_failure: OnFailure, *, who: str) -> None:
    if not is_one_of(on_failure, ("raise", "return")):
        raise ArgumentError(f"{who}: expected on_failure to be 'raise' or 'return', got {on_failure!r}; choose one.")


def response_at(minimum: Minimum, kind: str, removed: tuple[int, ...], network: TrainedNetwork) -> Response:
    """A response from the end of a minimisation."""
    return Response(
        kind,
        removed,
        network.exact_theta + minimum.delta,
        network,
        minimum.status,
        norms=(minimum.gradient_norm, minimum.relative_gradient_norm),
        num_steps=minimum.num_steps,
        num_products=minimum.num_products,
    )


def default_rtol(dtype: torch.dtype) -> float:
    """The relative accuracy asked for where none is given: 1e-6 in float64, 1e-4 in lower types."""
    return 1e-6 if dtype == torch.float64 else 1e-4
