"""Arithmetic of tensor cores (csrc/kernels/cuda/mma.h) on the emulated device: attention, convolution, batched products.

The emulation multiplies what the vendor's library would in full float32, so all of an error that is seen here comes from kernels of ours.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import jvp, vjp

from influence_ext.plan import Plan
from tests.cases import NetworkCase, build, generator
from tests.cases.eager import flatten, function, trainable, unflatten
from tests.cases.families import RULE_ROWS
from tests.emulation import emulated_device
from tests.test_device_shapes import Attention, Product, convolutions

LIMITS = {"tf32": 2e-3, "bfloat16": 2e-2}
"""Of the relative Frobenius error (docs/cuda.md): a factor is off by at most 2^-11 and 2^-8 of itself; cancellation takes the rest."""
FLOORS = {"tf32": 1e-5, "bfloat16": 1e-4}
"""Less would be more than was asked for."""


@pytest.fixture(autouse=True)
def _on_the_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The emulated device has tensor cores, though its tensors are the CPU's."""
    for module in ("plan", "tape"):
        monkeypatch.setattr(f"influence_ext.{module}.check_precision", lambda *_: None)
    with emulated_device():
        yield


def check_errors(errors: dict[str, float], precision: str, ours: Iterable[str]) -> None:
    assert max(errors.values()) < LIMITS[precision], errors
    assert min(errors[what] for what in ours) > FLOORS[precision], f"rounded less than {precision}: {errors}"


def error(actual: Tensor, oracle: Tensor) -> float:
    return float((actual.double() - oracle).norm() / oracle.norm())


QUANTITIES = ("jvp", "vjp", "per example")


def check(
    make: Callable[[], nn.Module],
    precision: Any,
    *shape: int,
    V: int,
    ours: Iterable[str] = QUANTITIES,
    shifts: Mapping[str, float] | None = None,
) -> None:
    """``J V``, ``Jᵀ G`` and per-example gradients, and full outputs, against plain PyTorch in float64; ``ours``: by kernels of ours.

    ``shifts``: added to all tangents of these parameters.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make().float().eval()
    random = generator("x" + repr((shape, V)))
    X = torch.randn(*shape, generator=random)
    tape = Plan.of(model, X).linearize(X, precision=precision)
    parts = [torch.randn(V, p.numel(), generator=random) + (shifts or {}).get(name, 0.0) for name, p in model.named_parameters()]
    T = torch.cat(parts, dim=1)
    G = torch.randn(V, *tape.outputs.shape, generator=random)
    oracle = copy.deepcopy(model).double()
    theta = trainable(oracle)
    f = function(oracle, X.double())
    outputs, pull = vjp(f, theta)
    alone = [vjp(function(oracle, x[None].double()), theta)[1](g[None].double())[0] for x, g in zip(X, G[0], strict=True)]
    expected = {
        "jvp": torch.stack([jvp(f, (theta,), (unflatten(theta, t.double()),))[1] for t in T]),
        "vjp": torch.stack([flatten(pull(g.double())[0]) for g in G]),
        "per example": torch.stack([flatten(g) for g in alone]),
    }
    assert error(tape.outputs, outputs) < 1e-5, "the point is linearised in full"
    actual = {"jvp": tape.jvp(T), "vjp": tape.vjp(G), "per example": tape.factors(G[:1]).materialise()[0]}
    check_errors({what: error(actual[what], expected[what]) for what in QUANTITIES}, precision, ours)


quick = pytest.mark.parametrize("precision", ["tf32", "bfloat16"])
slow = pytest.mark.parametrize("precision", [pytest.param(p, marks=pytest.mark.slow) for p in LIMITS])


def attention(options: dict[str, Any], precision: str, V: int) -> None:
    module = Attention(**options)
    size = 2, 1, max(module.q.shape[1], module.S), max(module.q.shape[2], module.v.shape[2])
    check(lambda: Attention(**options), precision, *size, V=V)


@quick
def test_attention(precision: str) -> None:
    """Several steps of features, edges in every direction, one row of 64 more than a block has."""
    attention({"L": 65, "S": 66, "H": 1, "K": 1, "E": 37, "F": 33}, precision, 3)


AGAIN, KEPT = {"L": 33, "S": 70, "H": 1, "K": 1, "E": 5, "F": 4}, {"L": 33, "S": 66, "H": 1, "K": 1, "E": 32, "F": 32}
"""Whether P is computed again or kept."""


class Sharp(nn.Module):
    """Attention of inputs that vary little, so scores of 100 are of the parameters' making; ``gain`` enlarges the scores."""

    def __init__(self, options: dict[str, Any], gain: float) -> None:
        super().__init__()
        self.attention = Attention(**options)
        with torch.no_grad():
            self.attention.q *= gain

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.attention(1 + 0.1 * x)
        return y


