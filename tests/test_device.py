"""The CUDA kernels, run on the CPU (tests/emulation): every row of the operator tables again, all products and per-example quantities."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.emulation import emulated_device
from tests.test_families import row, test_every_per_example_quantity, test_every_product

__all__ = ["row", "test_every_per_example_quantity", "test_every_product"]


@pytest.fixture(autouse=True)
def _on_the_device() -> Iterator[None]:
    with emulated_device():
        yield
