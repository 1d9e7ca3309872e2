"""The contract's formulas, word for word, in any dtype; and the shards that they are applied to."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ...engines.contract import ELSEWHERE, IGNORED, Coefficients, arithmetic_dtype


class Shard(NamedTuple):
    """What an engine sees of one rank: its columns of every row, on the CPU."""

    logits: Tensor
    """[N, C_r]"""
    target: Tensor
    """[N] int64 column, ELSEWHERE or IGNORED"""
    weight: Tensor
    """[C_r] in the arithmetic dtype"""


def random_shard(rows: int, columns: int, dtype: torch.dtype, spread: float = 3.0) -> Shard:
    """Rows whose target is here, elsewhere, or ignored, in turn; the weight of one class is 0.

    Args:
        rows: N.
        columns: C_r.
        dtype: Of the logits.
        spread: The standard deviation of the logits.

    Returns:
        Shard: from torch's global generator, so that a seed makes it again.
    """
    logits = (spread * torch.randn(rows, columns)).to(dtype)
    target = torch.randint(columns, (rows,))
    target[1::4] = ELSEWHERE
    target[2::4] = IGNORED
    weight = torch.rand(columns, dtype=arithmetic_dtype(dtype)) + 0.25
    weight[columns // 2] = 0.0
    return Shard(logits, target, weight)


def scaled(shard: Shard, scale: float | Tensor, dtype: torch.dtype, softcap: float = 0.0) -> Tensor:
    """x of every row [N, C_r], in ``dtype``."""
    x = shard.logits.to(dtype)
    if softcap:
        x = softcap * (x / softcap).tanh()
    return x * (scale.to(dtype)[:, None] if isinstance(scale, Tensor) else scale)


def statistics(
    shard: Shard,
    scale: float | Tensor,
    dtype: torch.dtype,
    weighted: bool = True,
    exp: Callable[[Tensor], Tensor] = torch.exp,
    softcap: float = 0.0,
) -> dict[str, Tensor]:
    """m, s, x_y, u, t, q and argmax of every row, ignored ones included.

    Args:
        shard: The rows.
        scale: Multiplies the logits, one number or one a row [N].
        dtype: Of the arithmetic.
        weighted: Whether ``u`` counts the class weights, or ones.
        exp: The exponential that is used.
        softcap: Of the logits, before the scale; 0 is none.

    Returns:
        dict[str, Tensor]: [N] each, by the names of ``engines.contract``.
    """
    x = scaled(shard, scale, dtype, softcap)
    w = shard.weight.to(dtype) if weighted else torch.ones(x.shape[1], dtype=dtype)
    m = x.amax(1)
    d = x - torch.where(m == -torch.inf, 0.0, m)[:, None]
    e = exp(d)
    here = shard.target >= 0
    x_y = x.gather(1, shard.target.clamp(min=0)[:, None]).squeeze(1)
    return {
        "m": m,
        "s": e.sum(1),
        "x_y": torch.where(here, x_y, 0.0),
        "u": (w * d).sum(1),
        "t": torch.where(e == 0, 0.0, e * d).sum(1),
        "q": e.square().sum(1),
        "argmax": (x == m[:, None]).to(torch.uint8).argmax(1),
    }


def gradient(
    shard: Shard,
    m: Tensor,
    s: Tensor,
    c: Coefficients,
    scale: float | Tensor,
    dtype: torch.dtype,
    softcap: float = 0.0,
) -> Tensor:
    """dx of every row [N, C_r]; 0 on ignored ones.

    Args:
        shard: The rows.
        m: [N] maxima of the whole rows.
        s: [N] sums of the whole rows.
        c: What multiplies the parts of the gradient, [N] each.
        scale: Multiplies the logits, one number or one a row [N].
        dtype: Of the arithmetic and the result.
        softcap: Of the logits, before the scale; 0 is none.
    """
    x = scaled(shard, scale, dtype, softcap)
    m, s = m.to(dtype)[:, None], s.to(dtype)[:, None]
    smooth, entropy = (None if part is None else part.to(dtype)[:, None] for part in c[2:])
    c = Coefficients(c.softmax.to(dtype)[:, None], c.target.to(dtype)[:, None], smooth, entropy)
    p = (x - m).exp() / s
    dx = p * c.softmax
    if c.entropy is not None:
        dx = dx - torch.where(p == 0, 0.0, p * c.entropy * ((x - m) - s.log()))
    hot = torch.arange(x.shape[1]) == shard.target[:, None]
    dx = dx - torch.where(hot, c.target, 0.0)
    if c.smooth is not None:
        dx = dx - c.smooth * shard.weight.to(dtype)
    if softcap:
        dx = dx * (1 - (shard.logits.to(dtype) / softcap).tanh().square())
    return torch.where(shard.target[:, None] == IGNORED, 0.0, dx)


def log_prob(
    shard: Shard,
    m: Tensor,
    s: Tensor,
    scale: float | Tensor,
    dtype: torch.dtype,
    softcap: float = 0.0,
) -> Tensor:
    """x - m - log s of every row [N, C_r], ignored ones included, in ``dtype``."""
    x = scaled(shard, scale, dtype, softcap)
    return x - m.to(dtype)[:, None] - s.to(dtype).log()[:, None]


def reordered(shard: Shard) -> Shard:
    """The same rows with their columns in another order, by torch's global generator."""
    order = torch.randperm(shard.logits.shape[1])
    place = order.argsort()[shard.target.clamp(min=0)]
    target = torch.where(shard.target < 0, shard.target, place)
    return Shard(shard.logits[:, order], target, shard.weight[order])
