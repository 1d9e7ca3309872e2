"""Which loss a GPTModel calls, and what that call costs inside a training step."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from vocab_parallel_ce.launch.measuring.in_step import LossTimer
from vocab_parallel_ce.launch.measuring.memory import PeakMemory
from vocab_parallel_ce.parallel.megatron import install


class LossChoice(str, enum.Enum):
    """megatron and megatron-fused: Megatron-core's own two; ours: this library in their place."""

    megatron = "megatron"
    megatron_fused = "megatron-fused"
    ours = "ours"


@contextmanager
def loss_in_use(
    choice: LossChoice,
    model: Any,
    *,
    vocab_size: int,
    inplace: bool = True,
    z_loss: float = 0.0,
) -> Iterator[None]:
    """`model` (a bare GPTModel) computes its loss with `choice`, as long as the context lasts.

    Megatron's two are its own configuration. Ours is installed in their place: with the true
    `vocab_size`, beyond which the padding lies. `inplace` and `z_loss` are about ours alone.
    """
    config = model.config
    before = (config.cross_entropy_loss_fusion, config.cross_entropy_fusion_impl)
    config.cross_entropy_loss_fusion = choice is LossChoice.megatron_fused
    config.cross_entropy_fusion_impl = "native"
    try:
        if choice is not LossChoice.ours:
            yield
            return
        with install(vocab_size=vocab_size, inplace_backward=inplace, lse_square_scale=z_loss):
            yield
    finally:
        config.cross_entropy_loss_fusion, config.cross_entropy_fusion_impl = before


class LossMeter:
    """Seconds and peak memory of every call of the loss that a GPTModel makes in training.

    Forward and backward together: memory from the call to the gradient of the logits, beyond what
    was there when the model called it. Measuring waits for the device at every call.
    """

    def __init__(self, model: Any, device: torch.device) -> None:
        self.timer, self.device = LossTimer(device), device
        self.peaks: list[int | None] = []
        self.inner = model.compute_language_model_loss
        model.compute_language_model_loss = self._measured

    def _measured(self, labels: Tensor, logits: Tensor) -> Tensor:
        memory = PeakMemory(self.device)
        memory.start()
        with self.timer.forward():
            loss: Tensor = self.inner(labels, logits)
        if loss.requires_grad:
            self.timer.watch_backward(loss, logits)
            logits.register_hook(lambda _: self.peaks.append(memory.stop()))
        return loss

    def take(self) -> tuple[float, int | None]:
        """(seconds, bytes of the largest call) since the last time; None bytes if unknown."""
        known = [peak for peak in self.peaks if peak is not None]
        self.peaks.clear()
        return self.timer.take(), max(known, default=None)
