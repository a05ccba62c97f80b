"""Gradients of single examples: a loop of backward passes over batches of one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from influence_ext.reference.ggn import LossFunction
from influence_ext.reference.jacobian import (
    Inputs,
    call,
    double,
    double_copy,
    example,
    flat_gradient,
    num_examples,
    trainable,
)


def per_example_grads(model: nn.Module, loss: LossFunction, X: Inputs, y: Tensor, params: Sequence[str] | None = None) -> Tensor:
    """``∇_θ ℓ_n`` of every example, the loss called on that example alone.

    Args:
        model: The network; used in evaluation mode and float64, not modified.
        loss: Callable ``loss(output, target)`` that returns a scalar.
        X: Inputs with ``N`` examples.
        y: ``[N, ...]`` targets.
        params: Names of the parameters; ``None`` means all trainable ones.

    Returns:
        ``[N, P]`` in float64.

    Cost:
        ``N`` forward and backward passes of a single example.
    """
    network, data, targets = double_copy(model), double(X), double(y)
    parameters = list(trainable(network, params).values())
    return torch.stack(
        [
            flat_gradient(loss(call(network, example(data, n)), targets[n : n + 1]).reshape(()), parameters)
            for n in range(num_examples(data))
        ]
    )


def batch_gradient(model: nn.Module, loss: LossFunction, X: Inputs, y: Tensor, params: Sequence[str] | None = None) -> Tensor:
    """``[P]`` in float64: gradient of the loss of the whole batch, reduced by the loss itself; one backward pass."""
    network = double_copy(model)
    return flat_gradient(loss(call(network, double(X)), double(y)).reshape(()), list(trainable(network, params).values()))
