"""Influence by dense solves, and the closed forms of ridge regression."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from influence_ext.reference.ggn import LossFunction, ggn, reduction_factor
from influence_ext.reference.jacobian import Inputs, num_examples
from influence_ext.reference.per_example import per_example_grads

Dataset = tuple[Inputs, Tensor]


def damped_solve(G: Tensor, damping: float, rhs: Tensor) -> Tensor:
    """``(G + λI)⁻¹ rhs`` with ``G`` ``[P, P]``, ``rhs`` ``[P]`` or ``[P, V]``, by dense LU in float64."""
    return torch.linalg.solve(G + damping * torch.eye(G.shape[0], dtype=G.dtype), rhs)


def influence_scores(
    model: nn.Module,
    loss: LossFunction,
    train: Dataset,
    test: Dataset,
    damping: float,
    reduction: str | float = "mean",
    params: Sequence[str] | None = None,
) -> Tensor:
    r"""``s(t, i) = c · ∇ℓ_tᵀ (G + λI)⁻¹ ∇ℓ_i``: the predicted rise of test loss ``t`` when example ``i`` is removed.

    Args:
        model: The trained network.
        loss: Callable ``loss(output, target)``.
        train: ``(X, y)`` with ``N`` examples; they define ``G``.
        test: ``(X, y)`` with ``M`` examples.
        damping: ``λ``, weight decay included.
        reduction: ``"mean"`` (``c = 1/N``), ``"sum"`` (``c = 1``) or ``c`` itself: removing an example takes ``c ℓ_i`` from the cost.
        params: Names of the parameters; ``None`` means all trainable ones.

    Returns:
        ``[M, N]`` in float64.

    Cost:
        A dense ``[P, P]`` solve.
    """
    G = ggn(model, loss, *train, reduction, params)
    train_grads = per_example_grads(model, loss, *train, params)
    test_grads = per_example_grads(model, loss, *test, params)
    c = reduction_factor(reduction, train_grads.shape[0])
    return c * test_grads @ damped_solve(G, damping, train_grads.T)


def parameter_change(
    model: nn.Module,
    loss: LossFunction,
    train: Dataset,
    remove: Sequence[int],
    damping: float,
    reduction: str | float = "mean",
    params: Sequence[str] | None = None,
) -> Tensor:
    r"""``Δθ = c (G + λI)⁻¹ Σ_{i ∈ remove} ∇ℓ_i``: θ after removing the group minus θs, to first order; ``[P]``."""
    G = ggn(model, loss, *train, reduction, params)
    group = per_example_grads(model, loss, *train, params)[list(remove)].sum(dim=0)
    return reduction_factor(reduction, num_examples(train[0])) * damped_solve(G, damping, group)


def ridge_fit(X: Tensor, y: Tensor, damping: float, weights: Tensor | None = None) -> Tensor:
    r"""Minimiser of ``(1/2N) Σ_i w_i (x_iᵀθ − y_i)² + (λ/2)‖θ‖²``.

    Args:
        X: ``[N, P]``.
        y: ``[N]``.
        damping: ``λ > 0``.
        weights: ``[N]``, all one by default. A zero removes an example; ``1/N`` stays, as in ``Q₋S(·, 1/N)``.

    Returns:
        ``[P]``.
    """
    X, y = X.to(torch.float64), y.to(torch.float64)
    w = torch.ones_like(y) if weights is None else weights.to(torch.float64)
    return damped_solve(X.T @ (w[:, None] * X) / X.shape[0], damping, X.T @ (w * y) / X.shape[0])


def ridge_leave_one_out(X: Tensor, y: Tensor, damping: float) -> Tensor:
    r"""Exact change of the ridge solution when each example is removed, by Sherman-Morrison.

    ``Δθ_i = ε A⁻¹ x_i r_i / (1 − ε h_i)`` with ``ε = 1/N``, ``A = XᵀX/N + λI``, ``r_i = x_iᵀθ − y_i`` at the full
    solution ``θ``, and ``h_i = x_iᵀ A⁻¹ x_i``.

    Args:
        X: ``[N, P]``.
        y: ``[N]``.
        damping: ``λ > 0``; also the weight decay.

    Returns:
        ``[N, P]``, row ``i`` for example ``i``.
    """
    theta = ridge_fit(X, y, damping)
    return torch.stack([ridge_response(X, y, theta, [i], damping) for i in range(X.shape[0])])


def ridge_response(X: Tensor, y: Tensor, theta_s: Tensor, remove: Sequence[int], damping: float) -> Tensor:
    r"""PBRF minus ``θs`` for a linear model with loss ``½(xᵀθ − y)²``, at any ``θs``.

    The gradient of the proximal Bregman objective vanishes where ``(A − ε X_SᵀX_S) δ = ε X_Sᵀ r_S`` with
    ``A = XᵀX/N + λI``, ``ε = 1/N`` and ``r = Xθs − y``. For one example it is the influence estimate
    over ``1 − εh``.

    Args:
        X: ``[N, P]``.
        y: ``[N]``.
        theta_s: ``[P]``, a minimum or not.
        remove: Indices ``S``.
        damping: ``λ``, weight decay included.

    Returns:
        ``[P]``.
    """
    X, y, theta_s = X.to(torch.float64), y.to(torch.float64), theta_s.to(torch.float64)
    epsilon = 1.0 / X.shape[0]
    X_S = X[list(remove)]
    r_S = X_S @ theta_s - y[list(remove)]
    return damped_solve(X.T @ X * epsilon - epsilon * X_S.T @ X_S, damping, epsilon * X_S.T @ r_S)
