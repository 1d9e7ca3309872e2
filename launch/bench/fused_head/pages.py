"""python -m vocab_parallel_ce.launch.bench.fused_head.pages: measures, and fills in the pages.

Five runs of the benchmark, one after the other: one process and two ranks, in fp32 and bf16, and
70 % of the rows ignored. Some six minutes on two quiet cores. The numbers go to ``results.json``
beside this file, and from there into the tables of README.md and docs/fused-head.md. With
--stored nothing is measured; with --check nothing is changed, and a page that is not what the file
gives is an error.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch

from vocab_parallel_ce.launch.bench.fused_head.measure import PRODUCTS
from vocab_parallel_ce.launch.measuring.idle import wait_until_idle
from vocab_parallel_ce.launch.measuring.machine import processor
from vocab_parallel_ce.launch.plain_parser import PlainParser
from vocab_parallel_ce.launch.refusal import FAILED, Refusal, say_and_leave
from vocab_parallel_ce.launch.terminal import ranks_in_words

MODULE = "vocab_parallel_ce.launch.bench.fused_head"
COMMAND = f"python -m {MODULE}.pages"
RESULTS = Path(__file__).with_name("results.json")
BEGIN, END = "<!-- fused_head: begin -->", "<!-- fused_head: end -->"
OURS, EACH_TOKEN = "ours, fused", "ours, fused, a loss per token"
TORCH = "F.linear + F.cross_entropy"
BEST_OF_TORCH, MEGATRON = "F.linear_cross_entropy, our rows", "F.linear + Megatron fused"
FRONT = (PRODUCTS, OURS, TORCH, BEST_OF_TORCH, MEGATRON)
"""what the front page shows"""
CHUNK_MIB = 128
"""of logits, the default on a CPU"""
NOT_YET = f"Not measured yet: `{COMMAND}` fills this in."
Run = dict[str, Any]


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
    return {
        "machine": f"{processor()}, {len(os.sched_getaffinity(0))} cores",
        "date": f"{datetime.now(timezone.utc):%Y-%m-%d}",
        "torch": torch.__version__,
        "busy": quiet is False,
        "runs": runs,
    }


def _of(run: Run, name: str) -> dict[str, Any] | None:
    """A way that ran."""
    found = next((way for way in run["ways"] if way["name"] == name), None)
    return found if found is not None and found["milliseconds"] is not None else None


def _heading(run: Run) -> str:
    text = f"{ranks_in_words(run['ranks'])}, {run['dtype']}"
    return f"{text}, {run['ignored']:.0%} ignored" if run["ignored"] else text


def _markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [list(header), ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def times(runs: Sequence[Run], only: Sequence[str] = ()) -> str:
    """Ways down, runs across: time in units of the three products, and peak memory."""
    names = dict.fromkeys(way["name"] for run in runs for way in run["ways"])
    lines = []
    for name in names:
        if only and name not in only:
            continue
        found = [_of(run, name) for run in runs]
        if not any(found):
            continue
        cells = []
        for way in found:
            text = "" if way is None else f"{way['products']:.2f}x"
            if way is not None and name == PRODUCTS:
                text = f"{way['milliseconds'] / 1000:.2f} s"
            elif way is not None and way["peak_mib"] is not None:
                text += f" / {way['peak_mib']:.0f}"
            cells.append(text)
        lines.append([f"**{name}**" if name.startswith("ours") else name, *cells])
    return _markdown(["time / MiB", *map(_heading, runs)], lines)


def errors(run: Run) -> str:
    """Of one run: errors relative to fp64."""
    quantities = [f"{kind}, {what}" for kind in ("random", "confident") for what in _QUANTITIES]
    lines = [
        [way["name"], *(f"{error:.1e}" for error in way["errors"])]
        for way in run["ways"]
        if way["errors"]
    ]
    return _markdown([f"{_heading(run)}: rows", *quantities], lines)


_QUANTITIES = ("loss", "hidden gradient", "head gradient")


def _gradients_mib(run: Run) -> float:
    """Of the hidden states and this rank's rows of the head."""
    numbers = (run["rows"] + run["vocab"] / run["ranks"]) * run["width"]
    return float(numbers * (4 if run["dtype"] == "fp32" else 2) / (1 << 20))


