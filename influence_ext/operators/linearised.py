"""What the curvature operators of a training cost share: a network linearised at the model's parameters on a data set."""

from __future__ import annotations

from functools import cached_property
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from influence_ext.checks import check_damping, is_count, is_one_of
from influence_ext.context import standalone
from influence_ext.data import Examples, load
from influence_ext.errors import ArgumentError
from influence_ext.graphs import Graphs
from influence_ext.losses import Loss, LossLike, resolve
from influence_ext.losses.base import check_weights
from influence_ext.operators.base import LinearOperator
from influence_ext.params import ParameterSpace, Precision, Selection
from influence_ext.plan import Plan
from influence_ext.tape import Schedule, Tape

_ROUNDED = {
    "bfloat16": "products: factors rounded to bfloat16 (8 bits), float32 sums; expect a relative error of about 3e-3, refined away by CG",
    "tf32": "products: factors rounded to TF32 (11 bits), float32 sums; expect a relative error of about 4e-4, refined away by CG",
}


class LinearisedOperator(LinearOperator):
    r"""A symmetric matrix ``A + damping·I`` made of a network's derivatives on N examples.

    Subclasses compute what their products need of the loss in ``_prepare``, which is called for a tape, and multiply in ``_undamped``.

    Args:
        model: any network (see ``report()`` for what runs natively); used in evaluation mode, never modified. The operator keeps the values
            the parameters have now. Of a model in half precision (bfloat16, float16) parameters, inputs and targets are read as they are;
            arithmetic, vectors and results are float32, and what the model itself would round in between is not rounded.
        loss: ``nn`` loss module, functional or its name, or a callable; see :func:`influence_ext.losses.resolve`.
        data: one ``(X, y)`` or a re-iterable of such batches. A pair is not copied: leave it as it is while the operator is used.
        damping: λ ≥ 0.
        params: names, patterns or tensors that select a sub-space; default: all parameters with ``requires_grad``.
        memory_budget: bytes that the cached forward state and one product's workspace may take; what does not fit is recomputed chunk by
            chunk in every product, and batches that do not fit are read again. A number of at least 0, such as ``2e9``; None: no limit.
        reduction: overrides the loss's own.
        precision: how products multiply float32 matrices. "full" is float32; "bfloat16" rounds both factors to 8 bits, for a relative error
            of a product of about 3e-3, and "tf32", on a CUDA device, to 11 bits, for about 4e-4; sums are float32 in all of them. What is
            linearised (outputs, derivatives, the loss Hessian) is computed in full, so ``at_precision("full")`` is exact. Solvers solve
            the exact system to the tolerance that is asked, CG with few exact products. On the CPU, linear layers and products between
            activations are rounded.
        schedule: "auto", or "by_example" / "by_operator" to force how products run (see docs/design.md).
        graphs: whether products on a device are recorded and replayed as CUDA graphs: "auto", if launching their kernels takes longer than
            running them and no ``memory_budget`` is set; "always", which makes what cannot be recorded an error; or "never". See
            docs/cuda.md.
        weights: ``[N]``, w_n >= 0, multiplies the loss of example n: the matrix is that of ``c Σ w_n ℓ_n``. c stays what it is without
            them, ``1/N`` for a mean. None: ones.

    Raises:
        UnsupportedModelError, UnsupportedLossError: see :meth:`Plan.of`, :func:`resolve`.
        DataError, ShapeError, DTypeError, DeviceError: data or targets do not fit.
        ArgumentError: negative damping, weights that are not ``[N]`` or negative, a ``memory_budget`` that holds not even one example, a
            precision that the device or the data type has not, or graphs of what cannot be recorded.
    """

    _second_order: ClassVar[bool] = False
    """Do products take second derivatives of the network?"""

    @standalone
    def __init__(
        self,
        model: nn.Module,
        loss: LossLike | Loss,
        data: Any,
        damping: float = 0.0,
        *,
        params: Selection | None = None,
        memory_budget: int | None = None,
        reduction: str | None = None,
        schedule: Schedule = "auto",
        precision: Precision = "full",
        graphs: Graphs = "auto",
        weights: Tensor | None = None,
    ):
        who = type(self).__name__
        self.loss = resolve(loss, reduction, who)
        self.examples: Examples = load(data, who, memory_budget)
        plan = Plan.of(model, self.examples.X, params, who)
        self.damping = check_damping(damping, who)
        self._tape: Tape = plan.linearize(self.examples, memory_budget=memory_budget, second_order=self._second_order, precision=precision)
        self._tape.replayed(graphs, memory_budget is not None)
        if not is_one_of(schedule, ("auto",)):  # within a budget the tape has chosen
            self._tape.set_schedule(schedule)
        self._tape.check_outputs(who)
        self.loss.check(self._tape.outputs, self.examples.targets, who)
        self._factor = self.loss.factor(self.examples.targets)
        self.weights = check_weights(weights, self._tape.outputs, who)
        self.num_parameters = plan.space.num_parameters
        self.dtype, self.device = plan.space.dtype, plan.space.device
        self._prepare()

    def _prepare(self) -> None:
        """Compute what products need of the loss at the tape's outputs; ``self._factor`` is the c of ``J = c Σ ℓ_n``."""
        raise NotImplementedError

    def _weighted(self, gradients: Tensor, power: float = 1.0) -> Tensor:
        """``(c w_n)^power`` times the rows of ``gradients [N, *out]``."""
        scaled = gradients * self._factor**power
        return scaled if self.weights is None else scaled * self.weights.pow(power).view(-1, *[1] * (gradients.dim() - 1))

    def _multiplies_as(self, curvature: type[LinearisedOperator]) -> bool:
        """Whether products are those of ``curvature``: a subclass of a user's may have put others in their place."""
        mine = type(self)
        return mine.matmat is LinearisedOperator.matmat and mine._undamped is curvature._undamped

    def _undamped(self, V: Tensor) -> Tensor:
        """``A v``: ``[V, P] -> [V, P]``, a new tensor."""
        raise NotImplementedError

    @property
    def space(self) -> ParameterSpace:
        """Layout of the flat vectors."""
        return self._tape.plan.space

    @property
    def tape(self) -> Tape:
        """The cached forward state, for per-example quantities at the same point."""
        return self._tape

    @property
    def param_names(self) -> tuple[str, ...]:
        """Names of the parameters in the order of the flat vector."""
        return self.space.names

    @property
    def num_examples(self) -> int:
        """N."""
        return self.examples.num_examples

    @property
    def cached_bytes(self) -> int:
        """Memory held for products."""
        return self._tape.cached_bytes

    @property
    def precision(self) -> Precision:
        """How products multiply float32 matrices."""
        return self._tape.precision

    def at_precision(self, precision: Precision) -> Self:
        """The same matrix, multiplied otherwise; the cached state is shared.

        Raises:
            ArgumentError: a precision that the device or the data type has not.
        """
        other = self._copy()
        other._tape = self._tape.at_precision(precision)
        return other

    @property
    def exact(self) -> Self:
        """The operator in full precision; itself if it is."""
        return self if self.precision == "full" else self.at_precision("full")

    @cached_property
    def objective_weight(self) -> float:
        """What the terms of ``J = c Σ w_n ℓ_n`` weigh together, classes' weights and ignored targets included: 1 for a mean, N for a sum.

        Of a mean with ``weights`` their mean, of a sum with class weights or ignored targets ``total_weight`` of the loss.
        """
        weight = self._factor * self.loss.total_weight(self.examples.targets)
        return weight if self.weights is None else weight * float(self.weights.mean())

    def product_operations(self, V: int) -> float:
        """Counted arithmetic of a product with V vectors.

        Four times the forward pass of N examples for each vector, and eight operations' time for each number of the kept state, which all
        V share: what a few vectors more cost less than the first.
        """
        forward = self.num_examples * sum(node.operations for node in self._tape.plan.graph.nodes)
        return 4.0 * forward * V + 8.0 * self._tape.state_bytes / self.dtype.itemsize

    def damped(self, damping: float) -> Self:
        """The same matrix with another λ; the cached state is shared.

        Raises:
            ArgumentError: negative damping.
        """
        other = self._copy()
        other.damping = check_damping(damping, type(self).__name__)
        return other

    @standalone
    def sample(self, generator: torch.Generator, batch_size: int) -> Self:
        """``A_B + λI`` on a batch B of ``batch_size`` examples drawn without replacement; its expectation is this operator.

        Args:
            generator: The only source of randomness.
            batch_size: Examples in B, at most N.

        Raises:
            ArgumentError: ``batch_size`` is not in [1, N].

        Cost: a forward pass over the batch.
        """
        who, N = type(self).__name__, self.num_examples
        if not is_count(batch_size) or batch_size > N:
            raise ArgumentError(f"{who}.sample: expected batch_size in [1, {N}], got {batch_size!r}; draw no more than there are examples.")
        if not isinstance(generator, torch.Generator):
            raise ArgumentError(f"{who}.sample: expected a torch.Generator, got {type(generator).__name__}; pass torch.Generator().")
        index = torch.randperm(N, generator=generator)[:batch_size]
        batch = self._copy()
        batch.examples = self.examples.subset(index)
        batch.weights = None if self.weights is None else self.weights[index]
        batch._tape = self._tape.plan.linearize(
            batch.examples.X, self._tape.theta, second_order=self._second_order, precision=self.precision
        ).without_shortcuts()
        batch._tape.replayed(self._tape.graphs)
        # c/|B| instead of c/N for a mean loss, N/|B| instead of 1 for a sum: the same factor N/|B| on c.
        batch._factor = self._factor * N / batch_size
        batch.__dict__.pop("objective_weight", None)  # what was remembered of all examples
        batch._prepare()
        return batch

    def _copy(self) -> Self:
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        return other

    def _matmat(self, V: Tensor) -> Tensor:
        product = self._undamped(V)
        return product.add_(V, alpha=self.damping) if self.damping else product

    def __matmul__(self, v: Any) -> Any:
        """``[P] -> [P]``, ``[P, V] -> [P, V]``, or a list or dict of tensors shaped like the parameters -> the same."""
        if isinstance(v, Tensor):
            return super().__matmul__(v)
        named = self.space.unflatten(self.matvec(self.space.flatten(v)))
        if isinstance(v, dict):
            return {name: named[self.space.aliases.get(name, name)] for name in map(str, v)}
        return [named[name] for name in self.space.names]

    def report(self) -> str:
        """What runs how: the nodes and their rules, schedule, and memory."""
        lines = [
            self._tape.plan.report(self._second_order),
            "",
            f"{self.num_examples} examples, {self.num_parameters} parameters, {self.loss.name} ({self.loss.reduction}), {self.dtype}",
            f"cached state: {self.cached_bytes / 2**20:.1f} MiB",
            *([_ROUNDED[self.precision]] if self.precision in _ROUNDED else []),
        ]
        for V in (1, 8):
            workspace = self._tape.workspace_bytes(V) / 2**20
            lines.append(f"V = {V}: {self._tape.schedule(V)}, workspace {workspace:.1f} MiB{self._tape.launches(V)}")
        return "\n".join(lines)

    def _hint(self) -> str:
        return f"; parameters: {self.space.describe()}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}(P={self.num_parameters}, N={self.num_examples}, loss={self.loss.name}, damping={self.damping:g})"
