"""One file a device; ``select`` says which one serves a tensor."""

from __future__ import annotations

import functools
import warnings

from torch import Tensor

from . import cpu, eager, npu
from .contract import Engine

ENGINES = ("auto", "cpu", "npu", "eager")

# The engine of a device bears the device's name. What brings it where it is missing:
_REMEDY = {
    "cpu": "`pip install 'vocab_parallel_ce[cpu]'` brings the cpu engine",
    "npu": "torch_npu 2.5.1.post1 or newer, on a CANN that has the operator, brings the npu engine",
}


@functools.cache
def _engine_or_reason(name: str) -> Engine | str:
    """The engine, or why it cannot run here."""
    module = {"cpu": cpu, "npu": npu}[name]
    reason: str | None = module.unavailable()
    return module if reason is None else reason


@functools.cache
def _warn_once(name: str, reason: str) -> None:
    warnings.warn(
        f"vocab_parallel_ce: the {name} engine is not available ({reason}); the slower eager "
        f"engine serves {name.upper()} tensors. {_REMEDY[name]}.",
        stacklevel=2,
    )


def select(name: str, logits: Tensor) -> Engine:
    """The engine of that name for such logits; "auto" takes the fastest that is available."""
    wanted = logits.device.type if name == "auto" else name
    if wanted not in _REMEDY:
        return eager
    found = _engine_or_reason(wanted)
    if isinstance(found, str):
        if name != "auto":
            raise RuntimeError(f"engine={name!r} is not available: {found}; use engine='eager'")
        _warn_once(wanted, found)
        return eager
    if not found.supports(logits):
        if name == "auto":
            return eager
        raise ValueError(
            f"engine={name!r} does not serve {logits.dtype} logits on {logits.device}; "
            "use engine='auto' or engine='eager'"
        )
    return found


def why_not(device_type: str) -> str | None:
    """Why the engine made for a type of device cannot run here; None if it can."""
    if device_type not in _REMEDY:
        return f"there is no engine of its own for {device_type}"
    found = _engine_or_reason(device_type)
    return found if isinstance(found, str) else None


def engine_name(engine: Engine) -> str:
    """What ``engine=`` calls it."""
    return next(name for name in ENGINES[1:] if globals()[name] is engine)
