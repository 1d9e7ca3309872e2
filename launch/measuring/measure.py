"""How time, memory, bandwidth and idleness are measured; nothing here knows what is measured.

Idea: a number is only comparable to its neighbours when both were taken under the same
conditions. So every function takes one run of one thing; who runs what, in which order and how
often is the caller's. Units: seconds, bytes, plain counts.
"""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MIB = 1 << 20

# mallopt's parameter numbers, from glibc's malloc.h
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3

_HOLD_CYCLES = 4_000_000
_CACHE_GUESS = 192 * MIB  # an Ascend 910B's; more than any card of NVIDIA has

_STEADY_MMAP = 32 * MIB  # where glibc's own growing threshold ends in any long-running process
_STRICT_MMAP = 64 << 10  # small enough that every buffer worth counting is returned when freed


@dataclass(frozen=True)
class Pass:
    """One forward and one backward: seconds each, and minor page faults of both together."""

    forward: float
    backward: float
    faults: int

    @property
    def total(self) -> float:
        return self.forward + self.backward


def device_module(device: torch.device) -> Any:
    """torch.cuda, torch.npu and so on: the module that holds the device's streams and memory."""
    return torch.get_device_module(device)


def synchronize(device: torch.device) -> None:
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


def time_pass(forward: Callable[[], Tensor], device: torch.device) -> Pass:
    """Time ``forward()`` and ``.backward()`` of what it returns.

    On a CPU by the monotonic clock, on an accelerator by events on its stream, which leaves the
    cost of waiting for the device out. The caller collects garbage and synchronises before.
    """
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    gc.disable()  # a collection that falls into one peer's run would be charged to it
    try:
        if device.type == "cpu":
            started = time.perf_counter()
            loss = forward()
            between = time.perf_counter()
            loss.backward()
            ended = time.perf_counter()
            seconds = (between - started, ended - between)
        else:
            module = device_module(device)
            events = [module.Event(enable_timing=True) for _ in range(3)]
            hold(device)
            events[0].record()
            loss = forward()
            events[1].record()
            loss.backward()
            events[2].record()
            module.synchronize(device)
            seconds = (
                events[0].elapsed_time(events[1]) / 1e3,
                events[1].elapsed_time(events[2]) / 1e3,
            )
    finally:
        gc.enable()
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    return Pass(*seconds, faults)


def time_copy(destination: Tensor, source: Tensor) -> float:
    """Seconds that ``destination.copy_(source)`` takes; it reads and writes the tensor once."""
    device = destination.device
    synchronize(device)
    if device.type == "cpu":
        started = time.perf_counter()
        destination.copy_(source)
        return time.perf_counter() - started
    module = device_module(device)
    start, stop = (module.Event(enable_timing=True) for _ in range(2))
    hold(device)
    start.record()
    destination.copy_(source)
    stop.record()
    module.synchronize(device)
    return float(start.elapsed_time(stop)) / 1e3


# --- memory ---------------------------------------------------------------------------------


def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None


def settle_malloc(strict: bool) -> None:
    """Fix when freed memory goes back to the system, so that no run inherits another's heap.

    glibc moves that threshold while a process runs. ``strict`` returns every freed block from
    64 KiB up, which a peak must be measured under; otherwise blocks up to 32 MiB stay in the
    heap, where a long-running process ends up by itself, which times must be measured under.
    """
    libc = _glibc()
    if libc is None:
        return
    threshold = _STRICT_MMAP if strict else _STEADY_MMAP
    libc.mallopt(_M_MMAP_THRESHOLD, threshold)
    libc.mallopt(_M_TRIM_THRESHOLD, 2 * threshold)
    if strict:
        libc.malloc_trim(0)


def _resident(field: str) -> int:
    """One line of /proc/self/status (VmRSS, VmHWM), in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no line {field}")


def peak_extra(run: Callable[[], object], device: torch.device) -> int | None:
    """Bytes by which memory rose above its level before ``run`` while it ran.

    CPU: the kernel's high-water mark of resident memory, reset before; exact to a few hundred
    KiB, because the kernel counts pages in batches a core. Accelerator: the allocator's own
    maximum. None where the system offers neither. Call settle_malloc(strict=True) before.
    """
    gc.collect()
    if device.type != "cpu":
        module = device_module(device)
        module.synchronize(device)
        module.reset_peak_memory_stats(device)
        before = int(module.memory_allocated(device))
        run()
        module.synchronize(device)
        return int(module.max_memory_allocated(device)) - before
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = _resident("VmRSS")
    except (OSError, RuntimeError):
        return None
    run()
    return max(0, _resident("VmHWM") - before)


# --- idleness -------------------------------------------------------------------------------


def _ticks() -> tuple[int, int] | None:
    """(idle, all) clock ticks so far, summed over the cores this process may use."""
    try:
        lines = Path("/proc/stat").read_text().splitlines()
        mine = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    except (OSError, AttributeError):
        return None
    idle = total = 0
    for line in lines:
        name, *fields = line.split()
        if name in mine:
            ticks = [int(field) for field in fields[:8]]  # the rest repeats guest time
            idle += ticks[3] + ticks[4]  # idle and waiting for a disk
            total += sum(ticks)
    return (idle, total) if total else None


def wait_until_idle(limit: float, share: float = 0.85, window: float = 0.1) -> bool | None:
    """Wait until the cores were idle for ``share`` of a ``window`` seconds, at most ``limit``.

    Returns whether that happened; None when it cannot be told or ``limit`` is 0.
    """
    before = _ticks()
    if before is None or limit <= 0:
        return None
    deadline = time.monotonic() + limit
    while True:
        time.sleep(window)
        now = _ticks()
        if now is None:
            return None
        if now[0] - before[0] >= share * (now[1] - before[1]):
            return True
        if time.monotonic() >= deadline:
            return False
        before = now


# --- collectives ----------------------------------------------------------------------------


def count_collectives(run: Callable[[], Any]) -> tuple[Any, int | None]:
    """(what ``run`` returned, how many collectives it issued).

    Counted by torch's own profiler: every collective, whoever calls it and over whichever
    backend, passes the dispatcher as a ``c10d::`` operator. None when the profiler is missing.
    """
    # The plain profiler: torch.profiler would import the whole compiler first. It sees the CPU
    # side, which is where a collective is issued, on every device.
    profiler: Any = torch.autograd.profiler.profile()
    try:
        profiler.__enter__()
    except RuntimeError:
        return run(), None
    try:
        result = run()
    finally:
        profiler.__exit__(None, None, None)
    events = profiler.function_events or []
    return result, sum(event.name.startswith("c10d::") for event in events)


# --- the machine ----------------------------------------------------------------------------


def processor() -> str:
    """The CPU's name as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.lower().startswith(("model name", "hardware")):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def processor_model() -> str:
    """The name and, as virtual machines hide it from the name, what x86 and Arm number it by."""
    numbers: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            numbers.setdefault(name.strip(), value.strip())
    except OSError:
        pass
    known = ("cpu family", "model", "CPU implementer", "CPU part")
    told = [f"{name.removeprefix('cpu ')} {numbers[name]}" for name in known if name in numbers]
    return ", ".join([processor(), *told])


def device_name(device: torch.device) -> str:
    if device.type == "cpu":
        return processor()
    return str(device_module(device).get_device_name(device))
