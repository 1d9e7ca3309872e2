"""What the doctor finds out about one process. Data only; needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from vocab_parallel_ce.launch.doctor.variables import Judged


@dataclass(frozen=True)
class Device:
    name: str
    total: int | None
    free: int | None
    """bytes; None where nobody tells"""


@dataclass(frozen=True)
class Choice:
    """The engine that serves a dtype."""

    engine: str
    why: str


@dataclass(frozen=True)
class Environment:
    date: str
    command: list[str]
    python: str
    platform: str
    processor: str
    cores: int
    versions: dict[str, str]
    cann: str
    driver: str
    device: str
    """the kind in question: what was asked for, else the best that is here"""
    problem: str
    """why that device cannot be used; empty when it can"""
    notes: list[str]
    devices: list[Device]
    backend: str
    engines: dict[str, Choice]
    variables: list[Judged]

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of device that matter: this one, and NPUs where torch_npu says they should."""
        kinds = (self.device, "npu") if "torch_npu" in self.versions else (self.device,)
        return tuple(dict.fromkeys(kinds))
