"""Products with the curvature of an objective's training risk: natively, or in torch batch by batch."""

from __future__ import annotations

import dataclasses
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler

from influence_ext.adapters.torch_influence.batches import Block, NotNative
from influence_ext.adapters.torch_influence.captures import Linearised
from influence_ext.adapters.torch_influence.regulariser import Product, hessian_rows
from influence_ext.operators.base import LinearOperator

if TYPE_CHECKING:
    from influence_ext.adapters.torch_influence.base import BaseInfluenceModule

_log = logging.getLogger("influence_ext")

GRAPH_BYTES = 2**30
"""What autograd graphs that are kept for products may hold; beyond it, each product builds them again."""
SPARE_WORK = 1_000_000
"""Multiplications in a product of the whole data set that are cheaper than linearising a batch anew."""


class Curvature(ABC):
    """The Hessian of the training risk, or with ``gnh`` its Gauss-Newton part and the regulariser's Hessian, at the present parameters."""

    @abstractmethod
    def full(self) -> Product:
        """``[V, P] -> [V, P]``, on the whole training set."""

    @abstractmethod
    def sampled(self, num_batches: int) -> Iterator[Product]:
        """The same on batches drawn with replacement, as many of the loader's size."""


class DampedRisk(LinearOperator):
    """A curvature's product with ``damp`` on the diagonal, for solvers."""

    def __init__(self, module: BaseInfluenceModule, product: Product, damp: float):
        theta = module._theta()
        self.num_parameters, self.dtype, self.device = theta.numel(), theta.dtype, theta.device
        self._product, self._damp = product, damp

    def _matmat(self, V: Tensor) -> Tensor:
        return self._product(V) + self._damp * V


def curvature_of(module: BaseInfluenceModule, gnh: bool) -> Curvature:
    """The fastest exact way there is; what stands against a faster one is logged."""
    try:
        if not gnh and not module._has_default_train_loss():
            raise NotNative("train_loss is overridden")
        return _separable(module, gnh)
    except NotNative as reason:
        _log.info("torch_influence: products run in torch, batch by batch (%s)", reason)
        return GraphCurvature(module, gnh, None)


def _separable(module: BaseInfluenceModule, gnh: bool) -> Curvature:
    captures = module._captures
    if gnh:
        return NativeCurvature(module, captures.outputs())
    try:
        return NativeCurvature(module, captures.affine())
    except NotNative as reason:
        _log.info("torch_influence: second derivatives run in torch (%s)", reason)
    assert captures.outputs().is_mean
    return GraphCurvature(module, gnh, module._training_block())


class NativeCurvature(Curvature):
    """The Gauss-Newton matrix of a captured network, and the regulariser's Hessian."""

    def __init__(self, module: BaseInfluenceModule, linearised: Linearised):
        self._loader, self._network = module.train_loader, linearised.network
        self._tape, self._hessian = linearised.tape, linearised.hessian
        self._regulariser = module._regulariser()

    def full(self) -> Product:
        """See :meth:`Curvature.full`."""
        tape, regulariser, hessian = self._tape, self._regulariser, self._hessian.scaled(1 / self._network.num_examples)
        return lambda V: tape.ggn(V, hessian) + regulariser.product(V)

    def sampled(self, num_batches: int) -> Iterator[Product]:
        """See :meth:`Curvature.sampled`."""
        for index in sampled_indices(self._loader, num_batches):
            yield self._on(index.to(self._tape.theta.device))

    def _on(self, index: Tensor) -> Product:
        """On the examples at ``index``."""
        network, regulariser, hessian, tape = self._network, self._regulariser, self._hessian, self._tape
        N, B, theta = network.num_examples, len(index), tape.theta
        if hessian.state is not None and (N - 4 * B) * theta.numel() <= SPARE_WORK:
            # the whole set, each example weighed by how often it was drawn
            weights = theta.new_zeros(N).index_add_(0, index, theta.new_ones(B))
            hessian = dataclasses.replace(hessian, weights=weights, scale=hessian.scale / B)
            return lambda V: tape.ggn(V, hessian) + regulariser.product(V)
        if hessian.state is not None:
            hessian = dataclasses.replace(hessian, state=hessian.state.index_select(0, index), scale=hessian.scale / B)
            if network.is_matrix:
                # two products with a batch's rows cost less than a tape of them
                x = network.X.index_select(0, index)
                return lambda V: network.matrix_product(x, hessian, V) + regulariser.product(V)
            tape = network.linearize(index, theta)
        else:
            tape = network.linearize(index, theta)
            hessian = network.loss.hessian(tape.outputs, index).scaled(1 / B)
        return lambda V: tape.ggn(V, hessian) + regulariser.product(V)


