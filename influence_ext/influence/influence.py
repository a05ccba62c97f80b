"""Influence functions on the damped generalised Gauss-Newton matrix."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from influence_ext.checks import check_damping, is_one_of
from influence_ext.context import standalone
from influence_ext.data import Examples, check_indices, load
from influence_ext.errors import ArgumentError
from influence_ext.influence.scores import Scores
from influence_ext.losses import Loss, LossLike
from influence_ext.operators.fisher import EmpiricalFisher
from influence_ext.operators.ggn import GGN
from influence_ext.operators.per_example import ExampleGradients
from influence_ext.params import Selection
from influence_ext.solvers import CG, AutoChoice, BlockCG, Factorisation, FactorisingSolver, Solution, Solver, auto
from influence_ext.solvers.base import check_solver

BLOCK_BYTES = 256 * 2**20
"""Right-hand sides solved for at a time take about this much memory."""


CURVATURES: dict[str, type[GGN] | type[EmpiricalFisher]] = {"ggn": GGN, "empirical_fisher": EmpiricalFisher}


class Influence:
    r"""Predicted effect of removing training examples from a trained network.

    .. math::
        s(t, i) = c\, \nabla\ell_t^T (G + \lambda I)^{-1} \nabla\ell_i, \qquad
        \Delta\theta = c\,(G + \lambda I)^{-1} \sum_{z \in S} \nabla\ell_z

    with the GGN G of the training cost ``J = c Σ ℓ_i`` (c = 1/N for a mean loss) at the model's present parameters: the first-order
    response of the proximal Bregman objective, whatever the state of training. Positive scores: removing i raises test loss t, i helps t.

    Args:
        model: trained network, used in evaluation mode, never modified.
        loss: see :func:`influence_ext.losses.resolve`.
        train_data: one ``(X, y)`` or a re-iterable of such batches; the order numbers the examples.
        damping: λ > 0; add the weight decay of training to it.
        curvature: ``"ggn"``, the curvature of the PBRF, or ``"empirical_fisher"``. Not the Hessian: it need not be positive, and then
            neither the scores' error bound nor their meaning holds.
        solver: one of :mod:`influence_ext.solvers`; None: chosen by size (``.solver_reason`` says why).
        params: selects a sub-space.
        memory_budget: see :class:`influence_ext.GGN`.

    Raises:
        ArgumentError: damping ≤ 0, another curvature, or a solver that is none.
        DataError, ShapeError, DTypeError, UnsupportedModelError, UnsupportedLossError: see :class:`influence_ext.GGN`.

    Reference: Koh and Liang 2017; Bae et al. 2022, "If Influence Functions are the Answer, Then What is the Question?".
    """

    @standalone
    def __init__(
        self,
        model: nn.Module,
        loss: LossLike | Loss,
        train_data: Any,
        damping: float = 1e-3,
        curvature: str = "ggn",
        solver: Solver | None = None,
        *,
        params: Selection | None = None,
        memory_budget: int | None = None,
    ):
        if not is_one_of(curvature, CURVATURES):
            raise ArgumentError(
                f"Influence: expected curvature among {', '.join(map(repr, CURVATURES))}, got {curvature!r}; 'ggn' is that of the PBRF."
            )
        self.damping = check_damping(damping, "Influence")
        if self.damping == 0:
            raise ArgumentError("Influence: expected damping > 0, got 0; the GGN of a network is singular, try 1e-3.")
        check_solver(solver, "Influence")
        examples = load(train_data, "Influence", memory_budget)
        self.operator = CURVATURES[curvature](model, loss, examples, self.damping, params=params, memory_budget=memory_budget)
        self.factor = self.operator.loss.factor(self.operator.examples.targets)
        self.solver = solver
        self._chosen: Solver | None = None
        self._prepared: Solver | None = None  # with its preconditioner made
        self._factorisation: Factorisation | None = None
        tape, targets = self.operator.tape, self.operator.examples.targets
        self._train_gradients = ExampleGradients.on(tape, self.operator.loss, targets, "Influence")
        self._train_norms: Tensor | None = None

    @property
    def num_examples(self) -> int:
        """Number of training examples."""
        return self.operator.num_examples

    @property
    def solver_reason(self) -> str:
        """Which solver runs, and why."""
        if isinstance(self._chosen, AutoChoice):
            return self._chosen.reason
        return repr(self.solver) if self.solver else "chosen at the first solve"

    def __repr__(self) -> str:
        solver = self._chosen or self.solver
        return f"Influence({self.operator!r}, solver={solver.name if solver else 'chosen at the first solve'})"

    @standalone
    def scores(self, test_data: Any) -> Scores:
        """Scores of all training examples on all test examples.

        Args:
            test_data: one ``(X, y)`` or a re-iterable of such batches.

        Returns:
            :class:`Scores` with ``values [n_test, n_train]``.

        Raises:
            SolverFailure: a solve did not reach its tolerance; choose another solver or more damping.
            DataError, ShapeError, DTypeError: the test data does not fit.

        Cost: n_test right-hand sides for the solver, then n_test tangent sweeps over the training data; n_test·P memory in blocks.
        """
        examples = load(test_data, "Influence.scores")
        num_test, num_train = examples.num_examples, self.num_examples
        values = torch.empty(num_test, num_train, dtype=self.operator.dtype)
        bound = torch.empty_like(values)
        residuals = torch.empty(num_test, dtype=self.operator.dtype)
        for start, stop in self._blocks(num_test):
            gradients = self._test_gradients(examples.subset(range(start, stop)))
            solution = self._solve(gradients, num_test)
            values[start:stop] = self.factor * self._train_gradients.dots(solution.value).T
            residuals[start:stop] = solution.residual_norm
            distance = solution.residual_norm * gradients.norm(dim=1)  # ‖b − A x‖
            bound[start:stop] = self.factor / self.damping * torch.outer(distance, self._norms())
        return Scores(values, bound, residuals, self._info(num_test))

    @standalone
    def self_influence(self, indices: Iterable[int] | None = None) -> Tensor:
        """``s(i, i) ≥ 0`` of each training example (``[n_train]``), or of those at ``indices``. Mislabelled examples rank high.

        Raises:
            ArgumentError: an index is out of range or repeated.
            SolverFailure: see :meth:`scores`.

        Cost: one right-hand side an example for the solver; memory in blocks.
        """
        chosen = (
            list(range(self.num_examples)) if indices is None else check_indices(indices, self.num_examples, "Influence.self_influence")
        )
        result = torch.empty(len(chosen), dtype=self.operator.dtype)
        for start, stop in self._blocks(len(chosen)):
            gradients = self._test_gradients(self.operator.examples.subset(chosen[start:stop]))
            solution = self._solve(gradients, len(chosen))
            result[start:stop] = self.factor * (gradients * solution.value).sum(dim=1)
        return result

    @standalone
    def parameter_change(self, group: Iterable[int]) -> Tensor:
        """``Δθ``, ``[P]``: the parameters after removing the training examples ``group`` minus the present ones, to first order.

        Raises:
            ArgumentError: an index is out of range or repeated.
            SolverFailure: see :meth:`scores`.

        Cost: one right-hand side.
        """
        chosen = check_indices(group, self.num_examples, "Influence.parameter_change")
        total = (
            self._gradients_of(self.operator.examples.subset(chosen)).sum()
            if chosen
            else torch.zeros(self.operator.num_parameters, dtype=self.operator.dtype)
        )
        return self.factor * self._solve(total[None], 1).value[0]

    def _gradients_of(self, examples: Examples) -> ExampleGradients:
        tape = self.operator.tape
        return ExampleGradients.at(tape.plan, self.operator.loss, examples, "Influence", tape.theta)

    def _test_gradients(self, examples: Examples) -> Tensor:
        return self._gradients_of(examples).materialise()

    def _norms(self) -> Tensor:
        if self._train_norms is None:
            self._train_norms = self._train_gradients.norms()
        return self._train_norms

    def _blocks(self, num_rhs: int) -> list[tuple[int, int]]:
        size = max(1, BLOCK_BYTES // (self.operator.num_parameters * self.operator.dtype.itemsize))
        return [(start, min(start + size, num_rhs)) for start in range(0, num_rhs, size)]

    def _solve(self, B: Tensor, num_rhs: int) -> Solution:
        """Solve for rows of B; a factorisation or a preconditioner, once made, serves every later call."""
        if self._factorisation is not None:
            return self._factorisation.solve(B)
        if self.solver is None or self._chosen is None:
            chosen = self.solver or auto(self.operator, num_rhs, at_once=len(B))
            inner = chosen.solver if isinstance(chosen, AutoChoice) else chosen
            # Chosen is what could be made: after an exception the next call tries again.
            if isinstance(inner, FactorisingSolver):
                self._factorisation = inner.factorise(self.operator)
                self._chosen = chosen
                return self._factorisation.solve(B)
            self._prepared = inner.prepared(self.operator) if isinstance(inner, (CG, BlockCG)) else chosen
            self._chosen = chosen
        assert self._prepared is not None
        return self._prepared.solve(self.operator, B)

    def _info(self, num_test: int) -> dict[str, Any]:
        operator = self.operator
        return {
            "damping": self.damping,
            "loss": operator.loss.name,
            "reduction": operator.loss.reduction,
            "num_train": operator.num_examples,
            "num_test": num_test,
            "num_parameters": operator.num_parameters,
            "solver": self._chosen.name if self._chosen else "none",
            "reason": self.solver_reason,
        }
