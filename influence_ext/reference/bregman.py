"""The proximal Bregman objective, written out literally."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from influence_ext.reference.ggn import LossFunction, loss_gradient, loss_values
from influence_ext.reference.influence import Dataset, parameter_change
from influence_ext.reference.jacobian import call, double, num_examples, parameter_vector, with_parameters


def bregman_divergence(loss: LossFunction, z: Tensor, z_s: Tensor, t: Tensor) -> Tensor:
    r"""``D_n(z, z_s) = ℓ(z, t) − ℓ(z_s, t) − ∇_z ℓ(z_s, t)ᵀ (z − z_s)``, example by example.

    Args:
        loss: Callable ``loss(output, target)``.
        z: ``[N, *out]`` outputs.
        z_s: ``[N, *out]`` outputs at the anchor.
        t: ``[N, ...]`` targets.

    Returns:
        ``[N]`` in float64. The literal subtraction loses digits where ``z`` is close to ``z_s``.

    Reference:
        Bae et al., "If Influence Functions are the Answer, Then What is the Question?", 2022.
    """
    z, z_s = double(z), double(z_s)
    linear = (loss_gradient(loss, z_s, t) * (z - z_s)).reshape(z.shape[0], -1).sum(dim=1)
    return loss_values(loss, z, t) - loss_values(loss, z_s, t) - linear


def pbo(
    model: nn.Module,
    loss: LossFunction,
    train: Dataset,
    theta: Tensor,
    remove: Sequence[int],
    damping: float,
    epsilon: float | None = None,
    params: Sequence[str] | None = None,
) -> Tensor:
    r"""``Q(θ) = (1/N) Σ_i D_i(f(θ, x_i), f(θs, x_i)) − ε Σ_{i ∈ remove} ℓ_i(θ) + (λ/2)‖θ − θs‖²``.

    Args:
        model: The trained network; its parameters are ``θs``.
        loss: Callable ``loss(output, target)``.
        train: ``(X, y)`` with ``N`` examples.
        theta: ``[P]``, where to evaluate.
        remove: Indices of the examples to remove.
        damping: ``λ``, weight decay included.
        epsilon: Weight of the removed examples; ``None`` means ``1/N``.
        params: Names of the parameters; ``None`` means all trainable ones.

    Returns:
        A scalar tensor in float64.
    """
    X, y = train
    N = num_examples(X)
    theta_s = parameter_vector(model, params)
    theta = theta.to(torch.float64)
    with torch.no_grad():
        z = call(with_parameters(model, theta, params), double(X))
        z_s = call(with_parameters(model, theta_s, params), double(X))
    divergence = bregman_divergence(loss, z, z_s, y).sum() / N
    removed = loss_values(loss, z, y)[list(remove)].sum() * (1.0 / N if epsilon is None else epsilon)
    return divergence - removed + damping / 2 * (theta - theta_s).square().sum()


def linearized_pbrf(
    model: nn.Module,
    loss: LossFunction,
    train: Dataset,
    remove: Sequence[int],
    damping: float,
    params: Sequence[str] | None = None,
) -> Tensor:
    r"""``θs + (1/N) (G + λI)⁻¹ Σ_{i ∈ remove} ∇ℓ_i`` by a dense solve; ``[P]`` in float64."""
    return parameter_vector(model, params) + parameter_change(model, loss, train, remove, damping, "mean", params)
