"""How a process joins the others: the store that they meet at, and what HCCL is told before.

Works under torchrun, also after a restart, and as one process without it.
"""

from __future__ import annotations

import math
import os
import time
import uuid
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from vocab_parallel_ce.collectives import BACKEND_OF_DEVICE
from vocab_parallel_ce.warning import warn

HCCL_HEAD_START = 60.0
"""Seconds between HCCL's own timeout and the end of the process."""


def prepare_hccl(timeout_seconds: float, deterministic: bool) -> timedelta:
    """Sets what HCCL reads when it makes a communicator; what the user has set stays.

    Returns the timeout of the groups: HCCL shall give up first, because its error says which rank
    was waited for, and the watchdog that guards the group only ends the process.
    """
    seconds = math.ceil(timeout_seconds)
    # Cut to the ranges that every version of CANN takes.
    os.environ.setdefault("HCCL_CONNECT_TIMEOUT", str(min(max(seconds, 120), 7200)))
    found = os.environ.setdefault("HCCL_EXEC_TIMEOUT", str(min(max(seconds, 68), 17340)))
    try:
        patience = float(found)
    except ValueError:
        raise ValueError(
            f"environment variable HCCL_EXEC_TIMEOUT={found!r} is not a number"
        ) from None
    if deterministic:
        switch = os.environ.setdefault("HCCL_DETERMINISTIC", "true")
        if switch.lower() not in ("true", "strict"):
            warn(
                f"deterministic=True, but HCCL_DETERMINISTIC={switch!r} is set and stays: sums "
                "over the groups may differ from run to run; unset it"
            )
    return timedelta(seconds=max(timeout_seconds, patience) + HCCL_HEAD_START)


def initialise(device: torch.device, join: timedelta, timeout: timedelta) -> None:
    backend = BACKEND_OF_DEVICE[device.type]
    if "RANK" not in os.environ:
        # One process without torchrun: the store lives in memory, no port is opened.
        store = HashStore()
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
        return
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ValueError(
            f"RANK={os.environ['RANK']} is set but {' and '.join(missing)} not; "
            "start with torchrun, or unset RANK and WORLD_SIZE to run as one process"
        )
    shared, rank, world_size = next(rendezvous("env://", timeout=join))
    dist.init_process_group(
        backend,
        store=_store_of_this_attempt(shared, rank, world_size, join),
        rank=rank,
        world_size=world_size,
        timeout=timeout,
    )  # no device_id: NCCL would connect all ranks at once, used or not


def _store_of_this_attempt(store: Store, rank: int, world_size: int, timeout: timedelta) -> Store:
    """A part of the store that no earlier attempt has written to.

    torchrun keeps one store over restarts (pytorch issue 135712), and its count of restarts may
    differ between hosts. Without this, a restarted rank can read the address that a dead one had
    left there and fail to connect. Rank 0 names the attempt. Since names of
    earlier attempts are in the store as well, each rank asks under a token of its own, and rank 0
    answers every token it sees until all ranks have said that they got this attempt's name.
    """
    if rank != 0:
        token = uuid.uuid4().hex
        store.set(f"attempt/ask/{rank}", token)
        attempt = store.get(f"attempt/answer/{token}").decode()  # waits for rank 0
        store.set(f"attempt/{attempt}/{rank}", "joined")
        return PrefixStore(attempt, store)
    attempt, deadline = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    missing = set(range(1, world_size))
    while missing:
        for other in sorted(missing):
            if store.check([f"attempt/ask/{other}"]):
                token = store.get(f"attempt/ask/{other}").decode()
                store.set(f"attempt/answer/{token}", attempt)
            if store.check([f"attempt/{attempt}/{other}"]):
                missing.remove(other)
        if missing and time.monotonic() > deadline:
            raise RuntimeError(
                f"ranks {sorted(missing)} did not join within {timeout.total_seconds():.0f} s; "
                "see their output, or raise the timeout if they only start slowly"
            )
        time.sleep(0.005)
    return PrefixStore(attempt, store)
