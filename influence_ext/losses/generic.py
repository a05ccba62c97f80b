"""Any differentiable callable ``loss(output, target) -> scalar``, through automatic differentiation: exact, example by example."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from influence_ext.errors import ArgumentError, DataError, InfluenceExtError, ShapeError, UnsupportedLossError
from influence_ext.finite import all_finite
from influence_ext.losses.base import KernelLoss, Loss, check_outputs, check_weights, count
from influence_ext.losses.hessian import GENERIC, BlockHessian, GraphHessian, OutputHessian

_log = logging.getLogger("influence_ext")

MAX_BLOCK = 64
"""Largest C whose Hessians are kept as dense blocks."""
MAX_BLOCK_BYTES = 256 * 2**20
PROBE_SIZE = 256
PROBE_ELEMENTS = 2**22
"""Examples, and outputs in all, that are looked at together."""
NEGLIGIBLE = 2.0**-50
"""Of an output: a difference that rounding in float64 makes where a loss or its gradient is nearly zero."""
UNDETERMINED = "undetermined"


_Kind = tuple[torch.Size, torch.Size, torch.dtype, torch.dtype]
Recognise = Callable[[Callable[[Tensor, Tensor], Any], str, Tensor, Tensor], Loss | None]


class CallableLoss(Loss):
    """A loss given as a function of outputs ``[N, *out]`` and targets; ``ℓ_n`` is its value on example n as a batch of one.

    Args:
        function: returns a scalar, the mean or the sum of the examples' values.
        name: for messages.
        reduction: which of the two; None: found out when outputs are first checked, by comparing the value of a batch with its examples'.
        recognise: ``(function, name, z, target) -> Loss | None``: the same loss with formulas of its own, for outputs and targets of these
            shapes and dtypes. Where there is one, it does the work as long as it gives the callable's values and gradients on all data that
            are checked; from the first that differ, PyTorch differentiates the callable.
    """

    def __init__(
        self, function: Callable[[Tensor, Tensor], Tensor], name: str, reduction: str | None, recognise: Recognise = lambda *_: None
    ):
        self.function, self.name, self._given_name = function, name, name
        self._recognise = recognise
        self._recognised: dict[_Kind, Loss | None] = {}
        self.reduction = reduction or UNDETERMINED
        self._stated = reduction is not None
        self._vectorised = True
        self._is_linear = False

    @property
    def is_linear(self) -> bool:
        """Whether the gradient does not depend on the outputs; known once outputs were checked."""
        known = [loss for loss in self._recognised.values() if loss is not None]
        return known[-1].is_linear if known else self._is_linear

    def total_weight(self, targets: Tensor) -> float:
        """See :meth:`Loss.total_weight`."""
        for (_, shape, _, _), loss in self._recognised.items():
            if loss is not None and shape == targets.shape[1:]:
                return loss.total_weight(targets)
        return super().total_weight(targets)

    def factor(self, targets: Tensor) -> float:
        """See :meth:`Loss.factor`.

        Raises:
            ArgumentError: whether the loss is a mean or a sum was not stated, and is not known before it was seen with outputs.
        """
        if self.reduction == UNDETERMINED and targets.shape[0] > 1:
            raise ArgumentError(
                f"{self.name}: expected to know whether this callable is a mean or a sum over examples, got none stated; pass "
                "reduction='mean' or reduction='sum'."
            )
        return super().factor(targets)

    def with_reduction(self, reduction: str) -> Loss:
        """See :meth:`Loss.with_reduction`."""
        return CallableLoss(self.function, self._given_name, reduction, self._recognise)

    def value(self, z: Tensor, target: Tensor) -> Tensor:
        """See :meth:`Loss.value`."""
        if (known := self._known(z, target)) is not None:
            return known.value(z, target)
        check_outputs(z, self.name)
        with torch.no_grad():
            return self._values(z.detach(), target.detach()).to(z.dtype)

    def gradient(self, z: Tensor, target: Tensor) -> Tensor:
        """See :meth:`Loss.gradient`."""
        if (known := self._known(z, target)) is not None:
            return known.gradient(z, target)
        return self._gradient(z, target, create_graph=False)[1].detach()

    def as_kernel(self, z: Tensor, target: Tensor) -> KernelLoss | None:
        """See :meth:`Loss.as_kernel`."""
        known = self._known(z, target)
        return None if known is None else known.as_kernel(z, target)

    def hessian(self, z: Tensor, target: Tensor, weights: Tensor | None = None) -> OutputHessian:
        """See :meth:`Loss.hessian`. Cost: for C ≤ ``MAX_BLOCK``, C reverse passes now; else one for every product with a vector."""
        if (known := self._known(z, target)) is not None:
            return known.hessian(z, target, weights)
        by_example = check_weights(weights, z, self.name)
        leaf, gradient = self._gradient(z, target, create_graph=True)
        if not gradient.requires_grad:
            raise UnsupportedLossError(
                f"{self.name}: expected a loss with curvature in the outputs, got one that is linear in them (its Gauss-Newton matrix is "
                "zero); use a loss on logits or raw outputs, such as cross_entropy."
            )
        graph = GraphHessian(GENERIC, 1.0, None, by_example, self.name, leaf, gradient)
        N, C = z.shape[0], count(z.shape)
        if C > MAX_BLOCK or N * C * C * z.dtype.itemsize > MAX_BLOCK_BYTES:
            return graph
        return BlockHessian(GENERIC, 1.0, graph.dense(), by_example, self.name)

    def bregman(self, z: Tensor, z_s: Tensor, target: Tensor) -> Tensor:
        """See :meth:`Loss.bregman`: the definition, or ``∫₀¹ (1−s) dᵀ H(z_s + s d) d ds`` where that is more accurate.

        Cost: thirteen products with the Hessian.
        """
        if (known := self._known(z, target)) is not None:
            return known.bregman(z, z_s, target)
        check_outputs(z, self.name)
        dtype, N = z.dtype, z.shape[0]
        z, z_s, target = z.detach().double(), z_s.detach().double(), _double(target.detach())
        d = z - z_s
        slope = (self.gradient(z_s, target) * d).reshape(N, -1).sum(dim=1)
        value, value_s = self.value(z, target), self.value(z_s, target)
        definition = value - value_s - slope
        noise = 8 * torch.finfo(torch.float64).eps * (value.abs() + value_s.abs() + slope.abs())
        coarse, fine = self._integral(z_s, d, target, 5), self._integral(z_s, d, target, 8)
        return torch.where((fine - coarse).abs() < noise, fine, definition).to(dtype)

    def check(self, z: Tensor, target: Tensor, who: str) -> None:
        """See :meth:`Loss.check`; finds the reduction out.

        Raises:
            UnsupportedLossError: the value of a batch is neither the mean nor the sum of its examples' values.
            ArgumentError: it is not what was stated.
            DataError: a value is not finite.

        Cost: two evaluations of the loss; of one that is recognised one, and three with a gradient on at most 256 examples.
        """
        check_outputs(z, who)
        if (known := self._look(z, target, who)) is not None:
            known.check(z, target, who)
            if self.confirm(z, target, who):
                return
        self._is_linear = not self._gradient(z[:1], target[:1], create_graph=True)[1].requires_grad
        for start in range(0, z.shape[0], PROBE_SIZE):
            part = slice(start, start + PROBE_SIZE)
            self._probe(z[part].detach(), target[part].detach(), start, who)

    def _known(self, z: Tensor, target: Tensor) -> Loss | None:
        """What the callable was recognised as, for outputs and targets like these."""
        return self._recognised.get(_kind(z, target))

    def confirm(self, z: Tensor, target: Tensor, who: str) -> bool:
        """Whether the loss that the callable was recognised as is still the callable here; if not, it does no work from now on.

        Raises:
            UnsupportedLossError: the callable gives another value for the same outputs and targets.

        Cost: one evaluation of the callable, and one with a gradient on some of the examples, at most 256, from all over the data; where
        there are more, another on these.
        """
        known = self._known(z, target)
        if known is None or z.shape[0] == 0:
            return known is not None
        z, target = z.detach(), target.detach()
        size = min(PROBE_SIZE, max(1, PROBE_ELEMENTS // max(1, count(z.shape))))
        if z.shape[0] <= size:
            some = _Trial(self.function, z, target)
            parts = [some]
        else:
            index = torch.linspace(0, z.shape[0] - 1, size, dtype=torch.float64, device=z.device).long()
            some = _Trial(self.function, z[index], target[index])
            parts = [_Trial(self.function, z[k : k + size], target[k : k + size]) for k in range(0, z.shape[0], size)]
        first = some.value
        agrees = all(self._agrees(self._same_value, known, part) for part in parts)
        agrees = agrees and self._agrees(self._same_gradient, known, some)
        if all((again := value) != first and abs(again - first) > _rounding(z) * abs(first) for value in some.later_values()):
            raise self._inconsistent(first, again, who)
        if not agrees:
            _log.warning("%s: on these data %s is not %s; PyTorch differentiates it.", who, self._given_name, known.name)
            self._recognised[_kind(z, target)] = None
            self.name = self._given_name
        return agrees

    def _inconsistent(self, first: float, again: float, who: str) -> UnsupportedLossError:
        return UnsupportedLossError(
            f"{who}: expected {self._given_name} to give one value for the same outputs and targets, got {first:.6g} and then {again:.6g}; "
            "it draws random numbers or counts its calls: pass a function of outputs and targets alone."
        )

    def _agrees(self, compare: Callable[[Loss, _Trial], bool], known: Loss, trial: _Trial) -> bool:
        """Whether ``compare`` finds the callable and ``known`` equal.

        If not in float32 then in float64: where a network fits its data, losses as PyTorch computes them have lost their digits. Of outputs
        that are not finite nothing is known.
        """
        if not known.total_weight(trial.target) > 0 or not trial.is_finite or compare(known, trial):
            return True
        try:
            return trial.z.dtype == torch.float32 and compare(known, trial.in_double())
        except Exception:  # the callable's own, of tensors that it holds in float32
            return False

    def _same_value(self, known: Loss, trial: _Trial) -> bool:
        z, target = trial.z, trial.target
        values, factor = known.value(z, target).double(), known.factor(target)
        limit = _rounding(z) * float(values.abs().sum()) + NEGLIGIBLE * float(z.abs().sum())
        return abs(trial.value - float(values.sum()) * factor) <= limit * factor

    def _same_gradient(self, known: Loss, trial: _Trial) -> bool:
        """What has the same values may have another derivative: a reversed gradient, a hook, a detached part."""
        z, target = trial.z, trial.target
        factor = known.factor(target)
        expected = known.gradient(z, target).double() * factor
        found = trial.graded[1]
        limit = _rounding(z) * float(expected.norm()) + NEGLIGIBLE * z.numel() ** 0.5 * factor
        return found is not None and float((found.double() - expected).norm()) <= limit

    def _look(self, z: Tensor, target: Tensor, who: str) -> Loss | None:
        """Recognise the callable, if that was not tried yet for such outputs and targets, and compare on some of these and at others."""
        kind = _kind(z, target)
        if kind in self._recognised:
            return self._recognised[kind]
        found = self._recognise(self.function, self._given_name, z, target)
        if found is not None:
            self._check_reduction(found.reduction, who)
            z, target = z[:PROBE_SIZE].detach(), target[:PROBE_SIZE].detach()
            found.check(z, target, who)
            if not (self._agrees(self._same_value, found, _Trial(self.function, z, target)) and self._same_elsewhere(found, z, target)):
                found = None
        self._recognised[kind] = found
        if found is not None:
            self.name, self.reduction = found.name, found.reduction
            _log.info("%s: %s", who, found.name)
        return found

    def _same_elsewhere(self, known: Loss, z: Tensor, target: Tensor) -> bool:
        """Whether both are the same function of outputs that the data do not have, as far as the loss is defined there."""
        for other in (z.roll(1, 0), -4 * z):
            try:
                known.check(other, target, self._given_name)
            except InfluenceExtError:  # outside of its domain, as probabilities are that no longer lie in [0, 1]
                continue
            try:
                trial = _Trial(self.function, other, target)
                if not all(self._agrees(compare, known, trial) for compare in (self._same_value, self._same_gradient)):
                    return False
            except Exception:  # the callable's own: whatever it objects to, the recognised loss does not
                return False
        return True

    def _probe(self, z: Tensor, target: Tensor, start: int, who: str) -> None:
        values = self.value(z, target).double()
        bad = (~torch.isfinite(values)).nonzero()[:, 0]
        if len(bad):
            raise DataError(
                f"{who}: expected finite values of {self.name}, got NaN or infinity for example {start + int(bad[0])}; check the scale of "
                "outputs and targets."
            )
        N = len(values)
        if N < 2:
            return
        found = _value_of_batch(self.function, z, target)
        total, size = float(values.sum()), float(values.abs().sum())
        tolerance = 1e-5 if z.dtype == torch.float32 else 1e-8
        is_mean, is_sum = abs(found - total / N) <= tolerance * size / N, abs(found - total) <= tolerance * size
        if is_mean and is_sum:
            return
        if not (is_mean or is_sum):
            if (again := _value_of_batch(self.function, z, target)) != found:
                raise self._inconsistent(found, again, who)
            if self._vectorised:  # a callable may behave differently under vmap, as where it catches what vmap raises
                self._vectorised = False
                self._probe(z, target, start, who)
                return
            raise UnsupportedLossError(
                f"{who}: expected {self.name} of a batch to be the mean or the sum of its values on each example alone, got {found:.6g} "
                f"for {N} examples with mean {total / N:.6g} and sum {total:.6g}; it mixes examples, or divides by a number that "
                "depends on the targets (as ignore_index and weights do: pass nn.CrossEntropyLoss itself, or a callable that sums)."
            )
        reduction = "mean" if is_mean else "sum"
        self._check_reduction(reduction, who)
        self.reduction = reduction

    def _check_reduction(self, reduction: str, who: str) -> None:
        """Raise if it is not what was stated, or found before."""
        if self.reduction not in (UNDETERMINED, reduction):
            stated = "as stated" if self._stated else "as on the examples before"
            raise ArgumentError(
                f"{who}: expected {self.name} to be a {self.reduction} over examples {stated}, got a {reduction}; pass "
                f"reduction='{reduction}' or nothing."
            )

    def _integral(self, z_s: Tensor, d: Tensor, target: Tensor, num_nodes: int) -> Tensor:
        """``∫₀¹ (1−s) dᵀ H(z_s + s d) d ds`` by Gauss and Legendre's rule: ``[N]``."""
        total = z_s.new_zeros(z_s.shape[0])
        for node, weight in _legendre(num_nodes):
            leaf, gradient = self._gradient(z_s + node * d, target, create_graph=True)
            if not gradient.requires_grad:
                return total
            product = GraphHessian(GENERIC, 1.0, None, None, self.name, leaf, gradient).matmat(d[None])[0]
            total += weight * (1 - node) * (product * d).reshape(len(d), -1).sum(dim=1)
        return total

    def _gradient(self, z: Tensor, target: Tensor, create_graph: bool) -> tuple[Tensor, Tensor]:
        check_outputs(z, self.name)
        with torch.enable_grad():
            leaf = z.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
            values = self._values(leaf, target.detach())
            if not values.requires_grad:
                raise UnsupportedLossError(
                    f"{self.name}: expected a loss that PyTorch can differentiate by the outputs, got a value without a gradient; compute "
                    "it from the outputs with differentiable operations."
                )
            (gradient,) = torch.autograd.grad(values.sum(), leaf, create_graph=create_graph)
        return leaf, gradient

    def _values(self, z: Tensor, target: Tensor) -> Tensor:
        """``ℓ_n``, ``[N]``, all examples at once where vmap can, else in a loop."""
        z = z.contiguous()  # a tape's outputs may lie otherwise; the network's own do not, and the callable may view them
        if z.shape[0] == 0:
            return z.new_zeros(0) + z.sum()
        if self._vectorised:
            try:
                return self._scalars(torch.func.vmap(lambda z_n, t_n: self.function(z_n[None], t_n[None]))(z, target), z.shape[0])
            except (RuntimeError, NotImplementedError, TypeError, ValueError):
                self._vectorised = False  # vmap lacks rules for some operators, and control flow that reads values
        rows = []
        for n in range(z.shape[0]):
            try:
                rows.append(self.function(z[n : n + 1], target[n : n + 1]))
            except Exception as error:
                raise UnsupportedLossError(
                    f"{self.name}: expected a callable loss(output, target) that works on a batch of one example, got "
                    f"{type(error).__name__} on output {[1, *z.shape[1:]]} and target {[1, *target.shape[1:]]}: {error}; correct the "
                    "callable."
                ) from error
        return self._scalars(torch.stack([self._tensor(row) for row in rows]), z.shape[0])

    def _tensor(self, value: Any) -> Tensor:
        if not isinstance(value, Tensor):
            raise UnsupportedLossError(
                f"{self.name}: expected a loss that returns a tensor, got {type(value).__name__}; do not call .item()."
            )
        return value

    def _scalars(self, values: Any, N: int) -> Tensor:
        values = self._tensor(values)
        if values.shape != (N,) or not values.is_floating_point():
            raise ShapeError(
                f"{self.name}: expected a loss that returns a floating-point scalar, got {values.dtype} {list(values.shape[1:])} for a "
                "batch of one; reduce it with .mean() or .sum()."
            )
        return values


