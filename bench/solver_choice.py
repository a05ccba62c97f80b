"""Which solver takes fewest products: ``python -m bench.solver_choice FOLDER``, the table of ``bench/notes/solves.md``; with
``--choices`` how far from the fastest ``auto`` chooses, the second table there.

Real data, trained networks, gradients of other examples as right-hand sides. Data: digits, breast cancer and MNIST as packages ship them;
CIFAR-10 (``cifar10_test_jpeg.npz``), WikiText-2 (``wikitext2_valid.txt``) and UCI energy (``energy.csv``) from FOLDER.
"""

from __future__ import annotations

import argparse
import io
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import influence_ext as ie
from influence_ext.cli import datasets
from influence_ext.solvers import CG, EKFAC, BlockCG, Direct, Dual, Nystrom, Solver, auto

Data = tuple[nn.Module, nn.Module, Tensor, Tensor]
DAMPINGS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
NUM_RHS = (1, 10, 100)
MAX_STEPS = 1000
LONG = 1.0
"""Seconds of a solve that is not repeated."""
HOPELESS = 40
"""What is taken to cost so many times as much as the choice is not run beside it."""


def _standardised(X: Tensor) -> Tensor:
    return (X - X.mean(0)) / X.std(0).clamp_min(1e-6)


def _digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    X, y = load_digits(return_X_y=True)
    return torch.tensor(X, dtype=torch.float32) / 16, torch.tensor(y)


def digits_mlp(folder: Path) -> Data:
    """MLP 64-64-10 on digits."""
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)), nn.CrossEntropyLoss(), *_digits()


def digits_lenet(folder: Path) -> Data:
    """Two convolutions and two linear layers on digits, 8x8."""
    X, y = _digits()
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(6, 16, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2),
        nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10),
    )  # fmt: skip
    return model, nn.CrossEntropyLoss(), X.reshape(-1, 1, 8, 8), y


def mnist_softmax(folder: Path) -> Data:
    """Softmax regression 784-10 on MNIST."""
    data = datasets.load("mnist", num_train=2000, num_test=1)
    return nn.Linear(784, 10), nn.CrossEntropyLoss(), data.X, data.y


def cancer_logistic(folder: Path) -> Data:
    """Logistic regression with 30 features on breast cancer."""
    from sklearn.datasets import load_breast_cancer

    X, y = load_breast_cancer(return_X_y=True)
    return nn.Linear(30, 2), nn.CrossEntropyLoss(), _standardised(torch.tensor(X, dtype=torch.float32)), torch.tensor(y)


def tiny_mlp(folder: Path) -> Data:
    """MLP 30-8-2 on breast cancer."""
    _, loss, X, y = cancer_logistic(folder)
    return nn.Sequential(nn.Linear(30, 8), nn.Tanh(), nn.Linear(8, 2)), loss, X, y


def mnist_mlp(folder: Path) -> Data:
    """MLP 784-128-128-10 on MNIST."""
    data = datasets.load("mnist", num_train=2000, num_test=1)
    model = nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    return model, nn.CrossEntropyLoss(), data.X, data.y


def mnist_lenet(folder: Path) -> Data:
    """LeNet on MNIST."""
    data = datasets.load("mnist", num_train=2000, num_test=1)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10),
    )  # fmt: skip
    return model, nn.CrossEntropyLoss(), data.X.reshape(-1, 1, 28, 28), data.y


def energy_mlp(folder: Path) -> Data:
    """MLP 8-64-64-1 on UCI energy."""
    table = torch.tensor(np.loadtxt(folder / "energy.csv", delimiter=",", skiprows=1), dtype=torch.float32)
    model = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
    return model, nn.MSELoss(), _standardised(table[:, :8]), _standardised(table[:, 8:9])


