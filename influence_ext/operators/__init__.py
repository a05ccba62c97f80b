"""Curvature operators, Jacobian products and per-example quantities."""

from influence_ext.operators.base import CurvatureOperator, LinearOperator
from influence_ext.operators.fisher import EmpiricalFisher, MonteCarloFisher
from influence_ext.operators.ggn import GGN
from influence_ext.operators.hessian import Hessian
from influence_ext.operators.jacobian import jvp, vjp
from influence_ext.operators.per_example import grad_gram, per_example_dots, per_example_grads, per_example_norms

__all__ = [
    "GGN",
    "CurvatureOperator",
    "EmpiricalFisher",
    "Hessian",
    "LinearOperator",
    "MonteCarloFisher",
    "grad_gram",
    "jvp",
    "per_example_dots",
    "per_example_grads",
    "per_example_norms",
    "vjp",
]
