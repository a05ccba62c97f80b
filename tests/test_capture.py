"""Capture: the node list, interpreted by three lines a rule, computes what the model computes, for every number of
examples."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

import influence_ext as ie
from influence_ext.capture import CapturedGraph, capture, clear_cache, format_table
from influence_ext.capture.lowering import recurrent
from influence_ext.plan import Plan
from influence_ext.testing import assert_close
from tests.cases import NetworkCase, build
from tests.cases.capture import CASES, Case, Net, dense, frozen, interpret, normal, par, weights
from tests.cases.layers import Expression, parameter
from tests.cases.reads import READS


@functools.cache
def graph_of(case: Case) -> CapturedGraph:
    return capture(case.build(), case.pack(case.inputs(5)))


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_the_nodes_compute_what_the_model_computes(case: Case) -> None:
    graph, model = graph_of(case), case.build().eval()
    for N in (1, 2, 7):
        inputs = case.inputs(N)
        assert_close(interpret(graph, model, inputs), case.call(model, case.pack(inputs)))
    if case.rules is not None:
        assert tuple(node.rule for node in graph.nodes) == case.rules


@pytest.mark.parametrize("case", CASES[:4] + [c for c in CASES if c.id.startswith(("two", "keywords"))], ids=lambda c: c.id)
def test_one_example_is_enough_to_capture(case: Case) -> None:
    model = case.build()
    clear_cache()
    graph = capture(model, case.pack(case.inputs(1)))
    assert_close(interpret(graph, model, case.inputs(6)), case.call(model, case.pack(case.inputs(6))))


def test_slots_are_shared_and_named() -> None:
    model = Net(lambda n, x: n.b(torch.tanh(n.a(x))) * n.c + n.c, a=dense(4, 4), b=dense(4, 4), c=normal(4))
    model.b.weight = model.a.weight
    graph = capture(model, normal(3, 4))
    assert [(s.name, s.kind, s.shape) for s in graph.slots] == [
        ("a.bias", "parameter", (4,)),
        ("a.weight", "parameter", (4, 4)),
        ("b.bias", "parameter", (4,)),
        ("c", "buffer", (4,)),
    ]
    assert graph.parameter_names == ("a.bias", "a.weight", "b.bias")
    assert [node.slots for node in graph.nodes if node.slots] == [(1, 0), (1, 2), (3, -1), (-1, 3)]
    assert graph.input_shapes == ((4,),)
    assert graph.num_values == 1 + len(graph.nodes)


def test_transposed_says_how_the_weight_is_stored() -> None:
    model = Net(
        lambda n, x: F.linear(F.linear(F.linear(x, n.A) @ n.B, n.C.T) @ n.D.T, n.E),
        A=par(3, 4),
        B=par(3, 5),
        C=par(5, 2),
        D=par(6, 2),
        E=par(1, 6),
    )
    nodes = capture(model, normal(2, 4)).nodes
    assert [(n.ints["in_features"], n.ints["out_features"], n.ints["transposed"]) for n in nodes] == [
        (4, 3, 0),
        (3, 5, 1),
        (5, 2, 1),
        (2, 6, 0),
        (6, 1, 0),
    ]


def test_buffers_frozen_and_derived_slots_are_read_anew() -> None:
    model = Net(lambda n, x: (x - n.mean) / n.std * n.s, mean=normal(1, 4), std=normal(4), s=frozen(4), w=par(1))
    graph = capture(model, normal(3, 4))
    with torch.no_grad():
        for tensor in (model.mean, model.std, model.s):
            tensor.copy_(normal(*tensor.shape))
    X = normal(5, 4)
    assert_close(interpret(graph, model, [X]), model(X).detach())


def test_table_shows_every_node() -> None:
    model = Net(lambda n, x: F.elu(n.fc(x) - n.c) @ n.W + n.fc(x), fc=dense(4, 3), W=par(3, 3), c=normal(3))
    graph = capture(model, normal(2, 4))
    lines = format_table(graph, notes={graph.nodes[2].name: "measured"}).splitlines()
    assert lines[0].startswith("Net: X [N, 4] -> ")
    assert "[N, 3], torch.float64" in lines[0]
    assert len(lines) == 3 + len(graph.nodes)
    for node, line in zip(graph.nodes, lines[3:], strict=True):
        assert line.split()[:3] == [node.name, node.target, node.rule]
    assert "fc.weight, fc.bias" in lines[3]
    assert "(derived)" in lines[4]
    assert lines[5].endswith("measured")
    assert "3 -> 3, stored [in, out]" in lines[6]


STEPS: list[Callable[[nn.Module, int], Callable[[Tensor], Tensor]]] = [
    lambda net, i: net.get_submodule(f"fc{i}"),
    lambda net, i: F.gelu,
    lambda net, i: lambda h: h + torch.tanh(h),
    lambda net, i: lambda h: 0.5 * h - 1,
    lambda net, i: lambda h: h * net.get_buffer("c") + 1,
    lambda net, i: lambda h: h.view(-1, 2, 2).flatten(1),
    lambda net, i: lambda h: h @ net.get_parameter("W").T + net.get_parameter("b"),
]


@hypothesis.settings(max_examples=12)
@hypothesis.given(st.lists(st.integers(0, len(STEPS) - 1), min_size=1, max_size=8))
def test_any_chain_of_supported_steps(chain: list[int]) -> None:
    def run(net: Any, x: Tensor) -> Tensor:
        for i, step in enumerate(chain):
            x = STEPS[step](net, i)(x)
        return x

    torch.manual_seed(len(chain))
    model = Net(run, c=normal(4), **weights(), **{f"fc{i}": dense(4, 4) for i in range(len(chain))})
    X = normal(6, 4)
    assert_close(interpret(capture(model, X), model, [X]), model(X).detach())


@pytest.mark.parametrize(("dtype", "other"), [(torch.float32, torch.float64), (torch.float64, torch.float32)])
def test_an_island_of_another_precision_is_computed_in_it(dtype: torch.dtype, other: torch.dtype) -> None:
    """And the rest natively: Llama-like norms, softmax of Hugging Face's attention."""
    torch.manual_seed(0)
    model = Net(
        lambda n, x: n.out(F.softmax(n.fc(x).to(other) * n.c.to(other), -1).to(x.dtype)), fc=dense(4, 4), out=dense(4, 3), c=normal(4)
    )
    model, X = model.to(dtype), normal(5, 4).to(dtype)
    plan = Plan.of(model, X)
    assert [node.rule for node in plan.graph.nodes] == ["linear", "generic", "linear"]
    assert f"as {other} where the parameters are {dtype}" in plan.report()
    theta = {name: p.detach() for name, p in model.named_parameters()}
    v = torch.randn(1, plan.space.num_parameters, dtype=dtype)
    tangent = {name: t[0] for name, t in plan.space.unflatten(v).items()}
    y, expected = torch.func.jvp(lambda t: torch.func.functional_call(model, t, (X,)), (theta,), (tangent,))
    tape = plan.linearize(X)
    assert torch.allclose(tape.outputs, y, rtol=0, atol=1e-6)
    assert torch.allclose(tape.jvp(v)[0], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", READS, ids=lambda case: case.id)
def test_parameters_read_in_part_are_no_expressions(case: NetworkCase) -> None:
    network = build(case, torch.float64)
    plan = Plan.of(network.model, network.X)
    assert not plan.has_derived_parameters, plan.report()
    assert all(node.operator is None for node in plan.graph.nodes), "a node runs in torch"


def test_rows_follow_the_buffer_that_picks_them() -> None:
    """A graph is kept by structure; which rows a buffer picks is not part of that."""
    model = Expression(lambda m, x: m.fc(x) * m.w[m.i], fc=nn.Linear(3, 3).double(), w=parameter(9, 3), i=torch.tensor([3, 1, 1]))
    X = torch.randn(4, 3, 3, dtype=torch.float64)
    plan = Plan.of(model, X)
    assert torch.allclose(plan.linearize(X).outputs, model(X))
    model.i.copy_(torch.tensor([0, 8, 8]))  # type: ignore[operator, union-attr]
    tape = Plan.of(model, X).linearize(X)
    assert Plan.of(model, X).graph is plan.graph
    assert torch.allclose(tape.outputs, model(X))
    gradients = torch.autograd.grad(model(X).sum(), list(model.parameters()))
    assert torch.allclose(tape.vjp(torch.ones(1, *tape.outputs.shape, dtype=X.dtype))[0], torch.cat([g.flatten() for g in gradients]))
    model.i[0] = 9  # type: ignore[operator, index]
    with pytest.raises(IndexError, match="9"):
        plan.linearize(X)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_steps_that_are_alike_share_a_line_of_the_report(kind: type[nn.RNNBase]) -> None:
    counts = []
    for num_steps in (8, 20):
        model = Net(lambda n, x: n.out(n.rnn(x)[0][:, 0]), rnn=kind(4, 3, bidirectional=True, batch_first=True), out=dense(6, 2)).float()
        X = torch.randn(3, num_steps, 4)
        report = Plan.of(model, X).report()
        lines = ie.Hessian(model, nn.MSELoss(), (X, torch.randn(3, 2))).report().splitlines()
        assert max(map(len, lines)) < 400
        name = next(node.name for node in Plan.of(model, X).graph.nodes if node.name.endswith("_inputs")).removesuffix("_inputs")
        assert f"{name}_1 ... {name}_{num_steps - 1}: as {name}_0" in report.splitlines()
        assert f"{name}_reverse_{num_steps - 2} ... {name}_reverse_0: as {name}_reverse_{num_steps - 1}" in report.splitlines()
        assert max(map(len, report.splitlines())) < 250
        counts.append(len(report.splitlines()))
    assert counts[0] == counts[1] < 60


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_are_unrolled_up_to_a_number_of_steps(kind: type[nn.RNNBase], monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of all layers and directions count; beyond the limit, and as computed by it, torch runs the layer as a whole."""
    torch.manual_seed(0)
    model = Net(
        lambda n, x: n.out(n.rnn(x)[0][:, -1]), rnn=kind(4, 3, num_layers=2, bidirectional=True, batch_first=True), out=dense(6, 2)
    ).double()
    X, V = normal(5, 6, 4), torch.randn(2, sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    monkeypatch.setattr(recurrent, "MAX_STEPS", 24)
    clear_cache()
    unrolled = Plan.of(model, X)
    monkeypatch.setattr(recurrent, "MAX_STEPS", 23)
    clear_cache()
    whole = Plan.of(copy.deepcopy(model), X)
    assert "generic" not in unrolled.report()
    assert [node.rule for node in whole.graph.nodes if node.target.endswith(".input")] == ["generic"]
    assert_close(unrolled.linearize(X).jvp(V), whole.linearize(X).jvp(V))
    share = sum(node.operations for node in unrolled.graph.nodes) / sum(node.operations for node in whole.graph.nodes)
    assert 0.8 < share < 2.0, "the arithmetic of a layer is counted once, unrolled or not"
