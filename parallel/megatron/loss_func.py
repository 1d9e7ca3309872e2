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
from vocab_parallel_ce.preflight import tell
from vocab_parallel_ce.switches import check_is_on, check_word

from .installation import current, installed_loss

Report = dict[str, Any]


def loss_func(
    loss_mask: Tensor,
    output_tensor: Tensor,
    model: object = None,
    *,
    over_context_parallel: bool = False,
) -> tuple[Tensor, Tensor, Report]:
    """``pretrain_gpt.loss_func`` of Megatron, with the z-loss reported beside the loss.

    Megatron's schedule decides which mean a step takes. There are three:

    1. ``calculate_per_token_loss`` on: sums and numbers of tokens are added up over micro-batches
       and ranks, and then divided. This is the mean over all tokens of the step.
    2. Off: each rank divides each micro-batch by its own number of tokens, and the means are
       averaged. Context-parallel ranks hold parts of the same sequences, so with unequal masks the
       result depends on the number of these ranks.
    3. Off, with ``over_context_parallel``: each micro-batch is divided by the number of tokens on
       all its context-parallel ranks. The result does not depend on the number of these ranks.

    Before megatron-core 0.13 the second way is the same as the third.

    Args:
        loss_mask: [b, s] or flat; what each token counts, in the denominator as well. A token that
            counts 0 leaves no trace, even if its loss is NaN.
        output_tensor: [b, s] the loss of each token, as the model returned it; z-loss included.
        model: what Megatron passes; its configuration says how the schedule will divide.
        over_context_parallel: the third way above, for one more all_reduce of one number for each
            micro-batch.

    Returns:
        (sum of loss * loss_mask, number of tokens as an int tensor, report). The report is
        {"lm loss": [sum, number]}, and {"z loss": [sum, number]} beside it where z-loss is on: the
        part of "lm loss" that is z. Both as the training loop of the installed version adds them
        up: one tensor [2], or before megatron-core 0.13 a tuple, summed over data-parallel ranks.

        Megatron wants the number as an int. Where the mask does not add up to an int, the number is
        rounded up and the sum is enlarged in proportion, so that their quotient is the mean. The
        report has the exact values.

    Raises:
        ValueError: where the mask does not add up to an int, and either
            ``calculate_per_token_loss`` is on (Megatron's sums over ranks would be wrong), or
            ``model`` is missing, so that this is not known. Found on CPU and with ``check``. On an
            accelerator without ``check`` the loss is NaN in the first case, and "off" is assumed in
            the second. With ``check`` all data-parallel and context-parallel ranks raise together,
            which costs one more collective of 1 KB for each micro-batch.

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
    return _reduce(loss_mask, output_tensor, zloss, model, over_context_parallel)


def logits_loss_func(
    loss_mask: Tensor,
    labels: Tensor,
    output_tensor: Tensor,
    model: object = None,
    *,
    over_context_parallel: bool = False,
) -> tuple[Tensor, Tensor, Report]:
    """``loss_func`` for a model that was called without labels and returned logits.

    To be bound: ``functools.partial(logits_loss_func, loss_mask, labels)``. Tokens that
    ``loss_mask`` leaves out get gradient exactly 0, whatever their label and their logits. The
    options are those of ``install``, where that was called, else its defaults.

    Args:
        loss_mask: [b, s]; what each token counts, in the denominator as well.
        labels: [b, s] int64 vocabulary ids.
        output_tensor: [b, s, v/tp] this rank's logits.
        model, over_context_parallel: as for ``loss_func``, which has the three means of a step.

    Communicates one or two collectives over Megatron's tensor-parallel group. Returns and raises
    what ``loss_func`` and the loss do.
    """
    installation = current()
    ignore_index = -100 if installation is None else installation.options.ignore_index
    counts = loss_mask.reshape(labels.shape) != 0
    loss, zloss = installed_loss(output_tensor, torch.where(counts, labels.long(), ignore_index))
    zlosses = None if zloss is None else zloss.detach()
    return _reduce(loss_mask, loss, zlosses, model, over_context_parallel)


def _reduce(
    loss_mask: Tensor,
    losses: Tensor,
    zlosses: Tensor | None,
    model: object,
    over_context_parallel: bool,
) -> tuple[Tensor, Tensor, Report]:
    """Sums over the tokens that count, as the schedule will divide them."""
    losses = losses.reshape(-1).to(arithmetic_dtype(losses.dtype))
    mask = loss_mask.reshape(-1).to(losses.dtype)

    def summed(values: Tensor) -> Tensor:
        return (values.reshape(-1).masked_fill(mask == 0, 0.0) * mask).sum()

    total, count = summed(losses), mask.sum()
    parts = {"lm loss": total.detach()}
    if zlosses is not None:
        parts["z loss"] = summed(zlosses)
    per_token = _per_token(model)
    state = _parallel_state()
    if state is None or not _sums_over_ranks():
        report = {name: torch.stack([part, count]) for name, part in parts.items()}
        over = over_context_parallel and not per_token and state is not None
        group = state.get_context_parallel_group() if over else None
        world = 1 if group is None else dist.get_world_size(group)
        if world > 1:
            # The schedule averages over these ranks: each divides by its share of all tokens.
            count = count.clone()
            dist.all_reduce(count, group=group)
            count = count / world
        return *_divisible(total, count, per_token, world == 1), report

    sums = torch.stack([*parts.values(), count])
    if state.get_context_parallel_world_size() > 1:
        dist.all_reduce(sums, group=state.get_context_parallel_group())
    # The sum over the ranks in value; the gradient stays that of this rank's tokens.
    total = total.clone()
    total.detach().copy_(sums[0])
    total, tokens = _divisible(total, sums[-1].clone(), per_token, refuse=True)
    dist.all_reduce(sums, group=state.get_data_parallel_group())
    return total, tokens, {name: (sums[i], sums[-1]) for i, name in enumerate(parts)}


def _divisible(
    total: Tensor, count: Tensor, per_token: bool | None, refuse: bool
) -> tuple[Tensor, Tensor]:
    """(total, count) with an int count and the same quotient; ``count`` itself where it is one.

    ``refuse``: it came from the mask of the user, so that another one could be an int.
    """
    tokens = count.ceil()
    if refuse and per_token is not False:
        checking = _checking()
        if count.device.type == "cpu" or checking:
            wrong = bool(tokens != count)
            _raise(ValueError(_no_int(count.item(), per_token)) if wrong else None, checking)
        elif per_token:
            total = total.masked_fill(tokens != count, torch.nan)
    return total * torch.where(count > 0, tokens / count, 1.0), tokens.to(torch.int)


def _raise(problem: Exception | None, checking: bool) -> None:
    """With ``check`` on every rank whose gradients are summed: the others would wait for them."""
    state = _parallel_state() if checking else None
    if state is not None:
        problem = tell(problem, state.get_data_parallel_group(with_context_parallel=True))
    if problem is not None:
        raise problem


def _no_int(count: float, per_token: bool | None) -> str:
    what = f"loss_mask adds up to {count:.6g} on this rank, which is no int"
    if per_token:
        return (
            f"{what}: with calculate_per_token_loss Megatron adds up numbers of tokens as ints; "
            "turn it off, or use a mask of ints"
        )
    return (
        f"{what}; pass model= to the loss function, so that it sees whether "
        "calculate_per_token_loss is on"
    )


def _per_token(model: Any) -> bool | None:
    """Whether the schedule divides after it has added up; None where nobody says."""
    while model is not None:
        config = getattr(model, "config", None)
        answer: bool | None = getattr(config, "calculate_per_token_loss", None)
        if answer is not None:
            return answer
        model = getattr(model, "module", None)
    return None


def _checking() -> bool:
    installation = current()
    return check_is_on(check_word(None if installation is None else installation.options.check))


def _parallel_state() -> Any:
    """Megatron's, where it has made groups."""
    state: Any = sys.modules.get("megatron.core.parallel_state")
    return state if state is not None and state.model_parallel_is_initialized() else None


def _sums_over_ranks() -> bool:
    """Whether the installed Megatron's schedules expect sums over ranks."""
    from megatron.core import package_info

    before: bool = (package_info.MAJOR, package_info.MINOR) < (0, 13)
    return before
