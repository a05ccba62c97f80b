"""Influence functions, proximal Bregman responses and the five-term decomposition on fused C++ kernels.

>>> import influence_ext as ie
>>> influence = ie.Influence(model, loss, (X_train, y_train), damping=1e-3)
>>> influence.scores((X_test, y_test)).top(5, test=0)
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch  # first: the extension needs its libraries and shares its OpenMP

from influence_ext import binary

_compiled = binary.compiled_against()
if _mismatch := binary.mismatch(_compiled, torch.__version__, torch.compiled_with_cxx11_abi(), torch.version.cuda):
    raise ImportError(_mismatch)
try:
    import influence_ext._C as _C
except ImportError as reason:
    raise ImportError(binary.failure(_compiled, torch.__version__, reason)) from reason

if TYPE_CHECKING:
    from influence_ext import errors, losses, solvers
    from influence_ext.bregman.decompose import Decomposition, decompose
    from influence_ext.bregman.pbrf import linearized_pbrf, pbrf
    from influence_ext.bregman.recipe import Recipe, Run, train
    from influence_ext.bregman.response import Response
    from influence_ext.bregman.retrain import proximal_response, proximal_response_many, retrain, retrain_many
    from influence_ext.influence import Influence, Scores, load_scores
    from influence_ext.memory import empty_cache, set_cache_limit
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
    "empty_cache",
    "errors",
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
    "proximal_response_many",
    "retrain",
    "retrain_many",
    "set_cache_limit",
    "solvers",
    "train",
    "vjp",
]

_LAYERS = ("memory", "operators", "influence", "bregman")  # each needs the ones before it; the first needs none


if not TYPE_CHECKING:  # a type checker that saw it would take any name for one of ours

    def __getattr__(name: str) -> Any:
        """Load the layer that holds a public name when the name is first used, so that the import itself costs next to nothing."""
        if not name.startswith("_"):
            if find_spec(f"{__name__}.{name}"):
                return import_module(f"{__name__}.{name}")
            if name in __all__:
                for layer in _LAYERS:
                    module = import_module(f"{__name__}.{layer}")
                    if name in module.__all__:
                        value = globals()[name] = getattr(module, name)
                        return value
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def build_info() -> dict[str, Any]:
    """What this build is and what it found on this machine.

    Returns:
        Version, torch's version and that of the torch it was compiled against, compiler, OpenMP and the number of threads seen in a
        parallel region, instruction sets compiled and the one in use, CUDA, the bytes of freed memory that are kept and may be
        (:func:`empty_cache`), and the native rules and losses.
    """
    from influence_ext.context import standalone  # loaded when something is computed, as the layers are

    native: dict[str, Any] = dict(standalone(_C.build_info)())
    cached, limit = _C.cache_size()
    return {
        "version": __version__,
        "torch": torch.__version__,
        "compiled_against_torch": _compiled["torch"] if _compiled else "unknown",
        **native,
        "threads": torch.get_num_threads(),
        "cache_bytes": cached,
        "cache_limit": limit,
        "rules": _C.rules(),
        "losses": _C.losses(),
    }
