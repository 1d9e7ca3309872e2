"""vocab-parallel-ce doctor: what an owner of a card runs first.

    vocab-parallel-ce doctor                what is here, and what is set badly
    vocab-parallel-ce doctor --selftest     and whether the loss is right on it
    torchrun --nproc-per-node 8 -m vocab_parallel_ce.launch.doctor --selftest     on all cards
    vocab-parallel-ce doctor --tune         which way of the npu engine is the fastest on a card

The selftest puts every dtype and option against the unsharded fp64 reference, checks what must be
refused, counts and times collectives, and times forward and backward beside a copy. It leaves
runs/doctor.json, which names no user, host or home and is meant to be attached to a bug report.

It starts on any machine: without typer and rich its tables are plain text, and where torch cannot
be imported that is its first finding, and what else can be found out is in the file all the same.
So nothing here imports torch at its head.

Exit status, on every rank: 0 if all is well, 1 if a check failed on any rank, 2 if torch or the
device that was asked for cannot be used, or an option makes no sense.
"""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from vocab_parallel_ce.launch import options
from vocab_parallel_ce.launch.doctor.findings import Environment
from vocab_parallel_ce.launch.doctor.report import as_json, print_environment, write_json
from vocab_parallel_ce.launch.doctor.scrub import Names
from vocab_parallel_ce.launch.doctor.software import without_torch
from vocab_parallel_ce.launch.plain_parser import PlainParser, value
from vocab_parallel_ce.launch.refusal import Refusal, is_rank_0, say_and_leave
from vocab_parallel_ce.torch_import import torch_problem

DEFAULT_JSON = Path("runs/doctor.json")
DEFAULT_TUNE_JSON = Path("runs/tune.json")
_TEST, _RUN = "with --selftest: ", "with --selftest or --tune: "


def parser(program: str) -> PlainParser:
    made = PlainParser(
        prog=program,
        description="Reports what is here and what is set badly; with --selftest, whether the loss "
        "is right. On several ranks: torchrun -m vocab_parallel_ce.launch.doctor --selftest",
    )
    count = value(partial(options.whole, least=1))
    made.add_argument(
        "--device",
        type=value(options.device),
        metavar="npu|cuda|cpu",
        help="where to run [default: the best that is here]",
    )
    made.add_argument(
        "--selftest", action="store_true", help="run the loss against its fp64 reference"
    )
    made.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help=f"where to write the report [default: {DEFAULT_JSON}; --tune: {DEFAULT_TUNE_JSON}]",
    )
    made.add_argument(
        "--tune",
        action="store_true",
        help="time the ways of the npu engine on one card, and each of their kernels",
    )
    made.add_argument(
        "--dtype",
        type=value(options.dtype),
        metavar="fp32|bf16|fp16",
        help="of the logits that --tune takes [default: bf16]",
    )
    made.add_argument("--quick", action="store_true", help=f"{_RUN}small sizes, few repetitions")
    made.add_argument("--rows", "--tokens", type=count, metavar="N", help=f"{_TEST}rows of a check")
    for names, what in (
        (("--vocab", "--vocab-size"), f"{_TEST}vocabulary of a check"),
        (("--timed-rows",), f"{_RUN}rows that are timed"),
        (("--timed-vocab",), f"{_RUN}vocabulary that is timed"),
    ):
        made.add_argument(*names, type=count, metavar="N", help=what)
    made.add_argument(
        "--timeout",
        type=value(options.positive),
        default=60.0,
        metavar="SECONDS",
        help="how long one check may take [default: 60]",
    )
    return made


def refuse_what_has_no_use(asked: Namespace) -> None:
    """An option that would be ignored is refused."""
    if asked.tune and asked.selftest:
        raise Refusal("--tune and --selftest are two runs; start one after the other")
    if asked.dtype and not asked.tune:
        raise Refusal("--dtype needs --tune; --selftest takes every dtype")
    for name in ("rows", "vocab"):
        if getattr(asked, name) and not asked.selftest:
            raise Refusal(f"--{name} needs --selftest")
    for name in ("quick", "timed_rows", "timed_vocab"):
        if getattr(asked, name) and not (asked.selftest or asked.tune):
            raise Refusal(f"--{name.replace('_', '-')} needs --selftest or --tune")


def app(arguments: Sequence[str], prog_name: str) -> None:
    """Ends the process where the status is not 0."""
    try:
        main(parser(prog_name).parse_args(arguments))
    except Refusal as refusal:
        say_and_leave("doctor", str(refusal), refusal.status)


def main(asked: Namespace) -> None:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler tells of every start
    refuse_what_has_no_use(asked)
    path = asked.json or (DEFAULT_TUNE_JSON if asked.tune else DEFAULT_JSON)
    problem = torch_problem()
    if problem is not None:
        # What cannot be asked is who would have been chosen: whoever has torch_npu meant an NPU.
        found = without_torch(asked.device or "none", problem, problem)
        print_environment(found)
        write_now(path, found)
        print(f"Written to {path}", flush=True)
        raise Refusal(problem)

    from vocab_parallel_ce.launch.doctor.environment import collect
    from vocab_parallel_ce.launch.doctor.examination import (
        examine,
        shape_of_checks,
        sizes_of_timing,
    )

    size = os.environ.get("WORLD_SIZE", "1")
    world = int(size) if size.isdecimal() else 1  # what else it may be is refused when joining
    if asked.tune:
        from vocab_parallel_ce.launch.doctor.tune.command import checked

        columns = asked.timed_vocab
        tuned = checked(asked.timed_rows, columns, asked.dtype or "bf16", asked.quick, world)
    shape = shape_of_checks(asked.quick, world, asked.rows, asked.vocab)
    found = collect(asked.device, look_around=not (asked.selftest or asked.tune) and world == 1)
    sizes = sizes_of_timing(asked.quick, found.device, world, asked.timed_rows, asked.timed_vocab)
    if is_rank_0():
        print_environment(found)
        write_now(path, found)
    if found.problem:
        if is_rank_0():
            print(f"Written to {path}", flush=True)
        raise Refusal(found.problem)
    if asked.tune:
        from vocab_parallel_ce.launch.doctor.tune.command import tune

        tune(found, tuned, path)
    elif asked.selftest:
        examine(found, asked.quick, shape, sizes, asked.timeout, path)
    elif is_rank_0():
        print(in_short(found))
        print(f"Written to {path}", flush=True)


def in_short(found: Environment) -> str:
    """What the tables above come to, and what to run next."""
    count = sum(bool(variable.word) for variable in found.variables) + len(found.notes)
    verdict = "Nothing here is set badly." if not count else f"{count} findings to read above."
    return f"{verdict}\nWhether the loss is right here: vocab-parallel-ce doctor --selftest"


def write_now(path: Path, found: Environment) -> None:
    """Before minutes of work, not after them."""
    options.make_writable("--json", path)
    write_json(path, as_json([found], None, Names.of_this_process()))
    sys.stdout.flush()
