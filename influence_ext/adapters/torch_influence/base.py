"""What an objective says of a training problem, and influence scores from products with an inverse Hessian."""

from __future__ import annotations

import abc
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import data

from influence_ext.adapters.torch_influence.batches import Block, NotNative, check_subset, read_block, to_device
from influence_ext.adapters.torch_influence.captures import Captures
from influence_ext.adapters.torch_influence.curvature import gauss_newton_product, hessian_product
from influence_ext.adapters.torch_influence.regulariser import Regulariser
from influence_ext.capture import differentiable
from influence_ext.errors import ArgumentError, DTypeError, ShapeError

_log = logging.getLogger("influence_ext")


class BaseObjective(abc.ABC):
    """How training and test losses are computed: four methods to implement."""

    @abc.abstractmethod
    def train_outputs(self, model: nn.Module, batch: Any) -> Tensor:
        """Outputs of the model on a training batch, such as logits or probabilities: ``[N, ...]``."""

    @abc.abstractmethod
    def train_loss_on_outputs(self, outputs: Tensor, batch: Any) -> Tensor:
        """Scalar: the **mean** training loss of these outputs. With ``gnh=True`` it has to be convex in them."""

    @abc.abstractmethod
    def train_regularization(self, params: Tensor) -> Tensor:
        """Scalar: the regulariser of the flat parameters ``[P]``."""

    def train_loss(self, model: nn.Module, params: Tensor, batch: Any) -> Tensor:
        """Scalar: loss on outputs plus regulariser. One that is overridden is differentiated as it is, by torch, batch by batch."""
        return self.train_loss_on_outputs(self.train_outputs(model, batch), batch) + self.train_regularization(params)

    @abc.abstractmethod
    def test_loss(self, model: nn.Module, params: Tensor, batch: Any) -> Tensor:
        """Scalar: the **mean** test loss of a batch, usually without a regulariser. ``params`` are the flat parameters ``[P]``."""


