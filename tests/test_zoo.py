"""Whole models: every product of the library against oracles that share no code with it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import influence_ext as ie
from influence_ext import errors, reference
from influence_ext.capture import clear_cache
from influence_ext.plan import Plan
from influence_ext.testing import assert_close
from tests.cases import eager, subset
from tests.cases.zoo import MINILM, ZOO, ModelCase, WholeModel, whole

F64 = torch.float64
TIMES_THE_EXPORT = 15  # a capture may take so many times what torch.export takes of it; measured: at most 3


def _rows() -> Iterator[object]:
    for dtype, suffix in ((F64, "f64"), (torch.float32, "f32")):
        for case in ZOO:
            if dtype in case.dtypes:
                marks = () if case.quick and dtype == F64 else pytest.mark.slow
                yield pytest.param((case, dtype), id=f"{case.id}-{suffix}", marks=marks)


@pytest.fixture(params=_rows())
def model(request: pytest.FixtureRequest) -> WholeModel:
    return whole(*request.param)


structures = pytest.mark.parametrize("case", [pytest.param(case, id=case.id, marks=() if case.quick else pytest.mark.slow) for case in ZOO])


def plain(run: Callable[..., Tensor], *args: object) -> Callable[[], Tensor]:
    """Eager torch with kernels that have a forward mode."""

    def later() -> Tensor:
        with reference.plain_kernels():
            return run(*args)

    return later


def test_outputs(model: WholeModel) -> None:
    tape = Plan.of(model.model, model.X, model.case.params).linearize(model.X)
    assert_close(tape.outputs, model.outputs, eager=plain(eager.outputs, model.peer))


def test_jvp(model: WholeModel) -> None:
    T = ie.jvp(model.model, model.X, model.V, params=model.case.params)
    assert_close(T, model.tangents, eager=plain(eager.jacobian_products, model.peer, model.V))


def test_vjp(model: WholeModel) -> None:
    W = ie.vjp(model.model, model.X, model.G, params=model.case.params)
    assert_close(W, model.cotangents, eager=plain(eager.jacobian_transpose_products, model.peer, model.G))


def test_ggn(model: WholeModel) -> None:
    G = ie.GGN(model.model, model.loss, model.data, params=model.case.params)
    assert_close(G.matmat(model.V), model.products, eager=plain(eager.ggn_products, model.peer, model.V))


def test_hessian(model: WholeModel) -> None:
    H = ie.Hessian(model.model, model.loss, model.data, params=model.case.params)
    if not model.case.twice:
        with pytest.raises(errors.UnsupportedModelError, match="operators that PyTorch differentiates twice, got"):
            H.matmat(model.V)
        return
    assert_close(H.matmat(model.V), model.hessian_products, eager=plain(eager.hessian_products, model.peer, model.V))


def test_per_example_gradients(model: WholeModel) -> None:
    grads = ie.per_example_grads(model.model, model.loss, model.data, params=model.case.params)
    flat = torch.cat([g.reshape(model.N, -1) for g in grads.values()], dim=1)
    assert list(grads) == list(reference.trainable(model.restricted))
    assert_close(flat, model.grads, eager=plain(eager.per_example_grads, model.peer))


def test_norms(model: WholeModel) -> None:
    norms = ie.per_example_norms(model.model, model.loss, model.data, params=model.case.params)
    peer = plain(eager.per_example_grads, model.peer)
    assert_close(norms, model.grads.norm(dim=1), eager=lambda: peer().norm(dim=1))


@structures
def test_one_capture_serves_every_number_of_examples(case: ModelCase, monkeypatch: pytest.MonkeyPatch) -> None:
    model = whole(case, case.dtypes[0])
    export, exports = torch.export.export, []

    def timed(*args: object, **options: object) -> object:
        start = time.process_time()
        try:
            return export(*args, **options)  # type: ignore[arg-type]
        finally:
            exports.append(time.process_time() - start)

    monkeypatch.setattr(torch.export, "export", timed)
    clear_cache()
    start = time.process_time()
    plan = Plan.of(model.model, subset(model.X, slice(0, 1)), case.params)
    taken = time.process_time() - start
    assert len(exports) == 1
    if plan.graph.fallback is None:
        assert taken < TIMES_THE_EXPORT * exports[0]
    assert Plan.of(model.model, model.X, case.params).graph is plan.graph
    assert len(exports) == 1
    peer = None if model.dtype == F64 else plain(eager.jacobian_products, model.peer, model.V)()
    for examples in ([0], [0, 1, 2], [2, 0]):
        T = plan.linearize(subset(model.X, examples)).jvp(model.V)
        yardstick = None if peer is None else peer[:, examples]
        assert_close(T, model.tangents[:, examples], scale=float(model.tangents.norm()), eager=yardstick)


@structures
def test_the_report_tells_what_runs_in_torch(case: ModelCase) -> None:
    model = whole(case, case.dtypes[0])
    plan = Plan.of(model.model, model.X, case.params)
    report, graph = plan.report(), plan.graph
    generic = [node for node in graph.nodes if node.rule == "generic"]
    for node in generic:
        assert any(line.split()[:3] == [node.name, node.target, "generic"] for line in report.splitlines())
    assert ("generic: " in report) == bool(generic)
    if graph.fallback is not None:
        assert graph.fallback in report
        assert case.generic_share == 1.0
    elif generic:
        assert all(node.target in report.split("generic: ")[-1] for node in generic)
        assert graph.generic_share <= case.generic_share


@pytest.mark.slow
def test_a_trained_sentence_encoder() -> None:
    """22 million parameters: products against forward mode and plain gradients, one vector and two sentences."""
    model = whole(MINILM, torch.float32)
    plan = Plan.of(model.model, model.X)
    tape = plan.linearize(model.X)
    V = model.V[:1]
    assert_close(tape.outputs, model.outputs, eager=plain(eager.outputs, model.peer))
    assert_close(tape.jvp(V), reference.jacobian_products(model.model, model.X, V), eager=plain(eager.jacobian_products, model.peer, V))
    norms = ie.per_example_norms(model.model, model.loss, model.data)
    assert_close(norms, model.grads.norm(dim=1), eager=lambda: plain(eager.per_example_grads, model.peer)().norm(dim=1))
    G = ie.GGN(model.model, model.loss, model.data)
    expected = reference.ggn_products(model.model, model.loss_case.oracle(), model.X, model.y, V, model.loss_case.reduction)
    assert_close(G.matmat(V), expected, eager=plain(eager.ggn_products, model.peer, V))
