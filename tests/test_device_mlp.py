"""Chains of dense layers in one kernel (csrc/kernels/cuda/mlp.cu), run on the CPU (tests/emulation), against plain PyTorch in float64."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import influence_ext as ie
from influence_ext import reference
from influence_ext.losses.hessian import SOFTMAX_LAST
from influence_ext.plan import Plan
from influence_ext.tape import Tape
from influence_ext.testing import assert_close
from tests.cases import LOSSES, NetworkCase, build
from tests.cases.layers import Expression, fc
from tests.cases.pointwise import SMOOTH
from tests.emulation import Traffic, emulated_device
from tests.test_device_precision import LIMITS, check_errors, error


@pytest.fixture(autouse=True)
def _on_the_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The emulated device has tensor cores, though its tensors are the CPU's."""
    for module in ("plan", "tape"):
        monkeypatch.setattr(f"influence_ext.{module}.check_precision", lambda *_: None)
    with emulated_device():
        yield


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def mlp(*widths: int, bias: bool = True, act: Callable[[], nn.Module] = nn.Tanh) -> nn.Sequential:
    """Layers of these widths, an activation between two."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [m for i, o in itertools.pairwise(widths) for m in (nn.Linear(i, o, bias=bias), act())]
    return nn.Sequential(*layers[:-1]).double()


def linearised(model: nn.Module, X: Tensor, schedule: Any = "by_example", **options: Any) -> Tape:
    tape = Plan.of(model, X).linearize(X, **options)
    tape.set_schedule(schedule)
    return tape


def is_one_kernel(tape: Tape, V: int = 1) -> bool:
    return tape.schedule(V).startswith("by example")


def check(model: nn.Module, N: int, V: int, dtype: torch.dtype = torch.float64, loss: str = "mse-mean") -> None:
    """All products that the kernel has; the same numbers again, and with the layers' own kernels nearly the same."""
    first = next(m for m in model.modules() if isinstance(m, nn.Linear))
    X = normal(N, first.in_features, seed=1).to(dtype)
    model = copy.deepcopy(model).to(dtype)
    case = LOSSES[loss]
    y = case.targets(reference.outputs(model, X), torch.Generator().manual_seed(2))
    y = y.to(dtype) if y.is_floating_point() else y
    theta = [p for p in model.parameters() if p.requires_grad]
    vectors = normal(V, sum(p.numel() for p in theta), seed=3).to(dtype)
    tape = linearised(model, X)
    assert is_one_kernel(tape, V)
    cotangents = normal(V, *tape.outputs.shape, seed=4).to(dtype)
    J = reference.jacobian(model, X)
    H = reference.loss_hessian(case.oracle(), reference.outputs(model, X), y)
    tangents = torch.einsum("ncp,vp->vnc", J, vectors.double())
    pulled = torch.einsum("ncp,vnc->vp", J, cotangents.double().reshape(V, N, -1))
    product = case.factor(y) * torch.einsum("ncp,ncd,vnd->vp", J, H, tangents) + 0.1 * vectors.double()
    other = linearised(model, X, "by_operator")

    def operator(schedule: Any) -> ie.GGN:
        return ie.GGN(model, case.make(), (X, y), damping=0.1, schedule=schedule)

    found = operator("by_example").matmat(vectors)
    eager = None if dtype == torch.float64 else operator("by_operator").matmat(vectors)
    assert_close(found, product, eager=eager, what="G V")
    assert torch.equal(found, operator("by_example").matmat(vectors)), "products do not repeat"
    assert_close(tape.jvp(vectors), tangents.reshape(cotangents.shape), eager=None if eager is None else other.jvp(vectors), what="J V")
    assert_close(tape.vjp(cotangents), pulled, eager=None if eager is None else other.vjp(cotangents), what="JT G")


SHAPES = [
    ((1, 1), 1),
    ((3, 2), 5),
    ((5, 7, 3), 33),
    ((8, 16, 16, 1), 40),
    ((17, 33, 31, 2), 17),
    ((2, 129, 5), 9),
    ((3, 9, 8, 7, 6, 5, 2), 20),
    ((130, 4, 3), 19),
]
"""Widths, and examples: below, at and above a tile; odd and even; beyond 128 columns, which are taken at a time."""


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize(("widths", "N"), SHAPES, ids=lambda value: "-".join(map(str, value)) if isinstance(value, tuple) else str(value))
def test_widths_and_depths(widths: tuple[int, ...], N: int, dtype: torch.dtype) -> None:
    check(mlp(*widths), N, 2, dtype)


@pytest.mark.parametrize("V", [1, 3, 8, 33])
def test_right_hand_sides(V: int) -> None:
    check(mlp(4, 6, 3), 21, V, loss="ce-mean")
    check(mlp(4, 6, 3), 21, V, torch.float32, loss="ce-mean")