@quick
@pytest.mark.parametrize(
    ("options", "gain", "shift"),
    [
        pytest.param(AGAIN, 16.0, 10.0, id="large scores, shifted"),
        pytest.param(KEPT, 1.0, 10.0, id="kept, shifted"),
        pytest.param(AGAIN, 16.0, 0.0, id="large scores", marks=pytest.mark.slow),
    ],
)
def test_attention_rounds_neither_probabilities_nor_what_a_row_has_in_common(
    options: dict[str, Any], gain: float, shift: float, precision: str
) -> None:
    """Scores that rounded factors would move by more than the tolerance; tangents of all keys of which softmax sees nothing."""
    shape = 2, 1, max(options["L"], options["S"]), max(options["E"], options["F"])
    shifts = {"attention.k": shift}
    check(lambda: Sharp(options, gain), precision, *shape, V=2, shifts=shifts)


@pytest.mark.parametrize("precision", ["full", *LIMITS])
def test_tangents_of_hidden_keys_leave_no_trace(precision: Any) -> None:
    """Of the first key, as in sequences that are padded on the left: not even by rounding."""
    torch.manual_seed(0)
    module = Attention(**AGAIN, mask=(1, 1, AGAIN["S"]))
    with torch.no_grad():
        module.mask[..., 0] = -1e6  # type: ignore[index]
    X = torch.randn(1, 1, 70, 5)
    tape = Plan.of(module, X).linearize(X, precision=precision)
    named = {name: torch.randn_like(p) for name, p in module.named_parameters()}
    T = torch.cat([t.flatten() for t in named.values()])[None]
    for name in ("k", "v"):
        named[name][:, 0] *= 300
    larger = torch.cat([t.flatten() for t in named.values()])[None]
    assert not torch.equal(T, larger)
    assert torch.equal(tape.jvp(T), tape.jvp(larger))


@slow
@pytest.mark.parametrize(
    ("options", "V"),
    [
        pytest.param({"L": 129, "S": 130, "H": 1, "K": 1, "E": 36, "F": 68}, 1, id="aligned rows, computed"),
        pytest.param({"L": 65, "S": 67, "H": 1, "K": 1, "E": 66, "F": 129}, 3, id="kept, three blocks of features"),
        pytest.param({"L": 130, "S": 129, "H": 2, "K": 1, "E": 5, "F": 4, "causal": True}, 2, id="causal, grouped"),
        pytest.param({"L": 66, "S": 130, "H": 1, "K": 1, "E": 3, "F": 3, "causal": True}, 1, id="causal, more keys"),
        pytest.param({"L": 66, "S": 70, "H": 2, "K": 2, "E": 8, "F": 8, "mask": (2, 66, 70)}, 2, id="a mask of heads"),
        pytest.param({"L": 66, "S": 70, "H": 2, "K": 2, "E": 8, "F": 8, "mask": (2, 1, 70)}, 2, id="a mask of keys"),
        pytest.param({"L": 70, "S": 66, "H": 2, "K": 2, "E": 8, "F": 8, "mask": (1, 70, 1)}, 2, id="a mask of queries"),
    ],
)
def test_attention_at_every_edge(options: dict[str, Any], V: int, precision: str) -> None:
    attention(options, precision, V)


