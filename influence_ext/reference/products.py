"""Products with Jacobians and Gauss-Newton matrices of models too wide for a dense Jacobian: one example, one vector at a time."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from influence_ext.reference.ggn import LossFunction, reduction_factor
from influence_ext.reference.jacobian import Inputs, call, double, double_copy, example, flat_gradient, jacobian, num_examples, trainable


@contextmanager
def plain_kernels() -> Iterator[None]:
    """Attention and recurrent layers from differentiable parts: their fused kernels have no forward mode."""
    with sdpa_kernel([SDPBackend.MATH]), torch.backends.mkldnn.flags(enabled=False, allow_tf32=None):
        yield


class TwiceDifferentiable(TorchFunctionMode):
    """Other forms of functions whose second derivative PyTorch lacks (hardsigmoid, embedding_bag) or gets wrong: NaN where mish's
    exponential overflows; at 0, prelu's second backward pass takes the other slope than its first.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.mish:
            return args[0] * torch.nn.functional.softplus(args[0]).tanh()
        if func is torch.nn.functional.hardsigmoid:
            slope = float(torch.tensor(1 / 6, dtype=torch.float32))  # PyTorch's
            line = torch.nn.functional.relu6(args[0] + 3) * slope
            return line + (func(args[0]) - line).detach()
        if func is torch.nn.functional.embedding_bag:
            return _embedding_bag(inspect.signature(func).bind(*args, **(kwargs or {})).arguments)
        if func is torch.nn.functional.prelu:
            x, weight = args
            return torch.where(x > 0, x, weight.view(-1, *[1] * (x.dim() - 2)) * x if x.dim() > 1 else weight * x)
        return func(*args, **(kwargs or {}))


def _embedding_bag(given: dict[str, Any]) -> Tensor:
    """A bag at a time, from rows of the table."""
    index, table, weights = given["input"], given["weight"], given.get("per_sample_weights")
    mode, padding = given.get("mode", "mean"), given.get("padding_idx")
    if index.dim() == 2:
        begins, ends = [i * index.shape[1] for i in range(len(index))], [(i + 1) * index.shape[1] for i in range(len(index))]
    else:
        offsets = given["offsets"].tolist()
        begins, ends = offsets, [*offsets[1:], index.numel()]
        if given.get("include_last_offset"):
            begins, ends = offsets[:-1], offsets[1:]
    index, weights = index.flatten(), None if weights is None else weights.flatten()
    bags = []
    for begin, end in zip(begins, ends, strict=True):
        counts = [k for k in range(begin, end) if padding is None or int(index[k]) != padding % table.shape[0]]
        rows = table[index[counts]]
        if weights is not None:
            rows = rows * weights[counts, None]
        bags.append(rows.sum(0) / max(1, len(counts)) if mode == "mean" else rows.amax(0) if mode == "max" else rows.sum(0))
    return torch.stack(bags)


def jacobian_products(model: nn.Module, X: Inputs, V: Tensor, params: Sequence[str] | None = None) -> Tensor:
    r"""``J_n v``, by forward mode; where an operator has none, by the rows of ``J_n``.

    Not for inputs that hold the ``padding_idx`` of an embedding: torch's forward mode differentiates that row, its reverse mode does not,
    and the latter is what a gradient means here.

    Args:
        model: The network; used in evaluation mode and float64, not modified.
        X: Inputs with ``N`` examples.
        V: ``[V, P]``.
        params: Names of the parameters; ``None`` means all trainable ones.

    Returns:
        ``[V, N, *out]`` in float64.

    Cost:
        ``V·N`` forward passes with tangents.
    """
    with plain_kernels():
        return torch.stack([torch.stack([_tangent(model, example(X, n), v, params) for n in range(num_examples(X))]) for v in V.double()])


