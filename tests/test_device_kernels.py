"""CUDA kernels at the sizes where they change their ways, run on the CPU (tests/emulation): against PyTorch in float64.

Lines of 8 lanes, a warp, a block, chunks of one and several blocks; rows and columns; indices in several tiles; long runs of one index.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp

import influence_ext as ie
from influence_ext import reference
from influence_ext.losses import resolve
from influence_ext.plan import Plan
from influence_ext.testing import assert_close
from tests.emulation import ROOT, Traffic, emulated_device

F64 = torch.float64
LINES = [7, 33, 700, 9001]
"""Elements of a line: 8 lanes, a warp, a block, several blocks."""
MANY_LONG = pytest.param(50_257, 140, marks=pytest.mark.slow)  # seven million elements, each a call of several in the emulation
LONG = [(9001, 1), (9001, 200), (20_011, 70), (50_257, 1), MANY_LONG, (130_001, 2), (240_001, 1)]
"""Elements of a line that is kept in shared memory, and lines: a block, clusters of 2, 4 and 8, and (a block, float64) more than fit."""
COLUMNS = [(7, 3), (300, 40), (9001, 2)]
"""Elements of a line and lines side by side."""


@pytest.fixture(autouse=True)
def _on_the_device() -> Iterator[None]:
    with emulated_device():
        yield


@pytest.fixture(params=[torch.float32, F64], ids=["f32", "f64"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


class Scaled(nn.Module):
    """``function(x ∘ w)``: what the function does to tangents reaches all of ``w``."""

    def __init__(self, shape: tuple[int, ...], function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(1 + 0.1 * random(*shape, seed=1))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.function(x * self.weight)
        return y


class Table(nn.Module):
    """Rows picked by index; class scores from their sum at every place."""

    def __init__(self, rows: int, cols: int, padding: int | None = None) -> None:
        super().__init__()
        self.table = nn.Embedding(rows, cols, padding_idx=padding)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.table(x.long())
        return y


def check_products(model: nn.Module, X: Tensor, dtype: torch.dtype, seen: Tensor | None = None) -> None:
    """Outputs, ``J v`` and ``Jᵀ g`` of two vectors; the results repeat. ``seen`` is 0 for parameters that only PyTorch's tangents see."""
    model = model.double()
    names, values = zip(*model.named_parameters(), strict=True)

    def outputs(*parameters: Tensor) -> Tensor:
        y: Tensor = functional_call(model, dict(zip(names, parameters, strict=True)), (X,))
        return y

    P = sum(value.numel() for value in values)
    z = outputs(*values).detach()
    tangents, cotangents = random(2, P, seed=2), random(2, *z.shape, seed=3)
    visible = tangents if seen is None else tangents * seen.flatten()
    sizes = [value.numel() for value in values]
    split = [[part.reshape(value.shape) for part, value in zip(t.split(sizes), values, strict=True)] for t in visible]
    J_t = torch.stack([jvp(outputs, values, tuple(t))[1] for t in split]).detach()
    transposed = vjp(outputs, *values)[1]
    J_g = torch.stack([torch.cat([g.flatten() for g in transposed(c)]) for c in cotangents]).detach()
    model = model.to(dtype)
    X = X.to(dtype) if X.is_floating_point() else X
    tape = Plan.of(model, X).linearize(X)
    assert_close(tape.outputs, z, scope="layer")
    assert_close(tape.jvp(tangents.to(dtype)), J_t, scope="layer")
    first = tape.vjp(cotangents.to(dtype))
    assert_close(first, J_g, scope="layer")
    assert torch.equal(first, tape.vjp(cotangents.to(dtype))), "products do not repeat"


@pytest.mark.parametrize("log", [False, True], ids=["softmax", "log-softmax"])
@pytest.mark.parametrize("size", LINES)
def test_softmax_of_lines(size: int, log: bool, dtype: torch.dtype) -> None:
    function = torch.log_softmax if log else torch.softmax
    check_products(Scaled((size,), lambda x: function(x, -1)), 3 * random(2, size), dtype)


@pytest.mark.parametrize(("size", "inner"), COLUMNS)
def test_softmax_of_columns(size: int, inner: int, dtype: torch.dtype) -> None:
    check_products(Scaled((size, 1), lambda x: torch.softmax(x, 1)), random(2, size, inner), dtype)


REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda x: x.sum(1),
    "cumsum": lambda x: x.cumsum(1),
    "amax": lambda x: x.amax(1),
    "min": lambda x: x.min(1).values,
    "logsumexp": lambda x: x.logsumexp(1),
    "var": lambda x: x.var(1),
    "std": lambda x: x.std(1),
    "norm": lambda x: x.norm(dim=1),
    "norm-1": lambda x: x.norm(1, dim=1),
}


