"""The fused head by each of its ways, beside the three matrix products alone.

Seconds are medians of events behind a busy stream, forward and backward together. The mean loss
goes as ``gradient="auto"`` has it: by chunks with gradients in forward (three products), by the
fused operators with logits that are made again (four). Which is faster only a card says.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from vocab_parallel_ce import linear_cross_entropy
from vocab_parallel_ce.engines.npu.linear import choice
from vocab_parallel_ce.launch.doctor.tune.ways import WARM_UP, Size, variables
from vocab_parallel_ce.launch.doctor.worker import in_one_line
from vocab_parallel_ce.launch.measuring.clock import steps_seconds
from vocab_parallel_ce.switches import LINEAR_VARIABLE

PRODUCTS = "three products"
WIDTH, QUICK_WIDTH = 4096, 64
LOSSES = {"mean": "mean", "a loss per token": "none"}


@dataclass(frozen=True)
class Headed:
    """One way to one loss; ``problem`` says why there are no seconds."""

    way: str
    """of VOCAB_PARALLEL_CE_NPU_LINEAR, or the products alone"""
    loss: str
    seconds: float | None = None
    problem: str = ""


def time_head(device: torch.device, size: Size, width: int) -> Iterator[Headed]:
    """The products first, then each way with each loss."""
    tensors = Tensors(device, size, width)
    yield _timed(PRODUCTS, "", tensors.time_products)
    for way in ("chunks", "fused"):
        with variables({LINEAR_VARIABLE: way}):
            problem = "" if device.type == "npu" else f"needs an NPU; this is {device.type}"
            if way == "fused" and not problem:
                problem = _why_not(size, width)
            if problem:
                yield Headed(way, "", problem=problem)
                continue
            for loss in LOSSES:
                yield _timed(way, loss, partial(tensors.time_ours, LOSSES[loss]))


def _why_not(size: Size, width: int) -> str:
    try:
        return choice.why_not(size.dtype, width, size.columns, 1.0) or ""
    except RuntimeError as problem:
        return in_one_line(problem)


def _timed(way: str, loss: str, run: Callable[[], float]) -> Headed:
    try:
        return Headed(way, loss, run())
    except Exception as problem:  # too little memory, an operator that is not there, anything
        return Headed(way, loss, problem=in_one_line(problem))


class Tensors:
    """What all of them get: the hidden states, a head, and targets."""

    def __init__(self, device: torch.device, size: Size, width: int) -> None:
        generator = torch.Generator().manual_seed(1)

        def leaf(rows: int, share: float) -> Tensor:
            values = torch.randn(rows, width, generator=generator).mul_(share)
            return values.to(device, size.dtype).requires_grad_()

        self.device, self.size = device, size
        self.hidden, self.head = leaf(size.rows, 1.0), leaf(size.columns, width**-0.5)
        target = torch.randint(size.columns, (size.rows,), generator=generator)
        self.target = target.to(device)

    def time_ours(self, reduction: str) -> float:
        def step() -> None:
            loss = linear_cross_entropy(self.hidden, self.head, self.target, reduction=reduction)
            assert isinstance(loss, Tensor)
            loss.sum().backward()

        return self._median(step)

    def time_products(self) -> float:
        hidden, head = self.hidden.detach(), self.head.detach()

        def step() -> None:
            logits = hidden @ head.t()
            _ = logits @ head, logits.t() @ hidden

        return self._median(step)

    def _median(self, step: Callable[[], None]) -> float:
        found = []
        for _ in range(WARM_UP + self.size.repeats):
            self.hidden.grad = self.head.grad = None
            found += steps_seconds(self.device, step)
        return statistics.median(found[WARM_UP:])


def exports(found: list[Headed]) -> list[str]:
    """The line that makes the faster way of the mean permanent; none where one never ran."""
    mean = {one.way: one.seconds for one in found if one.loss == "mean" and one.seconds}
    if len(mean) < 2:
        return []
    faster = min(mean, key=lambda way: mean[way] or 0.0)
    return [f"export {LINEAR_VARIABLE}={'auto' if faster == 'fused' else faster}"]
