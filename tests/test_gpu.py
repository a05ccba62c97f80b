"""The operator tables, the losses and the influence functions on a GPU, against the same float64 oracles on the CPU."""

from __future__ import annotations

import copy
import gc
import threading
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

import influence_ext as ie
import influence_ext._C as _C
from influence_ext import reference
from influence_ext.bregman.training import Trainer
from influence_ext.errors import DeviceError
from influence_ext.losses import resolve
from influence_ext.plan import Plan
from influence_ext.solvers import CG
from influence_ext.testing import assert_close
from tests.cases import Network, NetworkCase, build, cast, generator
from tests.cases.families import RULE_ROWS
from tests.cases.losses import LOSSES, LossCase
from tests.test_families import row

__all__ = ["row"]

pytestmark = pytest.mark.gpu


def on_gpu(x: Any) -> Any:
    """The same in the GPU's memory."""
    if isinstance(x, Mapping):
        return {key: on_gpu(value) for key, value in x.items()}
    return x.cuda() if isinstance(x, Tensor) else tuple(on_gpu(value) for value in x)


def test_every_product(row: Network) -> None:
    model, X, y = copy.deepcopy(row.model).cuda(), on_gpu(row.X), on_gpu(row.y)
    tape = Plan.of(model, X).linearize(X)
    scope = row.case.scope
    assert_close(tape.outputs.cpu(), row.outputs, scope=scope)
    V, G = row.random("V", 5, row.P), row.random("G", 3, *row.outputs.shape)
    tangents = torch.einsum("ncp,vp->vnc", row.jacobian, V.double()).reshape(5, *row.outputs.shape)
    cotangents = torch.einsum("ncp,vnc->vp", row.jacobian, G.double().reshape(3, row.N, -1))
    assert_close(tape.jvp(V.cuda()).cpu(), tangents, scope=scope)
    assert_close(tape.vjp(G.cuda()).cpu(), cotangents, scope=scope)
    hessian = resolve(row.loss).hessian(tape.outputs, y).scaled(row.factor)
    first = tape.ggn(V.cuda(), hessian)
    assert first.device == tape.outputs.device
    assert_close(first.cpu(), row.ggn_matmat(V), scope=scope)
    assert torch.equal(first, tape.ggn(V.cuda(), hessian)), "products do not repeat"


@pytest.mark.parametrize("case", RULE_ROWS, ids=lambda case: case.id)
def test_hessian(case: NetworkCase) -> None:
    network = build(case, torch.float64)
    V = network.random("V", 3, network.P)
    H = ie.Hessian(copy.deepcopy(network.model).cuda(), network.loss, (on_gpu(network.X), on_gpu(network.y)))
    assert_close(H.matmat(V.cuda()).cpu(), network.hessian_matmat(V), scope=case.scope)


def test_every_per_example_quantity(row: Network) -> None:
    model, data = copy.deepcopy(row.model).cuda(), (on_gpu(row.X), on_gpu(row.y))
    scope = row.case.scope
    grads = ie.per_example_grads(model, row.loss, data)
    assert_close(torch.cat([g.reshape(row.N, -1) for g in grads.values()], dim=1).cpu(), row.grads, scope=scope)
    assert_close(ie.per_example_norms(model, row.loss, data).cpu(), row.grads.norm(dim=1), scope=scope)
    assert_close(ie.grad_gram(model, row.loss, data).cpu(), row.grads @ row.grads.T, scope=scope)


@pytest.mark.parametrize("case", LOSSES.values(), ids=lambda case: case.id)
def test_every_loss(case: LossCase) -> None:
    rng = generator(case.id)
    z = case.outputs(6, rng).requires_grad_()
    y = cast(case.targets(z.detach(), rng), torch.float64)
    loss, oracle = resolve(case.make()), case.oracle()
    values = torch.stack([oracle(z[n : n + 1], y[n : n + 1]) for n in range(6)])
    (gradients,) = torch.autograd.grad(values.sum(), z)
    z = z.detach().cuda()
    assert_close(loss.value(z, y.cuda()).cpu(), values.detach(), scope="model")
    assert_close(loss.gradient(z, y.cuda()).cpu(), gradients, scope="model")


