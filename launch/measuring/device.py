"""What differs from device to device when something is measured on it."""

from __future__ import annotations

from typing import Any

import torch

from vocab_parallel_ce.launch.measuring.machine import processor

MIB = 1 << 20
_HOLD_CYCLES = 4_000_000
_CACHE_GUESS = 192 * MIB  # an Ascend 910B's; more than any card of NVIDIA has


def device_module(device: torch.device) -> Any:
    """torch.cuda, torch.npu and so on: the module that holds the device's streams and memory."""
    return torch.get_device_module(device)


def synchronize(device: torch.device) -> None:
    """Wait for the device; nothing on a CPU."""
    if device.type != "cpu":
        device_module(device).synchronize(device)


def hold(device: torch.device) -> None:
    """Keep a CUDA stream busy for about 2 ms, while the host queues what is to be timed behind it.

    In a training step the host runs ahead of the device; without this, events would time how fast
    it can launch. What waits for the device inside the timed part still pays for that.
    """
    if device.type == "cuda" and hasattr(torch.cuda, "_sleep"):
        torch.cuda._sleep(_HOLD_CYCLES)


def cache_bytes(device: torch.device) -> int:
    """The last cache before an accelerator's memory; a generous guess where it is not told."""
    told = 0
    if device.type == "cuda":
        told = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
    return told or _CACHE_GUESS


def device_name(device: torch.device) -> str:
    """What a reader calls the device."""
    if device.type == "cpu":
        return processor()
    return str(device_module(device).get_device_name(device))