@pytest.mark.parametrize("size", LINES)
@pytest.mark.parametrize("kind", REDUCTIONS)
def test_reductions_of_lines(kind: str, size: int) -> None:
    check_products(Scaled((size,), REDUCTIONS[kind]), random(2, size), F64)


@pytest.mark.parametrize(("size", "inner"), COLUMNS)
@pytest.mark.parametrize("kind", REDUCTIONS)
def test_reductions_of_columns(kind: str, size: int, inner: int) -> None:
    check_products(Scaled((size, 1), REDUCTIONS[kind]), random(2, size, inner), F64)


CLASSES = [(10, 1), (33, 1), (1000, 1), (5000, 1), (20001, 1), (10, 70), (1000, 5), (9001, 2)]
"""Classes, and positions of each example."""


def sample_classes(K: int, positions: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, class indices, and probabilities; the first example is sure of a class."""
    shape = (2, K) if positions == 1 else (2, K, positions)
    z = random(*shape)
    z[0, K // 2] += 30
    index = torch.randint(0, K, (2, *shape[2:]), generator=torch.Generator().manual_seed(4))
    return z, index, torch.softmax(random(*shape, seed=5), 1)


@pytest.mark.parametrize(("K", "positions"), CLASSES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("soft", [False, True], ids=["index", "probabilities"])
def test_cross_entropy(K: int, positions: int, smoothing: float, soft: bool, dtype: torch.dtype) -> None:
    z, index, q = sample_classes(K, positions)
    make = nn.CrossEntropyLoss(reduction="sum", label_smoothing=smoothing)
    loss, target = resolve(make), q if soft else index
    given = target.to(dtype) if soft else target
    assert_close(loss.value(z.to(dtype), given), reference.loss_values(make, z, target), scope="layer")
    assert_close(loss.gradient(z.to(dtype), given), reference.loss_gradient(make, z, target), scope="layer")
    for step in (1e-2, 3.0):
        moved = z + step * random(*z.shape, seed=6)
        exact = divergence(moved.to(dtype).double(), z.to(dtype).double())
        assert_close(loss.bregman(moved.to(dtype), z.to(dtype), given), exact, scope="layer")


def divergence(z: Tensor, z_s: Tensor) -> Tensor:
    """``Σ KL(p_s ‖ p)`` over positions, by ``Σ p_s (exp(d) − 1 − d)`` with ``d`` less its mean."""
    p, d = torch.softmax(z_s, 1), z - z_s
    d = d - (p * d).sum(1, keepdim=True)
    return torch.log1p((p * (torch.expm1(d) - d)).sum(1)).reshape(len(z), -1).sum(1)


@pytest.mark.parametrize(("K", "positions"), CLASSES)
def test_softmax_hessian(K: int, positions: int, dtype: torch.dtype) -> None:
    z, index, _ = sample_classes(K, positions)
    hessian = resolve(nn.CrossEntropyLoss(reduction="sum")).hessian(z.to(dtype), index)
    p, u = torch.softmax(z.to(dtype).double(), 1), random(3, *z.shape, seed=7)
    top = p.argmax(1, keepdim=True).expand(3, *index[:, None].shape)
    shifted = u - u.gather(2, top)  # the Hessian does not see it; digits survive next to p = 1
    product = p * (shifted - (p * shifted).sum(2, keepdim=True))
    root_transposed = p.sqrt() * (shifted - (p * shifted).sum(2, keepdim=True))
    rest = u.scatter(2, top, 0.0)
    dot = (p.sqrt() * rest).sum(2, keepdim=True)
    p_top = p.expand(3, *p.shape).gather(2, top)
    others = p.expand(3, *p.shape).scatter(2, top, 0.0).sum(2, keepdim=True)
    at_top = p_top.sqrt() * u.gather(2, top)
    root = (p.sqrt() * u - p * (dot + at_top)).scatter(2, top, at_top * others - p_top * dot)
    for got, expected in (
        (hessian.matmat(u.to(dtype)), product),
        (hessian.root_rmatmat(u.to(dtype)), root_transposed),
        (hessian.root_matmat(u.to(dtype)), root),
    ):
        for n in range(2):
            assert_close(got[:, n], expected[:, n], scope="layer")


@pytest.mark.parametrize("architecture", ["80", "90"])
@pytest.mark.parametrize(("K", "lines"), LONG)
def test_long_lines(K: int, lines: int, architecture: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFL_EMULATION_ARCHITECTURE", architecture)
    V, N = (1, lines) if lines < 100 else (lines // 10, 10)
    z, index = random(N, K), torch.arange(N) * (K // N)
    z[0, K // 2] += 30  # sure of a class
    make = nn.CrossEntropyLoss(reduction="sum")
    loss = resolve(make)
    before = Traffic.now()
    got = loss.gradient(z.to(dtype), index)
    clusters = architecture == "90"
    if clusters:
        assert Traffic.now().since(before).launches == 1
    assert_close(got, reference.loss_gradient(make, z, index), scope="layer")
    hessian = loss.hessian(z.to(dtype), index)
    p, u = torch.softmax(z.to(dtype).double(), 1), random(V, N, K, seed=7)
    shifted = u - u.gather(2, p.argmax(1, keepdim=True).expand(V, N, 1))  # the Hessian does not see it; digits survive next to p = 1
    before = Traffic.now()
    product = hessian.matmat(u.to(dtype))
    if clusters or lines > 132:
        assert Traffic.now().since(before).launches == 1
    expected = p * (shifted - (p * shifted).sum(2, keepdim=True))
    assert_close(product[:, 0], expected[:, 0], scope="layer")
    assert_close(product, expected, scope="layer")


@pytest.mark.parametrize("C", LINES)
def test_elementwise_loss(C: int, dtype: torch.dtype) -> None:
    z, t = random(2, C), random(2, C, seed=1).sigmoid()
    make = nn.BCEWithLogitsLoss(reduction="sum")
    loss = resolve(make)
    assert_close(loss.value(z.to(dtype), t.to(dtype)), reference.loss_values(make, z, t), scope="layer")
    assert_close(loss.gradient(z.to(dtype), t.to(dtype)), reference.loss_gradient(make, z, t), scope="layer")
    H, u = resolve(make).hessian(z.to(dtype), t.to(dtype)), random(3, 2, C, seed=2)
    p = z.sigmoid()
    assert_close(H.matmat(u.to(dtype)), p * (1 - p) * u, scope="layer")
    assert_close(H.root_matmat(u.to(dtype)), (p * (1 - p)).sqrt() * u, scope="layer")


def indices(N: int, positions: int, rows: int) -> Tensor:
    """Half of them one common index, the others spread."""
    generator = torch.Generator().manual_seed(8)
    x = torch.randint(0, rows, (N, positions), generator=generator)
    common = torch.rand(N, positions, generator=generator) < 0.5
    return torch.where(common, torch.tensor(3), x)


@pytest.mark.parametrize("padding", [None, 3], ids=["", "padding"])
@pytest.mark.parametrize(("positions", "cols"), [(1, 5), (16, 300), (500, 8), (1300, 3)])
def test_embedding(positions: int, cols: int, padding: int | None, dtype: torch.dtype) -> None:
    seen = torch.ones(50, cols, dtype=F64)
    if padding is not None:
        seen[padding] = 0
    check_products(Table(50, cols, padding), indices(2, positions, 50), dtype, seen)


class Bag(nn.Module):
    """Scores from the sum of rows."""

    def __init__(self, rows: int, cols: int) -> None:
        super().__init__()
        self.table = nn.Embedding(rows, cols)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.table(x.long()).sum(1)
        return y


@pytest.mark.parametrize(("N", "positions", "rows", "cols"), [(3, 40, 20, 6), (70, 3, 20, 70), (4, 150, 90, 5)])
def test_gradients_of_an_embedding(N: int, positions: int, rows: int, cols: int) -> None:
    """Whole vectors a row and odd ones; more rows an example than a warp looks for at a time."""
    check_per_example(Bag(rows, cols), indices(N, positions, rows), cols)


@pytest.mark.parametrize("padding", [None, 3], ids=["", "padding"])
@pytest.mark.parametrize("cols", [8, 3])
def test_inner_products_with_gradients_of_other_examples(cols: int, padding: int | None, dtype: torch.dtype) -> None:
    """Several right-hand sides on both sides, and examples that have no row in common."""
    model, X = Table(50, cols, padding).to(dtype), indices(5, 40, 50)
    X[4] = 3
    sides = []
    for part, V in ((X[:3], 3), (X[3:], 2)):
        tape = Plan.of(model, part).linearize(part)
        sides.append(tape.factors(random(V, *tape.outputs.shape, seed=V).to(dtype)))
    left, right = (side.materialise().double().flatten(0, 1) for side in sides)
    assert_close(sides[0].gram(sides[1]).reshape(9, 4), left @ right.T, scope="layer")


@pytest.mark.parametrize(("positions", "inputs", "outputs"), [(1, 8, 9), (1, 5, 3), (4, 300, 5), (4, 7, 5), (20, 6, 5)])
def test_gradients_of_a_linear_layer(positions: int, inputs: int, outputs: int) -> None:
    """One position, few and many; whole vectors a row and odd ones."""
    model = nn.Sequential(nn.Linear(inputs, outputs), nn.Flatten(1))
    check_per_example(model, random(3, positions, inputs), positions * outputs)


def check_per_example(model: nn.Module, X: Tensor, C: int) -> None:
    model, N = model.double(), len(X)
    target = random(N, C, seed=9)
    names, values = zip(*model.named_parameters(), strict=True)

    def gradient(x: Tensor, t: Tensor) -> Tensor:
        z = functional_call(model, dict(zip(names, values, strict=True)), (x[None],))
        return torch.cat([g.flatten() for g in torch.autograd.grad((z - t).square().sum(), values)])

    expected = torch.stack([gradient(x, t) for x, t in zip(X, target, strict=True)])
    loss = nn.MSELoss(reduction="sum")
    grads = ie.per_example_grads(model, loss, (X, target))
    assert_close(torch.cat([g.reshape(N, -1) for g in grads.values()], dim=1), expected, scope="layer")
    assert_close(ie.per_example_norms(model, loss, (X, target)), expected.norm(dim=1), scope="layer")
    assert_close(ie.grad_gram(model, loss, (X, target)), expected @ expected.T, scope="layer")
    tape = Plan.of(model, X).linearize(X)
    squares = tape.factors(resolve(loss).gradient(tape.outputs, target)[None]).square_sum()
    assert_close(squares, expected.square().sum(0), scope="layer")


@pytest.mark.parametrize("transposed", [False, True])
def test_tangents_of_linear_layers_are_read_where_they_lie(transposed: bool) -> None:
    """One product of the vendor's, which takes either storage, and no copy before it."""

    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(random(5, 7) if transposed else random(7, 5))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight if transposed else nn.functional.linear(x, self.weight)

    model, X, V = Dense(), random(4, 5, seed=1), random(3, 35, seed=2)
    tape = Plan.of(model, X).linearize(X)
    tape.set_schedule("by_operator")
    before = Traffic.now()
    product = tape.jvp(V)
    asked = Traffic.now().since(before)
    assert_close(product, torch.stack([X @ (v.view(5, 7) if transposed else v.view(7, 5).T) for v in V]), scope="layer")
    assert (asked.launches, asked.products) == (1, 1), "the product and the copy of the result to where it is wanted"


POOLS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "max": (nn.MaxPool2d(2), (3, 8, 6)),
    "max-overlap": (nn.MaxPool2d(3, stride=1, padding=1), (2, 9, 7)),
    "max-dilated": (nn.MaxPool2d(2, stride=1, dilation=3), (2, 9, 7)),
    "max-global": (nn.AdaptiveMaxPool2d(1), (3, 15, 13)),
    "max-large-plane": (nn.MaxPool2d(8, stride=7), (1, 120, 110)),
    "avg": (nn.AvgPool2d(2), (3, 8, 6)),
    "avg-overlap": (nn.AvgPool2d(3, stride=1, padding=1), (2, 9, 7)),
    "avg-global": (nn.AdaptiveAvgPool2d(1), (3, 15, 13)),
    "avg-adaptive": (nn.AdaptiveAvgPool2d((3, 4)), (2, 8, 7)),
    "avg-3d": (nn.AvgPool3d(2, stride=1), (2, 3, 4, 5)),
}


