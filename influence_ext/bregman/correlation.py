"""Agreement of predicted with actual loss changes."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Correlation:
    """Agreement of predicted and actual changes ``[num_sets, n]``.

    Attributes:
        pearson: Mean over the test examples of the correlation across removed sets (test examples where it is undefined left out).
        spearman: The same of the ranks.
        pearson_by_test: ``[n]``, NaN where a row of values is constant or there are fewer than two removed sets.
        spearman_by_test: ``[n]``.
        pearson_pooled: Over all pairs (removed set, test example) at once.
        spearman_pooled: The same of the ranks.
        predicted: ``[num_sets, n]``, what influence says.
        actual: ``[num_sets, n]``, what the response does.
    """

    pearson: float
    spearman: float
    pearson_by_test: Tensor = field(repr=False)
    spearman_by_test: Tensor = field(repr=False)
    pearson_pooled: float
    spearman_pooled: float
    predicted: Tensor = field(repr=False)
    actual: Tensor = field(repr=False)

    @property
    def num_sets(self) -> int:
        """Removed sets that were compared."""
        return int(self.predicted.shape[0])


def correlate(predicted: Tensor, actual: Tensor) -> Correlation:
    """Pearson and Spearman correlation of two ``[num_sets, n]`` float64 tensors, per test example and pooled."""
    pearson = _pearson(predicted, actual)
    spearman = _pearson(ranks(predicted), ranks(actual))
    flat_predicted, flat_actual = predicted.reshape(-1, 1), actual.reshape(-1, 1)
    return Correlation(
        float(pearson.nanmean()),
        float(spearman.nanmean()),
        pearson,
        spearman,
        float(_pearson(flat_predicted, flat_actual)),
        float(_pearson(ranks(flat_predicted), ranks(flat_actual))),
        predicted,
        actual,
    )


def ranks(values: Tensor) -> Tensor:
    """Ranks down each column of ``[m, n]``, from 0; ties share the mean of their ranks."""
    found = torch.empty(values.shape, dtype=torch.float64, device=values.device)
    for column in range(values.shape[1]):
        _, group, counts = values[:, column].unique(sorted=True, return_inverse=True, return_counts=True)
        last = counts.cumsum(0)
        found[:, column] = (last - counts + last - 1).double()[group] / 2
    return found


def _pearson(a: Tensor, b: Tensor) -> Tensor:
    """``[n]``: correlation down each column; NaN where one of the two is constant."""
    a, b = a - a.mean(dim=0), b - b.mean(dim=0)
    return (a * b).sum(dim=0) / (a.norm(dim=0) * b.norm(dim=0))
