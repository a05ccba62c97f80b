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
    "empty-word": lambda: "",
    "negative": lambda: -1,
    "huge": lambda: 10**400,
    "byte": lambda: np.uint8(255),
    "true": lambda: np.bool_(True),
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
    "array-scalar": lambda: np.array(2),
    "mask": lambda: [torch.tensor(False), torch.tensor(True)],
    "meta-indices": lambda: torch.ones(2, dtype=torch.long, device="meta"),
    "class": lambda: nn.Linear,
    "module": lambda: nn.Linear(2, 2),
    "no-targets": lambda: (X, None),
    "wide": lambda: (torch.cat([X, X], 1), Y),
    "meta-data": lambda: (X.to("meta"), Y),
    "differentiated": lambda: (X.clone().requires_grad_(), Y),
}
MAKE: dict[str, Any] = {"build_model": network, "loss": CE, "epochs": 1, "batch_size": 3}
RUN = ie.train(ie.Recipe(**MAKE), (X, Y))
SOLVERS = ie.solvers
SPECTRAL, KRONECKER = SOLVERS.Dual(spectral=True).factorise(G), SOLVERS.EKFAC().factorise(G)
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
    "BlockCG": (SOLVERS.BlockCG, {"rtol": 1e-3, "max_steps": 9, "check_every": 1, "preconditioner": None, "reorthogonalise": None}),
    "Neumann": (SOLVERS.Neumann, {"num_terms": 9, "scale": None, "rtol": None}),
    "EKFAC": (lambda **k: SOLVERS.EKFAC(**k).factorise(G), {"num_samples": 1, "seed": 0, "rtol": None}),
    "Dual": (lambda **k: SOLVERS.Dual(**k).factorise(G), {"max_roots": 99, "spectral": False, "rtol": None}),
    "Direct": (lambda **k: SOLVERS.Direct(**k).factorise(G), {"max_parameters": 99, "rtol": None}),
    "CG.solve": (SOLVERS.CG(on_failure="return").solve, {"operator": G, "B": torch.ones(P, dtype=F64), "x0": None}),
    "factorise-direct": (SOLVERS.Direct().factorise, {"operator": G}),
    "factorise-ekfac": (SOLVERS.EKFAC().factorise, {"operator": G}),
    "factorise-jacobi": (SOLVERS.Jacobi().factorise, {"operator": G}),
    "factorise-dual": (SOLVERS.Dual().factorise, {"operator": G}),
    "factorise-nystrom": (SOLVERS.Nystrom().factorise, {"operator": G}),
    "prepared": (SOLVERS.CG(preconditioner="jacobi").prepared, {"operator": G}),
    "prepared-nothing": (SOLVERS.CG().prepared, {"operator": G}),
    "damped": (G.damped, {"damping": 0.1}),
    "damped-dual": (SPECTRAL.damped, {"damping": 0.1}),
    "damped-ekfac": (KRONECKER.damped, {"damping": 0.1}),
    "kronecker_factors": (G.kronecker_factors, {"num_samples": 1, "seed": 0}),
    "retrain": (
        lambda **k: ie.retrain(**{"run": RUN, "start": "warm", "epochs": 1, **k}),
        {"run": RUN, "remove": [0], "converge": False, "progress": False},
    ),
    "retrain_many": (lambda **k: ie.retrain_many(RUN, start="warm", **{"epochs": 1, **k}), {"remove": [[0], [1]], "memory_budget": None}),
    "proximal_response": (lambda **k: ie.proximal_response(RUN, **{"remove": [0], **k}), {"damping": 0.1, "epochs": 1}),
    "decompose": (
        lambda **k: ie.decompose(RUN, **{"damping": 0.1, "epochs": 1, "max_steps": 2, **k}),
        {"remove": [[0]], "solver": SOLVERS.CG()},
    ),
    "train": (ie.train, {"recipe": ie.Recipe(**MAKE), "data": (X, Y), "progress": False}),
    "linearized_pbrf": (
        lambda **k: ie.linearized_pbrf(MODEL, CE, **{"train_data": (X, Y), "remove": [0], "damping": 0.1, **k}),
        {"remove": [0], "weight_decay": 0.0, "solver": None, "memory_budget": None},
    ),
    "Decomposition.load": (ie.bregman.Decomposition.load, {"path": "/nonexistent"}),
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
            if argument == "progress" and kind == "module":  # a callable, whose own errors are the caller's
                continue
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


@pytest.mark.parametrize("path", [None, 3, b"x", "", ["x"]])
def test_what_is_no_path_is_refused(path: Any) -> None:
    for who, call in (("Scores.save", SCORES.save), ("load_scores", ie.load_scores), ("Decomposition.load", ie.bregman.Decomposition.load)):
        with pytest.raises(ArgumentError, match=rf"^{who}: expected a path, got "):
            call(path)


def test_numbers_and_answers_of_numpy_are_pythons() -> None:
    """None overflows or rounds where it meets others."""
    assert repr(ie.solvers.CG(rtol=np.float32(0.5), max_steps=np.uint8(9), reorthogonalise=np.uint8(0))) == repr(
        ie.solvers.CG(rtol=0.5, max_steps=9, reorthogonalise=0)
    )
    assert ie.solvers.Dual(spectral=np.bool_(True)).factorise(G).eigenvalues is not None
    assert SCORES.top(2, 0, harmful=np.bool_(True)) == SCORES.top(2, 0, harmful=True)
    assert ie.solvers.auto(G, 2, memory_budget=np.uint8(200)).reason == ie.solvers.auto(G, 2, memory_budget=200.5).reason
    assert G.to_dense(np.uint8(200)).shape == (P, P)


@pytest.mark.parametrize("mask", [[torch.tensor(False), torch.tensor(True)], [np.bool_(False), np.bool_(True)], [False, True]])
def test_masks_are_no_indices(mask: Any) -> None:
    with pytest.raises(ArgumentError, match="expected example indices as integers"):
        ie.Influence(MODEL, CE, (X, Y), 0.1).self_influence(mask)


class Detached(nn.Linear):
    """Gives no gradient."""

    def forward(self, X: Tensor) -> Tensor:
        return super().forward(X).detach()


class Keyed(nn.Linear):
    """Wants a dict."""

    def forward(self, X: Any) -> Tensor:
        return super().forward({"x": X}["input"])


@pytest.mark.parametrize(
    ("kind", "message"), [(Detached, "expected outputs that PyTorch can differentiate"), (Keyed, "got KeyError: 'input'")]
)
def test_networks_that_cannot_be_trained_are_refused(kind: type[nn.Module], message: str) -> None:
    with pytest.raises(InfluenceExtError, match=message):
        ie.train(ie.Recipe(lambda: kind(4, 3, dtype=F64), CE, epochs=1), (X, Y))