class GraphCurvature(Curvature):
    """Products by torch, which differentiates graphs of first derivatives; these are kept where memory allows.

    Args:
        module: whose objective, model and loaders count.
        gnh: Gauss-Newton instead of Hessian.
        block: the training set, if the loss of a batch is the mean over its examples; None: batches as the loader yields them.
    """

    def __init__(self, module: BaseInfluenceModule, gnh: bool, block: Block | None):
        self._module, self._gnh, self._block = module, gnh, block
        self._regulariser = None if block is None and not gnh else module._regulariser()

    def full(self) -> Product:
        """See :meth:`Curvature.full`."""
        kept: list[tuple[Product, float]] = []
        held = 0
        for batch, share in self._batches():
            product, nbytes = self._measured(batch)
            held += nbytes
            if held > GRAPH_BYTES:
                return self._recomputed
            kept.append((product, share))
        return lambda V: sum((share * product(V) for product, share in kept), torch.zeros_like(V))

    def sampled(self, num_batches: int) -> Iterator[Product]:
        """See :meth:`Curvature.sampled`."""
        module = self._module
        if self._block is None:
            for batch, _ in module._loader_wrapper(train=True, sample_n_batches=num_batches):
                yield self._product(batch)
        else:
            for index in sampled_indices(module.train_loader, num_batches):
                yield self._product(self._block.rows(index.to(self._block.leaves[0].device)).batch)

    def _recomputed(self, V: Tensor) -> Tensor:
        total = torch.zeros_like(V)
        for batch, share in self._batches():
            total += share * self._product(batch)(V)
        return total

    def _batches(self) -> Iterator[tuple[Any, float]]:
        """Batches with their share of the training set; those of a block are as large as a graph may be."""
        module, block = self._module, self._block
        if block is None:
            count = len(module.train_loader.dataset)  # type: ignore[arg-type]
            for batch, size in module._loader_wrapper(train=True):
                yield batch, size / count
            return
        few = block.rows(slice(0, min(block.size, 16)))
        each = self._measured(few.batch)[1] / few.size
        size = max(16, int(GRAPH_BYTES / 2 / max(each, 1.0)))
        for start in range(0, block.size, size):
            rows = block.rows(slice(start, start + size))
            yield rows.batch, rows.size / block.size

    def _measured(self, batch: Any) -> tuple[Product, int]:
        """A product and the bytes that its graphs hold."""
        storages: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            product = self._product(batch)
        return product, sum(storages.values())

    def _product(self, batch: Any) -> Product:
        objective, regulariser, theta = self._module.objective, self._regulariser, self._module._theta().requires_grad_()
        with self._module._at(theta) as call:
            if regulariser is None:
                return hessian_product(call(lambda model: objective.train_loss(model, theta, batch)), theta)
            z = call(lambda model: objective.train_outputs(model, batch))
            if self._gnh:
                product = gauss_newton_product(z, theta, lambda out: objective.train_loss_on_outputs(out, batch))
            else:
                product = hessian_product(objective.train_loss_on_outputs(z, batch), theta)
        return lambda V: product(V) + regulariser.product(V)


def hessian_product(value: Tensor, theta: Tensor) -> Product:
    """``∇²value v`` from the graph of ``∇value``."""
    if not value.requires_grad:
        return torch.zeros_like
    (gradient,) = torch.autograd.grad(value.sum(), theta, create_graph=True, materialize_grads=True)
    return lambda V: hessian_rows(gradient, theta, V)


def gauss_newton_product(z: Tensor, theta: Tensor, loss: Callable[[Tensor], Tensor]) -> Product:
    """``Jᵀ H J v`` with the loss's Hessian ``H`` at outputs of any shape.

    ``Jᵀu`` is linear in u, so its derivative by u, transposed, is ``J``.
    """
    if not z.requires_grad:
        return torch.zeros_like
    u = torch.zeros_like(z, requires_grad=True)
    (pulled,) = torch.autograd.grad(z, theta, u, create_graph=True, materialize_grads=True)
    leaf = z.detach().requires_grad_()
    value = loss(leaf)
    if not value.requires_grad:
        return torch.zeros_like
    (gradient,) = torch.autograd.grad(value.sum(), leaf, create_graph=True)

    def product(V: Tensor) -> Tensor:
        tangents = hessian_rows(pulled, u, V)
        return hessian_rows(z, theta, hessian_rows(gradient, leaf, tangents))

    return product


def sampled_indices(loader: DataLoader, num_batches: int) -> tuple[Tensor, ...]:
    """Batches of the loader's size, drawn with replacement, as indices ``[size]``; the global generator gives the seed.

    An iterator over a ``DataLoader`` draws a number of its own before its sampler does. It is drawn here too, so that one seed gives the
    batches that a loader with this sampler would yield.
    """
    dataset: Any = loader.dataset
    size = loader.batch_size
    assert size is not None
    sampler = RandomSampler(dataset, replacement=True, num_samples=num_batches * size)
    iter(DataLoader(dataset, batch_size=size, sampler=sampler))
    return torch.tensor(list(sampler), dtype=torch.long).split(size)
