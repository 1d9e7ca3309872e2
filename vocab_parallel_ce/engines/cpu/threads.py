"""The pool of threads that runs a kernel over ranges of items.

The kernels release the GIL. The calling thread and up to ``torch.get_num_threads() - 1`` others
draw ranges from one list until it is empty; nothing that was started outlives the call.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import torch

# Elements: below, one thread does the work in the time (0.2 ms) that another saves by waking up
# (20 us), drawing, and being waited for. A range has at least half of them.
SEQUENTIAL_BELOW = 1 << 19
RANGES_PER_THREAD = 8  # a thread that is held up leaves its share to the others


class _Pool:
    """Threads beside the calling one; made again when their number changes."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.size = 0
        self.executor: ThreadPoolExecutor | None = None

    def submit(self, work: Callable[[], None], copies: int, size: int) -> None:
        """Hand up to ``copies`` of ``work`` to a pool of ``size`` threads; fewer if it has none.

        A thread that cannot be started (a limit of the container, an interpreter that shuts down)
        is no error: ``work`` may run in none of them, or later than anybody waits for it.
        """
        with self.lock:
            if self.executor is None or self.size != size:
                if self.executor is not None:
                    self.executor.shutdown(wait=False)
                self.executor, self.size = ThreadPoolExecutor(size, "vocab_parallel_ce"), size
            with suppress(RuntimeError, MemoryError):
                for _ in range(copies):
                    self.executor.submit(work)


_pool = _Pool()


def forget_pool() -> None:
    """A forked child has none of its parent's threads."""
    global _pool
    _pool = _Pool()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=forget_pool)


def run(kernel: Callable[..., None], items: int, elements: int, *args: Any) -> None:
    """Run ``kernel(begin, end, *args)`` over all ``items``, which have ``elements`` in all."""
    if elements < SEQUENTIAL_BELOW:
        kernel(0, items, *args)
        return
    threads = torch.get_num_threads()
    least = -(-SEQUENTIAL_BELOW * items // (2 * max(1, elements)))
    size = max(least, -(-items // (threads * RANGES_PER_THREAD)))
    copies = min(threads, -(-items // size)) - 1
    if copies <= 0:
        kernel(0, items, *args)
        return

    def some(begin: int) -> None:
        kernel(begin, min(begin + size, items), *args)

    job = Job(range(0, items, size), some)
    try:
        _pool.submit(job.work_in_pool, copies, threads - 1)
        job.work_here()
    finally:
        job.wait()
    if job.error is not None:
        raise job.error


class Job:
    """Row ranges that the calling thread and those of the pool take in turn.

    What is counted are the ranges that the pool works on, and not the threads that were asked to: a
    pool may lose one on its way, and yet run it later. Who comes late finds nothing left.
    """

    def __init__(self, begins: Iterable[int], run: Callable[[int], None]) -> None:
        self.begins, self.run = deque(begins), run
        self.busy = 0
        self.error: BaseException | None = None
        self.idle = threading.Condition()

    def work_here(self) -> None:
        """Take ranges until there are none. Not counted: an interrupt could lose the count."""
        while True:
            try:
                begin = self.begins.popleft()
            except IndexError:
                return
            self.run(begin)

    def work_in_pool(self) -> None:
        """The same, for a thread that the calling one must wait for."""
        while True:
            with self.idle:
                if not self.begins:
                    return
                begin = self.begins.popleft()
                self.busy += 1
            try:
                self.run(begin)
            except BaseException as problem:
                self.error = problem
                self.begins.clear()
            finally:
                with self.idle:
                    self.busy -= 1
                    self.idle.notify()

    def wait(self) -> None:
        """Until nobody writes into the caller's memory any more, whatever failed."""
        interrupt: BaseException | None = None
        while True:
            try:
                with self.idle:
                    self.begins.clear()
                    self.idle.wait_for(lambda: self.busy == 0)
                break
            except BaseException as problem:  # Ctrl-C, maybe more than once
                interrupt = problem
        if interrupt is not None:
            raise interrupt
