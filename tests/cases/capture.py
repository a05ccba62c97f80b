"""Networks for capture, one or more for every operator of the lowering table, and the definition of every rule in plain
torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from influence_ext import _C
from influence_ext.capture import CapturedGraph, named_tensors

aten = torch.ops.aten


class Net(nn.Module):
    """``forward(*inputs) = run(self, *inputs)``; members are parameters, buffers (tensors) or modules."""

    def __init__(self, run: Callable[..., Any], **members: Any):
        super().__init__()
        self.run = run
        for name, member in members.items():
            if isinstance(member, Tensor) and not isinstance(member, nn.Parameter):
                self.register_buffer(name, member)
            else:
                setattr(self, name, member)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self, *args, **kwargs)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def par(*shape: int) -> nn.Parameter:
    return nn.Parameter(normal(*shape))


def frozen(*shape: int) -> nn.Parameter:
    return nn.Parameter(normal(*shape), requires_grad=False)


def dense(num_in: int, num_out: int, bias: bool = True) -> nn.Linear:
    return nn.Linear(num_in, num_out, bias=bias, dtype=torch.float64)


def interpret(graph: CapturedGraph, model: nn.Module, inputs: list[Tensor]) -> Tensor:
    """The graph's outputs from the executor itself, every slot a constant."""
    tensors = named_tensors(model)
    nodes = [vars(node) for node in graph.nodes if node.rule != "view"]
    aliases = [-1] * graph.num_values
    for node in graph.nodes:
        assert node.width == math.prod(node.layout.shape)
        if node.rule == "view":
            aliases[node.output] = node.inputs[0]
    plan = _C.Plan64(
        nodes=nodes,
        slots=[(math.prod(slot.shape), -1) for slot in graph.slots],
        input_widths=[math.prod(shape) for shape in graph.prologue.shapes],
        aliases=aliases,
        output=graph.output,
        num_parameters=0,
    )
    sources = [x.double().contiguous() for x in graph.prologue.compute(inputs, tensors)]
    tape = _C.Tape64(plan, sources)
    tape.linearize([slot.read(tensors).double().contiguous() for slot in graph.slots])
    return tape.outputs().view(inputs[0].shape[0], *graph.output_shape)


@dataclass(frozen=True)
class Case:
    id: str
    run: Callable[..., Any]
    members: Callable[[], dict[str, Any]] = dict
    shapes: tuple[tuple[int, ...], ...] = ((4,),)
    keys: tuple[str, ...] | None = None
    rules: tuple[str, ...] | None = None
    read_out: Callable[[Any], Tensor] = field(default=lambda z: z)

    def build(self) -> Net:
        torch.manual_seed(sum(map(ord, self.id)))
        return Net(self.run, **self.members())

    def inputs(self, N: int) -> list[Tensor]:
        rng = torch.Generator().manual_seed(N)
        return [torch.randn(N, *shape, generator=rng, dtype=torch.float64) * 2 for shape in self.shapes]

    def pack(self, inputs: list[Tensor]) -> Any:
        if self.keys is not None:
            return dict(zip(self.keys, inputs, strict=True))
        return inputs[0] if len(inputs) == 1 else tuple(inputs)

    def call(self, model: nn.Module, X: Any) -> Tensor:
        with torch.no_grad():
            if isinstance(X, dict):
                return self.read_out(model(**X))
            return self.read_out(model(X) if isinstance(X, Tensor) else model(*X))


def weights() -> dict[str, Any]:
    return {"W": par(4, 4), "b": par(4)}


def layers() -> dict[str, Any]:
    return {"fc": dense(4, 5), "out": dense(5, 3)}


def in_place(net: Any, x: Tensor) -> Tensor:
    h = net.fc(x)
    h += 1
    h.mul_(2).relu_()
    return net.out(torch.sigmoid_(h))


def counting(net: Any, x: Tensor) -> Tensor:
    net.calls.add_(1)
    return net.fc(x) * net.scale


