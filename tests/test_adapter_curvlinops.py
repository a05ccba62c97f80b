"""The curvlinops adapter: equals curvlinops with the same arguments, and dense matrices of plain torch, and works inside curvlinops."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import curvlinops
import numpy as np
import pytest
import torch
from curvlinops.examples import IdentityLinearOperator
from scipy.sparse import linalg as sparse
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

from influence_ext import errors
from influence_ext.adapters import curvlinops as adapter
from influence_ext.testing import assert_close

F64 = torch.float64
NAMES = ("GGNLinearOperator", "HessianLinearOperator", "EFLinearOperator")
Data = list[tuple[Any, Tensor]]


def network(seed: int = 0, dtype: torch.dtype = F64) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


class Sequences(nn.Module):
    """Outputs ``[N, T, C]``, or ``[N, C, T]`` with classes on axis 1."""

    def __init__(self, classes_first: bool):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.classes_first = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double(), classes_first

    def forward(self, x: Tensor) -> Tensor:
        z = self.net(x)
        return z.transpose(1, 2) if self.classes_first else z


def targets(loss: nn.Module, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if isinstance(loss, nn.CrossEntropyLoss):
        classes = torch.randint(3, shape, generator=generator)
        classes[0] = 0  # of every batch one target counts
        return classes
    values = torch.randn(*shape, 3, generator=generator, dtype=F64)
    return (values > 0).double() if isinstance(loss, nn.BCEWithLogitsLoss) else values


def batches(loss: nn.Module, sizes: tuple[int, ...] = (3, 5, 2), positions: tuple[int, ...] = ()) -> Data:
    """Batches of unequal size."""
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(n, *positions, 4, generator=generator, dtype=F64), targets(loss, (n, *positions), generator)) for n in sizes]


def both(name: str, *args: Any, **options: Any) -> tuple[Any, Any]:
    """Ours and theirs with the same arguments."""
    return getattr(adapter, name)(*args, **options), getattr(curvlinops, name)(*args, **options)


def random(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def dense(model: nn.Module, loss: nn.Module, params: list[Tensor], data: Data) -> Tensor:
    """The Hessian of ``Σ_b r_b L_b`` in the order of ``params``, by two reverse passes."""
    N = sum(len(X) for X, _ in data)
    total = sum(loss(model(X), y) * (len(X) / N if loss.reduction == "mean" else 1) for X, y in data)
    gradients = torch.autograd.grad(total, params, create_graph=True)
    flat = torch.cat([g.reshape(-1) for g in gradients])
    rows = [torch.autograd.grad(g, params, retain_graph=True, allow_unused=True, materialize_grads=True) for g in flat]
    return torch.stack([torch.cat([r.reshape(-1) for r in row]) for row in rows])


LOSSES: list[tuple[str, Callable[[], nn.Module]]] = [
    *((f"mse-{r}", lambda r=r: nn.MSELoss(reduction=r)) for r in ("mean", "sum")),
    *((f"ce-{r}", lambda r=r: nn.CrossEntropyLoss(reduction=r)) for r in ("mean", "sum")),
    *((f"bce-{r}", lambda r=r: nn.BCEWithLogitsLoss(reduction=r)) for r in ("mean", "sum")),
    ("ce-weighted", lambda: nn.CrossEntropyLoss(weight=torch.tensor([0.5, 1.0, 2.0], dtype=F64))),
    ("ce-ignore", lambda: nn.CrossEntropyLoss(ignore_index=1)),
]
losses = pytest.mark.parametrize("make_loss", [make for _, make in LOSSES], ids=[id for id, _ in LOSSES])
names = pytest.mark.parametrize("name", NAMES)


@names
@losses
@pytest.mark.parametrize("positions", [(), (2,)], ids=["rows", "sequences"])
@pytest.mark.parametrize("num_data", [None, 17])
def test_products_are_those_of_curvlinops(name: str, make_loss: Any, positions: tuple[int, ...], num_data: int | None) -> None:
    loss = make_loss()
    model = Sequences(isinstance(loss, nn.CrossEntropyLoss)) if positions else network()
    data, params = batches(loss, positions=positions), list(model.parameters())
    params = [params[2], params[0], params[3]]  # a part, in another order
    ours, theirs = both(name, model, loss, params, data, num_data=num_data)
    assert (ours.shape, ours.dtype, ours.device) == (theirs.shape, theirs.dtype, theirs.device)
    V, pieces = random(ours.shape[0], 3), [random(*p.shape, 2) for p in params]
    assert_close(ours @ V, theirs @ V)
    assert_close(ours @ V[:, 0], theirs @ V[:, 0])
    for mine, yours, p in zip(ours @ pieces, theirs @ pieces, params, strict=True):
        assert mine.shape == (*p.shape, 2)
        assert_close(mine, yours)
    for mine, yours in zip(ours @ [x[..., 0] for x in pieces], theirs @ [x[..., 0] for x in pieces], strict=True):
        assert_close(mine, yours)
    (gradient, value), (expected, expected_value) = ours.gradient_and_loss(), theirs.gradient_and_loss()
    assert_close(value, expected_value)
    for mine, yours in zip(gradient, expected, strict=True):
        assert_close(mine, yours)


@losses
def test_the_hessian_is_the_second_derivative(make_loss: Any) -> None:
    loss, model = make_loss(), network()
    params = list(model.parameters())[::-1]
    data = batches(loss)
    H = adapter.HessianLinearOperator(model, loss, params, data)
    assert_close(H @ torch.eye(H.shape[0], dtype=F64), dense(model, loss, params, data))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gauss_newton_and_fisher_of_a_linear_model(reduction: str) -> None:
    torch.manual_seed(0)
    model, loss = nn.Linear(4, 3).double(), nn.MSELoss(reduction=reduction)
    data, params = batches(loss), list(model.parameters())
    G = adapter.GGNLinearOperator(model, loss, params, data)
    assert_close(G @ torch.eye(G.shape[0], dtype=F64), dense(model, loss, params, data))  # no curvature in the network
    rows = [
        torch.cat([g.reshape(-1) for g in torch.autograd.grad((model(x[None]) - t).square().sum(), params)])
        for X, y in data
        for x, t in zip(X, y, strict=True)
    ]
    c = 1 / (10 * 3) if reduction == "mean" else 1.0
    E = adapter.EFLinearOperator(model, loss, params, data)
    assert_close(E @ torch.eye(E.shape[0], dtype=F64), c * torch.stack(rows).T @ torch.stack(rows))


@names
def test_a_dictionary_of_parameters(name: str) -> None:
    model, loss = network(), nn.CrossEntropyLoss()
    data, own = batches(loss), dict(model.named_parameters())
    other = {key: p.detach() + 0.1 for key, p in reversed(own.items())}  # other values, another order, no requires_grad
    moved = network()
    moved.load_state_dict(other)
    listed = dict(moved.named_parameters())
    theirs = getattr(curvlinops, name)(moved, loss, [listed[key] for key in other], data)
    V = random(theirs.shape[0], 2)
    as_function = lambda params, X: functional_call(model, params, X)  # noqa: E731
    for function in (model, as_function):
        ours = getattr(adapter, name)(function, loss, other, data)
        assert_close(ours @ V, theirs @ V)
    at_own = getattr(adapter, name)(model, loss, own, data)
    assert_close(at_own @ V, getattr(curvlinops, name)(model, loss, list(own.values()), data) @ V)
    assert all(p.requires_grad and p.grad is None for p in own.values())


def test_a_dictionary_is_followed_in_place() -> None:
    model, loss = network(), nn.MSELoss()
    data = batches(loss)
    params = {key: p.detach().clone() for key, p in model.named_parameters()}
    for function in (model, lambda params, X: functional_call(model, params, X)):
        ours = adapter.GGNLinearOperator(function, loss, params, data)
        for p in params.values():
            p.mul_(1.1)
        copy = network()
        copy.load_state_dict(params)
        V = random(ours.shape[0], 2)
        assert_close(ours @ V, curvlinops.GGNLinearOperator(copy, loss, list(copy.parameters()), data) @ V)


def change_in_place(p: Tensor) -> None:
    with torch.no_grad():
        p.mul_(1.5)


def change_behind_the_version_counter(p: Tensor) -> None:
    p.data.add_(0.5)


def change_the_storage(p: Tensor) -> None:
    p.data = p.data * 1.5


@names
@pytest.mark.parametrize("change", [change_in_place, change_behind_the_version_counter, change_the_storage])
@pytest.mark.parametrize("which", [0, 3])
def test_changed_parameters_count(name: str, change: Callable[[Tensor], None], which: int) -> None:
    """Also those that are not differentiated (the last one is not)."""
    model, loss = network(), nn.CrossEntropyLoss()
    params = list(model.parameters())
    ours, theirs = both(name, model, loss, params[2::-1], batches(loss))
    V = random(ours.shape[0], 2)
    before = ours @ V
    change(params[which])
    assert_close(ours @ V, theirs @ V)
    assert not torch.equal(ours @ V, before)


def test_changed_buffers_count() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).double().eval()
    loss = nn.MSELoss()
    ours, theirs = both("GGNLinearOperator", model, loss, list(model.parameters()), batches(loss))
    V = random(ours.shape[0])
    model[1].running_var.mul_(2)
    assert_close(ours @ V, theirs @ V)


@pytest.mark.parametrize("block_sizes", [[1, 1, 1, 1], [2, 2], [4], [3, 1]])
def test_blocks_of_the_hessian(block_sizes: list[int]) -> None:
    model, loss = network(), nn.CrossEntropyLoss()
    ours, theirs = both("HessianLinearOperator", model, loss, list(model.parameters()), batches(loss), block_sizes=block_sizes)
    V = random(ours.shape[0], 2)
    assert_close(ours @ V, theirs @ V)


@pytest.fixture
def ggn() -> tuple[Any, Tensor]:
    """A damped GGN in curvlinops' algebra, and its dense matrix."""
    model, loss = network(), nn.CrossEntropyLoss()
    params = list(model.parameters())
    G = adapter.GGNLinearOperator(model, loss, params, batches(loss))
    D = curvlinops.GGNLinearOperator(model, loss, params, batches(loss)) @ torch.eye(G.shape[0], dtype=F64)
    damping = 0.1 * IdentityLinearOperator([p.shape for p in params], G.device, G.dtype)
    return G + damping, D + 0.1 * torch.eye(len(D), dtype=F64)


