"""The textbook formulas in plain torch: how exact one can ask a result to be."""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import ReferenceLoss, scaled, selected_log_prob
from .reference import cross_entropy as reference


def naive(
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
    like_reference: bool = False,
    order: Tensor | None = None,
    parts: int = 1,
    sums_as_logs: bool = False,
) -> ReferenceLoss:
    """The loss and its statistics as one would write them, in the logits' dtype; differentiable.

    Args:
        logits: [..., V] fp32 (fp16 and bf16 logits are upcast by the caller), or fp64.
        target: [...] class ids or ``ignore_index``. The gradient of an ignored row may be NaN, if
            its logits are.
        weight: [V] class weights, or None.
        reduction: "none", "sum" or "mean".
        ignore_index: As in ``reference.cross_entropy``, and so are the next four.
        label_smoothing: See there.
        lse_square_scale: See there.
        scale: See there.
        softcap: See there.
        normalizer: See there.
        selected: See there.
        like_reference: By the very operations of the fp64 reference. An fp64 result can only be
            asked to be as good as those, and their error in fp32 tells how good they are.
        order: [V], the order in which columns are added up. Results are in the usual order.
        parts: The number of shards that are summed one by one.
        sums_as_logs: Of a shard the logarithm of its sum is kept, rounded, and never the sum: all
            that a fused operator may hand out.

    Returns:
        ReferenceLoss: in the dtype of the logits.

    Example:
        >>> float(naive(torch.zeros(1, 4), torch.tensor([2])).loss)
        1.3862943649291992
    """
    if order is None:
        order = torch.arange(logits.shape[-1], device=logits.device)
    place = order.argsort()
    kept = target != ignore_index
    column = place[torch.where(kept, target, 0).long()]
    ordered = logits[..., order]
    if selected is not None:
        selected = place[torch.where(kept[..., None], selected, 0).long()]
    if like_reference:
        out = reference(
            ordered,
            torch.where(kept, column, -1),  # a kept row's new column may be ignore_index
            None if weight is None else weight[order],
            reduction,
            -1,
            label_smoothing,
            lse_square_scale=lse_square_scale,
            scale=scale,
            softcap=softcap,
            normalizer=normalizer,
            selected=selected,
            dtype=logits.dtype,
        )
        argmax = torch.where(kept, scaled(logits, scale, softcap).argmax(-1), -1)
        return out._replace(log_prob=out.log_prob[..., place], argmax=argmax)
    x = scaled(ordered, scale, softcap)
    w = x.new_ones(x.shape[-1]) if weight is None else weight.to(x.dtype)[order]
    shifted = x - x.detach().amax(-1, keepdim=True)
    shards = [part.sum(-1, keepdim=True) for part in shifted.exp().tensor_split(parts, -1)]
    if sums_as_logs:
        shards = [part.log().exp() for part in shards]
    log_s = torch.stack(shards).sum(0).log()
    log_prob = shifted - log_s
    lse = x.logsumexp(-1)
    loss = -(1 - label_smoothing) * w[column] * log_prob.gather(-1, column[..., None]).squeeze(-1)
    if label_smoothing > 0:
        loss = loss - label_smoothing / x.shape[-1] * (w * log_prob).sum(-1)
    loss = torch.where(kept, loss, 0.0)
    zloss = torch.where(kept, lse_square_scale * lse.square(), 0.0)
    if reduction == "none":
        loss = loss + zloss
    elif reduction == "sum":
        loss, zloss = (loss + zloss).sum(), zloss.sum()
    else:
        rows, weights = kept.sum(), torch.where(kept, w[column], 0.0).sum()
        if normalizer is not None:
            rows = weights = torch.as_tensor(normalizer, dtype=x.dtype, device=x.device)
        zloss = zloss.sum() / rows
        loss = loss.sum() / weights
        loss = loss + zloss if lse_square_scale else loss
    p_z = log_prob.exp() * torch.where(log_prob == -torch.inf, 0.0, shifted)
    entropy = torch.where(kept, log_s.squeeze(-1) - p_z.sum(-1), 0.0)
    argmax = torch.where(kept, scaled(logits, scale, softcap).argmax(-1), -1)
    squares = torch.where(kept, log_prob.exp().square().sum(-1), 0.0).detach()
    found = selected_log_prob(log_prob, kept, selected)
    return ReferenceLoss(loss, zloss, log_prob[..., place], lse, entropy, argmax, squares, found)
