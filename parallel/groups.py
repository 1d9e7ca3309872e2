"""Process groups of a tensor-parallel and data-parallel run, made once and closed cleanly.

Ranks form a grid [dp, tp]: the tp ranks of one model copy are adjacent, so that on a machine with
eight accelerators the traffic of every layer stays inside the machine.

    rank          0  1  2  3        with tp = 2, dp = 2
    dp_rank       0  0  1  1
    tp_rank       0  1  0  1

Works under torchrun, and as one process without it.

On an NPU every communicator takes 200 MB of device memory (HCCL_BUFFSIZE) on each rank it joins.
So a group that would hold all ranks is the world group itself, a group of one rank never
communicates, and communicators are made by the first collective of a group, not by the group:

    tp or dp is 1      1 communicator: the world's, which is the tensor- or data-parallel group
    both are larger    2: one of each; the world group has none, because nothing is sent over it
    one rank           0
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
import os
import time
import uuid
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore, PrefixStore, Store
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.rendezvous import rendezvous

from vocab_parallel_ce.collectives import BACKEND_OF_DEVICE, backends_of
from vocab_parallel_ce.torch_import import AUTOLOAD_VARIABLE, why_backend_failed
from vocab_parallel_ce.warning import warn

T = TypeVar("T")

VISIBLE_CARDS_VARIABLE = "ASCEND_RT_VISIBLE_DEVICES"
HCCL_HEAD_START = 60.0
"""Seconds between HCCL's own timeout and the end of the process."""


def npu_problem() -> str | None:
    """Why no NPU can be used here and what to do about it, in one line; None where one can."""
    if importlib.util.find_spec("torch_npu") is None:
        version = torch.__version__.split("+")[0]
        return (
            "torch_npu is not installed; install CANN and the torch-npu that belongs to "
            f"torch {version}, or use --device cpu"
        )
    problem = _torch_npu_import_problem()
    if problem is not None:
        return problem
    if torch.get_device_module("npu").is_available():
        return None
    if VISIBLE_CARDS_VARIABLE in os.environ:
        return (
            f"torch_npu sees no card under {VISIBLE_CARDS_VARIABLE}="
            f"{os.environ[VISIBLE_CARDS_VARIABLE]!r}; name cards that npu-smi info lists, or unset "
            "it"
        )
    return (
        "torch_npu sees no card; if npu-smi info lists none either, the driver is missing, or "
        "this container was started without the cards (/dev/davinci*)"
    )


@functools.cache
def _torch_npu_import_problem() -> str | None:
    """Tried once: a second import of a package that broke off halfway fails in other ways."""
    autoload = os.environ.get(AUTOLOAD_VARIABLE)
    try:
        importlib.import_module("torch_npu")
    except Exception as error:  # whatever a package made for another torch may raise
        return why_backend_failed("torch_npu", error)
    finally:  # its import changes the variable and does not restore it when it fails
        if autoload is None:
            os.environ.pop(AUTOLOAD_VARIABLE, None)
        else:
            os.environ[AUTOLOAD_VARIABLE] = autoload
    return None


def npu_is_available() -> bool:
    """True when torch_npu is installed and sees a device."""
    return npu_problem() is None


def default_device_type() -> str:
    """What this machine has: npu, else cuda, else cpu."""
    if npu_is_available():
        return "npu"
    if torch.cuda.is_available():
        return "cuda"
    _warn_that_no_npu_is_used()
    return "cpu"


@functools.cache
def _warn_that_no_npu_is_used() -> None:
    """Once: who installed torch_npu did not mean to run on the CPU."""
    if importlib.util.find_spec("torch_npu") is not None:
        warn(f"running on the CPU: {npu_problem()}")


def device_problem(kind: str) -> str | None:
    """Why this process cannot use a device of this kind, and the way out; None where it can."""
    if kind == "cpu":
        return None
    if kind == "npu":
        problem = npu_problem()
    else:
        problem = None if torch.cuda.is_available() else "this machine shows none; use --device cpu"
    return problem or _crowding(kind, int(torch.get_device_module(kind).device_count()))


def _crowding(kind: str, count: int) -> str | None:
    """More processes than devices: told on every rank, not only on those that have no device."""
    local_rank = _environment_int("LOCAL_RANK", 0)
    processes = _environment_int("LOCAL_WORLD_SIZE", 1)
    if processes > count:
        return (
            f"LOCAL_WORLD_SIZE={processes} processes were started on this machine, which shows "
            f"{count} {kind} devices; start at most {count} (torchrun --nproc-per-node {count})"
        )
    if local_rank >= count:
        return (
            f"LOCAL_RANK={local_rank} has no {kind} device: this machine shows {count}; "
            f"start at most {count} processes here (torchrun --nproc-per-node {count})"
        )
    return None


def local_device(device_type: str | None = None) -> torch.device:
    """The device of this process: number LOCAL_RANK of its kind, made current."""
    kind = device_type or default_device_type()
    if kind not in BACKEND_OF_DEVICE:
        raise ValueError(f"device={kind!r} is not one of {', '.join(BACKEND_OF_DEVICE)}")
    problem = device_problem(kind)
    if problem is not None:
        raise ValueError(f"device={kind!r}, but {problem}")
    if kind == "cpu":
        return torch.device("cpu")
    device = torch.device(kind, _environment_int("LOCAL_RANK", 0))
    torch.get_device_module(kind).set_device(device)
    return device


