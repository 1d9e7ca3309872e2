"""From row statistics to a loss: [N] arithmetic only, PyTorch's formulas.

l_n = (1 - eps) w_y nll + (eps / C) smooth      z_n = z_scale * lse^2       0 on ignored rows
mean: sum l_n / sum of w_y over kept rows  +  sum z_n / number of kept rows
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .engines.contract import arithmetic_dtype
from .request import RowRequest, is_on
from .statistics import stat_names


class RowLosses(NamedTuple):
    """[N] each; ``loss`` is without z. One of the last two is there."""

    loss: Tensor
    zloss: Tensor | None
    row_weight: Tensor | None
    """what a row weighs in a mean: the class weight of its target, or 1; 0 where it is ignored.
    None where there are no class weights and ``kept`` says as much"""
    kept: Tensor | None
    """bool"""


def row_losses(
    stats: Sequence[Tensor],
    target: Tensor,
    weight: Tensor | None,
    request: RowRequest,
    row_weight: Tensor | None = None,
) -> RowLosses:
    """``stats`` of the primitive, j times [N], and ``target`` [...] -> the losses of every row.

    ``row_weight`` where the primitive knows it: ``target`` is then looked at for a z-loss or a
    normalizer alone.
    """
    loss, lse = stats[:2]
    kept, has_z = None, is_on(request.lse_square_scale)
    if row_weight is None:
        row_weight, kept = row_weights(target, weight, request, loss.dtype)
    elif has_z or request.normalized:
        kept = kept_rows(target, request)
        # As where the primitive does not know it: ``total`` must be called as often on every rank.
        row_weight = None if weight is None else row_weight
    if weight is not None and row_weight is not None:
        loss = loss * row_weight
    eps = request.label_smoothing
    if eps > 0:
        smooth = stats[stat_names(request.wanted).index("smooth")]
        loss = (1 - eps) * loss + (eps / request.vocab_size) * smooth
    zloss = None
    if has_z:
        assert kept is not None
        zloss = (request.lse_square_scale * _square(lse)).masked_fill(~kept, 0.0)
    return RowLosses(loss, zloss, row_weight, kept)


def row_coefficients(
    stats: Tensor,
    losses: RowLosses,
    request: RowRequest,
    of_loss: Tensor,
    of_zloss: Tensor,
) -> Tensor:
    """The derivative by ``stats`` [j, N] of of_loss sum l_n + of_zloss sum z_n.

    What autograd would say of ``row_losses``, for where no tape can be. Of ignored rows it means
    nothing: their gradient is written as zeros.
    """
    eps = request.label_smoothing
    out = torch.zeros_like(stats)
    named = dict(zip(stat_names(request.wanted), out.unbind(0), strict=True))
    named["nll"].copy_(of_loss * (1 - eps))
    if losses.row_weight is not None:
        named["nll"].mul_(losses.row_weight)
    if eps > 0:
        named["smooth"].copy_(of_loss * (eps / request.vocab_size))
    if losses.zloss is not None and losses.kept is not None:
        lse = stats[stat_names(request.wanted).index("lse")]
        slope = torch.where(lse.isfinite(), 2 * lse, torch.where(lse < 0, -1.0, 1.0))
        slope = slope * (of_zloss * request.lse_square_scale)
        named["lse"].copy_(slope.masked_fill(~losses.kept, 0.0))
    return out


def kept_rows(target: Tensor, request: RowRequest) -> Tensor:
    """[N] bool: ``target`` [...] is not ``ignore_index``."""
    return target.reshape(-1).long() != request.ignore_index


def row_weights(
    target: Tensor, weight: Tensor | None, request: RowRequest, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor]:
    """``row_weight`` and ``kept`` of ``RowLosses``, from the targets alone."""
    kept = kept_rows(target, request)
    if weight is None:
        return None, kept
    # Clamped, because an ignored or an invalid target must not index out of bounds.
    column = target.reshape(-1).long().clamp(0, request.vocab_size - 1)
    return kept.to(dtype) * weight.to(dtype)[column], kept


def _square(lse: Tensor) -> Tensor:
    """lse^2; its gradient is 0 where the incoming one is, also where lse is NaN or infinite."""
    finite = lse.isfinite()
    other = torch.where(lse < 0, -lse, lse)  # the value of a square, and the gradient of a number
    return torch.where(finite, lse.masked_fill(~finite, 0.0).square(), other)


def own_rows_only(value: Tensor) -> Tensor:
    """The ``total`` of a call whose ranks all hold the same rows: there is nothing to add."""
    return value


def reduce_rows(
    rows: RowLosses,
    reduction: str,
    normalizer: Tensor | None = None,
    total: Callable[[Tensor], Tensor] = own_rows_only,
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
        of_loss, of_zloss = denominators(
            rows.row_weight, rows.kept, loss.dtype, zloss is not None, normalizer, total
        )
        loss = loss / of_loss
        zloss = None if zloss is None else zloss / of_zloss
    if zloss is not None:
        return loss + zloss, zloss
    # Its caller may write into it, which torch forbids of a row of the statistics.
    return (loss.clone() if reduction == "none" else loss), None


def denominators(
    row_weight: Tensor | None,
    kept: Tensor | None,
    dtype: torch.dtype,
    has_zloss: bool,
    normalizer: Tensor | None = None,
    total: Callable[[Tensor], Tensor] = own_rows_only,
) -> tuple[Tensor, Tensor]:
    """What "mean" divides the sum of losses by, and that of z-losses: 0-d each, in ``dtype``."""
    if normalizer is not None:
        assert kept is not None
        # Nothing kept, nothing counted: 0 and a gradient of 0, where 0 / 0 would be NaN.
        empty = (normalizer == 0) & ~kept.any()
        both = torch.where(empty, torch.ones_like(normalizer), normalizer)
        return both, both
    of_loss = of_zloss = None
    if row_weight is not None:
        of_loss = of_zloss = total(row_weight.sum())
    if kept is not None and (of_loss is None or has_zloss):
        of_zloss = total(kept.sum(dtype=dtype))
    assert of_zloss is not None
    return of_zloss if of_loss is None else of_loss, of_zloss


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