def test_no_biases() -> None:
    check(mlp(5, 9, 4, 2, bias=False), 19, 2)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize(
    ("widths", "N", "V"),
    [((8, 128, 128, 1), 65, 1), ((6, 256, 255, 3), 33, 1), ((4, 200, 256, 256), 9, 2), ((3, 20, 2), 300, 33), ((3, 20, 2), 41, 280)],
    ids=str,
)
def test_sizes_where_tiles_change(widths: tuple[int, ...], N: int, V: int, dtype: torch.dtype) -> None:
    """The widest layers; large tiles, several of them in a run; more right-hand sides than blocks, so that sums need no second launch."""
    check(mlp(*widths), N, V, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
def test_runs_of_several_tiles(dtype: torch.dtype) -> None:
    """Large tiles and short runs: more tiles for each right-hand side than blocks."""
    check(mlp(2, 3, 1), 290, 40, dtype)


@pytest.mark.parametrize("case", [case for case in SMOOTH if case.rules == {"activation"}], ids=lambda case: case.id)
def test_activations(case: NetworkCase) -> None:
    """Rows of the table that are chains; the others run layer by layer."""
    network = build(case, torch.float64)
    tape = linearised(network.model, network.X)
    V, G = network.random("V", 2, network.P), network.random("G", 2, *network.outputs.shape)
    t = torch.einsum("ncp,vp->vnc", network.jacobian, V).reshape(2, *network.outputs.shape)
    assert_close(tape.jvp(V), t)
    assert_close(tape.vjp(G), torch.einsum("ncp,vnc->vp", network.jacobian, G.reshape(2, network.N, -1)))


NATIVE = [
    name
    for name, case in LOSSES.items()
    if len(case.sample()[0].shape) == 2 and not name.startswith(("l1", "nll", "poisson-mean-rate", "gaussian"))
]
"""Outputs ``[N, C]``, a Hessian, and outputs in (0, 1) allowed."""


@pytest.mark.parametrize("loss", NATIVE)
def test_losses(loss: str) -> None:
    """Every shape of an output Hessian, an activation behind the last layer too, and weights of the examples."""
    case = LOSSES[loss]
    z, y = case.sample()
    model = nn.Sequential(mlp(4, 6, z.shape[1]), nn.Sigmoid())
    X = normal(len(z), 4)
    weights = torch.rand(len(z), dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    V = normal(3, sum(p.numel() for p in model.parameters()), seed=3)
    G = ie.GGN(model, case.make(), (X, y), weights=weights, schedule="by_example")
    assert is_one_kernel(G.tape, 3)
    J, H = reference.jacobian(model, X), reference.loss_hessian(case.oracle(), reference.outputs(model, X), y)
    assert_close(G.matmat(V), case.factor(y) * torch.einsum("n,ncp,ncd,ndq,vq->vp", weights, J, H, J, V))


def trained(model: nn.Sequential, *names: str) -> nn.Sequential:
    """Only these parameters are."""
    for name, p in model.named_parameters():
        p.requires_grad_(name in names)
    return model


@pytest.mark.parametrize(
    "names",
    [
        ("0.weight",),
        ("0.bias",),
        ("2.weight",),
        ("2.bias", "4.weight"),
        ("0.bias", "4.bias"),
        ("4.bias",),
        ("0.weight", "2.bias", "4.weight", "4.bias"),
    ],
    ids="+".join,
)
def test_frozen_parameters(names: tuple[str, ...]) -> None:
    """What stands below the lowest trained layer is not visited; a bias alone starts without a product."""
    check(trained(mlp(5, 20, 6, 3), *names), 19, 2, loss="ce-mean")


def test_a_parameter_that_no_layer_reads_has_a_zero() -> None:
    model = mlp(3, 4, 2)
    model.register_parameter("unread", nn.Parameter(normal(3)))
    check(model, 18, 2)
    check(model, 3, 300)


def test_weights_stored_the_other_way() -> None:
    """``x @ W``: the parameter is ``[inputs, outputs]``."""

    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Parameter(normal(5, 9, seed=6)), nn.Parameter(normal(9, 2, seed=7))

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x @ self.first) @ self.second

    model, X = Product(), normal(19, 5)
    tape = linearised(model, X)
    assert is_one_kernel(tape)
    V, G = normal(2, 63, seed=3), normal(2, 19, 2, seed=4)
    assert_close(tape.jvp(V), reference.jacobian_products(model, X, V))
    assert_close(tape.vjp(G), reference.jacobian_transpose_products(model, X, G))


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: Expression(lambda m, x: m.fc(torch.tanh(m.fc(x))), fc=fc(3, 3)()), id="tied"),
        pytest.param(lambda: Expression(lambda m, x: x + torch.tanh(m.fc(x)), fc=fc(3, 3)()), id="residual"),
        pytest.param(lambda: mlp(3, 257, 2), id="too wide"),
        pytest.param(lambda: mlp(*[3] * 18), id="too deep"),
        pytest.param(lambda: nn.Sequential(mlp(3, 3), nn.Tanh(), nn.Tanh(), mlp(3, 3)), id="two activations"),
    ],
)
def test_what_is_no_chain_runs_layer_by_layer(make: Callable[[], nn.Module]) -> None:
    model, X = make().double(), normal(7, 3)
    tape = linearised(model, X)
    assert not is_one_kernel(tape)
    V = normal(2, sum(p.numel() for p in model.parameters()), seed=3)
    assert_close(tape.jvp(V), reference.jacobian_products(model, X, V))


