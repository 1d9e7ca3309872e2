"""Tests of the npu engine's Triton kernels: `make unit-triton` runs them, under its interpreter.

What runs on the real torch_npu over a stand-in for CANN is tested in tests/npu.
"""

from __future__ import annotations

from ...device import INTERPRETED

if not INTERPRETED:
    collect_ignore_glob = ["*"]
