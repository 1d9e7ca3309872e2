"""python -m vocab_parallel_ce.launch.plan: what the loss will cost, before the machine is there.

Memory beside the logits, bytes moved, collectives and time, split into kernels and communication,
for this library (in place and out of place) and for Megatron-core's loss (unfused, and fused by the
compiler), of one rank. A model, no measurement: ``plan_ways.py`` says what each way does,
``plan_model.py`` turns it into seconds and says what it leaves out, ``plan_devices.py`` holds the
machines and where their figures come from.

    python -m vocab_parallel_ce.launch.plan --vocab 131072 --tokens 8192 --tp 8 --device h100
    python -m vocab_parallel_ce.launch.plan --device a2 --bandwidth 1200 --latency 40
    python -m vocab_parallel_ce.launch.plan --measure     on this CPU at 1, 2 and 4 ranks, beside it
"""

from __future__ import annotations

import json as json_module
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from vocab_parallel_ce.launch.bench import command as bench
from vocab_parallel_ce.launch.bench.rank import DTYPES
from vocab_parallel_ce.launch.plan import report as plan_report
from vocab_parallel_ce.launch.plan.devices import DEVICES, GB, US, Device
from vocab_parallel_ce.launch.plan.measured import WAYS, Run, run_case
from vocab_parallel_ce.launch.plan.model import predict
from vocab_parallel_ce.launch.plan.ways import Case

USAGE_ERROR, FAILED = 2, 1
DEFAULT_CASE = (8192, 131072)
MEASURED_CASE = (4096, 32768)
QUICK_CASE = (64, 1024)
RANKS = (1, 2, 4)


def leave(message: str, status: int) -> NoReturn:
    print(message, file=sys.stderr, flush=True)
    raise typer.Exit(status)


def sizes(rows: int | None, vocab: int | None, default: tuple[int, int]) -> tuple[int, int]:
    return (default[0] if rows is None else rows, default[1] if vocab is None else vocab)


def checked_case(rows: int, vocab: int, ranks: int, dtype: str) -> Case:
    """ValueError with one line that names the option and the way out."""
    if rows < 1:
        raise ValueError(f"--tokens {rows} must be at least 1")
    if dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype!r} is none of {', '.join(DTYPES)}")
    if ranks < 1:
        raise ValueError(f"the number of ranks, {ranks}, must be at least 1")
    if vocab < 1 or vocab % ranks:
        raise ValueError(
            f"--vocab {vocab} does not divide into {ranks} equal shards; round it up to "
            f"{max(1, -(-vocab // ranks)) * ranks}, as padding does"
        )
    return Case(rows, vocab, ranks, dtype)


def checked_device(
    name: str, bandwidth: float | None, link_bandwidth: float | None, latency: float | None
) -> Device:
    """A preset with the figures that were given, from GB/s and microseconds."""
    if name.lower() not in DEVICES:
        raise ValueError(f"--device {name!r} is none of {', '.join(DEVICES)}")
    for option, value in (("--bandwidth", bandwidth), ("--link-bandwidth", link_bandwidth)):
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"{option} {value} must be a positive number of GB/s")
    if latency is not None and not 0 <= latency < float("inf"):
        raise ValueError(f"--latency {latency} must be a number of microseconds, 0 or more")
    return DEVICES[name.lower()].overridden(
        None if bandwidth is None else bandwidth * GB,
        None if link_bandwidth is None else link_bandwidth * GB,
        None if latency is None else latency * US,
    )


def checked_ways(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip()) or WAYS
    unknown = [name for name in names if name not in WAYS]
    if unknown:
        raise ValueError(f"--ways {unknown[0]!r} is none of {', '.join(WAYS)}")
    return names


def write(path: Path | None, report: dict[str, Any]) -> None:
    if path is None:
        return
    try:
        path.write_text(json_module.dumps(report, indent=1) + "\n")
    except OSError as error:
        leave(f"--json {path} cannot be written: {error.strerror}", USAGE_ERROR)
    print(f"Written to {path}")


