"""``scale``: one number for all rows, or one for each.

A tensor of no dimension on the CPU is a number: reading it waits for nobody. Any other tensor goes
to the kernels as [N], and nothing looks at its values on an accelerator.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .engines.contract import arithmetic_dtype
from .kinds import has_memory


def number_of(scale: Tensor | float) -> float | None:
    """The number that ``scale`` is, or None where it is one for each row."""
    if not isinstance(scale, Tensor):
        return scale
    if torch.compiler.is_compiling() or scale.dim() > 0 or scale.device.type != "cpu":
        return None
    return float(scale) if has_memory(scale) else None


def of_rows(scale: Tensor | float, logits: Tensor, target: Tensor) -> Tensor | None:
    """[N] in the dtype of the arithmetic, or None for a number. No gradient flows into it.

    On an accelerator what is infinite becomes NaN, and so does its row.
    """
    if not isinstance(scale, Tensor) or number_of(scale) is not None:
        return None
    rows = scale.detach().to(device=logits.device, dtype=arithmetic_dtype(logits.dtype))
    rows = rows.expand(target.shape).reshape(-1)
    return rows if rows.device.type == "cpu" else rows + (rows - rows)
