"""The generalised Gauss-Newton matrix, assembled from explicit Jacobians and loss Hessians."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from influence_ext.reference.jacobian import Inputs, double, jacobian, outputs

LossFunction = Callable[[Tensor, Tensor], Tensor]


def reduction_factor(reduction: str | float, num_examples: int) -> float:
    """``c`` of ``c · Σ_n``: ``1/N`` for ``"mean"``, ``1`` for ``"sum"``; a number is ``c`` itself, as weighted means need it."""
    if not isinstance(reduction, str):
        return float(reduction)
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction_factor: expected 'mean' or 'sum', got {reduction!r}.")
    return 1.0 / num_examples if reduction == "mean" else 1.0


def loss_values(loss: LossFunction, z: Tensor, t: Tensor) -> Tensor:
    """``[N]``: ``ℓ_n``, the loss called on each example alone (a batch of one).

    Args:
        loss: Any callable ``loss(output, target)`` that returns a scalar.
        z: ``[N, *out]`` outputs.
        t: ``[N, ...]`` targets.
    """
    z, t = double(z), double(t)
    return torch.stack([loss(z[n : n + 1], t[n : n + 1]).reshape(()) for n in range(z.shape[0])])


def loss_gradient(loss: LossFunction, z: Tensor, t: Tensor) -> Tensor:
    """``[N, *out]``: ``∇_z ℓ_n``."""
    z, t = double(z), double(t)
    rows = []
    for n in range(z.shape[0]):
        leaf = z[n : n + 1].clone().requires_grad_()
        rows.append(torch.autograd.grad(loss(leaf, t[n : n + 1]).sum(), leaf)[0][0])
    return torch.stack(rows)


def loss_hessian(loss: LossFunction, z: Tensor, t: Tensor) -> Tensor:
    """``[N, C, C]``: ``H_n = ∇²_z ℓ_n``, the axes of one example's output flattened into ``C``.

    Args:
        loss: Any callable ``loss(output, target)`` that returns a scalar.
        z: ``[N, *out]`` outputs.
        t: ``[N, ...]`` targets.

    Cost:
        ``N·C`` second reverse passes through the loss.
    """
    z, t = double(z), double(t)
    blocks = []
    for n in range(z.shape[0]):
        leaf = z[n : n + 1].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(leaf, t[n : n + 1]).sum(), leaf, create_graph=True)
        gradient = gradient.reshape(-1)
        rows = [
            torch.autograd.grad(gradient[c], leaf, retain_graph=True)[0].reshape(-1)
            if gradient.requires_grad
            else torch.zeros_like(gradient)
            for c in range(gradient.numel())
        ]
        blocks.append(torch.stack(rows))
    return torch.stack(blocks)


def ggn(
    model: nn.Module,
    loss: LossFunction,
    X: Inputs,
    y: Tensor,
    reduction: str | float = "mean",
    params: Sequence[str] | None = None,
) -> Tensor:
    r"""``G = c Σ_n J_nᵀ H_n J_n`` as a dense matrix, ``c = 1/N`` (mean) or ``1`` (sum).

    Args:
        model: The network; used in evaluation mode and float64, not modified.
        loss: Callable ``loss(output, target)``; called on one example at a time.
        X: Inputs with ``N`` examples.
        y: ``[N, ...]`` targets.
        reduction: ``"mean"`` or ``"sum"`` over examples, or ``c`` itself.
        params: Names of the parameters; ``None`` means all trainable ones.

    Returns:
        ``[P, P]`` in float64.

    Cost:
        That of :func:`jacobian` plus ``N·C·P²`` multiplications.

    Reference:
        Schraudolph, "Fast curvature matrix-vector products for second-order gradient descent", 2002.
    """
    J = jacobian(model, X, params)
    H = loss_hessian(loss, outputs(model, X), y)
    total = torch.zeros(J.shape[2], J.shape[2], dtype=torch.float64)
    for J_n, H_n in zip(J, H, strict=True):
        total += J_n.T @ H_n @ J_n
    return reduction_factor(reduction, J.shape[0]) * total
