"""Whether all ranks see the same folder: asked before the first step, and of every checkpoint."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from pathlib import Path

from vocab_parallel_ce.launch.refusal import FAILED, Refusal
from vocab_parallel_ce.parallel.groups import ParallelGroups

PATIENCE = 30.0
"""Seconds in which a file of one host must appear on the others: network file systems are late."""
_EVERY = 0.1


def require_shared(out: Path, groups: ParallelGroups) -> None:
    """Refusal on every rank where some do not see what rank 0 writes into ``out``."""
    token = groups.gather(uuid.uuid4().hex)[0]
    probe = out / f".seen-by-all-{token}"
    if groups.rank == 0:
        probe.touch()
    groups.barrier()
    try:
        require_seen_by_all(out, probe.exists, groups)
    finally:
        if groups.rank == 0:
            probe.unlink(missing_ok=True)


def require_seen_by_all(out: Path, seen: Callable[[], bool], groups: ParallelGroups) -> None:
    """Refusal on every rank unless ``seen()`` becomes true on all of them."""
    deadline = time.monotonic() + PATIENCE
    while not (here := seen()) and time.monotonic() < deadline:
        time.sleep(_EVERY)
    blind = [rank for rank, sees in enumerate(groups.gather(here)) if not sees]
    if blind:
        raise Refusal(
            f"--out {out} is not the same folder on every rank: what rank 0 wrote is not on ranks "
            f"{', '.join(map(str, blind))}; name a folder on a file system that all hosts share",
            FAILED,
        )
