"""One file or folder for each engine; ``select`` says which engine serves a tensor."""

from __future__ import annotations

import functools

from torch import Tensor

from ..kinds import require_memory
from ..warning import warn
from . import eager
from .contract import Engine
from .cpu import engine as cpu
from .npu import engine as npu
from .triton import engine as triton

_MODULES: dict[str, Engine] = {"cpu": cpu, "npu": npu, "triton": triton, "eager": eager}
"""Each engine by the name that ``engine=`` gives it."""
_OF_DEVICE = {"cpu": "cpu", "npu": "npu", "cuda": "triton"}
"""The engine that "auto" takes for a type of device; eager for every other type."""
_REMEDY = {
    "cpu": "`pip install 'vocab_parallel_ce[cpu]'` brings the cpu engine",
    "npu": "torch_npu 2.5.1.post1 or newer, on a CANN that has the operator, brings the npu engine",
    "triton": "`pip install 'vocab_parallel_ce[cuda]'` brings Triton; the engine also needs a "
    "card of compute capability 8.0 or newer and a C compiler",
}
"""What the user can do where an engine of ``_OF_DEVICE`` is not available."""

ENGINES = ("auto", *_MODULES)


@functools.cache
def _engine_or_reason(name: str) -> Engine | str:
    """The engine, or why it cannot run here."""
    reason = _MODULES[name].unavailable()
    return _MODULES[name] if reason is None else reason


@functools.cache
def _warn_once(name: str, device_type: str, reason: str) -> None:
    warn(
        f"vocab_parallel_ce: the {name} engine is not available ({reason}); the slower eager "
        f"engine serves {device_type.upper()} tensors. {_REMEDY[name]}."
    )


def select(name: str, logits: Tensor) -> Engine:
    """The engine of that name for such logits; "auto" takes the fastest that is available."""
    kind = logits.device.type
    wanted = _OF_DEVICE.get(kind, "eager") if name == "auto" else name
    found = _engine_or_reason(wanted)
    if isinstance(found, str):
        if name != "auto":
            raise RuntimeError(f"engine={name!r} is not available: {found}; use engine='eager'")
        _warn_once(wanted, kind, found)
        return eager
    if not found.supports(logits):
        if name == "auto":
            return eager
        raise ValueError(
            f"engine={name!r} does not serve {logits.dtype} logits on {logits.device}; "
            "use engine='auto' or engine='eager'"
        )
    return found


def select_to_read(name: str, logits: Tensor) -> Engine:
    """``select`` for whoever hands the logits to the engine next, which reads addresses.

    ValueError for logits without memory of their own: see ``kinds``.
    """
    require_memory(logits)
    return select(name, logits)


def engine_of_device(device_type: str) -> str:
    """The name of the engine made for a type of device; "eager" where there is none."""
    return _OF_DEVICE.get(device_type, "eager")


def why_not(device_type: str) -> str | None:
    """Why the engine made for a type of device cannot run here; None if it can."""
    if device_type not in _OF_DEVICE:
        return f"there is no engine of its own for {device_type}"
    found = _engine_or_reason(_OF_DEVICE[device_type])
    return found if isinstance(found, str) else None


def engine_name(engine: Engine) -> str:
    """What ``engine=`` calls it."""
    return next(name for name, module in _MODULES.items() if module is engine)
