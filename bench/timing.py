"""Timing: contenders take turns, so that whatever else the machine does hits all of them alike."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Timing:
    """Seconds per call over ``samples`` turns, each the mean of ``calls_per_sample`` calls."""

    median: float
    q1: float
    q3: float
    best: float
    samples: int
    calls_per_sample: int


def interleave(
    calls: dict[str, Callable[[], Any]],
    *,
    seconds: float = 20.0,
    min_sample: float = 0.02,
    min_rounds: int = 5,
    max_rounds: int = 40,
    clock: Callable[[], float] = time.perf_counter,
    wait: Callable[[], None] = lambda: None,
    known: dict[str, float] | None = None,
) -> dict[str, Timing]:
    """Time the calls in turn, A B C A B C ..., for about ``seconds`` altogether.

    Args:
        calls: Contenders by name, each already warm.
        seconds: Budget of all rounds together; ``min_rounds`` are done in any case.
        min_sample: Short calls are repeated within a turn until it takes this long.
        min_rounds: Fewest turns each.
        max_rounds: Most turns each.
        clock: The time source.
        known: Seconds of a call, of those that need not be tried for their length.
        wait: Returns when what the calls have started is done; asked once before and after each turn.
    """
    repeats: dict[str, int] = {}
    round_seconds = 0.0
    for name, call in calls.items():
        duration = (known or {}).get(name) or _warm(call, min_sample, clock, wait)
        repeats[name] = max(1, math.ceil(min_sample / duration))
        round_seconds += duration * repeats[name]
    rounds = min(max_rounds, max(min_rounds, round(seconds / round_seconds)))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, call in calls.items():
                samples[name].append(_time(call, repeats[name], clock, wait) / repeats[name])
            gc.collect()
    finally:
        if collecting:
            gc.enable()
    return {name: summarise(values, repeats[name]) for name, values in samples.items()}


def summarise(values: list[float], calls_per_sample: int) -> Timing:
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return Timing(median, q1, q3, min(values), len(values), calls_per_sample)


def _warm(call: Callable[[], Any], min_sample: float, clock: Callable[[], float], wait: Callable[[], None]) -> float:
    """Seconds of a call among others of its kind. The first after something else says little: it may take a hundred times as long."""
    _time(call, 1, clock, wait)
    repeats = 1
    while (seconds := _time(call, repeats, clock, wait)) < min_sample:
        repeats *= 2
    return max(seconds / repeats, 1e-7)


def _time(call: Callable[[], Any], repeats: int, clock: Callable[[], float], wait: Callable[[], None]) -> float:
    wait()
    start = clock()
    for _ in range(repeats):
        call()
    wait()
    return clock() - start
