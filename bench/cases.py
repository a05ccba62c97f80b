"""What is measured: networks, data, vectors, and the float64 reference that every contender has to meet before it is timed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.workloads import CLASSIFIER, DIGITS, LENET, MLP, REGRESSION, RESNET, TRANSFORMER, Workload


def mse(z: Tensor, y: Tensor) -> Tensor:
    """``F.mse_loss`` in elementary operations: forward-over-reverse mode fails on the fused one."""
    return ((z - y) ** 2).mean()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mse": mse, "cross_entropy": F.cross_entropy}
LOSS_MODULES: dict[str, Callable[[], nn.Module]] = {"mse": nn.MSELoss, "cross_entropy": nn.CrossEntropyLoss}


@dataclass(frozen=True, eq=False)
class Problem:
    """A workload made concrete: a network in evaluation mode, its data and the vectors to multiply."""

    model: nn.Module
    loss: str
    X: Tensor
    y: Tensor
    vectors: Tensor  # [V, P]
    damping: float

    @property
    def loss_fn(self) -> Callable[[Tensor, Tensor], Tensor]:
        return LOSSES[self.loss]

    def on(self, device: torch.device) -> Problem:
        """The same problem in the memory of ``device``."""
        model = copy.deepcopy(self.model).to(device)
        return replace(self, model=model, X=self.X.to(device), y=self.y.to(device), vectors=self.vectors.to(device))

    def to(self, dtype: torch.dtype) -> Problem:
        """The same problem, rounded to or extended from its float32 or float64 numbers."""
        y = self.y.to(dtype) if self.y.is_floating_point() else self.y
        model = copy.deepcopy(self.model).to(dtype)
        X = self.X.to(dtype) if self.X.is_floating_point() else self.X
        return replace(self, model=model, X=X, y=y, vectors=self.vectors.to(dtype))


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    quantity: str  # ggn | hessian | grads | norms | dots | gram | solve
    workload: Workload
    num_examples: int
    num_vectors: int = 1
    dtype: torch.dtype = torch.float32
    damping: float = 0.0

    @property
    def name(self) -> str:
        vectors = f"-v{self.num_vectors}" if self.quantity in ("ggn", "hessian", "dots", "solve") else ""
        return f"{self.quantity}{vectors}-{self.workload.name}-n{self.num_examples}"

    @property
    def title(self) -> str:
        text = {
            "ggn": f"GGN product, V = {self.num_vectors}",
            "hessian": f"Hessian product, V = {self.num_vectors}",
            "grads": "per-example gradients",
            "norms": "per-example norms",
            "dots": f"per-example dots, V = {self.num_vectors}",
            "gram": "gradient Gram matrix",
            "solve": f"{self.num_vectors} solves, λ = {self.damping:g}",
        }
        return text[self.quantity]

    def problem(self, seed: int = 0) -> Problem:
        """Data, network and vectors from ``seed``, in the case's dtype."""
        generator = torch.Generator().manual_seed(seed)
        X, y = self.workload.data(self.num_examples, generator)
        V = torch.randn(self.num_vectors, self.workload.num_parameters, generator=generator)
        return Problem(self.workload.build(seed), self.workload.loss, X, y, V, self.damping).to(self.dtype)


CASES: tuple[Case, ...] = (
    Case("ggn", REGRESSION, 1000, 1),
    Case("ggn", REGRESSION, 1000, 8),
    Case("ggn", CLASSIFIER, 4096, 1),
    Case("ggn", CLASSIFIER, 4096, 8),
    *(Case("ggn", workload, N, V) for workload, N in ((LENET, 512), (TRANSFORMER, 16), (RESNET, 128)) for V in (1, 8)),
    *(
        Case("hessian", workload, N, V)
        for workload, N in ((REGRESSION, 1000), (CLASSIFIER, 4096), (LENET, 512), (TRANSFORMER, 16))
        for V in (1, 8)
    ),
    *(
        Case(quantity, workload, 256, num_vectors)
        for workload in (REGRESSION, CLASSIFIER, LENET)
        for quantity, num_vectors in (("grads", 1), ("norms", 1), ("dots", 8), ("gram", 1))
    ),
    Case("solve", REGRESSION, 1000, 100, torch.float64, damping=1e-3),
    Case("solve", DIGITS, 200, 100, torch.float64, damping=1e-3),
)

# A miniature of every quantity: checks the code without measuring anything.
SMOKE_REGRESSION = MLP("smoke-regression", (3, 5, 4, 1), "tanh", "mse")
SMOKE_CLASSIFIER = MLP("smoke-classifier", (6, 5, 3), "relu", "cross_entropy")
SMOKE_CASES: tuple[Case, ...] = tuple(
    Case(quantity, workload, 12, num_vectors, dtype, damping)
    for workload in (SMOKE_REGRESSION, SMOKE_CLASSIFIER)
    for quantity, num_vectors, dtype, damping in (
        ("ggn", 1, torch.float32, 0.0),
        ("ggn", 3, torch.float32, 0.0),
        ("hessian", 1, torch.float32, 0.0),
        ("hessian", 3, torch.float32, 0.0),
        ("grads", 1, torch.float32, 0.0),
        ("norms", 1, torch.float32, 0.0),
        ("dots", 3, torch.float32, 0.0),
        ("gram", 1, torch.float32, 0.0),
        ("solve", 4, torch.float64, 1e-2),
    )
)