def test_operator_algebra(ggn: tuple[Any, Tensor]) -> None:
    A, D = ggn
    V = random(len(D), 2)
    assert_close((2 * A - A * 0.5) @ V, 1.5 * D @ V)
    assert_close((A @ A) @ V, D @ D @ V)
    assert_close(A.adjoint() @ V, D @ V)
    assert_close((A @ A).adjoint() @ V, D @ D @ V)
    G = A._A
    assert G.adjoint() is G
    assert isinstance(G, curvlinops.SubmatrixLinearOperator.__mro__[1])  # their PyTorchLinearOperator
    assert_close(curvlinops.SubmatrixLinearOperator(A, [3, 1], [0, 5, 2]) @ V[:3], D[[3, 1]][:, [0, 5, 2]] @ V[:3])


def test_inside_their_inverses(ggn: tuple[Any, Tensor]) -> None:
    A, D = ggn
    V = random(len(D), 2)
    assert_close(curvlinops.CGInverseLinearOperator(A, tolerance=1e-10, eps=0) @ V, torch.linalg.solve(D, V), scope="model", scale=1e3)
    X = curvlinops.NeumannInverseLinearOperator(A, num_terms=400, scale=1 / float(torch.linalg.eigvalsh(D)[-1])) @ V
    assert float((X - torch.linalg.solve(D, V)).norm() / X.norm()) < 1e-6
    Y = curvlinops.LSMRInverseLinearOperator(A, atol=1e-13, btol=1e-13, maxiter=2000) @ V
    assert float((Y - torch.linalg.solve(D, V)).norm() / Y.norm()) < 1e-8


