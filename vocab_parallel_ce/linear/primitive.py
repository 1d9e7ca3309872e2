"""The fused head as autograd sees it.

``linear_row_statistics`` is ``primitive.row_statistics`` from hidden states: any loss is ordinary
autograd on its [N] vectors. Its backward computes the logits again.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..passes import RowResult
from ..primitive import refusing_second_derivative
from .backward import Leaves, Needs, linear_gradient
from .call import LinearCall, Statics, flat, plain_head
from .forward import linear_statistics


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
        statics: Statics,
        group: dist.ProcessGroup | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        call = _call(hidden, head_weight, head_bias, target, weight, normalizer, statics, group)
        result = linear_statistics(call)
        ctx.save_for_backward(
            hidden, head_weight, head_bias, target, weight, result.stats, result.m, result.s,
            result.local_target,
        )  # fmt: skip
        ctx.mark_non_differentiable(result.argmax, result.normalizer)
        ctx.set_materialize_grads(False)
        ctx.statics, ctx.group = statics, group
        return result.stats, result.argmax, result.normalizer

    @staticmethod
    def backward(ctx: Any, grad_stats: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad_stats is None:  # nothing upstream depends on the statistics
            return (None,) * 8
        with torch.no_grad():
            hidden, head_weight, head_bias, target, weight, stats, m, s, local = ctx.saved_tensors
            call = _call(
                hidden, head_weight, head_bias, target, weight, None, ctx.statics, ctx.group
            )
            out = linear_gradient(
                call,
                Leaves(head_weight, head_bias),
                RowResult(stats, m, s, local, m, m),
                grad_stats,
                Needs(*ctx.needs_input_grad[:3]),
            )
            grad = None if out.hidden is None else out.hidden.view(hidden.shape)
        grads: tuple[Tensor | None, ...] = (grad, out.weight, out.bias)
        if torch.is_grad_enabled():  # create_graph=True
            grads = tuple(None if g is None else refusing_second_derivative(g) for g in grads)
        return (*grads, *(None,) * 5)


def _call(
    hidden: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    normalizer: Tensor | None,
    statics: Statics,
    group: dist.ProcessGroup | None,
) -> LinearCall:
    head = plain_head(head_weight, head_bias, statics.request)
    return LinearCall(flat(hidden), head, target.reshape(-1), weight, statics, group, normalizer)


def linear_row_statistics(
    hidden: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    normalizer: Tensor | None,
    statics: Statics,
    group: dist.ProcessGroup | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiable stats [j, N]; then argmax and the normalizer of all ranks.

    hidden [..., H], head_weight [V_r, H], head_bias [V_r] or None, target [...].
    """
    out: tuple[Tensor, Tensor, Tensor] = _LinearRowStatistics.apply(  # type: ignore[no-untyped-call]
        hidden, head_weight, head_bias, target, weight, normalizer, statics, group
    )
    return out
