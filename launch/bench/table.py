"""python -m vocab_parallel_ce.launch.bench.table: the table of times in the pages, from the CSV.

It rewrites what lies between two markers in README.md and docs/numbers.md. With --check it changes
nothing and fails where a page is not what the CSV gives.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from vocab_parallel_ce.launch.bench import medians
from vocab_parallel_ce.launch.bench.goals import judge_times
from vocab_parallel_ce.launch.bench.medians import Row, runs_of
from vocab_parallel_ce.launch.bench.peers import PEERS
from vocab_parallel_ce.launch.plain_parser import PlainParser
from vocab_parallel_ce.launch.refusal import FAILED, Refusal, say_and_leave
from vocab_parallel_ce.launch.terminal import ranks_in_words

_CLONE = Path(__file__).resolve().parents[2]
PAGES = (_CLONE / "README.md", _CLONE / "docs" / "numbers.md")
BEGIN, END = "<!-- bench_table: begin -->", "<!-- bench_table: end -->"
NO_CUDA = (
    "CUDA: not measured yet; on a card `vocab-parallel-ce bench --device cuda --csv "
    "launch/bench/medians.csv` fills this in."
)


def _milliseconds(row: Row) -> str:
    return f"{row.ms:,.0f}" if row.ms >= 10 else f"{row.ms:.2f}"


def _markdown(header: Sequence[str], lines: list[list[str]]) -> str:
    rows = [list(header), ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def _order(rows: list[Row], name: str) -> list[str]:
    """The values of a column in the order of their first appearance."""
    return list(dict.fromkeys(str(getattr(row, name)) for row in rows))


def _ours(row: Row) -> bool:
    return row.peer.startswith("ours")


def _cpu_table(rows: list[Row]) -> str:
    """One shape: implementations by ranks and dtype; times, and times ours in place."""
    columns = list(dict.fromkeys((row.ranks, row.dtype) for row in rows))
    by_cell = {(row.peer, row.ranks, row.dtype): row for row in rows}
    lines = []
    for peer in _order(rows, "peer"):
        found = [by_cell.get((peer, *column)) for column in columns]
        label = next(row.label for row in found if row is not None)
        bold = "**" if peer == "ours-inplace" else ""
        cells = []
        for column, row in zip(columns, found, strict=True):
            base = by_cell.get(("ours-inplace", *column))
            text = "" if row is None else f"{bold}{_milliseconds(row)}{bold}"
            if row is not None and base is not None and row is not base:
                text += f" ({row.ms / base.ms:.1f}x)"
            cells.append(text)
        lines.append([f"**{label}**" if _ours(next(r for r in found if r)) else label, *cells])
    header = ["ms", *(f"{ranks_in_words(ranks)}, {dtype}" for ranks, dtype in columns)]
    return _markdown(header, lines)


def _card_table(rows: list[Row]) -> str:
    """One card: cases down, implementations across; ours also as a share of a copy."""

    def case(row: Row) -> tuple[str, int, int, int]:
        return row.dtype, row.ranks, row.rows, row.vocab

    peers = _order(rows, "peer")
    labels = {row.peer: row.label for row in rows}
    lines = []
    for dtype, ranks, height, vocab in dict.fromkeys(map(case, rows)):
        found = {row.peer: row for row in rows if case(row) == (dtype, ranks, height, vocab)}
        cells = [f"{ranks_in_words(ranks)}, [{height}, {vocab}], {dtype}"]
        for peer in peers:
            row = found.get(peer)
            text = "" if row is None else _milliseconds(row)
            if row is not None and _ours(row):
                text += f" ({row.share:.0%})"
            cells.append(text)
        lines.append(cells)
    return _markdown(["ms", *(labels[peer] for peer in peers)], lines)


def _words(rows: list[Row]) -> str:
    """What a reader needs to judge the table."""
    dates = sorted({row.date[:10] for row in rows})
    packages = sorted({row.package for row in rows if not row.package.startswith("vocab_")})
    copies = sorted({row.copy_gb_per_s for row in rows})
    busy = sorted({row.busy for row in rows if row.busy})
    text = f"{rows[0].card}, {' to '.join(dict.fromkeys((dates[0], dates[-1])))}. "
    text += f"{', '.join(packages)}. Copy bandwidth in these runs: "
    text += (
        f"{' to '.join(f'{speed:.0f}' for speed in dict.fromkeys((copies[0], copies[-1])))} GB/s."
    )
    if busy:
        text += f" Timed runs that found the machine busy: {'; '.join(busy)}."
    return text


def goals(rows: list[Row]) -> str:
    """How many goals of speed these rows meet, and by name those that they do not."""
    labels = {peer.name: peer.label for peer in PEERS}
    judged = [row for row in judge_times(runs_of(rows), labels) if row.verdict != "not measured"]
    missed = [row for row in judged if row.verdict != "met"]
    text = f"Goals of speed met: {len(judged) - len(missed)} of {len(judged)}."
    named = "; ".join(f"{row.what}: {row.measured}, goal {row.goal}" for row in missed)
    return f"{text} Missed: {named}." if named else text


def table(rows: list[Row]) -> str:
    """The README's part: every card of the CSV, forward and backward together."""
    both = [row for row in rows if row.pass_ == "both"]
    parts = []
    for card in _order(both, "card"):
        mine = [row for row in both if row.card == card]
        parts.append(_words(mine))
        if mine[0].device == "cpu":
            for shape in dict.fromkeys((row.rows, row.vocab) for row in mine):
                parts.append(f"Logits [{shape[0]}, {shape[1]}]:")
                parts.append(_cpu_table([r for r in mine if (r.rows, r.vocab) == shape]))
        else:
            parts.append(_card_table(mine))
        parts.append(goals(mine))
    if not any(row.device == "cuda" for row in both):
        parts.append(NO_CUDA)
    return "\n\n".join(parts)


def rewritten(text: str, rows: list[Row]) -> str:
    """A page with its table replaced. ValueError where the markers are not there once each."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"a page must hold {BEGIN!r} once, and after it {END!r} once")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{table(rows)}\n\n{END}{rest.split(END)[1]}"


def main(arguments: Sequence[str]) -> None:
    """Makes the pages' table of times from the CSV."""
    parser = PlainParser(prog="python -m vocab_parallel_ce.launch.bench.table", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if stale")
    parser.add_argument("--csv", type=Path, default=medians.PATH, help="the table of medians")
    parser.add_argument("--page", type=Path, action="append", help="a file to rewrite")
    try:
        asked = parser.parse_args(arguments)
        for page in asked.page or PAGES:
            rewrite(page, asked.csv, asked.check)
    except Refusal as refusal:
        say_and_leave("bench.table", str(refusal), refusal.status)


def rewrite(page: Path, csv: Path, check: bool) -> None:
    if not csv.is_file():
        raise Refusal(f"--csv {csv}: No such file or directory")
    try:
        old = page.read_text()
        new = rewritten(old, medians.read(csv))
        if not check:
            page.write_text(new)
    except OSError as error:
        raise Refusal(f"--page {page}: {error.strerror}") from None
    except ValueError as error:
        raise Refusal(error) from None
    if check and new != old:
        raise Refusal(f"{page} is not what {csv} gives; run this without --check", FAILED)


if __name__ == "__main__":
    main(sys.argv[1:])
