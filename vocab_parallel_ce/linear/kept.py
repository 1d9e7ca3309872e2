"""Which rows take part in the matrix products, and in which portions.

On a CPU ignored rows are left out before the products: often most of a batch. That takes a look at
the values of targets, for which an accelerator has to be waited for; there, unless the caller asks
for it, all rows are kept and those that do not count hold zeros.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

Rows = slice | Tensor
"""an index of rows: neighbours (a view), or those of a list (a copy)"""


@dataclass(frozen=True)
class Portion:
    """Rows of one product."""

    rows: Rows
    """of the whole batch"""
    own: slice | None = None
    """Of this rank's part, where the batch is split over ranks: it holds these of ``rows``."""

    @property
    def count(self) -> int:
        """How many rows there are."""
        return count(self.rows)


def kept_rows(keep: Tensor) -> Tensor | None:
    """Numbers of the rows where ``keep`` [N] holds; None for all of them. Looks at values."""
    numbers = keep.nonzero()[:, 0]
    return None if numbers.shape[0] == keep.shape[0] else numbers


def portions(rows: int, kept: Tensor | None, size: int) -> list[Portion]:
    """At most ``size`` of the kept rows at a time."""
    if kept is not None:
        return [Portion(some) for some in kept.split(size)] if kept.shape[0] else []
    return [Portion(slice(begin, min(begin + size, rows))) for begin in range(0, rows, size)]


def portions_of_parts(rows: int, parts: int, size: int, device: torch.device) -> list[Portion]:
    """Rows [a, b) of each of so many equal parts, at most ``size`` together."""
    length, step = rows // parts, max(1, size // parts)
    firsts = torch.arange(parts, device=device)[:, None] * length
    out = []
    for begin in range(0, length, step):
        end = min(begin + step, length)
        numbers = (firsts + torch.arange(begin, end, device=device)).flatten()
        out.append(Portion(numbers, slice(begin, end)))
    return out


def some_of(values: Tensor | None, rows: Rows) -> Tensor | None:
    """Some rows of [N, ...], where there are any values."""
    return None if values is None else values[rows]


def count(rows: Rows) -> int:
    """How many there are."""
    return rows.stop - rows.start if isinstance(rows, slice) else rows.shape[0]


def is_narrow(dtype: torch.dtype) -> bool:
    """Whether sums of such numbers are carried in fp32."""
    return dtype in (torch.float16, torch.bfloat16)


def masked(values: Tensor, keep: Tensor) -> Tensor:
    """[n, H] with zeros in the rows that are not kept: NaN there would reach a product."""
    return torch.where(keep[:, None], values, 0.0)
