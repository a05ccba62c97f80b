"""Whole networks: sharing, freezing, fan-out, several inputs, odd sizes."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from tests.cases import NetworkCase
from tests.cases.layers import LAYERS, Expression, buffer, fc, frozen, normal, parameter, strided
from tests.cases.losses import ROWS, LossCase


def mlp(*widths: int, act: Callable[[], nn.Module] = nn.Tanh) -> nn.Sequential:
    """Linear layers of the given widths with an activation between any two."""
    layers: list[nn.Module] = []
    for num_in, num_out in pairwise(widths):
        layers += [nn.Linear(num_in, num_out), act()]
    return nn.Sequential(*layers[:-1])


class TiedTwice(nn.Module):
    """One linear layer applied twice, and once more under another name."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(4, 4)
        self.alias = self.hidden
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Three uses of ``hidden``."""
        return self.head(torch.tanh(self.alias(torch.tanh(self.hidden(torch.tanh(self.hidden(x)))))))


class FrozenNorm(nn.BatchNorm2d):
    """Normalises by statistics that are given, in training too."""

    def forward(self, x: Tensor) -> Tensor:
        """The running statistics' affine map."""
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps)


class ResidualImages(nn.Module):
    """What small convolutional networks are made of: strides, groups, norms, a shortcut, pooling, a frozen kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 4, 3, padding=1, bias=False), FrozenNorm(4)
        self.inner, self.shortcut = nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2), nn.Conv2d(4, 8, 1, stride=2)
        self.groups, self.each = nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.up, self.frozen, self.head = nn.ConvTranspose2d(8, 5, 2, stride=2), nn.Conv2d(5, 6, 2), nn.Linear(6, 3)
        self.norm.running_mean, self.norm.running_var = torch.linspace(-1, 1, 4), torch.linspace(0.5, 2, 4)
        self.frozen.weight.requires_grad_(False)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        """Of images ``[N, 1, 6, 6]``."""
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(self.groups(self.inner(x)) + self.shortcut(x))
        x = F.max_pool2d(torch.relu(self.up(torch.tanh(self.each(x)))), 2)
        z: Tensor = self.head(torch.tanh(self.frozen(x)).mean(dim=(2, 3)))
        return z


class Autoencoder(nn.Module):
    """Encoder ``W`` and decoder ``Wᵀ``."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = parameter(3, 5)
        self.bias = parameter(5)

    def forward(self, x: Tensor) -> Tensor:
        """Encode with ``W.T``, decode with ``W``."""
        return F.linear(torch.tanh(F.linear(x, self.weight)), self.weight.T, self.bias)


