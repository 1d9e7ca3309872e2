"""The same piece of work on every rank, and what became of it on each, known to all; no hang.

Work runs in a thread of its own, so that a rank which is stuck (it waits for a collective that
another rank never entered, or for a device that does not answer) can still say so. The main threads
then exchange outcomes over a Gloo group that nothing else uses. A rank that raised waits there for
the others; one that is stuck comes when its time is up. After that the ranks are out of step, and
no more work is begun.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Generic, TypeVar

import torch.distributed as dist

from vocab_parallel_ce.launch.measuring.device import device_module
from vocab_parallel_ce.parallel.groups import ParallelGroups

T = TypeVar("T")

GRACE = 15.0
"""Seconds by which the groups' own timeouts are longer than a piece of work may take."""


class LateError(Exception):
    """A call did not end in time."""


class Worker:
    """A thread that makes calls one after the other. One that is late is left behind in it."""

    def __init__(self, prepare: Callable[[], object] = lambda: None) -> None:
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = queue.SimpleQueue()
        self._prepare = prepare
        threading.Thread(target=self._serve, daemon=True).start()

    def call(self, function: Callable[[], T], seconds: float) -> T:
        """What ``function`` returns or raises; LateError after ``seconds``."""
        future: Future[T] = Future()
        self._calls.put((function, future))
        try:
            error = future.exception(seconds)
        except FutureTimeoutError:
            raise LateError(f"did not end within {seconds:g} s") from None
        if error is not None:
            raise error
        return future.result()

    def _serve(self) -> None:
        self._prepare()
        while True:
            function, future = self._calls.get()
            try:
                future.set_result(function())
            except BaseException as error:  # also what would end the thread is the caller's
                future.set_exception(error)
            del function, future  # whatever they hold ends with the call


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """What became of a piece of work on one rank."""

    value: T | None = None
    error: str = ""
    late: bool = False


def in_one_line(error: BaseException) -> str:
    """Class and first line of an exception."""
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


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
