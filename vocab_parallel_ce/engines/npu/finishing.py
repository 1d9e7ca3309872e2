"""How the ways that are made of torch operators end, a call and a chunk."""

from __future__ import annotations

import torch
from torch import Tensor

from ..contract import IGNORED, Wanted


def finish_partials(named: dict[str, Tensor], local_target: Tensor, wanted: Wanted) -> None:
    """Once a call, on [N]: rows that are all -inf, targets that live elsewhere, ignored rows."""
    empty = named["m"] == -torch.inf
    for name in ("s", "t"):
        if name in named:
            named[name].masked_fill_(empty, 0.0)
    named["x_y"].masked_fill_(local_target < 0, 0.0)
    if not wanted.ignored_rows:
        ignored = local_target == IGNORED
        for statistic in named.values():
            statistic.masked_fill_(ignored, 0.0)


def subtract_smoothing(dx: Tensor, smooth: Tensor | None, weight: Tensor | None) -> None:
    """dx -= w_c smooth, in place."""
    if smooth is None:
        return
    if weight is None:
        dx.sub_(smooth[:, None])
    else:
        dx.addcmul_(smooth[:, None], weight[None], value=-1)


def write_chunk(dx: Tensor, out: Tensor, ignored: Tensor) -> None:
    """Round ``dx`` [n, C_r] into ``out``, which it may be already, and zero the ignored rows.

    Zeros are written, never multiplied into: 0 * NaN is NaN. A sweep of its own over the result,
    which costs less in a narrow dtype, and more where the result is strided.
    """
    if dx is not out and not out.is_contiguous():
        dx.masked_fill_(ignored[:, None], 0.0)
        out.copy_(dx)
        return
    if dx is not out:
        out.copy_(dx)
    out.masked_fill_(ignored[:, None], 0.0)
