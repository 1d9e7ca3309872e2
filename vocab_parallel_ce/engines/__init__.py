"""One file a device; ``select`` says which one serves a tensor."""

from __future__ import annotations

import functools
import importlib
import warnings
from typing import cast

from torch import Tensor

from .contract import Engine

ENGINES = ("auto", "cpu", "eager")


@functools.cache
def _cpu_or_reason() -> Engine | str:
    module = importlib.import_module(".cpu", __package__)
    reason: str | None = module.unavailable()
    return cast(Engine, module) if reason is None else reason


@functools.cache
def _eager() -> Engine:
    return cast(Engine, importlib.import_module(".eager", __package__))


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(
        f"vocab_parallel_ce: the cpu engine is not available ({reason}); the slower eager engine "
        "serves CPU tensors. `pip install 'vocab_parallel_ce[cpu]'` brings the cpu engine.",
        stacklevel=2,
    )


def select(name: str, logits: Tensor) -> Engine:
    """The engine of that name for such logits; "auto" takes the fastest that is available."""
    if name == "eager" or (name == "auto" and logits.device.type != "cpu"):
        return _eager()
    found = _cpu_or_reason()
    if isinstance(found, str):
        if name == "cpu":
            raise RuntimeError(f"engine='cpu' is not available: {found}; use engine='eager'")
        _warn_once(found)
        return _eager()
    if not found.supports(logits):
        raise ValueError(
            f"engine='cpu' does not serve {logits.dtype} logits on {logits.device}; "
            "use engine='auto' or engine='eager'"
        )
    return found
