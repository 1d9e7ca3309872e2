"""What differs from device to device when something is measured on it."""

from __future__ import annotations

import time
from functools import cache
from typing import Any

import torch

from vocab_parallel_ce.launch.measuring.machine import processor

MIB = 1 << 20
_HOLD_CYCLES = 16_000_000
_HOLD_SECONDS = 8e-3
_CACHE_GUESS = 192 * MIB  # an Ascend 910B's; more than any card of NVIDIA has


def device_module(device: torch.device) -> Any:
    """torch.cuda, torch.npu and so on: the module that holds the device's streams and memory."""
    return torch.get_device_module(device)


def synchronize(device: torch.device) -> None:
    """Wait for the device; nothing on a CPU."""
    if device.type != "cpu":
        device_module(device).synchronize(device)


def hold(device: torch.device) -> None:
    """Keep a stream busy for about 8 ms, while the host queues what is to be timed behind it.

    In a training step the host runs ahead of the device; without this, events would time how fast
    it can launch. What waits for the device inside the timed part still pays for that. CUDA has a
    kernel that waits; an NPU multiplies matrices.
    """
    if device.type == "cuda" and hasattr(torch.cuda, "_sleep"):
        torch.cuda._sleep(_HOLD_CYCLES)
    elif device.type == "npu":
        matrix, times = _work(device)
        for _ in range(times):
            torch.mm(matrix, matrix)


@cache
def _work(device: torch.device) -> tuple[torch.Tensor, int]:
    """A matrix, and how many products of it keep the device busy for about 8 ms.

    None where even a small product takes the host's time of a launch many times over: then nothing
    runs ahead of anything, as on a stand-in of the host's own memory.
    """

    def seconds(matrix: torch.Tensor) -> float:
        torch.mm(matrix, matrix)
        synchronize(device)
        started = time.perf_counter()
        torch.mm(matrix, matrix)
        synchronize(device)
        return time.perf_counter() - started

    small = torch.ones(512, 512, dtype=torch.bfloat16, device=device)
    if seconds(small) > _HOLD_SECONDS / 16:
        return small, 0
    large = torch.ones(4096, 4096, dtype=torch.bfloat16, device=device)
    return large, max(1, min(64, round(_HOLD_SECONDS / seconds(large))))


def cache_bytes(device: torch.device) -> int:
    """The last cache before an accelerator's memory; a generous guess where it is not told."""
    told = 0
    if device.type in ("cuda", "npu"):
        properties = device_module(device).get_device_properties(device.index or 0)
        told = getattr(properties, "L2_cache_size", 0)
    return told or _CACHE_GUESS


def device_name(device: torch.device) -> str:
    """What a reader calls the device."""
    if device.type == "cpu":
        return processor()
    return str(device_module(device).get_device_name(device))
