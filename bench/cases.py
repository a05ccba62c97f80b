"""What is measured: which quantity of which network, at what size."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fnmatch import fnmatch

import torch

from bench.problem import Problem
from bench.reference import example_gradients
from bench.workloads import (
    CLASSIFIER,
    DIGITS,
    GPT2,
    LENET,
    LOGISTIC,
    MLP,
    REGRESSION,
    RESNET,
    RESNET18,
    RETRAINED,
    SENTENCES,
    SMALLEST,
    TRANSFORMER,
    VOCABULARY,
    WIDE,
    Logits,
    Workload,
)

TOLERANCE = 1e-4
"""Relative residual that a solve has to reach."""

EPOCHS = 5
"""Epochs of a retraining."""

CHECKED_BYTES = 2**31
"""Of right answers in float64; where all of them are more, the products with the first vectors are compared."""

NUM_SIZES = 7
"""Sizes of a sweep, each twice the one before: a 64-fold range."""


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        quantity: ggn | hessian | loss-hessian | grads | grads-out | norms | dots | gram | solve | retrain | sweep-n | sweep-v
        workload: the network.
        num_examples: N; the largest one of a sweep over N.
        num_vectors: V: vectors, right-hand sides or retrained models; the largest one of a sweep over V.
        dtype: of the contenders; the reference is float64 in any case.
        damping: of a solve.
        main: whether README shows it and ``--quick`` runs it.
        seconds: about how long it takes on two cores with ``--seconds 3 --rounds 3``, compilation included; replaced by what the last
            run on the machine took.
        note: for the title.
    """

    quantity: str
    workload: Workload
    num_examples: int
    num_vectors: int = 1
    dtype: torch.dtype = torch.float32
    damping: float = 0.0
    main: bool = False
    seconds: float = 30.0
    note: str = ""

    @property
    def name(self) -> str:
        counted = ("ggn", "hessian", "loss-hessian", "dots", "solve", "retrain", "sweep-v")
        vectors = f"-v{self.num_vectors}" if self.quantity in counted else ""
        return f"{self.quantity}{vectors}-{self.workload.name}-n{self.num_examples}"

    @property
    def title(self) -> str:
        V, last = self.num_vectors, 2 ** (NUM_SIZES - 1)
        solves = "solve" if V == 1 else "solves"
        text = {
            "ggn": f"GGN product, V = {V}",
            "hessian": f"Hessian product, V = {V}",
            "loss-hessian": f"loss Hessian product, V = {V}",
            "grads": "per-example gradients",
            "grads-out": "per-example gradients, buffer reused",
            "norms": "per-example norms",
            "dots": f"per-example dots, V = {V}",
            "gram": "gradient Gram matrix",
            "solve": f"{V} {solves} to {TOLERANCE:g}, λ = {self.damping:g}",
            "retrain": f"retraining {V} models",
            "sweep-n": f"GGN product, V = {V}, N = {self.num_examples // last} to {self.num_examples}",
            "sweep-v": f"GGN product, V = {V // last} to {V}",
        }
        return text[self.quantity] + (f" ({self.note})" if self.note else "")

    @property
    def num_checked(self) -> int:
        """How many of the products are compared with float64."""
        return min(self.num_vectors, max(1, CHECKED_BYTES // (8 * max(1, self.workload.num_parameters))))

    @property
    def is_sweep(self) -> bool:
        return self.quantity.startswith("sweep")

    @property
    def steps(self) -> list[Case]:
        """The products that a sweep consists of, the smallest first."""
        factors = [2**k for k in reversed(range(NUM_SIZES))]
        if self.quantity == "sweep-n":
            return [replace(self, quantity="ggn", num_examples=self.num_examples // k) for k in factors]
        return [replace(self, quantity="ggn", num_vectors=self.num_vectors // k) for k in factors]

    def problem(self, seed: int = 0) -> Problem:
        """Data, network and vectors from ``seed``, in the case's dtype; a solve is for the gradients of other examples."""
        generator = torch.Generator().manual_seed(seed)
        X, y = self.workload.data(self.num_examples, generator)
        model, loss = self.workload.build(seed), self.workload.loss
        if self.quantity == "solve":
            others = Problem(model, loss, *self.workload.data(self.num_vectors, generator), torch.empty(0), 0.0)
            V = torch.stack(list(example_gradients(others.to(torch.float64))))
        elif self.quantity == "loss-hessian":
            V = torch.randn(self.num_vectors, *X.shape, generator=generator)
        else:
            V = torch.randn(self.num_vectors, self.workload.num_parameters, generator=generator)
        return Problem(model, loss, X, y, V, self.damping).to(self.dtype)


def _per_example(workload: Workload, num_examples: int, main: bool, *quantities: str, seconds: float = 30.0) -> list[Case]:
    vectors = {"dots": 8}
    return [Case(q, workload, num_examples, vectors.get(q, 1), main=main, seconds=seconds) for q in quantities]


CASES: tuple[Case, ...] = (
    *(
        Case("ggn", workload, N, V, main=True, seconds=seconds)
        for workload, N, both in (
            (REGRESSION, 1000, (20.0, 30.0)),
            (CLASSIFIER, 4096, (20.0, 55.0)),
            (LENET, 512, (25.0, 45.0)),
            (TRANSFORMER, 16, (30.0, 60.0)),
            (RESNET, 128, (80.0, 240.0)),
        )
        for V, seconds in zip((1, 8), both, strict=True)
    ),
    *(Case("ggn", WIDE, 4096, V, main=V == 1, seconds=seconds) for V, seconds in ((1, 30.0), (8, 120.0))),
    *(Case("ggn", SENTENCES, 8, V, main=V == 1, seconds=seconds) for V, seconds in ((1, 70.0), (8, 300.0))),
    *(Case("ggn", workload, N, 64, seconds=60.0) for workload, N in ((REGRESSION, 1000), (CLASSIFIER, 512), (LENET, 64))),
    Case("ggn", SMALLEST, 4, 1, main=True, seconds=15.0, note="overhead; asked: < 60 µs"),
    Case("norms", SMALLEST, 4, 1, seconds=15.0, note="overhead"),
    *(
        Case("hessian", workload, N, V, main=V == 1 and workload is not TRANSFORMER, seconds=25.0 if V == 1 else 60.0)
        for workload, N in ((REGRESSION, 1000), (CLASSIFIER, 4096), (LENET, 512), (TRANSFORMER, 16))
        for V in (1, 8)
    ),
    *_per_example(REGRESSION, 256, True, "grads", "grads-out", "norms", "dots", "gram", seconds=15.0),
    *_per_example(CLASSIFIER, 256, True, "grads", "grads-out", "norms", "dots", "gram", seconds=22.0),
    *_per_example(LENET, 256, True, "grads", "grads-out", "norms", "dots", "gram", seconds=22.0),
    *_per_example(RESNET, 64, True, "grads", "norms", seconds=50.0),
    *_per_example(RESNET, 64, False, "grads-out", "dots", "gram", seconds=60.0),
    *(Case("solve", LOGISTIC, 1000, V, damping=1e-3, main=V == 1, seconds=15.0 if V == 1 else 300.0) for V in (1, 100)),
    *(Case("solve", DIGITS, 100, V, damping=1e-3, main=True, seconds=15.0 if V == 1 else 180.0) for V in (1, 100)),
    Case("retrain", RETRAINED, 1280, 20, main=True, seconds=45.0),
    *(Case("sweep-n", workload, N, 1, main=True, seconds=12.0) for workload, N in ((REGRESSION, 8192), (CLASSIFIER, 8192), (LENET, 1024))),
    *(Case("sweep-v", workload, N, 64, main=True, seconds=15.0) for workload, N in ((REGRESSION, 1000), (CLASSIFIER, 512), (LENET, 64))),
)

# What a GPU is measured with.
GPU_CASES: tuple[Case, ...] = (
    *(
        Case("ggn", workload, N, V, main=True, seconds=seconds)
        for workload, N, seconds in ((REGRESSION, 1000, 40.0), (WIDE, 16384, 60.0), (RESNET18, 512, 240.0), (GPT2, 8, 300.0))
        for V in (1, 32)
    ),
    *(Case("loss-hessian", VOCABULARY, 4096, V, main=True) for V in (1, 8)),
    *_per_example(CLASSIFIER, 4096, True, "grads", "grads-out", "norms", "dots", "gram"),
    *_per_example(RESNET18, 128, True, "grads-out", "norms", seconds=120.0),
    Case("ggn", SMALLEST, 4, 1, main=True, note="overhead"),
    Case("solve", DIGITS, 1000, 100, damping=1e-3, main=True, seconds=60.0),
    Case("retrain", RETRAINED, 1280, 20, main=True, seconds=60.0),
)

# A miniature of every quantity: checks the code without measuring anything.
SMOKE_REGRESSION = MLP("smoke-regression", (3, 5, 4, 1), "tanh", "mse")
SMOKE_CLASSIFIER = MLP("smoke-classifier", (6, 5, 3), "relu", "cross_entropy")
SMOKE_LINEAR = MLP("smoke-linear", (6, 3), "relu", "cross_entropy")
SMOKE_LOGITS = Logits("smoke-logits", 7)
SMOKE_CASES: tuple[Case, ...] = (
    *(
        Case(quantity, workload, 12, num_vectors, damping=damping, main=True)
        for workload in (SMOKE_REGRESSION, SMOKE_CLASSIFIER)
        for quantity, num_vectors, damping in (
            ("ggn", 1, 0.0),
            ("ggn", 3, 0.0),
            ("hessian", 1, 0.0),
            ("hessian", 3, 0.0),
            ("grads", 1, 0.0),
            ("grads-out", 1, 0.0),
            ("norms", 1, 0.0),
            ("dots", 3, 0.0),
            ("gram", 1, 0.0),
            ("solve", 1, 1e-2),
            ("solve", 4, 1e-2),
        )
    ),
    *(Case("loss-hessian", SMOKE_LOGITS, 12, V) for V in (1, 3)),
    Case("solve", SMOKE_LINEAR, 12, 4, damping=1e-2),
    Case("retrain", SMOKE_CLASSIFIER, 300, 3),
    Case("sweep-n", SMOKE_CLASSIFIER, 64, 2),
    Case("sweep-v", SMOKE_CLASSIFIER, 12, 64),
)


def select(patterns: list[str], *, smoke: bool = False, main: bool = False, gpu: bool = False) -> list[Case]:
    """The CPU's or the GPU's cases whose names match one of the shell patterns (all for an empty list).

    ``main``: those of the main table alone.
    """
    cases = SMOKE_CASES if smoke else GPU_CASES if gpu else CASES
    return [c for c in cases if (c.main or not main) and (not patterns or any(fnmatch(c.name, p) for p in patterns))]
