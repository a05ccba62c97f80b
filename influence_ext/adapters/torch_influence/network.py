"""An objective as a network that the library captures and a loss of its outputs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import TreeSpec, tree_leaves, tree_unflatten

from influence_ext.adapters.torch_influence.batches import Block, NotNative
from influence_ext.errors import InfluenceExtError
from influence_ext.losses import Loss, OutputHessian, resolve
from influence_ext.losses.hessian import DIAGONAL, SOFTMAX, BlockHessian
from influence_ext.plan import Plan
from influence_ext.tape import Tape

if TYPE_CHECKING:
    from influence_ext.adapters.torch_influence.base import BaseInfluenceModule, BaseObjective

AFFINE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
"""Layers whose output is affine in their parameters."""
MEMORY_BUDGET = 4 * 2**30
"""Bytes of forward state that are kept; beyond it, products recompute it."""
BLOCK = 1024
"""Examples whose inputs to the affine layer are computed at a time."""
PROBE = 2
"""Examples on which a capture is compared with the objective itself."""


@dataclass(frozen=True, eq=False)
class Network:
    """Outputs ``z(θ)`` of a block's examples, and the training loss as a function of ``z`` and the examples' indices.

    Attributes:
        plan: the network, its parameters in the model's order.
        X: its inputs, a tensor or a tuple, ``[N, ...]`` each.
        loss: ``ℓ_n`` of outputs and indices ``[N]``.
        num_examples: N.
        is_matrix: whether this is one ``nn.Linear`` on vectors, whose Jacobian is the matrix X, repeated.
    """

    plan: Plan
    X: Any
    loss: Loss
    num_examples: int
    is_matrix: bool = False

    def linearize(self, index: Tensor | None = None, theta: Tensor | None = None, second_order: bool = False) -> Tape:
        """At the model's present parameters, on all examples, within a budget of memory, or on those at ``index``."""
        if index is None:
            width = sum(node.width for node in self.plan.graph.nodes)
            ample = 8 * self.num_examples * width * self.plan.space.dtype.itemsize <= MEMORY_BUDGET  # finding out costs two small tapes
            return self.plan.linearize(self.X, theta, memory_budget=None if ample else MEMORY_BUDGET, second_order=second_order)
        return self.plan.linearize(self.rows(index), theta, second_order=second_order)

    def rows(self, index: Tensor) -> Any:
        """The inputs of the examples at ``index``."""
        return self.X.index_select(0, index) if isinstance(self.X, Tensor) else tuple(x.index_select(0, index) for x in self.X)

    def matrix_product(self, x: Tensor, hessian: OutputHessian, V: Tensor) -> Tensor:
        """``Jᵀ H J v`` for rows ``x [B, I]`` of a linear layer's inputs: ``[V, P] -> [V, P]``."""
        moved = self.plan.space.unflatten(V)
        tangents = x @ moved["weight"].mT if "weight" in moved else V.new_zeros(len(V), len(x), *self.plan.output_shape)
        if "bias" in moved:
            tangents = tangents + moved["bias"][:, None]
        cotangents = hessian.matmat(tangents)
        pulled = [cotangents.mT @ x if name == "weight" else cotangents.sum(dim=1) for name in moved]
        return torch.cat([part.flatten(1) for part in pulled], dim=1)

    def indices(self) -> Tensor:
        """All of them, the targets of the loss."""
        return torch.arange(self.num_examples, device=self.plan.space.device)

    def check_mean(self, z: Tensor) -> None:
        """See that the training loss of a batch is the mean of its examples' losses, whatever the batch.

        Raises:
            NotNative: it is not, or nothing can be seen of it.
        """
        with as_not_native():
            self.loss.check(z, self.indices(), "torch_influence")
            if self.loss.reduction == "undetermined" and self.num_examples > 1:  # all losses are zero: ask with others' outputs
                self.loss.check(z.roll(1, 0), self.indices(), "torch_influence")
        if self.loss.reduction != "mean" and self.num_examples > 1:
            raise NotNative(f"the loss of a batch is not the mean over its examples but: {self.loss.reduction}")


