"""The memory that something takes at its peak, beyond what was taken before."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from vocab_parallel_ce.launch.measuring.device import MIB, device_module, synchronize

# mallopt's parameter numbers, from glibc's malloc.h
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3

_STEADY_MMAP = 32 * MIB  # where glibc's own growing threshold ends in any long-running process
_STRICT_MMAP = 64 << 10  # small enough that every buffer worth counting is returned when freed


class PeakMemory:
    """Extra memory at peak between `start()` and `stop()`, in bytes; None where it cannot be told.

    CPU: the kernel's high-water mark of resident memory, which Linux lets a process reset; exact to
    a few hundred KiB, because the kernel counts pages in batches a core. Accelerator: the
    allocator's own maximum.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.before: int | None = None

    def start(self) -> None:
        """From here."""
        if self.device.type != "cpu":
            synchronize(self.device)
            device_module(self.device).reset_peak_memory_stats(self.device)
            self.before = int(device_module(self.device).memory_allocated(self.device))
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")  # 5: reset VmHWM to the present VmRSS
            self.before = _resident("VmRSS")
        except (OSError, RuntimeError):
            self.before = None

    def stop(self) -> int | None:
        """To here; the device may still be at work."""
        if self.before is None:
            return None
        if self.device.type != "cpu":
            return int(device_module(self.device).max_memory_allocated(self.device)) - self.before
        return max(0, _resident("VmHWM") - self.before)


def peak_extra(run: Callable[[], object], device: torch.device) -> int | None:
    """Bytes by which memory rose above its level before ``run`` while it ran; see ``PeakMemory``.

    Garbage is collected and freed memory given back before. On a CPU call it within exact_peaks().
    """
    gc.collect()
    libc = _glibc() if device.type == "cpu" else None
    if libc is not None:
        libc.malloc_trim(0)
    memory = PeakMemory(device)
    memory.start()
    run()
    synchronize(device)
    return memory.stop()


@contextmanager
def exact_peaks() -> Iterator[None]:
    """A peak measured within holds nothing that was freed before; times measured within are wrong.

    Under the new setting everything has to run once before it is measured.
    """
    settle_malloc(strict=True)
    try:
        yield
    finally:
        settle_malloc(strict=False)


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


def available_bytes() -> int | None:
    """Memory of the machine that the system could hand out now; None where it does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in lines)
    return int(fields["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in fields else None


def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None


def _resident(field: str) -> int:
    """One line of /proc/self/status (VmRSS, VmHWM), in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no line {field}")
