"""Native losses against plain PyTorch: value, gradient, Hessian, its root, Bregman divergence, and how a loss is recognised."""

from __future__ import annotations

from functools import partial

import mpmath
import pytest
import torch
from torch import Tensor

from influence_ext import reference
from influence_ext.losses import NATIVE, Loss, resolve
from influence_ext.testing import assert_close
from tests.cases import cast
from tests.cases.losses import FUNCTIONALS, ROWS, LossCase

every_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
F64 = torch.float64


def sample(row: LossCase, dtype: torch.dtype, key: str = "") -> tuple[Tensor, Tensor]:
    """Outputs and targets of a row in ``dtype``."""
    z, t = row.sample(key)
    return cast(z, dtype), cast(t, dtype)


def eager_values(row: LossCase, z: Tensor, t: Tensor) -> Tensor:
    """``ℓ_n`` by PyTorch in the type of ``z``."""
    return torch.stack([row.oracle()(z[n : n + 1], t[n : n + 1]) for n in range(len(z))])


def eager_gradients(row: LossCase, z: Tensor, t: Tensor) -> Tensor:
    """``∇_z ℓ_n`` by PyTorch in the type of ``z``."""
    z = z.clone().requires_grad_()
    return torch.autograd.grad(eager_values(row, z, t).sum(), z)[0]


def eager_hessians(row: LossCase, z: Tensor, t: Tensor) -> Tensor:
    """``H_n`` by PyTorch in the type of ``z``: ``[N, C, C]``."""
    z = z.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(eager_values(row, z, t).sum(), z, create_graph=True)
    columns = gradient.reshape(len(z), -1).sum(dim=0)
    rows = [torch.autograd.grad(column, z, retain_graph=True)[0].reshape(len(z), -1) for column in columns]
    return torch.stack(rows, dim=1)


def units(z: Tensor) -> Tensor:
    """``[C, N, *out]``: the c-th unit vector for every example."""
    N, C = z.shape[0], z[0].numel()
    return torch.eye(C, dtype=z.dtype)[:, None, :].expand(C, N, C).reshape(C, *z.shape)


def dense(product: Tensor) -> Tensor:
    """``M_n e_c`` as ``[C, N, *out]`` to ``[N, C, C]``."""
    return product.reshape(*product.shape[:2], -1).permute(1, 2, 0)


@every_row
def test_values(row: LossCase, dtype: torch.dtype) -> None:
    z, t = sample(row, dtype)
    expected = reference.loss_values(row.oracle(), z, t)
    assert_close(resolve(row.make()).value(z, t), expected, scope="layer", eager=partial(eager_values, row, z, t))


@every_row
def test_gradients(row: LossCase, dtype: torch.dtype) -> None:
    z, t = sample(row, dtype)
    expected = reference.loss_gradient(row.oracle(), z, t)
    assert_close(resolve(row.make()).gradient(z, t), expected, scope="layer", eager=partial(eager_gradients, row, z, t))


@every_row
def test_hessians(row: LossCase, dtype: torch.dtype) -> None:
    z, t = sample(row, dtype)
    H = dense(resolve(row.make()).hessian(z, t).matmat(units(z)))
    expected, peer = reference.loss_hessian(row.oracle(), z, t), eager_hessians(row, z, t)
    assert_close(H, expected, scope="layer", eager=peer)
    for n in range(len(z)):
        scale = max(float(expected[n].norm()), 1e-6 * float(expected.norm()))
        assert_close(H[n], expected[n], scope="layer", scale=scale, eager=peer[n])


@every_row
def test_roots_square_to_the_hessian(row: LossCase, dtype: torch.dtype) -> None:
    z, t = sample(row, dtype)
    hessian = resolve(row.make()).hessian(z, t)
    S, S_transposed = dense(hessian.root_matmat(units(z))), dense(hessian.root_rmatmat(units(z)))
    expected = reference.loss_hessian(row.oracle(), z, t)
    assert_close(S @ S_transposed, expected, scope="layer", eager=partial(eager_hessians, row, z, t))
    assert_close(S_transposed, S.mT.double(), scope="layer")


@every_row
def test_hessians_with_weights_and_factors(row: LossCase, dtype: torch.dtype) -> None:
    z, t = sample(row, dtype)
    loss = resolve(row.make())
    weights = torch.linspace(0, 2, len(z), dtype=dtype)
    plain = loss.hessian(z, t)
    weighted = loss.hessian(z, t, weights)
    scale = float(dense(plain.matmat(units(z))).double().norm())
    expected = weights.double()[:, None, None] * dense(plain.matmat(units(z))).double()
    assert_close(dense(weighted.matmat(units(z))), expected, scope="layer", scale=scale)
    S, S_transposed = dense(weighted.root_matmat(units(z))), dense(weighted.root_rmatmat(units(z)))
    assert_close(S @ S_transposed, expected, scope="layer", scale=scale)
    half = plain.scaled(0.25)
    assert_close(dense(half.matmat(units(z))), 0.25 * dense(plain.matmat(units(z))).double(), scope="layer")
    S = dense(half.root_matmat(units(z)))
    assert_close(S @ S.mT, 0.25 * reference.loss_hessian(row.oracle(), z, t), scope="layer",
                 eager=lambda: 0.25 * eager_hessians(row, z, t))  # fmt: skip


