"""The oracle: fp64, unsharded, one readable line a formula. Slow, and meant to stay so.

Every function takes the whole logits [..., C] and returns fp64. The formulas are PyTorch's
(``torch.nn.functional.cross_entropy``) for weight, smoothing and mean, plus the z-loss
``lse_square_scale * lse^2`` of PaLM (Chowdhery et al. 2022, section 5) over the kept rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class ReferenceLoss(NamedTuple):
    """What the reference knows of a batch; the shapes are those of the target unless noted."""

    loss: Tensor
    """Reduced as asked, z-loss included."""
    zloss: Tensor
    """The z part of ``loss``, reduced alike."""
    log_prob: Tensor
    """[..., C] log-softmax of the scaled logits."""
    lse: Tensor
    entropy: Tensor
    argmax: Tensor


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    *,
    lse_square_scale: float = 0.0,
    scale: float = 1.0,
    normalizer: float | Tensor | None = None,
) -> ReferenceLoss:
    """Cross-entropy of logits [..., C] and target [...] in fp64; differentiable."""
    x = logits.double() * scale
    vocab_size = x.shape[-1]
    kept = target != ignore_index
    # Ignored rows may hold inf or NaN: replaced before any arithmetic, so that no gradient is NaN.
    clean = torch.where(kept[..., None], x, torch.zeros_like(x))
    log_prob = clean.log_softmax(-1)
    lse = clean.logsumexp(-1)
    column = torch.where(kept, target, torch.zeros_like(target)).long()
    w = torch.ones(vocab_size, dtype=torch.float64) if weight is None else weight.double()
    w = w.to(x.device)

    nll = -log_prob.gather(-1, column[..., None]).squeeze(-1)
    row = (1 - label_smoothing) * w[column] * nll
    if label_smoothing > 0:
        row = row + label_smoothing / vocab_size * -(w * log_prob).sum(-1)
    nothing = torch.zeros_like(row)
    row = torch.where(kept, row, nothing)
    z = torch.where(kept, lse_square_scale * lse.square(), nothing)

    if reduction == "none":
        loss, zloss = row + z, z
    elif reduction == "sum":
        loss, zloss = (row + z).sum(), z.sum()
    else:
        kept_weight = torch.where(kept, w[column], nothing).sum()
        kept_rows = kept.sum()
        if normalizer is not None:
            kept_weight = kept_rows = torch.as_tensor(normalizer, dtype=torch.float64)
        zloss = z.sum() / kept_rows
        loss = row.sum() / kept_weight + (zloss if lse_square_scale else 0.0)

    # A column without probability adds 0, and nothing to the gradient: never 0 * -inf.
    finite = torch.where(log_prob == -torch.inf, torch.zeros_like(x), log_prob)
    p_log_p = log_prob.exp() * finite
    return ReferenceLoss(
        loss=loss,
        zloss=zloss,
        log_prob=x.log_softmax(-1),
        lse=x.logsumexp(-1),
        entropy=torch.where(kept, -p_log_p.sum(-1), nothing),
        argmax=torch.where(kept, clean.argmax(-1), torch.full_like(column, -1)),
    )
