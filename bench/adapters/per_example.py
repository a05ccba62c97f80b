"""Per-example gradients through ``loss.backward()``: our adapters, the libraries themselves, and ``vmap``, taking turns in one run.

    python -m bench.adapters.per_example [--examples 256] [--seconds 10] [--threads 1]

Every contender is checked against a loop over examples first. Opacus and BackPACK take part where they are installed.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import influence_ext as ie
from bench.timing import interleave
from influence_ext.adapters import backpack as ours_backpack
from influence_ext.adapters import opacus as ours_opacus

Call = Callable[[], object]


def mlp() -> tuple[nn.Module, tuple[int, ...]]:
    """784-512-256-10."""
    return nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 10)), (784,)


def lenet() -> tuple[nn.Module, tuple[int, ...]]:
    """Two convolutions and three linear layers, in a form that BackPACK takes."""
    body = [nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    head = [nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)]
    return nn.Sequential(*body, *head), (1, 28, 28)


NETWORKS = {"mlp 784-512-256-10": mlp, "lenet": lenet}


def gradients(model: nn.Module, X: Tensor, y: Tensor) -> dict[str, Call]:
    """Ways to ``[N, *shape]`` gradients of every parameter (of the unreduced loss; BackPACK's are 1/N of it). Each returns the first's."""

    def wrapped(make: Callable[[nn.Module], nn.Module]) -> Call:
        module = make(copy.deepcopy(model))

        def call() -> Tensor:
            module.zero_grad(set_to_none=True)
            F.cross_entropy(module(X), y).backward()
            return next(module.parameters()).grad_sample

        return call

    calls = {"ours, GradSampleModule": wrapped(ours_opacus.GradSampleModule), "ours, BatchGrad": _backpack(ours_backpack, model, X, y)}
    calls["ours, per_example_grads"] = lambda: next(iter(ie.per_example_grads(model, nn.CrossEntropyLoss(), (X, y)).values()))
    out = torch.empty(len(X), sum(p.numel() for p in model.parameters()))
    calls["ours, per_example_grads(out=)"] = lambda: next(
        iter(ie.per_example_grads(model, nn.CrossEntropyLoss(), (X, y), out=out).values())
    )
    try:
        from opacus.grad_sample import GradSampleModule
    except ImportError:
        print("Opacus is not installed and does not take part.")
    else:
        calls["Opacus"] = wrapped(GradSampleModule)
        restore = ours_opacus.register_grad_samplers()
        samplers = dict(GradSampleModule.GRAD_SAMPLERS)
        restore()

        class OnOurKernels(GradSampleModule):
            GRAD_SAMPLERS = samplers

        calls["Opacus, our samplers"] = wrapped(OnOurKernels)
    if (peer := _peer()) is not None:
        calls["BackPACK"] = _backpack(peer, model, X, y)
    calls["vmap"] = _vmap(model, X, y)
    return calls


def squared_norms(model: nn.Module, X: Tensor, y: Tensor) -> dict[str, Call]:
    """Ways to the squared norm of every example's gradient by every parameter."""
    calls = {"ours, BatchL2Grad": _backpack(ours_backpack, model, X, y, "BatchL2Grad", "batch_l2")}
    if (peer := _peer()) is not None:
        calls["BackPACK"] = _backpack(peer, model, X, y, "BatchL2Grad", "batch_l2")
    return calls


def _peer() -> object | None:
    try:
        import backpack
        import backpack.extensions
    except ImportError:
        print("BackPACK is not installed and does not take part.")
        return None
    return backpack


def _backpack(library: object, model: nn.Module, X: Tensor, y: Tensor, extension: str = "BatchGrad", field: str = "grad_batch") -> Call:
    module, loss = library.extend(copy.deepcopy(model)), library.extend(nn.CrossEntropyLoss())  # type: ignore[attr-defined]
    wanted = getattr(getattr(library, "extensions", library), extension)

    def call() -> Tensor:
        module.zero_grad(set_to_none=True)
        with library.backpack(wanted()):  # type: ignore[attr-defined]
            loss(module(X), y).backward()
        return getattr(next(module.parameters()), field)

    return call


def _vmap(model: nn.Module, X: Tensor, y: Tensor) -> Call:
    values = {name: p.detach() for name, p in model.named_parameters()}

    def one(theta: dict[str, Tensor], x: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(model, theta, x[None]), t[None])

    every = torch.func.vmap(torch.func.grad(one), in_dims=(None, 0, 0))
    return lambda: next(iter(every(values, X, y).values()))


def oracle(model: nn.Module, X: Tensor, y: Tensor) -> Tensor:
    """``[N, *shape]`` for the first parameter, one example at a time, in float64."""
    model, first = copy.deepcopy(model).double(), []
    for x, t in zip(X.double(), y, strict=True):
        first.append(torch.autograd.grad(F.cross_entropy(model(x[None]), t[None]), next(model.parameters()))[0])
    return torch.stack(first)


def check(name: str, found: object, like: Tensor) -> None:
    """Raise unless a contender computes what it should, up to the scale it is documented with."""
    assert isinstance(found, Tensor)
    N = len(like)
    wanted = like / N if "BatchGrad" in name or name == "BackPACK" else like
    if found.dim() == 1:
        wanted = (like / N).flatten(1).square().sum(dim=1)
    error = float((found.double() - wanted).norm() / wanted.norm())
    if not error < 1e-4:
        raise AssertionError(f"{name}: expected gradients of single examples, got a relative error of {error:.1e}.")


def main() -> None:
    """Print a table for each network: median time relative to the fastest of our own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--examples", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=10.0, help="for each table")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name, make in NETWORKS.items():
        torch.manual_seed(0)
        model, shape = make()
        X, y = torch.randn(options.examples, *shape), torch.randint(0, 10, (options.examples,))
        like = oracle(model, X, y)
        for what, calls in (("gradients", gradients(model, X, y)), ("squared norms", squared_norms(model, X, y))):
            for contender, call in calls.items():
                check(contender, call(), like)
            timings = interleave(calls, seconds=options.seconds)
            best = min(timing.median for contender, timing in timings.items() if contender.startswith("ours"))
            print(f"\n{name}, N = {options.examples}, {options.threads} threads: {what}")
            for contender, timing in timings.items():
                spread = f"{timing.q1 / best:.2f} to {timing.q3 / best:.2f}"
                print(f"  {contender:32s} {timing.median / best:7.2f} x   ({spread}), {1e3 * timing.median:.2f} ms")


if __name__ == "__main__":
    main()
