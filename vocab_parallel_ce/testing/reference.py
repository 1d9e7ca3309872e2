"""The oracle: fp64, unsharded, one readable line a formula. Slow, and meant to stay so.

The formulas are PyTorch's (``torch.nn.functional.cross_entropy``) for weight, smoothing and mean,
plus the z-loss ``lse_square_scale * lse^2`` of PaLM (Chowdhery et al. 2022, section 5) over the
kept rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class ReferenceLoss(NamedTuple):
    """What the reference knows of a batch; the shapes are those of the target unless noted."""

    loss: Tensor
    """Reduced as asked, z-loss included: [...] for "none", [] otherwise."""
    zloss: Tensor
    """The z part of ``loss``, reduced alike."""
    log_prob: Tensor
    """[..., C] log-softmax of the scaled logits, ignored rows included."""
    lse: Tensor
    """[...] log-sum-exp of the scaled logits, ignored rows included."""
    entropy: Tensor
    """[...] entropy of the probabilities in nats; 0 on ignored rows."""
    argmax: Tensor
    """[...] int64, the first column that attains the maximum; -1 on ignored rows."""
    sum_p_squared: Tensor
    """[...] sum of the squared probabilities; 0 on ignored rows."""
    selected_log_prob: Tensor
    """[..., K] log-probabilities of the ids in ``selected``; 0 on ignored rows."""


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    *,
    lse_square_scale: float = 0.0,
    scale: float | Tensor = 1.0,
    softcap: float = 0.0,
    normalizer: float | Tensor | None = None,
    selected: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> ReferenceLoss:
    """Cross-entropy and row statistics of whole logits in fp64; differentiable.

    Nothing is communicated: the logits are those of all ranks together.

    Args:
        logits: [..., C], any floating dtype, any device that computes in ``dtype``.
        target: [...] class ids or ``ignore_index``, any integer dtype. Logits of ignored rows may
            hold NaN and infinities: they reach neither the loss nor a gradient.
        weight: [C] class weights, or None for ones.
        reduction: "none", "sum" or "mean", as in PyTorch.
        ignore_index: Rows with this target do not count.
        label_smoothing: The share of the loss that is spread over all classes, 0 to 1.
        lse_square_scale: Factor of the z-loss; 0 means none.
        scale: Multiplies the logits (1 / temperature): a number, or [...] one a row.
        softcap: Makes softcap * tanh(logits / softcap) of the logits first; 0 means none.
        normalizer: For "mean", the denominator of both parts in place of the sum of weights and
            the number of kept rows.
        selected: [..., K] class ids whose log-probabilities are returned, or None for K = 0. What
            an ignored row holds does not count.
        dtype: Of the arithmetic. fp64 makes it the oracle; fp32 shows what rounding does to the
            very same operations.

    Returns:
        ReferenceLoss: every field in ``dtype``, argmax in int64. With all rows ignored a mean is
        NaN with a zero gradient, as in PyTorch.

    Raises:
        RuntimeError: from torch, where shapes do not fit or a target is out of range.

    Example:
        >>> x = torch.zeros(1, 4, requires_grad=True)
        >>> out = cross_entropy(x, torch.tensor([2]))
        >>> out.loss.item()  # log 4
        1.3862943611198906
        >>> torch.autograd.grad(out.loss, x)[0]
        tensor([[ 0.2500,  0.2500, -0.7500,  0.2500]])
    """
    x = scaled(logits.to(dtype), scale, softcap)
    vocab_size = x.shape[-1]
    kept = target != ignore_index
    # Ignored rows may hold inf or NaN: replaced before any arithmetic, so that no gradient is NaN.
    wide = logits.to(dtype)
    clean = scaled(torch.where(kept[..., None], wide, torch.zeros_like(wide)), scale, softcap)
    log_prob = clean.log_softmax(-1)
    lse = clean.logsumexp(-1)
    column = torch.where(kept, target, torch.zeros_like(target)).long()
    w = torch.ones(vocab_size, dtype=dtype) if weight is None else weight.to(dtype)
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
            kept_weight = kept_rows = torch.as_tensor(normalizer, dtype=dtype, device=x.device)
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
        sum_p_squared=torch.where(kept, log_prob.exp().square().sum(-1), nothing).detach(),
        selected_log_prob=selected_log_prob(log_prob, kept, selected),
    )


def selected_log_prob(log_prob: Tensor, kept: Tensor, selected: Tensor | None) -> Tensor:
    """[..., C] -> [..., K] at the ``selected`` ids; 0 in rows that are not ``kept`` [...]."""
    if selected is None:
        return log_prob[..., :0]
    counts = kept[..., None].expand(selected.shape)
    found = log_prob.gather(-1, torch.where(counts, selected, 0).long())
    return torch.where(counts, found, torch.zeros_like(found))


def scaled(logits: Tensor, scale: float | Tensor = 1.0, softcap: float = 0.0) -> Tensor:
    """[..., C] scale * softcap * tanh(logits / softcap), without a cap where it is 0."""
    if softcap:
        logits = softcap * (logits / softcap).tanh()
    if isinstance(scale, Tensor) and scale.dim() > 0:
        scale = scale.to(logits.dtype)[..., None]
    return logits * scale
