"""What a machine says of itself without torch."""

from __future__ import annotations

import platform
from pathlib import Path


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
