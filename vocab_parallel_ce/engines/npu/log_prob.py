"""log_prob of the ways that are made of torch operators: no fused kernel is any better at it."""

from __future__ import annotations

import torch
from torch import Tensor

from .chunks import Scaling, minus, row_ranges, shifted


def log_prob(logits: Tensor, m: Tensor, s: Tensor, scale: float, out: Tensor) -> None:
    """See ``contract.Engine``."""
    scaling, minus_m, log_s = Scaling(scale, logits), minus(m), torch.log(s)[:, None]
    for rows in row_ranges(logits, 1 + scaling.widens):
        _chunk(scaling.chunk(logits[rows]), minus_m[rows], log_s[rows], out[rows])


def _chunk(x: Tensor, minus_m: Tensor, log_s: Tensor, out: Tensor) -> None:
    result = shifted(x, minus_m, out)
    result.sub_(log_s)
    if result is not out:
        out.copy_(result)
