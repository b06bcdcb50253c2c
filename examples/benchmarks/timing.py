"""Seconds of several ways to do the same: medians over turns, one of each in every turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

#: Seconds below which one call says little.
_SHORT = 0.02


def medians(
    timed: Mapping[str, Callable[[], object]],
    turns: int,
    clock: Callable[[], float] = time.process_time,
    *,
    calls: int = 1,
    again: bool = False,
) -> dict[str, float]:
    """Median seconds of each, after two calls that do not count.

    Args:
        timed: name -> what to call.
        turns: of all.
        clock: processor time, which other work on the machine hardly touches, or another one.
        calls: in a turn, of those that take below 20 ms.
        again: call each once more before a call that counts, which then finds its own memory and
            not that of the one before.
    """
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    counts = {}
    for name, function in timed.items():
        function()
        start = time.perf_counter()
        function()
        counts[name] = calls if time.perf_counter() - start < _SHORT else 1
    for _ in range(turns):
        for name, function in timed.items():
            for _ in range(counts[name]):
                if again:
                    function()
                start = clock()
                function()
                seconds[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def synchronised(function: Callable[[], object]) -> Callable[[], None]:
    """A call that waits for the GPU."""

    def run() -> None:
        function()
        torch.cuda.synchronize()

    return run
