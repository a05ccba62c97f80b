"""Losses against plain PyTorch: value, gradient, Hessian, its root, Bregman divergence, reduction, and how a loss is recognised."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import mpmath
import pytest
import torch
from torch import Tensor

from influence_ext import reference
from influence_ext.errors import DataError
from influence_ext.losses import NATIVE, Loss, resolve
from influence_ext.testing import assert_close
from tests.cases import cast
from tests.cases.losses import CALLABLES, FUNCTIONALS, LINEAR_ROWS, ROWS, LossCase

every_row = pytest.mark.parametrize("row", ROWS + LINEAR_ROWS, ids=lambda row: row.id)
every_curved_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
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


@pytest.mark.parametrize("row", [row for row in ROWS if row.loss == "binary_cross_entropy"], ids=lambda row: row.id)
def test_values_on_probabilities_are_those_of_pytorch(row: LossCase) -> None:
    z, t = row.sample()
    loss = resolve(row.make())
    assert_close(loss.factor(t) * loss.value(z, t).sum(), row.make()(z, t), scope="layer")


@every_row
def test_gradients(row: LossCase, dtype: torch.dtype) -> None:
    z, t = sample(row, dtype)
    expected = reference.loss_gradient(row.oracle(), z, t)
    loss = resolve(row.make())
    assert_close(loss.gradient(z, t), expected, scope="layer", eager=partial(eager_gradients, row, z, t))
    assert torch.equal(loss.checked_gradient(z, t, "test"), loss.gradient(z, t))


@every_curved_row
def test_hessians(row: LossCase, dtype: torch.dtype) -> None:
    z, t = sample(row, dtype)
    H = dense(resolve(row.make()).hessian(z, t).matmat(units(z)))
    expected, peer = reference.loss_hessian(row.oracle(), z, t), eager_hessians(row, z, t)
    assert_close(H, expected, scope="layer", eager=peer)
    for n in range(len(z)):
        scale = max(float(expected[n].norm()), 1e-6 * float(expected.norm()))
        assert_close(H[n], expected[n], scope="layer", scale=scale, eager=peer[n])


@every_curved_row
def test_roots_square_to_the_hessian(row: LossCase, dtype: torch.dtype) -> None:
    z, t = sample(row, dtype)
    hessian = resolve(row.make()).hessian(z, t)
    S, S_transposed = dense(hessian.root_matmat(units(z))), dense(hessian.root_rmatmat(units(z)))
    expected = reference.loss_hessian(row.oracle(), z, t)
    assert_close(S @ S_transposed, expected, scope="layer", eager=partial(eager_hessians, row, z, t))
    assert_close(S_transposed, S.mT.double(), scope="layer")


@every_curved_row
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
    # Zero where the loss is linear, next to nothing at a saturated logit: the definition's own rounding error is all that is left of it.
    scale = float(linear.double().norm()) if row.saturated or not row.curvature else None
    assert_close(D, expected, scope="layer", scale=scale, eager=lambda: eager_values(row, z, t) - eager_values(row, z_s, t) - linear)
    assert (D >= 0).all()


@every_row
def test_bregman_divergence_vanishes_at_the_anchor_alone(row: LossCase, dtype: torch.dtype) -> None:
    z, t = sample(row, dtype)
    loss = resolve(row.make())
    assert torch.equal(loss.bregman(z, z, t), torch.zeros(len(z), dtype=dtype))
    if row.convex and not row.saturated and row.link is None:
        moved = z + torch.linspace(0.5, 1, z.numel(), dtype=dtype).reshape(z.shape)
        assert (loss.bregman(moved, z, t) > 0).all()


def softplus(z: mpmath.mpf) -> mpmath.mpf:
    """``log(1 + eᶻ)``."""
    return mpmath.log1p(mpmath.exp(z))


def ramp(z: mpmath.mpf, t: mpmath.mpf, delta: float) -> mpmath.mpf:
    """Huber's function."""
    return (z - t) ** 2 / 2 if abs(z - t) < delta else delta * (abs(z - t) - mpmath.mpf(delta) / 2)


