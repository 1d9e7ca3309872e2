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

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from .collectives import Payload, check_group_serves, exchange
from .engines import select_to_read
from .engines.contract import Coefficients, Engine, Gathered, arithmetic_dtype
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
    """[j, N] the differentiable statistics, rows named by ``stat_names``"""
    m: Tensor
    s: Tensor
    """[N] the softmax of every row is e^(x - m) / s; kept apart, see the backward"""
    local_target: Tensor
    """[N] int64 column, ELSEWHERE or IGNORED"""
    argmax: Tensor
    """[N] int64, or empty when not asked for"""
    normalizer: Tensor
    """0-d: rank 0's, for all ranks; empty when the call has none"""
    scale: Tensor | None = None
    """[N] where each row has its own; counts in place of the request's"""


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
    return None if weight is None else weight[request.start : request.stop].to(dtype)


def _shard_total(weight: Tensor | None, request: RowRequest, dtype: torch.dtype) -> Tensor | float:
    part = _shard_weight(weight, request, dtype)
    return float(request.size) if part is None else part.sum()


def _total_weight(weight: Tensor | None, request: RowRequest, dtype: torch.dtype) -> Tensor | float:
    return float(request.vocab_size) if weight is None else weight.to(dtype).sum()


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
) -> RowResult:
    """The forward pass: logits [..., C_r], target [...] and the full weight [vocab_size].

    ``normalizer`` is 0-d and ``scale`` [N], in the arithmetic dtype; ``log_prob_out``: see
    ``primitive.log_prob_space``.
    """

    def fill(engine: Engine, parts: Tensor, local_target: Tensor) -> None:
        fill_partials(engine, parts, logits, local_target, weight, request, log_prob_out, scale)

    plan = Plan(request, logits, target, normalizer, scale=scale)
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
        fill: writes the partials [k, N] of rows whose ``local_target`` [N] it is given. What it
            returns, if anything, is what the header tells of the hidden states, an int64.
        plan: of the call; its logits stand for those that ``fill`` reads, by dtype and device.
        target: [...] of the N rows.
        weight: the full vector.
        group: of the vocabulary.
        announced: the targets that the header speaks of, where they are not ``target``.
    """
    request, logits, normalizer = plan.request, plan.logits, plan.normalizer
    several = group if group is not None and dist.get_world_size(group) > 1 else None
    on_host = _on_host(logits, request)
    ids = target.reshape(-1).long()  # every comparison with an id happens in int64
    engine = select_to_read(request.engine, logits)
    steps = row_steps(
        engine, ids, weight, request, normalizer, on_host, group, announced, plan.scale
    )

    dtype, wanted = arithmetic_dtype(logits.dtype), request.wanted
    k, rows = len(wanted.rows), ids.shape[0]
    if several is None:
        parts = torch.empty(k, rows, dtype=dtype, device=logits.device)
        fill(engine, parts, steps.local_target)
        gathered = Gathered.of_one_rank(parts)
    else:
        payload = Payload.allocate(k, rows, dtype, logits.device)
        parts = payload.parts
        hidden = fill(engine, parts, steps.local_target)
        payload.shard_weight[0] = _shard_total(weight, request, dtype)
        steps.write_header(payload, hidden)
        if request.checking:
            check_group_serves(logits.device.type, several)
            preflight(plan, several)
        gathered = exchange(payload, wanted, request.collective, several)
    stats, m, s, argmax = steps.conclude(gathered, parts, _total_weight(weight, request, dtype))
    if argmax is None:
        argmax = steps.local_target.new_empty(0)
    if normalizer is None:
        agreed = stats.new_empty(0)
    elif gathered.headers is None:
        agreed = normalizer.clone()  # neither autograd nor an operator may hand out its input
    else:
        agreed = read_normalizers(gathered.headers[:1], dtype)[0].clone()
    return RowResult(stats, m, s, steps.local_target, argmax, agreed, plan.scale)


def fill_partials(
    engine: Engine,
    parts: Tensor,
    logits: Tensor,
    local_target: Tensor,
    weight: Tensor | None,
    request: RowRequest,
    log_prob_out: Tensor | None = None,
    scale: Tensor | None = None,
) -> None:
    """The partials [k, N] of logits [..., C_r] into ``parts``; ``scale`` [N], or the request's."""
    size = request.size
    if size == 0 or parts.shape[1] == 0:
        parts.zero_()
        parts[0].fill_(-torch.inf)
        return
    shard_weight = _shard_weight(weight, request, parts.dtype)
    for rows, block in _numbered(row_blocks(_columns(logits, size))):
        engine.partials(
            block,
            _of(local_target, rows),
            shard_weight,
            request.scale if scale is None else _of(scale, rows),
            request.softcap,
            request.wanted,
            _of(parts, rows),
            None if log_prob_out is None else _flat(log_prob_out, size, rows),
        )


def compute_gradient(
    logits: Tensor,
    result: RowResult,
    weight: Tensor | None,
    grad_stats: Tensor,
    request: RowRequest,
    out: Tensor,
) -> None:
    """The backward pass: write d(logits) into ``out`` [..., C_r], which may be ``logits``."""
    size = request.size
    if size < out.shape[-1]:
        out[..., size:].zero_()
    if size == 0 or result.m.numel() == 0:
        return
    if weight is not None:
        require_memory(weight, "weight")
    softmax, target_part, smooth, entropy = gradient_coefficients(
        result, weight, grad_stats, request
    )
    scale = result.scale
    engine = select_to_read(request.engine, logits)
    shard_weight = _shard_weight(weight, request, softmax.dtype)
    for rows, source in _numbered(row_blocks(_columns(logits, size))):
        engine.gradient(
            source,
            _of(result.m, rows),
            _of(result.s, rows),
            _of(result.local_target, rows),
            Coefficients(
                _of(softmax, rows),
                _of(target_part, rows),
                None if smooth is None else _of(smooth, rows),
                None if entropy is None else _of(entropy, rows),
            ),
            shard_weight,
            request.scale if scale is None else _of(scale, rows),
            request.softcap,
            source if out is logits else _flat(out, size, rows),
            request.finite_logits,
        )


def gradient_coefficients(
    result: RowResult, weight: Tensor | None, grad_stats: Tensor, request: RowRequest
) -> Coefficients:
    """What the gradient [j, N] of the statistics makes of the parts of a row's gradient."""
    scale = result.scale

    def scaled(g: Tensor) -> Tensor:
        if scale is not None:
            return g * scale
        return g if request.scale == 1 else g * request.scale

    g = dict(zip(stat_names(request.wanted), grad_stats.unbind(0), strict=True))
    softmax = g["nll"] + g["lse"]
    smooth = entropy = None
    if request.smooth:
        softmax = softmax + g["smooth"] * _total_weight(weight, request, softmax.dtype)
        smooth = scaled(g["smooth"])
    if request.entropy:
        h = result.stats[stat_names(request.wanted).index("entropy")]
        # Nothing where nothing depends on it: such a row may have no entropy (0 * NaN).
        softmax = softmax - torch.where(g["entropy"] == 0, 0.0, g["entropy"] * h)
        entropy = scaled(g["entropy"])
    return Coefficients(scaled(softmax), scaled(g["nll"]), smooth, entropy)


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
