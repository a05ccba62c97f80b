"""Per-example gradients and what is computed from them without holding them. All of the unreduced loss ``ℓ_n`` of each example."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from influence_ext.chunks import ChunkedFactors
from influence_ext.context import standalone
from influence_ext.data import Examples, load
from influence_ext.derived import DerivedFactors
from influence_ext.errors import ArgumentError, DeviceError, DTypeError, ShapeError
from influence_ext.losses import Loss, LossLike, resolve
from influence_ext.params import ParameterSpace, Selection
from influence_ext.plan import Plan
from influence_ext.tape import Tape


@dataclass(frozen=True, eq=False)
class ExampleGradients:
    """``∇ℓ_n`` at one θ for N examples, held as factors; the quantities below are computed from them on demand.

    Attributes:
        tape: the network linearised on the examples.
        output_gradients: ``[N, *out]``, ``∇_z ℓ_n``.
    """

    tape: Tape
    output_gradients: Tensor

    @classmethod
    def of(cls, model: nn.Module, loss: LossLike | Loss, data: Any, params: Selection | None, who: str) -> ExampleGradients:
        """Run the model on the data and take the loss gradient at its outputs."""
        resolved = resolve(loss, None, who)
        examples = load(data, who)
        return cls.at(Plan.of(model, examples.X, params, who), resolved, examples, who)

    @classmethod
    def at(cls, plan: Plan, loss: Loss, examples: Examples, who: str, theta: Tensor | None = None) -> ExampleGradients:
        """The same for a captured model, at ``theta`` (default: the model's own parameters)."""
        return cls.on(plan.linearize(examples.X, theta), loss, examples.targets, who)

    @classmethod
    def on(cls, tape: Tape, loss: Loss, targets: Tensor, who: str) -> ExampleGradients:
        """The same for a tape that is already there."""
        tape.check_outputs(who)
        return cls(tape, loss.checked_gradient(tape.outputs, targets, who))

    def materialise(self, out: Tensor | None = None) -> Tensor:
        """``[N, P]``, one gradient a row; written into ``out`` if given (contiguous ``[N, P]`` of the same dtype)."""
        factors = self.tape.factors(self.output_gradients[None])
        rows: Tensor = factors.materialise(out)
        return rows.view(self.tape.num_examples, self.tape.plan.space.num_parameters)

    def sum(self) -> Tensor:
        """``Σ_n ∇ℓ_n``: ``[P]``."""
        return self.tape.vjp(self.output_gradients[None])[0]

    def dots(self, V: Tensor) -> Tensor:
        """``⟨∇ℓ_n, v⟩``: ``[V, P] -> [N, V]``, by tangents of each node, or gradients formed in parts where positions share a weight."""
        products: Tensor = self.tape.factors(self.output_gradients[None]).dots(V)
        return products[0].T.contiguous()

    def norms(self) -> Tensor:
        """``‖∇ℓ_n‖₂``: ``[N]``."""
        squares: Tensor = self.tape.factors(self.output_gradients[None]).square_norms()
        return squares[0].sqrt()

    def gram(self, other: ExampleGradients | None = None) -> Tensor:
        """``⟨∇ℓ_n, ∇ℓ'_m⟩``: ``[N, M]``; of the examples with themselves by default."""
        mine = self.tape.factors(self.output_gradients[None])
        theirs = mine if other is None else other.tape.factors(other.output_gradients[None])
        if _generality(theirs) > _generality(mine):
            transposed: Tensor = theirs.gram(mine)
            return transposed.T.contiguous()
        gram: Tensor = mine.gram(theirs)
        return gram


def _generality(factors: Any) -> int:
    """Factors multiply with those of no greater generality: the extension's know their like alone, chunks those too, the chain rule all."""
    return 2 if isinstance(factors, DerivedFactors) else 1 if isinstance(factors, ChunkedFactors) else 0


@standalone
def per_example_grads(
    model: nn.Module, loss: LossLike | Loss, data: Any, *, params: Selection | None = None, out: Tensor | None = None
) -> dict[str, Tensor]:
    """``∇ℓ_n`` of every example, materialised.

    Args:
        model: used in evaluation mode, never modified.
        loss: see :func:`influence_ext.losses.resolve`; its reduction over examples plays no part.
        data: one ``(X, y)`` or a re-iterable of such batches.
        params: selects a sub-space.
        out: buffer ``[N, P]`` to write into, contiguous, of the parameters' dtype and on their device; what it held is overwritten, so one
            buffer serves many calls. A new one by default, in memory that freed results have left
            (:func:`influence_ext.set_cache_limit`).

    Returns:
        Name -> ``[N, *shape]``, views of one ``[N, P]`` buffer (``out``, if given).

    Raises:
        ShapeError, DTypeError, DataError, UnsupportedModelError, UnsupportedLossError: see :class:`influence_ext.GGN`; or ``out`` does
            not fit.

    Cost: one forward pass, one cotangent sweep, N·P elements written once. Their memory stays with the process when they are freed, up to
    the limit of :func:`influence_ext.set_cache_limit`, and serves the next call.
    """
    gradients = ExampleGradients.of(model, loss, data, params, "per_example_grads")
    space = gradients.tape.plan.space
    if out is not None:
        _check_buffer(out, (gradients.tape.num_examples, space.num_parameters), space, "per_example_grads")
    return space.unflatten(gradients.materialise(out))


def _check_buffer(out: Any, shape: tuple[int, int], space: ParameterSpace, who: str) -> None:
    if not isinstance(out, Tensor):
        raise DTypeError(f"{who}: expected out to be a tensor, got {type(out).__name__}; allocate it with torch.empty{shape}.")
    if out.shape != shape or not out.is_contiguous():
        kind = "contiguous" if out.is_contiguous() else "non-contiguous"
        raise ShapeError(
            f"{who}: expected out contiguous of shape {list(shape)}, got {kind} {list(out.shape)}; allocate it with torch.empty."
        )
    if out.dtype != space.dtype:
        raise DTypeError(f"{who}: expected out of dtype {space.dtype}, got {out.dtype}; allocate it with that dtype.")
    if out.device != space.device:
        raise DeviceError(f"{who}: expected out on {space.device}, got {out.device}; allocate it there.")
    if out.requires_grad:
        raise ArgumentError(f"{who}: expected out without requires_grad, since it is written to, got one with; pass out.detach().")


@standalone
def per_example_dots(model: nn.Module, loss: LossLike | Loss, data: Any, V: Tensor, *, params: Selection | None = None) -> Tensor:
    """``⟨∇ℓ_n, v⟩`` for many vectors; ``[N, P]`` is never held.

    Args:
        model: used in evaluation mode, never modified.
        loss: see :func:`influence_ext.losses.resolve`.
        data: one ``(X, y)`` or a re-iterable of such batches.
        V: ``[V, P]``, one vector a row, or ``[P]``.
        params: selects a sub-space.

    Returns:
        ``[N, V]``, or ``[N]`` for a single vector.

    Raises:
        ShapeError, DTypeError, DeviceError: ``V`` does not fit; otherwise as :func:`per_example_grads`.

    Cost: one forward pass, one cotangent sweep, and for each vector one product with the inputs of every trained layer: half of a
    tangent sweep. Where positions share a weight (convolutions, sequences) and it costs less, its gradients are formed instead, by parts
    that stay in the cache.
    """
    who = "per_example_dots"
    gradients = ExampleGradients.of(model, loss, data, params, who)
    space = gradients.tape.plan.space
    if not isinstance(V, Tensor) or V.layout != torch.strided:
        found = V.layout if isinstance(V, Tensor) else type(V).__name__
        raise DTypeError(f"{who}: expected V as a dense tensor, got {found}; convert it with torch.as_tensor.")
    if V.dim() not in (1, 2) or V.shape[-1] != space.num_parameters:
        raise ShapeError(
            f"{who}: expected V of shape [V, P] with P = {space.num_parameters}, got {list(V.shape)}; parameters: {space.describe()}."
        )
    if V.dtype != space.dtype:
        raise DTypeError(f"{who}: expected V of dtype {space.dtype}, got {V.dtype}; convert it with V.to({space.dtype}).")
    if V.device != space.device:
        raise DeviceError(f"{who}: expected V on {space.device}, got {V.device}; move it with V.to('{space.device}').")
    dots = gradients.dots(V.detach().reshape(-1, space.num_parameters).contiguous())
    return dots[:, 0] if V.dim() == 1 else dots


@standalone
def per_example_norms(model: nn.Module, loss: LossLike | Loss, data: Any, *, params: Selection | None = None) -> Tensor:
    """``‖∇ℓ_n‖₂`` of every example, ``[N]``, from layer factors. Arguments and errors as :func:`per_example_grads`.

    Cost: one forward pass and one cotangent sweep.
    """
    return ExampleGradients.of(model, loss, data, params, "per_example_norms").norms()


@standalone
def grad_gram(model: nn.Module, loss: LossLike | Loss, data: Any, other: Any = None, *, params: Selection | None = None) -> Tensor:
    """Inner products of per-example gradients, ``[N, M]``: of ``data`` with ``other``, or with itself.

    Arguments and errors as :func:`per_example_grads`. Cost: a forward pass and a cotangent sweep for each data set, and one product
    ``[N, width]·[width, M]`` for each side of each layer; where T positions share its weight, ``[N T, width]·[width, M T]``, or one of the
    layer's gradients, whichever takes fewer multiplications.
    """
    who = "grad_gram"
    first = ExampleGradients.of(model, loss, data, params, who)
    return first.gram(None if other is None else ExampleGradients.of(model, loss, other, params, who))
