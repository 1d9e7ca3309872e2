"""Real ranks for tests: one pool of four processes that serves every multi-rank case.

A case is a module-level function ``case(group, *args)``; it runs on the first ``world`` ranks of
the pool, each in its own process, over a real group of that size: Gloo for device type "cpu", HCCL
for "npu" and NCCL for "cuda", where rank r has device r. On a machine with fewer cards than ranks
the ranks share them, and Gloo moves what lies on them, for NCCL takes one rank a card:

    results = pool.run(case, world=3, args=(1, 2))        # one return value a rank, in rank order
    outcomes = pool.outcomes(case, world=3)               # the same, exceptions caught: Outcome

Ranks are forks of one process that has imported torch (``forks.py``). Groups have to be made once
more by each pool, so it lives as long as the test session. Cases that hang or kill a rank belong in
``run_fresh``, which starts processes of its own and ends them.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from .forks import context, take_over

WORLDS = (1, 2, 3, 4)
BACKENDS = {"cpu": "gloo", "npu": "hccl", "cuda": "nccl"}
SHARED_CARDS = "cpu:gloo,cuda:gloo"
COMPILING = 5.0
"""times longer than elsewhere that ranks on CUDA may take: they compile kernels on their way"""


@dataclass(frozen=True)
class Outcome:
    """What became of a case on one rank."""

    value: Any = None
    error: str = ""
    """The exception's message; empty when the case returned."""
    kind: str = ""
    """The exception's class name."""
    trace: str = ""


class HungError(AssertionError):
    """Some rank did not answer in time."""


def _serve(
    rank: int,
    size: int,
    store: str,
    timeout: float,
    device_type: str,
    environ: dict[str, str],
    pipe: Connection,
) -> None:
    take_over(environ)
    import datetime

    import torch
    import torch.distributed as dist

    # Where a rank hangs is asked by a signal: see Pool._stacks.
    stacks = open(_stack_file(store, rank), "w")  # noqa: SIM115
    faulthandler.register(signal.SIGUSR1, stacks, all_threads=True)
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=timeout)
    backend = BACKENDS[device_type]
    if device_type != "cpu":
        module = torch.get_device_module(device_type)
        present = module.device_count()
        if device_type == "cuda" and present < size:
            backend = SHARED_CARDS
        # What a case opens takes this device, not device 0.
        os.environ["LOCAL_RANK"] = str(rank % present)
        module.set_device(rank % present)
    dist.init_process_group(
        backend,
        init_method=f"file://{store}",
        rank=rank,
        world_size=size,
        timeout=limit,
    )
    groups = {world: dist.new_group(range(world), timeout=limit) for world in range(1, size + 1)}
    pipe.send(Outcome("ready"))
    while (job := pipe.recv()) is not None:
        case, world, args, kwargs = job
        try:
            outcome = Outcome(case(groups[world], *args, **kwargs))
        except Exception as problem:
            outcome = Outcome(None, str(problem), type(problem).__name__, traceback.format_exc())
        pipe.send(outcome)
    dist.destroy_process_group()


@contextmanager
def no_group_stays() -> Iterator[None]:
    """Ends, on this rank, the process groups that were made inside and are still there.

    Who only forgets a Gloo group leaves its threads behind, and they poll.
    """
    import torch.distributed as dist

    groups = dist.distributed_c10d._world.pg_map
    known = {group.group_name for group in groups}  # names: who holds a group keeps it alive
    yield
    for group in [group for group in groups if group.group_name not in known]:
        dist.destroy_process_group(group)


def _stack_file(store: str, rank: int) -> str:
    return f"{store}.stacks{rank}"


class Pool:
    """``size`` processes that wait for cases."""

    def __init__(
        self, size: int = max(WORLDS), timeout: float = 60.0, device_type: str = "cpu"
    ) -> None:
        self.size, self.device_type = size, device_type
        self.timeout = timeout * (COMPILING if device_type == "cuda" else 1)
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []

    def start(self) -> Pool:
        self._folder = tempfile.TemporaryDirectory()
        self._store = store = os.path.join(self._folder.name, "store")
        environ = dict(os.environ)
        for rank in range(self.size):
            ours, theirs = context().Pipe()
            process = context().Process(
                target=_serve,
                args=(rank, self.size, store, self.timeout, self.device_type, environ, theirs),
                daemon=True,
            )
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        self._receive(range(self.size), 120.0)
        return self

    def stop(self, patience: float = 5.0) -> None:
        """End the processes; those that have not left after so many seconds each are killed."""
        for pipe in self._pipes:
            try:
                pipe.send(None)
            except OSError:
                continue
        for process in self._processes:
            process.join(patience)
            if process.is_alive():
                process.kill()
        self._pipes, self._processes = [], []
        self._folder.cleanup()

    def _receive(self, ranks: range, timeout: float) -> list[Outcome]:
        deadline = time.monotonic() + timeout
        outcomes: dict[int, Outcome] = {}
        silent: dict[int, str] = {}
        for rank in ranks:  # all of them: a rank that failed early is why another one waits
            pipe = self._pipes[rank]
            try:
                if pipe.poll(max(0.0, deadline - time.monotonic())):
                    outcomes[rank] = pipe.recv()
                else:
                    silent[rank] = f"gave no answer within {timeout:.0f} s"
            except (EOFError, OSError):
                silent[rank] = "died"
        if not silent:
            return list(outcomes.values())
        words = [f"rank {rank} {reason}" for rank, reason in silent.items()]
        words += [f"rank {r} said {o.trace or o.value!r}" for r, o in outcomes.items()]
        words.append(self._stacks())
        self.stop(patience=0.1)
        raise HungError("\n".join(words))

    def _stacks(self) -> str:
        """Where every rank that lives is now: what to read when one has hung."""
        listening = [os.path.exists(_stack_file(self._store, r)) for r in range(self.size)]
        alive = [r for r, process in enumerate(self._processes) if process.is_alive()]
        alive = [rank for rank in alive if listening[rank]]
        for rank in alive:
            os.kill(self._processes[rank].pid, signal.SIGUSR1)
        time.sleep(1)
        texts = [Path(_stack_file(self._store, rank)).read_text() for rank in alive]
        return "\n".join(f"rank {r} is in\n{text}" for r, text in zip(alive, texts, strict=True))

    def outcomes(
        self,
        case: Callable[..., Any],
        world: int,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        timeout: float | None = None,
    ) -> list[Outcome]:
        """Run ``case(group, *args, **kwargs)`` on ``world`` ranks; never raises for its errors."""
        if not self._pipes:
            self.start()
        for pipe in self._pipes[:world]:
            pipe.send((case, world, args, kwargs or {}))
        return self._receive(range(world), timeout or self.timeout)

    def run(
        self,
        case: Callable[..., Any],
        world: int,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        timeout: float | None = None,
    ) -> list[Any]:
        """The return values in rank order; an exception of any rank fails the test."""
        outcomes = self.outcomes(case, world, args, kwargs, timeout)
        for rank, outcome in enumerate(outcomes):
            if outcome.kind:
                raise AssertionError(f"rank {rank} of {world} raised:\n{outcome.trace}")
        return [outcome.value for outcome in outcomes]


def run_fresh(
    case: Callable[..., Any],
    world: int,
    args: tuple[Any, ...] = (),
    timeout: float = 60.0,
    device_type: str = "cpu",
) -> list[Outcome]:
    """``case`` in processes of its own, for cases after which a rank is of no more use."""
    pool = Pool(world, timeout, device_type).start()
    try:
        return pool.outcomes(case, world, args)
    finally:
        if pool._pipes:
            pool.stop()
