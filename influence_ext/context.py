"""What surrounds a computation and may not change it: autocast, torch.compile, other threads, and a fork that leaves threads behind."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

exclusive = threading.RLock()
"""Held for what torch cannot do in several threads at once: capturing, while torch.export has stand-ins in the model, reading a model that
another thread may be capturing, and forward-mode derivatives, whose levels belong to the process."""


def standalone(function: Callable[P, R]) -> Callable[P, R]:
    """A public entry point whose result depends on its arguments alone.

    Under ``torch.autocast`` it computes in the dtype of the parameters, as without; a compiled caller breaks its graph here, since what
    follows (kernels, captures, ``torch.func`` transforms) is not for TorchDynamo to trace. Gradients are never recorded in any case.

    Cost: about a microsecond.
    """
    untraced: list[Callable[P, R]] = []

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        body = function
        if "torch._dynamo" in sys.modules:  # not imported for its own sake: that takes a second
            if not untraced:
                untraced.append(torch.compiler.disable(function))
            body = untraced[0]
        casting = [device for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)]
        if not casting:
            return body(*args, **kwargs)
        with contextlib.ExitStack() as stack:
            for device in casting:
                stack.enter_context(torch.autocast(device, enabled=False))
            return body(*args, **kwargs)

    return call


_threads_started = False


def about_to_start_threads() -> None:
    """Note that this process has OpenMP threads if torch is allowed several."""
    global _threads_started
    _threads_started = _threads_started or torch.get_num_threads() > 1


def _after_fork() -> None:
    """A forked process lacks its parent's OpenMP threads, and a parallel region, torch's own too, would wait for them without end."""
    if _threads_started:
        torch.set_num_threads(1)


os.register_at_fork(after_in_child=_after_fork)
# Held during a fork: the child, which lacks the thread that may have held it, finds it free and every model as it is, not half captured.
os.register_at_fork(before=exclusive.acquire, after_in_parent=exclusive.release, after_in_child=exclusive.release)
