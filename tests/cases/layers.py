"""One row per node kind and option: the smallest network in which the rule has a non-trivial Jacobian."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from tests.cases import NetworkCase


class Expression(nn.Module):
    """``forward(x) = fn(self, x)``; tensors among the members become buffers."""

    def __init__(self, fn: Callable[[Any, Tensor], Tensor], **members: nn.Module | nn.Parameter | Tensor) -> None:
        super().__init__()
        self.fn = fn
        for name, member in members.items():
            if isinstance(member, Tensor) and not isinstance(member, nn.Parameter):
                self.register_buffer(name, member)
            else:
                setattr(self, name, member)

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate the expression."""
        return self.fn(self, x)


def parameter(*shape: int) -> nn.Parameter:
    """Standard normal, float64."""
    return nn.Parameter(torch.randn(shape, dtype=torch.float64))


def buffer(*shape: int) -> Tensor:
    """Standard normal, float64."""
    return torch.randn(shape, dtype=torch.float64)


def normal(*shape: int, scale: float = 1.0) -> Callable[[int, Generator], Tensor]:
    """Inputs ``[N, *shape]``."""
    return lambda N, rng: scale * torch.randn(N, *shape, generator=rng, dtype=torch.float64)


def strided(width: int) -> Callable[[int, Generator], Tensor]:
    """Inputs ``[N, width]`` that are every other column of a transposed, larger tensor."""
    return lambda N, rng: torch.randn(2 * width + 1, N + 3, generator=rng, dtype=torch.float64).T[1 : N + 1, 1::2]


def zero_rows(width: int) -> Callable[[int, Generator], Tensor]:
    """Inputs ``[N, width]`` whose first example is zero."""

    def make(N: int, rng: Generator) -> Tensor:
        X = torch.randn(N, width, generator=rng, dtype=torch.float64)
        X[0] = 0
        return X

    return make


def unbiased(layer: nn.Linear) -> nn.Linear:
    """``layer`` with a trainable bias of exactly zero."""
    nn.init.zeros_(layer.bias)
    return layer


def frozen(layer: nn.Module, *names: str) -> nn.Module:
    """``layer`` with the parameters ``names`` (all of them if none is named) frozen."""
    for name, value in layer.named_parameters():
        if not names or name in names:
            value.requires_grad_(False)
    return layer


def row(id: str, rule: str, make: Callable[[], nn.Module], notes: str, inputs: Any = None, **more: Any) -> NetworkCase:
    """A row at layer tolerance; inputs are ``[N, 3]`` unless told."""
    return NetworkCase(
        id=id,
        make=make,
        inputs=inputs or normal(3),
        notes=notes,
        scope="layer",
        rules=frozenset({rule}),
        **more,
    )


def expression(id: str, rule: str, fn: Callable[[Any, Tensor], Tensor], notes: str, inputs: Any = None, **members: Any) -> NetworkCase:
    """A row from an expression; members are zero-argument makers, so that every build draws its own."""
    return row(id, rule, lambda: Expression(fn, **{name: make() for name, make in members.items()}), notes, inputs)


def activation(id: str, rule: str, make: Callable[[], nn.Module], notes: str, scale: float = 2.0) -> NetworkCase:
    """A linear layer under an activation; ``scale`` spreads the pre-activations over its regimes."""
    return row(id, rule, lambda: nn.Sequential(nn.Linear(3, 7), make()), notes, normal(3, scale=scale), num_examples=9)


def fc(num_in: int = 3, num_out: int = 3) -> Callable[[], nn.Module]:
    """Maker of a linear layer."""
    return lambda: nn.Linear(num_in, num_out)


