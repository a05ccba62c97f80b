"""Networks of the command line: built-in multilayer perceptrons, or whatever a user's factory makes."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from influence_ext.errors import ArgumentError, DataError

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "sigmoid": nn.Sigmoid,
    "elu": nn.ELU,
    "softplus": nn.Softplus,
    "leaky_relu": nn.LeakyReLU,
}


def mlp(sizes: Sequence[int], activation: str) -> nn.Sequential:
    """Linear layers of ``sizes`` with ``activation`` between them."""
    layers: list[nn.Module] = []
    for num_inputs, num_outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(num_inputs, num_outputs), ACTIVATIONS[activation]()]
    return nn.Sequential(*layers[:-1])


def load_factory(spec: str) -> Callable[[], nn.Module]:
    """The function named by ``FILE.py:NAME`` or ``package.module:NAME``. Runs that file's code.

    Raises:
        ArgumentError: no such file, module or name, or not callable.
    """
    where, separator, name = spec.rpartition(":")
    if not separator or not where or not name:
        raise ArgumentError(
            f"--model: expected FILE.py:FACTORY or package.module:FACTORY, got {spec!r}; name a function that returns the network."
        )
    if where.endswith(".py"):
        path = Path(where)
        if not path.is_file():
            raise ArgumentError(f"--model: expected a Python file, got {where!r}, which does not exist; check the path.")
        module_spec = importlib.util.spec_from_file_location(path.stem, path)
        assert module_spec is not None
        assert module_spec.loader is not None
        module: Any = importlib.util.module_from_spec(module_spec)
        sys.modules.setdefault(path.stem, module)
        module_spec.loader.exec_module(module)
    else:
        try:
            module = importlib.import_module(where)
        except ModuleNotFoundError as reason:
            raise ArgumentError(
                f"--model: expected an importable module, got {where!r} ({reason}); check its name and PYTHONPATH."
            ) from reason
    factory = getattr(module, name, None)
    if not callable(factory):
        raise ArgumentError(f"--model: expected a function {name!r} in {where}, found {type(factory).__name__}; define it there.")
    return factory


def build(factory: Callable[[], nn.Module], checkpoint: str | None, dtype: torch.dtype) -> nn.Module:
    """The factory's network with the parameters of ``checkpoint``, in evaluation mode.

    Raises:
        ArgumentError: the factory returns something else, or the checkpoint does not fit.
        DataError: the checkpoint cannot be read.
    """
    model = factory()
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"--model: expected the factory to return an nn.Module, got {type(model).__name__}; return the network.")
    if checkpoint is not None:
        state = _torch_load(checkpoint, "--checkpoint")
        if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
            state = state["state_dict"]
        try:
            model.load_state_dict(state)
        except (RuntimeError, TypeError, AttributeError) as reason:
            raise ArgumentError(f"--checkpoint: expected a state_dict of the factory's network, got {checkpoint!r}: {reason}") from reason
    return model.to(dtype).eval()


def load_arrays(path: str, option: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``(X, y)`` from an ``.npz`` file with arrays X and y, or a ``.pt`` file with a pair or a dict of them.

    Real numbers are converted to ``dtype``; whole-numbered targets stay class indices.

    Raises:
        DataError: the file cannot be read or holds something else.
    """
    if path.endswith(".npz"):
        import numpy as np

        try:
            with np.load(path, allow_pickle=False) as file:
                found: Any = {key: torch.from_numpy(file[key]) for key in file.files}
        except (OSError, ValueError) as reason:
            raise DataError(f"{option}: expected an .npz file with arrays X and y, got {path!r} ({reason}); check the path.") from reason
    elif path.endswith((".pt", ".pth")):
        found = _torch_load(path, option)
    else:
        raise DataError(
            f"{option}: expected a file ending in .npz, .pt or .pth, got {path!r}; save X and y with numpy.savez or torch.save."
        )
    if isinstance(found, dict) and {"X", "y"} <= found.keys():
        found = (found["X"], found["y"])
    if not (isinstance(found, (tuple, list)) and len(found) == 2 and all(isinstance(t, Tensor) for t in found)):
        content = sorted(found) if isinstance(found, dict) else type(found).__name__
        raise DataError(
            f"{option}: expected X and y (a dict of tensors, or a pair), got {content} in {path!r}; save them under these names."
        )
    X, y = found
    X = X.to(dtype) if X.is_floating_point() else X
    return X, y.to(dtype) if y.is_floating_point() else y.long()


def _torch_load(path: str, option: str) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as reason:  # torch.load raises a dozen unrelated types
        text = str(reason).strip().splitlines()[0]
        raise DataError(
            f"{option}: expected a file of tensors written by torch.save, got {path!r} ({text}); save plain tensors."
        ) from reason
