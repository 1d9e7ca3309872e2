"""Forward and backward of a loss once, and a copy of the bytes that they go over."""

from __future__ import annotations

import gc
import resource
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vocab_parallel_ce.launch.measuring.clock import steps_seconds
from vocab_parallel_ce.launch.measuring.device import synchronize


@dataclass(frozen=True)
class Pass:
    """One forward and one backward: seconds each, and minor page faults of both together."""

    forward: float
    backward: float
    faults: int

    @property
    def total(self) -> float:
        return self.forward + self.backward


def time_pass(forward: Callable[[], Tensor], device: torch.device) -> Pass:
    """Time ``forward()`` and ``.backward()`` of what it returns.

    On a CPU by the monotonic clock, on an accelerator by events on its stream, which leaves the
    cost of waiting for the device out. The caller collects garbage and synchronises before.
    """
    losses: list[Tensor] = []
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    gc.disable()  # a collection that falls into one peer's run would be charged to it
    try:
        forward_s, backward_s = steps_seconds(
            device, lambda: losses.append(forward()), lambda: losses[0].backward()
        )
    finally:
        gc.enable()
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    return Pass(forward_s, backward_s, faults)


def time_copy(destination: Tensor, source: Tensor) -> float:
    """Seconds that ``destination.copy_(source)`` takes; it reads and writes the tensor once."""
    synchronize(destination.device)
    (seconds,) = steps_seconds(destination.device, lambda: destination.copy_(source))
    return seconds
