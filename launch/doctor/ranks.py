"""The same piece of work on every rank, and what became of it on each, known to all; no hang.

Work runs in a thread of its own, so that a rank which is stuck (it waits for a collective that
another rank never entered, or for a device that does not answer) can still say so. The main threads
then exchange outcomes over a Gloo group that nothing else uses. A rank that raised waits there for
the others; one that is stuck comes when its time is up. After that the ranks are out of step, and
no more work is begun.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Generic, TypeVar

import torch.distributed as dist

from vocab_parallel_ce.launch.doctor.worker import LateError, Worker, in_one_line
from vocab_parallel_ce.launch.measuring.device import device_module
from vocab_parallel_ce.parallel.groups import ParallelGroups

T = TypeVar("T")

GRACE = 15.0
"""Seconds by which the groups' own timeouts are longer than a piece of work may take."""


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """What became of a piece of work on one rank."""

    value: T | None = None
    error: str = ""
    late: bool = False


class Ranks:
    """Runs work on all ranks and gathers the outcomes. Every rank makes the same calls."""

    def __init__(self, groups: ParallelGroups, timeout: float) -> None:
        self.groups = groups
        self.timeout = timeout
        self.broken = ""
        """Why no more work is begun; empty while the ranks are in step."""
        # On a CPU groups.control is the group that the work itself uses.
        self._verdicts = dist.new_group(
            backend="gloo", timeout=timedelta(seconds=timeout + GRACE), group_desc="doctor"
        )
        device = groups.device
        own_device = (lambda: None) if device.type == "cpu" else self._make_current
        self._worker = Worker(own_device)

    def _make_current(self) -> None:
        device_module(self.groups.device).set_device(self.groups.device)

    def gather(self, value: T) -> list[T]:
        """``value`` of every rank, in rank order."""
        everyone: list[Any] = [None] * self.groups.world_size
        dist.all_gather_object(everyone, value, group=self._verdicts)
        return everyone

    def run(self, work: Callable[[], T]) -> list[Outcome[T]]:
        """``work()`` on this rank, and the outcomes of all of them; never raises for its errors."""
        if self.broken:
            raise RuntimeError(f"no more work: {self.broken}")
        mine: Outcome[T]
        try:
            mine = Outcome(self._worker.call(work, self.timeout))
        except LateError as late:
            mine = Outcome(error=str(late), late=True)
        except Exception as error:
            mine = Outcome(error=in_one_line(error))
        everyone = self.gather(mine)
        late_ranks = [rank for rank, outcome in enumerate(everyone) if outcome.late]
        if late_ranks:
            who = ", ".join(map(str, late_ranks))
            self.broken = f"rank {who} did not end in time, so the ranks are out of step"
        return everyone
