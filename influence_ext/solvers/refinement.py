"""Iterative refinement: the exact system solved to the tolerance that is asked, by steps at reduced precision."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from influence_ext.solvers.base import CountedOperator, Outcome, Status, norm

ROUND_RTOL = 0.1
"""What a round of cheap steps is to reduce the residual by; deeper, it would solve the rounded system and not the exact one."""


class StepSolver(Protocol):
    """A solver that takes steps from a starting point: CG, BlockCG. Its ``columns`` have ``iterations``."""

    @property
    def rtol(self) -> float | None:
        """Where it stops."""

    @property
    def max_steps(self) -> int:
        """Steps a column may take."""

    def _solve(self, operator: CountedOperator, B: Tensor, x0: Tensor | None = None) -> Outcome: ...


class _Cheap(CountedOperator):
    """An operator at reduced precision, taken for what it is."""

    @property
    def exact(self) -> CountedOperator:
        """Itself: solvers below take it as the matrix."""
        return self

    def residual(self, X: Tensor, B: Tensor) -> Tensor:
        """Its own; the exact one is taken once a round."""
        return B - self.matmat(X)


def refined(solver: StepSolver, operator: CountedOperator, B: Tensor, x0: Tensor | None = None) -> Outcome:
    r"""Solve ``A x = b`` where products with ``Ã ≈ A`` are cheap: ``x ← x + d``, ``Ã d ≈ r`` to a tenth, ``r = b − A x``.

    A column goes on so for as long as each round at least halves its exact residual. One that stops short of its tolerance (the rounding of
    Ã is as large as the small eigenvalues of A that its residual is left in) is finished by ``solver`` on A itself, from where it stands.

    Args:
        solver: what makes the steps; its ``rtol`` is what the exact residual is held to, ``max_steps`` bounds the steps of all rounds.
        operator: ``Ã``; ``operator.exact`` is ``A``.
        B: ``[V, P]``.
        x0: ``[V, P]``, default zero.

    Returns:
        The outcome, whose residuals are exact. Statistics beyond ``iterations``: ``refinements`` (rounds) per column, and ``exact_products``.

    Cost: the steps of all rounds, one exact product for each round and column; a column that rounding stops, about what ``solver`` takes on
    A from there.

    Reference: Martin, Peters and Wilkinson, "Iterative refinement of the solution of a positive definite system of equations" (1966); Carson
    and Higham, "Accelerating the solution of linear systems by iterative refinement in three precisions" (2018).
    """
    cheap, exact = _Cheap(operator.operator), operator.exact
    num_columns = B.shape[0]
    target = (solver.rtol or 0.0) * norm(B)
    X = torch.zeros_like(B) if x0 is None else x0.clone()
    R = B if x0 is None else exact.residual(X, B)
    state = _Columns(X, R, norm(R), [Status.MAX_STEPS] * num_columns, [0] * num_columns, [0] * num_columns)
    pending = state.above(target, range(num_columns))
    stopped: list[int] = []
    while pending:
        left = solver.max_steps - max(state.iterations[column] for column in pending)
        if left <= 0:
            break
        index = torch.tensor(pending, dtype=torch.long, device=B.device)
        nearest = float((target[index] / state.R_norm[index]).min())
        inner: Any = solver if solver.rtol is None else _with(solver, rtol=max(nearest / 2, ROUND_RTOL), max_steps=left)
        found = inner._solve(cheap, state.R[index])
        old = state.R_norm[index]
        state.advance(index, found, exact, B)
        if solver.rtol is None:
            state.status = found.status
            break
        halved = (state.R_norm[index] <= old / 2).tolist()
        above = set(state.above(target, pending))
        stopped += [column for column, good in zip(pending, halved, strict=True) if column in above and not good]
        pending = [column for column, good in zip(pending, halved, strict=True) if column in above and good]
    columns = {"iterations": state.iterations, "refinements": state.rounds, "restarts": [0] * num_columns}
    if stopped:
        index = torch.tensor(stopped, dtype=torch.long, device=B.device)
        left = max(1, solver.max_steps - max(state.iterations[column] for column in stopped))
        last = _with(solver, max_steps=left)._solve(exact, B[index], state.X[index])
        state.X[index], state.R_norm[index] = last.value, last.residual_norm * norm(B[index])
        for position, column in enumerate(stopped):
            state.status[column] = last.status[position]
            for name, counts in last.columns.items():
                columns[name][column] += counts[position]
    operator.absorb(cheap)
    operator.absorb(exact)
    return Outcome(state.X, state.status, state.R_norm / norm(B), {"exact_products": exact.num_products}, columns)


@dataclass
class _Columns:
    """Where each column stands: ``R = B − A X``."""

    X: Tensor
    R: Tensor
    R_norm: Tensor
    status: list[Status]
    iterations: list[int]
    rounds: list[int]

    def above(self, target: Tensor, columns: Any) -> list[int]:
        """Those of ``columns`` that have not reached their tolerance; the others are CONVERGED."""
        reached = (self.R_norm <= target).tolist()
        for column in columns:
            if reached[column]:
                self.status[column] = Status.CONVERGED
        return [column for column in columns if not reached[column]]

    def advance(self, index: Tensor, found: Outcome, exact: CountedOperator, B: Tensor) -> None:
        """Add what a round has found, where that makes the exact residual smaller."""
        X = self.X[index] + found.value
        R = exact.residual(X, B[index])
        R_norm, old = norm(R), self.R_norm[index]
        better = R_norm < old
        self.X[index] = torch.where(better[:, None], X, self.X[index])
        self.R = self.R.index_copy(0, index, torch.where(better[:, None], R, self.R[index]))
        self.R_norm[index] = torch.where(better, R_norm, old)
        for position, column in enumerate(index.tolist()):
            self.iterations[column] += found.columns["iterations"][position]
            self.rounds[column] += 1


def _with(solver: StepSolver, **options: Any) -> StepSolver:
    changed: StepSolver = dataclasses.replace(solver, **options)  # type: ignore[type-var]
    return changed