def test_the_choice() -> None:
    """By counted bytes and launches: one kernel for few examples, the vendor's products for many of a wide one; or as told."""
    small, wide = mlp(8, 16, 16, 1), mlp(64, 256, 256)
    assert is_one_kernel(linearised(small, normal(100, 8), "auto"), 1)
    assert not is_one_kernel(linearised(small, normal(100, 8), "by_operator"), 1)
    tape = linearised(wide, normal(64, 64), "auto")
    assert is_one_kernel(tape, 1)
    assert not is_one_kernel(tape, 10_000)
    report = ie.GGN(small, nn.MSELoss(), (normal(9, 8), normal(9, 1))).report()
    assert "V = 1: by example" in report
    assert "V = 1: by operator" in ie.GGN(small, nn.MSELoss(), (normal(9, 8), normal(9, 1)), schedule="by_operator").report()


def test_examples_in_chunks() -> None:
    model, X, y = mlp(4, 20, 3), normal(50, 4), torch.arange(50) % 3
    V = normal(2, sum(p.numel() for p in model.parameters()), seed=3)
    G = ie.GGN(model, nn.CrossEntropyLoss(), (X, y), schedule="by_example", memory_budget=16_000)
    assert "chunks" in G.report()
    oracle = reference.ggn_products(model, nn.CrossEntropyLoss(), X, y, V)
    assert_close(G.matmat(V), oracle)


def test_a_callable_loss_and_a_hessian_take_their_own_ways() -> None:
    """Tangents and cotangents in one kernel each, the callable's Hessian between them; second-order terms layer by layer."""
    model, X, y = mlp(3, 6, 2), normal(18, 3), normal(18, 2, seed=8)

    def loss(z: Tensor, t: Tensor) -> Tensor:
        return ((z - t) ** 4).sum(1).mean()

    V = normal(2, sum(p.numel() for p in model.parameters()), seed=3)
    assert_close(ie.GGN(model, loss, (X, y), schedule="by_example").matmat(V), reference.ggn_products(model, loss, X, y, V))
    assert_close(ie.Hessian(model, loss, (X, y)).matmat(V), reference.hessian_products(model, loss, X, y, V))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
def test_classes_that_lie_innermost(dtype: torch.dtype) -> None:
    """As the report says: by example. An example has several softmaxes, one after another."""
    model, X, y = nn.Sequential(mlp(4, 6, 12), nn.Unflatten(1, (4, 3))).to(dtype), normal(21, 4).to(dtype), torch.arange(84).view(21, 4) % 3

    def loss(z: Tensor, t: Tensor) -> Tensor:
        return nn.functional.cross_entropy(z.flatten(0, 1), t.flatten())

    V = normal(2, sum(p.numel() for p in model.parameters()), seed=3).to(dtype)
    G, other = (ie.GGN(model, loss, (X, y), reduction="mean", schedule=schedule) for schedule in ("by_example", "by_operator"))
    assert G._hessian.shape == SOFTMAX_LAST
    assert "V = 8: by example" in G.report()
    before = Traffic.now()
    product = G.matmat(V)
    assert Traffic.now().since(before).products == 0, "the vendor's products are layer by layer"
    eager = None if dtype == torch.float64 else other.matmat(V)
    assert_close(product, reference.ggn_products(model, loss, X, y, V), eager=eager)


@pytest.mark.parametrize("precision", LIMITS)
@pytest.mark.parametrize(("widths", "N", "V"), [((9, 33, 20, 3), 21, 2), ((9, 40, 5), 290, 16)], ids=["small tiles", "large tiles"])
def test_precision(widths: tuple[int, ...], N: int, V: int, precision: Any) -> None:
    """Factors are rounded as asked, no more and no less."""
    model = mlp(*widths)
    X = normal(N, widths[0], seed=1)
    T, G = normal(V, sum(p.numel() for p in model.parameters()), seed=3), normal(V, N, widths[-1], seed=4)
    tape = linearised(copy.deepcopy(model).float(), X.float(), precision=precision)
    tape.set_schedule("by_example")
    J = reference.jacobian(model, X)
    check_errors(
        {
            "jvp": error(tape.jvp(T.float()), torch.einsum("ncp,vp->vnc", J, T)),
            "vjp": error(tape.vjp(G.float()), torch.einsum("ncp,vnc->vp", J, G)),
        },
        precision,
        ours=("jvp", "vjp"),
    )
