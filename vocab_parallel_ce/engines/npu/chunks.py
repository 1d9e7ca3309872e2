"""Row chunks: how much memory a call may take beside its results, and what a chunk's x is.

Every way works on a few rows at a time, so that what one kernel writes is still in the card's
second-level cache when the next one reads it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from ...switches import SCRATCH_MIB, SCRATCH_VARIABLE

_MIB = 1 << 20
_CACHE_FOR_OTHERS = 16 * _MIB
_LOWEST = torch.finfo(torch.float32).min


def scratch_bytes() -> int:
    """Memory that a call may take beyond its results: VOCAB_PARALLEL_CE_NPU_SCRATCH_MIB.

    While that is unset it follows the card: half of the second-level cache without 16 MiB, because
    a chunk of fp32 scratch shares the cache with the same rows of the logits and of the result.
    ValueError for a setting that is no number.
    """
    text = os.environ.get(SCRATCH_VARIABLE)
    if text is None:
        return _scratch_of_card()
    try:
        mib = int(text)
    except ValueError:
        mib = 0
    if mib < 1:
        raise ValueError(f"{SCRATCH_VARIABLE}={text!r} must be a whole number of MiB, at least 1")
    return mib * _MIB


@cache
def _scratch_of_card() -> int:
    return scratch_for_cache(cache_bytes())


def scratch_for_cache(cache: int | None) -> int:
    """The scratch that fits a second-level cache of so many bytes; None: not known."""
    if cache is None:
        return SCRATCH_MIB * _MIB
    return max((cache - _CACHE_FOR_OTHERS) // 2, _CACHE_FOR_OTHERS)


def cache_bytes() -> int | None:
    """The second-level cache of this process's card, where torch_npu tells it."""
    try:
        card = torch.get_device_module("npu")
        size = int(card.get_device_properties(card.current_device()).L2_cache_size)
    except Exception:  # an older torch_npu has no such property
        return None
    return size if size > 0 else None


def row_ranges(logits: Tensor, buffers: int, most_rows: int | None = None) -> Iterator[slice]:
    """Ranges of rows such that ``buffers`` fp32 tensors of one range fit into the scratch."""
    rows, columns = logits.shape
    step = max(1, scratch_bytes() // (4 * columns * buffers))
    if most_rows is not None:
        step = min(step, most_rows)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


class Scaling:
    """x = logits * scale, for whole chunks and for one element of each row alike.

    The product is that of torch.mul with an fp32 tensor, which reads the logits as they lie and
    writes fp32: bf16 times a Python number would be rounded to bf16.
    """

    def __init__(self, scale: float, like: Tensor) -> None:
        self._factor = (
            None
            if scale == 1.0
            else torch.full((1,), scale, dtype=torch.float32, device=like.device)
        )

    @property
    def widens(self) -> bool:
        """Whether ``chunk`` takes fp32 memory of its own."""
        return self._factor is not None

    def chunk(self, logits: Tensor) -> Tensor:
        """x [n, C_r], dense: the logits themselves where nothing has to be done to them."""
        if self._factor is None:
            return logits.contiguous()  # once: every kernel would do it for itself
        return torch.mul(logits, self._factor)

    def elements(self, logits: Tensor) -> Tensor:
        """x [n] in fp32 of one logit a row."""
        wide = logits.float()
        return wide if self._factor is None else wide * self._factor


def minus(m: Tensor) -> Tensor:
    """-m [N, 1], to be added: torch.add mixes dtypes in one kernel, torch.sub casts first."""
    return m.neg()[:, None]


def lowest(like: Tensor) -> Tensor:
    """The lowest finite fp32 number, [1]. The maximum of it and of a row's maximum is fp32 and
    finite even where the row is all -inf: -inf - -inf would be NaN.
    """
    return torch.full((1,), _LOWEST, dtype=torch.float32, device=like.device)


def shifted(x: Tensor, minus_m: Tensor, out: Tensor) -> Tensor:
    """x - m in fp32: in ``out``'s memory if that is dense fp32, else in fresh memory."""
    if out.dtype == torch.float32 and out.is_contiguous():
        return torch.add(x, minus_m, out=out)
    return torch.add(x, minus_m)


def numbered(logits: Tensor) -> Tensor:
    """The columns' numbers [C_r] in fp32, which is exact below 2^24."""
    return torch.arange(logits.shape[1], dtype=torch.float32, device=logits.device)


def first_column_of(x: Tensor, top: Tensor, columns: Tensor) -> Tensor:
    """The first of ``columns`` that holds the row's maximum ``top``, [n].

    No order among ties is promised for the device's own argmax.
    """
    return torch.where(x == top[:, None], columns, float(x.shape[1])).amin(1)