def test_our_inverses(ggn: tuple[Any, Tensor]) -> None:
    A, D = ggn
    V, exact = random(len(D), 2), torch.linalg.solve(D, random(len(D), 2))
    inverse = adapter.CGInverseLinearOperator(A, tolerance=1e-10)
    for solved in (inverse @ V, (inverse.adjoint() @ V), torch.stack([inverse @ V[:, 0], inverse @ V[:, 1]], 1)):
        assert float((D @ solved - V).norm() / V.norm()) < 2e-10
    pieces = [x.view(*s, 2) for x, s in zip(V.split(A._in_shape_flat), A._in_shape, strict=True)]
    listed = torch.cat([x.reshape(-1, 2) for x in inverse @ pieces])
    assert_close(listed, inverse @ V)
    jacobi = adapter.CGInverseLinearOperator(
        A, tolerance=1e-10, preconditioner=lambda R: R / D.diagonal()[:, None], initial_guess=exact + 1e-3
    )
    assert float((jacobi @ V - exact).norm() / exact.norm()) < 1e-8
    with pytest.warns(errors.NumericalWarning, match="tolerance"):
        adapter.CGInverseLinearOperator(A, tolerance=1e-10, max_iter=2) @ V
    scale = 1 / float(torch.linalg.eigvalsh(D)[-1])
    for terms in (0, 1, 30):
        ours, theirs = both("NeumannInverseLinearOperator", A, num_terms=terms, scale=scale)
        assert_close(ours @ V, theirs @ V)
        assert_close(ours.adjoint() @ V, theirs @ V)
    with pytest.raises(ValueError, match="scale"):
        adapter.NeumannInverseLinearOperator(1e200 * A, num_terms=50) @ V
    with pytest.raises(ValueError, match="square"):
        adapter.CGInverseLinearOperator(curvlinops.SubmatrixLinearOperator(A, [0, 1], [0, 1, 2]))


