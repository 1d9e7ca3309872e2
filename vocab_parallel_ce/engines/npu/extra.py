"""What no way of the engine has in its kernels: a softcap, a scale for each row, sums of squares.

Cap and scales are a pass of their own on chunks of rows, in fp32: the way then serves x as if it
were logits. That costs r + 2 w a chunk (w more for the cap's slope in backward), in scratch that
the second-level cache holds; a call without them never comes here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import ModuleType

import torch
from torch import Tensor

from ..contract import Coefficients, Wanted
from .chunks import row_ranges

_BUFFERS = 4  # x, its gradient, the slope, and what the way itself takes


@dataclass(frozen=True)
class Extra:
    """x = scale * c * tanh(logits / c), or scale * logits."""

    scale: float | Tensor
    softcap: float

    @property
    def on(self) -> bool:
        """Whether the ways cannot do it themselves."""
        return self.softcap != 0 or isinstance(self.scale, Tensor)

    def x(self, logits: Tensor, rows: slice) -> Tensor:
        """[n, C_r] in fp32, dense and fresh."""
        scale = self.scale[rows, None] if isinstance(self.scale, Tensor) else self.scale
        if self.softcap == 0:
            return logits[rows].to(torch.float32, copy=True).contiguous().mul_(scale)
        return self._bent(logits, rows).mul_(self.softcap).mul_(scale)

    def slope(self, logits: Tensor, rows: slice) -> Tensor | None:
        """1 - tanh(logits / c)^2 [n, C_r]; None where there is no cap."""
        if self.softcap == 0:
            return None
        return self._bent(logits, rows).square_().neg_().add_(1.0)

    def _bent(self, logits: Tensor, rows: slice) -> Tensor:
        wide = logits[rows].to(torch.float32, copy=True).contiguous()
        return wide.div_(self.softcap).tanh_()


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
    plain = replace(wanted, squares=False)
    for rows in row_ranges(logits, _BUFFERS):
        x = extra.x(logits, rows)
        some = out.new_empty(len(plain.rows), x.shape[0])
        way.partials(x, local_target[rows], weight, 1.0, plain, some)
        named = dict(zip(wanted.rows, out[:, rows].unbind(0), strict=True))
        for name, row in zip(plain.rows, some.unbind(0), strict=True):
            named[name].copy_(row)
        if wanted.squares:
            m, s = some[0], some[1]
            e = x.sub_(m.masked_fill(m == -torch.inf, 0.0)[:, None]).exp_()
            # Of an ignored row, which may hold NaN, s is 0 as its other statistics are.
            named["q"].copy_(torch.where(s == 0, 0.0, e.square_().sum(1)))


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
    for rows in row_ranges(logits, _BUFFERS):
        x, slope = extra.x(logits, rows), extra.slope(logits, rows)
        some = Coefficients(*(None if c is None else c[rows] for c in coefficients))  # type: ignore[arg-type]
        mine = (m[rows], s[rows], local_target[rows])
        way.gradient(x, *mine, some, weight, 1.0, x, finite_logits)
        if slope is not None:
            # Where nothing is to flow x is 0 and the slope may be NaN.
            x = torch.where(x == 0, x, x * slope)
        out[rows].copy_(x)


def log_prob(
    way: ModuleType, logits: Tensor, m: Tensor, s: Tensor, extra: Extra, out: Tensor
) -> None:
    """See ``contract.Engine``."""
    for rows in row_ranges(logits, _BUFFERS):
        way.log_prob(extra.x(logits, rows), m[rows], s[rows], 1.0, out[rows])
