"""The nodes themselves: forward values, the rule a row is meant to exercise, both schedules, and the do-nothing rule."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from influence_ext import _C, reference
from influence_ext.losses import resolve
from influence_ext.plan import Plan
from influence_ext.testing import assert_close
from tests.cases import Network, NetworkCase, build, eager, in_float64
from tests.cases.layers import LAYERS
from tests.cases.models import NETWORKS

F64 = torch.float64


def test_forward_matches_the_module(network: Network) -> None:
    tape = Plan.of(network.model, network.X).linearize(network.X)
    assert_close(tape.outputs, network.outputs, scope=network.case.scope, eager=partial(eager.outputs, network))
    assert tape.num_examples == network.N


def test_forward_at_other_parameters(network: Network) -> None:
    theta = reference.parameter_vector(network.model) + 0.1 * network.random("step", network.P).double()
    theta = theta.to(network.dtype)
    moved = reference.with_parameters(network.model, theta.double())
    expected = reference.outputs(moved, network.X)
    plan = Plan.of(network.model, network.X)
    tape = plan.linearize(network.X, theta)
    assert_close(tape.outputs, expected, scope=network.case.scope, eager=partial(eager.outputs, network, theta))
    v = network.random("v", network.P)
    there = tape.jvp(v[None])
    tape.relinearize(plan.space.values(network.model))
    back = tape.jvp(v[None])
    assert torch.equal(back, plan.linearize(network.X).jvp(v[None]))
    tape.relinearize(theta)
    assert torch.equal(tape.jvp(v[None]), there)


@pytest.mark.parametrize("case", LAYERS, ids=lambda case: case.id)
def test_rows_run_through_the_rule_they_name(case: NetworkCase) -> None:
    network = build(case, F64)
    assert case.rules <= {node.rule for node in Plan.of(network.model, network.X).graph.nodes}


@pytest.mark.parametrize("schedule", ["by_example", "by_operator"])
def test_schedules_agree(problem: Network, schedule: str, threads: Callable[[int], None]) -> None:
    tape = Plan.of(problem.model, problem.X).linearize(problem.X)
    tape.set_schedule(schedule)
    hessian = resolve(problem.loss).hessian(tape.outputs, problem.y).scaled(problem.factor)
    V, G = problem.random("V", 3, problem.P), problem.random("G", 3, *problem.outputs.shape)
    J, scope = problem.jacobian, problem.case.scope
    tangents = torch.einsum("ncp,vp->vnc", J, V.double()).reshape(G.shape)
    cotangents = torch.einsum("ncp,vnc->vp", J, G.double().reshape(3, problem.N, -1))
    products = problem.ggn_matmat(V)
    peers = [
        cache(partial(eager.jacobian_products, problem, V)),
        cache(partial(eager.jacobian_transpose_products, problem, G)),
        cache(partial(eager.ggn_products, problem, V)),
    ]
    for num_threads in (1, 2):
        threads(num_threads)
        assert_close(tape.jvp(V), tangents, scope=scope, eager=peers[0])
        assert_close(tape.vjp(G), cotangents, scope=scope, eager=peers[1])
        first = tape.ggn(V, hessian)
        assert_close(first, products, scope=scope, eager=peers[2])
        assert torch.equal(first, tape.ggn(V, hessian))


def test_forced_schedules_are_told() -> None:
    network = build(NETWORKS["mlp-many"], F64)
    tape = Plan.of(network.model, network.X).linearize(network.X)
    for schedule, words in (("by_example", "by example"), ("by_operator", "by operator")):
        tape.set_schedule(schedule)
        assert tape.schedule(1).startswith(words)


@pytest.mark.parametrize("size", [(6, 10), (14, 14), (28, 28), (2, 34), (7, 9)])
def test_a_max_pool_takes_the_first_of_equals(size: tuple[int, int]) -> None:
    """Of many: the elements are 0, 1 and 2, and the gradient shows where each maximum was found. Windows beside one another, and others."""

    class Pool(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(3, *size))

        def forward(self, x: Tensor) -> Tensor:
            return torch.nn.functional.max_pool2d(x * self.weight, 2).flatten(1)

    model = Pool()
    X = torch.randint(0, 3, (4, 3, *size), generator=torch.Generator().manual_seed(0)).float()
    G = torch.randn(model(X).shape, generator=torch.Generator().manual_seed(1))
    found = Plan.of(model, X).linearize(X).factors(G[None]).materialise().view(4, 3, *size)
    for n in range(4):
        (expected,) = torch.autograd.grad((model(X[n : n + 1]) * G[n]).sum(), model.weight)
        assert torch.equal(found[n], expected)


@in_float64
def test_weights_enter_the_product_per_example(problem: Network) -> None:
    tape = Plan.of(problem.model, problem.X).linearize(problem.X)
    weights = torch.linspace(0, 2, problem.N, dtype=problem.dtype)
    hessian = resolve(problem.loss).hessian(tape.outputs, problem.y, weights)
    V = problem.random("V", 2, problem.P)
    J, H = problem.jacobian, problem.loss_hessian * weights.double()[:, None, None]
    expected = torch.einsum("ncp,ncd,ndq,vq->vp", J, H, J, V.double())
    unweighted = problem.ggn_matmat(V) / problem.factor
    assert_close(
        tape.ggn(V, hessian),
        expected,
        scope=problem.case.scope,
        scale=2 * float(unweighted.norm()) if problem.N > 1 else None,
    )


def hand_made(dtype: torch.dtype, *rules: str) -> Tensor:
    """All of ``J`` and one ``Jᵀ z`` of a chain of nodes built without capture, flattened."""
    kind, tape_kind = (_C.Plan64, _C.Tape64) if dtype == F64 else (_C.Plan32, _C.Tape32)
    linear = {"in_features": 3, "out_features": 2, "transposed": 0}
    nodes, value, width = [], 0, 3
    for position, rule in enumerate(rules):
        width = 2 if rule == "linear" else width
        nodes.append(
            {
                "rule": rule,
                "name": f"{rule}_{position}",
                "inputs": [value],
                "output": value + 1,
                "slots": [0, 1] if rule == "linear" else [],
                "ints": linear if rule == "linear" else {},
                "floats": {},
                "width": width,
            }
        )
        value += 1
    plan = kind(
        nodes=nodes,
        slots=[(6, 0), (2, 6)],
        input_widths=[3],
        aliases=[-1] * (value + 1),
        output=value,
        num_parameters=8,
    )
    X = torch.arange(12, dtype=dtype).reshape(4, 3).sin()
    tape = tape_kind(plan, [X])
    tape.linearize([torch.arange(6, dtype=dtype).cos(), torch.ones(2, dtype=dtype)])
    return torch.cat([tape.jvp(torch.eye(8, dtype=dtype)).flatten(), tape.vjp(tape.outputs()[None]).flatten()])


@pytest.mark.parametrize("rules", [("identity", "linear"), ("linear", "identity"), ("identity", "linear", "identity", "identity")])
def test_the_rule_to_copy_does_nothing(rules: tuple[str, ...], dtype: torch.dtype) -> None:
    assert torch.equal(hand_made(dtype, *rules), hand_made(dtype, "linear"))


CHECK = """
import sys, torch
from influence_ext import _C
from influence_ext.testing import assert_close
from tests.cases import build, eager
from tests.cases.convolution import CHANNEL_LANES, WINOGRAD
from tests.cases.models import NETWORKS
import influence_ext as ie
assert _C.build_info()["active_instruction_set"] == sys.argv[1], _C.build_info()
for dtype in (torch.float64, torch.float32):
    ids = ("linear-97-33", "linear-33-97", "mlp-odd", "mlp-many", "mixer", "tied-transpose", "head-ce-mean-33")
    for case in (*(NETWORKS[id] for id in ids), *WINOGRAD, *CHANNEL_LANES):
        n = build(case, dtype)
        V = n.random("V", 3, n.P)
        G = ie.GGN(n.model, n.loss, n.data)
        assert_close(G.matmat(V), n.ggn_matmat(V), eager=lambda: eager.ggn_products(n, V), what=case.id)
        gram = ie.grad_gram(n.model, n.loss, n.data)
        grads = eager.per_example_grads(n)
        assert_close(gram, n.grads @ n.grads.T, eager=grads @ grads.T, what=case.id)
"""


@pytest.mark.slow
@pytest.mark.parametrize("instruction_set", ["baseline", "avx2", "avx512", "avx512_bf16"])
def test_every_instruction_set_gives_the_same_numbers(instruction_set: str) -> None:
    """In a process of its own: the choice is made once, by the processor or by INFLUENCE_EXT_ISA."""
    best = _C.build_info()["active_instruction_set"]
    order = ["baseline", "avx2", "avx512", "avx512_bf16"]
    if order.index(instruction_set) > order.index(best):
        pytest.skip(f"this processor has no {instruction_set}")
    environment = {**os.environ, "INFLUENCE_EXT_ISA": instruction_set}
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", CHECK, instruction_set], cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_unknown_instruction_set_is_refused() -> None:
    environment = {**os.environ, "INFLUENCE_EXT_ISA": "avx9"}
    done = subprocess.run(
        [sys.executable, "-c", "import influence_ext; influence_ext.build_info()"], env=environment, capture_output=True, text=True
    )
    assert "INFLUENCE_EXT_ISA: expected baseline, avx2, avx512 or avx512_bf16" in done.stderr
    assert done.returncode != 0
