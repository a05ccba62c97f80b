"""Rows of functions that act element by element: activations, arithmetic with broadcasting, choices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from tests.cases.layers import activation, buffer, expression, fc, frozen, normal, parameter, row, unbiased, zero_rows


def at_kinks(width: int, *points: float) -> Callable[[], nn.Module]:
    """Maker of a linear layer whose outputs for zero inputs are exactly ``points``."""

    def make() -> nn.Module:
        layer = nn.Linear(3, width)
        with torch.no_grad():
            layer.bias.copy_(torch.tensor(points).repeat(width)[:width])
        return layer

    return make


def flags(*shape: int) -> Callable[[int, Generator], tuple[Tensor, Tensor]]:
    """Inputs ``[N, 3]`` with a mask ``[N, *shape]`` of zeros and ones as integers."""
    return lambda N, rng: (torch.randn(N, 3, generator=rng, dtype=torch.float64), torch.randint(0, 2, (N, *shape), generator=rng))


class OfTwo(nn.Module):
    """``forward(x, y) = fn(self, x, y)``."""

    def __init__(self, fn: Callable[[Any, Tensor, Tensor], Tensor], **members: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.fn = fn
        for name, member in members.items():
            setattr(self, name, member)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Evaluate the expression."""
        return self.fn(self, x, y)


def positive(m: Any, x: Tensor) -> Tensor:
    """The layer's output made positive by an operator that has a rule."""
    return F.softplus(m.fc(x)) + 0.1


