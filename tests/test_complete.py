"""Every rule, activation, loss and solver has a row in the tables of cases; taking its rows away makes this fail.

``test_capture.py`` does the same for the ATen operators of the lowering table.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable

import pytest
import torch

from influence_ext import _C, solvers
from influence_ext.capture.lowering import ACTIVATION_KINDS
from influence_ext.losses import NATIVE
from influence_ext.plan import Plan
from tests.cases import NetworkCase, build
from tests.cases.convolution import POOLED
from tests.cases.families import ACTIVATION_ROWS, RULE_ROWS
from tests.cases.layers import BY_HAND
from tests.cases.losses import LINEAR_ROWS, LossCase
from tests.cases.losses import ROWS as CURVED_ROWS
from tests.cases.solvers import SOLVERS, SolverCase

LOSS_ROWS = CURVED_ROWS + LINEAR_ROWS
MADE_BY_PLANS = {"pooled_convolution": {row.id for row in POOLED}}
"""No operator lowers to these: a plan makes their nodes of others. ``test_pooled_convolution`` shows that it does in these rows."""


def registered_rules() -> set[str]:
    """Names in the C++ registry."""
    return set(_C.rules())


def covered_rules(rows: Iterable[NetworkCase]) -> set[str]:
    """Rules that the rows name, and those of nodes that plans make of theirs; ``test_layers`` shows that they do run through them."""
    rows = list(rows)
    made = {rule for rule, ids in MADE_BY_PLANS.items() if not ids.isdisjoint(row.id for row in rows)}
    return made.union(*(row.rules for row in rows))


def covered_activations(rows: Iterable[NetworkCase]) -> set[str]:
    """Kinds of the activation rule that the rows run through."""
    names = {number: name for name, number in ACTIVATION_KINDS.items()}
    found = set()
    for row in rows:
        network = build(row, torch.float64)
        nodes = Plan.of(network.model, network.X).graph.nodes
        found |= {names[node.ints["kind"]] for node in nodes if node.rule == "activation"}
    return found


def covered_losses(rows: Iterable[LossCase]) -> set[tuple[str, str]]:
    """Name and reduction of the rows."""
    return {(row.loss, row.reduction) for row in rows}


def registered_solvers() -> set[str]:
    """Public solver classes."""
    members = (getattr(solvers, name) for name in solvers.__all__)
    return {
        member.__name__
        for member in members
        if inspect.isclass(member) and issubclass(member, solvers.Solver) and not inspect.isabstract(member)
    }


def covered_solvers(rows: Iterable[SolverCase]) -> set[str]:
    """Classes that the rows begin their name with."""
    return {row.id.split("-")[0] for row in rows}


Table = tuple[Callable[[], set], Callable[[Iterable], set], tuple]
TABLES: dict[str, Table] = {
    "rules": (registered_rules, covered_rules, RULE_ROWS + BY_HAND),
    "activations": (lambda: set(ACTIVATION_KINDS), covered_activations, ACTIVATION_ROWS),
    "losses": (lambda: {(n, r) for n in NATIVE for r in ("mean", "sum")}, covered_losses, LOSS_ROWS),
    "solvers": (registered_solvers, covered_solvers, tuple(SOLVERS)),
}


@pytest.mark.parametrize("table", TABLES)
def test_nothing_is_without_a_row(table: str) -> None:
    registered, covered, rows = TABLES[table]
    assert registered()
    assert registered() - covered(rows) == set()


@pytest.mark.parametrize("table", TABLES)
def test_a_missing_row_is_noticed(table: str) -> None:
    registered, covered, rows = TABLES[table]
    for thing in registered():
        rest = [row for row in rows if thing not in covered([row])]
        assert len(rest) < len(rows)
        assert registered() - covered(rest) >= {thing}


def test_native_losses_are_the_registered_ones() -> None:
    assert {kernel for entry in NATIVE.values() for kernel in entry.kernels} == set(_C.losses())


def test_rows_say_why_they_exist() -> None:
    for rows in (RULE_ROWS, LOSS_ROWS):
        assert [row.id for row in rows if not row.notes] == []
        assert len({row.id for row in rows}) == len(rows)
