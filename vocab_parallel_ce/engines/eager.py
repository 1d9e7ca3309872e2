"""The readable engine: plain torch on any device, a few rows at a time.

The scratch of one block of rows is 4 MiB on a CPU, which stays in the last cache: smaller blocks
would stay in a nearer one, but torch's threads meet after each operation on a block, and that costs
more. An accelerator takes larger blocks, because there a kernel launch costs more than the memory.
It serves every device that has no engine of its own, and the CPU where Numba is missing.
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
_LOG2_E = 1.4426950408889634
_BLOCK_ELEMENTS = {"cpu": 1 << 20}
_BLOCK_ELEMENTS_ACCELERATOR = 1 << 24


def unavailable() -> str | None:
    """Never: it needs torch alone."""
    return None


def supports(logits: Tensor) -> bool:
    """Every device and dtype."""
    return True


def _blocks(logits: Tensor) -> Iterator[slice]:
    rows, columns = logits.shape
    limit = _BLOCK_ELEMENTS.get(logits.device.type, _BLOCK_ELEMENTS_ACCELERATOR)
    step = max(1, limit // max(1, columns))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _scratch(logits: Tensor, columns: int) -> Tensor:
    """Memory in the arithmetic dtype for one block of rows."""
    block = next(_blocks(logits), slice(0, 0))
    dtype = arithmetic_dtype(logits.dtype)
    return torch.empty(block.stop, columns, dtype=dtype, device=logits.device)


def _capped(logits: Tensor, softcap: float, scratch: Tensor) -> Tensor:
    """tanh(logits / softcap), in ``scratch``."""
    return scratch[: logits.shape[0]].copy_(logits).div_(softcap).tanh_()


def _x(
    logits: Tensor, rows: slice, scale: float | Tensor, softcap: float, scratch: Tensor
) -> Tensor:
    """x of some rows: the logits where they lie if x is just that, else in ``scratch``."""
    block = logits[rows]
    same = not isinstance(scale, Tensor) and scale == 1
    if same and softcap == 0 and block.dtype == scratch.dtype:
        return block
    if softcap == 0:
        x = scratch[: block.shape[0]].copy_(block)
    else:
        x = _capped(block, softcap, scratch).mul_(softcap)
    return x if same else x.mul_(scale[rows, None] if isinstance(scale, Tensor) else scale)


def _exp_(d: Tensor) -> Tensor:
    """e^d in place, d <= 0.

    On a CPU as a power of two: torch's exp is MKL's there, and takes 2.7 times as long on an AMD
    processor. The product errs by d 2^-24, which is nothing beside e^0 = 1 in a sum, or beside the
    largest probability. fp64 stays as exact as it can be.
    """
    if d.device.type != "cpu" or d.dtype == torch.float64:
        return d.exp_()
    return d.mul_(_LOG2_E).exp2_()


def _less(x: Tensor, m: Tensor, out: Tensor) -> Tensor:
    """x - m in the first rows of ``out``, which may hold x."""
    return torch.sub(x, m[:, None], out=out[: x.shape[0]])


def _at_target(
    logits: Tensor, local_target: Tensor, scale: float | Tensor, softcap: float
) -> Tensor:
    """x at the target of every row, 0 where the target lives elsewhere: [N]."""
    owned = local_target >= 0
    column = torch.where(owned, local_target, 0)[:, None]
    scratch = torch.empty_like(column, dtype=arithmetic_dtype(logits.dtype))
    x = _x(logits.gather(1, column), slice(None), scale, softcap, scratch)
    return torch.where(owned, x.squeeze(1), 0.0)


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
    named["x_y"].copy_(_at_target(logits, local_target, scale, softcap))
    scratch = _scratch(logits, logits.shape[1])
    for rows in _blocks(logits):
        x = _x(logits, rows, scale, softcap, scratch)
        m = torch.amax(x, 1, out=named["m"][rows])
        if wanted.argmax:
            # No device's argmax need name the first of a tie. fp32 holds every column below 2^24.
            columns = torch.arange(x.shape[1], dtype=x.dtype, device=x.device)
            first = torch.where(x == m[:, None], columns, float(x.shape[1])).amin(1)
            bits = named["argmax"].view(torch.int64 if x.dtype == torch.float64 else torch.int32)
            bits[rows] = first.to(bits.dtype)
        # An all -inf row is taken relative to 0: -inf - -inf would be NaN.
        d = _less(x, torch.where(m == -torch.inf, 0.0, m), out=scratch)
        if wanted.smooth:
            # A matrix product sums in long chains and loses several times as much as torch.sum.
            named["u"][rows] = (d if weight is None else d * weight).sum(1)
        e = d.exp() if wanted.entropy else _exp_(d)
        torch.sum(e, 1, out=named["s"][rows])
        if wanted.entropy:
            named["t"][rows] = d.mul_(e).masked_fill_(e == 0, 0.0).sum(1)
        if wanted.squares:
            torch.sum(e.square_(), 1, out=named["q"][rows])
    if not wanted.ignored_rows:
        out.masked_fill_(local_target == IGNORED, 0.0)


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
    finite_logits: bool = False,
) -> None:
    """See ``contract.Engine``."""
    softmax, target_part, smooth, entropy = coefficients
    local_target = without_unused(local_target, coefficients)
    factor = softmax / s
    owned = local_target >= 0
    column = torch.where(owned, local_target, 0)[:, None]
    less = torch.where(owned, -target_part, 0.0)[:, None]
    ignored = (local_target == IGNORED)[:, None]
    # Only a CPU can look first, without waiting for a device.
    no_zeros = logits.device.type == "cpu" and not bool(ignored.any())
    scratch = _scratch(logits, logits.shape[1])
    # Dense memory, always: elsewhere torch's exp2 gives some elements another last bit.
    here = out.dtype == scratch.dtype and out.is_contiguous()
    for rows in _blocks(logits):
        # Read before the gradient may take the place of the logits.
        slope = 1 - _capped(logits[rows], softcap, scratch).square_() if softcap != 0 else None
        x = _x(logits, rows, scale, softcap, scratch)
        # The target's gradient is added before anything is rounded.
        dx = _less(x, m[rows], out=out[rows] if here else scratch)
        if entropy is None:
            _exp_(dx).mul_(factor[rows, None])
        else:
            p = dx.sub_(s[rows].log()[:, None]).exp()  # dx is log p now
            dx.mul_(-entropy[rows, None]).masked_fill_(p == 0, 0.0)
            dx.add_(softmax[rows, None]).mul_(p)
        if smooth is not None:
            g = smooth[rows, None]
            dx -= g if weight is None else g * weight
        dx.scatter_add_(1, column[rows], less[rows])
        if slope is not None:
            dx *= slope
        if not no_zeros:  # written as zeros, never multiplied into them: 0 * NaN is NaN
            dx.masked_fill_(ignored[rows], 0.0)
        if not here:
            out[rows] = dx


def log_prob(
    logits: Tensor, m: Tensor, s: Tensor, scale: float | Tensor, softcap: float, out: Tensor
) -> None:
    """See ``contract.Engine``."""
    scratch = _scratch(logits, logits.shape[1])
    for rows in _blocks(logits):
        x = _x(logits, rows, scale, softcap, scratch)
        out[rows] = _less(x, m[rows], out=scratch).sub_(s[rows].log()[:, None])
