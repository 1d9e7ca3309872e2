"""Time and memory of one piece of a step: the loss.

Forward is what runs inside `forward()`. Backward runs inside autograd's engine, so it is caught by
two tensor hooks: the one on the loss fires when its gradient is known, just before the first
backward node of the loss; the one on the logits fires when their gradient is complete. Between the
two autograd has nothing else to do, since the loss is all that hangs on the logits. On a CPU the
marks are clock readings, on an accelerator events in its stream, read once the step has ended. Time
that a rank waits for a slower one inside the loss counts as time of the loss.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class LossTimer:
    """Adds up the seconds spent in the loss; `take()` returns and clears them."""

    def __init__(self, device: torch.device) -> None:
        self.module: Any = None if device.type == "cpu" else torch.get_device_module(device.type)
        self.spans: list[tuple[Any, Any]] = []

    def mark(self) -> Any:
        """A point in the device's work: seconds on a CPU, an event elsewhere."""
        if self.module is None:
            return time.perf_counter()
        event = self.module.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Counts what runs inside."""
        begin = self.mark()
        yield
        self.spans.append((begin, self.mark()))

    def watch_backward(self, loss: Tensor, logits: Tensor) -> None:
        """Counts from the gradient of `loss` to the gradient of `logits`, in the next backward."""
        begin: list[Any] = []

        def loss_backward_begins(gradient: Tensor) -> None:
            begin.append(self.mark())

        def loss_backward_ends(gradient: Tensor) -> None:
            self.spans.append((begin.pop(), self.mark()))

        loss.register_hook(loss_backward_begins)
        logits.register_hook(loss_backward_ends)

    def take(self) -> float:
        """Seconds since the last call; waits for the device."""
        if self.module is None:
            seconds = sum(end - begin for begin, end in self.spans)
        else:
            self.module.synchronize()
            seconds = sum(begin.elapsed_time(end) for begin, end in self.spans) / 1000
        self.spans.clear()
        return float(seconds)


class PeakMemory:
    """Extra memory at peak between `start()` and `stop()`, in bytes; None where it cannot be told.

    On a CPU: the kernel's high-water mark of resident memory, which Linux lets a process reset.
    """

    def __init__(self, device: torch.device) -> None:
        self.module: Any = None if device.type == "cpu" else torch.get_device_module(device.type)
        self.before: int | None = None

    def start(self) -> None:
        if self.module is not None:
            self.module.synchronize()
            self.module.reset_peak_memory_stats()
            self.before = int(self.module.memory_allocated())
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")  # 5: reset VmHWM to the present VmRSS
            self.before = _status_bytes("VmRSS")
        except OSError:
            self.before = None

    def stop(self) -> int | None:
        if self.before is None:
            return None
        if self.module is not None:
            return int(self.module.max_memory_allocated()) - self.before
        peak = _status_bytes("VmHWM")
        return None if peak is None else max(0, peak - self.before)


def _status_bytes(name: str) -> int | None:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return None
