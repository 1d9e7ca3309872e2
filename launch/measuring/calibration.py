"""What a machine gives to all ranks at once: the figures that the cost model needs of a CPU.

Every measurement begins at a barrier and runs on all ranks together, because that is how the loss
runs: cores and memory are shared, and each rank gets what is left. A rank reports a median of its
own; the slowest rank counts, and a rate of the machine is that of the slowest times the ranks.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist

from vocab_parallel_ce.collectives import all_gather_flat
from vocab_parallel_ce.engines import select
from vocab_parallel_ce.engines.contract import Coefficients, Wanted
from vocab_parallel_ce.launch.measuring.clock import wall_seconds
from vocab_parallel_ce.launch.measuring.collectives import time_collective
from vocab_parallel_ce.launch.measuring.device import MIB
from vocab_parallel_ce.launch.measuring.rounds import repeated

FIRST_TOUCH_BYTES = 64 * MIB  # above what malloc keeps, see memory.settle_malloc
IN_CACHE = (64, 256)  # rows of COLUMNS a thread: 1 and 4 MiB of fp32, within a server's caches
COLUMNS = 4096
CALLS = 50  # of a rate: long enough for ranks that share a core to take turns
LINK_BYTES = 4 * MIB
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Calibration:
    """Of all ranks together: bytes and elements a second; latencies in seconds."""

    first_touch: float | None
    """None where fresh memory costs no more than touched"""
    rates: dict[str, float]
    gather_latency: float
    reduce_latency: float
    link_bandwidth: float
    """these three are 0 on one rank, which has no link"""


def _median(run: Callable[[], object], barrier: Callable[[], None], repeats: int) -> float:
    """Median seconds of ``run`` on this rank, all ranks beginning together."""
    return statistics.median(repeated(partial(wall_seconds, run, _CPU), barrier, repeats))


def _first_touch(barrier: Callable[[], None], repeats: int) -> float:
    """Seconds a byte that memory costs more when it is fresh: its pages, and giving them back."""
    kept = torch.empty(FIRST_TOUCH_BYTES, dtype=torch.uint8)
    touched = _median(lambda: kept.zero_(), barrier, repeats)
    fresh = _median(
        lambda: torch.empty(FIRST_TOUCH_BYTES, dtype=torch.uint8).zero_(), barrier, repeats
    )
    return max(fresh - touched, 0.0) / FIRST_TOUCH_BYTES


def _seconds(
    rows: int, dtype: torch.dtype, barrier: Callable[[], None], repeats: int
) -> dict[str, float]:
    """CALLS calls on [rows, COLUMNS] each: torch's exp and max in fp32, and the engine's two
    functions on logits of ``dtype``."""
    wide = torch.randn(rows, COLUMNS)
    out = torch.empty_like(wide)
    logits = wide.to(dtype)
    engine = select("auto", logits)
    target = torch.zeros(rows, dtype=torch.int64)
    parts = torch.empty(3, rows)
    gradient = torch.empty_like(logits)
    ones = torch.ones(rows)
    engine.partials(logits, target, None, 1.0, 0.0, Wanted(), parts)  # the gradient needs m and s

    def backward() -> None:
        coefficients = Coefficients(ones, ones)
        engine.gradient(logits, parts[0], parts[1], target, coefficients, None, 1.0, 0.0, gradient)

    calls: dict[str, Callable[[], object]] = {
        "exp": lambda: torch.exp(wide, out=out),
        "max": lambda: torch.max(wide, dim=-1),
        "partials": lambda: engine.partials(logits, target, None, 1.0, 0.0, Wanted(), parts),
        "gradient": backward,
    }

    def many(call: Callable[[], object]) -> None:
        for _ in range(CALLS):
            call()

    return {name: _median(lambda c=call: many(c), barrier, repeats) for name, call in calls.items()}  # type: ignore[misc]


def _rates(dtype: torch.dtype, barrier: Callable[[], None], repeats: int) -> dict[str, float]:
    """Elements a second of each of them, from what more rows add.

    A call's own cost is left out: waking threads takes as long as this work, and the loss of real
    logits does it once.
    """
    few_rows, many_rows = (rows * torch.get_num_threads() for rows in IN_CACHE)
    few = _seconds(few_rows, dtype, barrier, repeats)
    many = _seconds(many_rows, dtype, barrier, repeats)
    added = CALLS * (many_rows - few_rows) * COLUMNS
    return {name: added / max(many[name] - few[name], 1e-9) for name in many}


def _collectives(
    group: dist.ProcessGroup, barrier: Callable[[], None], repeats: int
) -> tuple[float, float, float]:
    """Latency of a small all_gather and all_reduce, and bytes a second over a rank's link."""
    world = group.size()
    if world == 1:
        return 0.0, 0.0, 0.0

    def gather(size: int) -> Callable[[], object]:
        mine = torch.zeros(size // 4, dtype=torch.int32)
        every = torch.zeros(world * len(mine), dtype=torch.int32)
        return lambda: all_gather_flat(every, mine, group)

    def median(call: Callable[[], object], rounds: int) -> float:
        return statistics.median(time_collective(call, barrier, _CPU, rounds))

    row = torch.zeros(1)
    small = median(gather(64), 3 * repeats)
    large = median(gather(LINK_BYTES), repeats)
    reduce = median(lambda: dist.all_reduce(row, group=group), 3 * repeats)
    link = (world - 1) * LINK_BYTES / max(large - small, 1e-9)
    return small, reduce, link


Measured = tuple[float, dict[str, float], tuple[float, float, float]]


def calibrate(
    group: dist.ProcessGroup,
    dtype: torch.dtype,
    repeats: int,
    gather: Callable[[Measured], list[Measured]],
) -> Calibration:
    """Measure on CPU, on every rank of ``group`` at once; ``dtype`` is that of the logits.

    ``gather`` returns what it is given, of every rank. The result is the same on all ranks.
    """

    def barrier() -> None:
        dist.barrier(group)

    world = group.size()
    every = gather(
        (
            _first_touch(barrier, repeats),
            _rates(dtype, barrier, repeats),
            _collectives(group, barrier, repeats),
        )
    )
    slowest = max(touch for touch, _, _ in every)
    return Calibration(
        first_touch=world / slowest if slowest else None,
        rates={name: world * min(rates[name] for _, rates, _ in every) for name in every[0][1]},
        gather_latency=max(gathered for _, _, (gathered, _, _) in every),
        reduce_latency=max(reduced for _, _, (_, reduced, _) in every),
        link_bandwidth=min(link for _, _, (_, _, link) in every),
    )
