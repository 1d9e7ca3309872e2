"""The public functions of the fused head: hidden states and the head's weight in, a loss out.

Each docstring is complete by itself, as in ``api.py``.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .api import cross_entropy, token_statistics
from .arguments import Options, Outputs
from .dtensor import Layout
from .linear.call import Statics
from .linear.checks import (
    LinearOptions,
    LinearTensors,
    admit_linear,
    in_forward,
    prepare_linear,
    seen_through_transforms,
)
from .linear.dtensor import unwrap_linear
from .linear.primitive import linear_loss, linear_row_statistics
from .reduction import as_scalar, reduce_rows, row_losses
from .results import TokenStatistics, named_statistics
from .scales import of_rows
from .selected import flat_ids
from .shard import VocabShard
from .together import linear_raises_together


@linear_raises_together
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    lse_square_scale: float = 0.0,
    return_zloss: bool = False,
    group: dist.ProcessGroup | None = None,
    shard: VocabShard | None = None,
    normalizer: Tensor | float | None = None,
    scale: Tensor | float = 1.0,
    softcap: float | None = None,
    engine: str = "auto",
    collective: str = "auto",
    check: bool | None = None,
    gradient: str = "auto",
    hidden_gradient: str = "summed",
    sequence_parallel: bool = False,
    scratch_mib: float | None = None,
    drop_ignored: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``cross_entropy(F.linear(input, linear_weight, linear_bias), target)`` without whole logits.

    Every rank of ``group`` calls it with the same hidden states, target and options, and with its
    own rows of the head. Every rank gets the same loss, and the gradient of ``input`` is summed
    over the group. Only one chunk of logits exists at a time. Peak memory is that chunk and the
    gradients of ``input`` and ``linear_weight``.

    Args:
        input: hidden states [..., H]; fp16, bf16, fp32 or fp64, the same on every rank. Or a
            DTensor. Then ``linear_weight`` must be a DTensor on the same mesh, with its dimension 0
            sharded over one mesh dimension, from which group and shard follow. If dimension 0 of
            ``input`` is sharded over that mesh dimension too, the call is ``sequence_parallel``.
        linear_weight: [V_r, H] this rank's rows of the head, in the dtype of ``input``. Inside
            torch.autocast both are converted, as F.linear does. Rows beyond the shard are padding.
        target: [...] int64 or int32 vocabulary ids, the same on every rank.
        linear_bias: [V_r] this rank's part of the head's bias, or None.
        weight: [vocab_size] floating point class weights, the full vector on every rank.
        reduction: "none", "sum" or "mean" (over the weights of the kept rows, as in PyTorch).
        ignore_index: rows with this target have loss 0 and gradient 0, whatever their hidden states
            hold. On a CPU they are left out of the matrix products; for accelerators see
            ``drop_ignored``.
        label_smoothing: in [0, 1], PyTorch's formula over the whole vocabulary.
        lse_square_scale: adds this times lse^2 to every kept row (the z-loss of PaLM, Chowdhery et
            al. 2022, section 5). "mean" divides it by the number of kept rows.
        return_zloss: return a pair (loss, zloss). ``zloss`` is the z-loss part of ``loss``, which
            still contains it.
        group: the tensor-parallel ``ProcessGroup`` over which the vocabulary is split. None means
            one rank, not the default group: where the process is one of several ranks, a call with
            neither ``group`` nor ``shard`` warns once.
        shard: which ids ``linear_weight`` holds, a ``VocabShard``. None means equal shards in rank
            order.
        normalizer: a number or 0-d tensor that replaces the denominators of "mean". No gradient
            flows into it.
        scale: multiplies the logits inside the kernels: 1 / temperature. A number, a 0-d tensor, or
            a tensor in the shape of ``target`` with one number for each row; the same on every
            rank. It must be finite: other values raise a ValueError, or in a tensor on an
            accelerator make their row NaN. No gradient flows into it.
        softcap: the logits become ``softcap * tanh(logits / softcap)`` before ``scale``. None and 0
            leave them as they are.
        engine: "auto" takes the fastest engine of the tensors' device; or "cpu", "npu", "triton",
            "eager".
        collective: "all_gather" (one collective; the loss is bitwise the same on every rank),
            "all_reduce" (two collectives), or "auto", which gathers up to about 6 MB.
        check: True adds a small exchange before the call, so that all ranks raise together: where
            one has a wrong argument, or where they disagree on the number of rows, the dtype or an
            option. An error in backward is not told to the other ranks. None follows the variable
            VOCAB_PARALLEL_CE_CHECK. It must be the same on every rank.
        gradient: when gradients are computed. "forward": together with the loss, which takes three
            matrix products; only for "sum" and "mean", and for a single backward. "recompute": in
            backward, from logits that are computed again, which takes four; for every call. "auto"
            takes "forward" for "sum" and "mean", and "recompute" in fp16, for a z-loss that is
            returned, and on Ascend where CANN's fused operators serve. Where gradients are off,
            none are computed. Inside ``checkpoint(use_reentrant=False)`` pass "recompute".
        hidden_gradient: "summed": the gradient of ``input`` is summed over the group, as the layers
            below need it. "partial": it is this rank's share, and the caller sums it.
        sequence_parallel: dimension 0 of ``input`` is the sequence, and each rank holds its equal
            part of it, [S / tp, ..., H]; ``target`` [S, ...] is whole on every rank, and so is what
            is returned. Rows are gathered, and their gradient scattered, a chunk at a time.
        scratch_mib: memory for the chunk of logits, in MiB, where the vocabulary is split evenly.
            None: 128 on a CPU and 256 on accelerators; for fp32 and fp64 hidden states at most half
            of the logits; in any case at least 128 rows.
        drop_ignored: leave ignored rows out of the matrix products on an accelerator too, as on a
            CPU. The call then waits for the device to count them, so wrong values raise there as on
            a CPU. With ``sequence_parallel`` rows are never left out, and this is refused.

    Returns:
        The loss in fp32 (fp64 for fp64 hidden states), [...] for "none", else 0-d; the same on
        every rank. With ``return_zloss`` a pair of such tensors, (loss, zloss).

    Raises:
        TypeError, ValueError: for a wrong argument; the message names the argument, its value, the
            rank and the way out.
        ValueError: on every rank, on CPU and with ``check``: what ``cross_entropy`` raises there,
            and hidden states that differ between ranks. On accelerators without ``check`` the
            result is NaN instead, and hidden states are not compared.
        RuntimeError: an ``engine`` that is not available here; a second backward where gradients
            were computed in forward.

    Communication:
        One all_gather of 3 floats a row (4 with label smoothing) and a small header, or two
        all_reduces: with "recompute" once for all rows, with "forward" once for each chunk. The
        gradient of ``input`` is summed by one all_reduce, or one for each chunk, while the matrix
        products run. With ``sequence_parallel`` each chunk of ``input`` is gathered as well. With
        ``check`` each gather of statistics has a small exchange before it, and gradients in forward
        have one more at the end. With one rank, nothing at all.

    Example:
        ```python
        loss = linear_cross_entropy(hidden, head.weight, target, group=tp_group)
        loss.backward()
        ```
    """
    options = Options(
        reduction, ignore_index, label_smoothing, lse_square_scale, group, shard,
        False, normalizer, scale, softcap, engine, collective, check,
    )  # fmt: skip
    linear = LinearOptions(gradient, hidden_gradient, sequence_parallel, scratch_mib, drop_ignored)
    tensors = LinearTensors(input, linear_weight, linear_bias, target, weight, normalizer)
    tensors, options, linear, layout = unwrap_linear(tensors, options, linear)
    tensors, options = admit_linear(tensors, options)
    tensors = _converted(tensors)
    statics = prepare_linear(tensors, options, linear, Outputs())
    if seen_through_transforms(tensors, options):
        return cross_entropy(
            _whole_logits(tensors, ignore_index), target, weight, reduction, ignore_index,
            label_smoothing, lse_square_scale=lse_square_scale, return_zloss=return_zloss,
            shard=shard, normalizer=normalizer, scale=scale, softcap=softcap, engine=engine,
        )  # fmt: skip
    scales = of_rows(options.scale, tensors.input, tensors.target)
    shared = layout.shares_rows
    if in_forward(tensors, options, linear, return_zloss, shared, statics.straight):
        loss, zloss = linear_loss(
            tensors.input, tensors.linear_weight, tensors.linear_bias, tensors.target,
            tensors.weight, as_scalar(tensors.normalizer, tensors.input), scales, statics,
            options.group, layout,
        )  # fmt: skip
        loss, zloss = layout.scalar(loss), layout.scalar(zloss)
    else:
        loss, zloss = _recomputed_loss(tensors, scales, statics, options, layout)
    return (loss, zloss) if return_zloss else loss


