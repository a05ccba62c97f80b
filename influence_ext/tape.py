"""Tape: a network linearised at one point, and its products."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from influence_ext.capture import named_tensors
from influence_ext.checks import is_one_of
from influence_ext.chunks import ChunkedTape
from influence_ext.derived import DerivedFactors, DerivedPoint
from influence_ext.errors import ArgumentError, DataError, ShapeError
from influence_ext.finite import all_finite
from influence_ext.graphs import Replayable
from influence_ext.losses import OutputHessian
from influence_ext.params import PRECISIONS, Precision, check_precision

if TYPE_CHECKING:
    from influence_ext.plan import Plan

Schedule = Literal["auto", "by_example", "by_operator"]
SCHEDULES: dict[str, int] = {"auto": 0, "by_example": 1, "by_operator": 2}


class _Point:
    """Where the core's tape stands; copies of a tape share it, as they share that.

    Attributes:
        stands: the state of θ is complete; not while it moves, nor after a move that did not end.
        theta: ``[P]``.
        derived: parameters that are expressions of θ, if there are any.
        outputs: ``[N, *out]``, once somebody has asked.
        has_cotangents: those of one call of ``keep_cotangents`` are complete.
        gradient: what they are of, in θ̃, if parameters are derived.
    """

    def __init__(self) -> None:
        self.stands = False

    def leave(self, theta: Tensor, derived: DerivedPoint | None) -> None:
        """For θ, where the core's tape has yet to come."""
        self.stands = self.has_cotangents = False
        self.theta, self.derived = theta, derived
        self.outputs: Tensor | None = None
        self.gradient: Tensor | None = None


