"""The CUDA kernels, run on the CPU, at sizes that take every path that depends on them: edges of tiles, sums in parts, vectors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import jvp, vjp

from influence_ext.plan import Plan
from influence_ext.testing import assert_close
from tests.cases import generator
from tests.cases.eager import flatten, function, trainable, unflatten
from tests.emulation import emulated_device


@pytest.fixture(autouse=True)
def _on_the_device() -> Iterator[None]:
    with emulated_device():
        yield


def check(make: Callable[[], nn.Module], rule: str, *shape: int, V: int = 3, dtype: torch.dtype) -> None:
    """Outputs, ``J V``, ``Jᵀ G`` and per-example gradients of a model of inputs ``[N, ...]``, against plain PyTorch in float64."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make().to(dtype).eval()
    random = generator("x" + repr((shape, V)))
    X = torch.randn(*shape, generator=random, dtype=torch.float64).to(dtype)
    P = sum(p.numel() for p in model.parameters())
    plan = Plan.of(model, X)
    assert rule in {node.rule for node in plan.graph.nodes}
    tape = plan.linearize(X)
    T = torch.randn(V, P, generator=random, dtype=torch.float64).to(dtype)
    G = torch.randn(V, *tape.outputs.shape, generator=random, dtype=torch.float64).to(dtype)

    def products(module: nn.Module) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        theta, kind = trainable(module), next(module.parameters()).dtype
        f = function(module, X.to(kind))
        tangents = torch.stack([jvp(f, (theta,), (unflatten(theta, t.to(kind)),))[1] for t in T])
        outputs, pull = vjp(f, theta)
        cotangents = torch.stack([flatten(pull(g.to(kind))[0]) for g in G])
        alone = [vjp(function(module, x[None].to(kind)), theta)[1](g[None].to(kind))[0] for x, g in zip(X, G[0], strict=True)]
        return outputs, tangents, cotangents, torch.stack([flatten(g) for g in alone])

    oracle, eager = products(copy.deepcopy(model).double()), products(model)
    ours = tape.outputs, tape.jvp(T), tape.vjp(G), tape.factors(G[:1]).materialise()[0]
    for what, actual, expected, peer in zip(("outputs", "jvp", "vjp", "per example"), ours, oracle, eager, strict=True):
        assert_close(actual, expected, scope="model", eager=peer, what=what)