SMOOTH = (
    activation("hardswish", "activation", nn.Hardswish, "all three regimes", scale=6.0),
    activation("hardsigmoid", "activation", nn.Hardsigmoid, "all three regimes", scale=6.0),
    activation("hardtanh", "activation", lambda: nn.Hardtanh(-0.5, 1.5), "both bounds"),
    activation("relu6", "activation", nn.ReLU6, "a hardtanh", scale=9.0),
    activation("mish", "activation", nn.Mish, "moderate arguments"),
    activation("mish-tails", "activation", nn.Mish, "exp overflows on one side", scale=300.0),
    activation("softsign", "multiply", nn.Softsign, "abs and a quotient of two activations"),
    activation("tanhshrink", "activation", nn.Tanhshrink, "a difference"),
    activation("softshrink", "activation", lambda: nn.Softshrink(0.7), "three regimes"),
    activation("hardshrink", "activation", lambda: nn.Hardshrink(0.7), "three regimes"),
    activation("threshold", "activation", lambda: nn.Threshold(0.2, -3.0), "a jump"),
    activation("log-sigmoid", "activation", nn.LogSigmoid, "both tails", scale=50.0),
    activation("celu-alpha", "activation", lambda: nn.CELU(0.4), "alpha scales the argument too"),
    activation("glu", "multiply", lambda: nn.Sequential(nn.Linear(7, 10), nn.GLU()), "halves of the features"),
    activation("prelu", "prelu", nn.PReLU, "one trained slope"),
    activation("prelu-channels", "prelu", lambda: nn.PReLU(7), "a trained slope for each feature"),
    activation("prelu-frozen", "prelu", lambda: frozen(nn.PReLU(7)), "constant slopes"),
    row("prelu-grid", "prelu", lambda: nn.Sequential(nn.Linear(3, 24), nn.Unflatten(1, (4, 3, 2)), nn.PReLU(4)),
        "channels with positions"),
    row("prelu-of-input", "prelu", lambda: nn.Sequential(nn.PReLU(), nn.Linear(3, 2)), "no tangent enters", num_examples=1),
    expression("clamp", "activation", lambda m, x: m.fc(x).clamp(-0.3, 0.4), "both bounds", fc=fc(3, 9)),
    expression("clamp-min", "activation", lambda m, x: m.fc(x).clamp(min=0.1), "a bound below", fc=fc(3, 9)),
    expression("clamp-max", "activation", lambda m, x: m.fc(x).clamp_max(0.1), "a bound above", fc=fc(3, 9)),
    *(
        expression(f"{name}-of-positive", "activation", lambda m, x, f=f: f(positive(m, x)), "torch form", fc=fc(3, 5))
        for name, f in {
            "log": torch.log, "log2": torch.log2, "log10": torch.log10, "log1p": torch.log1p, "sqrt": torch.sqrt, "rsqrt": torch.rsqrt,
            "reciprocal": torch.reciprocal, "pow": lambda x: x**1.7, "pow-negative": lambda x: x**-2.5, "root": lambda x: x**0.5,
            "acosh": lambda x: torch.acosh(1 + x),
        }.items()
    ),
    *(
        expression(f"{name}-function", "activation", lambda m, x, f=f: f(m.fc(x)), "torch form", fc=fc(3, 5))
        for name, f in {
            "exp": torch.exp, "exp2": torch.exp2, "expm1": torch.expm1, "square": torch.square, "cube": lambda x: x**3,
            "pow-zero": lambda x: x + x**0, "abs": torch.abs, "sin": torch.sin, "cos": torch.cos, "tan": torch.tan, "atan": torch.atan,
            "sinh": torch.sinh, "cosh": torch.cosh, "asinh": torch.asinh, "erf": torch.erf, "erfc": torch.erfc,
            "asin": lambda x: torch.asin(torch.tanh(x)), "acos": lambda x: torch.acos(0.9 * torch.tanh(x)),
            "atanh": lambda x: torch.atanh(0.9 * torch.tanh(x)), "sign": lambda x: x * torch.sign(x),
            "floor": lambda x: x + torch.floor(x),
            "ceil": lambda x: x * torch.ceil(x), "round": lambda x: x * torch.round(3 * x), "trunc": lambda x: x - torch.trunc(2 * x),
        }.items()
    ),
    *(
        row(f"{name}-at-kinks", "activation", lambda make=make, points=points: nn.Sequential(at_kinks(4, *points)(), make()),
            "PyTorch's derivative at the kinks", zero_rows(3))
        for name, make, points in (
            ("hardswish", nn.Hardswish, (-3.0, 3.0)), ("hardsigmoid", nn.Hardsigmoid, (-3.0, 3.0)), ("hardtanh", nn.Hardtanh, (-1.0,
            1.0)),
            ("softshrink", nn.Softshrink, (-0.5, 0.5)), ("hardshrink", nn.Hardshrink, (-0.5, 0.5)), ("relu6", nn.ReLU6, (0.0, 6.0)),
            ("threshold", lambda: nn.Threshold(0.5, 2.0), (0.5,)), ("celu", lambda: nn.CELU(0.4), (0.0,)), ("prelu-slope",
            lambda: nn.LeakyReLU(0.3), (0.0,)),
        )
    ),
    row("prelu-at-zero", "prelu", lambda: nn.Sequential(unbiased(nn.Linear(3, 4)), nn.PReLU()), "the slope's side of the kink",
        zero_rows(3)),
    expression("clamp-at-bounds", "activation", lambda m, x: m.fc(x).clamp(-1, 1), "clamp passes the derivative at its bounds",
               zero_rows(3),
               fc=at_kinks(4, -1.0, 1.0)),
    expression("pow-at-zero", "activation", lambda m, x: m.fc(x) ** 1 + m.fc(x) ** 2 + m.fc(x) ** 3, "powers of zero", zero_rows(3),
               fc=lambda: unbiased(nn.Linear(3, 4))),
    expression("abs-at-zero", "activation", lambda m, x: m.fc(x).abs(), "PyTorch's derivative at the kink is 0", zero_rows(3),
               fc=lambda: unbiased(nn.Linear(3, 4))),
)  # fmt: skip