def test_streams_and_solvers() -> None:
    """A product on a stream of its own, and scores by CG, agree with the CPU's."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3)).double()
    X, y = torch.randn(40, 6, dtype=torch.float64), torch.randint(3, (40,))
    here = ie.Influence(model, torch.nn.CrossEntropyLoss(), (X, y), damping=1e-2).scores((X[:5], y[:5]))
    model, X, y = copy.deepcopy(model).cuda(), X.cuda(), y.cuda()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        there = ie.Influence(model, torch.nn.CrossEntropyLoss(), (X, y), damping=1e-2).scores((X[:5], y[:5]))
    stream.synchronize()
    assert_close(there.values.cpu(), here.values.cpu(), scope="model")


@pytest.mark.parametrize("size", [6143, 6144])
def test_pools_of_planes_that_need_all_shared_memory(size: int) -> None:
    """Two integers a pixel fill the 48 KB of a launch that asks for no more, and the kernel has a variable beside them."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv1d(1, 2, 1), torch.nn.MaxPool1d(3, stride=2)).double()
    X = torch.randn(2, 1, size, dtype=torch.float64)
    tape = Plan.of(model, X).linearize(X)
    G = torch.randn(3, *tape.outputs.shape, dtype=torch.float64)
    there = Plan.of(copy.deepcopy(model).cuda(), X.cuda()).linearize(X.cuda())
    assert_close(there.vjp(G.cuda()).cpu(), tape.vjp(G), scope="model")


def small_problem() -> tuple[torch.nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3)).double()
    return model, torch.randn(40, 6, dtype=torch.float64), torch.randint(3, (40,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("preconditioner", [None, "jacobi"])
def test_cg_ends_as_on_the_cpu(preconditioner: Any, dtype: torch.dtype) -> None:
    """Solutions and statuses, however seldom the host looks; the scalars never leave the device in between."""
    model, X, y = small_problem()
    model, X = model.to(dtype), X.to(dtype)
    loss = torch.nn.CrossEntropyLoss()
    here = ie.GGN(model, loss, (X, y), damping=1e-1)
    there = ie.GGN(copy.deepcopy(model).cuda(), loss, (X.cuda(), y.cuda()), damping=1e-1)
    B = torch.randn(5, here.num_parameters, dtype=dtype)
    B[1] = 0
    expected = CG(rtol=1e-4, preconditioner=preconditioner, reorthogonalise=0).solve(here, B)
    for check_every in (None, 1, 3):
        found = CG(rtol=1e-4, preconditioner=preconditioner, check_every=check_every).solve(there, B.cuda())
        assert found.status == expected.status
        # to the tolerance of the solves, which rounding may end a step apart
        assert float((found.value.cpu() - expected.value).norm() / expected.value.norm()) < 1e-2


def test_streams_at_the_same_time() -> None:
    """Products of one operator, enqueued on several streams before any is waited for."""
    model, X, y = small_problem()
    G = ie.GGN(model.cuda(), torch.nn.CrossEntropyLoss(), (X.cuda(), y.cuda()))
    V = torch.randn(4, 3, G.num_parameters, dtype=torch.float64, device="cuda")
    expected = [G.matmat(v) for v in V]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in V]
    found = []
    for stream, v in zip(streams, V, strict=True):
        with torch.cuda.stream(stream):
            found.append(G.matmat(v))
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_trainings_together_end_as_one_by_one() -> None:
    """In the core, all sets at once, and no step waits for the device."""
    g = generator("together on the GPU")
    X, y = torch.randn(40, 6, generator=g, dtype=torch.float64), torch.randint(3, (40,), generator=g)
    net = torch.nn.Sequential
    recipe = ie.Recipe(
        lambda: net(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3)).double(),
        torch.nn.CrossEntropyLoss(),
        lr=0.05,
        epochs=3,
        batch_size=16,
        device="cuda",
    )
    run = ie.train(recipe, (X, y))
    groups = [[3], [1, 17, 30], []]
    for group, response in zip(groups, ie.retrain_many(run, groups), strict=True):
        assert response.one_by_one is None
        assert_close(response.params.cpu(), ie.retrain(run, group).params.cpu())
    trainer = Trainer(run.recipe, copy.deepcopy(run.model), run.loss, run.data)
    ensemble = Plan.of(trainer.model.eval(), trainer.examples.X).ensemble(trainer.examples, trainer.loss)
    assert ensemble is not None
    theta, batch = run.params.repeat(3, 1), torch.arange(16, device="cuda")
    kept, moments = torch.ones(3, 16, dtype=torch.bool, device="cuda"), [torch.zeros_like(theta)]
    numbers = {"lr": 0.1, "momentum": 0.9}
    ensemble.step(theta, moments, batch, scale=1.0, kept=kept, descent=numbers)
    torch.cuda.set_sync_debug_mode("error")
    try:
        ensemble.step(theta, moments, batch, scale=1.0, kept=kept, descent=numbers)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_tensors_on_another_gpu_than_the_current_one() -> None:
    """What is computed lies with the tensors, and the current device stays what it was."""
    model, X, y = small_problem()
    loss = torch.nn.CrossEntropyLoss()
    expected = ie.GGN(model, loss, (X, y), damping=1e-2)
    V = torch.randn(3, expected.num_parameters, dtype=torch.float64)
    torch.cuda.set_device(0)
    operators = [ie.GGN(copy.deepcopy(model).to(d), loss, (X.to(d), y.to(d)), damping=1e-2) for d in ("cuda:1", "cuda:0", "cuda:1")]
    for G in operators:
        product = G.matmat(V.to(G.device))
        solution = CG(rtol=1e-8).solve(G, V.to(G.device)).value
        assert product.device == solution.device == G.device
        assert_close(product.cpu(), expected.matmat(V), scope="model")
        assert float((expected.matmat(solution.cpu()) - V).norm() / V.norm()) < 1e-7
    assert torch.cuda.current_device() == 0