def test_truncated_conjugate_gradients_are_those_of_curvlinops(ggn: tuple[Any, Tensor]) -> None:
    A, D = ggn
    v = random(len(D))
    with pytest.warns(errors.NumericalWarning):
        ours = adapter.CGInverseLinearOperator(A, tolerance=1e-12, max_iter=6, max_tridiag_iter=5) @ v
    with pytest.warns(RuntimeWarning, match="CG terminated"):
        theirs = curvlinops.CGInverseLinearOperator(A, tolerance=1e-12, max_iter=6, max_tridiag_iter=5, eps=0) @ v
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-8


def estimators() -> Iterator[tuple[str, Callable[[Any], Tensor]]]:
    yield "hutchinson_trace", lambda A: curvlinops.hutchinson_trace(A, 20)
    yield "hutchpp_trace", lambda A: curvlinops.hutchpp_trace(A, 21)
    yield "xtrace", lambda A: curvlinops.xtrace(A, 20)
    yield "hutchinson_diag", lambda A: curvlinops.hutchinson_diag(A, 20)
    yield "xdiag", lambda A: curvlinops.xdiag(A, 20)
    yield "hutchinson_squared_fro", lambda A: curvlinops.hutchinson_squared_fro(A, 20)
    yield "spectrum", lambda A: torch.stack(curvlinops.lanczos_approximate_spectrum(A, 10, num_points=50, boundaries=(0.0, 2.0)))
    yield "log spectrum", lambda A: torch.stack(curvlinops.lanczos_approximate_log_spectrum(A, 10, num_points=50, boundaries=(0.01, 2.0)))


