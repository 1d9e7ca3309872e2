"""The selftest from joining the ranks to the exit status."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import NoReturn

from vocab_parallel_ce.launch.alike import require_alike
from vocab_parallel_ce.launch.doctor.cases import Place
from vocab_parallel_ce.launch.doctor.findings import Environment
from vocab_parallel_ce.launch.doctor.ranks import GRACE, Ranks
from vocab_parallel_ce.launch.doctor.report import as_json, write_json
from vocab_parallel_ce.launch.doctor.results import Selftest, compare_environments, print_selftest
from vocab_parallel_ce.launch.doctor.scrub import Names
from vocab_parallel_ce.launch.doctor.selftest import Verdict, plan, run_checks
from vocab_parallel_ce.launch.doctor.speed import COLLECTIVES, Sizes, Speed, run_speed, timed
from vocab_parallel_ce.launch.doctor.worker import in_one_line
from vocab_parallel_ce.launch.measuring.collectives import count_collectives
from vocab_parallel_ce.launch.refusal import FAILED, Refusal
from vocab_parallel_ce.launch.terminal import progress, ranks_in_words
from vocab_parallel_ce.parallel.groups import ParallelGroups

Shape = tuple[int, int]  # rows and vocabulary
LAST_WORDS = 2.0
"""Seconds that a rank waits before it leaves with an error: torchrun then ends the others, and each
of them shall have said what it has to say."""


def shape_of_checks(quick: bool, world: int, rows: int | None, vocab: int | None) -> Shape:
    """Small, because each result is compared with fp64 on the host."""
    shape = (rows or (16 if quick else 64), vocab or max(256 if quick else 4096, 8 * world))
    for name, value, least in (("--rows", shape[0], 4), ("--vocab", shape[1], 8 * world)):
        if value < least:
            raise Refusal(f"{name} {value} is too small: {world} ranks need at least {least}")
    return shape[0], shape[1] - shape[1] % world


def sizes_of_timing(
    quick: bool, device: str, world: int, rows: int | None, vocab: int | None
) -> Sizes:
    """Large, so that an accelerator's launches stop mattering."""
    usual = (64, 1024) if quick else (4096, 32768) if device == "cpu" else (8192, 131072)
    sizes = Sizes(rows or usual[0], vocab or max(usual[1], 8 * world), repeats=3 if quick else 7)
    if sizes.vocab < 8 * world:
        raise Refusal(
            f"--timed-vocab {sizes.vocab} is too small: {world} ranks need at least {8 * world}"
        )
    return sizes


def run_selftest(
    groups: ParallelGroups, ranks: Ranks, shape: Shape, sizes: Sizes, quick: bool
) -> tuple[list[Verdict], Speed]:
    """All checks and timings; every rank gets the same answers."""
    world = groups.world_size
    group = groups.tp_group if world > 1 else None
    place = Place(groups.device, groups.rank, world, group, *shape, quick)
    count_collectives(lambda: None)  # the profiler wants its first use in the main thread
    steps = len(plan(place)) + len(timed(place.device)) + 2 * len(COLLECTIVES)
    shown = groups.rank == 0 and sys.stderr.isatty()
    with progress(steps, ranks_in_words(world), shown) as tell:
        return run_checks(ranks, place, tell), run_speed(ranks, place, sizes, tell)


def examine(
    found: Environment, quick: bool, shape: Shape, sizes: Sizes, timeout: float, path: Path
) -> None:
    """The whole selftest; an exit status that differs from 0 is an exit."""
    try:
        groups = ParallelGroups.open(found.device, timeout_seconds=timeout + GRACE)
    except ValueError as error:
        raise Refusal(error) from None
    except Exception as error:  # a rendezvous may fail in many ways; none of them is ours
        _say_of_this_rank(f"cannot join the other ranks: {in_one_line(error)}")
        time.sleep(LAST_WORDS)
        sys.exit(FAILED)
    try:
        require_alike(groups.gather)
    except Refusal:
        groups.close()
        raise
    try:
        ranks = Ranks(groups, timeout)
        everyone = ranks.gather(found)
        names = Names.union(ranks.gather(Names.of_this_process()))
        verdicts, speed = run_selftest(groups, ranks, shape, sizes, quick)
        differences = compare_environments(everyone)
        test = Selftest(groups.world_size, *shape, verdicts, speed, ranks.broken, differences)
        if groups.rank == 0:
            print_selftest(test, found.device)
            write_json(path, as_json(everyone, test, names))
            said = f"FAILED: {len(test.failures)} problems" if test.failures else "Selftest passed"
            print(f"{said}. Written to {path}", flush=True)
        ranks.gather(None)  # nobody leaves before rank 0 has written
    except Exception as error:
        _say_of_this_rank(in_one_line(error))
        leave_at_once()
    if ranks.broken:
        leave_at_once()
    groups.close()
    if test.failures:
        sys.exit(FAILED)


def _say_of_this_rank(words: str) -> None:
    """Each rank has a trouble of its own."""
    print(f"rank {os.environ.get('RANK', '0')}: {words}", file=sys.stderr, flush=True)


def leave_at_once() -> NoReturn:
    """Without closing groups: a collective in flight, or a rank that is gone, would hold it up."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(FAILED)
