"""Partials and targets for tests of an engine's row functions, as ranks would hold them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vocab_parallel_ce.request import RowRequest

ROWS, SIZE = 300, 5  # more than one block of rows of the Triton kernels, the last one not full
EVERYTHING = {"smooth": True, "entropy": True, "squares": True, "argmax": True}


def equal_shards(world: int, **options: Any) -> list[RowRequest]:
    """Equal shards in rank order, as they are inferred."""
    starts = range(0, world * SIZE, SIZE)
    return [RowRequest(a, a + SIZE, world * SIZE, True, **options) for a in starts]


def target_of(world: int, rows: int = ROWS, ignored: int = -100) -> Tensor:
    """[N] ids of all ranks, every seventh ignored."""
    target = torch.randint(world * SIZE, (rows,))
    target[::7] = ignored
    return target


def fill_parts(parts: Tensor, request: RowRequest) -> None:
    """Partials as an engine may leave them: -inf on one rank or on all, a NaN, ties of maxima."""
    parts.copy_(3 * torch.randn(parts.shape))
    parts[1].exp_()
    parts[0, 8::13] = 2.0
    parts[1, 9] = torch.nan
    named = dict(zip(request.wanted.rows, parts.unbind(0), strict=True))
    for first in (5, 6) if request.start == 0 else (5,):
        empty = slice(first, None, 11)
        named["m"][empty], named["s"][empty] = -torch.inf, 0.0
        if request.smooth:
            named["u"][empty] = -torch.inf
        if request.entropy:
            named["t"][empty] = 0.0
        if request.squares:
            named["q"][empty] = 0.0
    if request.argmax:
        integer = torch.int64 if parts.dtype == torch.float64 else torch.int32
        named["argmax"].view(integer).copy_(torch.randint(SIZE, (parts.shape[1],)))
