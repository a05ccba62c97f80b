"""Pointwise CUDA kernels at odd sizes and addresses, run on the CPU (tests/emulation) and called directly: against PyTorch in float64.

A plan's buffers begin at whole cache lines, so only here do elements lie before the first aligned address, behind the last, or at addresses
that never are aligned together.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from influence_ext.testing import assert_close
from tests.emulation import library

F64 = torch.float64
TANH = 1
"""An activation by its place in the list of ``math/activations.h``."""


class _Kernel(ctypes.Structure):
    _fields_ = [("name", ctypes.c_char_p), ("float32", ctypes.c_void_p), ("float64", ctypes.c_void_p)]


class _Library(ctypes.Structure):
    _fields_ = [
        ("runtime", ctypes.c_void_p),
        ("recorder", ctypes.c_void_p),
        ("kernels", ctypes.POINTER(_Kernel)),
        ("num_kernels", ctypes.c_int64),
    ]


@cache
def kernels() -> dict[str, tuple[int, int]]:
    """Addresses of the kernels for float32 and float64."""
    function = ctypes.CDLL(str(library())).influence_ext_device_library
    function.restype = _Library
    table = function()
    return {k.name.decode(): (k.float32, k.float64) for k in table.kernels[: table.num_kernels]}


def call(name: str, dtype: torch.dtype, *arguments: Any) -> None:
    """Integers and booleans as they are, floats in the data type, tensors as pointers. These kernels ask nothing of their context."""
    number = ctypes.c_double if dtype == F64 else ctypes.c_float
    given: list[Any] = [ctypes.create_string_buffer(4096)]
    for value in arguments:
        if value is None or isinstance(value, Tensor):
            given.append(ctypes.c_void_p(None if value is None else value.data_ptr()))
        elif isinstance(value, bool):
            given.append(ctypes.c_bool(value))
        elif isinstance(value, float):
            given.append(number(value))
        else:
            given.append(ctypes.c_int64(value))
    address = kernels()[name][dtype == F64]
    ctypes.CFUNCTYPE(None, *(type(value) for value in given))(address)(*given)


class Memory:
    """Tensors that begin some elements behind a multiple of 16 bytes, with NaN around them."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.bases: list[tuple[Tensor, int, int]] = []

    def at(self, offset: int, x: Tensor) -> Tensor:
        base = torch.full((x.numel() + 64,), torch.nan, dtype=self.dtype)
        first = -base.data_ptr() % 16 // base.element_size() + 16 + offset
        view = base[first : first + x.numel()].view(x.shape)
        view.copy_(x)
        self.bases.append((base, first, x.numel()))
        return view

    def check_surroundings(self) -> None:
        for base, first, size in self.bases:
            assert base[:first].isnan().all()
            assert base[first + size :].isnan().all()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def run_activation(m: Memory, offsets: list[int], V: int, size: int) -> list[tuple[Tensor, Tensor]]:
    x = m.at(offsets[0], random(size))
    y, derivative = m.at(offsets[1], torch.zeros(size)), m.at(offsets[2], torch.zeros(size))
    call("activation", m.dtype, TANH, 0.0, 0.0, size, x, y, derivative)
    second = m.at(offsets[1], torch.zeros(size))
    call("second_derivative", m.dtype, TANH, 0.0, 0.0, size, x, second)
    value = x.double().tanh()
    slope = 1 - value**2
    return [(y, value), (derivative, slope), (second, -2 * value * slope)]


def run_combine(m: Memory, offsets: list[int], V: int, size: int) -> list[tuple[Tensor, Tensor]]:
    x1, x2 = m.at(offsets[0], random(size)), m.at(offsets[1], random(size, seed=1))
    out = m.at(offsets[2], random(size, seed=2))
    expected = out.double() + 1.5 * x1.double() - 0.25 * x2.double()
    call("combine", m.dtype, size, 1.5, x1, -0.25, x2, out, True)
    return [(out, expected)]


def run_scale(m: Memory, offsets: list[int], V: int, size: int) -> list[tuple[Tensor, Tensor]]:
    d, g = m.at(offsets[0], random(size)), m.at(offsets[0], random(size, seed=1))
    x, out = m.at(offsets[1], random(V, size, seed=2)), m.at(offsets[2], random(V, size, seed=3))
    in_place = m.at(offsets[1], random(V, size, seed=4))
    expected = in_place.double() * d.double()
    call("scale", m.dtype, V, size, d, in_place, in_place, False)
    results = [(in_place, expected)]
    expected = out.double() + x.double() * (d.double() * g.double())
    call("add_scaled", m.dtype, V, size, d, g, x, out)
    return [*results, (out, expected)]


def run_blend(m: Memory, offsets: list[int], V: int, size: int) -> list[tuple[Tensor, Tensor]]:
    w, t1 = m.at(offsets[0], random(size).sigmoid()), m.at(offsets[1], random(V, size, seed=1))
    t2, out = m.at(offsets[1], random(V, size, seed=2)), m.at(offsets[2], torch.zeros(V, size))
    call("blend", m.dtype, V, size, w, t1, t2, out, False)
    return [(out, w.double() * t1.double() + (1 - w.double()) * t2.double())]


def run_copy(m: Memory, offsets: list[int], V: int, size: int) -> list[tuple[Tensor, Tensor]]:
    x, y = m.at(offsets[0], random(V, size)), m.at(offsets[1], random(V, size, seed=1))
    expected = y.double() + x.double()
    call("copy_rows", m.dtype, V, size, x, size, y, size, True)
    return [(y, expected)]


@pytest.mark.parametrize("run", [run_activation, run_combine, run_scale, run_blend, run_copy], ids=lambda f: f.__name__[4:])
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=["f32", "f64"])
@pytest.mark.parametrize("offsets", [[0, 0, 0], [1, 1, 1], [3, 3, 3], [0, 1, 2]], ids=str)
def test_pointwise_kernels(run: Callable[..., list[tuple[Tensor, Tensor]]], offsets: list[int], dtype: torch.dtype) -> None:
    for V, size in [(1, 1), (1, 2), (1, 3), (1, 5), (1, 7), (1, 1027), (1, 4096), (3, 5), (5, 8), (9, 1027)]:
        memory = Memory(dtype)
        for got, expected in run(memory, offsets, V, size):
            assert_close(got, expected, scope="layer")
        memory.check_surroundings()


def test_an_order_that_is_none_is_a_sentence() -> None:
    code = f"import ctypes; ctypes.CDLL({str(library())!r}).influence_ext_device_library()"
    for order in ("abc", "7 ", "-1", str(2**64)):
        environment = {**os.environ, "INFL_EMULATION_ORDER": order}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
        assert f"expected INFL_EMULATION_ORDER to be 'reversed' or a seed below 2^64, got '{order}'; give one of these" in done.stderr
