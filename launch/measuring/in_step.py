"""The time of one piece of a training step: the loss.

Forward is what runs inside `forward()`. Backward runs inside autograd's engine, so it is caught by
two tensor hooks: the one on the loss fires when its gradient is known, just before the first
backward node of the loss; the one on the logits fires when their gradient is complete. Between the
two autograd has nothing else to do, since the loss is all that hangs on the logits. An
accelerator's events are read once the step has ended. Time that a rank waits for a slower one
inside the loss counts as time of the loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from vocab_parallel_ce.launch.measuring.clock import Clock
from vocab_parallel_ce.launch.measuring.device import synchronize


class LossTimer:
    """Adds up the seconds spent in the loss; `take()` returns and clears them."""

    def __init__(self, device: torch.device) -> None:
        self.clock = Clock(device)
        self.spans: list[tuple[Any, Any]] = []

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Counts what runs inside."""
        begin = self.clock.mark()
        yield
        self.spans.append((begin, self.clock.mark()))

    def watch_backward(self, loss: Tensor, logits: Tensor) -> None:
        """Counts from the gradient of `loss` to the gradient of `logits`, in the next backward."""
        begin: list[Any] = []

        def loss_backward_begins(gradient: Tensor) -> None:
            begin.append(self.clock.mark())

        def loss_backward_ends(gradient: Tensor) -> None:
            self.spans.append((begin.pop(), self.clock.mark()))

        loss.register_hook(loss_backward_begins)
        logits.register_hook(loss_backward_ends)

    def take(self) -> float:
        """Seconds since the last call; waits for the device."""
        synchronize(self.clock.device)
        seconds = sum(self.clock.seconds(*span)[0] for span in self.spans)
        self.spans.clear()
        return float(seconds)
