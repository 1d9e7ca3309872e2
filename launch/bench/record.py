"""python -m vocab_parallel_ce.launch.bench.record runs/shares/bench.json: keep what it takes today.

Adds to the table of ``shares.py``, which the speed gate reads, what a benchmark of this machine
found. `make record-shares` runs both.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from vocab_parallel_ce.launch.bench.shares import PATH, add, shares_of


def main(
    report: Annotated[Path, typer.Argument(help="A bench.json of this machine, when quiet.")],
    csv: Annotated[Path, typer.Option(help="The table of shares.")] = PATH,
) -> None:
    """Record how many times the limit our loss takes here; the speed gate then holds it to that."""
    try:
        found = json.loads(report.read_text())
    except (OSError, ValueError) as error:
        print(f"{report}: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    busy, timed = (sum(run[k] for run in found["runs"]) for k in ("busy_runs", "timed_runs"))
    new = [share for run in found["runs"] for share in shares_of(run, found["environment"])]
    if not new:
        print(f"{report} holds no run of ours on a CPU", file=sys.stderr)
        raise typer.Exit(2)
    if 4 * busy > timed:
        print(f"{busy} of {timed} timed runs found the machine busy: repeat", file=sys.stderr)
        raise typer.Exit(1)
    add(csv, new)
    for share in new:
        print(f"{share.dtype} {share.peer}: {share.times_limit:.2f} times the limit")
    print(f"Recorded in {csv}")


if __name__ == "__main__":
    typer.run(main)
