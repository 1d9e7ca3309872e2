"""What the pages say of the demo, of the result of a run that the repository keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vocab_parallel_ce.launch.measuring.made import in_words

RESULTS = Path(__file__).with_name("demo.json")


def text(found: dict[str, Any]) -> str:
    """A paragraph."""
    ours, gathered, gathering = found["costs"]
    errors = found["errors"]
    return (
        f"`make demo`, tp={found['tp']} on two CPU ranks, {in_words(found['made'])}: the loss of "
        f"{found['rows']} rows of {found['vocab_size']:,} takes {_cost(ours)}. F.cross_entropy on "
        f"gathered logits takes {_cost(gathered)}, and gathering them {_ms(gathering)} more. The "
        f"demo took {found['seconds']:.0f} s after the install. In {found['steps']} steps its loss "
        f"falls from {found['first_loss']:.2f} to {found['last_loss']:.2f}. Against fp64, the loss "
        f"is off by {errors['loss_error']:.1e}, and its gradient by "
        f"{errors['gradient_error']:.1e} of the largest element."
    )


def _ms(cost: dict[str, Any]) -> str:
    return f"{cost['milliseconds']:.0f} ms"


def _cost(cost: dict[str, Any]) -> str:
    return f"{_ms(cost)} and {cost['peak_bytes'] / 2**20:.0f} MiB of extra memory"