def _recomputed_loss(
    tensors: LinearTensors,
    scales: Tensor | None,
    statics: Statics,
    options: Options,
    layout: Layout,
) -> tuple[Tensor, Tensor]:
    """(loss, zloss) whose gradients are computed in backward, reduced as the call asks."""
    stats, _, agreed = linear_row_statistics(
        tensors.input, tensors.linear_weight, tensors.linear_bias, tensors.target, tensors.weight,
        as_scalar(tensors.normalizer, tensors.input), scales, None, statics, options.group,
    )  # fmt: skip
    layout.agree()
    rows = row_losses(stats, tensors.target, tensors.weight, statics.request)
    given = agreed if statics.request.normalized else None
    loss, of_z = reduce_rows(rows, options.reduction, given, layout.total)
    zloss = torch.zeros_like(loss) if of_z is None else of_z
    if options.reduction != "none":
        return layout.scalar(loss), layout.scalar(zloss)
    shape = tensors.target.shape
    return layout.rows(loss.reshape(shape)), layout.rows(zloss.reshape(shape))


@linear_raises_together
def linear_token_statistics(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor | None = None,
    *,
    linear_bias: Tensor | None = None,
    entropy: bool = False,
    argmax: bool = False,
    sum_p_squared: bool = False,
    selected: Tensor | None = None,
    ignore_index: int = -100,
    group: dist.ProcessGroup | None = None,
    shard: VocabShard | None = None,
    scale: Tensor | float = 1.0,
    softcap: float | None = None,
    engine: str = "auto",
    collective: str = "auto",
    check: bool | None = None,
    hidden_gradient: str = "summed",
    sequence_parallel: bool = False,
    scratch_mib: float | None = None,
    drop_ignored: bool = False,
) -> TokenStatistics:
    """``token_statistics`` of ``F.linear(input, linear_weight, linear_bias)`` without whole logits.

    Every result but ``argmax`` and ``sum_p_squared`` can be differentiated. Backward computes the
    logits again: forward and backward take four matrix products, where separate ones take three.

    Args:
        input: hidden states [..., H]; fp16, bf16, fp32 or fp64, the same on every rank. Or a
            DTensor. Then ``linear_weight`` must be a DTensor on the same mesh, with its dimension 0
            sharded over one mesh dimension, from which group and shard follow. If dimension 0 of
            ``input`` is sharded over that mesh dimension too, the call is ``sequence_parallel``.
        linear_weight: [V_r, H] this rank's rows of the head, in the dtype of ``input``. Inside
            torch.autocast both are converted, as F.linear does. Rows beyond the shard are padding.
        target: [...] int64 or int32 vocabulary ids, the same on every rank. None: ``log_prob`` is
            None, and no row is ignored.
        linear_bias: [V_r] this rank's part of the head's bias, or None.
        entropy: return the entropy of each row.
        argmax: return the id of the largest logit of each row.
        sum_p_squared: return the sum of the squared probabilities of each row.
        selected: [..., K] int64 or int32 vocabulary ids, K for each row, the same on every rank:
            return the log-probability of each, as ``token_statistics`` does.
        ignore_index: rows with this target hold 0 (argmax -1) and have gradient 0.
        group: the tensor-parallel ``ProcessGroup`` over which the vocabulary is split. None means
            one rank, not the default group: where the process is one of several ranks, a call with
            neither ``group`` nor ``shard`` warns once.
        shard: which ids ``linear_weight`` holds, a ``VocabShard``. None means equal shards in rank
            order.
        scale: multiplies the logits inside the kernels: 1 / temperature. A number, a 0-d tensor, or
            a tensor in the shape of ``target`` with one number for each row; the same on every
            rank. It must be finite: other values raise a ValueError, or in a tensor on an
            accelerator make their row NaN. No gradient flows into it.
        softcap: the logits become ``softcap * tanh(logits / softcap)`` before ``scale``. None and 0
            leave them as they are.
        engine: "auto" takes the fastest engine of the tensors' device; or "cpu", "npu", "triton",
            "eager".
        collective: "all_gather" (one collective; the loss is bitwise the same on every rank),
            "all_reduce" (two collectives), or "auto", which gathers up to about 6 MB.
        check: True adds a small exchange before the call, so that all ranks raise together: where
            one has a wrong argument, or where they disagree on the number of rows, the dtype or an
            option. An error in backward is not told to the other ranks. None follows the variable
            VOCAB_PARALLEL_CE_CHECK. It must be the same on every rank.
        hidden_gradient: "summed": the gradient of ``input`` is summed over the group, as the layers
            below need it. "partial": it is this rank's share, and the caller sums it.
        sequence_parallel: dimension 0 of ``input`` is the sequence, and each rank holds its equal
            part of it, [S / tp, ..., H]; ``target`` [S, ...] is whole on every rank, and so is what
            is returned. Rows are gathered, and their gradient scattered, a chunk at a time.
        scratch_mib: memory for the chunk of logits, in MiB, where the vocabulary is split evenly.
            None: 128 on a CPU and 256 on accelerators; for fp32 and fp64 hidden states at most half
            of the logits; in any case at least 128 rows.
        drop_ignored: leave ignored rows out of the matrix products on an accelerator too, as on a
            CPU. The call then waits for the device to count them, so wrong values raise there as on
            a CPU. With ``sequence_parallel`` rows are never left out, and this is refused.

    Returns:
        A ``TokenStatistics(log_prob, lse, entropy, argmax, sum_p_squared, selected_log_prob)``, the
        same on every rank. Each has the shape of ``target``; ``selected_log_prob`` is [..., K].
        ``log_prob`` is the log-probability of each row's target. What was not asked for is None.

    Raises:
        TypeError, ValueError: for a wrong argument; the message names the argument, its value, the
            rank and the way out.
        ValueError: on every rank, on CPU and with ``check``: what ``token_statistics`` raises
            there, and hidden states that differ between ranks. On accelerators without ``check``
            the result is NaN instead, and hidden states are not compared.
        RuntimeError: an ``engine`` that is not available here.

    Communication:
        In forward one all_gather of 3 floats a row (one more each for entropy, argmax and
        sum_p_squared, K for selected) and a small header, or two all_reduces (argmax always
        gathers). In backward the gradient of ``input`` is summed by one all_reduce, or by one for
        each chunk where the rows are too many for one. With ``sequence_parallel`` each chunk of
        ``input`` is gathered in both directions, and its gradient scattered. With one rank, nothing
        at all.

    Example:
        ```python
        new = linear_token_statistics(hidden, head.weight, tokens, entropy=True, group=tp_group)
        ratio = (new.log_prob - old_log_prob).exp()
        ```
    """
    options = Options(
        "none", -100 if target is None else ignore_index, 0.0, 0.0, group, shard, False, None,
        scale, softcap, engine, collective, check, selected=selected,
    )  # fmt: skip
    linear = LinearOptions("auto", hidden_gradient, sequence_parallel, scratch_mib, drop_ignored)
    ids = _no_target(input, sequence_parallel, group) if target is None else target
    tensors = LinearTensors(input, linear_weight, linear_bias, ids, None, None)
    tensors, options, linear, layout = unwrap_linear(tensors, options, linear)
    tensors, options = admit_linear(tensors, options)
    tensors = _converted(tensors)
    outputs = Outputs(entropy=entropy, argmax=argmax, squares=sum_p_squared)
    statics = prepare_linear(tensors, options, linear, outputs)
    if seen_through_transforms(tensors, options):
        return token_statistics(
            _whole_logits(tensors, options.ignore_index), target, entropy=entropy, argmax=argmax,
            sum_p_squared=sum_p_squared, selected=selected, ignore_index=ignore_index, shard=shard,
            scale=scale, softcap=softcap, engine=engine,
        )  # fmt: skip
    stats, best, _ = linear_row_statistics(
        tensors.input, tensors.linear_weight, tensors.linear_bias, tensors.target, None, None,
        of_rows(options.scale, tensors.input, tensors.target), flat_ids(options.selected), statics,
        options.group,
    )  # fmt: skip
    layout.agree()
    log_prob, further = target is not None, selected is not None
    shape = tensors.target.shape
    return named_statistics(stats, best, shape, layout, outputs, log_prob, further)