ELEMENTS: dict[str, tuple[Callable, Callable]] = {
    "mse-mean": (lambda z, t: (z - t) ** 2 / 3, lambda z, t: 2 * (z - t) / 3),
    "half-mse-sum": (lambda z, t: (z - t) ** 2 / 2, lambda z, t: z - t),
    "bce-mean": (lambda z, t: (softplus(z) - t * z) / 3, lambda z, t: (1 / (1 + mpmath.exp(-z)) - t) / 3),
    "bce-sum-soft-1": (lambda z, t: softplus(z) - t * z, lambda z, t: 1 / (1 + mpmath.exp(-z)) - t),
    "huber-sum": (lambda z, t: ramp(z, t, 1.0), lambda z, t: max(min(z - t, 1), -1)),
    "poisson-sum": (lambda z, t: mpmath.exp(z) - t * z, lambda z, t: mpmath.exp(z) - t),
    "poisson-sum-rate-eps": (lambda z, t: z - t * mpmath.log(z + 0.1), lambda z, t: 1 - t / (z + 0.1)),
    "prob-sum": (
        lambda z, t: -t * mpmath.log(z) - (1 - t) * mpmath.log(1 - z),
        lambda z, t: -t / z + (1 - t) / (1 - z),
    ),
}
"""An element's loss and its derivative, by row."""


def exact_divergence(row: LossCase, z: list[float], z_s: list[float], t: list[float]) -> mpmath.mpf:
    """The divergence of one example in 80 digits."""
    with mpmath.workdps(80):
        z_mp, z_s_mp, t_mp = ([mpmath.mpf(x) for x in values] for values in (z, z_s, t))
        d = [a - b for a, b in zip(z_mp, z_s_mp, strict=True)]
        if row.id in ELEMENTS:
            value, slope = ELEMENTS[row.id]
            terms = [value(a, u) - value(b, u) - slope(b, u) * x for a, b, u, x in zip(z_mp, z_s_mp, t_mp, d, strict=True)]
            return mpmath.fsum(terms)
        p = [mpmath.exp(b) for b in z_s_mp]
        total = mpmath.fsum(p)
        slope = mpmath.fsum(a * b for a, b in zip(p, d, strict=True)) / total
        return mpmath.log(mpmath.fsum(mpmath.exp(a) for a in z_mp)) - mpmath.log(total) - slope


@pytest.mark.parametrize("step", [3.0, 1.0, 0.3, 0.1, 0.03, 1e-2, 3e-3, 1e-3, 1e-4, 1e-6, 1e-9])
@pytest.mark.parametrize("id", ["ce-mean", "ce-mean-33", *ELEMENTS])
def test_bregman_divergence_keeps_its_digits_near_the_anchor(id: str, step: float, dtype: torch.dtype) -> None:
    """The PBRF moves outputs by little: D of size d² must not be the difference of values of size 1."""
    row = next(row for row in ROWS if row.id == id)
    (z_s, t), (direction, _) = sample(row, dtype), sample(row, dtype, "elsewhere")
    z = z_s + step * (direction if row.link is None else (direction - z_s) / 4)  # stays in the domain
    rows = (x.reshape(len(z), -1).tolist() for x in (z, z_s, t))
    exact = [float(exact_divergence(row, a, b, u)) for a, b, u in zip(*rows, strict=True)]
    assert_close(resolve(row.make()).bregman(z, z_s, t), torch.tensor(exact, dtype=F64), scope="layer")


@pytest.mark.parametrize("step", [1.0, 1e-1, 1e-2, 1e-4, 1e-7])
def test_bregman_divergence_of_a_callable_keeps_its_digits(step: float) -> None:
    """Through a callable the same cross-entropy has no formula to rely on."""
    row = next(row for row in ROWS if row.id == "ce-mean")
    (z_s, t), (direction, _) = sample(row, F64), sample(row, F64, "elsewhere")
    z = z_s + step * direction
    generic = resolve(lambda z, t: torch.nn.functional.cross_entropy(z, t), "mean")
    assert_close(generic.bregman(z, z_s, t), resolve("cross_entropy").bregman(z, z_s, t))


