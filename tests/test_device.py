"""The CUDA kernels, run on the CPU (tests/emulation): every row of the operator tables again, with all that is computed, and losses."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator

import pytest
import torch
from _pytest.mark import ParameterSet

from tests.cases import Network, NetworkCase, build
from tests.cases.families import FAMILIES, RULE_ROWS
from tests.emulation import ROOT, emulated_device
from tests.test_families import rows, test_every_per_example_quantity, test_every_product, test_hessian
from tests.test_losses import (
    test_bregman_divergence_keeps_its_digits_near_the_anchor,
    test_bregman_divergence_matches_its_definition,
    test_gradients,
    test_hessians,
    test_hessians_with_weights_and_factors,
    test_roots_square_to_the_hessian,
    test_values,
)

__all__ = [
    "test_bregman_divergence_keeps_its_digits_near_the_anchor",
    "test_bregman_divergence_matches_its_definition",
    "test_every_per_example_quantity",
    "test_every_product",
    "test_gradients",
    "test_hessian",
    "test_hessians",
    "test_hessians_with_weights_and_factors",
    "test_roots_square_to_the_hessian",
    "test_values",
]


CPU_ONLY = {
    *("all_finite_stub", "convolution_prepared_size_stub"),
    *("output_jacobian_stub", "output_jacobian_transposed_stub"),
    *("pick_pack_stub", "pick_places_stub", "pick_product_stub", "pick_weights_stub"),
}
"""The first two look at arrays of the host and at its own layout of them, whatever a plan's device is; the next two are for products with
shortcuts, which only the CPU takes, and the last for convolutions under a max pool as one node, which only plans for the CPU have."""


DEVICE_ONLY = {"mlp_stub"}
"""A chain of layers in one kernel: on the CPU the schedule by example is that, with a call of the layers' own kernels for each node."""


def test_every_kernel_has_a_twin() -> None:
    def registered(folder: str, macro: str) -> list[str]:
        files = sorted((ROOT / "csrc/kernels" / folder).iterdir())
        return [stub for file in files for stub in re.findall(rf"^{macro}\((\w+), ", file.read_text(), re.MULTILINE)]

    cpu, cuda = registered("cpu", "INFL_REGISTER_CPU"), registered("cuda", "INFL_REGISTER_CUDA")
    assert len(set(cpu)) == len(cpu) > 50
    assert len(set(cuda)) == len(cuda), "a kernel has two twins"
    assert set(cuda) - set(cpu) == DEVICE_ONLY
    assert set(cpu) - set(cuda) == CPU_ONLY


FEW_EXAMPLES = 64


def in_turn(cases: Iterable[NetworkCase]) -> list[ParameterSet]:
    """Of the rows through the same rules, the first of every twelve is quick in float64 and the next one in float32.

    Not those of many examples, which are there for the CPU's tiles: a device has none, and its emulation takes half a minute for them.
    """
    seen: Counter[frozenset[str]] = Counter()
    turn = {}
    for case in cases:
        if case.num_examples > FEW_EXAMPLES:
            turn[id(case)] = None
            continue
        turn[id(case)] = {0: torch.float64, 1: torch.float32}.get(seen[case.rules] % 12)
        seen[case.rules] += 1
    return rows(cases, lambda case, dtype: turn[id(case)] == dtype)


@pytest.fixture(params=in_turn(FAMILIES))
def row(request: pytest.FixtureRequest) -> Network:
    """A network of one row in one data type."""
    return build(*request.param)


@pytest.fixture(params=in_turn(RULE_ROWS))
def rule_row(request: pytest.FixtureRequest) -> Network:
    """The same for all rows of all rules."""
    return build(*request.param)


@pytest.fixture(autouse=True)
def _on_the_device() -> Iterator[None]:
    with emulated_device():
        yield
