"""What surrounds a computation and may not change it: autocast, torch.compile, other threads, a fork that leaves threads behind; and who
called, in whose name warnings are given.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

from influence_ext.errors import NumericalWarning

P = ParamSpec("P")
R = TypeVar("R")

exclusive = threading.RLock()
"""Held for what torch cannot do in several threads at once: capturing, while torch.export has stand-ins in the model, reading a model that
another thread may be capturing, and forward-mode derivatives, whose levels belong to the process."""
unforkable = threading.RLock()
"""Held inside of :data:`exclusive`, while torch or a model is changed for a time: a fork waits for it, since a child would keep the change.
Not while a user's data are read, for which the user may fork."""
FORK_WAITS_SECONDS = 10.0
"""At most: who holds :data:`unforkable` may be waiting for the very thread that forks."""

_has_computed = False


def standalone(function: Callable[P, R]) -> Callable[P, R]:
    """A public entry point whose result depends on its arguments alone.

    Under ``torch.autocast`` it computes in the dtype of the parameters, as without; a compiled caller breaks its graph here, since what
    follows (kernels, captures, ``torch.func`` transforms) is not for TorchDynamo to trace. Gradients are never recorded in any case.
    A process that has called one may have OpenMP threads, which its forks lack, whatever torch is allowed by then.

    Cost: about a microsecond.
    """
    untraced: list[Callable[P, R]] = []

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        global _has_computed
        _has_computed = True
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


def warn(message: str) -> None:
    """Give a :class:`NumericalWarning` at the line that called this package: the first outside of it and of torch, whose decorators are
    between the two. (``skip_file_prefixes`` does that from Python 3.12 on.)
    """
    level, frame = 2, sys._getframe(1)
    while frame.f_globals.get("__name__", "").partition(".")[0] in ("influence_ext", "torch") and frame.f_back is not None:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, NumericalWarning, stacklevel=level)


class _Fork(threading.local):
    """Of this thread: whether it has waited for :data:`unforkable`, or held it already."""

    waits = False


_fork = _Fork()


def _before_fork() -> None:
    """Wait for :data:`unforkable`, on after a signal too: Python tells what a handler raises here and goes on with the fork."""
    _fork.waits = not unforkable._is_owned()  # type: ignore[attr-defined]
    end, raised = time.monotonic() + FORK_WAITS_SECONDS, None
    while _fork.waits and not unforkable._is_owned():  # type: ignore[attr-defined]
        try:
            if not unforkable.acquire(timeout=max(0.0, end - time.monotonic())):
                break
        except BaseException as reason:
            raised = reason
    if raised is not None:
        raise raised


def _after_fork() -> None:
    """In both processes. What this thread held before the fork it holds, in both."""
    if _fork.waits and unforkable._is_owned():  # type: ignore[attr-defined]  # not after a wait that was too long
        unforkable.release()


def _after_fork_in_child() -> None:
    """Locks of threads that a forked process lacks are free.

    It also lacks its parent's OpenMP threads, and a parallel region, torch's own too, would wait for them without end.
    """
    _after_fork()
    for lock in (exclusive, unforkable):
        if not lock._is_owned():  # type: ignore[attr-defined]
            lock._at_fork_reinit()  # type: ignore[attr-defined]
    if _has_computed:
        torch.set_num_threads(1)


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child)
