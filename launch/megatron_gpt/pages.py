"""What the pages say of the losses side by side, of results that the repository keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vocab_parallel_ce.launch.markdown import markdown
from vocab_parallel_ce.launch.measuring.device import MIB
from vocab_parallel_ce.launch.measuring.made import in_words

FP32, BF16 = (Path(__file__).with_name(f"demo_{dtype}.json") for dtype in ("fp32", "bf16"))
HEADER = (
    "loss of", "loss", "gradient norm", "gradient error", "forward ms", "backward ms", "peak MiB",
    "collectives",
)  # fmt: skip


def text(found: dict[str, Any]) -> str:
    """One run: a table under what it was made of."""
    lines = [
        [
            one["name"],
            f"{one['loss']:.6f}",
            f"{one['gradient_norm']:.6f}",
            f"{one['gradient_error']:.1e}",
            f"{one['forward_ms']:.1f}",
            f"{one['backward_ms']:.1f}",
            f"{one['peak_bytes'] / MIB:.1f}",
            " + ".join(map(str, one["collectives"])),
        ]
        for one in found["losses"]
    ]
    where = (
        f"{found['dtype']}, {found['tokens']:,} tokens, {found['columns']:,} columns on each of "
        f"{found['tp']} ranks; {in_words(found['made'])}:"
    )
    return f"{where}\n\n{markdown(HEADER, lines)}"
