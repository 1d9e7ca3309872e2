"""How many collectives are issued, and how long one takes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from vocab_parallel_ce.engines.contract import Wanted
from vocab_parallel_ce.launch.measuring.clock import wall_seconds
from vocab_parallel_ce.launch.measuring.rounds import repeated

PARTIALS = len(Wanted().rows)
"""floats a row that plain cross-entropy exchanges: maximum, sum, logit of the target"""


def count_collectives(run: Callable[[], Any]) -> tuple[Any, int | None]:
    """(what ``run`` returned, how many collectives it issued).

    Counted by torch's own profiler: every collective, whoever calls it and over whichever
    backend, passes the dispatcher as a ``c10d::`` operator. None when the profiler is missing.
    """
    # The plain profiler: torch.profiler would import the whole compiler first. It sees the CPU
    # side, which is where a collective is issued, on every device.
    profiler: Any = torch.autograd.profiler.profile()
    try:
        profiler.__enter__()
    except RuntimeError:
        return run(), None
    try:
        result = run()
    finally:
        profiler.__exit__(None, None, None)
    events = profiler.function_events or []
    return result, sum(event.name.startswith("c10d::") for event in events)


def time_collective(
    call: Callable[[], object],
    align: Callable[[], object],
    device: torch.device,
    rounds: int,
    warm_up: int = 1,
) -> list[float]:
    """Seconds until this rank holds the result, of every round; ``align`` lets ranks begin
    together."""
    return repeated(partial(wall_seconds, call, device), align, rounds, warm_up)
