"""The CUDA kernels, run on the CPU (tests/emulation): every row of the operator tables again, with all that is computed, and losses."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.emulation import emulated_device
from tests.test_families import row, test_every_per_example_quantity, test_every_product
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
    "row",
    "test_bregman_divergence_keeps_its_digits_near_the_anchor",
    "test_bregman_divergence_matches_its_definition",
    "test_every_per_example_quantity",
    "test_every_product",
    "test_gradients",
    "test_hessians",
    "test_hessians_with_weights_and_factors",
    "test_roots_square_to_the_hessian",
    "test_values",
]


@pytest.fixture(autouse=True)
def _on_the_device() -> Iterator[None]:
    with emulated_device():
        yield
