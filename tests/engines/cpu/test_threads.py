"""The pool of the cpu engine: nothing that was started may outlive the call, whatever failed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from vocab_parallel_ce import cross_entropy
from vocab_parallel_ce.engines.cpu import threads

ROWS, COLUMNS = 64, 1 << 15  # enough for four threads


@pytest.fixture(autouse=True)
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    threads.forget_pool()
    yield
    torch.set_num_threads(before)
    threads.forget_pool()


class Kernel:
    """Stands for a kernel: takes a while, and notes who ran what and when it ended."""

    def __init__(self, fails_in_pool: bool = False) -> None:
        self.caller = threading.get_ident()
        self.fails_in_pool = fails_in_pool
        self.ended: list[int] = []
        self.running = 0
        self.lock = threading.Lock()

    def __call__(self, begin: int, end: int) -> None:
        with self.lock:
            self.running += 1
        # The caller is done long before the others.
        time.sleep(0.001 if threading.get_ident() == self.caller else 0.05)
        with self.lock:
            self.running -= 1
            self.ended += range(begin, end)
        if self.fails_in_pool and threading.get_ident() != self.caller:
            raise ValueError("sabotaged")


def _limit(monkeypatch: pytest.MonkeyPatch, allowed: int, accept: bool) -> None:
    """A pool whose ``submit`` raises from some call on, as at a limit of processes.

    ``accept``: it has taken the work before it raises, as ThreadPoolExecutor has.
    """
    submit: Callable[..., Any] = ThreadPoolExecutor.submit
    calls = iter(range(1000))

    def limited(self: ThreadPoolExecutor, work: Callable[[], None]) -> Any:
        if next(calls) < allowed:
            return submit(self, work)
        if accept:
            submit(self, work)
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(ThreadPoolExecutor, "submit", limited)


@pytest.mark.parametrize("accept", [False, True])
@pytest.mark.parametrize("allowed", [0, 1, 2])
def test_a_thread_that_cannot_be_started(
    monkeypatch: pytest.MonkeyPatch, allowed: int, accept: bool
) -> None:
    _limit(monkeypatch, allowed, accept)
    kernel = Kernel()
    threads.run(kernel, ROWS, ROWS * COLUMNS)
    assert kernel.running == 0
    assert sorted(kernel.ended) == list(range(ROWS))


def test_losses_at_a_limit_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, target = torch.randn(512, 8192), torch.randint(0, 8192, (512,))
    want = cross_entropy(logits, target, reduction="none")
    _limit(monkeypatch, 1, accept=True)
    for _ in range(10):
        assert torch.equal(cross_entropy(logits, target, reduction="none"), want)


def test_an_error_in_a_thread_is_raised_when_all_have_ended() -> None:
    kernel = Kernel(fails_in_pool=True)
    with pytest.raises(ValueError, match="sabotaged"):
        threads.run(kernel, ROWS, ROWS * COLUMNS)
    assert kernel.running == 0


@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_caller_waits_for_the_others(kind: type[BaseException]) -> None:
    kernel = Kernel()

    def interrupted(begin: int, end: int) -> None:
        if threading.get_ident() == kernel.caller:
            time.sleep(0.02)  # the others have begun
            raise kind
        kernel(begin, end)

    with pytest.raises(kind):
        threads.run(interrupted, ROWS, ROWS * COLUMNS)
    assert kernel.running == 0
    time.sleep(0.1)
    assert len(kernel.ended) < ROWS  # nobody went on with what was left


def test_work_that_was_lost_and_comes_late_does_nothing() -> None:
    """The queue of a pool may hold work whose thread failed to start; a later thread takes it."""
    kept: list[Callable[[], None]] = []
    seen: list[int] = []
    job = threads.Job(range(4), seen.append)
    kept.append(job.work_in_pool)
    job.work_here()
    job.wait()
    kept[0]()
    assert seen == [0, 1, 2, 3]