def measure_all(
    cases: list[Case], names: tuple[str, ...], quick: bool
) -> tuple[list[Run], list[str]]:
    """What could be measured, and a line for each number of ranks that could not."""
    runs, problems = [], []
    for case in cases:
        try:
            runs.append(run_case(case, names, 3 if quick else 11, 0.0 if quick else 2.0))
        except RuntimeError as failure:
            problems.append(f"{case.ranks} ranks not measured: {failure}")
    return runs, problems


def main(
    vocab: Annotated[
        int | None, typer.Option(help="Of all ranks together. [default: 131072]")
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="Rows of logits. [default: 8192]")] = None,
    tp: Annotated[int | None, typer.Option(help="Tensor-parallel ranks. [default: 8]")] = None,
    dtype: Annotated[str, typer.Option(help=f"Of the logits: {', '.join(DTYPES)}")] = "bf16",
    device: Annotated[
        str | None, typer.Option(help=f"One of {', '.join(DEVICES)}. [default: h100]")
    ] = None,
    bandwidth: Annotated[
        float | None, typer.Option(help="Of memory, reads and writes together, in GB/s.")
    ] = None,
    link_bandwidth: Annotated[
        float | None, typer.Option(help="Between ranks, one way, in GB/s.")
    ] = None,
    latency: Annotated[
        float | None, typer.Option(help="Of a small collective, in microseconds.")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write every number to this file.")] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Run it on this CPU, beside the prediction.")
    ] = False,
    ranks: Annotated[
        list[int] | None,
        typer.Option(help="With --measure: process counts; repeatable. [default: 1, 2 and 4]"),
    ] = None,
    ways: Annotated[
        str, typer.Option(help=f"With --measure: of {', '.join(WAYS)}. [default: all]")
    ] = "",
    quick: Annotated[
        bool, typer.Option("--quick", help="With --measure: tiny shapes, 3 repetitions.")
    ] = False,
) -> None:
    """Memory, traffic and time of the loss, by a model; with --measure, beside what is seen."""
    try:
        if measure:
            given = {"--tp": tp, "--bandwidth": bandwidth, "--latency": latency}
            given["--link-bandwidth"] = link_bandwidth
            if device not in (None, "cpu"):
                raise ValueError(f"--device {device!r}: --measure runs on this machine's CPU")
            for option, value in given.items():
                if value is not None:
                    way_out = "say --ranks" if option == "--tp" else "--measure measures it"
                    raise ValueError(f"{option} has no meaning with --measure: {way_out}")
            rows, size = sizes(tokens, vocab, QUICK_CASE if quick else MEASURED_CASE)
            cases = [checked_case(rows, size, count, dtype) for count in ranks or RANKS]
            names = checked_ways(ways)
        else:
            for option, used in (("--ranks", ranks), ("--ways", ways), ("--quick", quick)):
                if used:
                    raise ValueError(f"{option} needs --measure")
            rows, size = sizes(tokens, vocab, DEFAULT_CASE)
            case = checked_case(rows, size, 8 if tp is None else tp, dtype)
            chosen = checked_device(device or "h100", bandwidth, link_bandwidth, latency)
    except ValueError as error:
        leave(str(error), USAGE_ERROR)
    # A terminal tells its width; a file or a pipe gets what the tables need.
    console = Console() if sys.stdout.isatty() else Console(width=160)
    if not measure:
        predictions = predict(case, chosen)
        plan_report.print_predictions(console, case, chosen, predictions)
        write(json, plan_report.as_json(case, chosen, predictions))
        return
    runs, problems = measure_all(cases, names, quick)
    plan_report.print_compared(console, runs)
    for problem in problems:
        console.print(f"[red]{problem}[/]")
    report = {"environment": bench.environment("cpu"), "not_run": problems}
    write(json, report | plan_report.compared_as_json(runs))
    if problems:
        raise typer.Exit(FAILED)
