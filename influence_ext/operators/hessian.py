"""The Hessian of a training cost."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from influence_ext.graphs import RecordableProduct
from influence_ext.losses import OutputHessian
from influence_ext.operators.linearised import LinearisedOperator

_MOST_CURVED = 20  # nodes that a report names; the steps of an unrolled layer are thousands


class Hessian(LinearisedOperator):
    r"""The damped Hessian of the training cost at the model's present parameters.

    .. math:: \nabla^2 J + \lambda I, \qquad \nabla^2 J = G + c \sum_n \sum_k (\nabla_z \ell_n)_k \nabla^2_\theta z_{n,k}

    Forward over reverse mode, for all right-hand sides at once: the tangent sweep of a Gauss-Newton product, then the tangent of the
    cotangent sweep, which starts at ``H_n t_z`` and to which every node that is curved adds its own second derivative, contracted with the
    tangent and with the cotangent of ``c ∇ℓ_n`` that was computed once. Exact, symmetric, indefinite: solvers that need a positive matrix
    refuse it or report what they met.

    Arguments and errors: :class:`influence_ext.operators.linearised.LinearisedOperator`; products raise
    :class:`UnsupportedModelError` for a node that runs in torch and has no second derivative there.

    Cost: a forward pass and a cotangent sweep; keeps, beyond a GGN's state, the cotangents of curved nodes (``report()`` lists them) and
    the second derivatives of curved activations: two or three times its ``cached_bytes``. A product with V vectors costs about one and a
    half GGN products: linear and convolutional layers above the first take six multiplications instead of four, curved activations a pass
    more, piecewise linear nodes nothing. Nodes that run in torch for want of a rule take its forward over reverse mode.

    Reference: Pearlmutter 1994, "Fast exact multiplication by the Hessian".
    """

    _second_order: ClassVar[bool] = True

    def _prepare(self) -> None:
        z, targets = self._tape.outputs, self.examples.targets
        self._hessian: OutputHessian | None = (
            None if self.loss.is_linear else self.loss.hessian(z, targets, self.weights).scaled(self._factor)
        )
        self._tape.keep_cotangents(self._weighted(self.loss.gradient(z, targets)))

    def _undamped(self, V: Tensor) -> Tensor:
        return self._tape.hvp(V, self._hessian)

    def recordable(self) -> RecordableProduct | None:
        """``∇²J v + damping·v`` as launches of the core alone."""
        return self._tape.recordable("hvp", self._hessian, self.damping) if self._multiplies_as(Hessian) else None

    def report(self) -> str:
        """What runs how: the nodes and their rules, schedule, and memory; and which nodes are curved."""
        curved = self._tape.curved_nodes or ()
        more = f" and {len(curved) - _MOST_CURVED} more" if len(curved) > _MOST_CURVED else ""
        return f"{super().report()}\nsecond-order terms: {', '.join(curved[:_MOST_CURVED]) or 'none'}{more}"
