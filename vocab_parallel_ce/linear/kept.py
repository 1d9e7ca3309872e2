"""Which rows take part in the matrix products, and in which portions.

On a CPU ignored rows are left out before the products: often most of a batch. That takes a look at
the values of targets, for which an accelerator would have to be waited for; there all rows are kept
and those that do not count hold zeros.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

Rows = slice | Tensor
"""an index of rows: neighbours (a view), or those of a list (a copy)"""


def kept_rows(keep: Tensor) -> Tensor | None:
    """Numbers of the rows where ``keep`` [N] holds; None for all of them. Looks at values."""
    numbers = keep.nonzero()[:, 0]
    return None if numbers.shape[0] == keep.shape[0] else numbers


def portions(rows: int, kept: Tensor | None, size: int) -> Iterator[Rows]:
    """At most ``size`` of the kept rows at a time."""
    if kept is not None:
        yield from kept.split(size) if kept.shape[0] else ()
        return
    for begin in range(0, rows, size):
        yield slice(begin, min(begin + size, rows))


def count(rows: Rows) -> int:
    """How many there are."""
    return rows.stop - rows.start if isinstance(rows, slice) else rows.shape[0]


def masked(values: Tensor, keep: Tensor) -> Tensor:
    """[n, H] with zeros in the rows that are not kept: NaN there would reach a product."""
    return torch.where(keep[:, None], values, 0.0)