@every_row
def test_loss_is_recognised_as_module(row: LossCase) -> None:
    loss = resolve(row.make())
    z, t = row.sample()
    loss.check(z, t, "test")  # a callable's reduction is found out here
    assert loss.name in (row.loss, f"cross_entropy (found in {row.loss})")
    assert loss.reduction == row.reduction
    assert resolve(loss) is loss


@every_row
def test_factor_times_values_is_the_loss_of_the_batch(row: LossCase, dtype: torch.dtype) -> None:
    z, t = sample(row, dtype)
    loss = resolve(row.make(), row.reduction)
    c, values = loss.factor(t), loss.value(z, t)
    assert c == pytest.approx(row.factor(t), rel=1e-14)
    scale = c * float(values.double().abs().sum())
    assert_close(c * values.sum(), row.reduced()(z.double(), t if not t.is_floating_point() else t.double()), scope="layer", scale=scale)


@every_row
def test_total_weight_adds_up_over_unequal_parts(row: LossCase) -> None:
    _, t = row.sample()
    loss = resolve(row.make(), row.reduction)
    parts = [loss.total_weight(part) for part in t.split(4)]
    assert sum(parts) == pytest.approx(loss.total_weight(t), rel=1e-14)


@every_row
def test_other_reduction(row: LossCase) -> None:
    """Asking for the other reduction is the same as giving the loss with it."""
    other = "sum" if row.reduction == "mean" else "mean"
    z, t = row.sample()
    loss = resolve(row.make(), other)
    assert loss.reduction == other
    if row.loss in CALLABLES:
        return
    assert_close(
        loss.factor(t) * loss.value(z, t).sum(), row.reduced(other)(z, t), scope="layer", scale=float(loss.value(z, t).abs().sum())
    )
    assert torch.equal(resolve(resolve(row.make()), other).value(z, t), loss.value(z, t))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", NATIVE)
def test_loss_is_recognised_by_name_and_as_functional(name: str, reduction: str) -> None:
    row = next(row for row in ROWS + LINEAR_ROWS if row.loss == name and row.reduction == reduction and not row.options)
    by_module, by_name = resolve(row.make()), resolve(name, reduction)
    assert by_name == by_module
    if name in FUNCTIONALS:
        assert resolve(FUNCTIONALS[name], reduction) == by_module
        assert resolve(partial(FUNCTIONALS[name], reduction=reduction)) == by_module
    if reduction == "mean":
        assert resolve(name) == by_module
        assert FUNCTIONALS.get(name) is None or resolve(FUNCTIONALS[name]) == by_module


@every_row
def test_options_are_read_from_a_partial(row: LossCase) -> None:
    if row.loss not in FUNCTIONALS:
        return
    z, t = row.sample()
    loss = resolve(partial(FUNCTIONALS[row.loss], reduction=row.reduction, **row.options))
    assert type(loss) is type(resolve(row.make()))
    assert torch.equal(loss.value(z, t), resolve(row.make()).value(z, t))


@every_row
def test_strided_outputs_and_targets(row: LossCase, dtype: torch.dtype) -> None:
    z, t = sample(row, dtype)
    loss = resolve(row.make())
    wide = torch.stack([z, z + 1], dim=-1)[..., 0]
    t_wide = torch.stack([t, t], dim=-1)[..., 0]
    for call in (loss.value, loss.gradient):
        assert torch.equal(call(wide, t_wide), call(z, t))
    assert torch.equal(loss.bregman(wide + 0, wide, t_wide), loss.bregman(z, z, t))


def test_classes_are_checked_without_a_copy_of_the_outputs() -> None:
    z = torch.zeros(1, 10**6).expand(10**6, 10**6)  # 4 TB as numbers of their own
    resolve(torch.nn.CrossEntropyLoss()).check(z, torch.arange(10**6), "test")
    with pytest.raises(DataError, match="got 1000000 in example 999999"):
        resolve(torch.nn.CrossEntropyLoss()).check(z, torch.arange(1, 10**6 + 1), "test")


def test_integer_targets_stand_for_numbers() -> None:
    row = next(row for row in ROWS if row.id == "bce-mean")
    z, t = sample(row, F64)
    loss: Loss = resolve(row.make())
    assert torch.equal(loss.value(z, t.long()), loss.value(z, t))
