"""What torch allocates while something runs."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

from torch.profiler import ProfilerActivity, profile


def allocations(run: Callable[[], object]) -> list[int]:
    """Bytes of every allocation (positive) and release (negative) of torch, in order."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    assert profiler.profiler is not None
    events = profiler.profiler.kineto_results.events()
    memory = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    return [size for _, size in sorted(memory, key=lambda event: event[0])]


def peak(sizes: list[int]) -> int:
    """The most that is there at a time."""
    return max(accumulate(sizes), default=0)