class TiedModules(nn.Module):
    """Two linear layers that share one weight and own a bias each, as language models tie embedding and head."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        """Both layers."""
        return self.second(F.silu(self.first(x)))


class Residual(nn.Module):
    """Two pre-activation residual blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(3, 6)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 6)) for _ in range(2))
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Stem, blocks, head."""
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


class TwoInputs(nn.Module):
    """Two tensors in, added after a layer each."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(3, 4)
        self.right = nn.Linear(2, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """Sum of the branches under a head."""
        return self.head(torch.tanh(self.left(left) + self.right(right)))


class FanOut(nn.Module):
    """A value with three users, two of which meet again."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(3, 4)
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        """``h + a(h) + b(h)``."""
        h = torch.tanh(self.stem(x))
        return self.head(torch.relu(self.a(h)) + F.softplus(self.b(h)) + h)


class Unused(nn.Module):
    """Owns a layer and a parameter that the output does not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.unused = nn.Linear(2, 2)
        self.loose = parameter(3)
        self.last = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Skips ``unused`` and ``loose``."""
        return self.last(torch.tanh(self.first(x)))


def mixer() -> nn.Module:
    """Linear over features, then over the flattened positions."""
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2), nn.Flatten(), nn.Linear(10, 3))


def frozen_middle() -> nn.Module:
    """The second of three layers does not train."""
    model = mlp(3, 4, 4, 2)
    frozen(model[2])
    return model


def head_only() -> nn.Module:
    """Only the last layer trains: nothing below it needs a cotangent."""
    model = mlp(3, 4, 4, 2)
    frozen(model[0])
    frozen(model[2])
    return model


def first_only() -> nn.Module:
    """Only the first layer trains: the cotangent passes all others."""
    model = mlp(3, 4, 4, 2)
    frozen(model[2])
    frozen(model[4])
    return model


def biases_only() -> nn.Module:
    """Every weight frozen, every bias trainable."""
    model = mlp(3, 4, 4, 2)
    for layer in model[::2]:
        frozen(layer, "weight")
    return model


def affine_everywhere() -> nn.Module:
    """Constants of every kind between the layers."""
    return Expression(
        lambda m, x: 2 - m.b(torch.tanh(-m.a((x - m.shift) / m.scale) * 1.5 + m.shift)) / 3,
        a=nn.Linear(3, 3),
        b=nn.Linear(3, 2),
        shift=buffer(3),
        scale=buffer(3).abs() + 0.5,
    )


def dead_units() -> nn.Module:
    """A ReLU layer of which some units are never active."""
    model = mlp(3, 6, 2, act=nn.ReLU)
    with torch.no_grad():
        model[0].bias[:3] = -100.0
    return model


def shared_bias() -> nn.Module:
    """Two layers with weights of their own and one bias."""
    model = mlp(3, 3, 3)
    model[2].bias = model[0].bias
    return model


def diamonds() -> nn.Module:
    """Values and layers that are used again at different depths."""

    def forward(m: Expression, x: Tensor) -> Tensor:
        a = F.gelu(m.f(x))
        b = torch.tanh(m.g(a) + a)
        return m.f(a) + m.f(b) + a - b

    return Expression(forward, f=nn.Linear(3, 3), g=nn.Linear(3, 3))


def views_shared() -> nn.Module:
    """One value read flat and as positions."""

    def forward(m: Expression, x: Tensor) -> Tensor:
        h = m.up(x)
        return m.mix(h.view(-1, 2, 2)).flatten(1) + torch.relu(h) - h

    return Expression(forward, up=nn.Linear(3, 4), mix=nn.Linear(2, 2))


def pair(N: int, rng: Generator) -> tuple[Tensor, Tensor]:
    """Two input tensors of different width."""
    return normal(3)(N, rng), normal(2)(N, rng)


def named_pair(N: int, rng: Generator) -> dict[str, Tensor]:
    """Two named input tensors, not in the order of ``forward``."""
    left, right = pair(N, rng)
    return {"right": right, "left": left}


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "gelu-tanh": lambda: nn.GELU(approximate="tanh"),
    "silu": nn.SiLU,
    "sigmoid": nn.Sigmoid,
    "elu": nn.ELU,
    "softplus": nn.Softplus,
    "leaky-relu": nn.LeakyReLU,
}

MODELS = (
    *(
        NetworkCase(f"mlp-{name}", lambda act=act: mlp(3, 6, 5, 2, act=act), normal(3), f"an MLP of {name}")
        for name, act in ACTIVATIONS.items()
    ),
    NetworkCase("mlp-ce", lambda: mlp(3, 6, 4), normal(3), "softmax Hessian between the sweeps", loss="ce-mean"),
    NetworkCase("mlp-ce-sum", lambda: mlp(3, 6, 4), normal(3), "cross-entropy, summed", loss="ce-sum"),
    NetworkCase("mlp-bce", lambda: mlp(3, 6, 3), normal(3), "several labels", loss="bce-mean"),
    NetworkCase("mlp-bce-soft-sum", lambda: mlp(3, 6, 1), normal(3), "C = 1, soft targets", loss="bce-sum-soft-1"),
    NetworkCase("mlp-mse-sum", lambda: mlp(3, 6, 3), normal(3), "squared error, summed", loss="mse-sum"),
    NetworkCase("mlp-half-mse", lambda: mlp(3, 6, 1), normal(3), "the paper's regression loss", loss="half-mse-mean-1"),
    NetworkCase("mlp-deep", lambda: mlp(3, *[4] * 10, 2), normal(3), "ten hidden layers: errors could build up"),
    NetworkCase(
        "mlp-odd", lambda: mlp(7, 33, 97, 1, act=nn.SiLU), normal(7), "odd widths 1, 7, 33, 97", num_examples=7
    ),
    NetworkCase("mlp-single", lambda: mlp(3, 5, 2), normal(3), "N = 1", num_examples=1),
    NetworkCase(
        "mlp-many", lambda: mlp(3, 5, 4), normal(3), "N larger than a tile, and odd", loss="ce-mean", num_examples=203
    ),
    NetworkCase("mlp-strided", lambda: mlp(3, 5, 2), strided(3), "inputs that are not contiguous"),
    NetworkCase("linear-regression", fc(3, 1), normal(3), "a linear model", loss="half-mse-mean-1"),
    NetworkCase("scalar-head", lambda: Expression(lambda m, x: m.net(x).squeeze(-1), net=mlp(3, 5, 1)), normal(3),
                "outputs [N]", loss="mse-mean-scalar"),
    NetworkCase("residual", Residual, normal(3), "residual adds around blocks", loss="ce-mean"),
    NetworkCase("tied-layer", TiedTwice, normal(4), "one layer used three times, under two names"),
    NetworkCase("tied-transpose", Autoencoder, normal(5), "W and W.T: per-example cross terms count"),
    NetworkCase("tied-modules", TiedModules, normal(4), "two modules, one weight"),
    NetworkCase("tied-seq", lambda: Expression(lambda m, x: m.fc(torch.tanh(m.fc(x))).flatten(1), fc=fc(3, 3)()),
                normal(4, 3), "a tied weight that also has positions"),
    NetworkCase("mixer", mixer, normal(5, 3), "positions, then flattened"),
    NetworkCase("sequence-outputs", lambda: mlp(3, 5, 3), normal(4, 3), "outputs [N, T, C]", loss="mse-mean-seq"),
    NetworkCase("frozen-middle", frozen_middle, normal(3), "a frozen layer between trainable ones"),
    NetworkCase("head-only", head_only, normal(3), "only the last layer trains"),
    NetworkCase("first-only", first_only, normal(3), "only the first layer trains"),
    NetworkCase("biases-only", biases_only, normal(3), "no weight trains"),
    NetworkCase("two-inputs", TwoInputs, pair, "inputs as a tuple"),
    NetworkCase("named-inputs", TwoInputs, named_pair, "inputs as a dict in another order"),
    NetworkCase("fan-out", FanOut, normal(3), "a value used three times"),
    NetworkCase("shared-bias", shared_bias, normal(3), "a bias with two owners"),
    NetworkCase("diamonds", diamonds, normal(3), "fan-out of values and of weights at once"),
    NetworkCase("views-shared", views_shared, normal(3), "views of one value, and two activations of it"),
    NetworkCase(
        "cancelling",
        lambda: Expression(lambda m, x: m.f(x) - m.f(x) + 0 * m.g(x) + m.h(x), f=fc()(), g=fc()(), h=fc()()),
        normal(3),
        "branches whose derivatives vanish exactly",
    ),
    NetworkCase(
        "constant-matrix",
        lambda: Expression(lambda m, x: m.g(torch.relu(m.f(x)) @ m.c), f=fc(3, 4)(), g=fc(4, 2)(), c=buffer(4, 4)),
        normal(3),
        "a matrix that does not train between layers that do",
    ),
    NetworkCase("unused-parameters", Unused, normal(3), "parameters with zero Jacobian keep their place"),
    NetworkCase("affine-everywhere", affine_everywhere, normal(3), "constants of every kind"),
    NetworkCase("dead-units", dead_units, normal(3), "rows of exact zeros in the Jacobian"),
)  # fmt: skip


def head(row: LossCase) -> NetworkCase:
    """A two-layer network whose outputs have the shape and, where the row asks for it, the saturation of a loss row."""
    shape = row.sample()[0].shape[1:]
    scale = 60.0 if row.saturated else 1.0

    link = row.link or (lambda z: z)

    def make() -> nn.Module:
        net = mlp(3, 5, shape[-1] if shape else 1)
        if shape:
            return Expression(lambda m, x: link(scale * m.net(x)), net=net)
        return Expression(lambda m, x: m.net(x).squeeze(-1), net=net)

    return NetworkCase(f"head-{row.id}", make, normal(*shape[:-1], 3), row.notes, loss=row.id, num_examples=row.num_examples)


HEADS = tuple(head(row) for row in ROWS)
EVERY = LAYERS + MODELS
NETWORKS = {case.id: case for case in EVERY + HEADS}
if len(NETWORKS) != len(EVERY + HEADS):
    raise ValueError("tests/cases: expected every row to have an id of its own.")
