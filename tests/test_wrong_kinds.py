"""Each argument of the public functions replaced by what it is not: the library's own sentence, or an answer; never an error from inside.

And nothing of the caller's is changed: parameters, gradients, modes, data, random states.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import influence_ext as ie
from influence_ext.errors import ArgumentError, InfluenceExtError

F64 = torch.float64
CE = nn.CrossEntropyLoss()


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5), nn.Tanh(), nn.Linear(3, 3)).double().train()


MODEL = network()
X, Y = torch.linspace(-1, 1, 24, dtype=F64).view(6, 4), torch.arange(6) % 3
P = sum(p.numel() for p in MODEL.parameters())
G = ie.GGN(MODEL, CE, (X, Y), 0.1)
for _p in MODEL.parameters():
    _p.grad = torch.ones_like(_p)
SCORES = ie.Scores(torch.zeros(2, 6), torch.zeros(2, 6), torch.zeros(2))

KINDS: dict[str, Callable[[], Any]] = {
    "none": lambda: None,
    "word": lambda: "nonsense",
    "negative": lambda: -1,
    "nan": lambda: float("nan"),
    "fraction": lambda: 2.5,
    "list": lambda: [1, "a"],
    "dict": lambda: {"a": 1},
    "object": object,
    "read": lambda: iter(()),
    "scalar": lambda: torch.tensor(1.0),
    "complex": lambda: torch.ones(6, 4, dtype=torch.complex64),
    "sparse": lambda: torch.eye(6).to_sparse(),
    "meta": lambda: torch.empty(6, 4, device="meta"),
    "array": lambda: np.ones((6, 4)),
    "class": lambda: nn.Linear,
    "module": lambda: nn.Linear(2, 2),
    "no-targets": lambda: (X, None),
    "wide": lambda: (torch.cat([X, X], 1), Y),
    "meta-data": lambda: (X.to("meta"), Y),
    "differentiated": lambda: (X.clone().requires_grad_(), Y),
}
MAKE: dict[str, Any] = {"build_model": network, "loss": CE, "epochs": 1, "batch_size": 3}
CALLS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "GGN": (
        ie.GGN,
        {
            "model": MODEL,
            "loss": CE,
            "data": (X, Y),
            "damping": 0.1,
            "params": None,
            "memory_budget": None,
            "reduction": None,
            "schedule": "auto",
            "precision": "full",
            "graphs": "auto",
            "weights": None,
        },
    ),
    "MonteCarloFisher": (lambda **k: ie.MonteCarloFisher(MODEL, CE, (X, Y), **k), {"num_samples": 1, "seed": 0}),
    "matmat": (G.matmat, {"V": torch.ones(2, P, dtype=F64)}),
    "matvec": (G.matvec, {"v": torch.ones(P, dtype=F64)}),
    "to_dense": (G.to_dense, {"block_size": 8}),
    "sample": (G.sample, {"generator": torch.Generator(), "batch_size": 2}),
    "at_precision": (G.at_precision, {"precision": "full"}),
    "jvp": (lambda v: ie.jvp(MODEL, X, v), {"v": torch.ones(P, dtype=F64)}),
    "vjp": (lambda X, g: ie.vjp(MODEL, X, g), {"X": X, "g": torch.ones(6, 3, dtype=F64)}),
    "per_example_dots": (lambda V: ie.per_example_dots(MODEL, CE, (X, Y), V), {"V": torch.ones(P, dtype=F64)}),
    "Influence": (
        lambda **k: ie.Influence(MODEL, CE, (X, Y), **{"damping": 0.1, **k}).self_influence([0]),
        {"damping": 0.1, "curvature": "ggn", "solver": None},
    ),
    "self_influence": (ie.Influence(MODEL, CE, (X, Y), 0.1).self_influence, {"indices": [0]}),
    "top": (SCORES.top, {"k": 1, "test": 0, "harmful": False}),
    "load_scores": (ie.load_scores, {"path": "/nonexistent"}),
    "Recipe": (
        lambda **k: ie.Recipe(**{**MAKE, **k}),
        {"optimizer": "sgd", "lr": 0.1, "epochs": 1, "batch_size": 3, "seed": 0, "betas": (0.9, 0.9), "dtype": None, "device": None},
    ),
    "pbrf": (
        lambda **k: ie.pbrf(MODEL, CE, **{"train_data": (X, Y), "remove": [0], "damping": 0.1, **k}),
        {"train_data": (X, Y), "remove": [0], "damping": 0.1, "rtol": None, "max_steps": 9, "memory_budget": None, "on_failure": "raise"},
    ),
    "auto": (lambda **k: ie.solvers.auto(G, **{"num_rhs": 2, **k}), {"num_rhs": 2, "at_once": None, "memory_budget": None}),
    "CG": (ie.solvers.CG, {"rtol": 1e-3, "max_steps": 9, "preconditioner": None, "reorthogonalise": None}),
    "LiSSA": (ie.solvers.LiSSA, {"num_steps": 9, "scale": None, "batch_size": None, "seed": 0, "rtol": None}),
    "Nystrom": (ie.solvers.Nystrom, {"rank": 3, "seed": 0}),
}


def state() -> list[Tensor | Any]:
    parameters = [x for p in MODEL.parameters() for x in (p.detach().clone(), None if p.grad is None else p.grad.clone())]
    return [*parameters, [m.training for m in MODEL.modules()], torch.get_rng_state(), X.clone(), Y.clone(), torch.is_grad_enabled()]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CALLS)
def test_every_wrong_kind(name: str) -> None:
    function, arguments = CALLS[name]
    for argument in arguments:
        for kind, make in KINDS.items():
            value, before = make(), state()
            try:
                function(**{**arguments, argument: value})
            except Exception as error:
                if not isinstance(error, InfluenceExtError) or "expected" not in str(error) or "got" not in str(error):
                    raise AssertionError(f"{name}({argument}={kind})") from error
            same = [torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(before, state(), strict=True)]
            assert all(same), (argument, kind)


def test_blocks_of_no_size_are_no_matrix() -> None:
    with pytest.raises(ArgumentError, match=r"GGN\.to_dense: expected block_size to be at least 1, got -1"):
        G.to_dense(block_size=-1)
