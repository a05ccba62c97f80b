"""Jacobian of a network's outputs with respect to its parameters, one reverse pass per output entry."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Inputs = Tensor | tuple[Tensor, ...] | Mapping[str, Tensor]


def double_copy(model: nn.Module) -> nn.Module:
    """A copy of ``model`` in float64 and evaluation mode; tied parameters stay tied, the original is not touched."""
    return copy.deepcopy(model).double().eval()  # unlike .to(torch.float64), this keeps complex buffers complex


def double(x: Any) -> Any:
    """``x`` with every floating-point tensor in float64; tensors, tuples and dicts of tensors are understood."""
    if isinstance(x, Tensor):
        return x.detach().to(torch.float64) if x.is_floating_point() else x.detach()
    if isinstance(x, Mapping):
        return {key: double(value) for key, value in x.items()}
    return tuple(double(value) for value in x)


def num_examples(X: Inputs) -> int:
    """Length of the leading axis shared by all tensors of ``X``."""
    if isinstance(X, Tensor):
        return X.shape[0]
    values = X.values() if isinstance(X, Mapping) else X
    return next(iter(values)).shape[0]


def example(X: Inputs, n: int) -> Inputs:
    """Example ``n`` as a batch of one."""
    if isinstance(X, Tensor):
        return X[n : n + 1]
    if isinstance(X, Mapping):
        return {key: value[n : n + 1] for key, value in X.items()}
    return tuple(value[n : n + 1] for value in X)


def call(model: nn.Module, X: Inputs) -> Tensor:
    """``model(X)``; a tuple is spread over the positional arguments, a dict over the keyword arguments."""
    if isinstance(X, Tensor):
        return model(X)
    if isinstance(X, Mapping):
        return model(**X)
    return model(*X)


def trainable(model: nn.Module, params: Sequence[str] | None = None) -> dict[str, nn.Parameter]:
    """Parameters with ``requires_grad`` in ``model.named_parameters()`` order, tied ones once.

    Args:
        model: The network.
        params: Names to keep; ``None`` keeps all. The order of the result is the model's, not that of ``params``.
    """
    found = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return found if params is None else {name: value for name, value in found.items() if name in set(params)}


def parameter_vector(model: nn.Module, params: Sequence[str] | None = None) -> Tensor:
    """``[P]`` in float64: the current values of the trainable parameters, flattened one after the other."""
    return torch.cat([p.detach().to(torch.float64).reshape(-1) for p in trainable(model, params).values()])


def with_parameters(model: nn.Module, theta: Tensor, params: Sequence[str] | None = None) -> nn.Module:
    """A float64 copy of ``model`` whose trainable parameters hold ``theta`` ``[P]``."""
    moved = double_copy(model)
    start = 0
    with torch.no_grad():
        for parameter in trainable(moved, params).values():
            parameter.copy_(theta[start : start + parameter.numel()].reshape(parameter.shape))
            start += parameter.numel()
    if start != theta.numel():
        raise ValueError(f"with_parameters: expected theta of shape [{start}], got {list(theta.shape)}.")
    return moved


def flat_gradient(value: Tensor, parameters: Sequence[Tensor], retain_graph: bool = False, create_graph: bool = False) -> Tensor:
    """``[P]``: gradient of the scalar ``value``; a parameter that ``value`` does not depend on gets zeros."""
    if not value.requires_grad:
        return torch.zeros(sum(p.numel() for p in parameters), dtype=value.dtype)
    grads = torch.autograd.grad(
        value, list(parameters), retain_graph=retain_graph or create_graph, create_graph=create_graph, allow_unused=True
    )
    return torch.cat([(torch.zeros_like(p) if g is None else g).reshape(-1) for p, g in zip(parameters, grads, strict=True)])


def outputs(model: nn.Module, X: Inputs) -> Tensor:
    """``[N, *out]``: the network's outputs in float64 and evaluation mode."""
    with torch.no_grad():
        return call(double_copy(model), double(X))


def jacobian(model: nn.Module, X: Inputs, params: Sequence[str] | None = None) -> Tensor:
    r"""Jacobians ``J_n = ∂f(θ, x_n)/∂θ`` of all examples.

    Args:
        model: The network; used in evaluation mode and float64, not modified.
        X: Inputs with ``N`` examples: a tensor, a tuple or a dict of tensors, each with leading axis ``N``.
        params: Names of the parameters to differentiate by; ``None`` means all trainable ones.

    Returns:
        ``[N, C, P]`` in float64; ``C`` is the number of output entries of one example, all its axes flattened.

    Cost:
        ``N`` forward and ``N·C`` reverse passes of a single example; ``8·N·C·P`` bytes.
    """
    network, data = double_copy(model), double(X)
    parameters = list(trainable(network, params).values())
    rows = []
    for n in range(num_examples(data)):
        z = call(network, example(data, n)).reshape(-1)
        rows.append(torch.stack([flat_gradient(z[c], parameters, retain_graph=True) for c in range(z.numel())]))
    return torch.stack(rows)
