"""What this machine allows the loss: loops of torch and of plain arithmetic, none of our kernels.

A pass over logits of E elements cannot end before they have moved, nor before their exponentials
are computed. Both are measured here, by loops that no change of a kernel can move:

    forward              max(read, F / rate)        the logits are read once
    backward, in place   max(copy, B / rate)        they are read, and as many bytes are written
    out of place         max(fresh copy, B / rate)  the same, into memory that is new

``read`` is torch's sum over the same bytes as integers, ``copy`` is torch's copy into a buffer in
use, ``fresh copy`` is torch's clone; all with torch's threads. A copy on a CPU also reads what it
overwrites, which work in place does not: such work may take less than this limit.

``rate`` is how many fp32 multiply-adds a second a chain of them reaches in the first-level cache,
on as many threads, as the compiler vectorises it. F = 11 E and B = 12 E (fp32) or 9 E (bf16, fp16)
count what e^(x - m) needs from the units that multiply and add:

    e^d to fp32: d log2(e) + magic, - magic, two steps of range reduction,
                 a polynomial of degree 6 (six steps, Horner)                     10
    e^d to 16 bits: the same with one step of reduction and degree 4              7
    forward adds x - m and the sum; backward x - m and the product with 1 / s     + 2

Forward needs fp32 exponentials for every dtype, since it sums them, but one step of range reduction
does for a sum. Comparisons, bit operations and conversions are left out: elsewhere they may cost
nothing. So this is a lower bound.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from vocab_parallel_ce.launch.measuring.clock import wall_seconds
from vocab_parallel_ce.launch.measuring.rounds import lower_quartile

_CPU = torch.device("cpu")

MULTIPLY_ADDS = {torch.float32: (11, 12), torch.bfloat16: (11, 9), torch.float16: (11, 9)}
"""an element, forward and backward"""

CHAIN = 8  # multiply-adds between the load and the store of an element
IN_CACHE = 2048  # floats: 8 KiB
TURNS = 60_000  # over them: long enough for the system to give every thread a core of its own


@dataclass(frozen=True)
class Loops:
    """Seconds that each reference loop took once."""

    read: float
    copy: float
    fresh_copy: float
    multiply_add: float
    """one, all threads together; 0 without Numba, which compiles that loop"""

    @classmethod
    def _each(cls, choose: Callable[[list[float]], float], loops: Sequence[Loops]) -> Loops:
        return cls(*(choose([getattr(one, name) for one in loops]) for name in cls.__annotations__))

    @classmethod
    def slowest(cls, ranks: Sequence[Loops]) -> Loops:
        """Of ranks that ran together."""
        return cls._each(max, ranks)

    @classmethod
    def usual(cls, runs: Sequence[Loops]) -> Loops:
        """Of several runs: what the machine does when it is left alone."""
        return cls._each(lower_quartile, runs)


@dataclass(frozen=True)
class Limit:
    """Seconds that a pass takes at least."""

    forward: float
    backward: float

    @property
    def total(self) -> float:
        return self.forward + self.backward


def limit(loops: Loops, elements: int, dtype: torch.dtype, inplace: bool) -> Limit:
    """The larger of memory and arithmetic; ``loops`` ran over as many ``elements`` of ``dtype``."""
    forward, backward = (count * elements * loops.multiply_add for count in MULTIPLY_ADDS[dtype])
    moved = loops.copy if inplace else loops.fresh_copy
    return Limit(max(loops.read, forward), max(moved, backward))


def run_loops(source: Tensor, buffer: Tensor) -> Loops:
    """Run each loop once over the contiguous CPU tensor ``source``; ``buffer`` becomes its copy."""
    size = source.nbytes // 4 * 4
    whole = source.flatten().view(torch.uint8)[:size].view(torch.int32)
    return Loops(
        wall_seconds(lambda: whole.sum(dtype=torch.int32), _CPU),
        wall_seconds(lambda: buffer.copy_(source), _CPU),
        wall_seconds(source.clone, _CPU),
        _multiply_add(),
    )


def _chains(x: Any, y: Any, factor: Any, more: Any, turns: int) -> None:
    """y = CHAIN multiply-adds in a row of every element of x, ``turns`` times over."""
    for _ in range(turns):
        for i in range(x.size):
            v = x[i]
            for _ in range(CHAIN):
                v = v * factor + more
            y[i] = v


@cache
def _compiled() -> Any:
    try:
        numba = import_module("numba")
    except ImportError:
        return None
    # "contract": a product and a sum may become one instruction, and nothing else may change.
    return numba.njit(nogil=True, fastmath={"contract"}, error_model="numpy")(_chains)


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "limits")


def _multiply_add() -> float:
    """Seconds of one multiply-add when every thread of torch computes them."""
    chains, threads = _compiled(), torch.get_num_threads()
    if chains is None:
        return 0.0
    half = torch.tensor(0.5).numpy()[()]  # 1 * 0.5 + 0.5 = 1: no overflow, nothing subnormal
    work = [tuple(torch.ones(2, IN_CACHE).numpy()) for _ in range(threads)]
    chains(*work[0], half, half, 1)  # compiled before the clock starts

    def all_threads() -> None:
        others = [_pool(threads).submit(chains, x, y, half, half, TURNS) for x, y in work[1:]]
        chains(*work[0], half, half, TURNS)
        for other in others:
            other.result()

    return wall_seconds(all_threads, _CPU) / (threads * IN_CACHE * CHAIN * TURNS)
