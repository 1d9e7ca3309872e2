"""``selected``: the log-probabilities of K further ids of each row.

    forward     x of the ids that live in this shard, gathered: K floats a row more in the one
                exchange, that are added up as x_y is: all but the owner hold 0
                log_prob_k = (x_k - m) - log s
    backward    dx_c += scale (sum_k [c = id_k] g_k - p_c sum_k g_k)

The second part of the gradient belongs to the softmax, and an engine writes it with the rest. The
first touches a few columns. Rounded once more there, a small sum would be lost in a large part: so
all that such a column receives, the target's share included, is formed here anew from its p, in the
dtype of the arithmetic, rounded once, and put over what the engine wrote.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .engines.contract import (
    ELSEWHERE,
    IGNORED,
    Coefficients,
    Gathered,
    Wanted,
    without_unused,
)
from .request import RowRequest


def flat_ids(selected: Tensor | None) -> Tensor | None:
    """[..., K] ids -> [N, K] int64: every comparison with an id happens in int64."""
    if selected is None:
        return None
    return selected.reshape(selected.shape[:-1].numel(), selected.shape[-1]).long()


def by_row(log_prob: Tensor, rows: torch.Size) -> Tensor:
    """[K, N] -> [..., K], a copy"""
    whole = log_prob.t().clone(memory_format=torch.contiguous_format)
    return whole.reshape(*rows, log_prob.shape[0])


def is_allowed(selected: Tensor, ignored: Tensor, vocab_size: int) -> Tensor:
    """[N, K] bool: the id is a class, or its row does not count."""
    return ((selected >= 0) & (selected < vocab_size)) | ignored[:, None]


def local_columns(selected: Tensor, local_target: Tensor, request: RowRequest) -> Tensor:
    """[N, K] ids -> columns of this shard, or ELSEWHERE; so are those of rows that are ignored."""
    here = (selected >= request.start) & (selected < request.stop)
    here &= (local_target != IGNORED)[:, None]
    return torch.where(here, selected - request.start, ELSEWHERE)


def gather(
    logits: Tensor, columns: Tensor, scale: float | Tensor, softcap: float, out: Tensor
) -> None:
    """x of logits [n, C] at columns [n, K], 0 where they are ELSEWHERE, into ``out`` [K, n]."""
    values = logits.gather(1, columns.clamp(min=0)).to(out.dtype)
    x, _ = _scaled(values, scale, softcap)
    out.copy_(torch.where(columns == ELSEWHERE, 0.0, x).t())


def split(gathered: Gathered, wanted: Wanted) -> tuple[Tensor, Gathered]:
    """x [W, K, N] of every rank, and the partials without them."""
    k = len(wanted.rows)
    return gathered.parts[:, k:], gathered._replace(parts=gathered.parts[:, :k])


def log_prob(x: Tensor, m: Tensor, s: Tensor, ignored: Tensor) -> Tensor:
    """x [W, K, N] of every rank -> [K, N], added up in rank order; 0 where ``ignored`` [N]."""
    total = x[0].clone()
    for value in x[1:]:
        total += value
    return total.sub_(m).sub_(s.log()).masked_fill_(ignored, 0.0)


class Touched(NamedTuple):
    """Columns [n, K] of some rows, each with its whole gradient; all of a duplicate hold it."""

    columns: Tensor
    values: Tensor

    def put(self, out: Tensor) -> None:
        """Over what an engine wrote into ``out`` [n, C]."""
        out.scatter_(1, self.columns, self.values.to(out.dtype))


def touched(
    logits: Tensor,
    columns: Tensor,
    grad: Tensor,
    m: Tensor,
    s: Tensor,
    local_target: Tensor,
    coefficients: Coefficients,
    scale: float | Tensor,
    softcap: float,
) -> Touched:
    """The gradient at ``columns`` [n, K], from logits [n, C] that are still what they were.

    ``grad`` [n, K] is that of the log-probabilities, with ``scale`` in it, as the coefficients
    have; these are without smoothing.
    """
    # An id that lives elsewhere counts as one of column 0 that adds nothing to it.
    grad = torch.where(columns == ELSEWHERE, 0.0, grad)
    columns, order = columns.clamp(min=0).sort(dim=1, stable=True)
    grad = grad.gather(1, order)
    first = torch.searchsorted(columns, columns)
    grad = torch.zeros_like(grad).scatter_add_(1, first, grad).gather(1, first)

    x, slope = _scaled(logits.gather(1, columns).to(grad.dtype), scale, softcap)
    softmax, target, _, entropy = coefficients
    p = (x - m[:, None]).exp() / s[:, None]
    factor = softmax[:, None]
    if entropy is not None:
        log_p = (x - m[:, None]) - s.log()[:, None]
        factor = factor - torch.where(p == 0, 0.0, log_p * entropy[:, None])
    values = p * factor + (grad - torch.where(columns == local_target[:, None], target[:, None], 0))
    if slope is not None:
        values *= slope
    unused = (without_unused(local_target, coefficients) == IGNORED) & (grad == 0).all(1)
    # Written as zeros, as the engines do: 0 * NaN is NaN.
    return Touched(columns, values.masked_fill_(unused[:, None], 0.0))


def _scaled(logits: Tensor, scale: float | Tensor, softcap: float) -> tuple[Tensor, Tensor | None]:
    """x of logits [n, K], and the slope of the cap there where there is one."""
    slope = None
    if softcap != 0:
        bend = (logits / softcap).tanh()
        logits, slope = bend * softcap, 1 - bend.square()
    return logits * (scale[:, None] if isinstance(scale, Tensor) else scale), slope
