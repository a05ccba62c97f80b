"""What a response is: new parameters, the outputs they give, and how well they were found."""

from __future__ import annotations

import copy
import enum
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from influence_ext.bregman.recipe import Run
from influence_ext.bregman.training import CHUNK, calling_the_network
from influence_ext.context import exclusive, standalone
from influence_ext.data import Examples, check_indices, load
from influence_ext.errors import ArgumentError
from influence_ext.losses import Loss, resolve
from influence_ext.params import ParameterSpace
from influence_ext.solvers import Status


class ResponseStatus(enum.Enum):
    """How the search for a response ended; ``.explanation`` says what it means and what helps."""

    TRAINED = "trained"
    CONVERGED = "converged"
    STALLED = "stalled"
    MAX_STEPS = "max_steps"
    DIVERGED = "diverged"
    TRAINING_DIVERGED = "training_diverged"
    NON_FINITE = "non_finite"

    @property
    def success(self) -> bool:
        """Whether the search did what it was asked to do."""
        return self in (ResponseStatus.TRAINED, ResponseStatus.CONVERGED)

    @property
    def explanation(self) -> str:
        """What happened and what helps."""
        return _EXPLANATIONS[self]


_EXPLANATIONS = {
    ResponseStatus.TRAINED: "ran the recipe's epochs; no gradient norm was asked for",
    ResponseStatus.CONVERGED: "reached the tolerance asked for",
    ResponseStatus.STALLED: "no step lowers the objective any further although the gradient norm is above its goal, as happens at a "
    "kink of a ReLU network, where no gradient vanishes, or at the rounding error of the data type; a smooth activation or float64 helps",
    ResponseStatus.MAX_STEPS: "used up its steps before reaching the goal; raise max_steps or damping, or accept a larger rtol",
    ResponseStatus.DIVERGED: "ran away from the trained parameters: the objective has no local minimum near them; raise damping",
    ResponseStatus.TRAINING_DIVERGED: "the training ended with an objective above what the base run began with and what one output for all "
    "examples has; lower the recipe's lr, or damping where the response is held back by it",
    ResponseStatus.NON_FINITE: "left the finite numbers; raise damping or use float64, or lower the recipe's lr",
}


class TrainedNetwork:
    """θs with its data and its loss: what every response is compared with.

    Holds private copies of the network in evaluation mode, so nothing of the caller's is touched. Outputs are evaluated in float64
    whatever the network's dtype: the distances of interest are small differences of them.

    Args:
        model: The trained network.
        loss: Its loss.
        examples: The training examples.
        weight_decay: ``w`` of the objective it was trained with.
        who: The caller's name for messages.
    """

    def __init__(self, model: nn.Module, loss: Loss, examples: Examples, weight_decay: float, who: str):
        self.who = who
        self.model = copy.deepcopy(model).eval()
        self.loss, self.examples, self.weight_decay = loss, examples, weight_decay
        self.space = ParameterSpace.of(self.model, who=who)
        self.theta = self.space.values(self.model)
        self.exact_theta = self.theta.double()
        self.buffers = {name: buffer.detach() for name, buffer in self.model.named_buffers()}

    @cached_property
    def exact_model(self) -> nn.Module:
        """The network in float64; the network itself if it is."""
        return self.model if self.theta.dtype == torch.float64 else copy.deepcopy(self.model).double()

    @cached_property
    def exact_examples(self) -> Examples:
        """The training examples with floating-point tensors in float64."""
        return in_double(self.examples)

    @classmethod
    def of(
        cls, model_or_run: nn.Module | Run, loss: Any, train_data: Any, *, weight_decay: float | None = None, who: str
    ) -> TrainedNetwork:
        """From a run (which knows its loss, data and weight decay, each overridable) or from any trained network with both."""
        if isinstance(model_or_run, Run):
            run = model_or_run
            network = cls(
                run.model,
                run.loss if loss is None else resolve(loss),
                run.data if train_data is None else load(train_data, who=who),
                run.recipe.weight_decay if weight_decay is None else weight_decay,
                who,
            )
            if network.theta.dtype != run.params.dtype or not torch.equal(network.theta, run.params):
                raise ArgumentError(
                    f"{who}: expected run.model to hold the parameters it was trained to, got a model changed since; pass a deepcopy "
                    "of the changed model with its loss and data instead of the run."
                )
            return network
        if not isinstance(model_or_run, nn.Module):
            raise ArgumentError(f"{who}: expected an nn.Module or a Run, got {type(model_or_run).__name__}; pass one of the two.")
        if loss is None or train_data is None:
            raise ArgumentError(f"{who}: expected loss and train_data beside a model, got none; pass both, or a Run.")
        return cls(model_or_run, resolve(loss), load(train_data, who=who), 0.0 if weight_decay is None else weight_decay, who)

    def buffers_move(self, initial: dict[str, Tensor]) -> bool:
        """Whether training changed the network's buffers from ``initial``, as running statistics do."""
        return any(not torch.equal(buffer, initial[name]) for name, buffer in self.buffers.items())

    @property
    def num_examples(self) -> int:
        """``N``."""
        return self.examples.num_examples

    @property
    def factor(self) -> float:
        """``c``: ``1/N`` for a mean, ``1`` for a sum; also the ``ε`` that removes an example."""
        return self.loss.factor(self.examples.targets)

    @cached_property
    def outputs(self) -> Tensor:
        """``[N, *out]``, ``f(θs, x_i)`` on the training set."""
        return self.outputs_at(self.exact_theta)

    def outputs_at(self, theta: Tensor, buffers: dict[str, Tensor] | None = None, examples: Examples | None = None) -> Tensor:
        """``f(θ, x)`` on the training set, or on ``examples``: ``[N, *out]`` in float64, by plain PyTorch in evaluation mode."""
        examples = self.examples if examples is None else examples
        state = {**self.space.unflatten(theta.double())}
        for name, buffer in (self.buffers if buffers is None else buffers).items():
            state[name] = buffer.double() if buffer.is_floating_point() else buffer
        parts = []
        with torch.no_grad():
            for start in range(0, examples.num_examples, CHUNK):
                part = in_double(examples.subset(range(start, min(start + CHUNK, examples.num_examples)))).X
                args, kwargs = ((), part) if isinstance(part, dict) else (part if isinstance(part, tuple) else (part,), None)
                parts.append(functional_call(self.exact_model, state, args, kwargs))
        return torch.cat(parts)

    def losses_at(self, theta: Tensor, examples: Examples, buffers: dict[str, Tensor] | None = None) -> Tensor:
        """``[n]`` in float64: ``ℓ(f(θ, x_t), y_t)``."""
        z = self.outputs_at(theta, buffers, examples)
        return self.loss.value(z, in_double(examples).targets)


