"""Who takes part in which case."""

from __future__ import annotations

from collections.abc import Callable

from bench.cases import Case
from bench.contender import Contender
from bench.per_example import per_example_contenders
from bench.products import ggn_contenders, hessian_contenders, loss_hessian_contenders
from bench.retraining import retraining_contenders
from bench.scaling import sweep_contenders
from bench.solves import solve_contenders

_CONTENDERS: dict[str, Callable[[Case], list[Contender]]] = {
    "ggn": ggn_contenders,
    "hessian": hessian_contenders,
    "loss-hessian": loss_hessian_contenders,
    "grads": per_example_contenders,
    "grads-out": per_example_contenders,
    "norms": per_example_contenders,
    "dots": per_example_contenders,
    "gram": per_example_contenders,
    "solve": solve_contenders,
    "retrain": retraining_contenders,
    "sweep-n": sweep_contenders,
    "sweep-v": sweep_contenders,
}


def contenders(case: Case) -> list[Contender]:
    """All contenders of a case, ours first."""
    return _CONTENDERS[case.quantity](case)