def jacobian_transpose_products(model: nn.Module, X: Inputs, G: Tensor, params: Sequence[str] | None = None) -> Tensor:
    """``Σ_n J_nᵀ g[v, n]``: ``G [V, N, *out]`` to ``[V, P]`` in float64, by ``V·N`` backward passes."""
    network, data, cotangents = double_copy(model), double(X), G.double()
    parameters = list(trainable(network, params).values())
    total = torch.zeros(G.shape[0], sum(p.numel() for p in parameters), dtype=torch.float64)
    with plain_kernels():
        for n in range(num_examples(data)):
            (z,) = call(network, example(data, n))
            for row, g in zip(total, cotangents[:, n], strict=True):
                row += flat_gradient((z * g).sum(), parameters, retain_graph=True)
    return total


def ggn_products(
    model: nn.Module, loss: LossFunction, X: Inputs, y: Tensor, V: Tensor, reduction: str = "mean", params: Sequence[str] | None = None
) -> Tensor:
    r"""``c Σ_n J_nᵀ H_n J_n v``: ``[V, P]`` to ``[V, P]`` in float64, ``H_n`` by the loss's own second derivative.

    Args:
        model: The network; used in evaluation mode and float64, not modified.
        loss: Callable ``loss(output, target)``; called on one example at a time.
        X: Inputs with ``N`` examples.
        y: ``[N, ...]`` targets.
        V: ``[V, P]``.
        reduction: ``"mean"`` (``c = 1/N``) or ``"sum"`` (``c = 1``).
        params: Names of the parameters; ``None`` means all trainable ones.
    """
    z, targets = double_outputs(model, X), double(y)
    tangents = jacobian_products(model, X, V, params)
    cotangents = torch.zeros_like(tangents)
    for n in range(z.shape[0]):
        leaf = z[n : n + 1].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(leaf, targets[n : n + 1]).sum(), leaf, create_graph=True)
        for v in range(V.shape[0]):
            if gradient.requires_grad:
                cotangents[v, n] = torch.autograd.grad(gradient, leaf, tangents[v, n : n + 1], retain_graph=True)[0][0]
    return reduction_factor(reduction, z.shape[0]) * jacobian_transpose_products(model, X, cotangents, params)


def hessian_products(
    model: nn.Module, loss: LossFunction, X: Inputs, y: Tensor, V: Tensor, reduction: str = "mean", params: Sequence[str] | None = None
) -> Tensor:
    r"""``c Σ_n ∇²ℓ_n(θ) v``: ``[V, P]`` to ``[V, P]`` in float64, by reverse mode twice. Arguments: :func:`ggn_products`."""
    network, data, targets = double_copy(model), double(X), double(y)
    parameters = list(trainable(network, params).values())
    total = torch.zeros(V.shape, dtype=torch.float64)
    with plain_kernels(), TwiceDifferentiable():
        z = call(network, data)
        losses = [loss(z[n : n + 1], targets[n : n + 1]).sum() for n in range(z.shape[0])]
        gradient = flat_gradient(torch.stack(losses).sum(), parameters, create_graph=True)
        for row, v in zip(total, V.double(), strict=True):
            if gradient.requires_grad:
                row += flat_gradient(gradient @ v, parameters, retain_graph=True)
    return reduction_factor(reduction, z.shape[0]) * total


def double_outputs(model: nn.Module, X: Inputs) -> Tensor:
    """``[N, *out]`` in float64, each example on its own."""
    network, data = double_copy(model), double(X)
    with torch.no_grad(), plain_kernels():
        return torch.cat([call(network, example(data, n)) for n in range(num_examples(data))])


def _tangent(model: nn.Module, x: Inputs, v: Tensor, params: Sequence[str] | None) -> Tensor:
    network, data = double_copy(model), double(x)
    named = {name: p.detach() for name, p in trainable(network, params).items()}
    parts = v.split([p.numel() for p in named.values()])
    tangents = {name: part.reshape(p.shape) for part, (name, p) in zip(parts, named.items(), strict=True)}
    args: tuple[Tensor, ...] = (data,) if isinstance(data, Tensor) else data if isinstance(data, tuple) else ()
    kwargs = data if isinstance(data, dict) else {}

    def f(theta: dict[str, Tensor]) -> Tensor:
        return functional_call(network, theta, args, kwargs)[0]

    try:
        return jvp(f, (named,), (tangents,))[1]
    except NotImplementedError:
        return (jacobian(model, x, params)[0] @ v).reshape(call(network, data).shape[1:]).detach()