def outputs_network(module: BaseInfluenceModule, block: Block) -> Network:
    """``train_outputs`` as the network and ``train_loss_on_outputs`` as the loss.

    Raises:
        NotNative: the function is not one that the library captures, or its capture gives something else.
    """
    objective = module.objective
    used = _touched(module, block)
    wrapper = _TrainOutputs(module.model, objective.train_outputs, block, used)
    X = tuple(block.leaves[i] for i in used)
    with as_not_native():
        plan = Plan.of(wrapper, X, who="torch_influence")
    _check_space(plan, tuple(f"model.{name}" for name in module.params_names))

    def loss(z: Tensor, index: Tensor) -> Tensor:
        return objective.train_loss_on_outputs(z, block.rows(index).batch)

    network = Network(plan, X, resolve(loss, who="torch_influence"), block.size)
    _compare(network, objective.train_outputs, module, block)
    return network


def affine_network(module: BaseInfluenceModule, block: Block) -> Network:
    """The only trained layer as the network, and all that follows it as the loss.

    Where that layer is affine, the Hessian is the Gauss-Newton matrix at its outputs: linear and logistic regression, the last layer of
    a frozen network.

    Raises:
        NotNative: other layers are trained too, or the layer is used in another way than once by a call.
    """
    model, objective = module.model, module.objective
    name, layer = _only_affine_layer(model)
    few = block.rows(slice(0, PROBE))
    x = torch.cat([_inputs_of(layer, objective, model, block.rows(slice(s, s + BLOCK))) for s in range(0, block.size, BLOCK)])
    alone = torch.cat([_inputs_of(layer, objective, model, few.rows(slice(n, n + 1))) for n in range(few.size)])
    if x.shape[0] != block.size or not _close(alone, x[: few.size]):
        raise NotNative(f"the inputs of {name or 'the model'} mix the examples of a batch")
    with as_not_native():
        plan = Plan.of(layer, x, who="torch_influence")
    prefix = f"{name}." if name else ""
    _check_space(plan, tuple(full.removeprefix(prefix) for full in module.params_names))

    def loss(u: Tensor, index: Tensor) -> Tensor:
        batch = block.rows(index).batch
        with _output_replaced(layer, u):
            outputs = objective.train_outputs(model, batch)
        return objective.train_loss_on_outputs(outputs, batch)

    network = Network(plan, x, resolve(loss, who="torch_influence"), block.size, type(layer) is nn.Linear and x.dim() == 2)
    u = layer(x[: few.size]).detach().requires_grad_()
    with torch.enable_grad():
        value = loss(u, torch.arange(few.size, device=u.device))
        by_parameters = torch.autograd.grad(value, module._model_params(with_names=False), retain_graph=True, allow_unused=True)
        (by_output,) = torch.autograd.grad(value, u, allow_unused=True)
    if by_output is None or any(gradient is not None for gradient in by_parameters):
        raise NotNative(f"the loss depends on the parameters in other ways than through one call of {name or 'the model'}")
    return network


def native_form(hessian: OutputHessian, z: Tensor) -> OutputHessian:
    """Dense blocks that are diagonal, or those of a softmax of ``z``, in the form that the fused product takes; others as they are.

    All N blocks are compared: the off-diagonal has to be zero, the softmax right to rounding.
    """
    if not isinstance(hessian, BlockHessian) or hessian.state is None or hessian.weights is not None:
        return hessian
    blocks = hessian.state
    diagonal = blocks.diagonal(dim1=1, dim2=2).contiguous()
    if bool((blocks == torch.diag_embed(diagonal)).all()):
        return OutputHessian(DIAGONAL, hessian.scale, diagonal, None)
    if z.dim() == 2:
        p = torch.softmax(z.double(), dim=1)
        softmax = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        if bool((blocks - softmax).abs().max() <= 8 * torch.finfo(z.dtype).eps):
            return OutputHessian(SOFTMAX, hessian.scale, p.to(z.dtype).contiguous(), None)
    return hessian


@contextmanager
def as_not_native() -> Any:
    """Refusals of the library become the reason to take torch's way, which is as exact."""
    try:
        yield
    except InfluenceExtError as error:
        raise NotNative(" ".join(line.strip() for line in str(error).splitlines())) from error