def test_out_of_memory_is_a_sentence_and_nothing_is_lost() -> None:
    model, X, y = small_problem()
    G = ie.GGN(model.cuda(), torch.nn.CrossEntropyLoss(), (X.cuda(), y.cuda()), schedule="by_operator")
    V = torch.randn(2, G.num_parameters, dtype=torch.float64, device="cuda")
    before, parameters = G.matmat(V), [p.detach().clone() for p in model.parameters()]
    torch.cuda.empty_cache()
    many = torch.randn(20000, G.num_parameters, dtype=torch.float64, device="cuda")
    result = torch.empty_like(many)
    del result  # stays in torch's cache: the result fits, and what the product needs in between (100 MB an activation) does not
    limit = torch.cuda.memory_reserved() + 2**22
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(0).total_memory)
    try:
        with pytest.raises(
            MemoryError, match=r"expected \d+ bytes .* on cuda:0, got none \(\d+ bytes are free there\); give memory_budget="
        ):
            G.matmat(many)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert torch.equal(G.matmat(V), before)
    assert all(torch.equal(a, b) for a, b in zip(parameters, model.parameters(), strict=True))


@pytest.mark.parametrize(("width", "classes"), [pytest.param(256, 10, id="aligned"), pytest.param(255, 9, id="odd")])
@pytest.mark.parametrize("schedule", ["by_operator", "by_example"])
@pytest.mark.parametrize(("precision", "limit"), [("full", 2e-6), ("tf32", 2e-3), ("bfloat16", 2e-2)])
def test_precisions_of_the_matrix_product(precision: Any, limit: float, schedule: Any, width: int, classes: int) -> None:
    """Relative error of a GGN product of an MLP 256-256-10 against float64: float32 has 24 bits, TF32 11, bfloat16 8.

    By operator the vendor's products, by example the chain's kernel. All right-hand sides share the layers' inputs, a batch stride of zero;
    with odd widths, rows and the tangents of the second right-hand side begin at odd addresses.
    """
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(256, width), torch.nn.Tanh(), torch.nn.Linear(width, classes))
    X, y, loss = torch.randn(128, 256), torch.randint(classes, (128,)), torch.nn.CrossEntropyLoss()
    V = torch.randn(2, sum(p.numel() for p in model.parameters()))
    exact = reference.ggn_products(model, torch.nn.functional.cross_entropy, X, y, V)
    G = ie.GGN(copy.deepcopy(model).cuda(), loss, (X.cuda(), y.cuda()), precision=precision, schedule=schedule)
    product = G.matmat(V.cuda()).cpu().double()
    error = float((product - exact).norm() / exact.norm())
    assert error < limit
    assert precision == "full" or error > 1e-5, "full precision where less was asked for"