class BaseInfluenceModule(abc.ABC):
    r"""Influence scores of training examples on test losses.

    .. math:: s_i = \frac{1}{n} \nabla \ell_i^T\, s_\mathrm{test}, \qquad s_\mathrm{test} = (H + \lambda I)^{-1} \nabla \ell_\mathrm{test}

    with ``n`` training examples. Positive: removing example i raises the test loss. ``∇ℓ_i`` contains the regulariser's gradient.

    The model is put into evaluation mode and moved to ``device``, once, here; nothing else of it changes, ever: the parameters, their
    identity, gradients and hooks stay. Parameters, buffers and the objective's attributes may change between calls. Global variables that
    the objective's functions read may not; nor may the training data, which are read once, unless a second reading differs from the first.

    Args:
        model: its parameters with ``requires_grad`` count, in the order of ``named_parameters()``.
        objective: see :class:`BaseObjective`.
        train_loader: training batches of tensors in tuples, lists or dicts; its order and shuffling play no part.
        test_loader: the same for test data.
        device: where everything is computed.

    Raises:
        ArgumentError (a ValueError): the model has no parameter with ``requires_grad``, or the training loader is none or has no data.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: BaseObjective,
        train_loader: data.DataLoader,
        test_loader: data.DataLoader,
        device: torch.device,
    ):
        model.eval()
        self.model = model.to(device)
        self.device = device
        self.is_model_functional = False
        self.params_names = tuple(name for name, _ in self._model_params())
        self.params_shape = tuple(p.shape for _, p in self._model_params())
        if not self.params_names:
            raise ArgumentError(f"{type(self).__name__}: expected parameters with requires_grad, got a model without any; unfreeze some.")
        _check_loader(train_loader, "train_loader")
        if not len(train_loader.dataset):  # type: ignore[arg-type]
            raise ArgumentError(f"{type(self).__name__}: expected training examples, got an empty data set; check what it was read from.")
        self.objective = objective
        self.train_loader = train_loader
        self.test_loader = test_loader
        self._originals: dict[str, nn.Parameter] = {}
        self._block: Block | NotNative | None = None
        self._captures = Captures(self)

    @abc.abstractmethod
    def inverse_hvp(self, vec: Tensor) -> Tensor:
        """The damped inverse Hessian of the mean training loss times ``vec``: ``[P] -> [P]``."""

    def train_loss_grad(self, train_idxs: Sequence[int]) -> Tensor:
        """``[P]``: gradient of the mean regularised training loss of these training examples.

        Raises:
            IndexError: an index out of range.
            ValueError: an index twice, no index, or no list of integers.
        """
        return self._loss_grad(train_idxs, train=True)

    def test_loss_grad(self, test_idxs: Sequence[int]) -> Tensor:
        """``[P]``: gradient of the mean test loss of these test examples. Raises as :meth:`train_loss_grad`."""
        return self._loss_grad(test_idxs, train=False)

    def stest(self, test_idxs: Sequence[int]) -> Tensor:
        """``[P]``: :meth:`inverse_hvp` of :meth:`test_loss_grad`."""
        return self.inverse_hvp(self.test_loss_grad(test_idxs))

    def influences(self, train_idxs: Sequence[int] | None, test_idxs: Sequence[int], stest: Tensor | None = None) -> Tensor:
        """Scores of training examples on the mean loss of the test examples: ``[len(train_idxs)]`` on the CPU.

        Args:
            train_idxs: the training examples; None for all.
            test_idxs: the test examples; not read where ``stest`` is given.
            stest: ``[P]``, if it is known already; ``[V, P]`` for several, which gives scores ``[V, len(train_idxs)]``.

        Returns:
            ``gradient · stest / n`` for the n examples of the training set: the predicted rise of the test loss when the example is
            removed.

        Raises:
            IndexError, ValueError: see :meth:`train_loss_grad`; ``stest`` of another shape.
            DTypeError (a TypeError): ``stest`` of another dtype than the parameters.

        Cost: beside :meth:`stest`, one forward pass and a tangent sweep over these training examples.
        """
        vectors = self.stest(test_idxs) if stest is None else torch.as_tensor(stest, device=self.device)
        P, dtype = sum(shape.numel() for shape in self.params_shape), self._model_params(with_names=False)[0].dtype
        if vectors.dim() not in (1, 2) or vectors.shape[-1] != P:
            raise ShapeError(f"influences: expected stest of shape [P] or [V, P] with P = {P}, got {list(vectors.shape)}.")
        if vectors.dtype != dtype:
            raise DTypeError(
                f"influences: expected stest of the parameters' dtype {dtype}, got {vectors.dtype}; convert it by .to({dtype})."
            )
        count = len(self.train_loader.dataset)  # type: ignore[arg-type]
        indices = list(range(count)) if train_idxs is None else check_subset(train_idxs, count)
        rows = vectors.detach().reshape(-1, P).contiguous()
        scores = self._gradient_dots(indices, rows).cpu() / count
        return scores[:, 0] if vectors.dim() == 1 else scores.T

    def __getstate__(self) -> dict[str, Any]:
        """Without what was read and captured, which a copy finds again."""
        return {**self.__dict__, "_block": None, "_captures": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _captures=Captures(self))

    # Gradients of single examples

    def _gradient_dots(self, indices: list[int], vectors: Tensor) -> Tensor:
        """``⟨∇train_loss_i, v⟩`` of each example on its own: ``[V, P] -> [len(indices), V]``."""
        if indices:
            try:
                return self._native_dots(indices, vectors)
            except NotNative as reason:
                _log.info("torch_influence: gradients of single examples run in torch, one by one (%s)", reason)
        dots = [vectors @ g for g, _ in self._loss_grad_loader_wrapper(train=True, batch_size=1, subset=indices)]
        return torch.stack(dots) if dots else vectors.new_zeros(0, len(vectors))

    def _native_dots(self, indices: list[int], vectors: Tensor) -> Tensor:
        if not self._has_default_train_loss():
            raise NotNative("train_loss is overridden")
        try:
            linearised = self._captures.affine()
        except NotNative:
            linearised = self._captures.outputs()
        index = torch.tensor(indices, dtype=torch.long, device=self.device)
        return linearised.gradient_dots(index, vectors) + vectors @ self._regulariser().gradient

    # What curvatures read

    def _training_block(self) -> Block:
        """The training set, read once.

        Raises:
            NotNative: it cannot be kept, see :func:`read_block`.
        """
        if self._block is None:
            try:
                self._block = read_block(self.train_loader, self.device, lambda: self._loader_wrapper(train=True))
            except NotNative as reason:
                self._block = reason
        if isinstance(self._block, NotNative):
            raise self._block
        return self._block

    def _has_default_train_loss(self) -> bool:
        return getattr(self.objective.train_loss, "__func__", None) is BaseObjective.train_loss

    def _regulariser(self) -> Regulariser:
        return Regulariser(self.objective.train_regularization, self._theta())

    def _theta(self) -> Tensor:
        """``[P]``, a copy of the present parameters."""
        return torch.cat([p.detach().reshape(-1) for p in self._model_params(with_names=False)])

    @contextmanager
    def _at(self, theta: Tensor) -> Iterator[Callable[[Callable[[nn.Module], Tensor]], Tensor]]:
        """A way to call functions of the model as if it had the parameters ``theta [P]``, for derivatives of any order."""
        caller = _Caller(self.model)
        named = {f"model.{name}": p for name, p in zip(self.params_names, self._reshape_like_params(theta), strict=True)}
        with differentiable():
            yield lambda function: torch.func.functional_call(caller, named, (function,))

    # Parameters

    def _model_params(self, with_names: bool = True) -> tuple[Any, ...]:
        assert not self.is_model_functional
        return tuple((name, p) if with_names else p for name, p in self.model.named_parameters() if p.requires_grad)

    def _model_make_functional(self) -> tuple[Tensor, ...]:
        """Take the parameters off the model and return leaves with their values, to be put back by :meth:`_model_reinsert_params`."""
        self._originals = dict(self._model_params())
        for name in self.params_names:
            owner, _, attribute = name.rpartition(".")
            delattr(self.model.get_submodule(owner), attribute)
        self.is_model_functional = True
        return tuple(p.detach().requires_grad_() for p in self._originals.values())

    def _model_reinsert_params(self, params: Sequence[Tensor], register: bool = False) -> None:
        """Set tensors in the parameters' places; with ``register``, as the values of the parameters that were there."""
        for name, p in zip(self.params_names, params, strict=True):
            owner, _, attribute = name.rpartition(".")
            if register:
                original = self._originals[name]
                original.data = p.detach()
                p = original
            setattr(self.model.get_submodule(owner), attribute, p)
        self.is_model_functional = not register

    def _flatten_params_like(self, params_like: Sequence[Tensor]) -> Tensor:
        return torch.cat([p.reshape(-1) for p in params_like])

    def _reshape_like_params(self, vec: Tensor) -> tuple[Tensor, ...]:
        pieces = vec.split([shape.numel() for shape in self.params_shape])
        return tuple(piece.view(shape) for piece, shape in zip(pieces, self.params_shape, strict=True))

    # Data

    def _transfer_to_device(self, batch: Any) -> Any:
        return to_device(batch, self.device)

    def _loader_wrapper(
        self, train: bool, batch_size: int | None = None, subset: Sequence[int] | None = None, sample_n_batches: int = -1
    ) -> Iterator[tuple[Any, int]]:
        """``(batch, its number of examples)`` in the order of the data set, or of random batches drawn with replacement.

        Raises:
            IndexError, ValueError: see :meth:`train_loss_grad`; a loader without a batch size.
        """
        loader: Any = self.train_loader if train else self.test_loader
        _check_loader(loader, "train_loader" if train else "test_loader")
        size = loader.batch_size if batch_size is None else batch_size
        if size is None:
            raise ArgumentError(
                "torch_influence: expected a loader with a batch_size, got one with a batch_sampler or without batches; build it with "
                "batch_size=."
            )
        dataset: Any = loader.dataset
        if subset is not None:
            dataset = data.Subset(dataset, check_subset(subset, len(dataset)))
        left = len(dataset)
        sampler = None
        if sample_n_batches > 0:
            left = sample_n_batches * size
            sampler = data.RandomSampler(dataset, replacement=True, num_samples=left)
        batches: data.DataLoader = data.DataLoader(
            dataset,
            batch_size=size,
            shuffle=False,
            sampler=sampler,
            collate_fn=loader.collate_fn,
            num_workers=loader.num_workers,
            worker_init_fn=loader.worker_init_fn,
        )
        for batch in batches:
            yield self._transfer_to_device(batch), min(size, left)
            left -= size

    # Derivatives in torch

    def _loss_grad_loader_wrapper(self, train: bool, **kwargs: Any) -> Iterator[tuple[Tensor, int]]:
        """``(gradient [P] of a batch's mean loss, its number of examples)``."""
        loss_function = self.objective.train_loss if train else self.objective.test_loss
        params = self._model_params(with_names=False)
        for batch, size in self._loader_wrapper(train=train, **kwargs):
            with torch.enable_grad():
                loss = loss_function(model=self.model, params=self._flatten_params_like(params), batch=batch)
                gradients = torch.autograd.grad(loss, params, allow_unused=True, materialize_grads=True)
            yield self._flatten_params_like(gradients), size

    def _loss_grad(self, idxs: Sequence[int], train: bool) -> Tensor:
        total: Tensor | float = 0.0
        for gradient, size in self._loss_grad_loader_wrapper(train=train, subset=idxs):
            total = total + gradient * size
        if not isinstance(total, Tensor):
            raise ArgumentError("torch_influence: expected at least one example index, got none; a mean over no examples has no gradient.")
        return total / len(idxs)

    def _hvp_at_batch(self, batch: Any, flat_params: Tensor, vec: Tensor, gnh: bool) -> Tensor:
        """Product of ``vec [P]`` with the curvature of one batch's training loss, for solvers of one's own.

        As in torch-influence, it is called between :meth:`_model_make_functional` and :meth:`_model_reinsert_params` with ``register``.
        """
        theta = flat_params.detach().requires_grad_()
        objective = self.objective
        with differentiable():
            self._model_reinsert_params(self._reshape_like_params(theta))
            if not gnh:
                return hessian_product(objective.train_loss(self.model, theta, batch), theta)(vec[None])[0]
            z = objective.train_outputs(self.model, batch)
            product = gauss_newton_product(z, theta, lambda out: objective.train_loss_on_outputs(out, batch))
            return product(vec[None])[0] + Regulariser(objective.train_regularization, theta).product(vec[None])[0]


def _check_loader(loader: Any, name: str) -> None:
    if not all(hasattr(loader, attribute) for attribute in ("dataset", "batch_size", "collate_fn")):
        raise ArgumentError(
            f"torch_influence: expected {name} to be a DataLoader, got {type(loader).__name__}; wrap the data, for instance in "
            "DataLoader(TensorDataset(X, y), batch_size=32)."
        )


class _Caller(nn.Module):
    """Lets ``functional_call`` run any function of a model."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, function: Callable[[nn.Module], Tensor]) -> Tensor:
        return function(self.model)