def select(patterns: list[str], smoke: bool = False) -> list[Case]:
    """The cases whose names match one of the shell patterns (all for an empty list)."""
    cases = SMOKE_CASES if smoke else CASES
    return [c for c in cases if not patterns or any(fnmatch(c.name, p) for p in patterns)]


def by_name(name: str) -> Case:
    return next(c for c in (*CASES, *SMOKE_CASES) if c.name == name)


# ---------------------------------------------------------------------------------------------------------------------
# Reference answers: float64, reverse mode only (no torch.func), the loss Hessian in closed form.


def reference(case: Case, problem: Problem) -> Tensor:
    """The right answer in float64, shaped as :func:`bench.peers.Contender.flat` gives it.

    For ``solve`` it is ``(G + λI) x − b`` that is checked (see :func:`error`), so this returns the right-hand sides.
    """
    exact = problem.to(torch.float64)
    if case.quantity == "ggn":
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels cannot be differentiated twice
            return ggn_products(exact, exact.vectors)
    if case.quantity == "hessian":
        with sdpa_kernel(SDPBackend.MATH):
            return hessian_products(exact, exact.vectors)
    if case.quantity == "solve":
        return exact.vectors
    if case.quantity == "norms":
        return torch.stack([g.norm() for g in example_gradients(exact)])
    if case.quantity == "dots":
        return torch.stack([exact.vectors @ g for g in example_gradients(exact)])
    gradients = torch.stack(list(example_gradients(exact)))
    return gradients @ gradients.T if case.quantity == "gram" else gradients


def error(case: Case, problem: Problem, answer: Tensor, expected: Tensor) -> float:
    """Relative Frobenius error; for ``solve`` the largest relative residual over the right-hand sides."""
    answer = answer.double().to(expected.device)
    if answer.shape != expected.shape:
        raise ValueError(f"{case.name}: expected an answer of shape {list(expected.shape)}, got {list(answer.shape)}")
    if case.quantity == "solve":
        exact = problem.to(torch.float64)
        residual = ggn_products(exact, answer) + case.damping * answer - expected
        return float((residual.norm(dim=1) / expected.norm(dim=1)).max())
    return float((answer - expected).norm() / expected.norm())


def ggn_products(problem: Problem, V: Tensor) -> Tensor:
    """``G V`` row by row: the transpose of a reverse pass is the forward one, so two reverse passes give ``J v``."""
    parameters = list(problem.model.parameters())
    z = problem.model(problem.X)
    dummy = torch.zeros_like(z, requires_grad=True)
    transposed = torch.autograd.grad(z, parameters, dummy, create_graph=True)
    products = []
    for v in V:
        pieces = v.split([p.numel() for p in parameters])
        tangents = [piece.view_as(p) for piece, p in zip(pieces, parameters, strict=True)]
        (jv,) = torch.autograd.grad(transposed, dummy, tangents, retain_graph=True)
        pulled = torch.autograd.grad(z, parameters, hessian_product(problem, z.detach(), jv), retain_graph=True)
        products.append(torch.cat([g.flatten() for g in pulled]))
    return torch.stack(products)


def hessian_products(problem: Problem, V: Tensor) -> Tensor:
    """``∇²J V`` row by row, by reverse mode twice."""
    parameters = list(problem.model.parameters())

    def gradient(value: Tensor) -> Tensor:
        found = torch.autograd.grad(value, parameters, create_graph=True, allow_unused=True, materialize_grads=True)
        return torch.cat([g.flatten() for g in found])

    first = gradient(problem.loss_fn(problem.model(problem.X), problem.y))
    return torch.stack([gradient(first @ v).detach() for v in V])


def hessian_product(problem: Problem, z: Tensor, t_z: Tensor) -> Tensor:
    """``H t`` of the mean-reduced loss at the outputs."""
    if problem.loss == "mse":
        return 2 * t_z / z.numel()
    p = z.softmax(dim=1)
    return (p * t_z - p * (p * t_z).sum(1, keepdim=True)) / (z.numel() // z.shape[1])


def example_gradients(problem: Problem) -> Iterator[Tensor]:
    """``∇ℓ_n`` of each example, one by one, ``[P]``."""
    parameters = list(problem.model.parameters())
    for n in range(problem.X.shape[0]):
        loss = problem.loss_fn(problem.model(problem.X[n : n + 1]), problem.y[n : n + 1])
        yield torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])
