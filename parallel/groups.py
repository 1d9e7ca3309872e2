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

import math
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from vocab_parallel_ce.collectives import BACKEND_OF_DEVICE, backends_of
from vocab_parallel_ce.parallel.devices import local_device
from vocab_parallel_ce.parallel.environment import environment_int
from vocab_parallel_ce.parallel.joining import initialise, prepare_hccl

T = TypeVar("T")


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
    """The place of this rank in the grid, and its process groups. Use it as a context manager.

    ``control`` is a group of all ranks that is always Gloo: barriers, small Python objects and
    checkpoint plans go over it, so they never queue behind the accelerator's work. ``mesh`` is the
    grid as a DeviceMesh with dimensions "dp" and "tp", for DTensor, made of the same groups.

    Example:
        ```python
        with ParallelGroups.open(tp=2) as groups:
            shard = VocabShard.even(vocab_size, groups.tp_group)
        ```
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
        """Joins all ranks and makes the groups; every rank calls it.

        Where torch.distributed is already initialised, its ranks are used as they are.

        Args:
            device_type: "npu", "cuda" or "cpu"; None takes the best that is here.
            tp: ranks that split the vocabulary. None: all that ``dp`` leaves.
            dp: copies of the model. None: all that ``tp`` leaves.
            timeout_seconds: how long a rank waits for the others, to join and in a collective. On
                an NPU a collective waits at least 68 s, and a rank that cannot leave one is ended
                60 s later.
            deterministic: sums over the groups (all_reduce) shall have the same bits in every run
                of the same ranks. On an NPU this sets HCCL_DETERMINISTIC=true, which costs speed; a
                value that is set already stays, and so do existing communicators. NCCL and Gloo
                have no such switch. The loss does not need it where it gathers, and it does not
                touch the kernels of the model (torch.use_deterministic_algorithms does).

        Raises:
            ValueError: where ``tp`` times ``dp`` is not the number of processes, or the device is
                missing; nothing is connected then.
            RuntimeError: where ranks do not join in time.

        Communication:
            Joins the process group and makes at most three more groups.
        """
        if not 0 < timeout_seconds < math.inf:
            raise ValueError(f"timeout_seconds={timeout_seconds} must be a positive number")
        owned = not dist.is_initialized()
        world_size = environment_int("WORLD_SIZE", 1) if owned else dist.get_world_size()
        tp, dp = grid_size(world_size, tp, dp)
        device = local_device(device_type)
        join = timeout = timedelta(seconds=timeout_seconds)
        if device.type == "npu":
            timeout = prepare_hccl(timeout_seconds, deterministic)
        if owned:
            initialise(device, join, timeout)
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
