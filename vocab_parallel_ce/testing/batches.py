"""Batches from a seed: the same tensors on every rank, so that none has to be sent."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """What a loss is called with, unsharded, on the CPU."""

    logits: Tensor
    """[N, V]"""
    target: Tensor
    """[N] int64, some of them ``ignore_index``"""
    weight: Tensor
    """[V] fp32 class weights, a fifth of them 0"""
    upstream: Tensor
    """[N] fp32 gradient that comes from above, exact in every dtype; never 0 in the first row"""


def batch(
    rows: int,
    vocab_size: int,
    dtype: torch.dtype,
    ignore_index: int = -100,
    seed: int = 0,
    spread: float = 3.0,
    ignored: float = 0.25,
    *,
    unreadable: bool = False,
    extreme: bool = False,
) -> Batch:
    """A batch in which the first row is kept and, if any is ignored, the second is not.

    Args:
        rows: N.
        vocab_size: V.
        dtype: Of the logits; they are drawn in fp32 and rounded.
        ignore_index: The target of ignored rows. If it is a class, kept rows may have it by chance
            and are then ignored as well.
        seed: The same seed gives the same batch on every rank and machine.
        spread: The standard deviation of the logits.
        ignored: The share of ignored rows, by chance; 0 ignores none.
        unreadable: Fill the logits of ignored rows with NaN and infinity: nobody may read them.
        extreme: Rows near +-10,000 and near 0 in turn, and -inf in a quarter of the columns
            that are nobody's target.

    Returns:
        Batch: on the CPU.

    Example:
        >>> batch(2, 4, torch.float32).target
        tensor([   0, -100])
    """
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocab_size, generator=g) * spread
    target = torch.randint(0, vocab_size, (rows,), generator=g)
    out = torch.rand(rows, generator=g) < ignored
    out[:1], out[1:2] = False, ignored > 0
    # A row whose target happens to be ignore_index is ignored as well.
    target[:1] = 1 if ignore_index == 0 else 0
    if extreme:
        logits += torch.tensor([0.0, 10_000.0, -10_000.0])[torch.arange(rows) % 3][:, None]
        masked = torch.rand(vocab_size, generator=g) < 0.25
        masked[target] = False
        logits[:, masked] = -torch.inf
    target = torch.where(out, ignore_index, target)
    weight = torch.rand(vocab_size, generator=g) + 0.25
    weight[2::5] = 0.0
    upstream = torch.randint(-8, 9, (rows,), generator=g) / 8
    upstream[:1] = torch.where(upstream[:1] == 0, 0.75, upstream[:1])
    if unreadable:
        unread = torch.full((vocab_size,), torch.nan)
        unread[1::2] = torch.inf
        logits[target == ignore_index] = unread
    return Batch(logits.to(dtype), target, weight, upstream)
