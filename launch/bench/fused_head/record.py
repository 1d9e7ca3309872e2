"""python -m vocab_parallel_ce.launch.bench.fused_head.record: the results that the pages show.

Five runs of the benchmark, one after the other: one process and two ranks, in fp32 and bf16, and
70 % of the rows ignored. Some six minutes on two quiet cores. The numbers go to ``results.json``
beside this file.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from vocab_parallel_ce.launch.bench.fused_head.pages import OURS, RESULTS, TORCH
from vocab_parallel_ce.launch.measuring.idle import wait_until_idle
from vocab_parallel_ce.launch.measuring.made import made_here
from vocab_parallel_ce.launch.plain_parser import PlainParser
from vocab_parallel_ce.launch.refusal import FAILED, Refusal, say_and_leave

MODULE = "vocab_parallel_ce.launch.bench.fused_head"


class Asked(NamedTuple):
    """One run of the benchmark."""

    ranks: int
    dtype: str
    ignored: float = 0.0
    ways: tuple[str, ...] = ()
    """only these"""


RUNS = (
    Asked(1, "fp32"),
    Asked(1, "bf16"),
    Asked(2, "fp32"),
    Asked(2, "bf16"),
    Asked(1, "fp32", 0.7, (OURS, TORCH)),
)


def command(asked: Asked, arguments: Sequence[str], file: Path) -> list[str]:
    """What a shell would be told."""
    start = [sys.executable, "-m"]
    if asked.ranks > 1:
        start += ["torch.distributed.run", "--standalone", f"--nproc-per-node={asked.ranks}", "-m"]
    ways = [word for way in asked.ways for word in ("--way", way)]
    options = ["--dtype", asked.dtype, "--ignored", str(asked.ignored), "--json", str(file)]
    return [*start, MODULE, *options, *ways, *arguments]


def measured(arguments: Sequence[str]) -> dict[str, Any]:
    """The runs, and where and when they were made."""
    runs = []
    quiet = wait_until_idle(30.0)
    for asked in RUNS:
        with TemporaryDirectory() as folder:
            file = Path(folder) / "head.json"
            threads = max(1, len(os.sched_getaffinity(0)) // asked.ranks)
            environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
            done = subprocess.run(command(asked, arguments, file), env=environment, check=False)
            if done.returncode:
                raise Refusal(f"the run of {asked} ended with {done.returncode}", FAILED)
            runs.append(json.loads(file.read_text()))
    return {"made": made_here(), "busy": quiet is False, "runs": runs}


def main(arguments: Sequence[str]) -> None:
    """Measures and stores."""
    parser = PlainParser(prog=f"python -m {MODULE}.record", description=__doc__)
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each way (3)")
    try:
        asked = parser.parse_args(arguments)
        found = measured(["--repeats", str(asked.repeats)])
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    except Refusal as refusal:
        say_and_leave("fused-head record", str(refusal), refusal.status)


if __name__ == "__main__":
    main(sys.argv[1:])
