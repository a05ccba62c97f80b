"""Influence functions, proximal Bregman responses and the five-term decomposition on fused C++ kernels.

>>> import influence_ext as ie
>>> influence = ie.Influence(model, loss, (X_train, y_train), damping=1e-3)
>>> influence.scores((X_test, y_test)).top(5, test=0)
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch  # first: the extension needs its libraries and shares its OpenMP

try:
    import influence_ext._C as _C
except ImportError as reason:
    raise ImportError(
        "influence_ext: expected the compiled extension influence_ext._C to load with this torch "
        f"({torch.__version__}), got: {reason}; rebuild it with `pip install --no-build-isolation .` in this environment."
    ) from reason

from influence_ext import losses, solvers
from influence_ext.bregman import (
    Decomposition,
    Recipe,
    Response,
    Run,
    decompose,
    linearized_pbrf,
    pbrf,
    proximal_response,
    retrain,
    train,
)
from influence_ext.influence import Influence, Scores, load_scores
from influence_ext.operators import (
    GGN,
    EmpiricalFisher,
    Hessian,
    MonteCarloFisher,
    grad_gram,
    jvp,
    per_example_dots,
    per_example_grads,
    per_example_norms,
    vjp,
)

try:
    __version__ = version("influence-ext")
except PackageNotFoundError:  # a source tree that was built in place and not installed
    __version__ = "0.1.0+source"

__all__ = [
    "GGN",
    "Decomposition",
    "EmpiricalFisher",
    "Hessian",
    "Influence",
    "MonteCarloFisher",
    "Recipe",
    "Response",
    "Run",
    "Scores",
    "__version__",
    "build_info",
    "decompose",
    "grad_gram",
    "jvp",
    "linearized_pbrf",
    "load_scores",
    "losses",
    "pbrf",
    "per_example_dots",
    "per_example_grads",
    "per_example_norms",
    "proximal_response",
    "retrain",
    "solvers",
    "train",
    "vjp",
]


def build_info() -> dict[str, Any]:
    """What this build is and what it found on this machine.

    Returns:
        Version, torch's version, compiler, OpenMP and the number of threads seen in a parallel region, instruction sets compiled and the
        one in use, CUDA, and the native rules and losses.
    """
    native: dict[str, Any] = dict(_C.build_info())
    return {
        "version": __version__,
        "torch": torch.__version__,
        **native,
        "threads": torch.get_num_threads(),
        "rules": _C.rules(),
        "losses": _C.losses(),
    }
