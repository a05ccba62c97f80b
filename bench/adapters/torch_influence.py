"""The adapter for torch-influence against the original, or a stand-in for it, in one run.

    python -m bench.adapters.torch_influence                 all cases
    python -m bench.adapters.torch_influence --cases 'mlp*'  some

Each case is a script of torch-influence's: a module, then scores of all training examples on the mean loss of test examples. "First"
is the first such call, with the capture of the network; "then" is the ratio of medians of further calls, which take turns. Exit
status: 0 every correlation above 0.999, 1 one is not, 2 usage.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import influence_ext.adapters.torch_influence as adapter
from bench.timing import interleave

TEST_EXAMPLES = [3, 1, 4]
Problem = tuple[nn.Module, Any, Tensor, Tensor]


@dataclass(frozen=True)
class Case:
    """A training problem and the module that scores it."""

    name: str
    problem: Callable[[Any], Problem]
    module: str
    options: dict[str, Any]
    batch_size: int
    damp: float = 0.0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.adapters.torch_influence", description=__doc__.split("\n\n")[0])
    parser.add_argument("--cases", default="*", help="a pattern of names")
    parser.add_argument("--seconds", type=float, default=20.0, help="of timing for each case")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    chosen = [case for case in CASES if fnmatch(case.name, args.cases)]
    if not chosen:
        print(f"bench: expected --cases to match one of {', '.join(case.name for case in CASES)}, got {args.cases}.", file=sys.stderr)
        return 2
    peer, name = original()
    print(f"against {name}, {args.threads} thread{'s' if args.threads > 1 else ''}, torch {torch.__version__}\n")
    print(f"{'case':34s} {'first':>8s} {'then':>8s} {'correlation':>12s} {'difference':>11s}")
    correlations = [compare(case, peer, args.seconds) for case in chosen]
    return 0 if min(correlations) > 0.999 else 1


def original() -> tuple[Any, str]:
    """torch-influence if it is installed, else the stand-in, and what it is called."""
    try:
        return importlib.import_module("torch_influence"), "torch-influence"
    except ImportError:
        return importlib.import_module("bench.adapters.autograd_influence"), "double backward in plain torch, as torch-influence does it"


def compare(case: Case, peer: Any, seconds: float) -> float:
    """Print a row and return the correlation of the scores."""
    calls, scores, first = {}, {}, {}
    for name, library in (("peer", peer), ("ours", adapter)):
        calls[name] = script(case, library)
        start = time.perf_counter()
        scores[name] = calls[name]().double()
        first[name] = time.perf_counter() - start
    timing = interleave(calls, seconds=seconds, min_rounds=3)
    both = torch.stack([scores["peer"], scores["ours"]])
    correlation = float(torch.corrcoef(both)[0, 1])
    difference = float((both[0] - both[1]).abs().max() / both[0].abs().max())
    then = timing["peer"].median / timing["ours"].median
    print(f"{case.name:34s} {first['peer'] / first['ours']:7.1f}× {then:7.1f}× {correlation:12.6f} {difference:11.1e}", flush=True)
    return correlation


def script(case: Case, library: Any) -> Callable[[], Tensor]:
    """What a user runs, with either library: scores from one module, or where the module's construction is the work, from a new one."""
    model, objective, X, y = case.problem(getattr(library, "BaseObjective", adapter.BaseObjective))
    loader = DataLoader(TensorDataset(X, y), batch_size=case.batch_size)
    kwargs = {"model": model, "objective": objective, "train_loader": loader, "test_loader": loader, "device": torch.device("cpu")}

    def make() -> Any:
        return getattr(library, case.module)(**kwargs, damp=case.damp, **case.options)

    kept = None if case.module == "AutogradInfluenceModule" else make()

    def run() -> Tensor:
        torch.manual_seed(0)  # LiSSA draws its batches from the global generator
        return (kept or make()).influences(list(range(len(X))), TEST_EXAMPLES)

    return run


# ---------------------------------------------------------------------------------------------------------------------
# Problems


