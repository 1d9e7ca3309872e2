"""The forward and the backward pass of one rank's shard, without autograd.

    compute_statistics   partials of this shard (one read), one exchange, arithmetic on [N]
    exchange_statistics  the same for whoever has another way to fill the partials
    compute_gradient     no communication; one formula for every output (one read, one write)
    compute_log_prob     the log-softmax of this shard, where a caller asks for it

``primitive.py`` calls them from an autograd.Function, ``compiled.py`` from custom operators. Here,
once for all engines: padding columns are narrowed away, an empty shard is answered for, and leading
dimensions that cannot be flattened are looped over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from . import selected as selecting
from .collectives import Payload, check_group_serves, exchange
from .engines import select_to_read
from .engines.contract import IGNORED, Coefficients, Engine, Gathered, arithmetic_dtype
from .header import read_normalizers
from .kinds import require_memory
from .preflight import Plan, preflight
from .request import RowRequest
from .row_steps import row_steps
from .statistics import stat_names
from .views import shaped


@dataclass
class RowResult:
    """What the forward pass knows of N rows."""

    stats: Tensor
    """[j + K, N] the statistics named by ``stat_names``, then the log-probabilities of K ids"""
    m: Tensor
    s: Tensor
    """[N] the softmax of every row is e^(x - m) / s; kept apart, see the backward"""
    local_target: Tensor
    """[N] int64 column, ELSEWHERE or IGNORED"""
    argmax: Tensor | None = None
    """[N] int64, where it was asked for"""
    normalizer: Tensor | None = None
    """0-d: rank 0's, for all ranks; None when the call has none"""
    scale: Tensor | None = None
    """[N] where each row has its own; counts in place of the request's"""
    selected: Tensor | None = None
    """[N, K] int64 ids whose log-probabilities were asked for"""
    row_weight: Tensor | None = None
    """[N] what a row weighs in a mean, see ``reduction.RowLosses``; None where nobody asked yet"""

    def outputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """All that was computed, for an operator's schema: empty what was not asked for."""
        argmax, agreed = self.argmax, self.normalizer
        return (
            self.stats,
            self.m,
            self.s,
            self.local_target,
            self.local_target.new_empty(0) if argmax is None else argmax,
            self.m.new_empty(0) if agreed is None else agreed,
        )


def row_blocks(x: Tensor) -> list[Tensor]:
    """[..., C] as 2-D views [n, C] in row order, without a copy: one where strides allow it."""
    if x.dim() == 2:
        return [x]
    if x.dim() == 1:
        return [x[None]]
    try:
        return [shaped(x, -1, x.shape[-1])]
    except RuntimeError:
        return [block for part in x.unbind(0) for block in row_blocks(part)]


def _columns(logits: Tensor, size: int) -> Tensor:
    return logits if logits.shape[-1] == size else logits[..., :size]


def _numbered(blocks: list[Tensor]) -> Iterator[tuple[slice | None, Tensor]]:
    """Each block of rows with where they lie among all of them; None for the usual single block.

    A slice of everything would cost a microsecond or two, many times a call.
    """
    if len(blocks) == 1:
        yield None, blocks[0]
        return
    first = 0
    for block in blocks:
        yield slice(first, first + block.shape[0]), block
        first += block.shape[0]


def _of(values: Tensor, rows: slice | None) -> Tensor:
    """[..., n] of [..., N]"""
    return values if rows is None else values[..., rows]


def _shard_weight(weight: Tensor | None, request: RowRequest, dtype: torch.dtype) -> Tensor | None:
    """What the engines need: smoothing alone reads the weights of columns."""
    if weight is None or not request.smooth:
        return None
    return weight[request.start : request.stop].to(dtype)


def _shard_total(weight: Tensor | None, request: RowRequest, dtype: torch.dtype) -> Tensor | float:
    part = _shard_weight(weight, request, dtype)
    return float(request.size) if part is None else part.sum()


def _total_weight(weight: Tensor | None, request: RowRequest, dtype: torch.dtype) -> Tensor | float:
    """Of smoothing as well."""
    if weight is None or not request.smooth:
        return float(request.vocab_size)
    return weight.to(dtype).sum()


def _on_host(logits: Tensor, request: RowRequest) -> bool:
    """Whether values of tensors may be looked at; on an accelerator that means to wait for it."""
    return logits.device.type == "cpu" or request.waits


def compute_statistics(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    request: RowRequest,
    group: dist.ProcessGroup | None,
    log_prob_out: Tensor | None = None,
    normalizer: Tensor | None = None,
    scale: Tensor | None = None,
    selected: Tensor | None = None,
) -> RowResult:
    """The forward pass: logits [..., C_r], target [...] and the full weight [vocab_size].

    ``normalizer`` is 0-d and ``scale`` [N], in the arithmetic dtype; ``selected`` is [N, K] int64;
    ``log_prob_out``: see ``primitive.log_prob_space``.
    """

    def fill(engine: Engine, parts: Tensor, local_target: Tensor) -> None:
        fill_partials(
            engine, parts, logits, local_target, weight, request, log_prob_out, scale, selected
        )

    plan = Plan(request, logits, target, normalizer, scale=scale, selected=selected)
    return exchange_statistics(fill, plan, target, weight, group)