@pytest.mark.parametrize(("estimate"), [pytest.param(f, id=id) for id, f in estimators()])
def test_inside_their_estimators(estimate: Callable[[Any], Tensor]) -> None:
    model, loss = network(), nn.CrossEntropyLoss()
    found = []
    for operator in both("GGNLinearOperator", model, loss, list(model.parameters()), batches(loss)):
        torch.manual_seed(5)
        found.append(estimate(operator))
    assert float((found[0] - found[1]).norm() / found[1].norm()) < 1e-6


def test_scipy(ggn: tuple[Any, Tensor]) -> None:
    A, D = ggn
    G = A._A
    wrapped = G.to_scipy()
    assert wrapped.dtype == np.float64
    assert G.to_scipy(dtype=np.float32).dtype == np.float32
    values = sparse.eigsh(wrapped, k=3, which="LM", return_eigenvectors=False)
    top = torch.linalg.eigvalsh(D)[-3:] - 0.1
    assert_close(torch.as_tensor(np.sort(values)), top, scope="model")
    v = random(len(D)).numpy()
    x, info = sparse.cg(A.to_scipy(), v, rtol=1e-12)
    assert info == 0
    assert np.linalg.norm(D.numpy() @ x - v) < 1e-10 * np.linalg.norm(v)
    assert np.allclose(wrapped.T @ v, wrapped @ v)