TRAINED = (
    expression("add-parameter", "affine", lambda m, x: m.fc(x).tanh() + m.p, "a bare bias", fc=fc(3, 4), p=lambda: parameter(4)),
    expression("add-parameter-to-input", "affine", lambda m, x: x + m.p, "nothing but a bias", p=lambda: parameter(3)),
    expression("sub-parameter", "affine", lambda m, x: m.fc(x).tanh() - m.p, "a bias with a sign", fc=fc(3, 4), p=lambda: parameter(4)),
    expression("rsub-parameter", "affine", lambda m, x: m.p - m.fc(x).tanh(), "the other order", fc=fc(3, 4), p=lambda: parameter(4)),
    expression("mul-parameter", "affine", lambda m, x: m.p * m.fc(x), "layer scale", fc=fc(3, 4), p=lambda: parameter(4)),
    expression("mul-parameter-input", "affine", lambda m, x: m.fc(m.p * x), "a gate on the inputs", fc=fc(3, 4), p=lambda: parameter(3)),
    expression("div-parameter", "affine", lambda m, x: m.fc(x) / m.p, "a trained divisor", fc=fc(3, 4), p=lambda: parameter(4)),
    expression("parameter-over", "multiply", lambda m, x: (m.p / positive(m, x)) * m.fc(x), "a trained numerator", fc=fc(3, 4),
               p=lambda: parameter(4)),
    expression("scalar-gate", "affine", lambda m, x: torch.sigmoid(m.g) * m.fc(x), "one number gates a layer", fc=fc(3, 4),
               g=lambda: parameter()),
    expression("scalar-gate-one", "affine", lambda m, x: m.g * m.fc(x), "shape [1]", fc=fc(3, 4), g=lambda: parameter(1)),
    expression("layer-scale-grid", "affine", lambda m, x: m.g[:, None, None] * m.fc(x).unflatten(1, (4, 3, 2)),
               "one number a channel, through new axes", fc=fc(3, 24), g=lambda: parameter(4)),
    expression("layer-scale-view", "affine", lambda m, x: m.g.view(1, 4, 1, 1) * m.fc(x).unflatten(1, (4, 3, 2)) + m.b.view(1, 4, 1, 1),
               "scale and shift of channels", fc=fc(3, 24), g=lambda: parameter(4), b=lambda: parameter(4)),
    expression("scale-shift-seq", "affine", lambda m, x: m.g * m.fc(x) + m.b, "repeated over positions", normal(5, 3), fc=fc(3, 4),
               g=lambda: parameter(4), b=lambda: parameter(4)),
    expression("position-embedding", "affine", lambda m, x: m.fc(x).tanh() + m.p, "one vector a position", normal(5, 3), fc=fc(3, 4),
               p=lambda: parameter(1, 5, 4)),
    expression("position-slice", "affine", lambda m, x: m.fc(x).tanh() + m.p[:, : x.shape[1]], "a longer table, cut", normal(5, 3),
               fc=fc(3, 4),
               p=lambda: parameter(1, 9, 4)),
    expression("position-slice-mid", "affine", lambda m, x: m.fc(x).tanh() + m.p[2:7].T[1:5].T, "columns of a table", normal(5, 3),
               fc=fc(3, 4),
               p=lambda: parameter(9, 6)),
    expression("broadcast-up", "affine", lambda m, x: m.fc(x).unsqueeze(1) * m.p, "the parameter is larger than the activation", fc=fc(3,
               4),
               p=lambda: parameter(5, 4)),
    expression("broadcast-both", "affine", lambda m, x: m.fc(x).unsqueeze(1) + m.p, "both are repeated", fc=fc(3, 4),
               p=lambda: parameter(5, 1)),
    expression("parameter-twice", "affine", lambda m, x: m.p * (m.fc(x) + m.p), "tied: cross terms", fc=fc(3, 4), p=lambda: parameter(4)),
    expression("parameter-frozen-scale", "affine", lambda m, x: m.s * m.fc(x) + m.p, "a constant scale and a trained shift", normal(5, 3),
               fc=fc(3, 4), s=lambda: buffer(5, 1), p=lambda: parameter(4)),
    row("parameters-single", "affine", lambda: Scaled(), "N = 1", normal(5, 3), num_examples=1),
    row("parameters-many", "affine", lambda: Scaled(), "N larger than a tile of examples, and odd", normal(5, 3), num_examples=131),
)  # fmt: skip


