"""The generalised Gauss-Newton matrix of a training cost."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from influence_ext.data import Examples, load
from influence_ext.errors import ArgumentError
from influence_ext.losses import Loss, LossLike, OutputHessian, resolve
from influence_ext.operators.base import CurvatureOperator
from influence_ext.params import ParameterSpace, Selection
from influence_ext.plan import Plan, Schedule, Tape


class GGN(CurvatureOperator):
    r"""The damped generalised Gauss-Newton matrix at the model's present parameters.

    .. math:: G + \lambda I, \qquad G = c \sum_n J_n^T H_n J_n

    ``J_n [C, P]`` is the Jacobian of output n, ``H_n [C, C]`` the loss Hessian in output space, ``c = 1/N`` for a loss with reduction
    "mean" and 1 for "sum" (over the whole data set, however it comes in batches).

    Args:
        model: any network that can be captured (see ``report()``); used in evaluation mode, never modified. The operator keeps the values
            the parameters have now.
        loss: ``nn`` loss module, functional or its name; see :func:`influence_ext.losses.resolve`.
        data: one ``(X, y)`` or a re-iterable of such batches.
        damping: λ ≥ 0.
        params: names, patterns or tensors that select a sub-space; default: all parameters with ``requires_grad``.
        memory_budget: bytes the cached state may take; None: no limit.
        reduction: overrides the loss's own.
        schedule: "auto", or "by_example" / "by_operator" to force how products run (see docs/design.md).

    Raises:
        UnsupportedModelError, UnsupportedLossError: see :meth:`Plan.of`, :func:`resolve`.
        DataError, ShapeError, DTypeError, DeviceError: data or targets do not fit.
        ArgumentError: negative damping, or the cached state exceeds ``memory_budget``.

    Cost: one forward pass; keeps the activations of all N examples (``cached_bytes``). A product with V vectors costs V tangent and V
    cotangent sweeps, about four forward passes' multiplications less two of the first layer's, and V·(2 widest activations) of workspace
    per example in flight.

    Reference: Schraudolph 2002, "Fast curvature matrix-vector products for second-order gradient descent".
    """

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
    ):
        who = type(self).__name__
        self.loss = resolve(loss, reduction, who)
        self.examples: Examples = load(data, who)
        plan = Plan.of(model, self.examples.X, params, who)
        self.damping = _check_damping(damping, who)
        self._tape: Tape = plan.linearize(self.examples.X)
        self._tape.set_schedule(schedule)
        if memory_budget is not None and self._tape.cached_bytes > memory_budget:
            raise ArgumentError(
                f"{who}: expected a cached state of at most memory_budget = {memory_budget} bytes, got {self._tape.cached_bytes} for "
                f"{self.examples.num_examples} examples; raise the budget or pass fewer examples."
            )
        self.loss.check(self._tape.outputs, self.examples.targets, who)
        self._tape.check_outputs(who)
        factor = self.loss.factor(self.examples.targets)
        self._hessian: OutputHessian = self.loss.hessian(self._tape.outputs, self.examples.targets).scaled(factor)
        self.num_parameters = plan.space.num_parameters
        self.dtype, self.device = plan.space.dtype, plan.space.device
        self.num_roots = self._tape.outputs.numel()

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

    def damped(self, damping: float) -> GGN:
        """The same matrix with another λ; the cached state is shared.

        Raises:
            ArgumentError: negative damping.
        """
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.damping = _check_damping(damping, type(self).__name__)
        return other

    def sample(self, generator: torch.Generator, batch_size: int) -> GGN:
        """``G_B + λI`` on ``batch_size`` examples drawn without replacement; its expectation is this operator.

        Args:
            generator: The only source of randomness.
            batch_size: |B|, at most N.

        Raises:
            ArgumentError: ``batch_size`` is not in [1, N].

        Cost: a forward pass over the batch.
        """
        who, N = type(self).__name__, self.num_examples
        if not 1 <= batch_size <= N:
            raise ArgumentError(f"{who}.sample: expected batch_size in [1, {N}], got {batch_size}; draw no more than there are examples.")
        index = torch.randperm(N, generator=generator)[:batch_size]
        batch = object.__new__(type(self))
        batch.__dict__.update(self.__dict__)
        batch.examples = self.examples.subset(index)
        batch._tape = self._tape.plan.linearize(batch.examples.X, self._tape.theta)
        # c/|B| instead of c/N for a mean loss, N/|B| instead of 1 for a sum: the same factor N/|B| on c.
        factor = self.loss.factor(self.examples.targets) * N / batch_size
        batch._hessian = self.loss.hessian(batch._tape.outputs, batch.examples.targets).scaled(factor)
        batch.num_roots = batch._tape.outputs.numel()
        return batch

    def _matmat(self, V: Tensor) -> Tensor:
        product = self._tape.ggn(V, self._hessian)
        return product.add_(V, alpha=self.damping) if self.damping else product

    def __matmul__(self, v: Any) -> Any:
        """``[P] -> [P]``, ``[P, V] -> [P, V]``, or a list or dict of tensors shaped like the parameters -> the same."""
        if isinstance(v, Tensor):
            return super().__matmul__(v)
        named = self.space.unflatten(self.matvec(self.space.flatten(v)))
        if isinstance(v, dict):
            return {name: named[self.space.aliases.get(name, name)] for name in map(str, v)}
        return [named[name] for name in self.space.names]

    def diagonal(self) -> Tensor:
        """``[P]``, exact, from per-example factors.

        ``diag G = Σ_n Σ_r (J_nᵀ s_{n,r})²`` with the columns ``s`` of the loss Hessian's root. Cost: C cotangent sweeps and one product of
        squares a layer; memory N·C times the widths of the trainable layers, in blocks of right-hand sides.
        """
        total = torch.zeros(self.num_parameters, dtype=self.dtype, device=self.device)
        for roots in self._root_blocks():
            total += self._tape.factors(roots).square_sum()
        return total.add_(self.damping)

    def root_matmat(self, V: Tensor) -> Tensor:
        """``U v``: ``[V, P] -> [V, R]`` with ``R = C·N`` ordered output first, ``U = [√c S_nᵀ J_n]``."""
        self._check(V, "[V, P]", V.dim() == 2 and V.shape[1] == self.num_parameters)
        outputs = self._hessian.root_rmatmat(self._tape.jvp(V.detach().contiguous()))
        return outputs.reshape(V.shape[0], self.num_examples, -1).transpose(1, 2).reshape(V.shape[0], -1)

    def root_rmatmat(self, Y: Tensor) -> Tensor:
        """``Uᵀ y``: ``[V, R] -> [V, P]``."""
        N = self.num_examples
        cotangents = Y.detach().reshape(Y.shape[0], -1, N).transpose(1, 2).contiguous()
        cotangents = cotangents.view(Y.shape[0], N, *self._tape.plan.output_shape)
        return self._tape.vjp(self._hessian.root_matmat(cotangents))

    def root_gram(self) -> Tensor:
        """``U Uᵀ [R, R]`` from per-example factors. Cost: C cotangent sweeps and two products ``[R, width]·[width, R]`` a layer."""
        N = self.num_examples
        C = self.num_roots // N
        factors = self._tape.factors(self._roots(0, C))
        gram: Tensor = factors.gram(factors)
        return (gram + gram.T).div_(2)

    def report(self) -> str:
        """What runs how: the nodes and their rules, schedule, and memory."""
        lines = [
            self._tape.plan.report(),
            "",
            f"{self.num_examples} examples, {self.num_parameters} parameters, {self.loss.name} ({self.loss.reduction}), {self.dtype}",
            f"cached state: {self.cached_bytes / 2**20:.1f} MiB",
        ]
        for V in (1, 8):
            workspace = self._tape.workspace_bytes(V) / 2**20
            lines.append(f"V = {V}: {self._tape.schedule(V)}, workspace {workspace:.1f} MiB")
        return "\n".join(lines)

    def _roots(self, start: int, stop: int) -> Tensor:
        """Columns ``start..stop`` of each ``√c S_n``, as cotangents ``[stop − start, N, *out]``."""
        N, C = self.num_examples, self.num_roots // self.num_examples
        unit = torch.zeros(stop - start, N, C, dtype=self.dtype, device=self.device)
        unit[torch.arange(stop - start), :, torch.arange(start, stop)] = 1
        return self._hessian.root_matmat(unit.view(stop - start, N, *self._tape.plan.output_shape))

    def _root_blocks(self, limit_bytes: int = 256 * 2**20) -> Iterator[Tensor]:
        """All of them, a block of output elements at a time."""
        C = self.num_roots // self.num_examples
        width = sum(node.width for node in self._tape.plan.graph.nodes)
        block = max(1, min(C, limit_bytes // max(1, self.num_examples * width * self.dtype.itemsize)))
        for start in range(0, C, block):
            yield self._roots(start, min(start + block, C))

    def _hint(self) -> str:
        return f"; parameters: {self.space.describe()}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}(P={self.num_parameters}, N={self.num_examples}, loss={self.loss.name}, damping={self.damping:g})"


def _check_damping(damping: float, who: str) -> float:
    damping = float(damping)
    if not damping >= 0 or damping == float("inf"):
        raise ArgumentError(f"{who}: expected damping >= 0 and finite, got {damping}; for instance damping=1e-3.")
    return damping
