"""What a ``forward_step`` of Megatron returns beside the model's output: the loss functions.

    loss_func          for a model that was called with labels and returns the loss of each token
    logits_loss_func   for a model that was called without and returns its shard of the logits

Both hand Megatron's schedules what its own ``loss_func`` hands them, so that micro-batches,
pipeline stages and context-parallel ranks are divided as Megatron divides them. That changed once:

    megatron-core 0.13 and later   the sums of this rank; schedules and training loop add them up
    before (0.12.1)                sums over the context-parallel ranks, by which the schedule
                                   divides again, and a report that is already summed over the
                                   data-parallel ranks: two all_reduces of two numbers a micro-batch
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vocab_parallel_ce.engines.contract import arithmetic_dtype

from .installation import current, installed_loss

Report = dict[str, Any]


def loss_func(
    loss_mask: Tensor, output_tensor: Tensor, model: object = None
) -> tuple[Tensor, Tensor, Report]:
    """``pretrain_gpt.loss_func`` of Megatron, with the z-loss reported beside the loss.

    Args:
        loss_mask: [b, s] or flat; what each token counts, in the denominator as well.
        output_tensor: [b, s] the loss of each token, as the model returned it; z-loss included.
        model: not used; Megatron passes it.

    Returns:
        (sum of loss * loss_mask, number of tokens as an int tensor, report). The report is
        {"lm loss": [sum, number]}, and {"z loss": [sum, number]} beside it where z-loss is on: the
        part of "lm loss" that is z. Both as the training loop of the installed version adds them
        up: one tensor [2], or before megatron-core 0.13 a tuple, summed over data-parallel ranks.

    The z part is that of the last call of the loss: call this right after the model, as Megatron's
    schedules do. Raises ValueError where that call was for another number of tokens.
    """
    installation = current()
    zloss = None if installation is None else installation.zloss
    if zloss is not None:
        if zloss.numel() != output_tensor.numel():
            raise ValueError(
                f"output_tensor has shape {tuple(output_tensor.shape)}, but the last call of the "
                f"loss had {tuple(zloss.shape)}, so its z-loss belongs to another batch; call "
                "loss_func right after the model"
            )
        if zloss.dim() == 2:  # [s, b] of the loss, [b, s] of the model
            zloss = zloss.t()
    return _reduce(loss_mask, output_tensor, zloss)


def logits_loss_func(
    loss_mask: Tensor, labels: Tensor, output_tensor: Tensor, model: object = None
) -> tuple[Tensor, Tensor, Report]:
    """``loss_func`` for a model that was called without labels and returned logits.

    To be bound: ``functools.partial(logits_loss_func, loss_mask, labels)``. Tokens that
    ``loss_mask`` leaves out get gradient exactly 0, whatever their label and their logits. The
    options are those of ``install``, where that was called, else its defaults.

    Args:
        loss_mask: [b, s]; what each token counts, in the denominator as well.
        labels: [b, s] int64 vocabulary ids.
        output_tensor: [b, s, v/tp] this rank's logits.
        model: not used; Megatron passes it.

    Communicates one or two collectives over Megatron's tensor-parallel group. Returns and raises
    what ``loss_func`` and the loss do.
    """
    installation = current()
    ignore_index = -100 if installation is None else installation.options.ignore_index
    counts = loss_mask.reshape(labels.shape) != 0
    loss, zloss = installed_loss(output_tensor, torch.where(counts, labels.long(), ignore_index))
    return _reduce(loss_mask, loss, None if zloss is None else zloss.detach())


def _reduce(
    loss_mask: Tensor, losses: Tensor, zlosses: Tensor | None
) -> tuple[Tensor, Tensor, Report]:
    """Sums over the tokens. A NaN under a mask of 0 stays one: it would come back in backward."""
    losses = losses.reshape(-1).to(arithmetic_dtype(losses.dtype))
    mask = loss_mask.reshape(-1).to(losses.dtype)
    total, count = torch.sum(losses * mask), mask.sum()
    parts = {"lm loss": total.detach()}
    if zlosses is not None:
        parts["z loss"] = torch.sum(zlosses.reshape(-1) * mask)
    state = _grouped_before_0_13()
    if state is None:
        tokens = count.to(torch.int)
        report = {
            name: torch.cat([part.clone().view(1), tokens.view(1)]) for name, part in parts.items()
        }
        return total, tokens, report

    sums = torch.stack([*parts.values(), count])
    if state.get_context_parallel_world_size() > 1:
        dist.all_reduce(sums, group=state.get_context_parallel_group())
    tokens = sums[-1].to(torch.int)
    # The sum over the ranks in value; the gradient stays that of this rank's tokens.
    total = total.clone()
    total.detach().copy_(sums[0])
    dist.all_reduce(sums, group=state.get_data_parallel_group())
    return total, tokens, {name: (sums[i], sums[-1]) for i, name in enumerate(parts)}


def _grouped_before_0_13() -> Any:
    """The parallel_state of a Megatron whose schedules expect sums over ranks, else None."""
    state: Any = sys.modules.get("megatron.core.parallel_state")
    if state is None or not state.model_parallel_is_initialized():
        return None
    from megatron.core import package_info

    return state if (package_info.MAJOR, package_info.MINOR) < (0, 13) else None
