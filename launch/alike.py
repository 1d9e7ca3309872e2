"""Whether the ranks of a job were started alike: said at its start, before anything hangs."""

from __future__ import annotations

import os
from collections.abc import Callable

from vocab_parallel_ce.launch.refusal import Refusal
from vocab_parallel_ce.switches import CHECK_VARIABLE, check_is_on

Gather = Callable[[tuple[bool, str | None]], list[tuple[bool, str | None]]]


def require_alike(gather: Gather) -> None:
    """Refusal on every rank where only some of them check; ``gather`` returns each rank's value."""
    ranks = gather((check_is_on("environment"), os.environ.get(CHECK_VARIABLE)))
    for rank, (on, value) in enumerate(ranks):
        if on != ranks[0][0]:
            first = _in_words(ranks[0][1])
            raise Refusal(
                f"{CHECK_VARIABLE} is {first} on rank 0 and {_in_words(value)} on rank {rank}: "
                "ranks that check would wait for those that do not; set it alike on every rank"
            )


def _in_words(value: str | None) -> str:
    return "not set" if value is None else repr(value)
