"""What the pages say of the benchmark, of the medians and shares that the repository keeps."""

from __future__ import annotations

from vocab_parallel_ce.launch.bench.goals import judge_times
from vocab_parallel_ce.launch.bench.medians import Row, runs_of
from vocab_parallel_ce.launch.bench.peers import PEERS
from vocab_parallel_ce.launch.bench.shares import Share
from vocab_parallel_ce.launch.markdown import markdown
from vocab_parallel_ce.launch.terminal import ranks_in_words

NO_CUDA = (
    "CUDA: not measured yet; on a card `vocab-parallel-ce bench --device cuda --csv "
    "launch/bench/medians.csv` fills this in."
)
EMPTY = " An empty cell: torch's own losses need whole logits, and its loss_parallel several ranks."


def _milliseconds(row: Row) -> str:
    return f"{row.ms:,.0f}" if row.ms >= 10 else f"{row.ms:.2f}"


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
    return markdown(header, lines)


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
    return markdown(["ms", *(labels[peer] for peer in peers)], lines)


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
    """Every card of the CSV, forward and backward together."""
    both = [row for row in rows if row.pass_ == "both"]
    parts = []
    for card in _order(both, "card"):
        mine = [row for row in both if row.card == card]
        parts.append(_words(mine))
        if mine[0].device == "cpu":
            parts[-1] += EMPTY
            for shape in dict.fromkeys((row.rows, row.vocab) for row in mine):
                parts.append(f"Logits [{shape[0]}, {shape[1]}]:")
                parts.append(_cpu_table([r for r in mine if (r.rows, r.vocab) == shape]))
        else:
            parts.append(_card_table(mine))
        parts.append(goals(mine))
    if not any(row.device == "cuda" for row in both):
        parts.append(NO_CUDA)
    return "\n\n".join(parts)


def shares(records: list[Share]) -> str:
    """What the loss takes in place, in units of the limit of each processor."""
    parts = []
    for processor in dict.fromkeys(record.processor for record in records):
        mine = [r for r in records if r.processor == processor and r.peer == "ours-inplace"]
        told = ", ".join(f"{r.times_limit:.2f} ({r.dtype})" for r in mine)
        dates = sorted({r.date[:10] for r in mine})
        parts.append(f"* {processor}, {' to '.join(dict.fromkeys((dates[0], dates[-1])))}: {told}")
    return "\n".join(parts)


def memory(rows: list[Row]) -> str:
    """The most that each takes beside the logits, forward and backward together, on a CPU."""
    both = [row for row in rows if row.pass_ == "both" and row.device == "cpu" and row.peak_mib]
    columns = list(dict.fromkeys((row.ranks, row.dtype) for row in both))
    by_cell = {(row.peer, row.ranks, row.dtype): row for row in both}
    labels = {row.peer: row.label for row in both}
    lines = []
    for peer in ("ours-inplace", "ours", "torch", "megatron", "megatron-fused"):
        found = [by_cell.get((peer, *column)) for column in columns]
        if any(found):
            cells = ["" if row is None else f"{row.peak_mib:,.1f}" for row in found]
            lines.append([labels[peer], *cells])
    return markdown(["MiB", *(f"{ranks_in_words(n)}, {dtype}" for n, dtype in columns)], lines)
