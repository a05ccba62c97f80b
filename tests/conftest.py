"""Marks, numerical settings and the hypothesis profile of the whole suite. A missing extension is a failure, never a skip."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch

from influence_ext import capture
from tests.cases import Network, NetworkCase, build
from tests.cases.layers import ARITHMETIC, STRUCTURE
from tests.cases.models import EVERY, HEADS

# Data moves but is not computed with, or the loss is tested in float32 on its own.
LONG_IN_FLOAT32 = {id(row) for row in (*STRUCTURE, *ARITHMETIC, *HEADS) if not row.id.endswith("saturated")}

if find_spec("hypothesis"):  # the tests for a GPU do without it
    import hypothesis

    hypothesis.settings.register_profile("replayable", derandomize=True, deadline=None, database=None, print_blob=False)
    hypothesis.settings.load_profile("replayable")


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marks that pyproject.toml does not."""
    config.addinivalue_line("markers", "gpu: needs a CUDA device; skipped with a counted reason where there is none")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave float32 runs of rows without arithmetic of their own to the long set; skip GPU rows where there is no GPU."""
    for item in items:
        params = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        if params.get("dtype") is torch.float32 and LONG_IN_FLOAT32.intersection(map(id, params.values())):
            item.add_marker(pytest.mark.slow)
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_collection_finish() -> None:
    """Spare the garbage collector what stays to the end, torch and all collected tests: most of what a full collection would visit."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _numerics() -> None:
    """Full float32 precision everywhere."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


@pytest.fixture(scope="session", autouse=True)
def _single_thread() -> None:
    """The networks of the tables are tiny: threads would only cost."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _captures_are_kept() -> Iterator[None]:
    """Tests visit the rows one property at a time; the cache of captured graphs is made to hold all of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(capture, "_CACHE_SIZE", 4096)
        yield


@pytest.fixture(params=[torch.float64, torch.float32], ids=["f64", "f32"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Both supported data types."""
    return request.param


@pytest.fixture
def threads() -> Iterator[object]:
    """``threads(n)`` sets torch's thread count; the old one comes back after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(params=EVERY, ids=lambda case: case.id)
def network(request: pytest.FixtureRequest, dtype: torch.dtype) -> Network:
    """Every layer and model row in every data type."""
    return build(request.param, dtype)


@pytest.fixture(params=EVERY + HEADS, ids=lambda case: case.id)
def problem(request: pytest.FixtureRequest, dtype: torch.dtype) -> Network:
    """Every layer and model row, and one network for every loss row, in every data type."""
    return build(request.param, dtype)


def small(case: NetworkCase) -> bool:
    """Whether dense ``[P, P]`` matrices are cheap."""
    return build(case, torch.float64).P <= 210


@pytest.fixture(params=[case for case in EVERY + HEADS if small(case)], ids=lambda case: case.id)
def small_problem(request: pytest.FixtureRequest, dtype: torch.dtype) -> Network:
    """The rows with few parameters."""
    return build(request.param, dtype)
