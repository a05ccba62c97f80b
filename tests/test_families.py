"""Every row of every family of operators, all its products at once: against float64 Jacobians, in both schedules, on two threads."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache, partial

import pytest
import torch
from _pytest.mark import ParameterSet
from torch import Tensor

import influence_ext as ie
from influence_ext.losses import resolve
from influence_ext.plan import Plan
from influence_ext.testing import assert_close
from tests.cases import Network, NetworkCase, build, eager
from tests.cases.families import FAMILIES, RULE_ROWS
from tests.cases.movement import MOVEMENT
from tests.cases.pointwise import POINTWISE

F64 = torch.float64
LONG_IN_FLOAT32 = {id(row) for row in MOVEMENT + POINTWISE}  # no sums of their own worth a second data type every time


def rows(cases: Iterable[NetworkCase], quick: Callable[[NetworkCase, torch.dtype], bool]) -> list[ParameterSet]:
    """The cases in both data types; those that are not quick are marked slow."""
    return [
        pytest.param((case, dtype), id=f"{case.id}-{name}", marks=() if quick(case, dtype) else pytest.mark.slow)
        for case in cases
        for dtype, name in ((F64, "f64"), (torch.float32, "f32"))
    ]


@pytest.fixture(params=rows(FAMILIES, lambda case, dtype: dtype == F64 or id(case) not in LONG_IN_FLOAT32))
def row(request: pytest.FixtureRequest) -> Network:
    """A network of one row in one data type."""
    return build(*request.param)


@pytest.fixture(params=rows(RULE_ROWS, lambda case, dtype: dtype == F64))
def rule_row(request: pytest.FixtureRequest) -> Network:
    """The same for all rows of all rules."""
    return build(*request.param)


def test_every_product(row: Network, threads: Callable[[int], None]) -> None:
    plan = Plan.of(row.model, row.X)
    assert row.case.rules <= {node.rule for node in plan.graph.nodes}, "the row does not run through the rule it names"
    tape = plan.linearize(row.X)
    scope = row.case.scope
    assert_close(tape.outputs, row.outputs, scope=scope, eager=partial(eager.outputs, row))
    V, G = row.random("V", 5, row.P), row.random("G", 3, *row.outputs.shape)
    J = row.jacobian
    tangents = torch.einsum("ncp,vp->vnc", J, V.double()).reshape(5, *row.outputs.shape)
    cotangents = torch.einsum("ncp,vnc->vp", J, G.double().reshape(3, row.N, -1))
    peers = [
        cache(partial(eager.jacobian_products, row, V)),
        cache(partial(eager.jacobian_transpose_products, row, G)),
        cache(partial(eager.ggn_products, row, V)),
    ]
    hessian = resolve(row.loss).hessian(tape.outputs, row.y).scaled(row.factor)
    products = row.ggn_matmat(V)
    for schedule, num_threads in (("by_example", 1), ("by_operator", 2)):
        threads(num_threads)
        tape.set_schedule(schedule)  # type: ignore[arg-type]
        assert_close(tape.jvp(V), tangents, scope=scope, eager=peers[0])
        assert_close(tape.vjp(G), cotangents, scope=scope, eager=peers[1])
        first = tape.ggn(V, hessian)
        assert_close(first, products, scope=scope, eager=peers[2])
        assert torch.equal(first, tape.ggn(V, hessian)), "products do not repeat"
    threads(1)
    assert_close(tape.jvp(V[:1]), tangents[:1], scope=scope, eager=lambda: peers[0]()[:1])


def test_hessian(rule_row: Network, threads: Callable[[int], None]) -> None:
    row, scope = rule_row, rule_row.case.scope
    V = row.random("V", 3, row.P)
    expected = row.hessian_matmat(V)
    peer = cache(partial(eager.hessian_products, row, V))
    H = ie.Hessian(row.model, row.loss, row.data)
    for schedule, num_threads in (("by_example", 1), ("by_operator", 2)):
        threads(num_threads)
        H.tape.set_schedule(schedule)  # type: ignore[arg-type]
        assert_close(H.matmat(V), expected, scope=scope, eager=peer)
    threads(1)
    assert_close(H.matmat(V[:1]), expected[:1], scope=scope, eager=lambda: peer()[:1])


def test_every_per_example_quantity(row: Network) -> None:
    scope = row.case.scope
    grads = ie.per_example_grads(row.model, row.loss, row.data)
    flat = torch.cat([g.reshape(row.N, -1) for g in grads.values()], dim=1)
    peer: Callable[[], Tensor] = cache(partial(eager.per_example_grads, row))
    assert_close(flat, row.grads, scope=scope, eager=peer)
    norms = ie.per_example_norms(row.model, row.loss, row.data)
    assert_close(norms, row.grads.norm(dim=1), scope=scope, eager=lambda: peer().norm(dim=1))
    gram = ie.grad_gram(row.model, row.loss, row.data)
    assert_close(gram, row.grads @ row.grads.T, scope=scope, eager=lambda: peer() @ peer().T)
    tape = Plan.of(row.model, row.X).linearize(row.X)
    squares = tape.factors(resolve(row.loss).gradient(tape.outputs, row.y)[None]).square_sum()
    assert_close(squares, row.grads.square().sum(dim=0), scope=scope, eager=lambda: peer().square().sum(dim=0))
