"""Losses: value, gradient, Hessian and Bregman divergence at the network's outputs.

A loss is given as an ``nn`` module, the name of its functional, the functional itself or any callable, and resolved once into a
:class:`Loss`: ``J = c Σ_n ℓ_n``, where ``ℓ_n`` depends on example n alone and c is :meth:`Loss.factor` of the data set's targets.
"""

from influence_ext.losses.base import Loss
from influence_ext.losses.hessian import OutputHessian
from influence_ext.losses.resolve import NATIVE, HalfMSE, LossLike, half_mse_loss, resolve

__all__ = ["NATIVE", "HalfMSE", "Loss", "LossLike", "OutputHessian", "half_mse_loss", "resolve"]
