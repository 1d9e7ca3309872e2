"""How fast collectives, forward and backward are here, beside a copy of the same bytes.

An element of the logits must move at least three times: it is read in forward, read and written in
backward. So with b bytes of logits a rank,

    share of the copy bandwidth = (3 b / seconds of forward + backward) / (2 b / seconds of a copy)

and for forward alone b, for backward alone 2 b. The copy is of the same tensor, in the same run,
before every timed pass (it undoes what an in-place backward wrote). A run takes as long as its
slowest rank; medians over runs are reported.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from vocab_parallel_ce import cross_entropy
from vocab_parallel_ce.collectives import Payload, all_gather_flat
from vocab_parallel_ce.engines import engine_name, select
from vocab_parallel_ce.header import HEADER_INTS
from vocab_parallel_ce.launch.doctor.cases import Place
from vocab_parallel_ce.launch.doctor.environment import DTYPES
from vocab_parallel_ce.launch.doctor.ranks import Outcome, Ranks
from vocab_parallel_ce.launch.doctor.selftest import Tell
from vocab_parallel_ce.launch.measuring.collectives import PARTIALS, time_collective
from vocab_parallel_ce.launch.measuring.device import synchronize
from vocab_parallel_ce.launch.measuring.logits import produced
from vocab_parallel_ce.launch.measuring.memory import exact_peaks, peak_extra, settle_malloc
from vocab_parallel_ce.launch.measuring.passes import time_copy, time_pass
from vocab_parallel_ce.launch.measuring.rounds import slowest

TIMED_DTYPES = ("fp32", "bf16", "fp16")
PASSES = 3  # over the logits: read; read and write
WARM_UP = 2
TILE = 64  # rows


@dataclass(frozen=True)
class Sizes:
    rows: int
    vocab: int
    """of all ranks together"""
    repeats: int


@dataclass(frozen=True)
class Raw:
    """What one rank measured: seconds of every run, and bytes."""

    forward: list[float]
    backward: list[float]
    copy: list[float]
    peak: int | None


@dataclass(frozen=True)
class PassTiming:
    """The loss at one dtype, merged over ranks; the figures are absent where it failed."""

    dtype: str
    inplace: bool
    engine: str
    problems: list[str] = field(default_factory=list)
    forward_s: float | None = None
    backward_s: float | None = None
    copy_bytes_per_s: float | None = None
    """read and written, of all ranks together"""
    moved_bytes: int | None = None
    """a rank, forward and backward"""
    share: float | None = None
    forward_share: float | None = None
    backward_share: float | None = None
    peak_bytes: int | None = None
    """beyond what was allocated before, the gradient included; of the rank with most"""


@dataclass(frozen=True)
class CollectiveTiming:
    """One collective, merged over ranks."""

    name: str
    sent_bytes: int | None = None
    """by a rank"""
    received_bytes: int | None = None
    """by a rank: what its result holds"""
    seconds: float | None = None
    bytes_per_s: float | None = None
    """received / seconds"""
    problems: list[str] = field(default_factory=list)


def _align(place: Place) -> None:
    """Ranks begin together; a collective of the work's own group, so that nothing else is mixed."""
    if place.group is not None:
        dist.all_reduce(torch.zeros(1, device=place.device), group=place.group)
    synchronize(place.device)


# --- the loss ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timed:
    """Which loss is timed."""

    dtype: str
    inplace: bool
    engine: str


def timed(device: torch.device) -> list[Timed]:
    """What is timed on this device: its own engine, and the eager one that it must be worth."""
    found = []
    for name in TIMED_DTYPES:
        sample = torch.empty(1, 1, dtype=DTYPES[name], device=device)
        engine = engine_name(select("auto", sample))
        found += [Timed(name, True, engine), Timed(name, False, engine)]
        if engine != "eager":
            found.append(Timed(name, True, "eager"))
    return found


def _time_loss(place: Place, sizes: Sizes, what: Timed) -> Raw:
    """On this rank: logits like a head's, of which each rank holds its columns."""
    columns, dtype = sizes.vocab // place.world, DTYPES[what.dtype]
    generator = torch.Generator().manual_seed(1 + place.rank)
    tile = torch.randn(min(TILE, sizes.rows), columns, generator=generator).mul_(2)
    tile = tile.to(place.device, dtype)  # repeated: what the numbers are does not change the time
    master = torch.empty(sizes.rows, columns, dtype=dtype, device=place.device)
    for rows in master.split(len(tile)):
        rows.copy_(tile[: len(rows)])
    buffer = master.clone()
    everywhere = torch.Generator().manual_seed(7)
    target = torch.randint(columns * place.world, (sizes.rows,), generator=everywhere)
    target = target.to(place.device)

    def forward() -> Tensor:
        logits = produced(buffer)
        return cross_entropy(
            logits,
            target,
            group=place.group,
            inplace_backward=what.inplace,
            engine=what.engine,
        )

    def both() -> None:
        forward().backward()

    settle_malloc(strict=False)
    raw = Raw([], [], [], None)
    for run in range(WARM_UP + sizes.repeats):
        copied = time_copy(buffer, master)
        _align(place)
        taken = time_pass(forward, place.device)
        if run >= WARM_UP:
            raw.copy.append(copied)
            raw.forward.append(taken.forward)
            raw.backward.append(taken.backward)
    peaks: list[int | None] = []
    with exact_peaks():
        for _ in range(2):  # the first one warms up under the new setting
            time_copy(buffer, master)
            _align(place)
            peaks.append(peak_extra(both, place.device))
    return Raw(raw.forward, raw.backward, raw.copy, peaks[-1])


