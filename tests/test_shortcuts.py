"""GGN products that take shortcuts: past dense layers with many outputs, by the outputs' Jacobians."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian, jvp, vjp

import influence_ext as ie
from influence_ext.testing import assert_close

F64 = torch.float64


class Branches(nn.Module):
    """Two dense branches, one node after the other, of which the second begins first; both lead to one output."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 7), nn.Linear(6, 8)
        self.to_a, self.to_b = nn.Linear(7, 60), nn.Linear(8, 50)
        self.head_a, self.head_b = nn.Linear(60, 1), nn.Linear(50, 1)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, 1]``"""
        late, early = self.a(x), self.b(x)
        out = self.head_b(torch.tanh(self.to_b(torch.tanh(early))))
        return out + self.head_a(torch.tanh(self.to_a(torch.sigmoid(late))))


class Residual(nn.Module):
    """What the wide layer reads goes past it, too, so there is no shortcut there; there is one behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.wide, self.back, self.head = nn.Linear(6, 9), nn.Linear(9, 64), nn.Linear(64, 9), nn.Linear(9, 1)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, 1]``"""
        h = torch.tanh(self.first(x))
        return self.head(h + self.back(torch.tanh(self.wide(h))))


def frozen_middle() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 60), nn.ReLU(), nn.Linear(60, 50), nn.Tanh(), nn.Linear(50, 1))
    for index in (2, 4):
        model[index].requires_grad_(False)
    return model


def normalised() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Linear(12, 64), nn.Softplus(), nn.Linear(64, 2))
    model[1].running_mean.uniform_(-1, 1)
    model[1].running_var.uniform_(0.5, 2)
    return model.eval()


CLASSES = nn.CrossEntropyLoss(weight=torch.tensor([0.3, 1.0, 2.0], dtype=F64), label_smoothing=0.1)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], nn.Module, int]] = {
    "tanh": (lambda: nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 40), nn.Tanh(), nn.Linear(40, 1)), nn.MSELoss(), 2),
    "deep": (lambda: nn.Sequential(*[m for _ in range(4) for m in (nn.LazyLinear(33), nn.GELU())], nn.LazyLinear(1)), nn.MSELoss(), 2),
    "classes": (lambda: nn.Sequential(nn.Linear(6, 21), nn.ReLU(), nn.Linear(21, 90), nn.ReLU(), nn.Linear(90, 3)), CLASSES, 2),
    "no activation": (lambda: nn.Sequential(nn.Linear(6, 20), nn.Linear(20, 50), nn.Linear(50, 1)), nn.MSELoss(), 2),
    "activation last": (
        lambda: nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 50), nn.Tanh(), nn.Linear(50, 1), nn.Sigmoid()),
        nn.BCELoss(),
        2,
    ),
    "convolution": (
        lambda: nn.Sequential(nn.Conv2d(1, 3, 2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 70), nn.Tanh(), nn.Linear(70, 1)),
        nn.MSELoss(),
        4,
    ),
    "frozen": (frozen_middle, nn.MSELoss(), 2),
    "normalised": (normalised, nn.MSELoss(), 2),
    "branches": (Branches, nn.MSELoss(), 2),
    "residual": (Residual, nn.MSELoss(), 2),
}


def problem(name: str, N: int = 29) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    make, loss, axes = NETWORKS[name]
    torch.manual_seed(0)
    model = make()
    X = torch.randn(N, 1, 5, 5) if axes == 4 else torch.randn(N, 6)
    z = model(X)
    y = torch.randint(0, 3, (N,)) if loss is CLASSES else torch.rand_like(z).detach()
    return model.to(F64), loss, X.double(), y if loss is CLASSES else y.double()


def oracle(model: nn.Module, loss: nn.Module, X: Tensor, y: Tensor, V: Tensor) -> Tensor:
    """``Jᵀ H J v`` by torch.func, a vector at a time."""
    params = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    constants = {name: t.detach() for name, t in (*model.named_parameters(), *model.named_buffers()) if name not in params}

    def network(p: dict[str, Tensor]) -> Tensor:
        return functional_call(model, {**p, **constants}, (X,))

    rows = []
    for v in V:
        pieces = v.split([p.numel() for p in params.values()])
        tangent = {name: piece.view_as(p) for (name, p), piece in zip(params.items(), pieces, strict=True)}
        z, t_z = jvp(network, (params,), (tangent,))
        H = hessian(lambda outputs: loss(outputs, y))(z).reshape(z.numel(), z.numel())
        pulled = vjp(network, params)[1]((H @ t_z.flatten()).view_as(z))[0]
        rows.append(torch.cat([pulled[name].flatten() for name in params]))
    return torch.stack(rows)


def vectors(G: ie.GGN, count: int) -> Tensor:
    return torch.randn(count, G.shape[0], generator=torch.Generator().manual_seed(1), dtype=F64).to(G.dtype)


@pytest.mark.parametrize("schedule", ["by_example", "by_operator"])
@pytest.mark.parametrize("name", NETWORKS)
def test_products_are_the_gauss_newton_matrix(name: str, schedule: str) -> None:
    model, loss, X, y = problem(name)
    G = ie.GGN(model, loss, (X, y), schedule=schedule)
    V = vectors(G, 8)
    assert G._tape.schedule(8).startswith("with shortcuts")
    assert_close(G.matmat(V), oracle(model, loss, X, y, V))


@pytest.mark.parametrize("name", ["tanh", "classes", "convolution"])
def test_float32_loses_nothing(name: str) -> None:
    model, loss, X, y = problem(name, N=200)
    exact = ie.GGN(model, loss, (X, y))
    G = ie.GGN(model.float(), loss.float(), (X.float(), y if y.dtype == torch.int64 else y.float()))
    V = vectors(exact, 8)
    errors = []
    for allowed in (True, False):
        G._tape._native.set_shortcuts(allowed)
        errors.append(float((G.matmat(V.float()) - exact.matmat(V)).norm() / exact.matmat(V).norm()))
    loss.double()
    assert errors[0] < max(2 * errors[1], 5e-7)


@pytest.mark.parametrize("count", [1, 3, 8, 20])
def test_any_number_of_vectors(count: int) -> None:
    model, loss, X, y = problem("deep")
    G = ie.GGN(model, loss, (X, y))
    V = vectors(G, count)
    assert G._tape._native.takes_shortcuts(count)
    assert_close(G.matmat(V), oracle(model, loss, X, y, V))


def test_another_point_has_other_jacobians() -> None:
    model, loss, X, y = problem("tanh")
    G = ie.GGN(model, loss, (X, y))
    V = vectors(G, 8)
    before = G.matmat(V)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    tape = G._tape
    tape.relinearize(torch.cat([p.detach().flatten() for p in model.parameters()]))
    after = tape.ggn(V, ie.losses.resolve(loss).hessian(tape.outputs, y).scaled(1 / len(X)))
    assert not torch.allclose(before, after)
    assert_close(after, oracle(model, loss, X, y, V))


def test_they_are_made_by_the_first_product_and_counted() -> None:
    model, loss, X, y = problem("tanh")
    G = ie.GGN(model, loss, (X, y))
    tape, N, C = G._tape, len(X), 1
    before = tape.cached_bytes
    G.matmat(vectors(G, 8))
    made = tape.cached_bytes
    assert made == before + N * C * 32 * 8  # of the values before the layer of 40 outputs; that of the last layer saves nothing
    G.matmat(vectors(G, 3))
    assert tape.cached_bytes == made


def test_a_memory_budget_spares_them() -> None:
    model, loss, X, y = problem("tanh")
    G = ie.GGN(model, loss, (X, y), memory_budget=1 << 30)
    V = vectors(G, 8)
    before = G._tape.cached_bytes
    assert not G._tape._native.takes_shortcuts(8)
    assert_close(G.matmat(V), oracle(model, loss, X, y, V))
    assert G._tape.cached_bytes == before


def test_they_belong_to_the_point_whatever_multiplies_first() -> None:
    model, loss, X, y = problem("deep", N=200)
    exact = ie.GGN(model, loss, (X, y))
    rounded = ie.GGN(model.float(), loss, (X.float(), y.float()), precision="bfloat16")
    V = vectors(exact, 8)
    assert rounded._tape._native.takes_shortcuts(8)
    rounded.matmat(V.float())
    assert_close(rounded.exact.matmat(V.float()), exact.matmat(V))


def test_samples_go_the_plain_way() -> None:
    model, loss, X, y = problem("tanh")
    G = ie.GGN(model, loss, (X, y))
    sample = G.sample(torch.Generator().manual_seed(0), 20)
    index = torch.randperm(len(X), generator=torch.Generator().manual_seed(0))[:20]
    V = vectors(G, 8)
    assert not sample._tape._native.takes_shortcuts(8), "each serves one product of a stochastic solver"
    assert G._tape._native.takes_shortcuts(8)
    assert_close(sample.matmat(V), oracle(model, loss, X[index], y[index], V))


def test_where_they_do_not_pay() -> None:
    many = nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 50), nn.Tanh(), nn.Linear(50, 40)).double()
    G = ie.GGN(many, nn.MSELoss(), (torch.randn(5, 6, dtype=F64), torch.randn(5, 40, dtype=F64)))
    assert not G._tape._native.takes_shortcuts(8), "as many outputs as the layer has"
    narrow = nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    G = ie.GGN(narrow, nn.MSELoss(), (torch.randn(5, 6, dtype=F64), torch.randn(5, 1, dtype=F64)))
    assert not G._tape._native.takes_shortcuts(1), "few outputs of the layer, and one vector to read the Jacobians for"


def test_threads_make_them_once() -> None:
    model, loss, X, y = problem("deep", N=200)
    G, alone = ie.GGN(model, loss, (X, y)), ie.GGN(model, loss, (X, y))
    V = vectors(G, 4)
    with ThreadPoolExecutor(4) as pool:
        products = list(pool.map(lambda _: G.matmat(V), range(8)))
    assert all(torch.equal(product, alone.matmat(V)) for product in products)
    assert G._tape.cached_bytes == alone._tape.cached_bytes
