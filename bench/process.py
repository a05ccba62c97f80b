"""A function in a process of its own, so that no case inherits another's heap, thread pools or crash."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

PRELOADED = ["bench.measure", "curvlinops", "backpack.extensions", "opacus.grad_sample"]
"""Imported once, by the server that the processes are forked from; what is not installed is passed over."""


class ProcessFailure(RuntimeError):
    """The function raised, its process died, or it took too long."""


def isolated(function: Callable[..., Any], *args: Any, timeout: float) -> Any:
    """``function(*args)``, both picklable, in a new process.

    Raises:
        ProcessFailure: with the reason in one line.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, function, args))
    process.start()
    sender.close()
    try:
        if not receiver.poll(timeout):
            raise ProcessFailure(f"took longer than {timeout:.0f} s")
        succeeded, value = receiver.recv()
    except EOFError:
        process.join()
        raise ProcessFailure(f"its process ended with exit code {process.exitcode}") from None
    finally:
        receiver.close()
        process.kill()
        process.join()
    if not succeeded:
        raise ProcessFailure(value)
    return value


def _answer(sender: Connection, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C reaches the parent too, which alone tells of it
    try:
        answer = True, function(*args)
    except Exception as problem_found:
        answer = False, one_line(problem_found)
    sender.send(answer)


def one_line(problem_found: BaseException) -> str:
    """``"ValueError: its first line"``."""
    return f"{type(problem_found).__name__}: {next(iter(str(problem_found).strip().splitlines()), '')}"
