"""The one differentiable primitive: logits -> row statistics [j, N].

    forward    partials of this shard (one read of the logits), one exchange, [N] arithmetic
    backward   no communication; one formula for every output (one read, one write):

        dx_c = scale (p_c (g_nll + g_lse + W g_smooth - g_H (log p_c + H) - sum_k g_k)
                      - [c = y] g_nll - w_c g_smooth + sum_k [c = id_k] g_k)

where g_k belong to the log-probabilities of K further ids a row, which ``selected.py`` adds.

Every loss is ordinary autograd on the [N] vectors above it. ``passes.py`` does the work; here the
rules of autograd and of in-place backward are kept. Eager calls go through an
``autograd.Function``; ``compiled.py`` registers the same passes as custom operators.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from . import transforms
from .engines import select
from .kinds import Kind, has_memory, kind_of, ordinary, settled, traced
from .overwriting import mark, raise_explained, refuse_second_backward
from .passes import (
    RowResult,
    compute_gradient,
    compute_log_prob,
    compute_statistics,
    empty_log_prob,
)
from .request import RowRequest
from .statistics import apart


class _RefuseSecondDerivative(torch.autograd.Function):
    """Hands a gradient on; differentiating it raises.

    torch's ``once_differentiable`` raises only where the incoming gradient requires one. The
    gradient depends on the logits as well, and torch visits only what lies between it and what is
    asked for: so ``origins`` lead to both, or a second derivative would silently be 0.
    """

    @staticmethod
    def forward(ctx: Any, grad: Tensor, *origins: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Tensor:
        raise RuntimeError(
            "the loss cannot be differentiated twice: its gradient has no derivative here; for a "
            "gradient penalty use torch.nn.functional.cross_entropy on gathered logits"
        )


def refusing_second_derivative(grad: Tensor, *origins: Tensor) -> Tensor:
    """``grad`` for a caller that records a graph of it; it depends on ``origins``."""
    out: Tensor = _RefuseSecondDerivative.apply(grad.requires_grad_(), *origins)  # type: ignore[no-untyped-call]
    return out


_FURTHER = 5
"""outputs behind the statistics: m, s, argmax, the normalizer and what a row weighs"""


class _RowStatistics(torch.autograd.Function):
    """The primitive in eager mode."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        request: RowRequest,
        group: dist.ProcessGroup | None,
        inplace_backward: bool,
        log_prob_out: Tensor | None,
        normalizer: Tensor | None,
        scale: Tensor | None,
        selected: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        result = compute_statistics(
            logits, target, weight, request, group, log_prob_out, normalizer, scale, selected
        )
        stats = result.stats if request.entropy else None
        ctx.save_for_backward(
            logits, result.m, result.s, result.local_target, stats, weight, scale, selected
        )
        further = (result.m, result.s, result.argmax, result.normalizer, result.row_weight)
        ctx.mark_non_differentiable(*(value for value in further if value is not None))
        ctx.set_materialize_grads(False)  # m, s and argmax never have one: no zeros for them
        ctx.request = request
        ctx.inplace_backward = inplace_backward
        ctx.overwritten = False
        return *apart(result.stats, request.wanted, selected), *further

    @staticmethod
    def backward(ctx: Any, *all_grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grads = all_grads[:-_FURTHER]
        if all(grad is None for grad in grads):  # nothing upstream depends on the statistics
            return (None,) * 10
        refuse_second_backward(ctx)
        try:
            saved = ctx.saved_tensors
        except RuntimeError as problem:
            raise_explained(problem)
        if not torch.is_grad_enabled():  # create_graph=False
            return (_RowStatistics._gradient(ctx, saved, grads), *(None,) * 9)
        # Fresh memory, taken before the logits are overwritten: a view would be refused.
        origins = (*(g for g in grads if g is not None), saved[0][..., :0].sum())
        with torch.no_grad():
            grad = _RowStatistics._gradient(ctx, saved, grads)
        return (refusing_second_derivative(grad, *origins), *(None,) * 9)

    @staticmethod
    def _gradient(ctx: Any, saved: tuple[Any, ...], grads: Sequence[Tensor | None]) -> Tensor:
        logits, m, s, local_target, stats, weight, scale, selected = saved
        request: RowRequest = ctx.request
        result = RowResult(stats, m, s, local_target, scale=scale, selected=selected)
        if torch.compiler.is_compiling():
            from . import compiled

            ctx.overwritten = ctx.inplace_backward
            # The operator's schema has no optional statistics; it reads those of the entropy only.
            result.stats = m.new_empty(0) if stats is None else stats
            return compiled.gradient(
                logits, result, weight, _whole(grads, result), request, ctx.inplace_backward
            )
        if not all(grad is None or has_memory(grad) for grad in grads):
            grads = [None if grad is None else settled(grad) for grad in grads]
            if _transformed(*grads):  # is_grads_batched: many gradients at once
                if ctx.inplace_backward:
                    raise ValueError(
                        "inplace_backward=True has room for one gradient, and is_grads_batched "
                        "asks for many; use inplace_backward=False"
                    )
                return transforms.gradient(
                    logits, local_target, weight, request, _whole(grads, result), scale, selected
                )
        if not ctx.inplace_backward:
            grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
            compute_gradient(logits, result, weight, grads, request, grad)
            return grad
        ctx.overwritten = True
        # Without the tape's view of it: the engine writes, this function tells autograd.
        memory: Tensor = logits.detach()
        compute_gradient(memory, result, weight, grads, request, memory)
        mark(logits)
        return memory


def _whole(grads: Sequence[Tensor | None], result: RowResult) -> Tensor:
    """[j + K, N] of gradients that are ``apart``: zeros where there is none."""
    m, selected = result.m, result.selected
    shapes = [m.shape] * len(grads)
    if selected is not None:
        shapes[-1] = selected.t().shape
    full = (
        m.new_zeros(shape) if grad is None else grad
        for grad, shape in zip(grads, shapes, strict=True)
    )
    return torch.cat([grad if grad.dim() == 2 else grad[None] for grad in full])


class Statistics(NamedTuple):
    """What ``row_statistics`` returns. Only the first carry a gradient."""

    stats: tuple[Tensor, ...]
    """[N] for each of ``statistics.stat_names``, then the log-probabilities [K, N] of ids that were
    ``selected``"""
    m: Tensor
    s: Tensor
    """[N]"""
    argmax: Tensor | None
    normalizer: Tensor | None
    """of all ranks; like argmax, it means nothing where it was not asked for"""
    row_weight: Tensor | None = None
    """[N] what a row weighs in a mean, see ``reduction.RowLosses``; None where nobody asked yet"""


def row_statistics(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    request: RowRequest,
    group: dist.ProcessGroup | None,
    inplace_backward: bool,
    log_prob_out: Tensor | None = None,
    normalizer: Tensor | None = None,
    scale: Tensor | None = None,
    selected: Tensor | None = None,
) -> Statistics:
    """The statistics, and what else the forward pass knows of N rows.

    ``normalizer`` is 0-d and ``scale`` [N] where each row has its own, in the arithmetic dtype;
    ``selected`` is [N, K] int64. ``log_prob_out``: see ``log_prob_space``.
    """
    usual = not torch.compiler.is_compiling() and ordinary(logits)
    if not usual and traced(logits):
        from . import compiled

        stats, m, s, argmax, agreed = compiled.row_statistics(
            logits, target, weight, request, group, inplace_backward, normalizer, scale, selected
        )
        return Statistics(apart(stats, request.wanted, selected), m, s, argmax, agreed)
    if transforms.active():
        stats, m, s, argmax = transforms.row_statistics(
            logits, target, weight, request, scale, selected
        )
        return Statistics(apart(stats, request.wanted, selected), m, s, argmax, normalizer)
    try:
        out: tuple[Any, ...] = _RowStatistics.apply(  # type: ignore[no-untyped-call]
            logits, target, weight, request, group, inplace_backward, log_prob_out, normalizer,
            scale, selected,
        )  # fmt: skip
    except RuntimeError as problem:
        raise_explained(problem)
    return Statistics(out[:-_FURTHER], *out[-_FURTHER:])


def _transformed(*tensors: Tensor | None) -> bool:
    return any(x is not None and kind_of(x) is Kind.TRANSFORMED for x in tensors)


def log_prob_space(
    logits: Tensor, request: RowRequest, group: dist.ProcessGroup | None
) -> Tensor | None:
    """A tensor that ``row_statistics`` can fill with the log-probabilities, at no further pass.

    That takes one rank, and an engine whose kernel writes them anyway; else None, and ``log_prob``
    computes them.
    """
    several = group is not None and dist.get_world_size(group) > 1
    if several or logits.numel() == 0 or traced(logits) or transforms.active():
        return None
    if not select(request.engine, logits).LEAVES_LOG_PROB:
        return None
    return empty_log_prob(logits.detach(), request.size)


def log_prob(
    logits: Tensor, m: Tensor, s: Tensor, request: RowRequest, scale: Tensor | None = None
) -> Tensor:
    """``compute_log_prob`` as the eager or the compiled caller needs it; carries no gradient."""
    if traced(logits):
        from . import compiled

        return compiled.log_prob(logits, m, s, request, scale)
    with torch.no_grad():
        if transforms.active():
            return transforms.log_prob(logits.detach(), m, s, request, scale)
        return compute_log_prob(logits.detach(), m, s, request, scale)
