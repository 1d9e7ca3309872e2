"""What no kernel of CANN has: a softcap, a scale for each row, sums of squares.

Cap and scales are passes of their own on chunks of rows: the way then serves x in fp32 as if it
were logits. Bytes an element of bf16 and of fp32 logits, beside those of the way in fp32:

    a scale for each row    forward and backward    6, 8: one product, from the logits to fp32
    a softcap               forward                22, 24: product, tanh, product
                            backward               46, 48: the slope 12 and its product 12 more
    both                    as a softcap alone
    sums of squares         forward                26, 28: x - m, twice it, exp, sum

Backward the way works in place of x and in fp32; the result is rounded into its place at the end,
and ignored rows are zeroed there (10 and 16 in place of what the way takes for it). A call without
any of the three never comes here.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from ..contract import IGNORED, Coefficients, Wanted, without_unused
from .chunks import minus, row_ranges
from .finishing import write_chunk

_BUFFERS = 4  # x, its gradient, the slope, and what the way itself takes


class Extra:
    """x = scale * c * tanh(logits / c), or scale * logits."""

    def __init__(self, scale: float | Tensor, softcap: float, like: Tensor) -> None:
        self._capped, self._of_rows = softcap != 0, isinstance(scale, Tensor)
        self.on = self._capped or self._of_rows
        """Whether the ways cannot do it themselves."""
        self.widens = self.on or scale != 1.0
        """Whether x is fp32 in memory of its own; else it is the logits."""
        if not self.widens:
            return

        def number(value: float) -> Tensor:
            """fp32 [1]: torch.mul then reads bf16 as it lies, and writes fp32."""
            return torch.full((1,), value, dtype=torch.float32, device=like.device)

        outer = scale[:, None] if isinstance(scale, Tensor) else number(scale)
        self._outer = outer * softcap if self._capped else outer
        self._inner, self._one = (number(1 / softcap if softcap else 1.0), number(1.0))

    def x(self, logits: Tensor, rows: slice) -> Tensor:
        """[n, C_r], dense."""
        dense = logits[rows].contiguous()
        if not self.widens:
            return dense
        if not self._capped:
            return torch.mul(dense, self._factor(rows))
        return torch.mul(dense, self._inner).tanh_().mul_(self._factor(rows))

    def x_and_slope(self, logits: Tensor, rows: slice) -> tuple[Tensor, Tensor | None]:
        """``x``, and 1 - tanh(logits / c)^2 [n, C_r]; None where there is no cap."""
        if not self._capped:
            return self.x(logits, rows), None
        bent = torch.mul(logits[rows].contiguous(), self._inner).tanh_()
        slope = torch.addcmul(self._one, bent, bent, value=-1.0)
        return bent.mul_(self._factor(rows)), slope

    def _factor(self, rows: slice) -> Tensor:
        return self._outer[rows] if self._of_rows else self._outer


def partials(
    way: ModuleType,
    logits: Tensor,
    local_target: Tensor,
    weight: Tensor | None,
    extra: Extra,
    wanted: Wanted,
    out: Tensor,
) -> None:
    """See ``contract.Engine``."""
    plain = wanted._replace(squares=False)
    for rows in row_ranges(logits, _BUFFERS):
        x = extra.x(logits, rows)
        some = out.new_empty(len(plain.rows), x.shape[0])
        way.partials(x, local_target[rows], weight, 1.0, plain, some)
        named = dict(zip(wanted.rows, out[:, rows].unbind(0), strict=True))
        for name, row in zip(plain.rows, some.unbind(0), strict=True):
            named[name].copy_(row)
        if wanted.squares:
            m, s = some[0], some[1]
            d = torch.add(x, minus(m.masked_fill(m == -torch.inf, 0.0)))
            # Of an ignored row, which may hold NaN, s is 0 as its other statistics are.
            named["q"].copy_(torch.where(s == 0, 0.0, d.mul_(2.0).exp_().sum(1)))


def gradient(
    way: ModuleType,
    logits: Tensor,
    m: Tensor,
    s: Tensor,
    local_target: Tensor,
    coefficients: Coefficients,
    weight: Tensor | None,
    extra: Extra,
    out: Tensor,
    finite_logits: bool = False,
) -> None:
    """See ``contract.Engine``."""
    local_target = without_unused(local_target, coefficients)
    ignored = None if finite_logits else local_target == IGNORED
    for rows in row_ranges(logits, _BUFFERS):
        x, slope = extra.x_and_slope(logits, rows)
        some = Coefficients(*(None if c is None else c[rows] for c in coefficients))  # type: ignore[arg-type]
        # In place of x, whose ignored rows are zeroed once, at the end.
        way.gradient(x, m[rows], s[rows], local_target[rows], some, weight, 1.0, x, True)
        if slope is not None:
            x.mul_(slope)
        write_chunk(x, out[rows], None if ignored is None else ignored[rows])


def log_prob(
    way: ModuleType, logits: Tensor, m: Tensor, s: Tensor, extra: Extra, out: Tensor
) -> None:
    """See ``contract.Engine``."""
    for rows in row_ranges(logits, _BUFFERS):
        way.log_prob(extra.x(logits, rows), m[rows], s[rows], 1.0, out[rows])
