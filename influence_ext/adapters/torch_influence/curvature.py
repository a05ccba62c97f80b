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

from influence_ext.adapters.torch_influence.batches import NotNative
from influence_ext.adapters.torch_influence.captures import Linearised
from influence_ext.adapters.torch_influence.regulariser import Product, hessian_rows
from influence_ext.errors import ShapeError
from influence_ext.losses import OutputHessian
from influence_ext.operators.base import LinearOperator
from influence_ext.tape import Tape

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
        """The same on batches drawn with replacement, as many of the loader's size; each product is valid until the next is asked for."""


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
        return GraphCurvature(module, gnh)


def _separable(module: BaseInfluenceModule, gnh: bool) -> Curvature:
    captures = module._captures
    if gnh:
        return NativeCurvature(module, captures.outputs())
    try:
        return NativeCurvature(module, captures.affine())
    except NotNative:  # the network is curved
        return NativeCurvature(module, captures.outputs(), second_order=True)


class NativeCurvature(Curvature):
    """The Gauss-Newton matrix or the Hessian of a captured network, and the regulariser's Hessian.

    Args:
        module: whose loader and regulariser count.
        linearised: the network on the training set.
        second_order: the Hessian; else the Gauss-Newton matrix, which is the Hessian of an affine network.

    Raises:
        NotNative: the loss is no mean over examples; it is linear, and so without a Gauss-Newton matrix; or a node that runs in torch has
            no second derivatives there.
    """

    def __init__(self, module: BaseInfluenceModule, linearised: Linearised, second_order: bool = False):
        assert linearised.is_mean
        assert not second_order or linearised.has_second_order
        self._loader, self._linearised, self._network = module.train_loader, linearised, linearised.network
        self._second_order = second_order
        self._hessian = None if second_order and self._network.loss.is_linear else linearised.hessian
        self._regulariser = module._regulariser()

    def full(self) -> Product:
        """See :meth:`Curvature.full`."""
        tape = self._linearised.with_cotangents if self._second_order else self._linearised.tape()
        return self._product(tape, None if self._hessian is None else self._hessian.scaled(1 / self._network.num_examples))

    def sampled(self, num_batches: int) -> Iterator[Product]:
        """See :meth:`Curvature.sampled`."""
        theta = self._linearised.tape().theta
        batches = [index.to(theta.device) for index in sampled_indices(self._loader, num_batches)]
        if self._second_order or self._hessian is None or self._hessian.state is None:
            return self._relinearised(batches, theta)
        if (self._network.num_examples - 4 * len(batches[0])) * theta.numel() <= SPARE_WORK:
            return map(self._weighed, batches)
        return map(self._of_matrix, batches) if self._network.is_matrix else self._relinearised(batches, theta)

    def _relinearised(self, batches: list[Tensor], theta: Tensor) -> Iterator[Product]:
        """On one tape, whose memory serves all batches."""
        network, tape = self._network, None
        for index in batches:
            if tape is None:
                tape = network.linearize(index, theta, second_order=self._second_order).without_shortcuts()
            else:
                tape.relinearize(theta, network.rows(index))
            if self._second_order:
                tape.keep_cotangents(self._linearised.slopes.index_select(0, index).div_(len(index)))
            hessian = self._hessian
            if hessian is not None and hessian.state is None:
                hessian = network.loss.hessian(tape.outputs, index).scaled(1 / len(index))
            elif hessian is not None:
                hessian = self._at(hessian, index)
            yield self._product(tape, hessian)

    def _weighed(self, index: Tensor) -> Product:
        """On the whole set, each example weighed by how often it was drawn."""
        assert self._hessian is not None
        tape, ones = self._linearised.tape(), self._regulariser.gradient.new_ones(len(index))
        weights = ones.new_zeros(self._network.num_examples).index_add_(0, index, ones)
        return self._product(tape, dataclasses.replace(self._hessian, weights=weights, scale=self._hessian.scale / len(index)))

    def _of_matrix(self, index: Tensor) -> Product:
        """By two products with a batch's rows, which cost less than a tape of them."""
        assert self._hessian is not None
        network, regulariser, x, hessian = self._network, self._regulariser, self._network.rows(index), self._at(self._hessian, index)
        return lambda V: regulariser.add_product(V, network.matrix_product(x, hessian, V))

    def _at(self, hessian: OutputHessian, index: Tensor) -> OutputHessian:
        """Of the mean loss of the examples at ``index``."""
        assert hessian.state is not None
        return dataclasses.replace(hessian, state=hessian.state.index_select(0, index), scale=hessian.scale / len(index))

    def _product(self, tape: Tape, hessian: OutputHessian | None) -> Product:
        regulariser = self._regulariser
        if self._second_order:
            return lambda V: regulariser.add_product(V, tape.hvp(V, hessian))
        assert hessian is not None
        return lambda V: regulariser.add_product(V, tape.ggn(V, hessian))


class GraphCurvature(Curvature):
    """Products by torch, which differentiates graphs of first derivatives batch by batch; these are kept where memory allows.

    Args:
        module: whose objective, model and loaders count.
        gnh: Gauss-Newton instead of Hessian.
    """

    def __init__(self, module: BaseInfluenceModule, gnh: bool):
        self._module, self._gnh = module, gnh

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
        for batch, _ in self._module._loader_wrapper(train=True, sample_n_batches=num_batches):
            yield self._product(batch)

    def _recomputed(self, V: Tensor) -> Tensor:
        total = torch.zeros_like(V)
        for batch, share in self._batches():
            total += share * self._product(batch)(V)
        return total

    def _batches(self) -> Iterator[tuple[Any, float]]:
        """Batches with their share of the training set."""
        count = len(self._module.train_loader.dataset)  # type: ignore[arg-type]
        for batch, size in self._module._loader_wrapper(train=True):
            yield batch, size / count

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
        module, objective, theta = self._module, self._module.objective, self._module._theta().requires_grad_()
        with module._at(theta) as call:
            if not self._gnh:
                return hessian_product(call(lambda model: objective.train_loss(model, theta, batch)), theta)
            z = call(lambda model: objective.train_outputs(model, batch))
            product = gauss_newton_product(z, theta, lambda out: objective.train_loss_on_outputs(out, batch))
        regulariser = module._regulariser()
        return lambda V: regulariser.add_product(V, product(V))


def hessian_product(value: Tensor, theta: Tensor) -> Product:
    """``∇²value v`` from the graph of ``∇value``."""
    if not value.requires_grad:
        return torch.zeros_like
    (gradient,) = torch.autograd.grad(_scalar(value), theta, create_graph=True, materialize_grads=True)
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
    (gradient,) = torch.autograd.grad(_scalar(value), leaf, create_graph=True)

    def product(V: Tensor) -> Tensor:
        tangents = hessian_rows(pulled, u, V)
        return hessian_rows(z, theta, hessian_rows(gradient, leaf, tangents))

    return product


def _scalar(value: Tensor) -> Tensor:
    if value.numel() != 1:
        raise ShapeError(f"train_loss: expected a scalar, the mean over the batch, got {list(value.shape)}; reduce it with .mean().")
    return value.sum()


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
