"""How the CPU kernels are compiled: by Numba, at first use, and kept on disk if that can be."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
from numba.core.registry import cpu_target
from numba.extending import intrinsic

Function = TypeVar("Function", bound=Callable[..., Any])

# Numba's cache sees changes of the kernels' own file only; this makes it see its neighbours'.
_SOURCES = sorted(Path(__file__).parent.glob("*.py"))
_REVISION = f"{zlib.crc32(b''.join(source.read_bytes() for source in _SOURCES)):08x}"

_njit: Any = numba.njit


def kernel(function: Function) -> Function:
    """Compile at first use, keep the machine code on disk if any place for it is writable."""
    function.__qualname__ += f"_{_REVISION}"
    try:
        return cast(Function, _njit(cache=True, nogil=True, error_model="numpy")(function))
    except RuntimeError:
        return cast(Function, _njit(nogil=True, error_model="numpy")(function))


def helper(function: Function) -> Function:
    """Compile a function that only kernels call."""
    return cast(Function, _njit(error_model="numpy", no_cpython_wrapper=True)(function))


def operation(function: Callable[..., Any]) -> Any:
    """Typed face of ``numba.extending.intrinsic``."""
    return intrinsic(function)


def converts_fp16() -> bool:
    """Whether the processor for which kernels are compiled converts fp16 in one instruction.

    Without one LLVM calls a function of the C compiler's library, which may not be there.
    """
    return _has("f16c")


def fuses() -> bool:
    """Whether that processor rounds a b + c once: else ``multiply_add`` rounds a b, too."""
    return _has("fma")


def _has(feature: str) -> bool:
    """Whether x86-64 is said to have it; every AArch64 has both."""
    triple, _, features = cpu_target.target_context.codegen().magic_tuple()
    if triple.startswith("aarch64"):
        return True
    return triple.startswith("x86_64") and f"+{feature}" in features.split(",")
