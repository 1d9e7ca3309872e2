"""python -m vocab_parallel_ce.launch.pages: the measured numbers of the pages, from stored results.

Each part of a page lies between two markers. What the parts say is made beside the jobs that
measure, in their ``pages.py``; nothing is measured here. With --check nothing is changed, and a
page that is not what the results give is an error.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vocab_parallel_ce.launch.bench import medians, shares
from vocab_parallel_ce.launch.bench import pages as bench
from vocab_parallel_ce.launch.bench.call_cost import pages as call_cost
from vocab_parallel_ce.launch.bench.curve import pages as curve
from vocab_parallel_ce.launch.bench.fused_head import pages as fused_head
from vocab_parallel_ce.launch.markdown import filled
from vocab_parallel_ce.launch.megatron_gpt import pages as megatron
from vocab_parallel_ce.launch.plain_parser import PlainParser
from vocab_parallel_ce.launch.refusal import FAILED, Refusal, say_and_leave
from vocab_parallel_ce.launch.train import pages as demo

CLONE = Path(__file__).resolve().parents[1]


class Part(NamedTuple):
    """A part of a page."""

    page: str
    name: str
    """of its markers"""
    text: Callable[[], str]


def _json(path: Path) -> Any:
    return json.loads(path.read_text())


PARTS = (
    Part("README.md", "fused_head", lambda: fused_head.short(_json(fused_head.RESULTS))),
    Part("README.md", "bench", lambda: bench.table(medians.read())),
    Part("docs/fused-head.md", "fused_head", lambda: fused_head.long(_json(fused_head.RESULTS))),
    Part("docs/numbers.md", "bench", lambda: bench.table(medians.read())),
    Part("docs/numbers.md", "shares", lambda: bench.shares(list(shares.read().values()))),
    Part("docs/numbers.md", "memory", lambda: bench.memory(medians.read())),
    Part("docs/numbers.md", "curve", lambda: curve.text(medians.read(curve.RESULTS))),
    Part("docs/numbers.md", "call_cost", lambda: call_cost.text(_json(call_cost.RESULTS))),
    Part("docs/numbers.md", "demo", lambda: demo.text(_json(demo.RESULTS))),
    Part("docs/megatron.md", "demo_fp32", lambda: megatron.text(_json(megatron.FP32))),
    Part("docs/megatron.md", "demo_bf16", lambda: megatron.text(_json(megatron.BF16))),
)


def main(arguments: Sequence[str]) -> None:
    """Fills in the pages."""
    parser = PlainParser(prog="python -m vocab_parallel_ce.launch.pages", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if stale")
    try:
        check = parser.parse_args(arguments).check
        for part in PARTS:
            fill(part, check)
    except Refusal as refusal:
        say_and_leave("pages", str(refusal), refusal.status)


def fill(part: Part, check: bool) -> None:
    """Writes one part, or says that it is not what the results give."""
    page = CLONE / part.page
    old = page.read_text()
    new = filled(old, part.name, part.text())
    if check and new != old:
        raise Refusal(
            f"{part.page}: {part.name} is not what the results give; run this without --check",
            FAILED,
        )
    if not check:
        page.write_text(new)


if __name__ == "__main__":
    main(sys.argv[1:])
