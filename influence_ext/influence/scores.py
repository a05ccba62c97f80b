"""Influence scores with their error bounds, to be sorted, saved and read again."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from influence_ext.checks import is_answer, is_whole
from influence_ext.errors import ArgumentError, DataError
from influence_ext.files import check_path, whole_file

FORMAT = "influence_ext.scores/1"


@dataclass(frozen=True, eq=False)
class Scores:
    """``s(t, i)``, the predicted rise of test loss t when training example i is removed.

    Positive: i helps t. Negative: i harms t.

    Attributes:
        values: ``[n_test, n_train]``.
        error_bound: ``[n_test, n_train]``: ``|s − s_exact| ≤ error_bound`` for the damped system in exact arithmetic, from the recomputed
            residual of the solve; infinite without damping.
        residual_norm: ``[n_test]``, relative residual of each test example's solve.
        info: how the scores were made (solver, damping, loss, N, P).
    """

    values: Tensor
    error_bound: Tensor
    residual_norm: Tensor
    info: dict[str, Any] = field(default_factory=dict)

    def top(self, k: int, test: int, *, harmful: bool = False) -> list[tuple[int, float]]:
        """The ``k`` training examples with the largest scores for one test example, best first (``harmful``: the smallest).

        Returns:
            Pairs (training index, score).

        Raises:
            ArgumentError: ``test`` or ``k`` out of range.
        """
        num_test, num_train = self.values.shape
        if not (is_whole(test) and 0 <= test < num_test):
            raise ArgumentError(f"Scores.top: expected test in [0, {num_test}), got {test!r}; choose a row of values.")
        if not (is_whole(k) and 1 <= k <= num_train):
            raise ArgumentError(f"Scores.top: expected k in [1, {num_train}], got {k!r}; there are {num_train} training examples.")
        if not is_answer(harmful):
            raise ArgumentError(f"Scores.top: expected harmful to be True or False, got {harmful!r}; it asks for the smallest scores.")
        found = torch.topk(self.values[test], k, largest=not harmful)
        return list(zip(found.indices.tolist(), found.values.tolist(), strict=True))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write an ``.npz`` file that :func:`load_scores` and NumPy read. The file appears whole or not at all.

        Returns:
            The path written, with the suffix ``.npz``.

        Raises:
            ArgumentError: ``path`` is none.
        """
        import numpy as np

        target = check_path(path, "Scores.save")
        if target.suffix != ".npz":
            target = target.with_name(target.name + ".npz")
        with whole_file(target) as path, path.open("wb") as file:
            np.savez(
                file,
                format=np.array(FORMAT),
                values=self.values.numpy(),
                error_bound=self.error_bound.numpy(),
                residual_norm=self.residual_norm.numpy(),
                info=np.array(json.dumps(self.info)),
            )
        return target

    def __repr__(self) -> str:
        worst = f"{float(self.residual_norm.max()):.1e}" if len(self.residual_norm) else "-"
        return f"Scores({self.values.shape[0]} test x {self.values.shape[1]} train, worst residual {worst})"


def load_scores(path: str | os.PathLike[str]) -> Scores:
    """Read what :meth:`Scores.save` wrote.

    Raises:
        ArgumentError: ``path`` is none.
        DataError: the file is missing or not a scores file.
    """
    import numpy as np

    source = check_path(path, "load_scores")
    if not source.exists() and source.suffix != ".npz":
        source = source.with_name(source.name + ".npz")
    try:
        with np.load(source, allow_pickle=False) as file:
            if str(file["format"]) != FORMAT:
                raise DataError(f"load_scores: expected a file of format {FORMAT}, got {str(file['format'])!r} in {source}; save it again.")
            values, bound, residuals = (torch.from_numpy(file[name]) for name in ("values", "error_bound", "residual_norm"))
            return Scores(values, bound, residuals, json.loads(str(file["info"])))
    except (OSError, KeyError, ValueError) as reason:
        if isinstance(reason, DataError):
            raise
        raise DataError(f"load_scores: expected a file written by Scores.save, got {source} ({reason}); check the path.") from reason