class Augmented:
    """Other numbers in every pass."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield torch.randn(6, 4, dtype=F64), torch.zeros(6, dtype=torch.long)


def test_data_that_change_are_refused() -> None:
    model, loss = network(), nn.CrossEntropyLoss()
    params = list(model.parameters())
    (X, y), *_ = batches(loss, (11,))
    dropping = DataLoader(TensorDataset(X, y), batch_size=4, shuffle=True, drop_last=True)
    for data in (Augmented(), dropping):
        with pytest.raises(RuntimeError, match="check_deterministic"):
            adapter.GGNLinearOperator(model, loss, params, data)
        adapter.GGNLinearOperator(model, loss, params, data, check_deterministic=False)
    shuffled = DataLoader(TensorDataset(X, y), batch_size=4, shuffle=True)
    v = random(43)
    for name in NAMES:
        state = torch.get_rng_state()
        ours = getattr(adapter, name)(model, loss, params, shuffled)
        assert torch.equal(torch.get_rng_state(), state)
        assert_close(ours @ v, getattr(curvlinops, name)(model, loss, params, [(X, y)]) @ v)


@pytest.mark.parametrize("layer", [nn.Dropout(0.5), nn.BatchNorm1d(5)])
def test_models_that_depend_on_the_mode_are_refused(layer: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(4, 5), layer, nn.Linear(5, 3)).double()
    loss = nn.MSELoss()
    params, data = list(model.parameters()), batches(loss)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for check in (True, False):
        with pytest.raises(RuntimeError, match="eval"):
            adapter.GGNLinearOperator(model, loss, params, data, check_deterministic=check)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.training
    adapter.GGNLinearOperator(model.eval(), loss, params, data)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_is_rounded_once(name: str, dtype: torch.dtype) -> None:
    loss, half = nn.CrossEntropyLoss(), network(dtype=dtype)
    data = [(X.to(dtype), y) for X, y in batches(loss)]
    exact = network(dtype=dtype).double()
    like = getattr(curvlinops, name)(exact, loss, list(exact.parameters()), [(X.double(), y) for X, y in data])
    ours = getattr(adapter, name)(half, loss, list(half.parameters())[::-1], data)
    v = random(43, 2).to(dtype)
    order = [p.numel() for p in half.parameters()]
    back = lambda V: torch.cat(V.split(order[::-1])[::-1])  # noqa: E731
    product, expected = ours @ v, like @ back(v.double())
    assert ours.dtype == product.dtype == dtype
    torch.testing.assert_close(back(product).double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-5 * float(expected.abs().max()))
    assert {g.dtype for g in ours.gradient_and_loss()[0]} == {dtype}


def test_bad_arguments() -> None:
    model, loss = network(), nn.MSELoss()
    params, data = list(model.parameters()), batches(loss)
    G = adapter.GGNLinearOperator(model, loss, params, data)
    for wrong in (random(9), random(2, 2, 43), [random(5, 4)], "a", (random(43),), [random(2)] * 4, torch.tensor(1.0)):
        with pytest.raises(ValueError):  # noqa: PT011
            G @ wrong
    with pytest.raises(TypeError):
        G @ torch.zeros(43)
    for arguments in (
        (model, loss, [torch.zeros(3, dtype=F64)], data),
        (model, loss, [params[0], params[0]], data),
        (model, loss, {"nothing": params[0]}, data),
        (model, loss, params, []),
        (model, loss, params, iter(data)),
        (lambda params, X: X, loss, params, data),
        (model, lambda z, y: (z - y).square().sum(), params, data),
        (model, nn.MSELoss(reduction="none"), params, data),
    ):
        with pytest.raises(ValueError):  # noqa: PT011
            adapter.GGNLinearOperator(*arguments)
    for wrong, text in (
        ({"params": []}, "expected at least one parameter"),
        ({"data": data[0]}, r"expected data as batches \(X, y\), got a batch of type Tensor"),
        ({"num_data": 0}, "expected an integer num_data of at least 1"),
    ):
        with pytest.raises(ValueError, match=text):
            adapter.GGNLinearOperator(**{"model_func": model, "loss_func": loss, "params": params, "data": data, **wrong})
    with pytest.raises(TypeError, match="expected a linear operator, got Tensor"):
        adapter.CGInverseLinearOperator(torch.eye(3))
    with pytest.raises(ValueError, match="expected num_terms of at least 0"):
        adapter.NeumannInverseLinearOperator(G, num_terms=-1)
    for name, blocks in (("GGNLinearOperator", [2, 2]), ("HessianLinearOperator", [2, 1]), ("HessianLinearOperator", [4, 0])):
        with pytest.raises(ValueError, match="block_sizes"):
            getattr(adapter, name)(model, loss, params, data, block_sizes=blocks)
    with pytest.raises(NotImplementedError):
        adapter.EFLinearOperator(model, nn.HuberLoss(), params, data)
    mixed = nn.Sequential(model, nn.Linear(3, 3))
    with pytest.raises(RuntimeError, match="dtype"):
        adapter.GGNLinearOperator(mixed, loss, list(mixed.parameters()), data)


def test_progressbar(capsys: pytest.CaptureFixture[str]) -> None:
    model, loss = network(), nn.MSELoss()
    adapter.GGNLinearOperator(model, loss, list(model.parameters()), batches(loss), progressbar=True)
    assert "GGNLinearOperator" in capsys.readouterr().err


def test_float32() -> None:
    model, loss = network(dtype=torch.float32), nn.CrossEntropyLoss()
    data = [(X.float(), y) for X, y in batches(loss)]
    ours, theirs = both("GGNLinearOperator", model, loss, list(model.parameters()), data)
    v = random(43).float()
    assert float((ours @ v - theirs @ v).norm() / (theirs @ v).norm()) < 1e-5


def test_the_script_of_the_guide_before_and_after() -> None:
    guide = (Path(__file__).parents[1] / "docs" / "peers" / "curvlinops.md").read_text(encoding="utf-8")
    script = guide.split("```python\n")[1].split("```")[0]
    assert script.count("# before") == script.count("# after") == 1
    found = []
    for other in ("# after", "# before"):
        torch.manual_seed(0)
        names: dict[str, Any] = {}
        exec("\n".join(line for line in script.splitlines() if other not in line), names)
        found.append((names["G"] @ names["v"], names["H"] @ names["v"]))
    assert type(names["G"]) is adapter.GGNLinearOperator
    for before, after in zip(*found, strict=True):
        assert float((before - after).norm() / before.norm()) < 1e-5