@pytest.mark.parametrize(("N", "V"), [(50, 2), (1000, 3), (2000, 40)], ids=["one run", "small tiles", "large tiles"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_chain_in_one_kernel(dtype: torch.dtype, N: int, V: int) -> None:
    """8-200-256-3, forced into the chain's kernel, against plain PyTorch in float64."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(8, 200), torch.nn.Tanh(), torch.nn.Linear(200, 256), torch.nn.Tanh(), torch.nn.Linear(256, 3)]
    model = torch.nn.Sequential(*layers).to(dtype)
    X, y = torch.randn(N, 8, dtype=dtype), torch.randint(3, (N,))
    vectors = torch.randn(V, sum(p.numel() for p in model.parameters()), dtype=dtype)
    exact = reference.ggn_products(model, torch.nn.functional.cross_entropy, X, y, vectors)
    G = ie.GGN(copy.deepcopy(model).cuda(), torch.nn.CrossEntropyLoss(), (X.cuda(), y.cuda()), schedule="by_example")
    assert "by example" in G.report()
    error = float((G.matmat(vectors.cuda()).cpu().double() - exact).norm() / exact.norm())
    assert error < (2e-6 if dtype == torch.float32 else 1e-12)


LONG_LINES = [9001, 50_257, 240_001]
"""Elements of lines that stay in shared memory, from sm_90 on in that of 8 blocks that read each other's; of the longest not all does."""


class Weighted(torch.nn.Module):
    """The softmax of ``x ∘ w``."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(x * self.weight, -1)


def softmax_product(p: Tensor, u: Tensor) -> Tensor:
    """``(diag p - p pᵀ) u`` of lines."""
    return p * (u - (p * u).sum(-1, keepdim=True))


@pytest.mark.parametrize("K", LONG_LINES)
def test_softmax_of_a_long_line(K: int, dtype: torch.dtype) -> None:
    g = generator(f"a long line of {K}")
    X, w, V, G = (torch.randn(*shape, generator=g).double() for shape in ((2, K), (K,), (2, K), (2, 2, K)))
    model = Weighted(w.to(dtype)).cuda()
    x = X.to(dtype).cuda()
    tape = Plan.of(model, x).linearize(x)
    p = torch.softmax(X * w, -1)
    assert_close(tape.outputs.cpu(), p, scope="layer")
    assert_close(tape.jvp(V.to(dtype).cuda()).cpu(), softmax_product(p, X * V[:, None]), scope="layer")
    first = tape.vjp(G.to(dtype).cuda())
    assert_close(first.cpu(), (X * softmax_product(p, G)).sum(1), scope="layer")
    assert torch.equal(first, tape.vjp(G.to(dtype).cuda())), "products do not repeat"


@pytest.mark.parametrize("K", LONG_LINES)
def test_cross_entropy_of_a_long_line(K: int, dtype: torch.dtype) -> None:
    g = generator(f"classes of a long line of {K}")
    z, u, y = torch.randn(2, K, generator=g).double(), torch.randn(1, 2, K, generator=g).double(), torch.tensor([3, K - 1])
    make = torch.nn.CrossEntropyLoss(reduction="sum")
    loss, there, labels = resolve(make), z.to(dtype).cuda(), y.cuda()
    assert_close(loss.value(there, labels).cpu(), reference.loss_values(make, z, y), scope="layer")
    assert_close(loss.gradient(there, labels).cpu(), reference.loss_gradient(make, z, y), scope="layer")
    product = loss.hessian(there, labels).matmat(u.to(dtype).cuda())
    assert_close(product.cpu(), softmax_product(torch.softmax(z, -1), u), scope="layer")


def test_a_replayed_product_of_a_long_line(dtype: torch.dtype) -> None:
    K = 50_257
    g = generator("a replayed long line")
    X, W, b, y = torch.randn(2, 3, generator=g), torch.randn(K, 3, generator=g), torch.randn(K, generator=g), torch.tensor([3, K - 1])
    model = torch.nn.Linear(3, K)
    with torch.no_grad():
        model.weight.copy_(W)
        model.bias.copy_(b)
    model, data = model.to(dtype).cuda(), (X.to(dtype).cuda(), y.cuda())
    replayed, launched = (ie.GGN(model, torch.nn.CrossEntropyLoss(), data, graphs=graphs) for graphs in ("always", "never"))
    p, x = torch.softmax(X.double() @ W.double().T + b.double(), -1), X.double()
    for _ in range(4):
        V = torch.randn(1, replayed.num_parameters, generator=g)
        weights, biases = V.double()[:, : 3 * K].reshape(1, K, 3), V.double()[:, 3 * K :]
        h = softmax_product(p, torch.einsum("ni,vki->vnk", x, weights) + biases[:, None]) / 2
        expected = torch.cat([torch.einsum("vnk,ni->vki", h, x).flatten(1), h.sum(1)], dim=1)
        product = replayed.matmat(V.to(dtype).cuda())
        assert torch.equal(product, launched.matmat(V.to(dtype).cuda()))
        assert_close(product.cpu(), expected, scope="model")
    assert "replayed as a graph of" in replayed.report()


def test_a_tensor_elsewhere_is_refused() -> None:
    model = torch.nn.Linear(3, 2).cuda()
    with pytest.raises(DeviceError, match="parameters' device"):
        ie.GGN(model, torch.nn.MSELoss(), (torch.randn(4, 3), torch.randn(4, 2)))


@pytest.mark.parametrize("kind", [ie.GGN, ie.Hessian, ie.EmpiricalFisher])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_replayed_products(kind: Any, dtype: torch.dtype) -> None:
    """To the last digit what launches give: other vectors, dampings, parameters, numbers of vectors, after memory was freed and taken."""
    model, X, y = small_problem()
    model, X, y = model.to(dtype).cuda(), X.to(dtype).cuda(), y.cuda()
    loss = torch.nn.CrossEntropyLoss()
    replayed, launched = (kind(model, loss, (X, y), damping=0.25, graphs=graphs) for graphs in ("always", "never"))
    P = replayed.num_parameters
    for _ in range(4):
        for V in (1, 5):
            v = torch.randn(V, P, dtype=dtype, device="cuda")
            assert torch.equal(replayed.matmat(v), launched.matmat(v))
            assert torch.equal(replayed.damped(0.5).matmat(v), launched.damped(0.5).matmat(v))
        torch.cuda.empty_cache()
        junk = torch.full((2**20,), torch.nan, dtype=dtype, device="cuda")
        del junk
        theta = torch.randn(P, dtype=dtype, device="cuda")
        for operator in (replayed, launched):
            operator.tape.relinearize(theta)
            operator._prepare()
    assert "replayed as a graph of" in replayed.report()


@pytest.mark.parametrize("preconditioner", [None, "jacobi"])
def test_replayed_steps_of_cg(preconditioner: Any) -> None:
    model, X, y = small_problem()
    data, loss = (X.cuda(), y.cuda()), torch.nn.CrossEntropyLoss()
    model = model.cuda()
    replayed, launched = (ie.GGN(model, loss, data, damping=2**-6, graphs=graphs) for graphs in ("always", "never"))
    solver = CG(rtol=1e-9, preconditioner=preconditioner, reorthogonalise=0)
    for _ in range(3):
        B = torch.randn(6, replayed.num_parameters, dtype=torch.float64, device="cuda")
        B[2] = 0
        found, expected = solver.solve(replayed, B), solver.solve(launched, B)
        assert torch.equal(found.value, expected.value)
        assert found.status == expected.status
        assert found.stats == expected.stats


def test_replays_on_several_streams_and_in_threads() -> None:
    model, X, y = small_problem()
    G = ie.GGN(model.cuda(), torch.nn.CrossEntropyLoss(), (X.cuda(), y.cuda()), damping=2**-6, graphs="always")
    V = torch.randn(4, 3, G.num_parameters, dtype=torch.float64, device="cuda")
    solver = CG(rtol=1e-9, reorthogonalise=0)
    expected = [(G.matmat(v), solver.solve(G, v).value) for v in V]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream(), torch.cuda.Stream(), None, None]  # the last two share the default stream
    found: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def work(which: int) -> None:
        with torch.cuda.stream(streams[which]):
            found[which] = []
            for _ in range(5):
                torch.randn(10, device="cuda")  # others may draw random numbers while somebody captures
                found[which].append((G.matmat(V[which]), solver.solve(G, V[which]).value))

    threads = [threading.Thread(target=work, args=(which,)) for which in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    for which, results in found.items():
        assert len(results) == 5
        for product, solution in results:
            assert torch.equal(product, expected[which][0])
            assert torch.equal(solution, expected[which][1])
    assert len(found) == 4


def test_a_product_in_a_graph_of_the_users() -> None:
    model, X, y = small_problem()
    G = ie.GGN(model.cuda(), torch.nn.CrossEntropyLoss(), (X.cuda(), y.cuda()), damping=0.25)
    v = torch.randn(2, G.num_parameters, dtype=torch.float64, device="cuda")
    for _ in range(3):
        G.matmat(v)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = G.matmat(v)
    for _ in range(2):
        v.copy_(torch.randn_like(v))
        graph.replay()
        assert_close(result.cpu(), G.matmat(v).cpu(), scope="model")


def test_a_capture_that_fails_leaves_the_device_usable() -> None:
    model, X, y = small_problem()
    G = ie.GGN(model.cuda(), torch.nn.CrossEntropyLoss(), (X.cuda(), y.cuda()), graphs="always")
    v = torch.randn(2, G.num_parameters, dtype=torch.float64, device="cuda")
    expected = G.matmat(v)
    lookup = torch.nn.Sequential(torch.nn.Embedding(5, 3), torch.nn.Flatten(), torch.nn.Linear(6, 2)).cuda()
    indices = torch.randint(5, (4, 2), device="cuda")
    embedding = Plan.of(lookup, indices).linearize(indices)

    def waits() -> None:
        G.matmat(v)
        torch.cuda.synchronize()

    with pytest.raises(RuntimeError):
        _C.Graph(v.device, waits)
    with pytest.raises(RuntimeError, match="expected launches alone while a CUDA graph is captured, got a copy"):
        _C.Graph(v.device, lambda: embedding.relinearize(embedding.theta))  # reads back whether indices are in range
    for _ in range(3):
        assert torch.equal(G.matmat(v), expected)


def test_memory_of_graphs_is_given_back() -> None:
    model, X, y = small_problem()
    model, data = model.cuda(), (X.cuda(), y.cuda())
    for _ in range(2):  # the first time torch and cuBLAS take what they keep
        gc.collect()
        before = torch.cuda.memory_allocated()
        G = ie.GGN(model, torch.nn.CrossEntropyLoss(), data, damping=0.25, graphs="always")
        for V in range(1, 30):
            v = torch.randn(V, G.num_parameters, dtype=torch.float64, device="cuda")
            for _ in range(3):
                G.matmat(v)
        del G, v
        gc.collect()
        after = torch.cuda.memory_allocated()
    assert after == before
