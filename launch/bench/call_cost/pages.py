"""What the pages say of the fixed cost of a call, of the results that the repository keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vocab_parallel_ce.launch.bench.call_cost.ranks import ALONE
from vocab_parallel_ce.launch.markdown import markdown
from vocab_parallel_ce.launch.measuring.made import in_words

RESULTS = Path(__file__).with_name("results.json")


def text(found: dict[str, Any]) -> str:
    """The table, and the first call of a process in a sentence."""
    alone, ranks, host = found["one process"], found["two ranks"], found["host"]
    lines = [
        ["one process", _us(alone["cross_entropy"]), f"F.cross_entropy: {_us(alone[_TORCH])}"],
        [
            "two ranks (Gloo)",
            _us(ranks["cross_entropy"]),
            f"the all_gather of what a call sends, alone: {_us(ranks[ALONE])}",
        ],
        [
            "one process, Triton engine, bf16, host without launches",
            _us(host["us"]),
            f"it launches {host['own']} kernels of this library and {host['torch']} of torch's",
        ],
    ]
    compiled, cached = zip(*found["first call"].values(), strict=True)
    return "\n\n".join(
        [
            f"{in_words(found['made'])}.",
            markdown(["", "us", "for comparison"], lines),
            "The first call of a process compiles the kernels of its dtype, which takes "
            f"{_range(compiled)} s. From then on they come from the cache on disk, and the first "
            f"call takes {_range(cached)} s.",
        ]
    )


_TORCH = "F.cross_entropy"


def _us(value: float) -> str:
    return f"{value:,.0f}"


def _range(seconds: tuple[float, ...]) -> str:
    least, most = f"{min(seconds):.1f}", f"{max(seconds):.1f}"
    return least if least == most else f"{least} to {most}"
