"""What the public functions return beside a plain loss, named."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from .arguments import Outputs
from .dtensor import Layout
from .selected import by_row


class CrossEntropyLossOutput(NamedTuple):
    """What ``cross_entropy_loss`` returns, in the order of ``npu_cross_entropy_loss``."""

    loss: Tensor
    """[N] or [1] in the dtype of ``input``. The z-loss is part of it. Differentiable."""
    log_prob: Tensor
    """[N, C_r] in the dtype of ``input``: the log-probability of EVERY class of this rank's shard,
    the slice of the global log-softmax. Empty with ``return_log_prob=False``. Not differentiable.
    (``TokenStatistics.log_prob`` is another quantity: one number a token, that of its target.)"""
    zloss: Tensor
    """Shaped like ``loss``: the z part of it. Differentiable. Empty unless ``return_zloss``."""
    lse_for_zloss: Tensor
    """[N] log-sum-exp of every row in the dtype of ``input`` where the z-loss scale is not 0, else
    empty. Not differentiable."""


class TokenStatistics(NamedTuple):
    """What ``token_statistics`` returns: one number a token, in the shape of ``target``.

    Floats are fp32 (fp64 for fp64 logits). A quantity that was not asked for is None.
    """

    log_prob: Tensor
    """log p of the TARGET of each token; 0 where the target is ``ignore_index``. Differentiable.
    None where no target was given. The type leaves that out, so that callers who give one need no
    check.
    (``CrossEntropyLossOutput.log_prob`` is another quantity: [N, C_r], one number a class.)"""
    lse: Tensor
    """log sum_c e^x_c of each row; 0 where ignored. Differentiable."""
    entropy: Tensor | None
    """-sum_c p_c log p_c in nats; 0 where ignored. Differentiable."""
    argmax: Tensor | None
    """int64 vocabulary id of the largest logit, the smallest id of a tie. -1 where the target is
    ``ignore_index``, and in rows that hold NaN or +inf. Not differentiable: it is an integer."""
    sum_p_squared: Tensor | None = None
    """sum_c p_c^2 of each row; 0 where ignored. Not differentiable."""
    selected_log_prob: Tensor | None = None
    """[..., K] log p of each of the ids in ``selected``; 0 where ignored. Differentiable."""


def named_statistics(
    stats: Sequence[Tensor],
    best: Tensor | None,
    shape: torch.Size,
    layout: Layout,
    outputs: Outputs,
    log_prob: bool,
    selected: bool,
) -> TokenStatistics:
    """The statistics of ``primitive.row_statistics`` by name, in the ``shape`` of the targets."""

    def row(place: int) -> Tensor:
        # A copy: its caller may write into it, which torch forbids of a row of the statistics.
        return layout.rows(stats[place].clone().reshape(shape))

    of_target = layout.rows(0.0 - stats[0].reshape(shape)) if log_prob else None
    named = 2 + outputs.entropy + outputs.squares
    return TokenStatistics(
        log_prob=cast(Tensor, of_target),
        lse=row(1),
        entropy=row(2) if outputs.entropy else None,
        argmax=layout.rows(best.reshape(shape)) if outputs.argmax and best is not None else None,
        sum_p_squared=row(2 + outputs.entropy).detach() if outputs.squares else None,
        selected_log_prob=layout.selected(by_row(stats[named], shape)) if selected else None,
    )