LINEAR = (
    row("linear-3-4", "linear", fc(3, 4), "the plain layer"),
    row("linear-1-1", "linear", fc(1, 1), "width one: no vector register is ever full", normal(1)),
    row("linear-7-33", "linear", fc(7, 33), "odd widths: remainders of every loop", normal(7)),
    row("linear-97-33", "linear", fc(97, 33), "reduction longer than any register tile", normal(97)),
    row("linear-33-97", "linear", fc(33, 97), "output wider than any register tile", normal(33), num_examples=2),
    row("linear-single", "linear", fc(3, 4), "N = 1", num_examples=1),
    row("linear-many", "linear", fc(3, 2), "N larger than a tile of examples, and odd", num_examples=131),
    row("linear-nobias", "linear", lambda: nn.Linear(3, 4, bias=False), "no bias"),
    row("linear-seq", "linear", fc(3, 4), "[N, T, I]: T positions share the weight", normal(5, 3)),
    row("linear-seq-wide", "linear", fc(61, 21), "outer products: full tiles, single vectors, what is left", normal(5, 61)),
    row("linear-seq-nobias", "linear", lambda: nn.Linear(3, 4, bias=False), "positions, no bias", normal(5, 3)),
    row("linear-grid", "linear", fc(3, 4), "[N, T, U, I]: two position axes", normal(2, 3, 3)),
    row("linear-seq-one", "linear", fc(3, 4), "T = 1 with its axis kept", normal(1, 3)),
    row("linear-frozen-weight", "linear", lambda: frozen(fc(3, 4)(), "weight"), "only the bias is trainable"),
    row("linear-frozen-bias", "linear", lambda: frozen(fc(3, 4)(), "bias"), "only the weight is trainable"),
    row(
        "linear-frozen-bias-seq",
        "linear",
        lambda: frozen(fc(3, 4)(), "bias"),
        "only the weight is trainable, positions",
        normal(5, 3),
    ),
    row(
        "linear-under-frozen",
        "linear",
        lambda: nn.Sequential(fc(3, 4)(), frozen(fc(4, 2)())),
        "the cotangent passes a layer that has no trainable parameter",
    ),
    row("linear-strided", "linear", fc(3, 4), "inputs that are not contiguous", strided(3)),
    expression("linear-functional", "linear", lambda m, x: F.linear(x, m.w, m.b), "functional form",
               w=lambda: parameter(4, 3), b=lambda: parameter(4)),
    expression("linear-buffer-weight", "linear", lambda m, x: F.linear(x, m.w, m.b), "the weight is a constant",
               w=lambda: buffer(4, 3), b=lambda: parameter(4)),
    expression("addmm", "linear", lambda m, x: torch.addmm(m.b, x, m.w), "functional form with the weight not transposed",
               w=lambda: parameter(3, 4), b=lambda: parameter(4)),
    expression("addmm-transposed", "linear", lambda m, x: torch.addmm(m.b, x, m.w.t()), "addmm with w.t()",
               w=lambda: parameter(4, 3), b=lambda: parameter(4)),
    expression("matmul", "linear", lambda m, x: x @ m.w, "x @ W", w=lambda: parameter(3, 4)),
    expression("matmul-transposed", "linear", lambda m, x: x @ m.w.T, "x @ W.T", w=lambda: parameter(4, 3)),
    expression("matmul-mT", "linear", lambda m, x: x @ m.w.mT, "x @ W.mT", w=lambda: parameter(4, 3)),
    expression("mm", "linear", lambda m, x: torch.mm(x, m.w), "mm", w=lambda: parameter(3, 4)),
    expression("matmul-seq", "linear", lambda m, x: x @ m.w, "[N, T, I] @ W", normal(5, 3), w=lambda: parameter(3, 4)),
    expression("matmul-vector", "linear", lambda m, x: x @ m.w, "x @ w: outputs [N]", w=lambda: parameter(3)),
    expression("mv", "linear", lambda m, x: torch.mv(x, m.w), "mv: outputs [N]", w=lambda: parameter(3)),
    expression("matmul-bias", "linear", lambda m, x: x @ m.w + m.b, "a bias that is added by an operator of its own",
               w=lambda: parameter(3, 4), b=lambda: parameter(4)),
)  # fmt: skip

