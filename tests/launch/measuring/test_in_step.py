"""The timer of the loss inside a step."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from vocab_parallel_ce.launch.measuring.in_step import LossTimer


class _Slow(torch.autograd.Function):
    """The identity, after a sleep of so many seconds each way."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, forward: float, backward: float) -> Tensor:
        ctx.backward_seconds = backward
        time.sleep(forward)
        return values * 1

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        time.sleep(ctx.backward_seconds)
        return gradients[0], None, None


def test_the_timer_counts_the_loss_and_nothing_else() -> None:
    timer = LossTimer(torch.device("cpu"))
    slow: Any = _Slow.apply
    logits = slow(torch.ones(3, requires_grad=True), 0.5, 0.5)
    with timer.forward():
        loss = slow(logits, 0.02, 0.05).sum()
    timer.watch_backward(loss, logits)
    loss.backward()
    assert 0.07 <= timer.take() < 0.5
    assert timer.take() == 0.0