@dataclass(frozen=True)
class _Structure:
    """Containers of a batch; copies of a module share it."""

    spec: TreeSpec

    def __deepcopy__(self, memo: Any) -> _Structure:
        return self


class _TrainOutputs(nn.Module):
    """``train_outputs`` as a module of the tensors that it reads."""

    def __init__(self, model: nn.Module, train_outputs: Callable[[nn.Module, Any], Tensor], block: Block, used: list[int]):
        super().__init__()
        self.model = model
        self.train(model.training)
        self.train_outputs, self.structure, self.used = train_outputs, _Structure(block.spec), used

    def forward(self, *tensors: Tensor) -> Tensor:
        leaves: list[Tensor | None] = [None] * self.structure.spec.num_leaves
        for position, tensor in zip(self.used, tensors, strict=True):
            leaves[position] = tensor
        return self.train_outputs(self.model, tree_unflatten(leaves, self.structure.spec))


class _Touch(TorchFunctionMode):
    """Remembers which tensors torch was asked anything about."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.update(id(leaf) for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor))
        return func(*args, **(kwargs or {}))


def _touched(module: BaseInfluenceModule, block: Block) -> list[int]:
    """Positions of the tensors of a batch that ``train_outputs`` reads."""
    few = block.rows(slice(0, PROBE))
    with _Touch() as touch, torch.no_grad():
        module.objective.train_outputs(module.model, few.batch)
    used = [position for position, leaf in enumerate(few.leaves) if id(leaf) in touch.seen]
    if not used:
        raise NotNative("train_outputs reads no tensor of the batch")
    return used


def _check_space(plan: Plan, names: tuple[str, ...]) -> None:
    if plan.space.names != names:
        raise NotNative(f"the capture has other parameters than the model: {plan.space.describe()}")


def _compare(network: Network, function: Callable[..., Tensor], module: BaseInfluenceModule, block: Block) -> None:
    """What a function does beside torch, such as branching on a number, a capture does not see."""
    for rows in (slice(0, PROBE), slice(block.size - 1, block.size)):
        with torch.no_grad():
            expected = function(module.model, block.rows(rows).batch)
        with as_not_native():
            found = network.linearize(network.indices()[rows]).outputs
        if not _close(found, expected):
            raise NotNative("train_outputs gives other numbers than its capture")


def _close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(torch.allclose(a, b, rtol=1e3 * torch.finfo(a.dtype).eps, atol=1e3 * torch.finfo(a.dtype).eps))


def _only_affine_layer(model: nn.Module) -> tuple[str, nn.Module]:
    """The module that owns every trained parameter."""
    owners = {name.rpartition(".")[0] for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    if len(owners) != 1:
        raise NotNative("more than one layer is trained, so the network is curved")
    (name,) = owners
    layer = model.get_submodule(name)
    if type(layer) not in AFFINE:
        raise NotNative(f"{type(layer).__name__} is not known to be affine in its parameters")
    if layer._forward_hooks or layer._forward_pre_hooks:
        raise NotNative(f"{name or 'the model'} has hooks of its own")
    return name, layer


def _inputs_of(layer: nn.Module, objective: BaseObjective, model: nn.Module, block: Block) -> Tensor:
    """What reaches the layer when ``train_outputs`` runs."""
    calls: list[Any] = []
    handle = layer.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    try:
        with torch.no_grad():
            objective.train_outputs(model, block.batch)
    finally:
        handle.remove()
    if len(calls) != 1 or calls[0][1] or len(calls[0][0]) != 1 or not isinstance(calls[0][0][0], Tensor):
        raise NotNative(f"{type(layer).__name__} is called {len(calls)} times, or with something else than one tensor")
    x: Tensor = calls[0][0][0]
    if x.dim() == 0 or x.shape[0] != block.size:
        raise NotNative(f"{type(layer).__name__} gets {list(x.shape)} for {block.size} examples")
    return x.detach()


@contextmanager
def _output_replaced(layer: nn.Module, u: Tensor) -> Any:
    """While open, the layer returns ``u``."""
    handle = layer.register_forward_hook(lambda *_: u)
    try:
        yield
    finally:
        handle.remove()
