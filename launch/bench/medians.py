"""The table of measured medians that is kept in the repository: one CSV for all cards.

One row a card, number of ranks, shape, dtype, implementation and pass (forward, backward, both). A
new measurement replaces the rows of its own card, ranks, shape and dtype, so that rows beside each
other always come from one run: a ratio between rows of one run means something, others do not.
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from vocab_parallel_ce.launch.bench.peers import BY_NAME
from vocab_parallel_ce.launch.bench.rank import PASSES

PATH = Path(__file__).parent / "medians.csv"


@dataclass(frozen=True)
class Row:
    """One median. Times of the slowest rank, bytes of the rank with most."""

    card: str
    device: str
    ranks: int
    rows: int
    vocab: int
    dtype: str
    peer: str
    label: str
    pass_: str
    """forward, backward or both"""
    ms: float
    min_ms: float
    ideal_bytes: int
    """an element that the pass moves at least: b, 2 b or 3 b for logits of b bytes"""
    copy_bytes: float
    """an element that a copy would have moved in that time"""
    share: float
    """of the copy bandwidth: ideal_bytes / copy_bytes"""
    copy_gb_per_s: float
    """measured in the same run, read and written, all ranks together"""
    peak_mib: float | None
    """beside the logits, of forward and backward together"""
    busy: str
    """timed runs that found the machine busy, of how many; empty where it was not checked"""
    date: str
    torch: str
    triton: str
    package: str
    """that computes it, and its version"""


Group = tuple[str, int, int, int, str]


def group_of(row: Row) -> Group:
    """What one run measures together."""
    return (row.card, row.ranks, row.rows, row.vocab, row.dtype)


def rows_of(run: dict[str, Any], here: dict[str, Any]) -> list[Row]:
    """The medians of one run; ``here`` is the benchmark's environment."""
    versions = here["versions"]
    elements = run["rows"] * run["vocab"]
    size = run["logits_bytes_per_rank"] * run["ranks"]
    card = here["device"]
    if run["device"] == "cpu":
        card += f", {here['cores']} cores"
    busy = f"{run['busy_runs']} of {run['timed_runs']}" if run["idle_checked"] else ""
    found = []
    for peer in run["peers"]:
        if peer["status"] or peer["wrong"]:
            continue
        package = BY_NAME[peer["name"]].distribution
        peak = peer.get("peak_bytes")
        summaries = {name: peer[f"{name}_s"] for name in ("forward", "backward")}
        for name, summary in (summaries | {"both": peer["total_s"]}).items():
            ideal = PASSES[name] * size // elements
            copied = summary["median"] * run["copy_bandwidth"]["median"] / elements
            found.append(
                Row(
                    card=card,
                    device=run["device"],
                    ranks=run["ranks"],
                    rows=run["rows"],
                    vocab=run["vocab"],
                    dtype=run["dtype"],
                    peer=peer["name"],
                    label=peer["label"],
                    pass_=name,
                    ms=round(summary["median"] * 1e3, 4),
                    min_ms=round(summary["min"] * 1e3, 4),
                    ideal_bytes=ideal,
                    copy_bytes=round(copied, 3),
                    share=round(ideal / copied, 4),
                    copy_gb_per_s=round(run["copy_bandwidth"]["median"] / 1e9, 2),
                    peak_mib=None if peak is None else round(peak / 2**20, 2),
                    busy=busy,
                    date=here["date"],
                    torch=versions["torch"] or "",
                    triton=versions["triton"] or "",
                    package=f"{package} {versions[package] or ''}".strip(),
                )
            )
    return found


def runs_of(rows: list[Row]) -> list[dict[str, Any]]:
    """Runs again, as far as goals of speed are judged by them: a peer's median of both passes."""
    groups: dict[Group, list[Row]] = {}
    for row in rows:
        if row.pass_ == "both":
            groups.setdefault(group_of(row), []).append(row)
    return [
        {
            "ranks": mine[0].ranks,
            "rows": mine[0].rows,
            "vocab": mine[0].vocab,
            "dtype": mine[0].dtype,
            "device": mine[0].device,
            "peers": [
                {
                    "name": row.peer,
                    "label": row.label,
                    "ours": BY_NAME[row.peer].ours,
                    "status": "",
                    "total_s": {"median": row.ms / 1e3},
                    "bandwidth_share": row.share,
                }
                for row in mine
            ],
        }
        for mine in groups.values()
    ]


def _text(cell: str | None) -> str:
    """ValueError for a column that is not there."""
    if cell is None:
        raise ValueError
    return cell


_CONVERT: dict[str, Callable[[str | None], int | float | str]] = {
    "int": lambda cell: int(_text(cell)),
    "float": lambda cell: float(_text(cell)),
    "str": _text,
}


def read(path: Path = PATH) -> list[Row]:
    """The table; empty where there is none yet. ValueError for a file that is another."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        found = []
        reader = csv.DictReader(file)
        for cells in reader:
            values: dict[str, Any] = {}
            for column in fields(Row):
                name, kind = column.name.rstrip("_"), str(column.type)
                optional = kind.endswith("| None")
                text, convert = cells.get(name), _CONVERT[kind.removesuffix(" | None")]
                try:
                    values[column.name] = None if optional and text == "" else convert(text)
                except ValueError:
                    raise ValueError(
                        f"{path} is no table of medians: line {reader.line_num} has {name}={text!r}"
                    ) from None
            found.append(Row(**values))
    return found


def write(rows: list[Row], path: Path = PATH) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    names = [column.name for column in fields(Row)]
    with path.open("w", newline="") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow(name.rstrip("_") for name in names)
        for row in rows:
            values = asdict(row)
            out.writerow("" if values[name] is None else values[name] for name in names)


def add(path: Path, runs: list[dict[str, Any]], here: dict[str, Any]) -> None:
    """Put the runs into the table at ``path``, in place of what it held of the same groups."""
    new = [row for run in runs if run["copy_bandwidth"] for row in rows_of(run, here)]
    replaced = {group_of(row) for row in new}
    kept = [row for row in read(path) if group_of(row) not in replaced]
    # A stable order by group makes the file's history readable; within a group as it was run.
    write(sorted(kept + new, key=group_of), path)
