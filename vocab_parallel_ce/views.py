"""Views that share memory with their tensor, whatever stands in the place of ``torch.Tensor.view``.

MindSpeed puts a function there that first copies what is not contiguous (its feature
"requirements-basic"; master of 2025 and 2026). Whoever then writes into the view of a padded or
transposed tensor writes into a copy, and nobody says so: an in-place gradient would be lost. The
operators below the method are not replaced.
"""

from __future__ import annotations

import torch
from torch import Tensor


def shaped(x: Tensor, *shape: int) -> Tensor:
    """``x.view(shape)``: RuntimeError where no strides allow it, never a copy."""
    view: Tensor = torch.ops.aten.view.default(x, shape)
    return view


def typed(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x.view(dtype)``: the same bits, for a dtype of the same width whatever the strides."""
    view: Tensor = torch.ops.aten.view.dtype(x, dtype)
    return view
