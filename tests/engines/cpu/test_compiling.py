"""Compiling a kernel where its machine code cannot be kept."""

from __future__ import annotations

from typing import Any

import numba
import pytest

from vocab_parallel_ce.engines.cpu import compiling


def test_a_kernel_is_compiled_without_a_place_to_keep_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def njit(cache: bool = False, **options: Any) -> Any:
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return numba.njit(**options)

    def double(x: float) -> float:
        return 2 * x

    monkeypatch.setattr(compiling, "_njit", njit)
    assert compiling.kernel(double)(4.0) == 8.0
