"""Handwritten digits of scikit-learn with planted wrong labels, and a small network: what the pictures of the gallery start from."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import influence_ext as ie

mpl.use("Agg")

WEIGHT_DECAY = 1e-3


@dataclass(frozen=True)
class Digits:
    """8 x 8 images as ``[N, 64]`` in [0, 1], labels ``[N]``, and which training labels are wrong."""

    X: Tensor
    y: Tensor
    X_test: Tensor
    y_test: Tensor
    wrong: Tensor

    @property
    def train(self) -> tuple[Tensor, Tensor]:
        """The training data."""
        return self.X, self.y

    @property
    def test(self) -> tuple[Tensor, Tensor]:
        """The test data."""
        return self.X_test, self.y_test


def load(num_train: int = 500, num_test: int = 100, wrong_every: int = 10, dtype: torch.dtype = torch.float32) -> Digits:
    """The first ``num_train`` and the next ``num_test`` of the shuffled digits; every ``wrong_every``-th training label wrong (0: none)."""
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    X, y = torch.tensor(digits.data / 16, dtype=dtype)[order], torch.tensor(digits.target)[order]
    wrong = torch.arange(0, num_train, wrong_every) if wrong_every else torch.arange(0)
    train = y[:num_train].clone()
    train[wrong] = (train[wrong] + 3) % 10
    stop = num_train + num_test
    return Digits(X[:num_train], train, X[num_train:stop], y[num_train:stop], wrong)


def train(data: Digits, hidden: int = 32, epochs: int = 30, lr: float = 0.1) -> ie.Run:
    """A network with one hidden layer of tanh."""

    def build_model() -> nn.Module:
        return nn.Sequential(nn.Linear(64, hidden), nn.Tanh(), nn.Linear(hidden, 10)).to(data.X.dtype)

    recipe = ie.Recipe(build_model, nn.CrossEntropyLoss(), lr=lr, weight_decay=WEIGHT_DECAY, epochs=epochs, batch_size=50)
    return ie.train(recipe, data.train)


def picture_path() -> Path:
    """Where the running script draws to: its first argument, or its own name with .png in the working directory."""
    return Path(sys.argv[1]) if len(sys.argv) > 1 else Path(Path(sys.argv[0]).stem + ".png")
