"""What differs from device to device when something is measured on it."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch

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


def processor() -> str:
    """The CPU's name as the system gives it."""
    numbers = _cpuinfo()
    named = [value for name, value in numbers.items() if name.lower() in ("model name", "hardware")]
    return named[0] if named else platform.processor() or platform.machine()


def processor_model() -> str:
    """The name and, as virtual machines hide it from the name, what x86 and Arm number it by."""
    numbers = _cpuinfo()
    known = ("cpu family", "model", "CPU implementer", "CPU part")
    told = [f"{name.removeprefix('cpu ')} {numbers[name]}" for name in known if name in numbers]
    return ", ".join([processor(), *told])


def _cpuinfo() -> dict[str, str]:
    """What /proc/cpuinfo says of the first core; empty where there is no such file."""
    found: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            found.setdefault(name.strip(), value.strip())
    except OSError:
        pass
    return found


def device_name(device: torch.device) -> str:
    """What a reader calls the device."""
    if device.type == "cpu":
        return processor()
    return str(device_module(device).get_device_name(device))