ACTIVATIONS = (
    activation("relu", "activation", nn.ReLU, "the kink is missed by random inputs"),
    activation("relu-inplace", "activation", lambda: nn.ReLU(inplace=True), "in place in the user's code"),
    activation("tanh", "activation", nn.Tanh, "moderate arguments"),
    activation("tanh-saturated", "activation", nn.Tanh, "1 − tanh² underflows gracefully", scale=30.0),
    activation("sigmoid", "activation", nn.Sigmoid, "moderate arguments"),
    activation("sigmoid-saturated", "activation", nn.Sigmoid, "exp overflows on one side", scale=300.0),
    activation("gelu", "activation", nn.GELU, "the exact form with erf"),
    activation("gelu-tails", "activation", nn.GELU, "far tails: erf cancels against 1", scale=10.0),
    activation("gelu-tanh", "activation", lambda: nn.GELU(approximate="tanh"), "the tanh form"),
    activation("gelu-tanh-tails", "activation", lambda: nn.GELU(approximate="tanh"), "far tails", scale=30.0),
    activation("silu", "activation", nn.SiLU, "moderate arguments"),
    activation("silu-tails", "activation", nn.SiLU, "exp overflows on one side", scale=300.0),
    activation("elu", "activation", nn.ELU, "alpha = 1"),
    activation("elu-alpha", "activation", lambda: nn.ELU(alpha=0.3), "alpha: a kink at zero, both options honoured"),
    activation("elu-tails", "activation", nn.ELU, "the exponential must not be taken of large arguments", scale=400.0),
    activation("softplus", "activation", nn.Softplus, "beta = 1"),
    activation("softplus-beta", "activation", lambda: nn.Softplus(beta=2.5, threshold=3.0), "both sides of the threshold"),
    activation("softplus-tails", "activation", nn.Softplus, "exp overflows beyond the threshold", scale=400.0),
    activation("celu", "activation", nn.CELU, "an ELU under another name"),
    activation("selu", "activation", nn.SELU, "an ELU with an outer scale"),
    activation("rrelu-eval", "activation", nn.RReLU, "the mean slope in evaluation mode"),
    activation("leaky-relu", "activation", nn.LeakyReLU, "slope 0.01"),
    activation("leaky-relu-slope", "activation", lambda: nn.LeakyReLU(0.4), "slope given"),
    row("relu-at-zero", "activation", lambda: nn.Sequential(unbiased(nn.Linear(3, 4)), nn.ReLU()),
        "PyTorch's derivative at the kink is 0", zero_rows(3)),
    row("leaky-relu-at-zero", "activation", lambda: nn.Sequential(unbiased(nn.Linear(3, 4)), nn.LeakyReLU(0.2)),
        "PyTorch's derivative at the kink is the slope", zero_rows(3)),
    row("elu-at-zero", "activation", lambda: nn.Sequential(unbiased(nn.Linear(3, 4)), nn.ELU(0.5)),
        "PyTorch's derivative at the kink is alpha", zero_rows(3)),
    expression("relu-functional", "activation", lambda m, x: F.relu(m.fc(x)), "functional form", fc=fc()),
    expression("tanh-method", "activation", lambda m, x: m.fc(x).tanh(), "method form", fc=fc()),
    expression("sigmoid-method", "activation", lambda m, x: torch.sigmoid(m.fc(x)), "torch form", fc=fc()),
    row("activation-of-input", "linear", lambda: nn.Sequential(nn.Tanh(), nn.Linear(3, 4)),
        "what stands before the first parameter is computed by torch"),
    row("activation-seq", "activation", lambda: nn.Sequential(nn.Linear(3, 4), nn.SiLU(), nn.Linear(4, 2)),
        "three axes", normal(5, 3)),
)  # fmt: skip

STRUCTURE = (
    row("flatten", "linear", lambda: nn.Sequential(nn.Flatten(), nn.Linear(6, 4)), "flatten of the input", normal(2, 3)),
    row("flatten-mid", "view", lambda: nn.Sequential(nn.Linear(3, 4), nn.Flatten(), nn.Linear(8, 2)),
        "positions become features: the weight is shared before and not after", normal(2, 3)),
    expression("flatten-function", "view", lambda m, x: torch.flatten(m.fc(x), 1), "function form", normal(2, 3), fc=fc()),
    expression("view", "view", lambda m, x: m.fc(x).view(x.shape[0], 6), "view with the batch size from shape",
               normal(2, 3), fc=fc()),
    expression("view-minus-one", "view", lambda m, x: m.fc(x).view(-1, 6), "the batch axis is inferred", normal(2, 3), fc=fc()),
    expression("reshape", "view", lambda m, x: m.fc(x).reshape(x.size(0), -1), "reshape", normal(2, 3), fc=fc()),
    expression("reshape-split", "view", lambda m, x: m.fc(m.up(x).reshape(-1, 2, 3)), "features become positions",
               up=fc(3, 6), fc=fc()),
    expression("unsqueeze", "view", lambda m, x: m.fc(m.up(x).unsqueeze(1)), "an axis of length one", up=fc(), fc=fc()),
    expression("unsqueeze-last", "view", lambda m, x: m.fc(m.up(x).unsqueeze(-1)), "every feature becomes a position",
               up=fc(), fc=fc(1, 2)),
    expression("squeeze-last", "view", lambda m, x: m.fc(x).squeeze(-1), "outputs [N]: the usual regression head",
               fc=fc(3, 1)),
    expression("squeeze-all", "view", lambda m, x: m.fc(x).unsqueeze(1).squeeze(), "squeeze without an axis", fc=fc()),
    expression("expand-same", "view", lambda m, x: m.fc(x).expand(-1, 3), "an expand that changes nothing", fc=fc()),
    expression("slice-all", "view", lambda m, x: m.fc(x)[:, :], "a slice of everything", fc=fc()),
    expression("transpose-unit", "view", lambda m, x: m.fc(x).unsqueeze(1).transpose(1, 2), "an axis of length one moves",
               fc=fc()),
    expression("permute-unit", "view", lambda m, x: m.fc(x).unsqueeze(1).permute(0, 2, 1), "an axis of length one moves",
               fc=fc()),
    expression("contiguous", "view", lambda m, x: m.fc(x).contiguous().clone(), "copies are views to a plan", fc=fc()),
    row("dropout-eval", "view", lambda: nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2)),
        "dropout in evaluation mode is the identity"),
    row("identity", "linear", lambda: nn.Sequential(nn.Identity(), nn.Linear(3, 4), nn.Identity()), "leaves no node"),
)  # fmt: skip

