"""How the cost of a product grows with N and with V: the sizes of a sweep take turns, and each is a contender of its own."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from bench.cases import Case
from bench.contender import OURS, Call, Contender
from bench.problem import Problem
from bench.products import ggn_contenders


def sweep_contenders(case: Case) -> list[Contender]:
    """Ours at every size, by the names of the steps."""
    return [Contender(f"{OURS} {step.name}", partial(_prepare, step), ggn_contenders(step)[0].flat) for step in case.steps]


def _prepare(step: Case, case: Case, problem: Problem) -> Call:
    return ggn_contenders(step)[0].prepare(step, problem.first(step.num_examples, step.num_vectors))


def linearity(case: Case, seconds: list[float]) -> dict[str, Any]:
    """How far from linear the times of a sweep are, the largest size last.

    Returns:
        ``proportional``, the worst relative deviation of the cost of one example (or vector) from that at the largest size; ``affine``,
        the worst from ``a + b · size``, fitted to relative errors; ``fixed``, its a in seconds.
    """
    sizes = torch.tensor([s.num_examples if case.quantity == "sweep-n" else s.num_vectors for s in case.steps], dtype=torch.float64)
    times = torch.tensor(seconds, dtype=torch.float64)
    unit = times / sizes
    rows = torch.stack([1 / times, sizes / times], dim=1)
    a, b = torch.linalg.lstsq(rows, torch.ones(len(times), 1, dtype=torch.float64)).solution.flatten()
    return {
        "proportional": float((unit / unit[-1] - 1).abs().max()),
        "affine": float(((a + b * sizes) / times - 1).abs().max()),
        "fixed": float(a),
        "sizes": [int(size) for size in sizes],
        "seconds": [float(t) for t in times],
    }