@pytest.mark.parametrize("id", POOLS)
def test_pooling(id: str, dtype: torch.dtype) -> None:
    pool, shape = POOLS[id]
    check_products(Scaled(shape, pool), random(2, *shape), dtype)


REVERSED = """f32 and (test_attention and edges or test_convolutions and edges or test_softmax_of_lines or test_softmax_of_columns
    or test_cross_entropy and 20001 or test_long_lines and 9001-1)""".replace("\n", " ")
"""Kernels with barriers of a warp, a block and a cluster."""
DRAWN = "f32 and (test_softmax_of_lines or test_softmax_of_columns or test_pooling or test_widths_and_depths)"
"""Rows, columns, rounds that integers decide, and chains of layers."""


@pytest.mark.parametrize(
    ("order", "names", "rows"),
    [
        pytest.param("reversed", ["kernels", "shapes"], REVERSED, id="opposite"),
        pytest.param("20261123", ["kernels", "mlp"], DRAWN, id="drawn", marks=pytest.mark.slow),
    ],
)
def test_threads_and_blocks_in_another_order(order: str, names: list[str], rows: str) -> None:
    """A missing barrier, or blocks that depend on each other, would show; the emulation reads the order once in a process."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", "-k", rows]
    files = [f"tests/test_device_{name}.py" for name in names]
    environment = {**os.environ, "INFL_EMULATION_ORDER": order}
    done = subprocess.run([*command, *files], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout
    assert " skipped" not in done.stdout
