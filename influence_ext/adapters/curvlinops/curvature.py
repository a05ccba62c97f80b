"""curvlinops' curvature matrices of an empirical risk on this library's operators."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.nn import BCEWithLogitsLoss, CrossEntropyLoss, MSELoss

from influence_ext.adapters.curvlinops.data import Batches, BatchSize
from influence_ext.adapters.curvlinops.interface import PyTorchLinearOperator
from influence_ext.adapters.curvlinops.model import Parameters, Subject
from influence_ext.errors import ArgumentError, DTypeError, ShapeError, UnsupportedLossError, UnsupportedModelError
from influence_ext.losses import resolve
from influence_ext.operators import GGN, EmpiricalFisher, Hessian
from influence_ext.operators.base import rows_of
from influence_ext.params import ParameterSpace
from influence_ext.tape import Tape

RTOL, ATOL = 5e-5, 1e-6
"""Two passes over the data may differ by this much, as in curvlinops."""


@dataclass(frozen=True, eq=False)
class TermFisher:
    """``Σ_n Σ_t g_nt g_ntᵀ`` with ``g_nt = J_ntᵀ r_nt`` over the terms t of an example: rows of its output along ``axis``.

    Attributes:
        tape: the network's.
        cotangents: r, ``[N, *out]``.
        axis: of ``[K, N, *out]``, along which the elements of one term lie.
        space: layout of the flat vectors.
    """

    tape: Tape
    cotangents: Tensor
    axis: int
    space: ParameterSpace

    def matmat(self, V: Tensor) -> Tensor:
        """``[K, P] -> [K, P]``. Cost: K tangent and K cotangent sweeps."""
        slopes = (self.tape.jvp(V.detach().contiguous()) * self.cotangents).sum(dim=self.axis, keepdim=True)
        return self.tape.vjp(slopes * self.cotangents)


Native = GGN | Hessian | TermFisher


@dataclass(frozen=True, eq=False)
class Linearised:
    """The library's operators at given parameters, whose sum is the matrix.

    Attributes:
        natives: products ``[K, P] -> [K, P]`` in the library's order of parameters; one for each shape of examples.
        module: what they were made of.
        order: positions in the user's list of the parameters in the library's order.
    """

    natives: tuple[Native, ...]
    module: torch.nn.Module
    order: list[int]

    def matmat(self, V: Tensor) -> Tensor:
        """``[K, P] -> [K, P]``, computed in float32 for half precision."""
        V = V.to(self.natives[0].tape.outputs.dtype)
        product = self.natives[0].matmat(V)
        for native in self.natives[1:]:
            product = product + native.matmat(V)
        return product


class CurvatureLinearOperator(PyTorchLinearOperator):
    """A curvature matrix ``[P, P]`` of the empirical risk ``Σ_b r_b L(f(X_b; θ), y_b)`` at the present values of the parameters.

    ``r_b`` is 1 for ``reduction="sum"`` and the share ``|b| / num_data`` of a batch for ``"mean"``. Flat vectors follow the order of
    ``params``; matrices are ``[P, K]``, lists hold tensors ``[*shape]`` or ``[*shape, K]``.

    The data are read once, and the forward pass is computed once for given parameters: each product first compares the parameters and
    buffers with what they were, and computes the forward pass anew if they have changed.

    Args:
        model_func: a module; with a dictionary of parameters also a function ``(params, X) -> prediction``. A mapping or sequence X is
            passed to it as one argument.
        loss_func: with an attribute ``reduction``, "mean" or "sum".
        params: parameters of the module, all or some, in any order; or a dictionary name -> tensor of the values at which to evaluate.
        data: re-iterable of ``(X, y)``; shapes of examples may differ between batches.
        progressbar: show one while the data are read.
        check_deterministic: read the data twice and raise if the empirical risk or its gradient differ.
        num_data: N; default: the sizes of the batches, added up.
        block_sizes: numbers of parameters that form the blocks of a block-diagonal matrix; for the Hessian.
        batch_size_fn: size of a batch from its X, needed where X is a mapping.

    Raises:
        ValueError: mappings without ``batch_size_fn``, ``block_sizes`` that do not fit, parameters that are not the model's, no data,
            or a mean over an empty batch.
        RuntimeError: data or model are not deterministic, parameters on several devices or of several dtypes, or a model that cannot be
            captured (:class:`~influence_ext.errors.UnsupportedModelError`).
        NotImplementedError: a loss that the matrix is not defined for.

    Cost: one forward pass, whose state is kept, and a capture for each shape of examples; with ``check_deterministic`` another pass over
    the data. Products: ``influence_ext.GGN``.
    """

    SELF_ADJOINT: bool = True
    SUPPORTS_BLOCKS: bool = False

    def __init__(
        self,
        model_func: Any,
        loss_func: Any,
        params: Parameters,
        data: Iterable[tuple[Any, Tensor]],
        progressbar: bool = False,
        check_deterministic: bool = True,
        num_data: int | None = None,
        block_sizes: Sequence[int] | None = None,
        batch_size_fn: BatchSize | None = None,
    ):
        who = type(self).__name__
        params = params if isinstance(params, Mapping) else list(params)
        self._params = params
        self._tensors = tuple(params.values() if isinstance(params, Mapping) else params)
        if not self._tensors:
            raise ArgumentError(f"{who}: expected at least one parameter, got none; pass list(model.parameters()).")
        if not all(isinstance(t, torch.Tensor) for t in self._tensors):
            kinds = ", ".join(sorted({type(t).__name__ for t in self._tensors}))
            raise ArgumentError(f"{who}: expected tensors as params, got {kinds}; with names pass dict(model.named_parameters()).")
        if num_data is not None and (int(num_data) != num_data or num_data < 1):
            raise ArgumentError(
                f"{who}: expected an integer num_data of at least 1, got {num_data!r}; leave it out to have the examples counted."
            )
        self._blocks = self._block_ranges(block_sizes, who)
        self._loss_func = loss_func
        stated = getattr(loss_func, "reduction", None)
        if stated not in ("mean", "sum"):
            raise ArgumentError(
                f"{who}: expected loss_func.reduction to be 'mean' or 'sum', got {stated!r}; use a loss module that states it."
            )
        self._loss = resolve(loss_func, None, who)
        self._check_loss(who)
        passes = 2 if check_deterministic else 1
        with torch.random.fork_rng(devices=[]):  # one for both passes: they are to draw different random numbers
            self._groups, *again = [Batches.read(data, self.device, batch_size_fn, progressbar, stated, who) for _ in range(passes)]
        self._num_data = sum(sum(batches.sizes) for batches in self._groups) if num_data is None else num_data
        self._common("dtype")
        super().__init__([tuple(t.shape) for t in self._tensors], [tuple(t.shape) for t in self._tensors])
        self._subject = Subject(model_func, params, self._groups[0].structure, who)
        self._linearised: Linearised | None = self._linearise(self._groups)
        self._require_deterministic_model(self._linearised, who)
        for groups in again:
            self._require_deterministic_data(self._linearised, groups, who)

    def __getstate__(self) -> dict[str, Any]:
        """Without the forward pass, which a copy computes when it first needs it."""
        return {**self.__dict__, "_linearised": None}

    # What subclasses say

    def _make(self, module: torch.nn.Module, batches: Batches, names: tuple[str, ...]) -> Native:
        """The library's own operator on the batches, for the parameters ``names``."""
        raise NotImplementedError

    def _check_loss(self, who: str) -> None:
        """Raise for losses that the matrix is not defined for."""

    # Products

    def __matmul__(self, X: Any) -> Any:
        """As in curvlinops: ``[P]``, ``[P, K]``, a list of tensors, or an operator.

        Raises:
            ValueError: another shape or type of operand.
            TypeError: another dtype.
        """
        if not isinstance(X, Tensor):
            if not self._is_vector(X):
                return super().__matmul__(X)
            return list(_unflatten_dense_tensors(self._rows(_flatten_dense_tensors(X)[None])[0], X))
        if X.dim() not in (1, 2) or X.shape[0] != self.shape[1]:
            raise ShapeError(
                f"{type(self).__name__}: expected a tensor [P] or [P, K] with P = {self.shape[1]}, got {list(X.shape)}; "
                "transpose a matrix whose rows are vectors."
            )
        return self._rows(X[None])[0] if X.dim() == 1 else self._rows(rows_of([X])).T

    def _is_vector(self, X: Any) -> bool:
        """Whether this is a list of tensors shaped like the parameters."""
        return (
            isinstance(X, list)
            and len(X) == len(self._in_shape)
            and all(isinstance(x, Tensor) and x.shape == s for x, s in zip(X, self._in_shape, strict=True))
        )

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        K = X[0].shape[-1]
        rows = self._rows(rows_of([x.reshape(-1, K) for x in X]))
        return [r.T.reshape(*s, K) for r, s in zip(rows.split(self._in_shape_flat, dim=1), self._in_shape, strict=True)]

    def _adjoint(self) -> PyTorchLinearOperator:
        return self

    def _rows(self, V: Tensor) -> Tensor:
        """``[K, P] -> [K, P]`` in the user's order, at the present parameters."""
        if V.dtype != self.dtype:
            raise DTypeError(
                f"{type(self).__name__}: expected vectors of {self.dtype}, got {V.dtype}; convert them with .to({self.dtype})."
            )
        at = self._current()
        if self._blocks is None:
            return self._ordered(at, V)
        product = torch.empty_like(V, memory_format=torch.contiguous_format)
        for start, stop in self._blocks:
            inside = torch.zeros_like(product)
            inside[:, start:stop] = V[:, start:stop]
            product[:, start:stop] = self._ordered(at, inside)[:, start:stop]
        return product

    def _ordered(self, at: Linearised, V: Tensor) -> Tensor:
        if at.order == sorted(at.order):
            return at.matmat(V).to(self.dtype)
        pieces = V.split(self._in_shape_flat, dim=1)
        product = at.matmat(torch.cat([pieces[k] for k in at.order], dim=1))
        return torch.cat(self._in_user_order(at, product), dim=1).to(self.dtype)

    def _in_user_order(self, at: Linearised, rows: Tensor) -> list[Tensor]:
        """Pieces ``[..., size]`` of ``rows [..., P]``, which is in the library's order."""
        pieces = rows.split([self._in_shape_flat[k] for k in at.order], dim=-1)
        return [piece for _, piece in sorted(zip(at.order, pieces, strict=True), key=lambda found: found[0])]

    def _current(self) -> Linearised:
        if self._linearised is None or self._subject.changed():
            self._linearised = self._linearise(self._groups)
        return self._linearised

    def _linearise(self, groups: Sequence[Batches]) -> Linearised:
        module, names = self._subject.look(), self._subject.names
        natives = tuple(self._make(module, batches, names) for batches in groups)
        return Linearised(natives, module, [names.index(name) for name in natives[0].space.names])

    def _weights(self, batches: Batches) -> Tensor | None:
        """``[N]``, what each example's loss counts beyond the library's own reduction; None for ones."""
        weights = batches.risk_weights(self._loss, self._num_data) / self._loss.factor(batches.examples.targets)
        if torch.allclose(weights, weights.new_ones(()), rtol=1e-12, atol=0):
            return None
        return weights.to(torch.promote_types(self.dtype, torch.float32))

    # Properties and the gradient

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters.

        Raises:
            RuntimeError: they have several.
        """
        return self._common("dtype")

    @property
    def device(self) -> torch.device:
        """Of the parameters.

        Raises:
            RuntimeError: they are on several.
        """
        return self._common("device")

    def gradient_and_loss(self) -> tuple[list[Tensor], Tensor]:
        """Gradient (a list of tensors shaped like the parameters) and value of the empirical risk. Cost: one cotangent sweep."""
        at = self._current()
        gradient, value = self._gradient_and_loss(at, self._groups)
        pieces = self._in_user_order(at, gradient.to(self.dtype))
        return [g.view(shape) for g, shape in zip(pieces, self._in_shape, strict=True)], value.to(self.dtype)

    def _gradient_and_loss(self, at: Linearised, groups: Sequence[Batches]) -> tuple[Tensor, Tensor]:
        found = []
        for native, batches in zip(at.natives, groups, strict=True):
            z, targets = native.tape.outputs, batches.examples.targets
            weights = batches.risk_weights(self._loss, self._num_data).to(z.dtype)
            gradients = self._loss.gradient(z, targets) * weights.view(-1, *[1] * (z.dim() - 1))
            found.append((native.tape.vjp(gradients[None])[0], (weights * self._loss.value(z, targets)).sum()))
        return torch.stack([g for g, _ in found]).sum(dim=0), torch.stack([value for _, value in found]).sum()

    def _common(self, what: str) -> Any:
        found = {getattr(t, what) for t in self._tensors}
        if len(found) != 1:
            raise RuntimeError(
                f"{type(self).__name__}: expected parameters of one {what}, got {sorted(map(str, found))}; convert or move them."
            )
        return found.pop()

    # Checks

    def _block_ranges(self, block_sizes: Sequence[int] | None, who: str) -> list[tuple[int, int]] | None:
        """First and last element of each block in the flat vector; None for a single block."""
        if block_sizes is None:
            return None
        if not self.SUPPORTS_BLOCKS:
            raise ArgumentError(f"{who}: expected no block_sizes, which only the Hessian has, got {list(block_sizes)}; leave them out.")
        if sum(block_sizes) != len(self._tensors) or any(size <= 0 for size in block_sizes):
            raise ArgumentError(
                f"{who}: expected positive block_sizes that add up to the {len(self._tensors)} parameters, got {list(block_sizes)}; "
                "correct them."
            )
        ends = list(accumulate(t.numel() for t in self._tensors))
        stops = [ends[last - 1] for last in accumulate(block_sizes)]
        return None if len(stops) == 1 else list(zip([0, *stops[:-1]], stops, strict=True))

    def _require_deterministic_model(self, at: Linearised, who: str) -> None:
        """The library computes in evaluation mode; a model in training mode has to be the same function."""
        if not any(m.training for m in at.module.modules()):
            return
        buffers = {b: b.clone() for b in at.module.buffers()}
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            try:
                agree = all(
                    self._same_outputs(at.module, native, batches) for native, batches in zip(at.natives, self._groups, strict=True)
                )
            finally:
                for buffer, value in buffers.items():
                    buffer.copy_(value)
        if not agree:
            raise UnsupportedModelError(
                f"{who}: expected a model that computes the same in training and in evaluation mode, got different predictions "
                "(dropout or batch norm); call model.eval() first."
            )

    def _same_outputs(self, module: torch.nn.Module, native: Native, batches: Batches) -> bool:
        """Whether the module, as it is, gives the outputs on the tape."""
        outputs, start = native.tape.outputs, 0
        limit = torch.finfo(self.dtype).eps ** 0.5 * float(outputs.abs().max())
        for size in batches.rows:
            _, X = next(batches.examples.subset(range(start, start + size)).blocks(size))
            z = module(*X) if isinstance(X, tuple) else module(X)
            if not torch.allclose(z.to(outputs.dtype), outputs[start : start + size], rtol=0, atol=limit):
                return False
            start += size
        return True

    def _require_deterministic_data(self, at: Linearised, again: Sequence[Batches], who: str) -> None:
        """Raise unless a second pass over the data gives the same risk and gradient; identical batches need no computation."""
        if len(again) == len(self._groups) and all(a.same_as(b) for a, b in zip(self._groups, again, strict=True)):
            return
        gradient, loss = self._gradient_and_loss(at, self._groups)
        gradient_again, loss_again = self._gradient_and_loss(self._linearise(again), again)
        for what, a, b in (("loss", loss, loss_again), ("gradient", gradient, gradient_again)):
            if not torch.allclose(a, b, rtol=RTOL, atol=ATOL):
                raise RuntimeError(
                    f"{who}: expected the same total {what} in every pass over the data, got a difference of "
                    f"{float((a - b).abs().max()):.3g}; give data without augmentation and drop_last, or "
                    "pass check_deterministic=False to use what one pass gives."
                )


class GGNLinearOperator(CurvatureLinearOperator):
    r"""The generalised Gauss-Newton matrix ``Σ_n f_n J_nᵀ H_n J_n``; f_n is the weight of example n in the empirical risk.

    Arguments, errors and cost: :class:`CurvatureLinearOperator`.
    """

    def _make(self, module: torch.nn.Module, batches: Batches, names: tuple[str, ...]) -> Native:
        return GGN(module, self._loss, batches.examples, params=names, weights=self._weights(batches))


class HessianLinearOperator(CurvatureLinearOperator):
    """The Hessian of the empirical risk, or with ``block_sizes`` its diagonal blocks (one product each).

    Arguments, errors and cost: :class:`CurvatureLinearOperator`; products as ``influence_ext.Hessian``.
    """

    SUPPORTS_BLOCKS: bool = True

    def _make(self, module: torch.nn.Module, batches: Batches, names: tuple[str, ...]) -> Native:
        return Hessian(module, self._loss, batches.examples, params=names, weights=self._weights(batches))


class EFLinearOperator(CurvatureLinearOperator):
    """The uncentred covariance of gradients, or empirical Fisher matrix, ``c Σ_n Σ_t ∇ℓ_nt ∇ℓ_ntᵀ``.

    As in curvlinops, each position t of an example's output counts as an example of its own, ``ℓ_nt`` is the sum over the elements of an
    output, and c is one over their number (over the number of positions for a cross-entropy) for a mean, 1 for a sum.

    Arguments, errors and cost: :class:`CurvatureLinearOperator`.
    """

    SUPPORTED_LOSSES = (MSELoss, CrossEntropyLoss, BCEWithLogitsLoss)

    def _make(self, module: torch.nn.Module, batches: Batches, names: tuple[str, ...]) -> Native:
        fisher = EmpiricalFisher(module, self._loss, batches.examples, params=names)
        z = fisher.tape.outputs
        scale = batches.gradient_weights(self._loss, self._num_data, self._loss_func, z.shape[1:]).to(z.dtype)
        cotangents = self._loss.gradient(z, batches.examples.targets) * scale.view(-1, *[1] * (z.dim() - 1))
        return TermFisher(fisher.tape, cotangents, 2 if isinstance(self._loss_func, CrossEntropyLoss) else -1, fisher.space)

    def _check_loss(self, who: str) -> None:
        if not isinstance(self._loss_func, self.SUPPORTED_LOSSES):
            known = ", ".join(loss.__name__ for loss in self.SUPPORTED_LOSSES)
            raise UnsupportedLossError(f"{who}: expected one of {known}, got {type(self._loss_func).__name__}; use one of these.")