@every_row
def test_bregman_divergence_matches_its_definition(row: LossCase, dtype: torch.dtype) -> None:
    (z, t), (z_s, _) = sample(row, dtype, "elsewhere"), sample(row, dtype)
    D = resolve(row.make()).bregman(z, z_s, t)
    expected = reference.bregman_divergence(row.oracle(), z, z_s, t)
    linear = (eager_gradients(row, z_s, t) * (z - z_s)).reshape(len(z), -1).sum(dim=1)
    assert_close(D, expected, scope="layer", eager=lambda: eager_values(row, z, t) - eager_values(row, z_s, t) - linear)
    assert (D >= 0).all()


@every_row
def test_bregman_divergence_vanishes_at_the_anchor_alone(row: LossCase, dtype: torch.dtype) -> None:
    z, t = sample(row, dtype)
    loss = resolve(row.make())
    assert torch.equal(loss.bregman(z, z, t), torch.zeros(len(z), dtype=dtype))
    if not row.saturated:
        moved = z + torch.linspace(0.5, 1, z.numel(), dtype=dtype).reshape(z.shape)
        assert (loss.bregman(moved, z, t) > 0).all()


def exact_divergence(native: str, scale: float, z: list[float], z_s: list[float]) -> mpmath.mpf:
    """The divergence of one example in 80 digits."""
    with mpmath.workdps(80):
        z_mp, z_s_mp = [mpmath.mpf(x) for x in z], [mpmath.mpf(x) for x in z_s]
        d = [a - b for a, b in zip(z_mp, z_s_mp, strict=True)]
        if native == "squared_error":
            return scale * mpmath.fsum(x * x for x in d)
        if native == "binary_cross_entropy":
            terms = [mpmath.log1p(mpmath.exp(a)) - mpmath.log1p(mpmath.exp(b)) - x / (1 + mpmath.exp(-b))
                     for a, b, x in zip(z_mp, z_s_mp, d, strict=True)]  # fmt: skip
            return scale * mpmath.fsum(terms)
        p = [mpmath.exp(b) for b in z_s_mp]
        total = mpmath.fsum(p)
        slope = mpmath.fsum(a * b for a, b in zip(p, d, strict=True)) / total
        return mpmath.log(mpmath.fsum(mpmath.exp(a) for a in z_mp)) - mpmath.log(total) - slope


@pytest.mark.parametrize("step", [3.0, 1.0, 0.3, 0.1, 0.03, 1e-2, 3e-3, 1e-3, 1e-4, 1e-6, 1e-9])
@pytest.mark.parametrize("id", ["mse-mean", "half-mse-sum", "ce-mean", "ce-mean-33", "bce-mean", "bce-sum-soft-1"])
def test_bregman_divergence_keeps_its_digits_near_the_anchor(id: str, step: float, dtype: torch.dtype) -> None:
    """The PBRF moves outputs by little: D of size d² must not be the difference of values of size 1."""
    row = next(row for row in ROWS if row.id == id)
    (z_s, t), (direction, _) = sample(row, dtype), sample(row, dtype, "elsewhere")
    z = z_s + step * direction
    loss = resolve(row.make())
    scale = {"mse-mean": 1 / 3, "half-mse-sum": 0.5, "bce-mean": 1 / 3}.get(id, 1.0)
    exact = [
        float(exact_divergence(loss.native, scale, a.tolist(), b.tolist()))
        for a, b in zip(z.reshape(len(z), -1), z_s.reshape(len(z), -1), strict=True)
    ]
    assert_close(loss.bregman(z, z_s, t), torch.tensor(exact, dtype=F64), scope="layer")


@every_row
def test_loss_is_recognised_as_module(row: LossCase) -> None:
    loss = resolve(row.make())
    assert loss.name == row.loss
    assert loss.reduction == row.reduction
    assert loss.factor(7) == (1 / 7 if row.reduction == "mean" else 1.0)
    assert resolve(loss) is loss


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", NATIVE)
def test_loss_is_recognised_by_name_and_as_functional(name: str, reduction: str) -> None:
    row = next(row for row in ROWS if row.loss == name and row.reduction == reduction)
    by_module, by_name = resolve(row.make()), resolve(name, reduction)
    assert by_name == by_module
    if name in FUNCTIONALS:
        assert resolve(FUNCTIONALS[name], reduction) == by_module
    if reduction == "mean":
        assert resolve(name) == by_module
        assert FUNCTIONALS.get(name) is None or resolve(FUNCTIONALS[name]) == by_module


@every_row
def test_strided_outputs_and_targets(row: LossCase, dtype: torch.dtype) -> None:
    z, t = sample(row, dtype)
    loss = resolve(row.make())
    wide = torch.stack([z, z + 1], dim=-1)[..., 0]
    t_wide = torch.stack([t, t], dim=-1)[..., 0]
    for call in (loss.value, loss.gradient):
        assert torch.equal(call(wide, t_wide), call(z, t))
    assert torch.equal(loss.bregman(wide + 0, wide, t_wide), loss.bregman(z, z, t))


def test_integer_targets_stand_for_numbers() -> None:
    row = next(row for row in ROWS if row.id == "bce-mean")
    z, t = sample(row, F64)
    loss: Loss = resolve(row.make())
    assert torch.equal(loss.value(z, t.long()), loss.value(z, t))
