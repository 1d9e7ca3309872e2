"""vocab-parallel-ce curve: the time of a loss against rows and columns.

    vocab-parallel-ce curve

The benchmark over a grid of shapes, from one row to 65,536 and from 8 columns to 262,144, as far as
the logits stay below a size: ours beside F.cross_entropy and Megatron-core, on one process and on
two ranks, in fp32 and bf16. Medians go into a table (``medians.py`` says what is in it), and a
picture is drawn of the table. With --draw-only nothing is measured.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vocab_parallel_ce.launch.bench import medians
from vocab_parallel_ce.launch.bench.command import (
    check_counts,
    check_table,
    environment,
    rank_counts,
    read_table,
    start_ranks,
)
from vocab_parallel_ce.launch.bench.curve.pages import RESULTS
from vocab_parallel_ce.launch.bench.curve.picture import draw, not_first
from vocab_parallel_ce.launch.bench.rank import Plan
from vocab_parallel_ce.launch.command_line import (
    DeviceName,
    file,
    folder,
    job,
    number,
    usable_device,
    whole,
)
from vocab_parallel_ce.launch.options import make_folder, make_writable
from vocab_parallel_ce.launch.refusal import Refusal
from vocab_parallel_ce.launch.terminal import Table, numbers, ranks_in_words, show, show_line, words

ROWS = (1, 64, 1024, 4096, 65536)
COLUMNS = (8, 64, 512, 2048, 8192, 32768, 131072, 262144)
PEERS = ("ours-inplace", "ours", "torch", "megatron")


def grid(largest: int) -> tuple[tuple[int, int], ...]:
    """The shapes of at most ``largest`` elements."""
    return tuple((n, c) for n in ROWS for c in COLUMNS if n * c <= largest)


def main(
    ranks: Annotated[
        list[int] | None, whole("Processes to measure; repeatable. [default: 1 and 2]", "--ranks")
    ] = None,
    largest: Annotated[
        int, whole("Elements of the logits, at most.", "--largest", least=COLUMNS[0])
    ] = 1 << 26,
    repeats: Annotated[int, whole("Timed runs of each; the median is kept.", "--repeats")] = 7,
    device: DeviceName = None,
    csv: Annotated[
        Path, file("The table; what it holds of the same is replaced.", "--csv")
    ] = RESULTS,
    picture: Annotated[Path, file("Where the picture goes.", "--picture")] = Path("runs/curve.png"),
    out: Annotated[Path, folder("Where logs of the ranks go.", "--out")] = Path("runs/curve"),
    wait_idle: Annotated[
        float, number("Seconds to wait for a quiet machine before a timed run.", "--wait-idle")
    ] = 2.0,
    draw_only: Annotated[bool, typer.Option(help="Draw the table, and measure nothing.")] = False,
) -> None:
    """The time of forward and backward over a grid of shapes, as a table and a picture."""
    make_folder("--picture", picture.parent)
    make_writable("--picture", picture)
    if not draw_only:
        kind = usable_device(device)
        shapes, counts = grid(largest), rank_counts(ranks, kind)
        check_counts(counts, shapes, kind)
        make_folder("--out", out)
        check_table(csv)
        idle = wait_idle if kind == "cpu" else 0.0
        plan = Plan(shapes, ("fp32", "bf16"), kind, repeats, PEERS, idle)
        for count in counts:
            medians.add(csv, start_ranks(plan, count, out), environment(kind))
            show_line(f"{ranks_in_words(count)} measured, medians added to {csv}")
    rows = read_table(csv)
    if not rows:
        raise Refusal(f"--csv {csv} holds no measurement; leave --draw-only out")
    draw(rows, picture)
    show(_where_not_first(rows))
    show_line(f"Drawn into {picture}")


def _where_not_first(rows: list[medians.Row]) -> Table:
    table = Table(
        "Where ours is not first",
        [*words("ranks", "dtype"), *numbers("rows", "columns", "ours ms"), *words("first"),
         *numbers("ms")],
    )  # fmt: skip
    for ours, first in not_first(rows):
        table.add(
            str(ours.ranks), ours.dtype, f"{ours.rows:,}", f"{ours.vocab:,}", f"{ours.ms:.3g}",
            first.label, f"{first.ms:.3g}",
        )  # fmt: skip
    return table


app = job("curve", main)
