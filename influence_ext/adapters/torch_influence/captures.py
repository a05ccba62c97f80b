"""What was captured and linearised of an objective, for as long as it depends on nothing that has changed."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from influence_ext.adapters.torch_influence.batches import Block, NotNative
from influence_ext.adapters.torch_influence.network import Network, affine_network, as_not_native, native_form, outputs_network
from influence_ext.capture.signature import structure_key
from influence_ext.losses import OutputHessian
from influence_ext.tape import Tape

if TYPE_CHECKING:
    from influence_ext.adapters.torch_influence.base import BaseInfluenceModule

Build = Callable[["BaseInfluenceModule", Block], Network]


class Linearised:
    """A network of the training set at the model's parameters; everything is computed when it is first asked for."""

    def __init__(self, network: Network):
        self.network = network
        self._tape: Tape | None = None

    def tape(self, second_order: bool = False) -> Tape:
        """On all examples. One for second-order products serves all others too, so it takes the place of one that is not."""
        if self._tape is None or (second_order and self._tape.curved_nodes is None):
            with as_not_native():
                self._tape = self.network.linearize(second_order=second_order)
        return self._tape

    @cached_property
    def with_cotangents(self) -> Tape:
        """On all examples, for products with the Hessian of the mean loss."""
        tape = self.tape(second_order=True)
        with as_not_native():
            tape.keep_cotangents(self.slopes / self.network.num_examples)
        return tape

    @cached_property
    def has_second_order(self) -> bool:
        """True; raises NotNative where a node that runs in torch has no second derivative there, which a product of one example shows."""
        one = self.network.indices()[:1]
        with as_not_native():
            tape = self.network.linearize(one, second_order=True)
            tape.keep_cotangents(self.slopes[:1])
            tape.hvp(tape.theta[None], None)
        return True

    @cached_property
    def is_mean(self) -> bool:
        """True; raises NotNative where the loss of a batch is not the mean over its examples."""
        self.network.check_mean(self.tape().outputs)
        return True

    @cached_property
    def hessian(self) -> OutputHessian:
        """Of ``ℓ_n`` by the outputs, not divided by N.

        Raises:
            NotNative: the loss is no mean over examples, or has no curvature.
        """
        assert self.is_mean
        z = self.tape().outputs
        with as_not_native():
            return native_form(self.network.loss.hessian(z, self.network.indices()), z)

    @cached_property
    def slopes(self) -> Tensor:
        """``∇_z ℓ_n`` of each example as a batch of one: ``[N, *out]``."""
        with as_not_native():
            return self.network.loss.gradient(self.tape().outputs, self.network.indices())

    def gradient_dots(self, index: Tensor, vectors: Tensor) -> Tensor:
        """``⟨∇ℓ_i, v⟩``: ``[V, P] -> [len(index), V]``."""
        if 4 * len(index) < self.network.num_examples:  # not worth a pass over the whole set
            with as_not_native():
                tape = self.network.linearize(index)
                slopes = self.network.loss.gradient(tape.outputs, index)
            tangents = tape.jvp(vectors)
        else:
            tangents, slopes = self.tape().jvp(vectors)[:, index], self.slopes[index]
        shape = (len(vectors), len(index), -1)
        return torch.einsum("vnc,nc->nv", tangents.reshape(shape), slopes.reshape(shape[1:]))


class Captures:
    """The networks of a module's objective.

    They are made anew when the objective, the model's structure or the value of any parameter or buffer is another than before.

    Cost: a comparison of all parameters and buffers at each access.
    """

    def __init__(self, module: BaseInfluenceModule):
        self._module = module
        self._key: Hashable = None
        self._state: list[Tensor] = []
        self._found: dict[Build, Linearised | NotNative] = {}

    def affine(self) -> Linearised:
        """See :func:`affine_network`."""
        return self._get(affine_network)

    def outputs(self) -> Linearised:
        """See :func:`outputs_network`."""
        return self._get(outputs_network)

    def _get(self, build: Build) -> Linearised:
        if any(m.training for m in self._module.model.modules()):
            raise NotNative("a part of the model is in training mode")
        self._forget_if_changed()
        if build not in self._found:
            try:
                self._found[build] = Linearised(build(self._module, self._module._training_block()))
            except NotNative as reason:
                self._found[build] = reason
        found = self._found[build]
        if isinstance(found, NotNative):
            raise found
        return found

    def _forget_if_changed(self) -> None:
        model = self._module.model
        key = structure_key(_Whole(model, self._module.objective), {}, by_name=False)
        state = [tensor.detach() for tensor in (*model.parameters(), *model.buffers())]
        same = key == self._key and all(torch.equal(a, b) for a, b in zip(state, self._state, strict=True))
        if not same:
            self._key, self._state, self._found = key, [tensor.clone() for tensor in state], {}


class _Whole(nn.Module):
    """Model and objective together, for a description of both."""

    def __init__(self, model: nn.Module, objective: object):
        super().__init__()
        self.model = model
        self.methods = (objective,)