ARITHMETIC = (
    expression("add-scalar", "affine", lambda m, x: m.fc(x) + 2.0, "x + c", fc=fc()),
    expression("add-int", "affine", lambda m, x: 1 + m.fc(x), "c + x with an integer", fc=fc()),
    expression("sub-scalar", "affine", lambda m, x: m.fc(x) - 0.5, "x − c", fc=fc()),
    expression("rsub-scalar", "affine", lambda m, x: 2 - m.fc(x), "c − x: the sign of the tangent flips", fc=fc()),
    expression("mul-scalar", "affine", lambda m, x: 1.5 * m.fc(x), "c · x", fc=fc()),
    expression("div-scalar", "affine", lambda m, x: m.fc(x) / 3, "x / c", fc=fc()),
    expression("neg", "affine", lambda m, x: -m.fc(x), "−x", fc=fc()),
    expression("affine-chain", "affine", lambda m, x: -(2 * m.fc(x) + 1) / 4 - 3, "several constants in a row", fc=fc()),
    expression("add-buffer", "affine", lambda m, x: m.fc(x) + m.c, "a constant per feature", fc=fc(), c=lambda: buffer(3)),
    expression("sub-buffer", "affine", lambda m, x: m.fc(x) - m.c, "x − c per feature", fc=fc(), c=lambda: buffer(3)),
    expression("rsub-buffer", "affine", lambda m, x: m.c - m.fc(x), "c − x per feature", fc=fc(), c=lambda: buffer(3)),
    expression("mul-buffer", "affine", lambda m, x: m.fc(x) * m.c, "c · x per feature", fc=fc(), c=lambda: buffer(3)),
    expression("div-buffer", "affine", lambda m, x: m.fc(x) / m.c, "x / c per feature", fc=fc(),
               c=lambda: buffer(3).abs() + 0.5),
    expression("mul-buffer-row", "affine", lambda m, x: m.fc(x) * m.c, "a constant of shape [1, C]", fc=fc(),
               c=lambda: buffer(1, 3)),
    expression("mul-buffer-seq", "affine", lambda m, x: m.fc(x) * m.c, "a constant per position, broadcast over features",
               normal(5, 3), fc=fc(), c=lambda: buffer(5, 1)),
    expression("add-buffer-0d", "affine", lambda m, x: m.fc(x) * m.c + m.c, "a constant without axes", fc=fc(),
               c=lambda: buffer()),
    expression("normalise-input", "linear", lambda m, x: m.fc((x - m.mean) / m.std), "constants before the first parameter",
               fc=fc(), mean=lambda: buffer(3), std=lambda: buffer(3).abs() + 0.5),
    expression("residual-one", "add", lambda m, x: x + m.fc(x), "one branch has no tangent", fc=fc()),
    expression("residual-two", "add", lambda m, x: m.a(x) + m.b(x), "both branches have tangents", a=fc(), b=fc()),
    expression("sub-two", "add", lambda m, x: m.a(x) - m.b(x), "difference of branches", a=fc(), b=fc()),
    expression("add-alpha", "add", lambda m, x: torch.add(m.a(x), m.b(x), alpha=0.5), "the option alpha", a=fc(), b=fc()),
    expression("add-self", "add", lambda m, x: (h := m.fc(x)) + h, "x + x: both inputs are one value", fc=fc()),
    expression("add-inplace", "add", lambda m, x: m.a(x).add_(m.b(x)), "in place in the user's code", a=fc(), b=fc()),
)  # fmt: skip

BY_HAND = (row("identity-rule", "identity", fc(), "the rule to copy: no operator lowers to it, test_layers builds its nodes by hand"),)
LAYERS = LINEAR + ACTIVATIONS + STRUCTURE + ARITHMETIC
