"""How the ways that are made of torch operators end, a call and a chunk."""

from __future__ import annotations

import torch
from torch import Tensor

from ..contract import IGNORED, Coefficients, Wanted

HIGHEST = torch.finfo(torch.float32).max


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


def silenced(
    local_target: Tensor, m: Tensor, s: Tensor, coefficients: Coefficients
) -> tuple[Tensor, Tensor, Coefficients]:
    """m, s and coefficients by which the arithmetic itself gives 0 in rows marked IGNORED.

    Once a call, on [N]. e^(x - 3.4e38) is at most 1 for every x in fp32, and what multiplies it is
    0: so it holds for finite logits and for -inf. NaN stays NaN, and +inf becomes NaN.
    """
    ignored = local_target == IGNORED
    zero = [None if c is None else c.masked_fill(ignored, 0.0) for c in coefficients]
    return m.masked_fill(ignored, HIGHEST), s.masked_fill(ignored, 1.0), Coefficients(*zero)  # type: ignore[arg-type]


def write_chunk(dx: Tensor, out: Tensor, ignored: Tensor | None) -> None:
    """Round ``dx`` [n, C_r] into ``out``, which it may be already, and zero the ignored rows.

    None: they are ``silenced``.

    Zeros are written, never multiplied into: 0 * NaN is NaN. A sweep of its own over the result,
    which costs less in a narrow dtype, and more where the result is strided.
    """
    strided = dx is not out and not out.is_contiguous()
    if ignored is not None and strided:
        dx.masked_fill_(ignored[:, None], 0.0)
    if dx is not out:
        out.copy_(dx)
    if ignored is not None and not strided:
        out.masked_fill_(ignored[:, None], 0.0)
