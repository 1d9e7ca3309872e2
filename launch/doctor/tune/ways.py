"""Every way of the npu engine at every amount of scratch, beside Megatron's eager loss.

Seconds are medians of events behind a busy stream, forward and backward apart, of plain
cross-entropy in place. Each starts from the same logits, which a copy restores before.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from vocab_parallel_ce import cross_entropy
from vocab_parallel_ce.engines.npu import choice
from vocab_parallel_ce.launch.doctor.tune import megatron
from vocab_parallel_ce.launch.doctor.worker import in_one_line
from vocab_parallel_ce.launch.measuring.clock import steps_seconds
from vocab_parallel_ce.launch.measuring.logits import produced
from vocab_parallel_ce.launch.measuring.passes import time_pass
from vocab_parallel_ce.switches import SCRATCH_VARIABLE, WAY_VARIABLE, WAYS

SCRATCH_MIB = (32, 64, 96, 128, 192, 384)
QUICK_SCRATCH_MIB = (1, 64)
MEGATRON = "Megatron's eager loss"
WARM_UP = 2


@dataclass(frozen=True)
class Size:
    """Of the logits of one rank, and how often each is timed."""

    rows: int
    columns: int
    dtype: torch.dtype
    repeats: int


@dataclass(frozen=True)
class Timed:
    """One way at one amount of scratch; ``problem`` says why there are no seconds."""

    way: str
    scratch_mib: int | None
    forward_s: float | None = None
    backward_s: float | None = None
    problem: str = ""

    @property
    def total_s(self) -> float:
        return (self.forward_s or 0.0) + (self.backward_s or 0.0)


def time_ways(device: torch.device, size: Size, scratch: tuple[int, ...]) -> Iterator[Timed]:
    """Megatron's first, then each way; one that cannot run says why, once."""
    logits = Logits(device, size)
    yield _timed(MEGATRON, None, logits.time_megatron)
    for way in (word for word in WAYS if word != "auto"):
        problem = (
            "" if device.type == "npu" else f"needs an NPU; this is {device.type}"
        ) or _why_not(way, size.dtype)
        if problem:
            yield Timed(way, None, problem=problem)
            continue
        for mib in scratch:
            with variables({WAY_VARIABLE: way, SCRATCH_VARIABLE: str(mib)}):
                yield _timed(way, mib, logits.time_ours)


def _why_not(way: str, dtype: torch.dtype) -> str:
    return "" if way == "operator" else choice.why_not(way, dtype) or ""


@contextmanager
def variables(words: dict[str, str]) -> Iterator[None]:
    """Some variables of the environment for a while; the engine reads them at every call."""
    before = {name: os.environ.get(name) for name in words}
    os.environ.update(words)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _timed(way: str, mib: int | None, run: Callable[[], tuple[float, float]]) -> Timed:
    try:
        forward, backward = run()
    except Exception as problem:  # too little memory, an operator that is not there, anything
        return Timed(way, mib, problem=in_one_line(problem))
    return Timed(way, mib, forward, backward)


class Logits:
    """The tensors that all of them get."""

    def __init__(self, device: torch.device, size: Size) -> None:
        generator = torch.Generator().manual_seed(1)
        tile = torch.randn(min(64, size.rows), size.columns, generator=generator).mul_(2)
        tile = tile.to(device, size.dtype)  # repeated: what the numbers are changes no time
        self.device, self.size = device, size
        self.master = torch.empty(size.rows, size.columns, dtype=size.dtype, device=device)
        for rows in self.master.split(len(tile)):
            rows.copy_(tile[: len(rows)])
        self.buffer = self.master.clone()
        target = torch.randint(size.columns, (size.rows,), generator=generator)
        self.target = target.to(device)

    def time_ours(self) -> tuple[float, float]:
        """Seconds of forward and backward of this library's loss, in place."""

        def forward() -> Tensor:
            return cross_entropy(produced(self.buffer), self.target, inplace_backward=True)

        def run() -> tuple[float, float]:
            taken = time_pass(forward, self.device)
            return taken.forward, taken.backward

        return self._medians(run)

    def time_megatron(self) -> tuple[float, float]:
        """The same of Megatron's calls, without autograd between them."""
        up = torch.full((self.size.rows,), 1 / self.size.rows, device=self.device)

        def run() -> tuple[float, float]:
            saved: list[megatron.Saved] = []
            forward, backward = steps_seconds(
                self.device,
                lambda: saved.append(megatron.forward(self.buffer, self.target)[1]),
                lambda: megatron.backward(saved[0], up, self.size.dtype),
            )
            return forward, backward

        return self._medians(run)

    def _medians(self, run: Callable[[], tuple[float, float]]) -> tuple[float, float]:
        found = []
        for _ in range(WARM_UP + self.size.repeats):
            self.buffer.copy_(self.master)
            found.append(run())
        forward, backward = zip(*found[WARM_UP:], strict=True)
        return statistics.median(forward), statistics.median(backward)


def best(found: list[Timed]) -> Timed | None:
    """The fastest of ours, forward and backward together; None where nothing ran."""
    ours = [one for one in found if one.way != MEGATRON and not one.problem]
    return min(ours, key=lambda one: one.total_s, default=None)


def exports(chosen: Timed) -> list[str]:
    """The two lines that make a choice permanent."""
    return [
        f"export {WAY_VARIABLE}={chosen.way}",
        f"export {SCRATCH_VARIABLE}={chosen.scratch_mib}",
    ]
