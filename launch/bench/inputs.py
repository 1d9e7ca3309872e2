"""The logits that every peer gets, and how they are kept alike and out of the cache.

Idea: some peers overwrite their logits, so these are restored from a master copy before every timed
run, outside the timed part and for every peer alike. On an accelerator the restore would leave the
logits' end in the cache, which would then answer instead of the memory: there are several buffers,
all restored and then used in turn, so that between the writing of a buffer and its use several
times the cache has passed through it.
"""

from __future__ import annotations

import gc
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vocab_parallel_ce.launch.bench.peers import Loss, Peer, Setting
from vocab_parallel_ce.launch.measuring.device import MIB, cache_bytes, device_module, synchronize
from vocab_parallel_ce.launch.measuring.logits import Sink, produced
from vocab_parallel_ce.launch.measuring.passes import Pass, time_copy, time_pass

CACHES = 4  # that must pass between the writing of a buffer and its use
SPARE_BYTES = 1 << 30  # for what is not logits: kernels, libraries, vectors


def buffers_needed(logits_bytes: int, cache: int) -> int:
    """How many buffers keep a cache of this size from answering.

    One, where the cache holds so little of the logits (a 32nd) that it does not matter.
    """
    if logits_bytes >= 32 * cache:
        return 1
    return 1 + math.ceil(CACHES * cache / logits_bytes)


@dataclass
class Inputs:
    """One rank, one shape, one dtype."""

    setting: Setting
    rank: int
    master: Tensor
    buffers: list[Tensor]
    target: Tensor
    sink: Sink

    @property
    def first_column(self) -> int:
        return self.rank * self.master.shape[1]

    def restore(self, only: int | None = None) -> list[float]:
        """Undo what the last peer did to the logits; seconds that each copy took."""
        chosen = self.buffers if only is None else [self.buffers[only]]
        return [time_copy(buffer, self.master) for buffer in chosen]

    def logits(self, turn: int = 0) -> Tensor:
        return produced(self.buffers[turn], self.sink)

    def run(self, peer: Peer, loss: Loss, turn: int = 0) -> Pass:
        logits = self.logits(turn)
        synchronize(self.setting.device)
        with peer.around():
            return time_pass(lambda: loss(logits, self.target), self.setting.device)


def gather(value: Any) -> list[Any]:
    """``value`` of every rank, in rank order."""
    out: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(out, value)
    return out


def row_chunks(tensor: Tensor) -> list[slice]:
    """Slices of rows whose fp64 copy takes about 64 MiB."""
    step = max(1, (64 * MIB) // (8 * max(1, tensor.shape[1])))
    return [slice(i, i + step) for i in range(0, tensor.shape[0], step)]


def fits(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the master copy and its buffers fit into an accelerator's free memory.

    On a CPU that is not asked: its memory belongs to others as well.
    """
    if device.type == "cpu":
        return True
    module = device_module(device)
    gc.collect()
    module.empty_cache()
    size = rows * columns * dtype.itemsize
    copies = 1 + buffers_needed(size, cache_bytes(device))
    return copies * size + SPARE_BYTES <= int(module.mem_get_info(device)[0])


def make(rows: int, vocab: int, setting: Setting, rank: int, dtype: torch.dtype) -> Inputs:
    """Logits like a trained head's first steps: normal, standard deviation 2."""
    device = setting.device
    columns = vocab // setting.world
    source = torch.device("cpu") if device.type == "npu" else device
    generator = torch.Generator(source).manual_seed(1000 + rank)
    master = torch.empty(rows, columns, dtype=dtype, device=device)
    for chunk in row_chunks(master):  # in pieces: no fp32 copy of the whole
        shape = (len(master[chunk]), columns)
        piece = torch.randn(shape, generator=generator, device=source).mul_(2)
        master[chunk] = piece.to(device, dtype)
    everywhere = torch.Generator().manual_seed(7)  # targets are the same on all ranks
    target = torch.randint(vocab, (rows,), generator=everywhere).to(device)
    count = 1
    if device.type != "cpu":
        count = buffers_needed(master.nbytes, cache_bytes(device))
    buffers = [torch.clone(master) for _ in range(count)]
    return Inputs(setting, rank, master, buffers, target, Sink())