def objective_of(base: type, loss: Callable[[Tensor, Tensor], Tensor], l2: float, outputs: Callable[[Tensor], Tensor]) -> Any:
    class Objective(base):  # type: ignore[misc, valid-type]
        def train_outputs(self, model: nn.Module, batch: Any) -> Tensor:
            return outputs(model(batch[0]))

        def train_loss_on_outputs(self, outputs: Tensor, batch: Any) -> Tensor:
            return loss(outputs, batch[1])

        def train_regularization(self, params: Tensor) -> Tensor:
            return 0.5 * l2 * torch.square(params.norm())

        def test_loss(self, model: nn.Module, params: Tensor, batch: Any) -> Tensor:
            return self.train_loss_on_outputs(self.train_outputs(model, batch), batch)

    return Objective()


def data(N: int, D: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(N, D, generator=generator)
    return X, X @ torch.randn(D, 1, generator=generator) / D**0.5 + 0.3 * torch.randn(N, 1, generator=generator)


def linear(base: type) -> Problem:
    """The size of torch-influence's own regression test."""
    X, y = data(100, 10)
    return fitted(nn.Linear(10, 1), objective_of(base, F.mse_loss, 1e-2, lambda z: z), X, y)


def logistic(base: type) -> Problem:
    """The size of its example: a classifier of 2048 features that returns probabilities."""
    X, y = data(1800, 2048)
    model = nn.Sequential(nn.Linear(2048, 1), nn.Flatten(start_dim=-2), nn.Sigmoid())
    return fitted(model, objective_of(base, F.binary_cross_entropy, 2e-4, lambda z: z), X, (y[:, 0] > 0).float())


def digits(base: type) -> Problem:
    """About its test on two classes of MNIST, probabilities outside the model."""
    X, y = data(4000, 784)
    return fitted(nn.Linear(784, 1), objective_of(base, F.binary_cross_entropy, 2e-2, torch.sigmoid), X, (y > 0).float())


def mlp(base: type) -> Problem:
    X, y = data(1000, 20)
    model = nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 3))
    labels = (y[:, 0] > 0.5).long() + (y[:, 0] > -0.5).long()
    return fitted(model, objective_of(base, F.cross_entropy, 1e-2, lambda z: z), X, labels)


def fitted(model: nn.Module, objective: Any, X: Tensor, y: Tensor) -> Problem:
    """Some way towards the minimum, so that the Hessian is that of a trained model."""
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        nn.init.normal_(p, std=p.shape[-1] ** -0.5 / 2, generator=generator)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(300):
        optimizer.zero_grad()
        objective.train_loss(model, torch.cat([p.view(-1) for p in model.parameters()]), [X, y]).backward()
        optimizer.step()
    model.zero_grad()
    return model, objective, X, y


LISSA = {"repeat": 2, "depth": 200, "scale": 50.0}
CASES = [
    Case("linear, CG", linear, "CGInfluenceModule", {"atol": 0.0}, 7, 0.02),
    Case("linear, CG, Gauss-Newton", linear, "CGInfluenceModule", {"atol": 0.0, "gnh": True}, 7, 0.02),
    Case("linear, dense", linear, "AutogradInfluenceModule", {}, 7, 0.02),
    Case("linear, LiSSA", linear, "LiSSAInfluenceModule", LISSA, 64, 0.02),
    Case("logistic of 2048, CG", logistic, "CGInfluenceModule", {"atol": 1e-8, "maxiter": 1000}, 32, 0.001),
    Case("logistic of 784, CG", digits, "CGInfluenceModule", {"atol": 1e-8, "maxiter": 300}, 100),
    Case("logistic of 784, LiSSA", digits, "LiSSAInfluenceModule", {"repeat": 1, "depth": 1000, "scale": 10.0}, 100),
    Case("mlp, CG, Gauss-Newton", mlp, "CGInfluenceModule", {"gnh": True, "maxiter": 30}, 32, 0.01),
    Case("mlp, CG", mlp, "CGInfluenceModule", {"maxiter": 30}, 32, 0.1),
    Case("mlp, LiSSA, Gauss-Newton", mlp, "LiSSAInfluenceModule", {**LISSA, "gnh": True}, 32, 0.01),
    Case("mlp, LiSSA", mlp, "LiSSAInfluenceModule", LISSA, 32, 0.1),
]

if __name__ == "__main__":
    sys.exit(main())
