"""The readable engine: plain torch on any device, a few rows at a time.

The scratch of one block of rows is a few MiB on a CPU, so that it stays in cache; an accelerator
takes larger blocks, because there a kernel launch costs more than the memory. It serves every
device that has no engine of its own, and the CPU where Numba is missing.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .contract import (
    IGNORED,
    Coefficients,
    LinearFunctions,
    RowFunctions,
    Wanted,
    arithmetic_dtype,
    without_unused,
)

ROW_FUNCTIONS: RowFunctions | None = None
LINEAR_FUNCTIONS: LinearFunctions | None = None
LEAVES_LOG_PROB = False
_BLOCK_ELEMENTS = {"cpu": 1 << 18}
_BLOCK_ELEMENTS_ACCELERATOR = 1 << 24


def supports(logits: Tensor) -> bool:
    return True


def _blocks(logits: Tensor) -> Iterator[slice]:
    rows, columns = logits.shape
    limit = _BLOCK_ELEMENTS.get(logits.device.type, _BLOCK_ELEMENTS_ACCELERATOR)
    step = max(1, limit // max(1, columns))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _capped(logits: Tensor, softcap: float) -> Tensor:
    """tanh(logits / softcap) in the arithmetic dtype."""
    return logits.to(arithmetic_dtype(logits.dtype), copy=True).div_(softcap).tanh_()


def _scaled(logits: Tensor, rows: slice, scale: float | Tensor, softcap: float) -> Tensor:
    """x of some rows in the arithmetic dtype, always fresh memory."""
    block = logits[rows]
    if softcap == 0:
        x = block.to(arithmetic_dtype(block.dtype), copy=True)
    else:
        x = _capped(block, softcap).mul_(softcap)
    return x.mul_(scale[rows, None] if isinstance(scale, Tensor) else scale)


def _select(values: Tensor, local_target: Tensor) -> Tensor:
    """The target's column of every row, 0 where the target lives elsewhere: [n]."""
    owned = local_target >= 0
    column = torch.where(owned, local_target, 0)
    return torch.where(owned, values.gather(1, column[:, None]).squeeze(1), 0.0)


def partials(
    logits: Tensor,
    local_target: Tensor,
    weight: Tensor | None,
    scale: float | Tensor,
    softcap: float,
    wanted: Wanted,
    out: Tensor,
    log_prob_out: Tensor | None = None,
) -> None:
    """See ``contract.Engine``."""
    named = dict(zip(wanted.rows, out.unbind(0), strict=True))
    for rows in _blocks(logits):
        target = local_target[rows]
        x = _scaled(logits, rows, scale, softcap)
        ignored = target == IGNORED
        if not wanted.ignored_rows:
            x.masked_fill_(ignored[:, None], 0.0)
        m = x.amax(1)
        x_y = _select(x, target)
        if wanted.argmax:
            # No device's argmax need name the first of a tie. fp32 holds every column below 2^24.
            columns = torch.arange(x.shape[1], dtype=x.dtype, device=x.device)
            first = torch.where(x == m[:, None], columns, float(x.shape[1])).amin(1)
            bits = named["argmax"].view(torch.int64 if x.dtype == torch.float64 else torch.int32)
            bits[rows] = first.to(bits.dtype).masked_fill_(ignored, 0)
        # An all -inf row is taken relative to 0: -inf - -inf would be NaN.
        x -= torch.where(m == -torch.inf, 0.0, m)[:, None]
        if wanted.smooth:
            # A matrix product sums in long chains and loses several times as much as torch.sum.
            named["u"][rows] = (x if weight is None else x * weight).sum(1)
        e = x.exp()
        named["s"][rows] = e.sum(1)
        if wanted.entropy:
            named["t"][rows] = torch.where(e == 0, 0.0, e * x).sum(1)
        if wanted.squares:
            named["q"][rows] = e.square_().sum(1)
        named["m"][rows] = m
        named["x_y"][rows] = x_y
        if not wanted.ignored_rows:
            for name in wanted.rows:
                if name != "argmax":
                    named[name][rows].masked_fill_(ignored, 0.0)


def gradient(
    logits: Tensor,
    m: Tensor,
    s: Tensor,
    local_target: Tensor,
    coefficients: Coefficients,
    weight: Tensor | None,
    scale: float | Tensor,
    softcap: float,
    out: Tensor,
) -> None:
    """See ``contract.Engine``."""
    softmax, target_part, smooth, entropy = coefficients
    local_target = without_unused(local_target, coefficients)
    for rows in _blocks(logits):
        target = local_target[rows]
        x = _scaled(logits, rows, scale, softcap).sub_(m[rows, None])
        if entropy is None:
            p = x.exp_().div_(s[rows, None])
            dx = p.mul_(softmax[rows, None])
        else:
            log_p = x.sub_(s[rows].log()[:, None])
            p = log_p.exp()
            bend = torch.where(p == 0, 0.0, log_p * entropy[rows, None])
            dx = p.mul_(softmax[rows, None] - bend)
        if smooth is not None:
            g = smooth[rows, None]
            dx -= g if weight is None else g * weight
        owned = target >= 0
        column = torch.where(owned, target, 0)[:, None]
        one_hot = torch.where(owned, target_part[rows], 0.0)[:, None]
        dx.scatter_add_(1, column, -one_hot)
        if softcap != 0:
            dx *= 1 - _capped(logits[rows], softcap).square_()
        # Written as zeros, never multiplied into them: 0 * NaN is NaN.
        dx.masked_fill_((target == IGNORED)[:, None], 0.0)
        out[rows] = dx


def log_prob(
    logits: Tensor, m: Tensor, s: Tensor, scale: float | Tensor, softcap: float, out: Tensor
) -> None:
    """See ``contract.Engine``."""
    for rows in _blocks(logits):
        x = _scaled(logits, rows, scale, softcap)
        out[rows] = x.sub_(m[rows, None]).sub_(s[rows].log()[:, None])
