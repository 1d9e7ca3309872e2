"""What the stand-in's operators share: calls that were accepted, rules that were broken."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class OperatorCall:
    """One call that the operator accepted."""

    name: str
    rows: int
    columns: int
    dtype: torch.dtype
    reduction: str = "none"
    ignore_index: int = -100
    label_smoothing: float = 0.0
    weighted: bool = False


calls: list[OperatorCall] = []
"""What this process called, in order. ``calls.clear()`` starts over."""


def require(holds: bool, rule: str, name: str = "npu_cross_entropy_loss") -> None:
    if not holds:
        raise RuntimeError(f"{name}: {rule}")


def number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


def require_sharded_operators(aclnn: str, name: str) -> None:
    """Those for sharded vocabularies came with CANN 8.5.0."""
    version = os.environ.get("NPU_SIM_CANN", "9.0.0")
    require(number(version) >= (8, 5), f"{aclnn} is not in libopapi.so of CANN {version}", name)
