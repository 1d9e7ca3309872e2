"""vocab-parallel-ce plan: what the loss will cost, before the machine is there.

Memory beside the logits, bytes moved, collectives and time, split into kernels and communication,
for this library (in place and out of place) and for Megatron-core's loss (unfused, and fused by the
compiler), of one rank. A model, no measurement: ``ways.py`` says what each way does,
``model.py`` turns it into seconds and says what it leaves out, ``devices.py`` holds the
machines and where their figures come from.

    vocab-parallel-ce plan --vocab 131072 --rows 8192 --tp 8 --card h100
    vocab-parallel-ce plan --card a2 --bandwidth 1200 --latency 40
    vocab-parallel-ce plan --measure     on this CPU at 1, 2 and 4 ranks, beside it

Exit status: 0, 1 if something was not measured, 2 if an option cannot be served.
"""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated, Any

import typer

from vocab_parallel_ce.launch import options
from vocab_parallel_ce.launch.bench import command as bench
from vocab_parallel_ce.launch.command_line import (
    ROWS,
    VOCAB,
    Json,
    job,
    number,
    option,
    positive,
    whole,
)
from vocab_parallel_ce.launch.options import make_writable
from vocab_parallel_ce.launch.plan import report
from vocab_parallel_ce.launch.plan.devices import DEVICES, GB, US, Device
from vocab_parallel_ce.launch.plan.measured import WAYS, Run, run_case
from vocab_parallel_ce.launch.plan.model import predict
from vocab_parallel_ce.launch.plan.ways import Case
from vocab_parallel_ce.launch.refusal import FAILED, Refusal
from vocab_parallel_ce.launch.terminal import Coloured, show_line

DEFAULT_CASE = (8192, 131072)
MEASURED_CASE = (4096, 32768)
QUICK_CASE = (64, 1024)
RANKS = (1, 2, 4)


def sizes(rows: int | None, vocab: int | None, default: tuple[int, int]) -> tuple[int, int]:
    return (default[0] if rows is None else rows, default[1] if vocab is None else vocab)


def checked_case(rows: int, vocab: int, ranks: int, dtype: str) -> Case:
    """Refusal where the vocabulary has no equal shards."""
    if vocab % ranks:
        raise Refusal(
            f"--vocab {vocab} does not divide into {ranks} equal shards; round it up to "
            f"{-(-vocab // ranks) * ranks}, as padding does"
        )
    return Case(rows, vocab, ranks, dtype)


def chosen_device(
    name: str, bandwidth: float | None, link_bandwidth: float | None, latency: float | None
) -> Device:
    """A preset with the figures that were given, from GB/s and microseconds."""
    return DEVICES[name].overridden(
        None if bandwidth is None else bandwidth * GB,
        None if link_bandwidth is None else link_bandwidth * GB,
        None if latency is None else latency * US,
    )


def card_name(text: str) -> str:
    return options.one_of(text.lower(), tuple(DEVICES))


def way_names(text: str) -> tuple[str, ...]:
    """From a list separated by commas; empty stands for all."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    return tuple(options.one_of(name, WAYS) for name in names)


def write(path: Path | None, found: dict[str, Any]) -> None:
    if path is not None:
        path.write_text(json_module.dumps(found, indent=1) + "\n")
        show_line(f"Written to {path}")


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


def refuse_what_has_no_use(why: str, given: dict[str, object]) -> None:
    """An option that would be ignored is refused."""
    for name, value in given.items():
        if value not in (None, False, "", []):
            raise Refusal(f"{name} {why}")


def main(
    vocab: Annotated[int | None, whole("Of all ranks together. [default: 131072]", *VOCAB)] = None,
    rows: Annotated[int | None, whole("Rows of logits. [default: 8192]", *ROWS)] = None,
    tp: Annotated[
        int | None, whole("Ranks that split the vocabulary. [default: 8]", "--tp")
    ] = None,
    dtype: Annotated[
        str,
        option(options.dtype, "--dtype", metavar="fp32|bf16|fp16", help="Of the logits."),
    ] = "bf16",
    card: Annotated[
        str | None,
        option(
            card_name,
            "--card",
            "--device",
            metavar="NAME",
            help=f"The machine to plan for: {', '.join(DEVICES)}. [default: h100]",
        ),
    ] = None,
    bandwidth: Annotated[
        float | None,
        positive("Of memory, reads and writes together, in GB/s.", "--bandwidth"),
    ] = None,
    link_bandwidth: Annotated[
        float | None, positive("Between ranks, one way, in GB/s.", "--link-bandwidth")
    ] = None,
    latency: Annotated[
        float | None, number("Of a small collective, in microseconds.", "--latency")
    ] = None,
    json: Json = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Run it on this CPU, beside the prediction.")
    ] = False,
    ranks: Annotated[
        list[int] | None,
        whole("With --measure: processes; repeatable. [default: 1, 2 and 4]", "--ranks"),
    ] = None,
    ways: Annotated[
        str,
        option(
            lambda text: ",".join(way_names(text)),
            "--ways",
            metavar="NAMES",
            help=f"With --measure: of {', '.join(WAYS)}, separated by commas. [default: all]",
        ),
    ] = "",
    quick: Annotated[
        bool, typer.Option("--quick", help="With --measure: tiny shapes, 3 repetitions.")
    ] = False,
) -> None:
    """Memory, traffic and time of the loss, by a model; with --measure, beside what is seen.

    Without --measure nothing runs: it predicts for a machine that need not be there.
    """
    if measure:
        if card not in (None, "cpu"):
            raise Refusal(f"--card {card}: --measure runs on this machine's CPU; leave it out")
        refuse_what_has_no_use("has no meaning with --measure; say --ranks", {"--tp": tp})
        refuse_what_has_no_use(
            "has no meaning with --measure, which measures it; leave it out",
            {"--bandwidth": bandwidth, "--latency": latency, "--link-bandwidth": link_bandwidth},
        )
        count, size = sizes(rows, vocab, QUICK_CASE if quick else MEASURED_CASE)
        cases = [checked_case(count, size, each, dtype) for each in ranks or RANKS]
    else:
        refuse_what_has_no_use(
            "needs --measure", {"--ranks": ranks, "--ways": ways, "--quick": quick}
        )
        count, size = sizes(rows, vocab, DEFAULT_CASE)
        case = checked_case(count, size, 8 if tp is None else tp, dtype)
        chosen = chosen_device(card or "h100", bandwidth, link_bandwidth, latency)
    if json is not None:
        make_writable("--json", json)
    if not measure:
        predictions = predict(case, chosen)
        report.print_predictions(case, chosen, predictions)
        write(json, report.as_json(case, chosen, predictions))
        return
    runs, problems = measure_all(cases, way_names(ways) or WAYS, quick)
    report.print_compared(runs)
    for problem in problems:
        show_line(Coloured(problem, "red"))
    found = {"environment": bench.environment("cpu"), "not_run": problems}
    write(json, found | report.compared_as_json(runs))
    if problems:
        raise typer.Exit(FAILED)


app = job("plan", main)