def exchange_statistics(
    fill: Callable[[Engine, Tensor, Tensor], Tensor | None],
    plan: Plan,
    target: Tensor,
    weight: Tensor | None,
    group: dist.ProcessGroup | None,
    announced: Tensor | None = None,
) -> RowResult:
    """Partials as ``fill`` writes them, one exchange, and the statistics of every row.

    Args:
        fill: writes the partials [k + K, N] of rows whose ``local_target`` [N] it is given. What
            it returns, if anything, is what the header tells of the hidden states, an int64.
        plan: of the call; its logits stand for those that ``fill`` reads, by dtype and device.
        target: [...] of the N rows.
        weight: the full vector.
        group: of the vocabulary.
        announced: the targets that the header speaks of, where they are not ``target``.
    """
    request, logits, normalizer = plan.request, plan.logits, plan.normalizer
    several = group if group is not None and group.size() > 1 else None
    on_host = _on_host(logits, request)
    ids = target if target.dim() == 1 else target.reshape(-1)
    ids = ids.long()  # every comparison with an id happens in int64
    engine = select_to_read(request.engine, logits)
    steps = row_steps(
        engine, ids, weight, request, normalizer, on_host, group, announced, plan.scale,
        plan.selected,
    )  # fmt: skip

    dtype, wanted, selected = arithmetic_dtype(logits.dtype), request.wanted, plan.selected
    k, rows = len(wanted.rows), ids.shape[0]
    k += 0 if selected is None else selected.shape[1]
    if several is None:
        parts = torch.empty(k, rows, dtype=dtype, device=logits.device)
        fill(engine, parts, steps.local_target)
        gathered = Gathered.of_one_rank(parts)
    else:
        payload = Payload.allocate(k, rows, dtype, logits.device)
        parts = payload.parts
        hidden = fill(engine, parts, steps.local_target)
        steps.write_header(payload, _shard_total(weight, request, dtype), hidden)
        if request.checking:
            check_group_serves(logits.device.type, several)
            preflight(plan, several)
        gathered = exchange(payload, wanted, request.collective, several)
    x_selected = None
    if selected is not None:
        x_selected, gathered = selecting.split(gathered, wanted)
    stats, m, s, argmax, row_weight = steps.conclude(
        gathered, parts, _total_weight(weight, request, dtype)
    )
    if selected is not None and x_selected is not None:
        ignored = steps.local_target == IGNORED
        if not on_host:
            # A NaN in s makes the whole gradient of the row NaN, as a target that is no class does.
            bad = ~selecting.is_allowed(selected, ignored, request.vocab_size).all(1)
            s, stats = s.masked_fill(bad, torch.nan), stats.masked_fill_(bad, torch.nan)
            argmax = None if argmax is None else argmax.masked_fill_(bad, -1)
        stats = torch.cat([stats, selecting.log_prob(x_selected, m, s, ignored)])
    agreed = normalizer
    if normalizer is not None:  # cloned: neither autograd nor an operator may hand out its input
        headers = gathered.headers
        agreed = normalizer if headers is None else read_normalizers(headers[:1], dtype)[0]
        agreed = agreed.clone()
    return RowResult(
        stats, m, s, steps.local_target, argmax, agreed, plan.scale, selected, row_weight
    )


def fill_partials(
    engine: Engine,
    parts: Tensor,
    logits: Tensor,
    local_target: Tensor,
    weight: Tensor | None,
    request: RowRequest,
    log_prob_out: Tensor | None = None,
    scale: Tensor | None = None,
    selected: Tensor | None = None,
) -> None:
    """The partials of logits [..., C_r] into ``parts`` [k, N], and x at ``selected`` [N, K] into
    K rows more; ``scale`` [N], or the request's."""
    size = request.size
    if size == 0 or parts.shape[1] == 0:
        parts.zero_()
        parts[0].fill_(-torch.inf)
        return
    shard_weight = _shard_weight(weight, request, parts.dtype)
    columns, x_selected = None, parts
    if selected is not None and selected.shape[1] > 0:
        columns = selecting.local_columns(selected, local_target, request)
        parts, x_selected = parts.split([parts.shape[0] - columns.shape[1], columns.shape[1]])
    for rows, block in _numbered(row_blocks(_columns(logits, size))):
        factor = request.scale if scale is None else _of(scale, rows)
        engine.partials(
            block,
            _of(local_target, rows),
            shard_weight,
            factor,
            request.softcap,
            request.wanted,
            _of(parts, rows),
            None if log_prob_out is None else _flat(log_prob_out, size, rows),
        )
        if columns is not None:
            some = columns if rows is None else columns[rows]
            selecting.gather(block, some, factor, request.softcap, _of(x_selected, rows))


