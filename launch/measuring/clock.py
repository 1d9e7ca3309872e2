"""Points in a device's work, and the seconds between them.

On a CPU a mark is a reading of the monotonic clock. On an accelerator it is an event in its stream,
which the device reaches later: the host's own waiting is left out.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch

from vocab_parallel_ce.launch.measuring.device import device_module, hold, synchronize


class Clock:
    """The clock of one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def mark(self) -> Any:
        """A point in the device's work."""
        if self.device.type == "cpu":
            return time.perf_counter()
        event = device_module(self.device).Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, *marks: Any) -> list[float]:
        """Between each mark and the next; the caller has synchronised since the last of them."""
        pairs = pairwise(marks)
        if self.device.type == "cpu":
            return [end - begin for begin, end in pairs]
        return [begin.elapsed_time(end) / 1e3 for begin, end in pairs]


def steps_seconds(device: torch.device, *steps: Callable[[], object]) -> list[float]:
    """Seconds of each of some steps that follow each other; an accelerator is kept busy before."""
    clock = Clock(device)
    hold(device)
    marks = [clock.mark()]
    for step in steps:
        step()
        marks.append(clock.mark())
    synchronize(device)
    return clock.seconds(*marks)


def wall_seconds(run: Callable[[], object], device: torch.device) -> float:
    """Seconds on the host's clock until ``run`` has ended on the device as well.

    What ``run`` returns is given back within them: for a fresh tensor that is part of its cost.
    """
    started = time.perf_counter()
    kept = run()
    del kept
    synchronize(device)
    return time.perf_counter() - started
