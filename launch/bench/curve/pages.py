"""What the pages say of the curve, of the table that the repository keeps."""

from __future__ import annotations

from pathlib import Path

from vocab_parallel_ce.launch.bench.curve.picture import both_passes, not_first
from vocab_parallel_ce.launch.bench.medians import Row, group_of
from vocab_parallel_ce.launch.terminal import ranks_in_words

RESULTS = Path(__file__).with_name("curve.csv")


def text(rows: list[Row]) -> str:
    """A sentence or two for each number of ranks."""
    shown, behind = both_passes(rows), not_first(rows)
    return "\n".join(
        _of_ranks(
            ranks,
            len({group_of(row) for row in shown if row.ranks == ranks}),
            [pair for pair in behind if pair[0].ranks == ranks],
        )
        for ranks in sorted({row.ranks for row in shown})
    )


def _of_ranks(ranks: int, points: int, behind: list[tuple[Row, Row]]) -> str:
    """``behind``: (ours, who is faster)."""
    first = f"* {ranks_in_words(ranks)}: ours is the fastest at {points - len(behind)} of {points}"
    if not behind:
        return f"{first} points."
    others = sorted({other.label for _, other in behind})
    ours, other = max(behind, key=lambda pair: pair[0].ms / pair[1].ms)
    longer = max(ours.ms - other.ms for ours, other in behind)
    largest = max(ours.rows * ours.vocab for ours, _ in behind)
    return (
        f"{first} points. At the others {' or '.join(others)} is faster, by up to "
        f"{ours.ms / other.ms:.1f} times ({_shape(ours)}) and never by more than {longer:.1f} ms; "
        f"the largest of these has {largest:,} logits."
    )


def _shape(row: Row) -> str:
    rows = "1 row" if row.rows == 1 else f"{row.rows:,} rows"
    return f"{rows} of {row.vocab:,} columns, {row.dtype}"
