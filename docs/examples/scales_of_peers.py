"""Sign and scale of the influence scores of other libraries, measured against ours on a problem where all of them are exact.

A softmax regression in float64: its Hessian is its Gauss-Newton matrix, so every library that solves exactly computes the same numbers
up to a convention. For each library that is installed, the script prints the factor that turns its scores into ours, and fails if the
factor is another one than docs/scales.md says. Install those you have scripts for: pip install pyDVL captum dattri kronfluence.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import influence_ext as ie

N, NUM_TEST, FEATURES, CLASSES, DAMPING = 60, 7, 4, 3, 0.05


def problem() -> tuple[nn.Module, Tensor, Tensor, Tensor, Tensor]:
    """A softmax regression that has been trained for a while, its training data and test data, in float64."""
    torch.manual_seed(0)
    X, X_test = torch.randn(N, FEATURES, dtype=torch.float64), torch.randn(NUM_TEST, FEATURES, dtype=torch.float64)
    truth = torch.randn(FEATURES, CLASSES, dtype=torch.float64)
    y = (X @ truth + torch.randn(N, CLASSES, dtype=torch.float64)).argmax(1)
    y_test = (X_test @ truth).argmax(1)
    model = nn.Linear(FEATURES, CLASSES).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(50):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X), y).backward()
        optimizer.step()
    return model, X, y, X_test, y_test


@dataclass(frozen=True)
class Comparison:
    """``ours = factor · theirs``, as docs/scales.md says; the deviation allowed is theirs: some of them compute in float32."""

    name: str
    theirs: Tensor
    ours: Tensor
    factor: float
    tolerance: float = 1e-6

    def holds(self) -> bool:
        """Whether the measured factor and the agreement are what they should be."""
        return self.deviation() <= self.tolerance

    def measured(self) -> float:
        """The factor that fits best."""
        return float((self.ours * self.theirs).sum() / (self.theirs * self.theirs).sum())

    def deviation(self) -> float:
        """Relative, in the Frobenius norm, with the stated factor."""
        return float((self.ours - self.factor * self.theirs).norm() / self.ours.norm())


def our_scores(damping: float = DAMPING) -> Tensor:
    """``[test, train]``."""
    model, X, y, X_test, y_test = problem()
    return ie.Influence(model, nn.CrossEntropyLoss(), (X, y), damping=damping).scores((X_test, y_test)).values


def pydvl() -> list[Comparison]:
    """DirectInfluence, mode Up: ⟨H⁻¹∇ℓ_t, ∇ℓ_i⟩ with the Hessian of the mean loss, without 1/N."""
    from pydvl.influence.torch import DirectInfluence

    model, X, y, X_test, y_test = problem()
    influence = DirectInfluence(model, nn.functional.cross_entropy, regularization=DAMPING)
    influence.fit(DataLoader(TensorDataset(X, y), batch_size=N))
    return [Comparison("pyDVL DirectInfluence", influence.influences(X_test, y_test, X, y).detach(), our_scores(), 1 / N)]


def captum() -> list[Comparison]:
    """NaiveInfluenceFunction: the Hessian of the summed loss, so its hessian_reg is N λ; TracInCP: products of gradients."""
    from captum.influence import TracInCP
    from captum.influence._core.influence_function import NaiveInfluenceFunction

    model, X, y, X_test, y_test = problem()
    data = TensorDataset(X, y)
    learning_rate = 0.25

    def load(network: nn.Module, checkpoint: str) -> float:
        network.load_state_dict(torch.load(checkpoint))
        return learning_rate

    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "final.pt")
        torch.save(model.state_dict(), path)
        naive = NaiveInfluenceFunction(
            model,
            data,
            path,
            load,
            loss_fn=nn.CrossEntropyLoss(reduction="none"),
            batch_size=20,
            projection_dim=(FEATURES + 1) * CLASSES,
            hessian_reg=N * DAMPING,
            hessian_inverse_tol=0.0,
            show_progress=False,
        )
        tracin = TracInCP(
            model, data, [path], load, loss_fn=nn.CrossEntropyLoss(reduction="sum"), batch_size=20, sample_wise_grads_per_batch=True
        )
        gram = ie.grad_gram(model, nn.CrossEntropyLoss(), (X_test, y_test), (X, y))
        return [
            Comparison("captum NaiveInfluenceFunction", naive.influence((X_test, y_test)), our_scores(), 1.0),
            Comparison("captum TracInCP (ours: grad_gram)", tracin.influence((X_test, y_test)), gram, 1 / learning_rate),
        ]


def dattri() -> list[Comparison]:
    """IFAttributorExplicit: [train, test], without 1/N, float32."""
    from dattri.algorithm.influence_function import IFAttributorExplicit
    from dattri.task import AttributionTask

    model, X, y, X_test, y_test = problem()

    def loss(params: Any, data_target_pair: Any) -> Tensor:
        inputs, targets = data_target_pair
        return nn.functional.cross_entropy(torch.func.functional_call(model, params, (inputs,)), targets)

    task = AttributionTask(loss_func=loss, model=model, checkpoints=[model.state_dict()])
    attributor = IFAttributorExplicit(task=task, device="cpu", regularization=DAMPING)
    train = DataLoader(TensorDataset(X, y), batch_size=N)
    attributor.cache(train)
    with contextlib.redirect_stderr(io.StringIO()):
        scores = attributor.attribute(train, DataLoader(TensorDataset(X_test, y_test), batch_size=NUM_TEST))
    return [Comparison("dattri IFAttributorExplicit, one batch", scores.T.double(), our_scores(), 1 / N)]


def kronfluence() -> list[Comparison]:
    """EK-FAC with the empirical Fisher on one weight, where its factors are exact; the losses are sums, the damping is absolute."""
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task

    class Regression(Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            return 0.5 * (model(batch[0]) - batch[1]).square().sum()

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

    torch.manual_seed(0)
    x, x_test = torch.randn(N, 1), torch.randn(NUM_TEST, 1)
    y, y_test = 0.5 * x + torch.randn(N, 1), 0.5 * x_test + torch.randn(NUM_TEST, 1)
    model = nn.Sequential(nn.Linear(1, 1, bias=False))  # the module it tracks must be a child
    ours = ie.Influence(model, "half_mse_loss", (x, y), damping=DAMPING, curvature="empirical_fisher").scores((x_test, y_test)).values
    with tempfile.TemporaryDirectory() as folder:
        task = Regression()
        analyzer = Analyzer("check", prepare_model(model, task), task, output_dir=folder, cpu=True, disable_tqdm=True, log_level=40)
        train, test = TensorDataset(x, y), TensorDataset(x_test, y_test)
        analyzer.fit_all_factors("ekfac", train, factor_args=FactorArguments("ekfac", use_empirical_fisher=True))
        analyzer.compute_pairwise_scores(
            "scores", "ekfac", test, train, per_device_query_batch_size=NUM_TEST, score_args=ScoreArguments(damping_factor=DAMPING)
        )
        scores = analyzer.load_pairwise_scores("scores")["all_modules"]
    return [Comparison("Kronfluence EK-FAC", scores, ours, 1 / N, tolerance=1e-4)]


CHECKS: dict[str, Callable[[], list[Comparison]]] = {
    "pydvl": pydvl,
    "captum": captum,
    "dattri": dattri,
    "kronfluence": kronfluence,
}


def main() -> None:
    """Compare with every library that is there."""
    failed = []
    for package, check in CHECKS.items():
        if importlib.util.find_spec(package) is None:
            print(f"{package}: not installed, not compared")
            continue
        for found in check():
            print(f"{found.name}: ours = {found.measured():.6g} x theirs (stated {found.factor:.6g}), deviation {found.deviation():.1e}")
            if not found.holds():
                failed.append(found.name)
    if failed:
        raise SystemExit(f"scales_of_peers: expected the factors of docs/scales.md, got others for {', '.join(failed)}; correct the page.")


if __name__ == "__main__":
    main()