class Tape(Replayable):
    """A network linearised at θ on N examples. Made by :meth:`Plan.linearize`.

    Attributes:
        plan: where it came from.
        num_examples: N.
        state_bytes: of ``cached_bytes``, what it holds from the start: without the Jacobians of shortcuts.
        precision: how its products multiply float32 matrices.
        curved_nodes: nodes with a second-order term; None if the tape was not made for second-order products.
    """

    def __init__(self, plan: Plan, native: Any, theta: Tensor, tensors: Mapping[str, Tensor], curved_nodes: tuple[str, ...] | None):
        self.plan = plan
        self.curved_nodes = curved_nodes
        self.precision: Precision = "full"
        self._constants = plan._constants(tensors)
        self._native = native
        self._point = _Point()
        self.num_examples: int = native.num_examples
        self._move_to(theta)
        self.state_bytes = int(native.cached_bytes)

    def at_precision(self, precision: Precision) -> Tape:
        """The same point, state shared, whose products multiply float32 matrices otherwise; where one moves, so does the other.

        "bfloat16" rounds both factors to 8 bits, an error of up to 2⁻⁹ each, "tf32", on a CUDA device, to 11; sums are float32. The point
        itself (outputs, derivatives, kept cotangents) is always computed in full.

        Raises:
            ArgumentError: another word, or a precision that the device or the data type has not.
        """
        check_precision(precision, self.plan.space, self.plan._who)
        if precision == self.precision:
            return self
        other = copy.copy(self)
        other.precision, other._native = precision, self._native.at_precision(PRECISIONS[precision])
        return other

    def relinearize(self, theta: Tensor, X: Any = None) -> None:
        """Move to another θ ``[P]``, and to other examples; memory is reused, factors and cotangents made before become invalid.

        Args:
            theta: ``[P]``.
            X: inputs of as many examples, in the structure that the plan was captured with; None: the same as before.

        Raises:
            ShapeError, DTypeError, DeviceError: theta is not ``[P]`` of the plan's dtype; X does not fit.
            ArgumentError: X for a tape that a memory budget has recompute its forward state.

        After one that does not end (Ctrl-C, no memory) the tape stands nowhere, and products raise ArgumentError until another does.
        """
        theta, sources = self.plan._copied(theta), None
        if X is not None:
            if self.chunk is not None:
                raise ArgumentError("Tape: expected no other inputs for a tape that is recomputed in chunks, got some; linearize anew.")
            sources, N = self.plan._inputs(X), self.num_examples
            if sources[0].shape[0] != N:
                raise ShapeError(f"Tape: expected inputs of {N} examples, got {sources[0].shape[0]}; linearize another number anew.")
        self._move_to(theta, sources)

    def _move_to(self, theta: Tensor, sources: list[Tensor] | None = None) -> None:
        plan = self.plan
        values, derived = self._constants, None
        if plan._derived is not None:
            derived = plan._derived.at(plan.space.unflatten(theta), named_tensors(plan._model))
            values = [derived.values.get(slot, value) for slot, value in enumerate(values)]
        self._point.leave(theta, derived)
        if sources is not None:
            self._native.rebind(sources)
        self._native.linearize(values, theta)
        self._point.stands = True

    @property
    def theta(self) -> Tensor:
        """``[P]``, the parameters it stands at."""
        return self._point.theta

    @property
    def _at_point(self) -> Any:
        """The core's tape, for what reads its point."""
        if not self._point.stands:
            raise ArgumentError("Tape: expected a tape that stands at a point, got one whose relinearize did not end; relinearize it.")
        return self._native

    @property
    def outputs(self) -> Tensor:
        """``[N, *out]``, the network's outputs (a copy, made once).

        Where the network ends by moving its innermost axis to the front, they lie in memory as before that, and so does what a loss keeps
        of them: products then leave the transposition out, in either direction.
        """
        native, point = self._at_point, self._point
        if point.outputs is None:
            outputs = native.outputs().view(self.num_examples, *self.plan.output_shape)
            if self.plan.output_is_transposed:
                outputs = outputs.movedim(1, -1).contiguous().movedim(-1, 1)
            point.outputs = outputs
        return point.outputs

    @property
    def cached_bytes(self) -> int:
        """Memory the tape holds for products."""
        return int(self._native.cached_bytes)

    @property
    def chunk(self) -> int | None:
        """Examples at a time, if a memory budget has it recompute the forward state; None if that is resident."""
        return self._native.chunk if isinstance(self._native, ChunkedTape) else None

    def workspace_bytes(self, num_vectors: int) -> int:
        """Memory one product onto V vectors takes beyond operand and result."""
        return int(self._native.workspace_bytes(num_vectors))

    def set_schedule(self, schedule: Schedule) -> None:
        """Force how products run over examples: ``"by_example"``, ``"by_operator"`` or ``"auto"`` (by size).

        Raises:
            ArgumentError: another word.
        """
        if not is_one_of(schedule, SCHEDULES):
            raise ArgumentError(f"Tape: expected a schedule among {', '.join(SCHEDULES)}, got {schedule!r}; choose one.")
        self._native.set_schedule(SCHEDULES[schedule])

    def without_shortcuts(self) -> Tape:
        """The same tape, for a product or two: what shortcuts need is made once a point, and pays after several vectors."""
        if self.chunk is None:  # those that are recomputed take none
            self._native.set_shortcuts(False)
        return self

    def schedule(self, num_vectors: int) -> str:
        """How a product onto V vectors runs, in words."""
        by_example, tile, threads = self._native.tiling(num_vectors)
        name = "by example" if by_example else "by operator"
        if self.chunk is not None:
            name = f"recomputed in chunks of {self.chunk} examples, {name}"
        elif self._native.takes_shortcuts(num_vectors):
            name = f"with shortcuts, {name}"
        return f"{name}, tiles of {tile} examples, {threads} thread{'s' if threads > 1 else ''}"

    def jvp(self, V: Tensor) -> Tensor:
        """``J_n v``: ``[V, P] -> [V, N, *out]``. Cost: one tangent sweep for all V."""
        out: Tensor = self._at_point.jvp(self._push(V))
        return out.view(V.shape[0], self.num_examples, *self.plan.output_shape)

    def vjp(self, G: Tensor) -> Tensor:
        """``Σ_n J_nᵀ g[v, n]``: ``[V, N, *out] -> [V, P]``. Cost: one cotangent sweep for all V."""
        return self._pull(self._at_point.vjp(G.contiguous()))

    def ggn(self, V: Tensor, hessian: OutputHessian) -> Tensor:
        """``Σ_n J_nᵀ (w_n H_n) J_n v``: ``[V, P] -> [V, P]``. Cost: one tangent and one cotangent sweep for all V.

        A Hessian that is not native takes ``V·N·C`` more memory, twice.
        """
        if not hessian.native:
            return self.vjp(hessian.matmat(self.jvp(V)))
        return self._pull(self._at_point.ggn(self._push(V), *self.as_native(hessian)))

    def keep_cotangents(self, G: Tensor) -> None:
        """Fix the cotangents ``g [N, *out]`` of the outputs for :meth:`hvp`, until ``relinearize``.

        Raises:
            ArgumentError: the tape was not made with ``second_order=True``.

        Cost: one cotangent sweep; two if parameters are computed from others.
        """
        if self.curved_nodes is None:
            raise ArgumentError("Tape: expected a tape for second-order products, got another; linearize with second_order=True.")
        native, point = self._at_point, self._point
        point.has_cotangents = False
        native.keep_cotangents(G.contiguous())
        point.gradient = None if point.derived is None else native.vjp(G[None].contiguous())[0]
        point.has_cotangents = True

    def hvp(self, V: Tensor, hessian: OutputHessian | None) -> Tensor:
        """``∇²_θ(Σ_n g_nᵀ f_n) v + Σ_n J_nᵀ (w_n H_n) J_n v``: ``[V, P] -> [V, P]`` at the cotangents that are kept; None: without the H_n.

        Raises:
            ArgumentError: :meth:`keep_cotangents` was not called since the last ``relinearize``.

        Cost: one tangent and one cotangent sweep for all V, in which every curved node costs about one vjp more. A Hessian that is not
        native takes a tangent and a cotangent sweep more.
        """
        native, point = self._at_point, self._point
        if not point.has_cotangents:
            raise ArgumentError("Tape.hvp: expected the outputs' cotangents, got none at this point; call keep_cotangents first.")
        pushed = self._push(V)
        fused = hessian is not None and hessian.native
        product = native.hvp(pushed, *self.as_native(hessian if fused else None))
        if hessian is not None and not fused:
            tangents = native.jvp(pushed).view(V.shape[0], self.num_examples, *self.plan.output_shape)
            product += native.vjp(hessian.matmat(tangents).contiguous())
        if point.derived is None or point.gradient is None or V.shape[0] == 0:
            return self._pull(product)
        return self._pull(product).add_(point.derived.second_order(point.gradient, V))

    def factors(self, G: Tensor) -> Any:
        """Per-example gradients ``J_nᵀ g[v, n]`` for ``G [V, N, *out]``, as factors.

        Methods: ``materialise``, ``dots``, ``square_norms``, ``square_norms_by_region``, ``square_sum``, ``gram``, ``outer_products``.
        They read the tape when they are called. Cost: one cotangent sweep each; factors are held for a tile of examples, by ``gram`` and
        ``outer_products`` for all: V·N times the widths of the trainable nodes.
        """
        factors = self._at_point.factors(G.contiguous())
        derived = self._point.derived
        return factors if derived is None else DerivedFactors(factors, derived)

    def _push(self, V: Tensor) -> Tensor:
        derived = self._point.derived
        return V if derived is None else derived.push(V)

    def _pull(self, G: Tensor) -> Tensor:
        derived = self._point.derived
        return G if derived is None else derived.pull(G)

    def check_outputs(self, who: str) -> None:
        """Raise if an output is not finite.

        Raises:
            DataError: names the first such example.
        """
        in_memory = self.outputs.movedim(1, -1) if self.plan.output_is_transposed else self.outputs
        if not all_finite(in_memory):
            finite = torch.isfinite(self.outputs).reshape(self.num_examples, -1).all(dim=1)
            first = int((~finite).nonzero()[0, 0])
            raise DataError(
                f"{who}: expected finite outputs of {self.plan.graph.model_name}, got NaN or infinity for example {first} "
                f"({int((~finite).sum())} of {self.num_examples}); check the inputs' scale and the parameters."
            )
