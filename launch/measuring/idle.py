"""Whether the machine is quiet: a time taken beside somebody else's work is not worth much."""

from __future__ import annotations

import os
import time
from pathlib import Path


def wait_until_idle(limit: float, share: float = 0.85, window: float = 0.1) -> bool | None:
    """Wait until the cores were idle for ``share`` of a ``window`` seconds, at most ``limit``.

    Returns whether that happened; None when it cannot be told or ``limit`` is 0.
    """
    before = _ticks()
    if before is None or limit <= 0:
        return None
    deadline = time.monotonic() + limit
    while True:
        time.sleep(window)
        now = _ticks()
        if now is None:
            return None
        if now[0] - before[0] >= share * (now[1] - before[1]):
            return True
        if time.monotonic() >= deadline:
            return False
        before = now


def _ticks() -> tuple[int, int] | None:
    """(idle, all) clock ticks so far, summed over the cores this process may use."""
    try:
        lines = Path("/proc/stat").read_text().splitlines()
        mine = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    except (OSError, AttributeError):
        return None
    idle = total = 0
    for line in lines:
        name, *fields = line.split()
        if name in mine:
            ticks = [int(field) for field in fields[:8]]  # the rest repeats guest time
            idle += ticks[3] + ticks[4]  # idle and waiting for a disk
            total += sum(ticks)
    return (idle, total) if total else None