def goals(runs: Sequence[Run]) -> list[tuple[str, float, float]]:
    """What was to be reached, the number, and its limit: at most so much."""
    out = []
    for run in runs:
        where, ours = _heading(run), _of(run, OURS)
        if ours is None:
            continue
        if run["ignored"]:
            if (other := _of(run, TORCH)) is not None:
                share = ours["milliseconds"] / other["milliseconds"]
                out.append((f"{where}: time of {TORCH}", share, 1 / 3))
            continue
        out.append((f"{where}: the three products", ours["products"], 1.10))
        if (each := _of(run, EACH_TOKEN)) is not None:
            out.append((f"{where}, a loss per token: four products", each["products"] * 0.75, 1.10))
        limit = _gradients_mib(run) + CHUNK_MIB + 16
        if ours["peak_mib"] is not None:
            out.append((f"{where}: gradients + chunk + 16 MiB", ours["peak_mib"] / limit, 1.0))
        if run["dtype"] == "fp32" and (best := _of(run, BEST_OF_TORCH)) is not None:
            share = ours["milliseconds"] / best["milliseconds"]
            out.append((f"{where}: time of {BEST_OF_TORCH}", share, 1.0))
        if run["ranks"] > 1 and (other := _of(run, MEGATRON)) is not None:
            share = ours["milliseconds"] / other["milliseconds"]
            out.append((f"{where}: time of {MEGATRON}", share, 1.0))
            if ours["peak_mib"] is not None and other["peak_mib"]:
                share = ours["peak_mib"] / other["peak_mib"]
                out.append((f"{where}: memory of {MEGATRON}", share, 0.5))
    return out


def _words(found: dict[str, Any]) -> str:
    run = found["runs"][0]
    text = (
        f"[{run['rows']}, {run['width']}] hidden states, [{run['vocab']}, {run['width']}] head, "
        f"mean loss, forward and backward; {found['machine']}, {found['date']}, torch "
        f"{found['torch']}. Time in units of the three matrix products alone, measured in the same "
        "run; peak memory in MiB with the gradients."
    )
    return text + (" **The machine was not quiet.**" if found["busy"] else "")


def short(found: dict[str, Any] | None) -> str:
    """For the front page."""
    if found is None:
        return NOT_YET
    return f"{_words(found)}\n\n{times(found['runs'], FRONT)}"


def long(found: dict[str, Any] | None) -> str:
    """For the page of the fused head."""
    if found is None:
        return NOT_YET
    parts = [_words(found), times(found["runs"])]
    parts += [errors(run) for run in found["runs"] if run["ranks"] == 1 and not run["ignored"]]
    judged = goals(found["runs"])
    missed = [goal for goal in judged if goal[1] > goal[2]]
    text = f"Goals met: {len(judged) - len(missed)} of {len(judged)}."
    lines = [f"* {what}: {number:.2f}, goal {limit:.2f}" for what, number, limit in missed]
    return "\n\n".join([*parts, "\n".join([text, *lines])])


_CLONE = Path(__file__).resolve().parents[3]
PAGES = {_CLONE / "README.md": short, _CLONE / "docs" / "fused-head.md": long}


def rewritten(text: str, part: str) -> str:
    """A page with what lies between its markers replaced."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise Refusal(f"a page must hold {BEGIN!r} once, and after it {END!r} once")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{part}\n\n{END}{rest.split(END)[1]}"


def main(arguments: Sequence[str]) -> None:
    """Measures, stores, and fills in the pages."""
    parser = PlainParser(prog=COMMAND, description=__doc__)
    parser.add_argument("--stored", action="store_true", help="do not measure")
    parser.add_argument("--check", action="store_true", help="change nothing; fail if stale")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each way (3)")
    try:
        asked = parser.parse_args(arguments)
        if not asked.stored and not asked.check:
            found = measured(["--repeats", str(asked.repeats)])
            RESULTS.write_text(json.dumps(found, indent=1) + "\n")
        stored = json.loads(RESULTS.read_text()) if RESULTS.is_file() else None
        for page, part in PAGES.items():
            old = page.read_text()
            new = rewritten(old, part(stored))
            if asked.check and new != old:
                raise Refusal(f"{page} is not what {RESULTS} gives; use --stored", FAILED)
            if not asked.check:
                page.write_text(new)
    except Refusal as refusal:
        say_and_leave("fused-head pages", str(refusal), refusal.status)


if __name__ == "__main__":
    main(sys.argv[1:])
