"""Process groups of a tensor-parallel and data-parallel run, made once and closed cleanly.

Ranks form a grid [dp, tp]: the tp ranks of one model copy are adjacent, so that on a machine with
eight accelerators the traffic of every layer stays inside the machine.

    rank          0  1  2  3        with tp = 2, dp = 2
    dp_rank       0  0  1  1
    tp_rank       0  1  0  1

Works under torchrun, and as one process without it.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import time
import uuid
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, Store
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.rendezvous import rendezvous

BACKEND_OF_DEVICE = {"npu": "hccl", "cuda": "nccl", "cpu": "gloo"}


def npu_is_available() -> bool:
    """True when torch_npu is installed and sees a device."""
    if importlib.util.find_spec("torch_npu") is None:
        return False
    try:
        importlib.import_module("torch_npu")
    except (ImportError, OSError, RuntimeError):  # the package without its CANN libraries
        return False
    return bool(torch.get_device_module("npu").is_available())


def default_device_type() -> str:
    """What this machine has: npu, else cuda, else cpu."""
    if npu_is_available():
        return "npu"
    return "cuda" if torch.cuda.is_available() else "cpu"


def local_device(device_type: str | None = None) -> torch.device:
    """The device of this process: number LOCAL_RANK of its kind, made current."""
    kind = device_type or default_device_type()
    if kind not in BACKEND_OF_DEVICE:
        raise ValueError(f"device={kind!r} is not one of {', '.join(BACKEND_OF_DEVICE)}")
    if kind == "cpu":
        return torch.device("cpu")
    available = npu_is_available() if kind == "npu" else torch.cuda.is_available()
    if not available:
        raise ValueError(f"device={kind!r}, but this machine shows none; use --device cpu")
    module = torch.get_device_module(kind)
    local_rank, count = _environment_int("LOCAL_RANK", 0), int(module.device_count())
    if local_rank >= count:
        raise ValueError(
            f"LOCAL_RANK={local_rank} has no {kind} device: this machine shows {count}; "
            f"start at most {count} processes here (torchrun --nproc-per-node {count})"
        )
    device = torch.device(kind, local_rank)
    module.set_device(device)
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
    mesh     the grid as a DeviceMesh with dimensions "dp" and "tp", for DTensor
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
    """Whether closing ends the process groups: not when the caller had initialised them."""

    @classmethod
    def open(
        cls,
        device_type: str | None = None,
        *,
        tp: int | None = None,
        dp: int | None = None,
        timeout_seconds: float = 600.0,
    ) -> ParallelGroups:
        """Joins all ranks. Bad sizes are refused before anything is connected.

        Where torch.distributed is already initialised, its ranks are used as they are.
        """
        owned = not dist.is_initialized()
        world_size = _environment_int("WORLD_SIZE", 1) if owned else dist.get_world_size()
        tp, dp = grid_size(world_size, tp, dp)
        device = local_device(device_type)
        timeout = timedelta(seconds=timeout_seconds)
        if owned:
            _initialise(device, timeout)
        mesh = init_device_mesh(device.type, (dp, tp), mesh_dim_names=("dp", "tp"))
        world = dist.group.WORLD
        assert world is not None
        on_cpu = device.type == "cpu"
        return cls(
            device=device,
            rank=dist.get_rank(),
            world_size=world_size,
            tp=tp,
            dp=dp,
            tp_rank=mesh.get_local_rank("tp"),
            dp_rank=mesh.get_local_rank("dp"),
            tp_group=mesh.get_group("tp"),
            dp_group=mesh.get_group("dp"),
            control=world if on_cpu else dist.new_group(backend="gloo", timeout=timeout),
            mesh=mesh,
            owned=owned,
        )

    def barrier(self) -> None:
        """Returns when every rank has come here."""
        dist.barrier(group=self.control)

    def close(self) -> None:
        """Waits for all ranks, then leaves."""
        self.barrier()
        if self.owned:
            dist.destroy_process_group()

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
        elif self.owned and self.device.type == "cpu":
            # No barrier: the others may never come. On an accelerator not even this, because
            # closing waits for collectives in flight; the exit of the process ends them.
            dist.destroy_process_group()


def _initialise(device: torch.device, timeout: timedelta) -> None:
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
    # Told its device, NCCL connects at once and a missing rank shows here, not in the first step.
    device_id = device if device.type == "cuda" else None
    shared, rank, world_size = next(rendezvous("env://", timeout=timeout))
    dist.init_process_group(
        backend,
        store=_store_of_this_attempt(shared, rank, world_size, timeout),
        rank=rank,
        world_size=world_size,
        timeout=timeout,
        device_id=device_id,
    )


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