def gpt_conv1d(net: Any, x: Tensor) -> Tensor:
    """Hugging Face's Conv1D: the positions folded into the batch axis."""
    h = torch.addmm(net.b, x.view(-1, x.size(-1)), net.W)
    return (F.gelu(h, approximate="tanh") * net.c).view(*x.size()[:-1], 4)


def normalised(net: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        x = (x - net.mean) / net.std
    return net.fc(x.detach())


def dead_code(net: Any, x: Tensor) -> Tensor:
    F.conv1d(x[:, None], net.kernel).sum()
    torch.sort(x, dim=0)
    return net.fc(x)


def view_chain(net: Any, x: Tensor) -> Tensor:
    n = x.shape[0]
    h = x.flatten(1).unflatten(1, (4, 3)).reshape(-1, 12).view(-1, 4, 3).contiguous().expand(n, 4, 3)
    h = h.unsqueeze(1).squeeze(1).unsqueeze(0).squeeze().unsqueeze(2).squeeze((2,))
    h = aten.alias(+h).clone().type_as(x).to(torch.float64, copy=True)[:, :]
    h = h.view(n, 12, 1).permute(0, 2, 1).transpose(1, 2).swapaxes(2, 1).swapdims(1, 2).squeeze(-1)
    h = aten._reshape_alias(aten._unsafe_view(h, [n, 12]), [n, 12], [12, 1])
    return net.fc(F.dropout(h, 0.5, training=False))


def arithmetic(net: Any, x: Tensor) -> Tensor:
    h = x + 1.5 - net.c + 2 * x
    h = aten.rsub.Scalar(aten.sub.Scalar(aten.add.Scalar(h, 2, 3), 1), 0.5, 2)
    h = 3 - torch.subtract(h, x, alpha=2) / 4
    h = aten.div.Scalar(aten.mul.Scalar(torch.multiply(h, net.c), 3), 7)
    h = torch.true_divide(torch.divide(h, net.c), 2) - torch.rsub(x, net.c, alpha=0.3)
    return torch.negative(h) + torch.neg(x) + torch.add(net.c, x, alpha=2) + torch.sub(net.c, x, alpha=3)


CASES = [
    Case("mlp", lambda n, x: n.out(torch.relu(n.fc(x))), layers, rules=("linear", "activation", "linear")),
    Case("linear without bias", lambda n, x: n.fc(x), lambda: {"fc": dense(4, 3, False)}, rules=("linear",)),
    Case("linear over positions", lambda n, x: n.fc(x), lambda: {"fc": dense(4, 3)}, ((2, 5, 4),), rules=("linear",)),
    Case("relu", lambda n, x: (lambda x: F.relu(x))(x @ n.W), weights),
    Case("tanh", lambda n, x: (lambda x: nn.Tanh()(x))(x @ n.W), weights),
    Case("gelu", lambda n, x: (lambda x: F.gelu(x))(x @ n.W), weights),
    Case("gelu tanh", lambda n, x: (lambda x: nn.GELU("tanh")(x))(x @ n.W), weights),
    Case("silu", lambda n, x: (lambda x: F.silu(x))(x @ n.W), weights),
    Case("sigmoid", lambda n, x: (lambda x: x.sigmoid())(x @ n.W), weights),
    Case("elu", lambda n, x: (lambda x: F.elu(x, 0.7))(x @ n.W), weights),
    Case("elu scale", lambda n, x: (lambda x: aten.elu(x, 0.7, 1.3))(x @ n.W), weights),
    Case("selu", lambda n, x: (lambda x: nn.SELU()(x))(x @ n.W), weights),
    Case("celu", lambda n, x: F.celu(x @ n.W), weights, rules=("linear", "activation")),
    Case("softplus", lambda n, x: (lambda x: F.softplus(x))(x @ n.W), weights),
    Case("softplus beta threshold", lambda n, x: (lambda x: nn.Softplus(2.5, 3.0)(x))(x @ n.W), weights),
    Case("leaky relu", lambda n, x: (lambda x: F.leaky_relu(x) + nn.LeakyReLU(0.3)(x))(x @ n.W), weights),
    Case("rrelu", lambda n, x: (lambda x: F.rrelu(x, 0.1, 0.4) + F.rrelu(x))(x @ n.W), weights),
    Case("matmul", lambda n, x: x @ n.W, weights, rules=("linear",)),
    Case("matmul then bias", lambda n, x: x @ n.W + n.b, weights, rules=("linear",)),
    Case("bias then matmul", lambda n, x: n.b + torch.mm(x, n.W), weights, rules=("linear",)),
    Case("bias of one row", lambda n, x: x @ n.W + n.b, lambda: {"W": par(4, 3), "b": par(1, 3)}, rules=("linear",)),
    Case("scalar bias", lambda n, x: x @ n.W + n.b, lambda: {"W": par(4, 1), "b": par()}, rules=("linear",)),
    Case(
        "product used twice keeps its own value",
        lambda n, x: (lambda h: (h + n.c) + 2 * h)(x @ n.W),
        lambda: {"W": par(4, 4), "c": normal(4)},
        rules=("linear", "affine", "affine", "add"),
    ),
    Case("vector", lambda n, x: x @ n.w, lambda: {"w": par(4)}, rules=("linear",)),
    Case("mv", lambda n, x: torch.mv(x, n.w) + n.b, lambda: {"w": par(4), "b": par(1)}, rules=("linear",)),
    Case("vector over positions", lambda n, x: x @ n.w, lambda: {"w": par(4)}, ((3, 4),)),
    Case(
        "transposed weights",
        lambda n, x: x @ n.W.T + x @ n.W.t() + x @ n.W.mT + x @ n.W.adjoint() + torch.mm(x, n.W.swapaxes(0, -1)),
        weights,
        rules=("linear",) * 2 + ("add", "linear") * 3 + ("add",),
    ),
    Case("twice transposed", lambda n, x: x @ n.W.transpose(0, 1).contiguous().permute(1, 0), lambda: {"W": par(4, 3)}),
    Case("tied autoencoder", lambda n, x: F.linear(torch.tanh(F.linear(x, n.W)), n.W.T), lambda: {"W": par(3, 4)}),
    Case("addmm", lambda n, x: torch.addmm(n.b, x, n.W), weights, rules=("linear",)),
    Case("addmm transposed", lambda n, x: torch.addmm(n.b, x, n.W.t()), weights, rules=("linear",)),
    Case("addmm row bias", lambda n, x: torch.addmm(n.b[None], x, n.W), weights, rules=("linear",)),
    Case("addmm scalar bias", lambda n, x: torch.addmm(n.c, x, n.W), lambda: {"W": par(4, 3), "c": normal(1)}),
    Case("addmm of an activation", lambda n, x: torch.addmm(x, torch.tanh(x), n.W), weights),
    Case("positions folded into the batch", gpt_conv1d, lambda: {**weights(), "c": normal(4)}, ((5, 4),)),
    Case("fully flattened", lambda n, x: n.fc(torch.tanh(x.flatten()).view(x.shape[0], -1)), lambda: {"fc": dense(6, 2)}, ((2, 3),)),
    Case("weight seen through a view", lambda n, x: F.linear(x, n.W.view(3, 4), n.b.view(-1)), lambda: {"W": par(3, 2, 2), "b": par(3, 1)}),
    Case("frozen and buffer weights", lambda n, x: F.linear(x @ n.F, n.B), lambda: {"F": frozen(4, 3), "B": normal(2, 3)}),
    Case("computed weight", lambda n, x: x @ (n.F * n.mask).T, lambda: {"F": frozen(3, 4), "mask": (normal(3, 4) > 0).double()}),
    Case("reordered buffer weight", lambda n, x: x @ n.B.T.reshape(4, 3), lambda: {"B": normal(3, 4)}),
    Case("residual", lambda n, x: x + n.b2(F.silu(n.b1(x))), lambda: {"b1": dense(4, 4), "b2": dense(4, 4)}),
    Case("x plus x", lambda n, x: (lambda h: h + h - 3 * h)(x @ n.W), weights, rules=("linear", "add", "affine", "add")),
    Case("add with alpha", lambda n, x: torch.add(x, n.fc(x), alpha=0.3), lambda: {"fc": dense(4, 4)}),
    Case("arithmetic", arithmetic, lambda: {"c": normal(4) + 3}),
    Case("constant from the graph", lambda n, x: x * torch.arange(4) + torch.tensor([0.5]) + torch.ones(4, 1).mean()),
    Case(
        "broadcast buffers", lambda n, x: (x - n.mean) / n.std, lambda: {"mean": normal(3, 1, 1), "std": normal(1, 3, 1, 1)}, ((3, 2, 2),)
    ),
    Case("buffer of no axes", lambda n, x: x * n.t + n.t, lambda: {"t": normal()}),
    Case(
        "integer and half constants", lambda n, x: x / n.k + n.h, lambda: {"k": torch.tensor([1, 2, 3, 7]), "h": torch.ones(4).half() / 3}
    ),
    Case("frozen scale", lambda n, x: n.s * n.fc(x) + n.s / 3, lambda: {"fc": dense(4, 4), "s": frozen(4)}),
    Case("views", view_chain, lambda: {"fc": dense(12, 2)}, ((3, 2, 2),)),
    Case("squeeze to scalars", lambda n, x: n.fc(x).squeeze(-1), lambda: {"fc": dense(4, 1)}),
    Case("in place", in_place, layers),
    Case("dropout modules", lambda n, x: n.fc(n.drop(x)), lambda: {"fc": dense(4, 2), "drop": nn.Dropout(0.9)}),
    Case("counter in a buffer", counting, lambda: {**layers(), "calls": torch.zeros(()), "scale": normal(5)}, rules=("linear", "affine")),
    Case("input detached and normalised", normalised, lambda: {"fc": dense(4, 2), "mean": normal(4), "std": normal(4)}),
    Case("detached frozen weight", lambda n, x: x @ n.F.detach() + n.fc(x), lambda: {"F": frozen(4, 3), "fc": dense(4, 3)}),
    Case("dead code", dead_code, lambda: {"fc": dense(4, 2), "kernel": normal(1, 1, 2)}, rules=("linear",)),
    Case("two inputs", lambda n, x, y: n.fc(x) + y, lambda: {"fc": dense(4, 2)}, ((4,), (2,))),
    Case("unused input", lambda n, x, y: n.fc(y), lambda: {"fc": dense(2, 3)}, ((4,), (2,)), rules=("linear",)),
    Case("keywords in another order", lambda n, b, a: n.fc(a) - b, lambda: {"fc": dense(4, 2)}, ((4,), (2,)), keys=("a", "b")),
    Case("dict output", lambda n, x: {"logits": n.fc(x), "loss": None}, lambda: {"fc": dense(4, 2)}, read_out=lambda z: z["logits"]),
    Case("tuple output", lambda n, x: (n.fc(x),), lambda: {"fc": dense(4, 2)}, read_out=lambda z: z[0]),
    # Forms that no native rule takes, or that put the examples on another axis.
    Case("transposed batch", lambda n, x: (n.W @ x.T).T, weights),
    Case("weight on the left", lambda n, x: n.W @ x[:, :, None], weights),
    Case("number read from a buffer", lambda n, x: x @ n.W * n.t.item(), lambda: {**weights(), "t": torch.ones(())}),
    Case("tensor of size N", lambda n, x: x @ n.W + torch.zeros(x.shape[0], 4, dtype=x.dtype), weights),
    Case("trained scale", lambda n, x: (x @ n.W) * n.b, weights),
    Case("trained shift", lambda n, x: torch.tanh(x @ n.W) + n.b, weights),
    Case("weight computed", lambda n, x: x @ (n.W / n.W.norm()), weights),
    Case("bias computed", lambda n, x: F.linear(x, n.W, 2 * n.b), weights),
    Case("detached weight", lambda n, x: x @ n.W.detach() + n.b, weights),
    Case("product of activations", lambda n, x: x * (x @ n.W), weights),
    Case("quotient of activations", lambda n, x: (x @ n.W) / x, weights),
    Case("bilinear", lambda n, x: (x @ n.W)[:, None] @ x[:, :, None], weights),
    Case("stack of weights", lambda n, x: x[:, None, None] @ n.S, lambda: {"S": par(2, 4, 4)}),
    Case("reciprocal", lambda n, x: 1 / (x @ n.W), weights),
    Case("outer sum", lambda n, x: (x @ n.W)[:, :, None] + x[:, None, :], weights),
    Case("sum with one column", lambda n, x: x @ n.W + x @ n.w, lambda: {**weights(), "w": par(4, 1)}),
    Case("broadcast by a constant", lambda n, x: (x @ n.w) * n.c, lambda: {"w": par(4, 1), "c": normal(4)}),
    Case("expand", lambda n, x: (x @ n.w).expand(-1, 4), lambda: {"w": par(4, 1)}),
    Case("slice", lambda n, x: (x @ n.W)[:, :2], weights),
    Case("permute", lambda n, x: n.fc(x).permute(0, 2, 1), lambda: {"fc": dense(4, 3)}, ((2, 4),)),
    Case("celu with alpha", lambda n, x: F.celu(x @ n.W, 0.5), weights),
    Case("elu with an input scale", lambda n, x: aten.elu(x @ n.W, 1.0, 1.0, 0.5), weights),
    Case("addmm with alpha", lambda n, x: torch.addmm(n.b, x, n.W, alpha=2), weights),
    Case("addmm of a column", lambda n, x: torch.addmm(x @ n.w, x, n.W), lambda: {**weights(), "w": par(4, 1)}),
    Case("parts of a split", lambda n, x: sum((x @ n.W).chunk(2, 1)), weights),
    Case("positions first", lambda n, x: n.fc(x.transpose(0, 1)).tanh().transpose(0, 1), lambda: {"fc": dense(4, 3)}, ((2, 4),)),
    Case(
        "heads folded in",
        lambda n, x: n.fc(x).view(-1, 2, 2).transpose(0, 1).reshape(2, -1, 1, 4).sum(0).squeeze(1),
        lambda: {"fc": dense(4, 4)},
        ((2, 4),),
    ),
    Case(
        "complex in between",
        lambda n, x: torch.fft.rfft(x @ n.W).abs() @ n.V,
        lambda: {**weights(), "V": par(3, 2)},
        rules=("linear", "generic", "linear"),
    ),
    Case(
        "complex constants",
        lambda n, x: torch.view_as_real(torch.view_as_complex((x @ n.W).view(-1, 2, 2)) * n.c).flatten(1),
        lambda: {**weights(), "c": torch.randn(2, dtype=torch.complex128)},
        rules=("linear", "view", "generic", "view"),
    ),
    Case(
        "complex inputs of a layer",
        lambda n, x: (torch.fft.fft(x) * n.fc(x)).abs(),
        lambda: {"fc": dense(4, 4)},
        rules=("linear", "generic"),
    ),
    Case("mixed axes in between", lambda n, x: (x @ n.W).T.reshape(2, -1).T.reshape(2, -1, 2).permute(1, 0, 2).flatten(1), weights),
    Case(
        "island of lower precision",
        lambda n, x: (x @ n.W).to(torch.bfloat16).float().double() @ n.W,
        weights,
        rules=("linear", "generic", "linear"),
    ),
    Case("nothing but the input", lambda n, x: x, rules=()),
]
