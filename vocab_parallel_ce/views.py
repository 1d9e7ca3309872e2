"""Views that share memory with their tensor, whatever stands in the place of ``torch.Tensor.view``.

MindSpeed replaces that method by one that first copies a tensor that is not contiguous (its feature
"requirements-basic"; master of 2025 and 2026). Writing into the view of a padded or transposed
tensor then writes into a copy, without an error: an in-place gradient would be lost. MindSpeed does
not replace the operators below the method, which are called here.
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