def compute_gradient(
    logits: Tensor,
    result: RowResult,
    weight: Tensor | None,
    grads: Sequence[Tensor | None],
    request: RowRequest,
    out: Tensor,
) -> None:
    """The backward pass: write d(logits) into ``out`` [..., C_r], which may be ``logits``.

    ``grads`` are those of the statistics, ``apart``; not of all of them None.
    """
    size = request.size
    if size < out.shape[-1]:
        out[..., size:].zero_()
    if size == 0 or result.m.numel() == 0:
        return
    if weight is not None:
        require_memory(weight, "weight")
    whole = gradient_coefficients(result, weight, grads, request)
    scale = result.scale
    columns = of_selected = None
    if result.selected is not None and result.selected.shape[1] > 0 and grads[-1] is not None:
        columns = selecting.local_columns(result.selected, result.local_target, request)
        of_selected = _scaled(grads[-1], result, request)
    engine = select_to_read(request.engine, logits)
    shard_weight = _shard_weight(weight, request, result.m.dtype)
    for rows, source in _numbered(row_blocks(_columns(logits, size))):
        m, s, column = result.m, result.s, result.local_target
        factor, coefficients = request.scale if scale is None else scale, whole
        if rows is not None:
            m, s, column = m[rows], s[rows], column[rows]
            factor = request.scale if scale is None else scale[rows]
            coefficients = whole.of(rows)
        touched = None
        if columns is not None and of_selected is not None:  # before the logits are overwritten
            touched = selecting.touched(
                source, columns if rows is None else columns[rows], _of(of_selected, rows).t(), m,
                s, column, coefficients, factor, request.softcap,
            )  # fmt: skip
        place = source if out is logits else _flat(out, size, rows)
        engine.gradient(
            source, m, s, column, coefficients, shard_weight, factor, request.softcap, place,
            request.finite_logits,
        )  # fmt: skip
        if touched is not None:
            touched.put(place)


def gradient_coefficients(
    result: RowResult,
    weight: Tensor | None,
    grads: Sequence[Tensor | None],
    request: RowRequest,
) -> Coefficients:
    """What ``grads``, those of the statistics, make of the parts of a row's gradient."""
    nll, lse = grads[:2]
    named = dict(zip(stat_names(request.wanted)[2:], grads[2:], strict=False))
    softmax = _sum(nll, lse)
    if result.selected is not None and result.selected.shape[1] > 0 and grads[-1] is not None:
        softmax = _sum(softmax, -grads[-1].sum(0))
    smooth = entropy = None
    g = named.get("smooth")
    if g is not None:
        softmax = _sum(softmax, g * _total_weight(weight, request, g.dtype))
        smooth = _scaled(g, result, request)
    g = named.get("entropy")
    if g is not None:
        h = result.stats[stat_names(request.wanted).index("entropy")]
        # Nothing where nothing depends on it: such a row may have no entropy (0 * NaN).
        softmax = _sum(softmax, -torch.where(g == 0, 0.0, g * h))
        entropy = _scaled(g, result, request)
    if softmax is None:
        softmax = torch.zeros_like(result.m)
    softmax = _scaled(softmax, result, request)
    if nll is None:
        return Coefficients(softmax, torch.zeros_like(softmax), smooth, entropy)
    return Coefficients(softmax, _scaled(nll, result, request), smooth, entropy)


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return a if b is None else b
    return a + b


def _scaled(g: Tensor, result: RowResult, request: RowRequest) -> Tensor:
    """[..., N] times the scale of each row."""
    if result.scale is not None:
        return g * result.scale
    return g if request.scale == 1 else g * request.scale


def _flat(fresh: Tensor, size: int, rows: slice | None) -> Tensor:
    """[n, size] of [..., C_r]: a fresh tensor is dense and splits along any cut of the logits."""
    if fresh.dim() != 2:
        fresh = fresh.view(-1, fresh.shape[-1])
    return _columns(fresh if rows is None else fresh[rows], size)


def empty_log_prob(logits: Tensor, size: int) -> Tensor:
    """Room for log-probabilities; padding columns hold -inf: they have no probability."""
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    if size < out.shape[-1]:
        out[..., size:] = -torch.inf
    return out


def compute_log_prob(
    logits: Tensor, m: Tensor, s: Tensor, request: RowRequest, scale: Tensor | None = None
) -> Tensor:
    """This shard's slice of the global log-softmax, shaped like the logits and in their dtype."""
    size = request.size
    out = empty_log_prob(logits, size)
    if size == 0 or m.numel() == 0:
        return out
    engine = select_to_read(request.engine, logits)
    for rows, block in _numbered(row_blocks(_columns(logits, size))):
        factor = request.scale if scale is None else _of(scale, rows)
        place = _flat(out, size, rows)
        engine.log_prob(block, _of(m, rows), _of(s, rows), factor, request.softcap, place)
    return out
