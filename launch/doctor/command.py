"""python -m vocab_parallel_ce.launch.doctor: what an owner of a card runs first.

    python -m vocab_parallel_ce.launch.doctor                what is here, and what is set badly
    python -m vocab_parallel_ce.launch.doctor --selftest     and whether the loss is right on it
    torchrun --nproc-per-node 8 -m vocab_parallel_ce.launch.doctor --selftest     on all cards

The selftest puts every dtype and option against the unsharded fp64 reference, checks what must be
refused, counts and times collectives, and times forward and backward beside a copy. It leaves
runs/doctor.json, which names no user, host or home and is meant to be attached to a bug report.

Exit status, on every rank: 0 if all is well, 1 if a check failed on any rank, 2 if the device that
was asked for cannot be used or an option makes no sense.
"""

from __future__ import annotations

import math
import os
import sys
import time
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from vocab_parallel_ce.collectives import BACKEND_OF_DEVICE
from vocab_parallel_ce.launch.bench.report import progress
from vocab_parallel_ce.launch.doctor.cases import Place
from vocab_parallel_ce.launch.doctor.environment import Environment, collect
from vocab_parallel_ce.launch.doctor.ranks import GRACE, Ranks, in_one_line
from vocab_parallel_ce.launch.doctor.report import (
    Selftest,
    as_json,
    compare_environments,
    print_environment,
    print_selftest,
    write_json,
)
from vocab_parallel_ce.launch.doctor.scrub import Names
from vocab_parallel_ce.launch.doctor.selftest import Verdict, plan, run_checks
from vocab_parallel_ce.launch.doctor.speed import COLLECTIVES, Sizes, Speed, run_speed, timed
from vocab_parallel_ce.launch.measuring.collectives import count_collectives
from vocab_parallel_ce.parallel.groups import ParallelGroups

