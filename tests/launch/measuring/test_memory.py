"""Peaks of memory."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from vocab_parallel_ce.launch.measuring.device import MIB
from vocab_parallel_ce.launch.measuring.memory import (
    PeakMemory,
    available_bytes,
    exact_peaks,
    peak_extra,
)

CPU = torch.device("cpu")


def test_peak_memory_sees_a_buffer_and_its_absence() -> None:
    with exact_peaks():
        size = 64 * MIB
        for _ in range(2):  # the first one brings torch's own threads and code into memory
            seen = peak_extra(lambda: torch.ones(size, dtype=torch.int8), CPU)
        if seen is None:
            pytest.skip("this system tells no peak")
        assert abs(seen - size) < MIB
        nothing = peak_extra(lambda: None, CPU)
        assert nothing is not None
        assert nothing < MIB


def test_peak_memory_sees_what_was_freed_again() -> None:
    memory = PeakMemory(CPU)
    memory.start()
    torch.ones(64 * 2**20, dtype=torch.uint8)
    peak = memory.stop()
    if Path("/proc/self/clear_refs").exists() and os.access("/proc/self/clear_refs", os.W_OK):
        assert peak is not None
        assert 60 * 2**20 < peak < 100 * 2**20
    else:
        assert peak is None


def test_memory_that_is_left() -> None:
    left = available_bytes()
    assert (left is None) == (not Path("/proc/meminfo").exists())
    assert left is None or left > MIB