def _slowest(ranks: list[list[float]]) -> float | None:
    """Median over runs of the slowest rank; None where the device's clock stands still."""
    median = statistics.median(slowest(ranks))
    return median if median > 0 else None


def merge_pass(what: Timed, sizes: Sizes, world: int, outcomes: list[Outcome[Raw]]) -> PassTiming:
    """The numbers of all ranks as one."""
    problems = [f"rank {rank}: {o.error}" for rank, o in enumerate(outcomes) if o.error]
    raws = [outcome.value for outcome in outcomes if outcome.value is not None]
    if problems or not raws:
        return PassTiming(what.dtype, what.inplace, what.engine, problems)
    size = sizes.rows * (sizes.vocab // world) * DTYPES[what.dtype].itemsize
    forward, backward = _slowest([r.forward for r in raws]), _slowest([r.backward for r in raws])
    both = _slowest([[f + b for f, b in zip(r.forward, r.backward, strict=True)] for r in raws])
    copy = _slowest([r.copy for r in raws])
    peaks = [r.peak for r in raws if r.peak is not None]

    def share(passes: int, seconds: float | None) -> float | None:
        return passes / seconds * copy / 2 if seconds and copy else None

    return PassTiming(
        what.dtype,
        what.inplace,
        what.engine,
        forward_s=forward,
        backward_s=backward,
        copy_bytes_per_s=2 * size * world / copy if copy else None,
        moved_bytes=PASSES * size,
        share=share(PASSES, both),
        forward_share=share(1, forward),
        backward_share=share(2, backward),
        peak_bytes=max(peaks) if len(peaks) == len(raws) else None,
    )


# --- collectives ------------------------------------------------------------------------------


@dataclass(frozen=True)
class RawCollective:
    """What one rank measured."""

    sent: int
    received: int
    seconds: list[float]


COLLECTIVES = ("all_gather", "all_reduce, MAX", "all_reduce, SUM")


def _time_collective(place: Place, name: str, rows: int, repeats: int) -> RawCollective:
    """One that a loss of ``rows`` rows issues: seconds until this rank holds the result."""
    world, group, op = place.world, place.group, dist.ReduceOp
    call: Callable[[], object]
    if name == "all_gather":
        payload = Payload.allocate(PARTIALS, rows, torch.float32, place.device).buffer.zero_()
        received = payload.new_zeros(world * payload.numel())
        sent, call = payload.nbytes, lambda: all_gather_flat(received, payload, group)
    elif name == "all_reduce, MAX":
        received = torch.zeros(rows, device=place.device)
        sent, call = received.nbytes, lambda: dist.all_reduce(received, op.MAX, group=group)
    else:
        headers = world * 2 * HEADER_INTS
        received = torch.zeros((PARTIALS - 1) * rows + headers, device=place.device)
        sent, call = received.nbytes, lambda: dist.all_reduce(received, op.SUM, group=group)
    times = time_collective(call, partial(_align, place), place.device, repeats, WARM_UP)
    return RawCollective(sent, received.nbytes, times)


# --- all of it --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Speed:
    passes: list[PassTiming]
    collectives: list[CollectiveTiming]


def run_speed(ranks: Ranks, place: Place, sizes: Sizes, tell: Tell) -> Speed:
    """Every timing, on all ranks together, as long as they are in step."""
    gc.collect()
    gc.freeze()  # what the libraries left behind is not searched again before every peak
    try:
        return _run_speed(ranks, place, sizes, tell)
    finally:
        gc.unfreeze()


def _run_speed(ranks: Ranks, place: Place, sizes: Sizes, tell: Tell) -> Speed:
    collectives, passes = [], []
    sent = [(name, rows) for rows in (1, sizes.rows) for name in COLLECTIVES]
    for name, rows in sent if place.world > 1 else []:
        tell(f"timing {name}", 1)
        if not ranks.broken:
            collectives.append(_collective(ranks, place, name, rows, 4 * sizes.repeats))
    for what in timed(place.device):
        tell(f"timing {what.dtype}, {what.engine}", 1)
        if not ranks.broken:
            outcomes = ranks.run(partial(_time_loss, place, sizes, what))
            passes.append(merge_pass(what, sizes, place.world, outcomes))
    return Speed(passes, collectives)


def _collective(ranks: Ranks, place: Place, name: str, rows: int, repeats: int) -> CollectiveTiming:
    title = f"{name}, {rows} row{'s' if rows > 1 else ''}"
    outcomes = ranks.run(lambda: _time_collective(place, name, rows, repeats))
    problems = [f"rank {rank}: {o.error}" for rank, o in enumerate(outcomes) if o.error]
    raws = [outcome.value for outcome in outcomes if outcome.value is not None]
    if problems or not raws:
        return CollectiveTiming(title, problems=problems)
    seconds = _slowest([raw.seconds for raw in raws])
    rate = raws[0].received / seconds if seconds else None
    return CollectiveTiming(title, raws[0].sent, raws[0].received, seconds, rate)
