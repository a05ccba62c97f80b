"""The operators of curvlinops-for-pytorch on this library's kernels: same names, arguments, scaling and conventions.

>>> from influence_ext.adapters.curvlinops import GGNLinearOperator  # instead of: from curvlinops import GGNLinearOperator
>>> G = GGNLinearOperator(model, loss_func, params, data)
>>> G @ v

Where curvlinops is installed these are its ``PyTorchLinearOperator``, so that its own inverses, estimators and sub-matrices take them;
where it is not, they stand on a class of the same interface. What differs is listed in docs/peers/curvlinops.md.
"""

from influence_ext.adapters.curvlinops.curvature import EFLinearOperator, GGNLinearOperator, HessianLinearOperator
from influence_ext.adapters.curvlinops.interface import IdentityLinearOperator, PyTorchLinearOperator
from influence_ext.adapters.curvlinops.inverse import CGInverseLinearOperator, NeumannInverseLinearOperator

__all__ = [
    "CGInverseLinearOperator",
    "EFLinearOperator",
    "GGNLinearOperator",
    "HessianLinearOperator",
    "IdentityLinearOperator",
    "NeumannInverseLinearOperator",
    "PyTorchLinearOperator",
]
