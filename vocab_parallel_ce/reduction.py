"""From row statistics to a loss: [N] arithmetic only, PyTorch's formulas.

l_n = (1 - eps) w_y nll + (eps / C) smooth      z_n = z_scale * lse^2       0 on ignored rows
mean: sum l_n / sum of w_y over kept rows  +  sum z_n / number of kept rows
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .engines.contract import arithmetic_dtype
from .request import RowRequest, is_on
from .statistics import stat_names


@dataclass(frozen=True)
class RowLosses:
    """[N] each; ``loss`` is without z."""

    loss: Tensor
    zloss: Tensor | None
    row_weight: Tensor
    """w_y of kept rows, 0 of ignored ones"""
    kept: Tensor


def row_losses(
    stats: Tensor, target: Tensor, weight: Tensor | None, request: RowRequest
) -> RowLosses:
    """``stats`` [j, N] of the primitive and ``target`` [N] -> the losses of every row."""
    target = target.long()
    named = dict(zip(stat_names(request.wanted), stats.unbind(0), strict=True))
    kept = target != request.ignore_index
    loss = named["nll"]
    row_weight = kept.to(stats.dtype)
    if weight is not None:
        # Clamped, because an ignored or an invalid target must not index out of bounds.
        column = target.clamp(0, request.vocab_size - 1)
        row_weight = row_weight * weight.to(stats.dtype)[column]
        loss = loss * row_weight
    eps = request.label_smoothing
    if eps > 0:
        loss = (1 - eps) * loss + (eps / request.vocab_size) * named["smooth"]
    zloss = None
    if is_on(request.lse_square_scale):
        zloss = (request.lse_square_scale * _square(named["lse"])).masked_fill(~kept, 0.0)
    return RowLosses(loss, zloss, row_weight, kept)


def _square(lse: Tensor) -> Tensor:
    """lse^2; its gradient is 0 where the incoming one is, also where lse is NaN or infinite."""
    finite = lse.isfinite()
    other = torch.where(lse < 0, -lse, lse)  # the value of a square, and the gradient of a number
    return torch.where(finite, lse.masked_fill(~finite, 0.0).square(), other)


def _same(value: Tensor) -> Tensor:
    return value


def reduce_rows(
    rows: RowLosses,
    reduction: str,
    normalizer: Tensor | None = None,
    total: Callable[[Tensor], Tensor] = _same,
) -> tuple[Tensor, Tensor | None]:
    """(loss with z, the z part of it or None where that is 0): [N], or 0-d when reduced.

    ``normalizer`` is 0-d, see ``as_scalar``. ``total`` adds a 0-d sum up over ranks that hold other
    rows of the same batch.
    """
    loss, zloss = rows.loss, rows.zloss
    if reduction != "none":
        loss = total(loss.sum())
        zloss = None if zloss is None else total(zloss.sum())
    if reduction == "mean":
        if normalizer is None:
            loss = loss / total(rows.row_weight.sum())
            if zloss is not None:
                zloss = zloss / total(rows.kept.sum().to(zloss.dtype))
        else:
            # Nothing kept, nothing counted: 0 and a gradient of 0, where 0 / 0 would be NaN.
            empty = (normalizer == 0) & ~rows.kept.any()
            denominator = torch.where(empty, torch.ones_like(normalizer), normalizer)
            loss = loss / denominator
            zloss = None if zloss is None else zloss / denominator
    return (loss if zloss is None else loss + zloss), zloss


def as_scalar(normalizer: Tensor | float | None, logits: Tensor) -> Tensor | None:
    """The normalizer as a 0-d tensor beside the logits, in the dtype of their arithmetic.

    Carries no gradient, and does not wait for the device.
    """
    if normalizer is None:
        return None
    dtype = arithmetic_dtype(logits.dtype)
    if isinstance(normalizer, Tensor):
        return normalizer.detach().reshape(()).to(device=logits.device, dtype=dtype)
    if torch.compiler.is_compiling():  # a product stays open to other values, a fill does not
        return torch.ones((), dtype=dtype, device=logits.device) * normalizer
    return torch.full((), float(normalizer), dtype=dtype, device=logits.device)
