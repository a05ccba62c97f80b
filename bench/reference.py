"""The right answers: float64, reverse mode only (no torch.func), the loss Hessian in closed form."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.problem import Problem

if TYPE_CHECKING:
    from bench.cases import Case

ROWS = 16
"""Rows of an answer compared at a time: large temporaries would leave holes in the heap, and those decide who pays for fresh pages."""


def reference(case: Case, problem: Problem) -> dict[str, Tensor]:
    """The right answer in float64, shaped as :func:`bench.contender.Contender.flat` gives it, by name of
    the step for a sweep, else under "".

    For ``solve`` it is ``(G + λI) x − b`` that is checked (see :func:`error`), so this returns the right-hand sides.
    """
    if case.is_sweep:
        return {step.name: _answer(step, problem.first(step.num_examples, step.num_vectors)) for step in case.steps}
    return {"": _answer(case, problem)}


def _answer(case: Case, problem: Problem) -> Tensor:
    exact = problem.to(torch.float64)
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels cannot be differentiated twice
        if case.quantity == "ggn":
            return ggn_products(exact, exact.vectors[: case.num_checked])
        if case.quantity == "hessian":
            return hessian_products(exact, exact.vectors[: case.num_checked])
    if case.quantity == "loss-hessian":
        return torch.stack([hessian_product(exact, exact.X, u) for u in exact.vectors]).flatten(1)
    if case.quantity == "solve":
        return exact.vectors
    if case.quantity == "retrain":
        from bench.retraining import retrained  # it compares with what this module computes

        return retrained(case, exact)
    if case.quantity == "norms":
        return torch.stack([g.norm() for g in example_gradients(exact)])
    if case.quantity == "dots":
        return torch.stack([exact.vectors @ g for g in example_gradients(exact)])
    gradients = torch.stack(list(example_gradients(exact)))
    return gradients @ gradients.T if case.quantity == "gram" else gradients


def error(case: Case, problem: Problem, answer: Tensor, expected: Tensor) -> float:
    """Relative Frobenius error; for ``solve`` the largest relative residual over the right-hand sides."""
    if case.quantity in ("ggn", "hessian") and len(answer) == case.num_vectors:
        answer = answer[: case.num_checked]
    if answer.shape != expected.shape:
        raise ValueError(f"{case.name}: expected an answer of shape {list(expected.shape)}, got {list(answer.shape)}")
    if case.quantity == "solve":
        exact, answer = problem.to(torch.float64), answer.double().to(expected.device)
        residual = ggn_products(exact, answer) + case.damping * answer - expected
        return float((residual.norm(dim=1) / expected.norm(dim=1)).max())
    off = size = 0.0
    for rows, wanted in zip(answer.split(ROWS), expected.split(ROWS), strict=True):
        off += float((rows.double().to(wanted.device) - wanted).square().sum())
        size += float(wanted.square().sum())
    return (off / size) ** 0.5


def ggn_products(problem: Problem, V: Tensor) -> Tensor:
    """``G V`` row by row: the transpose of a reverse pass is the forward one, so two reverse passes give ``J v``."""
    parameters = list(problem.model.parameters())
    z = problem.model(problem.X)
    dummy = torch.zeros_like(z, requires_grad=True)
    transposed = torch.autograd.grad(z, parameters, dummy, create_graph=True)
    products = []
    for v in V:
        pieces = v.split([p.numel() for p in parameters])
        tangents = [piece.view_as(p) for piece, p in zip(pieces, parameters, strict=True)]
        (jv,) = torch.autograd.grad(transposed, dummy, tangents, retain_graph=True)
        pulled = torch.autograd.grad(z, parameters, hessian_product(problem, z.detach(), jv), retain_graph=True)
        products.append(torch.cat([g.flatten() for g in pulled]))
    return torch.stack(products)


def hessian_products(problem: Problem, V: Tensor) -> Tensor:
    """``∇²J V`` row by row, by reverse mode twice."""
    parameters = list(problem.model.parameters())

    def gradient(value: Tensor) -> Tensor:
        found = torch.autograd.grad(value, parameters, create_graph=True, allow_unused=True, materialize_grads=True)
        return torch.cat([g.flatten() for g in found])

    first = gradient(problem.loss_fn(problem.model(problem.X), problem.y))
    return torch.stack([gradient(first @ v).detach() for v in V])


def hessian_product(problem: Problem, z: Tensor, t_z: Tensor) -> Tensor:
    """``H t`` of the mean-reduced loss at the outputs."""
    if problem.loss == "mse":
        return 2 * t_z / z.numel()
    p = z.softmax(dim=1)
    return (p * t_z - p * (p * t_z).sum(1, keepdim=True)) / (z.numel() // z.shape[1])


def example_gradients(problem: Problem) -> Iterator[Tensor]:
    """``∇ℓ_n`` of each example, one by one, ``[P]``."""
    parameters = list(problem.model.parameters())
    for n in range(problem.X.shape[0]):
        loss = problem.loss_fn(problem.model(problem.X[n : n + 1]), problem.y[n : n + 1])
        yield torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])