def convolutions(dims: int, *layers: tuple[int, int, dict[str, int]], transposed: bool = False) -> Callable[[], nn.Module]:
    """Convolutions with an activation in between, which the products take as their scale."""
    kind = getattr(nn, f"Conv{'Transpose' if transposed else ''}{dims}d")

    def make() -> nn.Module:
        modules: list[nn.Module] = []
        for inputs, outputs, options in layers:
            modules += [kind(inputs, outputs, **options), nn.Tanh()]
        return nn.Sequential(*modules)

    return make


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        # tiles of rows: 33 and 65 channels are one more than one and two tiles; stride, dilation and padding that leave odd lines
        pytest.param(
            convolutions(2, (3, 33, {"kernel_size": 3, "padding": 1}), (33, 65, {"kernel_size": 3, "stride": 2})), (2, 3, 9, 11), id="edges"
        ),
        pytest.param(
            convolutions(1, (2, 5, {"kernel_size": 4, "dilation": 3, "padding": 5, "stride": 2}), (5, 6, {"kernel_size": 2})),
            (3, 2, 77),
            id="1d",
        ),
        pytest.param(
            convolutions(3, (2, 6, {"kernel_size": 3, "stride": 2, "padding": 2}), (6, 5, {"kernel_size": 2})), (2, 2, 5, 6, 7), id="3d"
        ),
        # lines of whole vectors, whose results are stored 16 bytes at a time
        pytest.param(
            convolutions(2, (4, 36, {"kernel_size": 3, "padding": 1}), (36, 8, {"kernel_size": 3, "padding": 1})),
            (2, 4, 8, 8),
            id="vectors",
        ),
        # groups: of several channels, of one with multipliers, depthwise
        pytest.param(
            convolutions(2, (12, 18, {"kernel_size": 3, "groups": 2}), (18, 36, {"kernel_size": 2, "groups": 18})),
            (2, 12, 7, 6),
            id="groups",
        ),
        pytest.param(
            convolutions(
                2, (7, 7, {"kernel_size": 3, "groups": 7, "stride": 2, "padding": 1}), (7, 7, {"kernel_size": 5, "groups": 7, "padding": 2})
            ),
            (3, 7, 21, 9),
            id="depthwise",
        ),
        # phases of a transposed convolution, also more than there are outputs, and taps that reach none
        pytest.param(
            convolutions(
                2, (6, 7, {"kernel_size": 3, "stride": 2, "dilation": 2}), (7, 5, {"kernel_size": 2, "stride": 3}), transposed=True
            ),
            (2, 6, 4, 5),
            id="transposed",
        ),
        # matrix products: one tap and many channels
        pytest.param(convolutions(2, (64, 65, {"kernel_size": 1}), (65, 64, {"kernel_size": 1})), (2, 64, 3, 5), id="pointwise"),
    ],
)
def test_convolutions(make: Callable[[], nn.Module], shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check(make, "convolution", *shape, dtype=dtype)


@pytest.mark.parametrize("V", [1, 5])
def test_a_depthwise_convolution_of_many_positions_is_summed_in_parts(V: int, dtype: torch.dtype) -> None:
    check(
        convolutions(1, (2, 2, {"kernel_size": 3, "groups": 2}), (2, 2, {"kernel_size": 9, "groups": 2})),
        "convolution",
        2,
        2,
        1500,
        V=V,
        dtype=dtype,
    )


@pytest.mark.slow
def test_pointwise_convolutions_that_are_worth_a_call_for_each_side() -> None:
    check(convolutions(2, (64, 64, {"kernel_size": 1})), "convolution", 4, 64, 32, 31, V=2, dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("transposed", [False, True], ids=["down", "up"])
@pytest.mark.parametrize("outputs", [3, 6, 12])
def test_few_channels(outputs: int, transposed: bool, dtype: torch.dtype) -> None:
    """More channels and taps than the weights in shared memory are for, strides with phases, two groups, several right-hand sides."""
    layers = [(2, outputs, {"kernel_size": 3, "padding": 1}), (outputs, outputs, {"kernel_size": 5, "stride": 2, "padding": 3})]
    many = [(40, 2 * outputs, {"kernel_size": 5, "padding": 2, "groups": 2})]
    check(convolutions(2, *layers, transposed=transposed), "convolution", 3, 2, 13, 14, V=5, dtype=dtype)
    check(convolutions(2, *many, transposed=transposed), "convolution", 2, 40, 6, 5, V=2, dtype=dtype)


def test_wide_tiles_of_a_convolution() -> None:
    """Enough blocks for the tile of 128 channels by 128 positions, and for that of 64; the last ones have edges."""
    check(convolutions(1, (1, 66, {"kernel_size": 3})), "convolution", 3, 1, 1500, V=4, dtype=torch.float32)
    check(convolutions(1, (1, 34, {"kernel_size": 3})), "convolution", 3, 1, 1500, V=4, dtype=torch.float32)
    check(convolutions(1, (24, 66, {"kernel_size": 3})), "convolution", 2, 24, 300, V=2, dtype=torch.float32)


class Normalised(nn.Module):
    """A norm whose input and output depend on parameters in front of it."""

    def __init__(self, norm: nn.Module, *shape: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.randn(*shape))
        self.norm = norm
        with torch.no_grad():
            for value in (*norm.parameters(), *(b for b in norm.buffers() if b.is_floating_point())):
                value.uniform_(0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        """The norm of ``x + shift``, behind an activation that its passes take as their scale."""
        return torch.tanh(self.norm(x + self.shift))


@pytest.mark.parametrize("V", [1, 5])
@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        pytest.param(lambda: nn.LayerNorm(33), (3, 7, 33), id="a warp a row, odd"),
        pytest.param(lambda: nn.LayerNorm(64), (3, 5, 64), id="a warp a row, vectors"),
        pytest.param(lambda: nn.LayerNorm(601), (3, 601), id="a block a row, odd"),
        pytest.param(lambda: nn.LayerNorm(604), (3, 604), id="a block a row, vectors"),
        pytest.param(lambda: nn.LayerNorm(4099), (2, 4099), id="a row that is read again, odd"),
        pytest.param(lambda: nn.LayerNorm(4100), (2, 4100), id="a row that is read again, vectors"),
        pytest.param(lambda: nn.RMSNorm(40), (2, 300, 40), id="sums of columns in parts"),
        pytest.param(lambda: nn.GroupNorm(3, 6), (3, 6, 5, 7), id="groups, odd runs"),
        pytest.param(lambda: nn.GroupNorm(2, 4), (2, 4, 40, 30), id="groups, a block a row"),
        pytest.param(lambda: nn.BatchNorm2d(3), (4, 3, 54, 54), id="sums of runs in parts"),
        pytest.param(lambda: nn.BatchNorm1d(35), (4, 35), id="runs of one"),
    ],
)
def test_norms(norm: Callable[[], nn.Module], shape: tuple[int, ...], V: int, dtype: torch.dtype) -> None:
    rule = "batch_norm" if isinstance(norm(), nn.BatchNorm1d | nn.BatchNorm2d) else "layer_norm"
    check(lambda: Normalised(norm(), *shape[1:]), rule, *shape, V=V, dtype=dtype)


class Product(nn.Module):
    """A product of images of x and of a parameter, in the order of an einsum."""

    def __init__(self, equation: str, left: tuple[int, ...], right: tuple[int, ...], constant: bool) -> None:
        super().__init__()
        self.equation, self.constant = equation, constant
        self.left, self.right = nn.Parameter(torch.randn(left)), nn.Parameter(torch.randn(right))

    def forward(self, x: Tensor) -> Tensor:
        """``constant``: the right operand is the parameter itself, the same for all examples."""
        right = self.right if self.constant else x.flatten(1).mean(1).reshape(-1, *[1] * self.right.ndim) * self.right
        return torch.einsum(self.equation, x * self.left, right)


@pytest.mark.parametrize(
    ("equation", "left", "right", "constant"),
    [
        pytest.param("nik,nkj->nij", (17, 18), (18, 19), False, id="the library's"),
        pytest.param("nhik,nhjk->nhij", (3, 17, 16), (3, 18, 16), False, id="the library's, heads outside"),
        pytest.param("nihk,njhk->nhij", (17, 2, 16), (18, 2, 16), False, id="the library's, heads inside"),
        pytest.param("nik,kj->nij", (17, 18), (18, 19), True, id="rows of all examples together"),
        pytest.param("nik,kj->nji", (17, 18), (18, 19), True, id="a result that is turned"),
        pytest.param("nabik,nabjk->nabij", (2, 2, 33, 35), (2, 2, 34, 35), False, id="batch axes that are one"),
        pytest.param("niabk,njbak->nabij", (33, 3, 7, 5), (65, 7, 3, 5), False, id="tiles of our own"),
        pytest.param("nikab,nkjab->naibj", (33, 17, 2, 3), (17, 34, 2, 3), False, id="tiles, no unit stride"),
        pytest.param("nitk,njtk->nij", (33, 3, 5), (34, 3, 5), False, id="a sum over two axes"),
        pytest.param("nhik,khj->nhij", (2, 17, 18), (18, 2, 19), True, id="the library's, summed over examples apart"),
        pytest.param("nhik,khj->nhij", (2, 7, 33), (33, 2, 34), True, id="tiles, summed over examples apart"),
        pytest.param("nhik,khj->nhij", (2, 3, 4), (4, 2, 5), True, id="elements, summed over examples apart"),
        pytest.param("nabk,nabk->nab", (3, 5, 70), (3, 5, 70), False, id="a warp an element"),
        pytest.param("nabk,nbk->na", (3, 4, 5), (4, 5), False, id="a thread an element"),
    ],
)
def test_products(equation: str, left: tuple[int, ...], right: tuple[int, ...], constant: bool, dtype: torch.dtype) -> None:
    check(lambda: Product(equation, left, right, constant), "matmul", 3, *left, V=2, dtype=dtype)


class Attention(nn.Module):
    """Attention between linear images of x, with a trained additive mask that is broadcast as its shape says."""

    def __init__(self, L: int, S: int, H: int, K: int, E: int, F: int, mask: tuple[int, ...] | None = None, causal: bool = False) -> None:
        super().__init__()
        self.S, self.H, self.K, self.causal = S, H, K, causal
        self.q = nn.Parameter(torch.randn(H, L, E))
        self.k, self.v = nn.Parameter(torch.randn(K, S, E)), nn.Parameter(torch.randn(K, S, F))
        self.mask = nn.Parameter(torch.randn(mask)) if mask else None

    def forward(self, x: Tensor) -> Tensor:
        """x ``[N, 1, max(L, S), max(E, F)]``, its parts times parameters."""
        q, k, v = (x[:, :, : w.shape[1], : w.shape[2]] * w for w in (self.q, self.k, self.v))
        return nn.functional.scaled_dot_product_attention(q, k, v, self.mask, is_causal=self.causal, enable_gqa=self.H != self.K)


@pytest.mark.parametrize(
    ("options", "V"),
    [
        # E or F much smaller than L and S: P is computed again; else it is kept
        pytest.param({"L": 65, "S": 66, "H": 1, "K": 1, "E": 3, "F": 2}, 3, id="edges, computed"),
        pytest.param({"L": 67, "S": 65, "H": 1, "K": 1, "E": 66, "F": 65}, 3, id="edges, kept"),
        pytest.param({"L": 130, "S": 129, "H": 2, "K": 1, "E": 5, "F": 4, "causal": True}, 2, id="causal, grouped"),
        pytest.param({"L": 66, "S": 130, "H": 1, "K": 1, "E": 3, "F": 3, "causal": True}, 1, id="causal, more keys"),
        pytest.param({"L": 66, "S": 70, "H": 2, "K": 2, "E": 3, "F": 2, "mask": (2, 66, 70)}, 2, id="a mask of heads"),
        pytest.param({"L": 66, "S": 70, "H": 2, "K": 2, "E": 3, "F": 2, "mask": (1, 66, 70)}, 2, id="a mask of all heads"),
        pytest.param({"L": 66, "S": 70, "H": 2, "K": 2, "E": 3, "F": 2, "mask": (2, 1, 70)}, 2, id="a mask of keys"),
        pytest.param({"L": 70, "S": 66, "H": 2, "K": 2, "E": 3, "F": 2, "mask": (2, 70, 1)}, 2, id="a mask of queries"),
    ],
)
def test_attention(options: dict[str, Any], V: int, dtype: torch.dtype) -> None:
    module = Attention(**options)
    check(
        lambda: Attention(**options),
        "attention",
        2,
        1,
        max(module.q.shape[1], module.S),
        max(module.q.shape[2], module.v.shape[2]),
        V=V,
        dtype=dtype,
    )