def check_second_order(options: dict[str, Any], precision: Any, V: int, gain: float = 1.0) -> None:
    """``∇²_θ(Σ_n g_nᵀ f_n) V`` against plain PyTorch in float64."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Sharp(options, gain)
    random = generator("x" + repr((options, V)))
    X = torch.randn(2, 1, max(options["L"], options["S"]), max(options["E"], options["F"]), generator=random)
    tape = Plan.of(model, X).linearize(X, precision=precision, second_order=True)
    T, g = torch.randn(V, sum(p.numel() for p in model.parameters()), generator=random), torch.randn(tape.outputs.shape, generator=random)
    tape.keep_cotangents(g)
    oracle = copy.deepcopy(model).double()
    theta, f = trainable(oracle), function(oracle, X.double())
    expected = [jvp(lambda at: vjp(f, at)[1](g.double())[0], (theta,), (unflatten(theta, t.double()),))[1] for t in T]
    product = tape.hvp(T, None)
    check_errors({"hvp": error(product, torch.stack([flatten(e) for e in expected]))}, precision, ["hvp"])
    assert torch.equal(product, tape.hvp(T, None)), "products do not repeat"


MASKED = {"L": 33, "S": 35, "H": 2, "K": 1, "E": 5, "F": 4, "mask": (2, 33, 35)}


@quick
@pytest.mark.parametrize("options", [pytest.param(AGAIN, id="computed"), pytest.param(KEPT, id="kept"), pytest.param(MASKED, id="mask")])
def test_second_order_of_attention(options: dict[str, Any], precision: str) -> None:
    check_second_order(options, precision, 2)


@slow
@pytest.mark.parametrize(
    ("options", "V", "gain"),
    [
        pytest.param({"L": 129, "S": 130, "H": 1, "K": 1, "E": 36, "F": 68}, 1, 1.0, id="aligned rows, computed"),
        pytest.param({"L": 65, "S": 67, "H": 1, "K": 1, "E": 66, "F": 129}, 3, 1.0, id="kept, three blocks of features"),
        pytest.param({"L": 130, "S": 129, "H": 2, "K": 1, "E": 5, "F": 4, "causal": True}, 2, 1.0, id="causal, grouped"),
        pytest.param({"L": 66, "S": 70, "H": 2, "K": 2, "E": 8, "F": 8, "mask": (2, 1, 70)}, 2, 1.0, id="a mask of keys"),
        pytest.param({"L": 70, "S": 66, "H": 2, "K": 2, "E": 8, "F": 8, "mask": (1, 70, 1)}, 2, 1.0, id="a mask of queries"),
        pytest.param(AGAIN, 2, 16.0, id="large scores"),
    ],
)
def test_second_order_of_attention_at_every_edge(options: dict[str, Any], V: int, gain: float, precision: str) -> None:
    check_second_order(options, precision, V, gain)


@quick
def test_convolution(precision: str) -> None:
    """Tiles of 32 and of 64 rows with an edge, a stride and padding that leave odd lines."""
    layers = (3, 33, {"kernel_size": 3, "padding": 1}), (33, 12, {"kernel_size": 3, "stride": 2})
    check(convolutions(2, *layers), precision, 2, 3, 9, 11, V=2)


@slow
@pytest.mark.parametrize(
    ("make", "shape", "V"),
    [
        pytest.param(convolutions(1, (3, 66, {"kernel_size": 3})), (3, 3, 1500), 4, id="128 by 128"),
        pytest.param(convolutions(1, (3, 34, {"kernel_size": 3})), (3, 3, 1500), 4, id="64 by 128"),
        pytest.param(convolutions(1, (24, 66, {"kernel_size": 3})), (2, 24, 300), 2, id="many weights"),
        pytest.param(
            convolutions(3, (2, 6, {"kernel_size": 3, "stride": 2, "padding": 2}), (6, 5, {"kernel_size": 2})), (2, 2, 5, 6, 7), 3, id="3d"
        ),
        pytest.param(
            convolutions(2, (4, 36, {"kernel_size": 3, "padding": 1}), (36, 8, {"kernel_size": 3, "padding": 1})),
            (2, 4, 8, 8),
            5,
            id="vectors",
        ),
        pytest.param(convolutions(2, (12, 18, {"kernel_size": 3, "groups": 2})), (2, 12, 7, 6), 3, id="groups"),
        pytest.param(
            convolutions(
                2, (6, 7, {"kernel_size": 3, "stride": 2, "dilation": 2}), (7, 5, {"kernel_size": 2, "stride": 3}), transposed=True
            ),
            (2, 6, 4, 5),
            3,
            id="transposed",
        ),
    ],
)
def test_convolution_at_every_edge(make: Callable[[], nn.Module], shape: tuple[int, ...], V: int, precision: str) -> None:
    check(make, precision, *shape, V=V)


@slow
@pytest.mark.parametrize(
    ("equation", "left", "right"),
    [
        pytest.param("niabk,njbak->nabij", (33, 3, 7, 5), (65, 7, 3, 5), id="contiguous along k"),
        pytest.param("nikab,nkjab->naibj", (33, 17, 2, 3), (17, 34, 2, 3), id="no unit stride"),
    ],
)
def test_batched_products(equation: str, left: tuple[int, ...], right: tuple[int, ...], precision: str) -> None:
    """Their gradients are large products, the vendor's."""
    check(lambda: Product(equation, left, right, False), precision, 3, *left, V=2, ours=("jvp",))


@slow
@pytest.mark.parametrize(
    "case", [case for case in RULE_ROWS if case.rules & {"attention", "convolution", "matmul"}], ids=lambda case: case.id
)
def test_every_row_of_the_operator_tables(case: NetworkCase, precision: Any) -> None:
    """``J V`` and ``Jᵀ G`` of all rows through these kernels; some of them only through kernels that round nothing."""
    network = build(case, torch.float32)
    tape = Plan.of(network.model, network.X).linearize(network.X, precision=precision)
    V, G = network.random("V", 3, network.P), network.random("G", 2, *network.outputs.shape)
    tangents = torch.einsum("ncp,vp->vnc", network.jacobian, V.double()).reshape(3, *network.outputs.shape)
    cotangents = torch.einsum("ncp,vnc->vp", network.jacobian, G.double().reshape(2, network.N, -1))
    assert error(tape.jvp(V), tangents) < LIMITS[precision]
    assert error(tape.vjp(G), cotangents) < LIMITS[precision]
