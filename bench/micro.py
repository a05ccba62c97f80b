"""Single operations under pytest-benchmark: ``make bench-micro`` (``ARGS="-k norms"``, ``ARGS=--benchmark-compare``)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import influence_ext as ie
from bench.cases import Case
from bench.problem import LOSS_MODULES, Problem
from bench.workloads import CLASSIFIER, REGRESSION

WORKLOADS = {"regression": Case("ggn", REGRESSION, 1000, 8), "classifier": Case("ggn", CLASSIFIER, 1024, 8)}


@pytest.fixture(params=WORKLOADS.values(), ids=WORKLOADS)
def problem(request: pytest.FixtureRequest) -> Problem:
    return request.param.problem()


def data(problem: Problem) -> tuple[Any, Any, Any]:
    return problem.model, LOSS_MODULES[problem.loss](), (problem.X, problem.y)


def test_linearize(benchmark: Any, problem: Problem) -> None:
    benchmark(lambda: ie.GGN(*data(problem)))


@pytest.mark.parametrize("num_vectors", [1, 8])
def test_ggn_product(benchmark: Any, problem: Problem, num_vectors: int) -> None:
    G, V = ie.GGN(*data(problem)), problem.vectors[:num_vectors].contiguous()
    benchmark(G.matmat, V)


def test_jvp(benchmark: Any, problem: Problem) -> None:
    benchmark(ie.jvp, problem.model, problem.X, problem.vectors[0])


def test_vjp(benchmark: Any, problem: Problem) -> None:
    benchmark(ie.vjp, problem.model, problem.X, torch.ones_like(problem.model(problem.X)).detach())


@pytest.mark.parametrize("quantity", ["per_example_grads", "per_example_norms", "grad_gram"])
def test_per_example(benchmark: Any, quantity: str) -> None:
    benchmark(getattr(ie, quantity), *data(Case("grads", REGRESSION, 256).problem()))


def test_per_example_dots(benchmark: Any) -> None:
    problem = Case("dots", REGRESSION, 256, 8).problem()
    benchmark(ie.per_example_dots, *data(problem), problem.vectors)


SMALLEST = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Tanh(), torch.nn.Linear(2, 2))


@pytest.mark.parametrize("call", [ie.per_example_grads, ie.per_example_norms, ie.grad_gram], ids=lambda call: call.__name__)
def test_overhead_per_example(benchmark: Any, call: Any) -> None:
    benchmark(call, SMALLEST, torch.nn.MSELoss(), (torch.ones(4, 2), torch.zeros(4, 2)))


def test_overhead_product(benchmark: Any) -> None:
    G = ie.GGN(SMALLEST, torch.nn.MSELoss(), (torch.ones(4, 2), torch.zeros(4, 2)))
    benchmark(G.__matmul__, torch.ones(G.shape[0]))
