"""Statistics and gradients straight from hidden states, by the fused operators."""

from __future__ import annotations

import torch
from torch import Tensor

from ...contract import IGNORED, Coefficients, Wanted, without_unused
from . import corrections, operators


def partials(
    hidden: Tensor,
    head_weight: Tensor,
    local_target: Tensor,
    class_weight: Tensor | None,
    scale: float,
    wanted: Wanted,
    out: Tensor,
) -> None:
    """See ``contract.LinearFunctions``."""
    size = head_weight.shape[0]
    elsewhere = local_target < 0
    target = local_target.masked_fill(elsewhere, size).int()
    m, s, difference = operators.online_max_sum(_scaled(hidden, scale), head_weight, target)[:3]
    named = dict(zip(wanted.rows, out.unbind(0), strict=True))
    named["m"].copy_(m)
    named["s"].copy_(s)
    named["x_y"].copy_((difference + m).masked_fill_(elsewhere, 0.0))
    if wanted.smooth:
        direction = corrections.weighted_sum(head_weight, class_weight)
        total = float(size) if class_weight is None else class_weight.sum()
        named["u"].copy_(corrections.products(hidden, direction) * scale - m * total)
    ignored = local_target == IGNORED  # which may hold NaN
    for statistic in named.values():
        statistic.masked_fill_(ignored, 0.0)


def gradients(
    hidden: Tensor,
    head_weight: Tensor,
    m: Tensor,
    s: Tensor,
    local_target: Tensor,
    coefficients: Coefficients,
    class_weight: Tensor | None,
    scale: float,
    one_coefficient: bool,
) -> tuple[Tensor, Tensor]:
    """See ``contract.LinearFunctions``."""
    dead = without_unused(local_target, coefficients) == IGNORED
    softmax, target, smooth = (
        None if part is None else part.masked_fill(dead, 0.0) for part in coefficients[:3]
    )
    assert softmax is not None
    assert target is not None
    # Whatever such a row holds, its logits are 0 here and their gradient is 0 p.
    hidden = torch.where(dead[:, None], 0.0, hidden)
    elsewhere = local_target < 0
    column = local_target.clamp(min=0)
    # With hidden * scale for the hidden states, the coefficient of the logits before the scale:
    # the scale is a power of 2, and everything with it exact.
    of_hidden, of_weight = operators.backward(
        softmax if scale == 1 else softmax / scale,
        _scaled(hidden, scale),
        head_weight,
        operators.packed(elsewhere),
        column.int(),
        m.masked_fill(dead, 0.0),
        s.masked_fill(dead, 1.0),
    )
    if scale != 1:
        of_hidden = of_hidden * scale
    if one_coefficient and smooth is None:
        return of_hidden, of_weight
    at_target = None
    if not one_coefficient:
        at_target = (softmax - target).masked_fill_(elsewhere, 0.0)
    direction = None if smooth is None else corrections.weighted_sum(head_weight, class_weight)
    corrections.correct_hidden(of_hidden, head_weight, column, at_target, smooth, direction)
    return of_hidden, corrections.corrected_weight(
        of_weight, hidden, column, at_target, smooth, class_weight
    )


def _scaled(hidden: Tensor, scale: float) -> Tensor:
    return hidden if scale == 1 else hidden * scale
