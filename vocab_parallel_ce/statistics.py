"""What a row carries and how partials merge: pure tensor arithmetic on [W, k, N] and [N].

Every rank summarises its shard of a row in k floats (see ``engines/contract.py``). With
m = max_r m_r the summaries merge exactly as one pass over the whole row would have made them:

    s   = sum_r e^(m_r - m) s_r
    t   = sum_r e^(m_r - m) (t_r + (m_r - m) s_r)
    u   = sum_r (u_r + W_r (m_r - m))              W_r = sum of the class weights of shard r
    q   = sum_r e^(2 (m_r - m)) q_r
    x_y = sum_r x_y_r                              all but the owner hold 0

(the online softmax of Milakov and Gimelshein 2018, over ranks instead of blocks). The statistics
of the row follow without cancellation, because m never leaves the differences:

    nll = log s - (x_y - m)    lse = m + log s    smooth = W log s - u    entropy = log s - t / s
    sum_p_squared = q / s^2    (without a gradient)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .engines.contract import Wanted
from .views import typed


@dataclass
class Merged:
    """The statistics of N rows over the whole vocabulary: [N] each."""

    m: Tensor
    s: Tensor
    x_y: Tensor
    u: Tensor | None = None
    t: Tensor | None = None
    q: Tensor | None = None
    argmax: Tensor | None = None


def stat_names(wanted: Wanted) -> tuple[str, ...]:
    """Rows of the primitive's output, in order; all but "sum_p_squared" have a gradient."""
    names = ["nll", "lse"]
    if wanted.smooth:
        names.append("smooth")
    if wanted.entropy:
        names.append("entropy")
    if wanted.squares:
        names.append("sum_p_squared")
    return tuple(names)


def apart(stats: Tensor, wanted: Wanted, selected: Tensor | None) -> tuple[Tensor, ...]:
    """[j + K, N] as j rows [N] and, where ids were ``selected``, [K, N]."""
    if selected is None:
        return stats.unbind(0)
    j = len(stat_names(wanted))
    return *stats[:j].unbind(0), stats[j:]


def rescale_(parts: dict[str, Tensor], m: Tensor, shard_weight: Tensor | None) -> None:
    """Make partials relative to the global ``m``, in place: then they can be summed.

    ``parts`` maps the names of ``Wanted.rows`` to [..., N]; ``shard_weight`` is W_r, [..., 1],
    for u alone.
    What was m_r is scratch afterwards. In place, because W x k x N numbers are
    what a merge costs in memory already.
    """
    # A shard that is all -inf (m_r = -inf, s_r = t_r = 0) must add 0, and its u_r = -inf stay: the
    # shift is kept finite, since W_r = 0 and s_r = 0 times -inf would be NaN.
    shift = parts["m"].sub_(m.masked_fill(m == -torch.inf, 0.0))
    shift.clamp_(min=torch.finfo(shift.dtype).min)
    if "u" in parts:
        assert shard_weight is not None
        parts["u"].addcmul_(shard_weight, shift)
    if "t" not in parts and "q" not in parts:
        parts["s"].mul_(shift.exp_())
        return
    # s first: shift * s overflows for a shard of masks (finfo.min), and inf * e^shift is NaN.
    factor = shift.exp()
    parts["s"].mul_(factor)
    if "t" in parts:
        parts["t"].mul_(factor).addcmul_(shift, parts["s"])
    if "q" in parts:
        parts["q"].mul_(factor).mul_(factor)


def integer_view(parts: Tensor) -> Tensor:
    """The argmax row, which travels as the bits of an integer of the same width."""
    return typed(parts, torch.int64 if parts.dtype == torch.float64 else torch.int32)


def merge(
    parts: Tensor, wanted: Wanted, shard_weight: Tensor | None, starts: Tensor | None
) -> Merged:
    """Merge [W, k, N] partials in rank order: the same bits on every rank that holds them.

    ``shard_weight`` [W] holds every rank's W_r, for u, and ``starts`` [W] its first vocabulary id,
    for argmax.
    ``parts`` is used up as scratch.
    """
    named = {name: parts[:, row] for row, name in enumerate(wanted.rows)}
    m = named["m"].amax(0)
    argmax = None
    if wanted.argmax:
        assert starts is not None
        ids = integer_view(named.pop("argmax")).long() + starts[:, None].long()
        # The smallest id wins a tie.
        none = torch.iinfo(torch.int64).max
        argmax = torch.where(named["m"] == m, ids, none).amin(0)
    rescale_(named, m, None if shard_weight is None else shard_weight[:, None])
    del named["m"]
    return Merged(m, argmax=argmax, **{name: _sum_in_order(v) for name, v in named.items()})


def merge_single(parts: Tensor, wanted: Wanted) -> Merged:
    """One rank holds the whole vocabulary: its partials are the statistics."""
    named = dict(zip(wanted.rows, parts.unbind(0), strict=True))
    argmax = integer_view(named["argmax"]).long() if wanted.argmax else None
    # m and s outlive the call; cloned, they do not keep the other partials alive.
    m, s = named["m"].clone(), named["s"].clone()
    u, t, q = (named.get(name) for name in "utq")
    return Merged(m, s, named["x_y"], u, t, q, argmax)


def _sum_in_order(values: Tensor) -> Tensor:
    """[W, N] -> [N], rank after rank: torch.sum promises no order of its own."""
    total = values[0].clone()
    for value in values[1:]:
        total += value
    return total


def finish(merged: Merged, wanted: Wanted, total_weight: float | Tensor, ignored: Tensor) -> Tensor:
    """The [j, N] statistics named by ``stat_names``; exactly 0 on ignored rows.

    ``lse`` of an ignored row is real when ``wanted.ignored_rows`` had its logits read.
    """
    log_s = merged.s.log()
    stats = merged.s.new_empty(len(stat_names(wanted)), merged.s.shape[0])
    nll, lse, *rest = stats.unbind(0)
    torch.sub(log_s, merged.x_y - merged.m, out=nll)
    torch.add(merged.m, log_s, out=lse)
    if wanted.smooth:
        assert merged.u is not None
        torch.sub(log_s * total_weight, merged.u, out=rest.pop(0))
    if wanted.entropy:
        assert merged.t is not None
        torch.sub(log_s, merged.t / merged.s, out=rest.pop(0))
    if wanted.squares:
        assert merged.q is not None
        torch.div(merged.q / merged.s, merged.s, out=rest.pop(0))
    if wanted.ignored_rows:
        nll.masked_fill_(ignored, 0.0)
        stats[2:].masked_fill_(ignored, 0.0)
    else:
        stats.masked_fill_(ignored, 0.0)
    if merged.argmax is not None:
        # Nor has a row of NaN a maximum, whatever column an engine named.
        merged.argmax.masked_fill_(ignored | merged.s.isnan(), -1)
    return stats
