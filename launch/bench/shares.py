"""The table of what our loss takes today, one record a processor: ``shares.csv`` beside this file.

A record says how many times the limit of its run (``measuring/limits.py``) our loss took there. The
speed gate holds later code to it; ``record.py`` makes it. A new record replaces the one of the same
processor, threads, ranks, shape, dtype and implementation.
"""

from __future__ import annotations

import csv
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

PATH = Path(__file__).parent / "shares.csv"

Key = tuple[str, int, int, int, int, str, str]


@dataclass(frozen=True)
class Share:
    """What one implementation took of one limit, forward and backward together."""

    processor: str
    threads: int
    """of a rank"""
    ranks: int
    rows: int
    vocab: int
    dtype: str
    peer: str
    times_limit: float
    ms: float
    """lower quartile of the timed runs"""
    limit_ms: float
    busy: str
    """timed runs that found the machine busy, of how many; empty where it was not checked"""
    date: str
    package: str
    torch: str

    @property
    def key(self) -> Key:
        return (
            self.processor, self.threads, self.ranks, self.rows, self.vocab, self.dtype, self.peer,
        )  # fmt: skip


def key_of(run: dict[str, Any], peer: dict[str, Any]) -> Key:
    """Where the record of this run would be."""
    return (
        run["processor"], run["threads_per_rank"], run["ranks"], run["rows"], run["vocab"],
        run["dtype"], peer["name"],
    )  # fmt: skip


def shares_of(run: dict[str, Any], here: dict[str, Any]) -> list[Share]:
    """What is to be kept of one run; ``here`` is the benchmark's environment."""
    busy = f"{run['busy_runs']} of {run['timed_runs']}" if run["idle_checked"] else ""
    return [
        Share(
            *key_of(run, peer),
            times_limit=round(peer["times_limit"], 3),
            ms=round(peer["taken_s"] * 1e3, 2),
            limit_ms=round(sum(peer["limit_s"].values()) * 1e3, 2),
            busy=busy,
            date=here["date"],
            package=here["versions"]["vocab_parallel_ce"] or "",
            torch=here["versions"]["torch"] or "",
        )
        for peer in run["peers"]
        if "times_limit" in peer and not peer["wrong"]
    ]


def read(path: Path = PATH) -> dict[Key, Share]:
    """The table; empty where there is none."""
    if not path.exists():
        return {}
    convert: dict[str, type] = {"int": int, "float": float, "str": str}
    with path.open(newline="") as file:
        rows = [
            Share(**{f.name: convert[str(f.type)](cells[f.name]) for f in fields(Share)})
            for cells in csv.DictReader(file)
        ]
    return {row.key: row for row in rows}


def add(path: Path, new: list[Share]) -> None:
    """Put them into the table at ``path``, in place of what it held of the same."""
    kept = read(path) | {share.key: share for share in new}
    with path.open("w", newline="") as file:
        out = csv.DictWriter(file, [f.name for f in fields(Share)], lineterminator="\n")
        out.writeheader()
        out.writerows(asdict(kept[key]) for key in sorted(kept))
