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

from typing import Any

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
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        result = compute_statistics(
            logits, target, weight, request, group, log_prob_out, normalizer, scale, selected
        )
        stats = result.stats if request.entropy else None
        ctx.save_for_backward(
            logits, result.m, result.s, result.local_target, stats, weight, scale, selected
        )
        further = (result.m, result.s, result.argmax, result.normalizer)
        ctx.mark_non_differentiable(*(value for value in further if value is not None))
        ctx.set_materialize_grads(False)  # m, s and argmax never have one: no zeros for them
        ctx.request = request
        ctx.inplace_backward = inplace_backward
        ctx.overwritten = False
        return result.stats, *further

    @staticmethod
    def backward(ctx: Any, grad_stats: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad_stats is None:  # nothing upstream depends on the statistics
            return (None,) * 10
        refuse_second_backward(ctx)
        try:
            saved = ctx.saved_tensors
        except RuntimeError as problem:
            raise_explained(problem)
        recording = torch.is_grad_enabled()  # create_graph=True
        # Fresh memory, taken before the logits are overwritten: a view would be refused.
        origins = (grad_stats, saved[0][..., :0].sum()) if recording else ()
        if not recording:
            return (_RowStatistics._gradient(ctx, saved, grad_stats), *(None,) * 9)
        with torch.no_grad():
            grad = _RowStatistics._gradient(ctx, saved, grad_stats)
        return (refusing_second_derivative(grad, *origins), *(None,) * 9)

    @staticmethod
    def _gradient(ctx: Any, saved: tuple[Any, ...], grad_stats: Tensor) -> Tensor:
        logits, m, s, local_target, stats, weight, scale, selected = saved
        request: RowRequest = ctx.request
        result = RowResult(stats, m, s, local_target, scale=scale, selected=selected)
        if torch.compiler.is_compiling():
            from . import compiled

            ctx.overwritten = ctx.inplace_backward
            # The operator's schema has no optional statistics; it reads those of the entropy only.
            result.stats = m.new_empty(0) if stats is None else stats
            return compiled.gradient(
                logits, result, weight, grad_stats, request, ctx.inplace_backward
            )
        if not has_memory(grad_stats):
            grad_stats = settled(grad_stats)
            if kind_of(grad_stats) is Kind.TRANSFORMED:  # is_grads_batched: many gradients at once
                if ctx.inplace_backward:
                    raise ValueError(
                        "inplace_backward=True has room for one gradient, and is_grads_batched "
                        "asks for many; use inplace_backward=False"
                    )
                return transforms.gradient(
                    logits, local_target, weight, request, grad_stats, scale, selected
                )
        if not ctx.inplace_backward:
            grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
            compute_gradient(logits, result, weight, grad_stats, request, grad)
            return grad
        ctx.overwritten = True
        # Without the tape's view of it: the engine writes, this function tells autograd.
        memory: Tensor = logits.detach()
        compute_gradient(memory, result, weight, grad_stats, request, memory)
        mark(logits)
        return memory


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
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Differentiable stats [j + K, N]; then m [N], s [N], argmax and the normalizer of all ranks,
    which mean nothing where they were not asked for.

    Only the first carries a gradient: the statistics of ``statistics.stat_names``, and behind them
    the log-probabilities of ``selected`` [N, K] int64. ``normalizer`` is 0-d and ``scale`` [N]
    where each row has its own, in the arithmetic dtype. ``log_prob_out``: see ``log_prob_space``.
    """
    usual = not torch.compiler.is_compiling() and ordinary(logits)
    if not usual and traced(logits):
        from . import compiled

        return compiled.row_statistics(
            logits, target, weight, request, group, inplace_backward, normalizer, scale, selected
        )
    if transforms.active() and _transformed(logits, target, weight, normalizer, scale, selected):
        stats, m, s, argmax = transforms.row_statistics(
            logits, target, weight, request, scale, selected
        )
        return stats, m, s, argmax, normalizer
    try:
        out: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None] = _RowStatistics.apply(  # type: ignore[no-untyped-call]
            logits, target, weight, request, group, inplace_backward, log_prob_out, normalizer,
            scale, selected,
        )  # fmt: skip
    except RuntimeError as problem:
        raise_explained(problem)
    return out


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
        if transforms.active() and _transformed(logits, m, s):
            return transforms.log_prob(logits.detach(), m, s, request, scale)
        return compute_log_prob(logits.detach(), m, s, request, scale)
