"""Tables of cases: each row is a frozen dataclass that says why it exists; each property is written once over rows."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn

from influence_ext import errors, reference
from tests.cases.losses import LOSSES, LossCase

in_float64 = pytest.mark.parametrize("dtype", [torch.float64], ids=["f64"], indirect=True)
"""For properties that the data type plays no part in: the rows run in float64 alone."""

Inputs = Tensor | tuple[Tensor, ...] | Mapping[str, Tensor]


def generator(key: str) -> Generator:
    """Random numbers that depend on ``key`` alone, so that any failing row replays alone."""
    return torch.Generator().manual_seed(zlib.crc32(key.encode()))


def cast(x: Any, dtype: torch.dtype) -> Any:
    """``x`` with floating-point tensors in ``dtype``; the strides survive."""
    if isinstance(x, Tensor):
        return x.to(dtype) if x.is_floating_point() else x
    if isinstance(x, Mapping):
        return {key: cast(value, dtype) for key, value in x.items()}
    return tuple(cast(value, dtype) for value in x)


def subset(X: Inputs, indices: Any) -> Any:
    """The examples ``indices`` (a slice or a list) of ``X``."""
    if isinstance(X, Tensor):
        return X[indices]
    if isinstance(X, Mapping):
        return {key: value[indices] for key, value in X.items()}
    return tuple(value[indices] for value in X)


@dataclass(frozen=True)
class NetworkCase:
    """One network with its inputs; ``scope`` sets the tolerance, ``rules`` are the node kinds it must run through."""

    id: str
    make: Callable[[], nn.Module]
    inputs: Callable[[int, Generator], Inputs]
    notes: str
    scope: str = "model"
    rules: frozenset[str] = frozenset()
    loss: str = "mse-mean"
    num_examples: int = 5


class Network:
    """A row made concrete in one data type, with its oracles computed once."""

    def __init__(self, case: NetworkCase, dtype: torch.dtype) -> None:
        self.case, self.dtype = case, dtype
        rng = generator(case.id)
        with torch.random.fork_rng():
            torch.manual_seed(rng.initial_seed())
            model = case.make().eval()
            self.model = model.double() if dtype == torch.float64 else model.float()
        self.X: Any = cast(case.inputs(case.num_examples, rng), dtype)
        self.N = case.num_examples
        self.loss_case: LossCase = LOSSES[case.loss]
        self.y: Tensor = cast(self.loss_case.targets(self.outputs, rng), dtype)
        self.data = (self.X, self.y)

    @cached_property
    def loss(self) -> Any:
        """The loss as a user would give it."""
        return self.loss_case.make()

    @cached_property
    def outputs(self) -> Tensor:
        """Float64 outputs ``[N, *out]``."""
        return reference.outputs(self.model, self.X)

    @cached_property
    def jacobian(self) -> Tensor:
        """Float64 Jacobians ``[N, C, P]``."""
        return reference.jacobian(self.model, self.X)

    @cached_property
    def loss_hessian(self) -> Tensor:
        """Float64 loss Hessians ``[N, C, C]``."""
        return reference.loss_hessian(self.loss_case.oracle(), self.outputs, self.y)

    @cached_property
    def ggn(self) -> Tensor:
        """Float64 ``[P, P]``: ``c Σ_n J_nᵀ H_n J_n``."""
        J, H = self.jacobian, self.loss_hessian
        return self.factor * torch.einsum("ncp,ncd,ndq->pq", J, H, J)

    def ggn_matmat(self, V: Tensor) -> Tensor:
        """Float64 ``G`` onto rows, ``[V, P] -> [V, P]``, from ``J_n`` and ``H_n``; for networks too wide for a dense ``G``."""
        J, H = self.jacobian, self.loss_hessian
        t = torch.einsum("ncp,vp->vnc", J, V.double())
        return self.factor * torch.einsum("ncp,ncd,vnd->vp", J, H, t)

    def hessian_matmat(self, V: Tensor) -> Tensor:
        """Float64 ``∇²J`` onto rows, ``[V, P] -> [V, P]``."""
        return self.factor * reference.hessian_products(self.model, self.loss_case.oracle(), self.X, self.y, V, "sum")

    @cached_property
    def grads(self) -> Tensor:
        """Float64 per-example gradients ``[N, P]``."""
        return reference.per_example_grads(self.model, self.loss_case.oracle(), self.X, self.y)

    @property
    def factor(self) -> float:
        """``c``."""
        return self.loss_case.factor(self.y)

    @property
    def P(self) -> int:
        """Number of trainable parameters."""
        return self.jacobian.shape[2]

    def random(self, key: str, *shape: int) -> Tensor:
        """Standard normal numbers in the row's data type that depend on the row and ``key`` alone."""
        return torch.randn(*shape, generator=generator(f"{self.case.id}/{key}"), dtype=torch.float64).to(self.dtype)


@cache
def build(case: NetworkCase, dtype: torch.dtype) -> Network:
    """The row in ``dtype``, built once a session; nothing under test may modify it (``test_errors.py`` proves it)."""
    return Network(case, dtype)


def budget_of(chunk: int, linearised: Callable[[int], object]) -> int:
    """The ``memory_budget`` that holds so many examples, by what ``linearised(memory_budget)`` says of one that holds none."""
    with pytest.raises(errors.ArgumentError) as error:
        linearised(1)
    found = re.search(r"weights take (\d+) and an example (\d+)", str(error.value))
    assert found is not None
    return int(found[1]) + chunk * int(found[2])