@dataclass(eq=False)
class _Trial:
    """A callable on one batch: its value, and its value with its gradient, each computed once."""

    function: Callable[[Tensor, Tensor], Any]
    z: Tensor
    target: Tensor

    @cached_property
    def is_finite(self) -> bool:
        """Whether the outputs are."""
        return all_finite(self.z)

    @cached_property
    def value(self) -> float:
        """Without a gradient."""
        return _value_of_batch(self.function, self.z, self.target)

    @cached_property
    def graded(self) -> tuple[float, Tensor | None]:
        """The value, and the gradient by the outputs; None where there is none."""
        with torch.inference_mode(False), torch.enable_grad():
            leaf = self.z.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
            value = self.function(leaf, self.target.clone())
            (gradient,) = torch.autograd.grad(value, leaf, allow_unused=True) if value.requires_grad else (None,)
        return float(value.detach()), gradient

    def later_values(self) -> Iterator[float]:
        """What the callable gives after :attr:`value`: in the gradient's pass, if there was one, and once more."""
        if "graded" in self.__dict__:
            yield self.graded[0]
        yield _value_of_batch(self.function, self.z, self.target)

    def in_double(self) -> _Trial:
        """The same in float64."""
        return _Trial(self.function, self.z.double(), _double(self.target))


def _value_of_batch(function: Callable[[Tensor, Tensor], Any], z: Tensor, target: Tensor) -> float:
    with torch.no_grad():
        return float(function(z.contiguous(), target))


def _kind(z: Tensor, target: Tensor) -> _Kind:
    """What a callable's form may depend on."""
    return z.shape[1:], target.shape[1:], z.dtype, target.dtype


def _rounding(z: Tensor) -> float:
    """Relative difference up to which two ways to one result count as the same."""
    return 1e-4 if z.dtype == torch.float32 else 1e-8


def _double(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def _legendre(num_nodes: int) -> list[tuple[float, float]]:
    """Nodes and weights on ``[0, 1]``: eigenvalues of the recurrence's tridiagonal matrix (Golub and Welsch 1969)."""
    k = torch.arange(1, num_nodes, dtype=torch.float64)
    off = k / (4 * k * k - 1).sqrt()
    nodes, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    return list(zip(((nodes + 1) / 2).tolist(), vectors[0].square().tolist(), strict=True))