def cifar_conv(folder: Path) -> Data:
    """Two strided convolutions and a linear layer on CIFAR-10 (JPEG)."""
    from PIL import Image

    with np.load(folder / "cifar10_test_jpeg.npz") as file:
        jpeg, offsets, labels = file["jpeg"].tobytes(), file["offsets"], file["labels"]
    images = [np.asarray(Image.open(io.BytesIO(jpeg[offsets[k] : offsets[k + 1]]))) for k in range(1000)]
    X = torch.tensor(np.stack(images), dtype=torch.float32).permute(0, 3, 1, 2) / 255 - 0.5
    model = nn.Sequential(
        nn.Conv2d(3, 12, 4, stride=4), nn.ReLU(), nn.Conv2d(12, 24, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(216, 10)
    )
    return model, nn.CrossEntropyLoss(), X, torch.tensor(labels[:1000]).long()


class Transformer(nn.Module):
    """One block over characters, which predicts the last character's successor."""

    def __init__(self, vocabulary: int, width: int, length: int):
        super().__init__()
        self.embedding, self.position = nn.Embedding(vocabulary, width), nn.Parameter(0.1 * torch.randn(length, width))
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down, self.head = nn.Linear(width, 2 * width), nn.Linear(2 * width, width), nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.out(mixed)
        x = x + self.down(nn.functional.gelu(self.up(self.norm2(x))))
        return self.head(x[:, -1])


def text_transformer(folder: Path) -> Data:
    """A transformer of one block, width 24, over 12 characters of WikiText-2."""
    text = [ord(character) % 64 for character in (folder / "wikitext2_valid.txt").read_text()[:40_000].lower()]
    windows = torch.tensor(text).unfold(0, 13, 11)[:1500]
    return Transformer(64, 24, 12), nn.CrossEntropyLoss(), windows[:, :12].contiguous(), windows[:, 12].contiguous()


PROBLEMS: dict[str, tuple[Callable[[Path], Data], int]] = {  # and the number of training examples
    "cancer, logistic": (cancer_logistic, 400),
    "cancer, tiny MLP": (tiny_mlp, 400),
    "energy, MLP": (energy_mlp, 300),
    "digits, MLP": (digits_mlp, 300),
    "digits, LeNet": (digits_lenet, 300),
    "MNIST, softmax": (mnist_softmax, 500),
    "MNIST, MLP": (mnist_mlp, 100),
    "MNIST, LeNet": (mnist_lenet, 100),
    "CIFAR-10, convolutions": (cifar_conv, 200),
    "WikiText-2, transformer": (text_transformer, 200),
}


def trained(name: str, folder: Path) -> tuple[nn.Module, nn.Module, tuple[Tensor, Tensor], Tensor]:
    """The network after 300 steps of Adam, its loss and data, and gradients of 100 other examples."""
    build, num_examples = PROBLEMS[name]
    torch.manual_seed(0)
    model, loss, X, y = build(folder)
    order = torch.randperm(len(X))
    X, y = X[order], y[order]
    train, test = slice(num_examples), slice(num_examples, num_examples + 100)
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(300):
        optimiser.zero_grad()
        loss(model(X[train]), y[train]).backward()
        optimiser.step()
    gradients = ie.per_example_grads(model, loss, (X[test], y[test]))
    return model, loss, (X[train], y[train]), torch.cat([g.flatten(1) for g in gradients.values()], dim=1)


def contenders(num_rhs: int, rtol: float) -> dict[str, Solver]:
    options: dict = {"rtol": rtol, "max_steps": MAX_STEPS, "on_failure": "return"}
    found: dict[str, Solver] = {"CG": CG(reorthogonalise=0, **options), "CG, past": CG(**options)}
    found |= {f"CG, Nystrom({rank})": CG(preconditioner=Nystrom(rank), reorthogonalise=0, **options) for rank in (20, 80)}
    found["CG, EKFAC"] = CG(preconditioner=EKFAC(), reorthogonalise=0, **options)
    if num_rhs > 1:
        found |= {"BlockCG": BlockCG(reorthogonalise=0, **options), "BlockCG, past": BlockCG(**options)}
        found["BlockCG, Nystrom(20)"] = BlockCG(preconditioner=Nystrom(20), reorthogonalise=0, **options)
    found["Dual"] = Dual(rtol=rtol, on_failure="return")
    found["Direct"] = Direct(rtol=rtol, on_failure="return")
    return found


def records(
    name: str, folder: Path, dtype: torch.dtype, rtol: float, only: list[str] | None, num_rhs: list[int], dampings: list[float]
) -> Iterator[dict]:
    model, loss, (X, y), B = trained(name, folder)
    model, B = model.to(dtype), B.to(dtype)
    X, y = (t.to(dtype) if t.is_floating_point() else t for t in (X, y))
    for damping in dampings:
        G = ie.GGN(model, loss, (X, y), damping=damping)
        for V in num_rhs:
            chosen = auto(G, V, rtol=rtol, on_failure="return")
            solvers = contenders(V, rtol) | {"auto": chosen}
            for label, solver in solvers.items():
                if only and label not in only:
                    continue
                if (label == "Direct" and G.num_parameters > 3000) or (label == "Dual" and G.num_roots > 4000):
                    continue
                started = time.process_time()
                solution = solver.solve(G.damped(damping), B[:V])
                spent = time.process_time() - started
                status = Counter(found.name for found in solution.status)
                yield {
                    "problem": name, "P": G.num_parameters, "R": G.num_roots, "dtype": str(dtype)[6:], "damping": damping, "V": V,
                    "rtol": rtol, "solver": label, "products": solution.num_products / V, "seconds": spent, "status": dict(status),
                    "residual": float(solution.residual_norm.max()), "steps": max(solution.stats.get("iterations", [0])),
                    "took": chosen.name if label == "auto" else label, "reason": chosen.reason,
                }  # fmt: skip


WEIGHED = {"CG": "CG, past", "BlockCG": "BlockCG, past", "Dual": "Dual", "Direct": "Direct"}
"""What ``auto`` chooses from, by its name here."""


def choices(
    name: str, folder: Path, dtype: torch.dtype, rtol: float, num_rhs: list[int], dampings: list[float], repeats: int
) -> Iterator[dict]:
    """CPU time of each solver that ``auto`` weighs, the least of ``repeats`` interleaved runs, beside what it was taken to cost."""
    model, loss, (X, y), B = trained(name, folder)
    model, B = model.to(dtype), B.to(dtype)
    X, y = (t.to(dtype) if t.is_floating_point() else t for t in (X, y))
    G = ie.GGN(model, loss, (X, y), damping=dampings[0])
    for damping in dampings:
        A = G.damped(damping)
        for V in num_rhs:
            choice = auto(A, V, rtol=rtol, on_failure="return")
            cheapest = min(choice.costs.values())
            solvers = {short: contenders(V, rtol)[WEIGHED[short]] for short, cost in choice.costs.items() if cost < HOPELESS * cheapest}
            seconds: dict[str, float] = {"product": float("inf")} | dict.fromkeys(solvers, float("inf"))
            facts = {}
            for _ in range(repeats + 1):  # the first warms up
                for short in seconds:
                    if seconds[short] > LONG and short in facts:
                        continue  # once is enough
                    started = time.process_time()
                    if short == "product":
                        A.matmat(B[:V])
                    else:
                        solution = solvers[short].solve(A, B[:V])
                    spent = time.process_time() - started
                    if short != "product":
                        steps = max(solution.stats.get("iterations", [0]))
                        facts[short] = {"steps": steps, "converged": solution.converged}
                    seconds[short] = min(seconds[short], spent)
            yield {
                "problem": name, "P": A.num_parameters, "R": A.num_roots, "damping": damping, "V": V, "chosen": choice.name,
                "costs": choice.costs, "seconds": seconds, "facts": facts, "product": A.product_operations(1),
                "together": A.product_operations(V), "gram": A.gram_operations(),
            }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="with the files named above")
    parser.add_argument("--problems", nargs="*", default=list(PROBLEMS))
    parser.add_argument("--solvers", nargs="*")
    parser.add_argument("--rhs", nargs="*", type=int, default=list(NUM_RHS))
    parser.add_argument("--dampings", nargs="*", type=float, default=list(DAMPINGS))
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--rtol", type=float, default=1e-4)
    parser.add_argument("--choices", type=int, metavar="REPEATS", help="time what auto chooses from; a product's time beside it")
    arguments = parser.parse_args()
    for name in arguments.problems if arguments.choices else ():
        dtype = getattr(torch, arguments.dtype)
        for record in choices(name, arguments.folder, dtype, arguments.rtol, arguments.rhs, arguments.dampings, arguments.choices):
            print(json.dumps(record), flush=True)
    if arguments.choices:
        return
    for name in arguments.problems:
        for record in records(
            name, arguments.folder, getattr(torch, arguments.dtype), arguments.rtol, arguments.solvers, arguments.rhs, arguments.dampings
        ):
            print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
