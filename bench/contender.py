"""What takes part in a case, and the layouts in which contenders want vectors and give answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.cases import Case
from bench.problem import Problem

OURS = "influence_ext"
Call = Callable[[], Any]
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Contender:
    """One way to compute a case's quantity.

    Attributes:
        name: ours begin with ``influence_ext``.
        prepare: does all that a user does once (data resident, vectors in the peer's own layout, compilation left to the first call) and
            returns the call that is timed.
        flat: turns the call's result into the layout of :func:`bench.reference.reference`; not timed.
        limit: largest error against float64 that still counts as the right answer.
    """

    name: str
    prepare: Callable[[Case, Problem], Call]
    flat: Callable[[Any], Tensor]
    limit: float = 1e-4

    @property
    def ours(self) -> bool:
        return self.name.startswith(OURS)


def parameters(problem: Problem) -> Tensors:
    return {name: p.detach() for name, p in problem.model.named_parameters()}


def unflatten(problem: Problem, V: Tensor) -> Tensors:
    """``[V, P]`` → name → ``[V, *shape]``, contiguous."""
    values = parameters(problem)
    pieces = V.split([p.numel() for p in values.values()], dim=-1)
    shapes = ((name, p.shape) for name, p in values.items())
    return {name: t.reshape(*V.shape[:-1], *shape).contiguous() for (name, shape), t in zip(shapes, pieces, strict=True)}


def stacked(result: Tensors) -> Tensor:
    """name → ``[V, *shape]`` to ``[V, P]``; also per-example gradients to ``[N, P]``."""
    return torch.cat([t.flatten(1) for t in result.values()], dim=1)


def stacked_one(result: Tensors) -> Tensor:
    return torch.cat([t.flatten() for t in result.values()])[None]


def listed(result: list[Tensors]) -> Tensor:
    return torch.cat([stacked_one(r) for r in result])


def trailing(result: list[Tensor]) -> Tensor:
    """curvlinops' ``[*shape, V]`` to ``[V, P]``."""
    return torch.cat([t.flatten(0, -2) for t in result]).T


def same(result: Tensor) -> Tensor:
    return result


def transposed(result: Tensor) -> Tensor:
    return result.T


def compile_static(function: Callable[..., Any]) -> Callable[..., Any]:
    """For these very shapes: fastest, and forward mode under symbolic shapes does not compile at all."""
    return torch.compile(function, dynamic=False)
