"""The fused head as autograd sees it.

``linear_row_statistics`` is ``primitive.row_statistics`` from hidden states: any loss is ordinary
autograd on its [N] vectors. Its backward computes the logits again.

``linear_loss`` is a reduced loss whose gradients were computed in forward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..dtensor import Layout
from ..kinds import Kind, has_memory, kind_of, settled, traced
from ..passes import RowResult
from ..primitive import refusing_second_derivative
from ..statistics import apart
from .backward import Gradients, Leaves, Needs, linear_gradient
from .call import Statics, linear_call
from .forward import linear_statistics
from .in_forward import loss_with_gradients
from .sums import scale_


class _LinearRowStatistics(torch.autograd.Function):
    """The primitive in eager mode."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head_weight: Tensor,
        head_bias: Tensor | None,
        target: Tensor,
        weight: Tensor | None,
        normalizer: Tensor | None,
        scale: Tensor | None,
        selected: Tensor | None,
        statics: Statics,
        group: dist.ProcessGroup | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        call = linear_call(
            hidden, head_weight, head_bias, target, weight, normalizer, scale, selected, statics,
            group,
        )  # fmt: skip
        result = linear_statistics(call)
        ctx.save_for_backward(
            hidden, head_weight, head_bias, target, weight, result.stats, result.m, result.s,
            result.local_target, scale, selected,
        )  # fmt: skip
        further = (result.argmax, result.normalizer)
        ctx.mark_non_differentiable(*(value for value in further if value is not None))
        ctx.set_materialize_grads(False)
        ctx.statics, ctx.group = statics, group
        return result.stats, *further

    @staticmethod
    def backward(ctx: Any, grad_stats: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad_stats is None:  # nothing upstream depends on the statistics
            return (None,) * 10
        grad_stats = _one_gradient(grad_stats)
        with torch.no_grad():
            hidden, head_weight, head_bias, target, weight, *rows, scale, selected = (
                ctx.saved_tensors
            )
            stats, m, s, local = rows
            call = linear_call(
                hidden, head_weight, head_bias, target, weight, None, scale, selected, ctx.statics,
                ctx.group,
            )  # fmt: skip
            out = linear_gradient(
                call,
                Leaves(head_weight, head_bias),
                RowResult(stats, m, s, local, scale=scale, selected=selected),
                grad_stats,
                Needs(*ctx.needs_input_grad[:3]),
            )
            grad = None if out.hidden is None else out.hidden.view(hidden.shape)
        origins: tuple[Tensor, ...] = ()
        if torch.is_grad_enabled():
            origins = grad_stats, _origin(hidden, head_weight, head_bias)
        return (*_handed_out((grad, out.weight, out.bias), *origins), *(None,) * 7)


class _LinearLoss(torch.autograd.Function):
    """Gradients in forward. They are kept beside the tape: they are this function's own memory."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head_weight: Tensor,
        head_bias: Tensor | None,
        target: Tensor,
        weight: Tensor | None,
        normalizer: Tensor | None,
        scale: Tensor | None,
        statics: Statics,
        group: dist.ProcessGroup | None,
        layout: Layout,
        origin: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """``origin``: 0-d, of the tape of the first three, which are not kept for it."""
        call = linear_call(
            hidden, head_weight, head_bias, target, weight, normalizer, scale, None, statics, group,
        )  # fmt: skip
        needs = Needs(*ctx.needs_input_grad[:3])
        out = loss_with_gradients(call, Leaves(head_weight, head_bias), needs, layout)
        ctx.gradients, ctx.factor = out.gradients, out.factor
        ctx.save_for_backward(origin)
        ctx.shape, ctx.dtype = hidden.shape, hidden.dtype
        ctx.mark_non_differentiable(out.zloss)
        ctx.set_materialize_grads(False)
        return out.loss, out.zloss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return (None,) * 11
        if ctx.gradients is None:
            raise RuntimeError(
                "a second backward through a loss whose gradients were computed in forward "
                "(gradient='forward'): the first one gave them away; use gradient='recompute' to "
                "go backward more than once"
            )
        grad_loss = _one_gradient(grad_loss)
        out: Gradients = ctx.gradients
        ctx.gradients = None
        with torch.no_grad():
            factor = grad_loss if ctx.factor is None else grad_loss * ctx.factor
            for grad in (out.hidden, out.weight, out.bias):
                if grad is not None:
                    scale_(grad, factor)
            grads = [None if g is None else g.to(ctx.dtype) for g in out.all()]
            hidden = None if grads[0] is None else grads[0].view(ctx.shape)
        origins = (grad_loss, *ctx.saved_tensors)
        return (*_handed_out((hidden, *grads[1:]), *origins), *(None,) * 8)


def _origin(hidden: Tensor, head_weight: Tensor, head_bias: Tensor | None) -> Tensor:
    """0, on the tape of all: a gradient that leads there can refuse a second derivative."""
    zero = hidden[..., :0].sum() + head_weight[:0].sum()
    return zero if head_bias is None else zero + head_bias[:0].sum()


def _one_gradient(grad: Tensor) -> Tensor:
    """A gradient that comes in, with memory of its own."""
    if has_memory(grad) or torch.compiler.is_compiling():
        return grad
    if kind_of(grad) is Kind.TRANSFORMED:
        raise ValueError(
            "is_grads_batched asks for many gradients at once, which the fused head does not make; "
            "go backward once for each, or use cross_entropy on F.linear's logits"
        )
    return settled(grad)


def _handed_out(grads: Sequence[Tensor | None], *origins: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients; with create_graph=True they lead to ``origins``, and refuse to go there."""
    if not torch.is_grad_enabled():
        return tuple(grads)
    return tuple(None if g is None else refusing_second_derivative(g, *origins) for g in grads)


def linear_row_statistics(
    hidden: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    normalizer: Tensor | None,
    scale: Tensor | None,
    selected: Tensor | None,
    statics: Statics,
    group: dist.ProcessGroup | None,
) -> tuple[tuple[Tensor, ...], Tensor | None, Tensor | None]:
    """Differentiable statistics as ``primitive.row_statistics`` returns them; then argmax and the
    normalizer of all ranks, which mean nothing where they were not asked for.

    hidden [..., H], head_weight [V_r, H], head_bias [V_r] or None, target [...], scale [N] where
    each row has its own, selected [N, K].
    """
    if traced(hidden):
        from . import compiled

        call: Callable[..., Any] = compiled.linear_row_statistics
    else:
        call = _LinearRowStatistics.apply
    stats, argmax, agreed = call(
        hidden, head_weight, head_bias, target, weight, normalizer, scale, selected, statics, group
    )
    return apart(stats, statics.request.wanted, selected), argmax, agreed


def linear_loss(
    hidden: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    normalizer: Tensor | None,
    scale: Tensor | None,
    statics: Statics,
    group: dist.ProcessGroup | None,
    layout: Layout,
) -> tuple[Tensor, Tensor]:
    """(loss, its z part), 0-d; only the loss is differentiable, once.

    ``layout`` knows the ranks that hold other rows of the same batch.
    """
    if traced(hidden):
        from . import compiled

        return compiled.linear_loss(
            hidden, head_weight, head_bias, target, weight, normalizer, scale, None, statics, group
        )
    out: tuple[Tensor, Tensor] = _LinearLoss.apply(  # type: ignore[no-untyped-call]
        hidden, head_weight, head_bias, target, weight, normalizer, scale, statics, group, layout,
        _origin(hidden, head_weight, head_bias),
    )  # fmt: skip
    return out
