"""Where a plan makes one node of a convolution and the max pool behind it; the numbers are in ``test_families.py``, rows ``picks``."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import influence_ext as ie
from influence_ext import _C
from influence_ext.plan import Plan
from influence_ext.testing import assert_close
from tests.cases import NetworkCase, build
from tests.cases.convolution import POOLED, TwoReaders
from tests.emulation import emulated_device

HAS_KERNELS = _C.build_info()["active_instruction_set"].startswith("avx512")


def lenet() -> nn.Module:
    """The first layers of LeNet, for images of 12 by 12."""
    return nn.Sequential(nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(96, 3))


def merged(report: str) -> list[bool]:
    """Of every max pool in a plan's table: is it a part of the product before it?"""
    return ["fused into the product before it" in line for line in report.splitlines() if " max_pool " in line]


class Shown(nn.Module):
    """Its convolution is read by the pool and is an output besides."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.pool = nn.Conv2d(1, 6, 5), nn.MaxPool2d(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv(x)
        return torch.cat([h.flatten(1), self.pool(h).flatten(1)], dim=1)


@pytest.mark.parametrize("case", POOLED, ids=lambda case: case.id)
def test_it_happens_on_a_cpu_with_kernels_for_it(case: NetworkCase) -> None:
    """In one data type at least: how many lanes are filled depends on it."""
    networks = [build(case, dtype) for dtype in (torch.float64, torch.float32)]
    assert any(any(merged(Plan.of(network.model, network.X).report())) for network in networks) == HAS_KERNELS


@pytest.mark.parametrize(
    "make",
    [
        lambda: TwoReaders(nn.Conv2d(1, 6, 5), nn.MaxPool2d(2)),
        lambda: TwoReaders(nn.Conv2d(1, 6, 5), nn.MaxPool2d(2), nn.MaxPool2d(2)),
        Shown,
        lambda: nn.Sequential(nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(4), nn.AvgPool2d(2), nn.Flatten()),
        lambda: nn.Sequential(nn.Conv2d(1, 6, 5, stride=2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
    ],
    ids=["read-twice", "two-pools", "shown", "wide-windows", "stride"],
)
def test_it_does_not_where_all_is_read_or_nothing_is_saved(make: Callable[[], nn.Module]) -> None:
    found = merged(Plan.of(make(), torch.randn(2, 1, 12, 12)).report())
    assert found
    assert not any(found)


def test_it_does_not_without_avx512() -> None:
    """In a process of its own: the instruction set is chosen once."""
    if _C.build_info()["active_instruction_set"] == "baseline":
        pytest.skip("this processor has no avx2")
    program = "import torch; from tests.test_pooled_convolution import *; print(Plan.of(lenet(), torch.randn(2, 1, 12, 12)).report())"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).resolve().parents[1],
        env={**os.environ, "INFLUENCE_EXT_ISA": "avx2"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert merged(done.stdout) == [False]


def test_it_does_not_on_a_device_whatever_the_host_is() -> None:
    """One plan serves both, so what was remembered of the one is not taken for the other."""
    model, X, y = lenet().double(), torch.randn(3, 1, 12, 12, dtype=torch.float64), torch.tensor([0, 2, 1])
    assert merged(Plan.of(model, X).report()) == [HAS_KERNELS]
    v = torch.randn(1, sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    product = ie.GGN(model, nn.CrossEntropyLoss(), (X, y)).matmat(v)
    with emulated_device():
        assert merged(Plan.of(model, X).report()) == [False]
        assert_close(ie.GGN(model, nn.CrossEntropyLoss(), (X, y)).matmat(v), product)
    assert merged(Plan.of(model, X).report()) == [HAS_KERNELS]
