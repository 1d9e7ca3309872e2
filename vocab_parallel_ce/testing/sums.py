"""The mean loss of logits too large for an fp64 copy: sums of each shard, merged in fp64.

    shard_sums    one rank, some rows at a time: four numbers a row
    merge_sums    all ranks' numbers: loss, gradient norm, log-sum-exp

Formulas and code of their own, apart from the library's: this is what it is measured against.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class MeanLoss:
    """The plain mean loss of N rows over all ranks, and its gradient's size."""

    loss: float
    gradient_norm: float
    """the 2-norm of d(loss) / d(logits), over all rows and columns"""
    lse: Tensor
    """[N] fp64 log-sum-exp of the whole rows, on the CPU"""


def shard_sums(
    logits: Tensor, local_target: Tensor, blocks: Iterable[slice], device: torch.device
) -> Tensor:
    """The maximum, the sum, the sum of squares and the target's logit of every row of a shard.

    Args:
        logits: [N, C_r] with C_r >= 1, any floating dtype, any device; only read.
        local_target: [N] int64: the target's column in this shard; outside it where another rank
            holds it.
        blocks: Slices that cover the rows in order: that many rows are in fp64 at once.
        device: Where the arithmetic is done; it must have fp64.

    Returns:
        Tensor: [4, N] fp64 on the CPU; the last row is -inf where the target is not here.

    Example:
        >>> x = torch.zeros(1, 4)
        >>> shard_sums(x, torch.tensor([7]), [slice(0, 1)], x.device).flatten().tolist()
        [0.0, 4.0, 4.0, -inf]
    """
    target = local_target.to(device)
    here = (target >= 0) & (target < logits.shape[1])
    parts = []
    for rows in blocks:
        x = logits[rows].to(device, torch.float64, copy=True)
        column = target[rows].clamp(0, x.shape[1] - 1)
        wanted = x.gather(1, column[:, None])[:, 0].masked_fill(~here[rows], -torch.inf)
        top = x.amax(1)
        e = x.sub_(top[:, None]).exp_()
        total = e.sum(1)
        parts.append(torch.stack([top, total, e.square_().sum(1), wanted]))
    return torch.cat(parts, 1).cpu()


def merge_sums(parts: Tensor) -> MeanLoss:
    """The sums of all shards.

    Args:
        parts: [ranks, 4, N], what ``shard_sums`` returned on each rank.

    Example:
        >>> x = torch.zeros(1, 4)
        >>> sums = shard_sums(x, torch.tensor([2]), [slice(0, 1)], x.device)
        >>> round(merge_sums(sums[None]).loss, 4)  # log 4
        1.3863
    """
    tops, totals, squares, wanteds = parts.unbind(1)
    top = tops.amax(0)
    shift = (tops - top).exp()
    total, square = (totals * shift).sum(0), (squares * shift.square()).sum(0)
    lse, wanted = top + total.log(), wanteds.amax(0)
    # per row: sum of p^2 with the target's p replaced by p - 1
    rows = square / total.square() - 2 * (wanted - lse).exp() + 1
    norm = rows.sum().sqrt() / len(lse)
    return MeanLoss(float((lse - wanted).mean()), float(norm), lse)