FAILED, USAGE_ERROR = 1, 2
Shape = tuple[int, int]  # rows and vocabulary
DEFAULT_JSON = Path("runs/doctor.json")
LAST_WORDS = 2.0
"""Seconds that a rank waits before it leaves with an error: torchrun then ends the others, and each
of them shall have said what it has to say."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def rank_in_words() -> str:
    return os.environ.get("RANK", "0")


def is_first() -> bool:
    return rank_in_words() == "0"


def leave(words: str, status: int) -> NoReturn:
    """Ends this rank with one line and no traceback."""
    print(f"rank {rank_in_words()}: {words}", file=sys.stderr, flush=True)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        time.sleep(LAST_WORDS)
    raise typer.Exit(status)


def shape_of_checks(quick: bool, world: int, rows: int | None, vocab: int | None) -> Shape:
    """Small, because each result is compared with fp64 on the host."""
    shape = (rows or (16 if quick else 64), vocab or max(256 if quick else 4096, 8 * world))
    for name, value, least in (("--rows", shape[0], 4), ("--vocab", shape[1], 8 * world)):
        if value < least:
            raise ValueError(f"{name} {value} is too small: {world} ranks need at least {least}")
    return shape[0], shape[1] - shape[1] % world


def sizes_of_timing(
    quick: bool, device: str, world: int, rows: int | None, vocab: int | None
) -> Sizes:
    """Large, so that an accelerator's launches stop mattering."""
    usual = (64, 1024) if quick else (4096, 32768) if device == "cpu" else (8192, 131072)
    sizes = Sizes(rows or usual[0], vocab or max(usual[1], 8 * world), repeats=3 if quick else 7)
    if sizes.vocab < 8 * world:
        raise ValueError(
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
    with progress(steps, world, groups.rank == 0 and sys.stderr.isatty()) as tell:
        return run_checks(ranks, place, tell), run_speed(ranks, place, sizes, tell)


def examine(
    found: Environment, quick: bool, shape: Shape, sizes: Sizes, timeout: float, path: Path
) -> None:
    """The selftest from joining the ranks to the exit status, which differs from 0 by an exit."""
    try:
        groups = ParallelGroups.open(found.device, timeout_seconds=timeout + GRACE)
    except ValueError as error:
        leave(str(error), USAGE_ERROR)
    except Exception as error:  # a rendezvous may fail in many ways; none of them is ours
        leave(f"cannot join the other ranks: {in_one_line(error)}", FAILED)
    try:
        ranks = Ranks(groups, timeout)
        everyone = ranks.gather(found)
        names = Names.union(ranks.gather(Names.of_this_process()))
        verdicts, speed = run_selftest(groups, ranks, shape, sizes, quick)
        differences = compare_environments(everyone)
        test = Selftest(groups.world_size, *shape, verdicts, speed, ranks.broken, differences)
        if groups.rank == 0:
            print_selftest(console(), test, found.device)
            write_json(path, as_json(everyone, test, names))
            said = f"FAILED: {len(test.failures)} problems" if test.failures else "Selftest passed"
            print(f"{said}. Written to {path}", flush=True)
        ranks.gather(None)  # nobody leaves before rank 0 has written
    except Exception as error:
        print(f"rank {groups.rank}: {in_one_line(error)}", file=sys.stderr, flush=True)
        leave_at_once()
    if ranks.broken:
        leave_at_once()
    groups.close()
    if test.failures:
        raise typer.Exit(FAILED)


def leave_at_once() -> NoReturn:
    """Without closing groups: a collective in flight, or a rank that is gone, would hold it up."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(FAILED)


def console() -> Console:
    """A terminal tells its width; a file or a pipe gets what the tables need."""
    return Console() if sys.stdout.isatty() else Console(width=140)


@app.command()
def main(
    device: Annotated[str | None, typer.Option(help="cpu, cuda or npu; else the best.")] = None,
    selftest: Annotated[
        bool, typer.Option("--selftest", help="Run the loss against its fp64 reference.")
    ] = False,
    json: Annotated[
        Path | None, typer.Option(help=f"Write a report. [default: {DEFAULT_JSON} of a selftest]")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes, few repetitions.")] = False,
    rows: Annotated[int | None, typer.Option(help="Rows of a check.")] = None,
    vocab: Annotated[int | None, typer.Option(help="Vocabulary of a check.")] = None,
    timed_rows: Annotated[int | None, typer.Option(min=1, help="Rows that are timed.")] = None,
    timed_vocab: Annotated[int | None, typer.Option(help="Vocabulary that is timed.")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds that one check may take.")] = 60.0,
) -> None:
    """Reports what is here and what is set badly; with --selftest, whether the loss is right."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler tells of every start
    size = os.environ.get("WORLD_SIZE", "1")
    world = int(size) if size.isdecimal() else 1  # what else it may be is refused when joining
    try:
        if device is not None and device not in BACKEND_OF_DEVICE:
            raise ValueError(f"--device {device!r} is not one of {', '.join(BACKEND_OF_DEVICE)}")
        if not 0 < timeout < math.inf:
            raise ValueError(f"--timeout {timeout} must be a positive number of seconds")
        shape = shape_of_checks(quick, world, rows, vocab)
        found = collect(device, look_around=not selftest and world == 1)
        sizes = sizes_of_timing(quick, found.device, world, timed_rows, timed_vocab)
    except ValueError as error:
        leave(str(error), USAGE_ERROR)
    path = json or DEFAULT_JSON
    if is_first():
        print_environment(console(), found)
        if json is not None or selftest:
            try:  # now, not after minutes of work
                write_json(path, as_json([found], None, Names.of_this_process()))
            except OSError as error:
                leave(f"--json {path} cannot be written: {error.strerror}", USAGE_ERROR)
    if found.problem:
        leave(found.problem, USAGE_ERROR)
    if selftest:
        examine(found, quick, shape, sizes, timeout, path)
