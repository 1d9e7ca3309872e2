"""Triton kernels for Ascend."""

from __future__ import annotations

import torch


def unavailable(dtype: torch.dtype) -> str | None:
    return "triton-ascend is not installed"
