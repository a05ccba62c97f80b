"""Float64 oracles in plain PyTorch: the obviously correct slow way to every quantity of this library.

Nothing here shares code with the rest of the package, and nothing here touches the extension. Losses are plain
callables ``loss(output, target)`` that return a scalar; the loss ``ℓ_n`` of an example is that callable on a batch
of one.
"""

from __future__ import annotations

from influence_ext.reference.bregman import bregman_divergence, linearized_pbrf, pbo
from influence_ext.reference.ggn import ggn, loss_gradient, loss_hessian, loss_values, reduction_factor
from influence_ext.reference.influence import (
    damped_solve,
    influence_scores,
    parameter_change,
    ridge_fit,
    ridge_leave_one_out,
    ridge_response,
)
from influence_ext.reference.jacobian import jacobian, outputs, parameter_vector, trainable, with_parameters
from influence_ext.reference.per_example import batch_gradient, per_example_grads
from influence_ext.reference.products import (
    ggn_products,
    hessian_products,
    jacobian_products,
    jacobian_transpose_products,
    plain_kernels,
)

__all__ = [
    "batch_gradient",
    "bregman_divergence",
    "damped_solve",
    "ggn",
    "ggn_products",
    "hessian_products",
    "influence_scores",
    "jacobian",
    "jacobian_products",
    "jacobian_transpose_products",
    "linearized_pbrf",
    "loss_gradient",
    "loss_hessian",
    "loss_values",
    "outputs",
    "parameter_change",
    "parameter_vector",
    "pbo",
    "per_example_grads",
    "plain_kernels",
    "reduction_factor",
    "ridge_fit",
    "ridge_leave_one_out",
    "ridge_response",
    "trainable",
    "with_parameters",
]