def _whole_logits(tensors: LinearTensors, ignore_index: int) -> Tensor:
    """For torch.func. What ignored rows hold must not reach the gradient of the weight."""
    ignored = tensors.target.long() == ignore_index
    hidden = tensors.input.masked_fill(ignored[..., None], 0.0)
    return F.linear(hidden, tensors.linear_weight, tensors.linear_bias)


def _no_target(input: Tensor, sequence_parallel: bool, group: dist.ProcessGroup | None) -> Tensor:
    """Stand-in targets where a caller gave none: class 0, for every row of the whole sequence."""
    if not isinstance(input, Tensor) or input.dim() == 0:
        return input  # for ``prepare_linear`` to refuse
    shape = list(input.shape[:-1])
    if sequence_parallel is True and isinstance(group, dist.ProcessGroup) and shape:
        shape[0] *= group.size()
    return torch.zeros(shape, dtype=torch.int64, device=input.device)


def _converted(tensors: LinearTensors) -> LinearTensors:
    """Inside torch.autocast: hidden states and head in its dtype, as F.linear takes them."""
    hidden = tensors.input
    if not isinstance(hidden, Tensor) or hidden.is_meta:
        return tensors
    if not torch.is_autocast_enabled(hidden.device.type):
        return tensors
    dtype = torch.get_autocast_dtype(hidden.device.type)
    named = {
        name: value.to(dtype)
        for name in ("input", "linear_weight", "linear_bias")
        if isinstance(value := getattr(tensors, name), Tensor)
        and value.is_floating_point()
        and value.dtype != torch.float64
    }
    return tensors._replace(**named)