class Scaled(nn.Module):
    """A layer with a scale of features and a shift of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.scale, self.shift = nn.Linear(3, 4), parameter(4), parameter(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        """``scale * fc(x) + shift``."""
        y: Tensor = self.scale * self.fc(x).tanh() + self.shift
        return y


PAIRS = (
    expression("mul-activations", "multiply", lambda m, x: m.a(x) * m.b(x), "both factors are differentiated", a=fc(3, 4), b=fc(3, 4)),
    expression("mul-input", "multiply", lambda m, x: x * m.fc(x), "one factor has no tangent", fc=fc()),
    expression("mul-self", "multiply", lambda m, x: (lambda y: y * y)(m.fc(x)), "the same value twice", fc=fc()),
    expression("div-activations", "multiply", lambda m, x: m.b(x) / positive(m, x), "a quotient", fc=fc(3, 4), b=fc(3, 4)),
    expression("div-number", "activation", lambda m, x: 2.0 / positive(m, x), "a number over an activation", fc=fc(3, 4)),
    expression("gate-channels", "multiply", lambda m, x: (lambda y: y * torch.sigmoid(y.mean(-1, keepdim=True)))(m.fc(x)),
               "the smaller factor is repeated along features", normal(5, 3), fc=fc(3, 4)),
    expression("add-broadcast", "add", lambda m, x: m.a(x).unsqueeze(1) + m.b(x).unsqueeze(2), "an outer sum", a=fc(3, 4), b=fc(3, 5)),
    expression("mul-broadcast", "multiply", lambda m, x: m.a(x).unsqueeze(1) * m.b(x).unsqueeze(2), "an outer product", a=fc(3, 4),
               b=fc(3, 5)),
    expression("sub-broadcast", "add", lambda m, x: m.a(x) - m.b(x)[:, :1], "one column from all", a=fc(3, 4), b=fc(3, 5)),
    expression("maximum", "extremum", lambda m, x: torch.maximum(m.a(x), m.b(x)), "max", a=fc(3, 4), b=fc(3, 4)),
    expression("minimum", "extremum", lambda m, x: torch.minimum(m.a(x), m.b(x)), "min", a=fc(3, 4), b=fc(3, 4)),
    expression("maximum-tie", "extremum", lambda m, x: torch.maximum(m.a(x), m.a(x)), "ties share the derivative", a=fc(3, 4)),
    expression("maximum-parameter", "extremum", lambda m, x: torch.maximum(m.a(x), m.p), "against a trained floor", a=fc(3, 4),
               p=lambda: parameter(4)),
    expression("where-input", "where", lambda m, x: torch.where(x > 0, m.a(x), m.b(x)), "a condition on the inputs", a=fc(), b=fc()),
    expression("where-number", "where", lambda m, x: torch.where(x > 0, m.a(x), 0.5), "a number in one branch", a=fc()),
    expression("where-safe", "where", lambda m, x: torch.where(x > 0, m.a(x), torch.log(x.clamp(max=0)) + m.b(x)),
               "NaN in the branch that is not taken",
               lambda N, rng: torch.rand(N, 3, generator=rng, dtype=torch.float64) + 0.1, a=fc(), b=fc()),
    expression("where-buffer", "where", lambda m, x: torch.where(m.c > 0, m.a(x), m.p), "a constant condition, a parameter in one branch",
               a=fc(3, 4),
               c=lambda: buffer(4), p=lambda: parameter(4)),
    expression("where-activation", "where", lambda m, x: (lambda y: torch.where(y > 0.1, y * y, m.b(x)))(m.a(x)),
               "a condition on an activation",
               a=fc(), b=fc()),
    expression("comparison-factor", "activation", lambda m, x: (lambda y: (y <= 0.3).unsqueeze(1) * y.unsqueeze(2))(m.a(x)),
               "a truth value as a factor",
               a=fc(3, 4)),
    expression("comparison-converted", "multiply",
               lambda m, x: (lambda y: (y != 0.3).to(y.dtype) * y - (y >= 0).to(y.dtype) + (y < 1) * y + (y == 0.5) * y)(m.a(x)),
               "truth values as numbers", a=fc(3, 4)),
    *(
        expression(f"{name}-of-two", "comparison", lambda m, x, f=f: (lambda y, z: f(y, z) * y - f(z, y).to(z.dtype) * z)(m.a(x), m.b(x)),
                   "two activations", a=fc(3, 4), b=fc(3, 4))
        for name, f in {"gt": torch.gt, "ge": torch.ge, "lt": torch.lt, "le": torch.le}.items()
    ),
    expression("is-largest", "comparison", lambda m, x: (lambda y: torch.where(y == y.amax(1, keepdim=True), y, 0.1 * y))(m.a(x)),
               "equality under broadcasting", a=fc(3, 4)),
    expression("is-not-largest", "comparison", lambda m, x: (lambda y: (y != y.amax(1, keepdim=True)) * y)(m.a(x)), "inequality",
               a=fc(3, 4)),
    expression("equal-infinities", "comparison",
               lambda m, x: (lambda y: ((y == y.flip(1)).to(x.dtype) + 0.5) * m.a(x))(m.a(x).masked_fill(x[:, :1] < 9, -torch.inf)),
               "infinities are equal: no difference is formed", a=fc(3, 4)),
    expression("above-threshold", "comparison", lambda m, x: (lambda y: (y > m.t) * y + (m.p >= y) * m.p)(m.a(x)),
               "against a buffer and a parameter", a=fc(3, 4), t=lambda: buffer(4), p=lambda: parameter(4)),
    expression("above-input", "comparison", lambda m, x: (lambda y: torch.where(y > x, y, y * y))(m.a(x)), "against the input", a=fc()),
    expression("masked-fill", "where", lambda m, x: m.a(x).masked_fill(x > 0.2, -1.5), "masked_fill", a=fc()),
    expression("masked-fill-broadcast", "where", lambda m, x: m.a(x).masked_fill(x[..., :1] > 0.2, -1.5), "a mask over features",
               normal(5, 3), a=fc(3, 4)),
    row("mask-input", "multiply", lambda: OfTwo(lambda m, x, mask: m.fc(x) * mask, fc=nn.Linear(3, 4)),
        "an integer mask among the inputs", flags(4)),
    row("mask-input-broadcast", "multiply", lambda: OfTwo(lambda m, x, mask: m.fc(x).unsqueeze(1) * mask.unsqueeze(-1), fc=nn.Linear(3,
        4)),
        "repeated over features", flags(5)),
)  # fmt: skip

GENERIC = (
    expression("pow-of-two", "generic", lambda m, x: positive(m, x) ** m.b(x), "both are differentiated", fc=fc(3, 4), b=fc(3, 4)),
    expression("pow-of-number", "generic", lambda m, x: 1.7 ** m.fc(x), "the exponent is differentiated", fc=fc(3, 4)),
    expression("pow-parameter", "generic", lambda m, x: positive(m, x) ** m.p, "a trained exponent", fc=fc(3, 4), p=lambda: parameter(4)),
    expression("clamp-buffers", "generic", lambda m, x: torch.clamp(m.fc(x), m.low, m.low + 0.7), "bounds of each feature", fc=fc(3, 9),
               low=lambda: buffer(9)),
    expression("clamp-activations", "generic", lambda m, x: torch.clamp(m.fc(x), min=m.b(x)), "a bound that is differentiated", fc=fc(3, 4),
               b=fc(3, 4)),
    expression("lerp", "generic", lambda m, x: torch.lerp(m.fc(x), m.b(x), m.fc(x)), "three operands", fc=fc(3, 4), b=fc(3, 4)),
    expression("atan2", "generic", lambda m, x: torch.atan2(m.fc(x), m.b(x)), "two operands", fc=fc(3, 4), b=fc(3, 4)),
)  # fmt: skip

POINTWISE = SMOOTH + TRAINED + PAIRS + GENERIC
