"""What a user would write in plain PyTorch, in the data type of the model: the yardstick of the float32 comparisons."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp
from torch.nn.attention import SDPBackend, sdpa_kernel

from influence_ext.reference.products import TwiceDifferentiable
from tests.cases import Network, subset

Theta = dict[str, Tensor]


def trainable(model: nn.Module) -> Theta:
    """Detached trainable parameters in model order, tied ones once."""
    return {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}


def unflatten(theta: Theta, v: Tensor) -> Theta:
    """``[P]`` to tensors shaped like the parameters."""
    parts = v.split([value.numel() for value in theta.values()])
    return {name: part.reshape(value.shape) for (name, value), part in zip(theta.items(), parts, strict=True)}


def flatten(tensors: Theta) -> Tensor:
    """Tensors in order to ``[P]``."""
    return torch.cat([value.reshape(-1) for value in tensors.values()])


def function(model: nn.Module, X: Any) -> Callable[[Theta], Tensor]:
    """``θ -> outputs``, to be called once: functional_call leaves a module that has two names with the wrong parameters."""
    model = copy.deepcopy(model)
    args: tuple[Tensor, ...] = X if isinstance(X, tuple) else () if isinstance(X, Mapping) else (X,)
    kwargs = dict(X) if isinstance(X, Mapping) else {}

    def evaluate(theta: Theta) -> Tensor:
        with _differentiable():
            result: Tensor = functional_call(model, theta, args, kwargs)
        return result

    return evaluate


@contextmanager
def _differentiable() -> Iterator[None]:
    """Attention without the fused kernels, which have no forward mode."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel([SDPBackend.MATH]):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def outputs(network: Network, theta: Tensor | None = None) -> Tensor:
    """``[N, *out]`` at ``theta`` ``[P]``, by default at the network's own parameters."""
    values = trainable(network.model)
    with torch.no_grad():
        return function(network.model, network.X)(values if theta is None else unflatten(values, theta))


def jacobian_product(network: Network, v: Tensor) -> Tensor:
    """``J v``: ``[P] -> [N, *out]``; by the rows of ``J`` where an operator has no forward mode."""
    theta = trainable(network.model)
    try:
        return jvp(function(network.model, network.X), (theta,), (unflatten(theta, v),))[1]
    except NotImplementedError:
        z, pullback = vjp(function(network.model, network.X), theta)
        units = torch.eye(z.numel(), dtype=z.dtype).view(-1, *z.shape)
        return torch.stack([flatten(pullback(unit)[0]) @ v for unit in units]).view_as(z)


def jacobian_transpose_product(network: Network, g: Tensor) -> Tensor:
    """``Jᵀ g``: ``[N, *out] -> [P]``."""
    theta = trainable(network.model)
    return flatten(vjp(function(network.model, network.X), theta)[1](g)[0])


def ggn_product(network: Network, v: Tensor) -> Tensor:
    """``G v``: forward mode through the network, double backward through the loss, reverse mode back."""
    theta, loss = trainable(network.model), network.loss_case.reduced()
    z, pullback = vjp(function(network.model, network.X), theta)
    t_z = jacobian_product(network, v)
    z = z.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(z, network.y), z, create_graph=True)
    (g_z,) = torch.autograd.grad(gradient, z, t_z)
    return flatten(pullback(g_z)[0])


def jacobian_products(network: Network, V: Tensor) -> Tensor:
    """``J v``: ``[V, P] -> [V, N, *out]``."""
    return torch.stack([jacobian_product(network, v) for v in V])


def jacobian_transpose_products(network: Network, G: Tensor) -> Tensor:
    """``Jᵀ g``: ``[V, N, *out] -> [V, P]``."""
    return torch.stack([jacobian_transpose_product(network, g) for g in G])


def ggn_products(network: Network, V: Tensor) -> Tensor:
    """``G v``: ``[V, P] -> [V, P]``."""
    return torch.stack([ggn_product(network, v) for v in V])


def hessian_products(network: Network, V: Tensor) -> Tensor:
    """``∇²J V``: reverse mode twice (where PyTorch cannot, through the forms the oracle takes), ``[V, P] -> [V, P]``."""
    theta = {name: value.clone().requires_grad_() for name, value in trainable(network.model).items()}
    leaves = list(theta.values())
    with TwiceDifferentiable():
        cost = network.loss_case.reduced()(function(network.model, network.X)(theta), network.y)

    def gradient(of: Tensor) -> Tensor:
        return flatten(
            dict(zip(theta, torch.autograd.grad(of, leaves, create_graph=True, allow_unused=True, materialize_grads=True), strict=True))
        )

    first = gradient(cost)
    return torch.stack([gradient(first @ v).detach() for v in V])


@cache
def ggn(network: Network) -> Tensor:
    """``[P, P]``, product by product."""
    P = sum(value.numel() for value in trainable(network.model).values())
    return torch.stack([ggn_product(network, unit) for unit in torch.eye(P, dtype=network.dtype)])


@cache
def per_example_grads(network: Network) -> Tensor:
    """``[N, P]``, one example at a time: vmap lacks rules for some operators."""
    theta = {name: value.clone().requires_grad_() for name, value in trainable(network.model).items()}
    loss, rows = network.loss_case.oracle(), []
    for n in range(network.N):
        example = slice(n, n + 1)
        value = loss(function(network.model, subset(network.X, example))(theta), network.y[example])
        grads = torch.autograd.grad(value, list(theta.values()), allow_unused=True, materialize_grads=True)
        rows.append(flatten(dict(zip(theta, grads, strict=True))))
    return torch.stack(rows)
