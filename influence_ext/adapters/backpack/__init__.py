"""BackPACK's first-order quantities on this library's kernels: ``extend`` a model, and read them off its parameters after ``backward()``.

>>> from influence_ext.adapters.backpack import backpack, extend
>>> from influence_ext.adapters.backpack.extensions import BatchGrad

Scale, as in BackPACK: gradients of single examples as they come out of the loss, so with a loss that averages over the batch
``grad_batch[n]`` holds the factor 1/N and sums to ``p.grad``.
"""

from influence_ext.adapters.backpack import extensions
from influence_ext.adapters.backpack.context import backpack, disable, extend
from influence_ext.adapters.backpack.extensions import BatchGrad, BatchL2Grad, SumGradSquared, Variance

__all__ = ["BatchGrad", "BatchL2Grad", "SumGradSquared", "Variance", "backpack", "disable", "extend", "extensions"]