def in_double(examples: Examples) -> Examples:
    """The examples with floating-point tensors in float64."""

    def double(x: Tensor) -> Tensor:
        return x.double() if x.is_floating_point() else x

    return replace(examples, inputs=tuple(map(double, examples.inputs)), targets=double(examples.targets))


Norms = tuple[float, float]
"""Norm of a gradient where a search ended, and the same over the norm where it began."""


class LateNorms:
    """The :data:`Norms` of responses that were found together, computed together when the first is asked for.

    A training needs no gradient of its objective over all data, which costs as much as an epoch; who never looks does not pay for it.
    A copy or a pickle holds the numbers.

    Args:
        compute: Gives them, one a response.
    """

    def __init__(self, compute: Callable[[], list[Norms]]):
        self._compute: Callable[[], list[Norms]] | None = compute
        self._found: list[Norms] = []

    @standalone
    def of(self, position: int) -> Norms:
        """Those of one response."""
        with exclusive, torch.inference_mode(False):
            if self._compute is not None:
                self._found = self._compute()
                self._compute = None  # and the data it holds
        return self._found[position]

    def __getstate__(self) -> dict[str, Any]:
        self.of(0)
        return self.__dict__


@dataclass(frozen=True, eq=False)
class Response:
    """Where the parameters go when training examples are removed.

    Attributes:
        kind: ``"cold_start"``, ``"warm_start"``, ``"proximal"``, ``"pbrf"``, ``"linearized_pbrf"`` or ``"influence"``.
        removed: The removed examples.
        exact_params: ``[P]``, the response's parameters in float64, which outputs and losses are evaluated at.
        network: θs, with data and loss.
        status: How the search ended: a :class:`ResponseStatus`, or the solver's own :class:`~influence_ext.solvers.Status` for the linear
            ones; both have ``.success`` and ``.explanation``.
        norms: The :data:`Norms`, or what gives them; ``None`` for the linear ones.
        relative_residual: ``‖b − (G + λ_eff I) x‖ / ‖b‖`` of the linear ones.
        num_steps: Steps of the minimiser, or epochs.
        num_products: Curvature products spent.
        buffers: The network's buffers where retraining changed them.
        one_by_one: Why the set was trained by itself where several were to be trained together; ``None`` if nothing stood in the way.
    """

    kind: str
    removed: tuple[int, ...]
    exact_params: Tensor = field(repr=False)
    network: TrainedNetwork = field(repr=False)
    status: ResponseStatus | Status
    norms: Norms | Callable[[], Norms] | None = field(default=None, repr=False)
    relative_residual: float | None = None
    num_steps: int = 0
    num_products: int = 0
    buffers: dict[str, Tensor] | None = field(default=None, repr=False)
    one_by_one: str | None = None

    @property
    def params(self) -> Tensor:
        """``[P]``, the response's parameters in the network's dtype."""
        return self.exact_params.to(self.network.theta.dtype)

    @property
    def gradient_norm(self) -> float | None:
        """Norm of the gradient of this response's own objective at ``params`` (``None`` for the linear ones).

        Cost: of a trained response a pass over the data, at the first look at any of those that were trained together; the data must be
        what it was. A copy or a pickle of the response holds the number.
        """
        found = self.norms() if callable(self.norms) else self.norms
        return None if found is None else found[0]

    @property
    def relative_gradient_norm(self) -> float | None:
        """The same over the norm where the search began."""
        found = self.norms() if callable(self.norms) else self.norms
        return None if found is None else found[1]

    @property
    def displacement(self) -> Tensor:
        """``[P]`` in float64, ``exact_params − θs``."""
        return self.exact_params - self.network.exact_theta

    @property
    def named_params(self) -> dict[str, Tensor]:
        """``params`` by name, shaped like the network's."""
        return self.network.space.unflatten(self.params)

    @cached_property
    def outputs(self) -> Tensor:
        """``[N, *out]`` in float64, the response's outputs on the training set."""
        return self.network.outputs_at(self.exact_params, self.buffers)

    @standalone
    def loss_change(self, test_data: Any) -> Tensor:
        """``ℓ_t(response) − ℓ_t(θs)`` of every test example: ``[n_test]`` in float64; positive means that the test loss rose.

        Raises:
            DataError, ShapeError, DTypeError: the test data are unusable, or do not fit the network or the loss.

        Cost: two forward passes over the test data in float64.
        """
        who, network = "Response.loss_change", self.network
        examples = load(test_data, who=who)
        with calling_the_network(who):
            z = network.outputs_at(network.exact_theta, examples=examples)
        targets = in_double(examples).targets
        network.loss.check(z, targets, who)
        return network.losses_at(self.exact_params, examples, self.buffers) - network.loss.value(z, targets)

    def output_distance(self, other: Response | None = None) -> float:
        """``(1/N) Σ_i ‖f(θ, x_i) − f(θ', x_i)‖₂`` to another response, or to θs.

        Raises:
            ArgumentError: the other is no response, or one of another network or other data.
        """
        self._check_comparable(other, "Response.output_distance")
        return output_distance(self.outputs, self.network.outputs if other is None else other.outputs)

    def parameter_distance(self, other: Response | None = None) -> float:
        """``‖θ − θ'‖₂`` to another response, or to θs. Raises as :meth:`output_distance`."""
        self._check_comparable(other, "Response.parameter_distance")
        return float((self.exact_params - (self.network.exact_theta if other is None else other.exact_params)).norm())

    def _check_comparable(self, other: Response | None, who: str) -> None:
        mine = self.network
        if other is None:
            return
        if not isinstance(other, Response):
            raise ArgumentError(f"{who}: expected another Response or None, got {type(other).__name__}; None measures from θs.")
        theirs = other.network
        if mine.space.shapes != theirs.space.shapes or mine.num_examples != theirs.num_examples:
            sizes = [f"P = {of.space.num_parameters}, N = {of.num_examples}" for of in (mine, theirs)]
            raise ArgumentError(
                f"{who}: expected a response of the same network on the same data ({sizes[0]}), got one with {sizes[1]}; compare "
                "responses of one network."
            )

    def summary(self) -> str:
        """One line: kind, status and how well it was solved."""
        parts = [f"{self.kind}: {self.status.value}"]
        if self.relative_gradient_norm is not None:
            parts.append(f"relative gradient norm {self.relative_gradient_norm:.1e}")
        if self.relative_residual is not None:
            parts.append(f"relative residual {self.relative_residual:.1e}")
        return ", ".join(parts)


def output_distance(z: Tensor, z_other: Tensor) -> float:
    """``(1/N) Σ_i ‖z_i − z'_i‖₂`` over ``[N, *out]`` tensors."""
    return float((z - z_other).reshape(len(z), -1).norm(dim=1).mean())


def removed_indices(remove: Iterable[int], num_examples: int, *, who: str, allow_empty: bool = True) -> tuple[int, ...]:
    """``remove`` as a tuple of distinct indices in ``[0, N)``.

    Raises:
        ArgumentError: not whole numbers, out of range, repeated, all examples, or empty where that makes no sense.
    """
    found = tuple(check_indices(remove, num_examples, who))
    if len(found) == num_examples:
        raise ArgumentError(f"{who}: expected remove to leave at least one training example, got all {num_examples}; remove fewer.")
    if not found and not allow_empty:
        raise ArgumentError(f"{who}: expected remove to name at least one example, got none; pass an index.")
    return found
