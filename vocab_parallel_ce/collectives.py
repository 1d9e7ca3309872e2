"""Moves partials between ranks: one all_gather, or a MAX and one packed SUM.

    all_gather   every rank receives all headers and all partials and merges them in rank order:
                 one collective, (k N + header) floats a rank, the same bits on every rank
    all_reduce   MAX of m, then one SUM of everything else rescaled to it: two collectives whose
                 size does not grow with the number of ranks; the order of the sum, and so its last
                 bits, belong to the backend

"auto" gathers while the gathered tensor stays small, which is where latency rules.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .engines.contract import Gathered, Wanted
from .header import HEADER_INTS
from .statistics import rescale_

COLLECTIVES = ("auto", "all_gather", "all_reduce")
GATHER_LIMIT_BYTES = 6_000_000
BACKENDS_WITHOUT_FP64 = ("hccl",)
NOTHING_SENT = "fake"
"""torch's backend for dry runs of many ranks in one process: this rank's own partials stay, and
nobody judges what the others would have said"""
BACKEND_OF_DEVICE = {"npu": "hccl", "cuda": "nccl", "cpu": "gloo"}


class Payload:
    """What one rank contributes: header, W_r and the partials, in one buffer ready to be sent.

    The buffer [ints] is int32 because any backend gathers int32, whatever the partials' dtype.
    With ``ranks`` it is what all of them sent [W * ints], and each view has W in front.
    """

    def __init__(
        self, buffer: Tensor, k: int, rows: int, dtype: torch.dtype, ranks: int | None = None
    ) -> None:
        self.buffer, self._numbers = buffer, buffer.view(dtype)
        self._width = dtype.itemsize // 4
        self._ranks, self._step = ranks, buffer.shape[0] // (ranks or 1)
        # One view, made at once; the two below are made where somebody asks for them.
        self.parts = self._view(self._numbers, (k, rows), (rows, 1), HEADER_INTS + self._width)
        """[..., k, N] in the arithmetic dtype"""

    @classmethod
    def allocate(cls, k: int, rows: int, dtype: torch.dtype, device: torch.device) -> Payload:
        ints = HEADER_INTS + (1 + k * rows) * (dtype.itemsize // 4)
        return cls(torch.empty(ints, dtype=torch.int32, device=device), k, rows, dtype)

    @property
    def header(self) -> Tensor:
        """[..., HEADER_INTS] int32"""
        return self._view(self.buffer, (HEADER_INTS,), (1,), 0)

    @property
    def shard_weight(self) -> Tensor:
        """[..., 1] sum of the class weights of this shard, in the arithmetic dtype"""
        return self._view(self._numbers, (1,), (1,), HEADER_INTS)

    def _view(
        self, memory: Tensor, shape: tuple[int, ...], strides: tuple[int, ...], ints: int
    ) -> Tensor:
        """Behind so many ints of each rank's part of ``memory``."""
        width = 1 if memory is self.buffer else self._width
        if self._ranks is not None:
            shape, strides = (self._ranks, *shape), (self._step // width, *strides)
        return memory.as_strided(shape, strides, ints // width)


def exchange(
    payload: Payload, wanted: Wanted, collective: str, group: dist.ProcessGroup
) -> Gathered:
    """Every rank's payload, the same on every rank; communicates over ``group``, once or twice."""
    backend = check_group_serves(payload.buffer.device.type, group)
    if payload.parts.dtype == torch.float64:
        check_backend_dtype(backend, torch.float64, f" (rank {group.rank()} of the group)")
    k, rows = payload.parts.shape
    world = group.size()
    gathered_bytes = world * k * rows * payload.parts.element_size()
    small = gathered_bytes <= GATHER_LIMIT_BYTES
    # An argmax cannot be summed or maximised with its value: it always gathers.
    gather = wanted.argmax or collective == "all_gather" or (collective == "auto" and small)
    gathered = (_by_gather if gather else _by_reduce)(payload, wanted, group, world)
    if backend != NOTHING_SENT:
        return gathered
    return Gathered(payload.parts[None], payload.shard_weight, payload.header[:1], None)


def _by_gather(payload: Payload, wanted: Wanted, group: dist.ProcessGroup, world: int) -> Gathered:
    k, rows = payload.parts.shape
    received = payload.buffer.new_empty(world * payload.buffer.shape[0])
    all_gather_flat(received, payload.buffer, group)
    ranks = Payload(received, k, rows, payload.parts.dtype, world)
    headers = ranks.header
    weights = ranks.shard_weight[:, 0] if wanted.smooth else None
    return Gathered(ranks.parts, weights, headers[:, 0] if wanted.argmax else None, headers)


def _by_reduce(payload: Payload, wanted: Wanted, group: dist.ProcessGroup, world: int) -> Gathered:
    k, rows = payload.parts.shape
    packed = payload.parts.new_zeros(k * rows + world * 2 * HEADER_INTS)
    m, sums, slots = packed.split([rows, (k - 1) * rows, world * 2 * HEADER_INTS])
    m.copy_(payload.parts[0])
    dist.all_reduce(m, dist.ReduceOp.MAX, group=group)
    # What is behind the rows that are wanted is x of selected ids: a sum as it is.
    named = dict(zip(wanted.rows[1:], sums.view(k - 1, rows).unbind(0), strict=False))
    sums.copy_(payload.parts[1:].flatten())
    rescale_({"m": payload.parts[0].clone(), **named}, m, payload.shard_weight)
    # Each rank fills its own slots and adds 0 to the others': the sum gathers the headers. Halves
    # of 16 bits are exact in fp32.
    halves = slots.view(world, 2, HEADER_INTS)
    halves[dist.get_rank(group), 0] = payload.header & 0xFFFF
    halves[dist.get_rank(group), 1] = payload.header >> 16
    dist.all_reduce(packed[rows:], dist.ReduceOp.SUM, group=group)
    low, high = halves.to(torch.int32).unbind(1)
    one = packed[: k * rows].view(1, k, rows)  # merged by the sum: as if one rank held it all
    return Gathered(one, payload.shard_weight, payload.header[:1], high << 16 | low)


def all_gather_flat(
    out: Tensor, mine: Tensor, group: dist.ProcessGroup | None, async_op: bool = False
) -> Any:
    """``out`` [W * n] = every rank's ``mine`` [n], in rank order; what to wait for, if async.

    The group must serve their device, see ``check_group_serves``.
    """
    if group is not None and mine.is_cpu and not async_op and hasattr(group, "all_gather_single"):
        # Of torch 2.13: what its function of that name calls, 20 us of a small call later.
        work = group.all_gather_single(out, mine)
        return None if work is None else work.wait()
    # The newer name of the same collective; the older one warns where both exist.
    gather: Callable[..., Any] = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
    return gather(out, mine, group=group, async_op=async_op)


def sum_and_scatter(out: Tensor, parts: Tensor, group: dist.ProcessGroup | None) -> Any:
    """``out`` [n, ...] = this rank's part of the sum of ``parts`` [W * n, ...]; what to await."""
    newer, older = "reduce_scatter_single", dist.reduce_scatter_tensor
    scatter: Callable[..., Any] = getattr(dist, newer, older)
    return scatter(out, parts, group=group, async_op=True)


def backends_of(group: dist.ProcessGroup | None) -> dict[str, str]:
    """The backend that ``group`` uses for each type of device: {"cpu": "gloo", "npu": "hccl"}."""
    # Asked anew each time: it takes 1 us, and a cache could keep a group alive beyond its end.
    try:
        pairs = dist.get_backend_config(group).split(",")
    except TypeError as problem:  # what torch says of a group that it does not know
        raise ValueError(
            "group is none that torch.distributed knows here (was it destroyed?); pass one that "
            "dist.new_group or a DeviceMesh made since"
        ) from problem
    return dict(pair.split(":", 1) for pair in pairs)


def is_dry_run(group: dist.ProcessGroup | None) -> bool:
    """Whether ``group`` sends nothing, so that what it "received" means nothing."""
    return NOTHING_SENT in backends_of(group).values()


def check_group_serves(device_type: str, group: dist.ProcessGroup | None) -> str:
    """The backend that ``group`` uses for tensors on such a device; ValueError if there is none."""
    served = backends_of(group)
    if device_type in served:
        return served[device_type]
    device, backend = next(iter(served.items()))
    way_out = f"pass tensors on {device}"
    if device_type in BACKEND_OF_DEVICE:
        right = BACKEND_OF_DEVICE[device_type]
        way_out += (
            f", or a group of backend {right!r}, or of both, as init_process_group("
            f"'{device}:{backend},{device_type}:{right}') makes"
        )
    raise ValueError(
        f"input is on {device_type}, but group has backend {backend!r}, which serves "
        f"{' and '.join(served)} (rank {dist.get_rank(group)} of the group); {way_out}"
    )


def check_backend_dtype(backend: str, dtype: torch.dtype, where: str = "") -> None:
    """Raise if partials of logits of this dtype cannot be reduced by this backend."""
    if dtype == torch.float64 and any(name in backend for name in BACKENDS_WITHOUT_FP64):
        raise ValueError(
            f"input is float64, which the {backend} backend does not carry{where}; use "
            "input.float(), or a gloo group and CPU tensors for fp64 checks"
        )


def communication_device(group: dist.ProcessGroup | None) -> torch.device:
    """A device whose tensors ``group`` can move: the CPU where a backend serves it."""
    served = backends_of(group)
    if "cpu" not in served:
        for device in BACKEND_OF_DEVICE:
            if device in served:
                return torch.device(device, getattr(torch, device).current_device())
    return torch.device("cpu")
