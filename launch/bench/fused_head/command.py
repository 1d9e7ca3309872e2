"""vocab-parallel-ce fused-head: head and loss together, forward and backward.

    vocab-parallel-ce fused-head
    torchrun --nproc-per-node 2 -m vocab_parallel_ce.launch.bench.fused_head --dtype bf16

``record.py`` runs it for the tables of the pages.

The fused head beside F.linear and a loss, beside torch's F.linear_cross_entropy, Megatron-core's
losses and Liger's; what is not installed is listed as such. The unit is the three matrix products
alone, measured in the same run: logits and two gradients, into memory that is there. Peak memory
counts the gradients. Errors are relative to fp64, on random rows and on confident ones.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from vocab_parallel_ce.launch.bench.fused_head.contenders import CONTENDERS
from vocab_parallel_ce.launch.bench.fused_head.measure import Case, Row, measure
from vocab_parallel_ce.launch.bench.peers import megatron_forgets
from vocab_parallel_ce.launch.bench.rank import DTYPES
from vocab_parallel_ce.launch.command_line import (
    ROWS,
    VOCAB,
    DeviceName,
    Json,
    Timeout,
    TrainingDtype,
    job,
    number,
    open_groups,
    say,
    whole,
)
from vocab_parallel_ce.launch.options import make_writable
from vocab_parallel_ce.launch.refusal import Refusal, is_rank_0
from vocab_parallel_ce.launch.terminal import Table, numbers, ranks_in_words, show, words


def table_of(rows: list[Row], title: str) -> Table:
    """What a reader sees."""
    table = Table(
        title,
        [*words("way"), *numbers("ms", "products", "peak\nMiB"), *words("remark")],
    )
    for row in rows:
        if row.milliseconds is None:
            table.add(row.name, "", "", "", row.status)
            continue
        peak = "" if row.peak_mib is None else f"{row.peak_mib:.0f}"
        table.add(row.name, f"{row.milliseconds:.0f}", f"{row.products:.2f}", peak, "")
    return table


def errors_of(rows: list[Row]) -> Table:
    """How exact each is."""
    quantities = ("loss", "hidden", "head")
    headings = [f"{kind}\n{name}" for kind in ("random", "confident") for name in quantities]
    table = Table("Errors relative to fp64", [*words("way"), *numbers(*headings)])
    for row in rows:
        if row.errors:
            table.add(row.name, *(f"{error:.1e}" for error in row.errors))
    return table


def main(
    rows: Annotated[int, whole("Hidden states in the batch.", *ROWS)] = 2048,
    width: Annotated[int, whole("Of a hidden state.")] = 1024,
    vocab: Annotated[int, whole("Vocabulary of all ranks.", *VOCAB)] = 32768,
    dtype: TrainingDtype = "fp32",
    ignored: Annotated[float, number("Share of rows that do not count.")] = 0.0,
    repeats: Annotated[int, whole("Timed runs of each; the median is shown.")] = 5,
    way: Annotated[
        list[str] | None, typer.Option(help="Only this one, by its name in the table; repeatable.")
    ] = None,
    device: DeviceName = None,
    timeout: Timeout = 600.0,
    json_file: Json = None,
) -> None:
    """Time, memory and exactness of head and loss, beside what one would otherwise use.

    Alone it is one process; for several ranks: torchrun -m, with bench.fused_head of launch.
    """
    if not ignored < 1:
        raise Refusal(f"--ignored {ignored} must be below 1")
    unknown = set(way or ()) - {c.name for c in CONTENDERS}
    if unknown:
        names = "; ".join(c.name for c in CONTENDERS)  # a name may hold commas
        raise Refusal(f"--way {min(unknown)!r} is none of: {names}")
    chosen = [c for c in CONTENDERS if not way or c.name in way]
    if json_file is not None and is_rank_0():
        make_writable("--json", json_file)
    with open_groups(device, None, 1, timeout) as groups, megatron_forgets():
        if vocab % groups.tp:
            raise Refusal(f"--vocab {vocab} must be a multiple of the {groups.tp} ranks")
        case = Case(rows, width, vocab, DTYPES[dtype], ignored)
        found = measure(case, groups, repeats, lambda text: say(groups, f"... {text}"), chosen)
        if groups.rank != 0:
            return
        ranks = ranks_in_words(groups.tp)
        show(table_of(found, f"[{rows}, {width}] x [{vocab}, {width}], {dtype}, {ranks}"))
        show(errors_of(found))
        if json_file is not None:
            _write(json_file, found, rows, width, vocab, dtype, ignored, groups.tp)


def _write(file: Path, found: list[Row], *case: object) -> None:
    names = ("rows", "width", "vocab", "dtype", "ignored", "ranks")
    whole = dict(zip(names, case, strict=True)) | {"ways": [row.as_dict() for row in found]}
    file.write_text(json.dumps(whole, indent=1) + "\n")


app = job("fused-head", main)