def grid_size(world_size: int, tp: int | None, dp: int | None) -> tuple[int, int]:
    """(tp, dp) with tp * dp == world_size; the one that is None becomes what is left over."""
    for name, value in (("tp", tp), ("dp", dp)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    wanted = (tp or 1) * (dp or 1)
    if tp is None and world_size % wanted == 0:
        tp = world_size // wanted
    elif dp is None and world_size % wanted == 0:
        dp = world_size // wanted
    tp, dp = tp or 1, dp or 1
    if tp * dp != world_size:
        raise ValueError(
            f"tp={tp} times dp={dp} is {tp * dp}, but the number of processes is {world_size}; "
            f"start {tp * dp} processes (torchrun --nproc-per-node {tp * dp}) "
            f"or choose tp and dp whose product is {world_size}"
        )
    return tp, dp


@dataclass(frozen=True)
class ParallelGroups:
    """Where this rank stands, and the groups it talks to. Use it as a context manager.

    control  all ranks, always Gloo: barriers, small Python objects and checkpoint plans travel
             here and never queue behind the accelerator's work
    mesh     the grid as a DeviceMesh with dimensions "dp" and "tp", for DTensor, over the same
             groups
    """

    device: torch.device
    rank: int
    world_size: int
    tp: int
    dp: int
    tp_rank: int
    dp_rank: int
    tp_group: dist.ProcessGroup
    dp_group: dist.ProcessGroup
    control: dist.ProcessGroup
    mesh: DeviceMesh
    owned: bool
    """Whether closing ends all process groups. Where the caller had initialised them, it ends those
    that were made here."""

    @classmethod
    def open(
        cls,
        device_type: str | None = None,
        *,
        tp: int | None = None,
        dp: int | None = None,
        timeout_seconds: float = 600.0,
        deterministic: bool = False,
    ) -> ParallelGroups:
        """Joins all ranks. Bad sizes and missing devices are refused before anything is connected.

        Where torch.distributed is already initialised, its ranks are used as they are.

        timeout_seconds is how long a rank waits for the others: to join, and in a collective. On an
        NPU a collective waits 68 s at least, and a rank that it could not free ends 60 s later.

        deterministic asks that sums over the groups have the same bits in every run of the same
        ranks. On an NPU that is HCCL_DETERMINISTIC=true, which costs speed; a value that is set
        already stays, and so do communicators that exist already. NCCL and Gloo have no such
        switch: they add in an order that follows from the ranks and how they are connected. It is
        about all_reduce: the loss with the gather has the same bits in any case, and nothing is
        said about the kernels of the model (torch.use_deterministic_algorithms is about those).
        """
        if not 0 < timeout_seconds < math.inf:
            raise ValueError(f"timeout_seconds={timeout_seconds} must be a positive number")
        owned = not dist.is_initialized()
        world_size = _environment_int("WORLD_SIZE", 1) if owned else dist.get_world_size()
        tp, dp = grid_size(world_size, tp, dp)
        device = local_device(device_type)
        join = timeout = timedelta(seconds=timeout_seconds)
        if device.type == "npu":
            timeout = _prepare_hccl(timeout_seconds, deterministic)
        if owned:
            _initialise(device, join, timeout)
        world = dist.group.WORLD
        assert world is not None
        ranks = torch.arange(world_size, dtype=torch.int).view(dp, tp)
        tp_group = _group_of_this_rank(ranks, device.type, timeout)
        dp_group = _group_of_this_rank(ranks.T, device.type, timeout)
        only_gloo = set(backends_of(world).values()) == {"gloo"}
        return cls(
            device=device,
            rank=dist.get_rank(),
            world_size=world_size,
            tp=tp,
            dp=dp,
            tp_rank=dist.get_rank(tp_group),
            dp_rank=dist.get_rank(dp_group),
            tp_group=tp_group,
            dp_group=dp_group,
            control=world if only_gloo else dist.new_group(backend="gloo", timeout=join),
            mesh=DeviceMesh.from_group(
                [dp_group, tp_group], device.type, mesh=ranks, mesh_dim_names=("dp", "tp")
            ),
            owned=owned,
        )

    def barrier(self) -> None:
        """Returns when every rank has come here."""
        dist.barrier(group=self.control)

    def gather(self, value: T) -> list[T]:
        """A small Python object of every rank, in rank order."""
        everyone: list[Any] = [None] * self.world_size
        dist.all_gather_object(everyone, value, group=self.control)
        return everyone

    def close(self) -> None:
        """Waits for all ranks, then leaves."""
        self.barrier()
        self._destroy()

    def _destroy(self) -> None:
        if self.owned:
            dist.destroy_process_group()
            return
        for group in (self.tp_group, self.dp_group, self.control):
            if group is not dist.group.WORLD:
                dist.destroy_process_group(group)

    def __enter__(self) -> ParallelGroups:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        elif self.device.type == "cpu":
            # No barrier: the others may never come. On an accelerator not even this, because
            # closing waits for collectives in flight; the exit of the process ends them.
            self._destroy()


def _prepare_hccl(timeout_seconds: float, deterministic: bool) -> timedelta:
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


def _group_of_this_rank(rows: Tensor, device_type: str, timeout: timedelta) -> dist.ProcessGroup:
    """One group for every row of ranks [groups, members]; all ranks call, each gets its own.

    Not init_device_mesh: it gives its groups the default timeout, and in torch 2.5 it makes a
    second group of all ranks beside the world's.
    """
    world = dist.group.WORLD
    served = backends_of(world)
    if len(rows) == 1 and device_type in served:
        assert world is not None
        return world
    backend = served.get(device_type, BACKEND_OF_DEVICE[device_type])
    mine, _ = dist.new_subgroups_by_enumeration(rows.tolist(), timeout=timeout, backend=backend)
    assert isinstance(mine, dist.ProcessGroup)
    return mine


def _initialise(device: torch.device, join: timedelta, timeout: timedelta) -> None:
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


def _environment_int(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"environment variable {name}={text!r} is not a number") from None
