"""The public functions: arguments checked, the primitive called, [N] vectors made into a loss.

Keywords that all of them share:

    group             the tensor-parallel ProcessGroup that holds the vocabulary; None means one
                      rank (not the default group). Every rank of it must call with the same
                      target, weight and options and gets the same loss; nobody sums the loss, and
                      every rank must pass the same gradient into it.
    shard             a VocabShard; None means equal shards in rank order.
    inplace_backward  let the gradient overwrite the logits (any later read of the logits sees
                      it). Refused for leaves and for overlapping memory; only one backward.
    scale             multiplies the logits (1 / temperature), inside the kernels.
    engine            "auto", or an engine by name.
    collective        "all_gather" (one, bitwise the same loss on every rank and in every run),
                      "all_reduce" (two) or "auto" (gather while it stays under about 6 MB).
    check             True exchanges a preflight first, so that ranks that disagree on the number
                      of rows, the dtype or the options, or of which one has a wrong argument, all
                      raise. None: as the environment's VOCAB_PARALLEL_CE_CHECK says. Without it
                      such a disagreement on rows, dtype or on options that change what is sent
                      (label_smoothing on or off, entropy, argmax, collective) is undefined.

Communication: one all_gather of k floats a row (3; one more each for label smoothing, entropy and
argmax) and a small header, or two all_reduces; none in backward.

Errors: TypeError and ValueError for arguments; they name the argument, its value, the rank and the
way out. On CPU, targets out of range, ranks that disagree and shards that do not tile the
vocabulary raise on every rank. On accelerators, without ``check``, the same make the loss NaN.
"""

from __future__ import annotations

from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor

from .checks import Options, Outputs, prepare
from .dtensor import Layout, unwrap
from .primitive import log_prob as shard_log_prob
from .primitive import log_prob_space, row_statistics
from .reduction import reduce_rows, row_losses
from .request import RowRequest
from .shard import VocabShard


class CrossEntropyLossOutput(NamedTuple):
    """What ``cross_entropy_loss`` returns, in the operator's order."""

    loss: Tensor
    """[N] or [1], the input's dtype; z-loss included; differentiable"""
    log_prob: Tensor
    """[N, C_r] this rank's slice of the global log-softmax in the input's dtype, or empty; no
    gradient"""
    zloss: Tensor
    """like ``loss``, the z part of it, differentiable; empty unless ``return_zloss``"""
    lse_for_zloss: Tensor
    """[N] log-sum-exp in the input's dtype when the scale is not 0, else empty; no gradient"""


class TokenStatistics(NamedTuple):
    """What ``token_statistics`` returns: [N] each, None where not asked for."""

    log_prob: Tensor
    """log p of the target, differentiable"""
    lse: Tensor
    """log sum_c e^x_c, differentiable"""
    entropy: Tensor | None
    """-sum_c p_c log p_c in nats, differentiable"""
    argmax: Tensor | None
    """int64 vocabulary id of the largest logit, the smallest id of a tie; -1 on ignored rows and on
    rows that hold NaN or +inf"""


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    *,
    lse_square_scale: float = 0.0,
    group: dist.ProcessGroup | None = None,
    shard: VocabShard | None = None,
    inplace_backward: bool = False,
    normalizer: Tensor | float | None = None,
    scale: float = 1.0,
    engine: str = "auto",
    collective: str = "auto",
    check: bool | None = None,
) -> Tensor:
    """``torch.nn.functional.cross_entropy`` over logits whose vocabulary is split across ranks.

    Args:
        input: logits [..., C_r], this rank's shard; fp16, bf16, fp32 or fp64, any strides. Or a
            DTensor sharded over its last dimension, which carries its group and shard with it.
        target: [...] int64 or int32 vocabulary ids, the same on every rank of ``group``.
        weight: [vocab_size] class weights, the full vector on every rank.
        reduction: "none", "sum" or "mean" (over the weights of the kept rows, as in PyTorch).
        ignore_index: rows with this target have loss 0 and gradient 0, whatever their logits.
        label_smoothing: in [0, 1], PyTorch's formula over the whole vocabulary.
        lse_square_scale: adds this times lse^2 to every kept row (the z-loss; under "mean" it is
            averaged over the number of kept rows).
        normalizer: a scalar that replaces the denominators of "mean", e.g. the number of kept
            rows over all data-parallel ranks or micro-batches. It divides the z-loss as well, which
            "mean" would divide by the number of rows even under class weights. No gradient flows
            into it.

    Returns:
        fp32 loss (fp64 for fp64 logits), the same on every rank: [...] for "none", else 0-d.

    See the module's header for the other keywords, the communication and the errors.
    """
    options = Options(
        reduction, ignore_index, label_smoothing, lse_square_scale, group, shard,
        inplace_backward, normalizer, scale, engine, collective, check,
    )  # fmt: skip
    input, target, weight, options, layout = unwrap(input, target, weight, options)
    request = prepare(input, target, weight, options, Outputs())
    loss, _, _, _, _ = _loss(input, target, weight, options, request, layout)
    return layout.rows(loss) if reduction == "none" else layout.scalar(loss)


def cross_entropy_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    lse_square_scale_for_zloss: float = 0.0,
    return_zloss: bool = False,
    *,
    return_log_prob: bool = True,
    group: dist.ProcessGroup | None = None,
    shard: VocabShard | None = None,
    inplace_backward: bool = False,
    normalizer: Tensor | float | None = None,
    scale: float = 1.0,
    engine: str = "auto",
    collective: str = "auto",
    check: bool | None = None,
) -> CrossEntropyLossOutput:
    """The fused operator ``npu_cross_entropy_loss``, sharded, with every option in training.

    Same names, order, dtypes and shapes as the operator; the arguments mean what they mean in
    ``cross_entropy``. ``loss`` includes the z-loss. A gradient into ``zloss`` adds to the one that
    flows through ``loss``. ``log_prob`` and ``lse_for_zloss`` carry none. ``log_prob`` costs a
    tensor of the input's size and one more pass; ``return_log_prob=False`` saves both.
    """
    options = Options(
        reduction, ignore_index, label_smoothing, lse_square_scale_for_zloss, group, shard,
        inplace_backward, normalizer, scale, engine, collective, check,
    )  # fmt: skip
    input, target, weight, options, layout = unwrap(input, target, weight, options)
    has_lse = lse_square_scale_for_zloss != 0
    # The operator answers for ignored rows too, where it hands out log_prob or lse.
    outputs = Outputs(ignored_rows=return_log_prob or has_lse)
    request = prepare(input, target, weight, options, outputs)
    log_prob = log_prob_space(input, request, options.group) if return_log_prob else None
    loss, zloss, lse, m, s = _loss(input, target, weight, options, request, layout, log_prob)
    if reduction == "none":
        loss, zloss = layout.rows(loss.to(input.dtype)), layout.rows(zloss.to(input.dtype))
    else:
        loss = layout.scalar(loss.to(input.dtype).reshape(1))
        zloss = layout.scalar(zloss.to(input.dtype).reshape(1))
    if return_log_prob and log_prob is None:
        log_prob = shard_log_prob(input, m, s, request)
    empty = input.new_empty(0)
    return CrossEntropyLossOutput(
        loss,
        empty if log_prob is None else layout.logits(log_prob),
        zloss if return_zloss else empty,
        layout.rows(lse.detach().to(input.dtype)) if has_lse else empty,
    )


def token_statistics(
    input: Tensor,
    target: Tensor,
    *,
    entropy: bool = False,
    argmax: bool = False,
    ignore_index: int = -100,
    group: dist.ProcessGroup | None = None,
    shard: VocabShard | None = None,
    inplace_backward: bool = False,
    scale: float = 1.0,
    engine: str = "auto",
    collective: str = "auto",
    check: bool | None = None,
) -> TokenStatistics:
    """Log-probability of every target, lse, entropy and argmax, in one pass and one exchange.

    What reinforcement learning asks of a policy; temperature T is ``scale=1 / T``. Shapes follow
    ``target``; floats are fp32 (fp64 for fp64 logits) and differentiable. Ignored rows hold 0.
    The arguments mean what they mean in ``cross_entropy``.
    """
    options = Options(
        "none", ignore_index, 0.0, 0.0, group, shard,
        inplace_backward, None, scale, engine, collective, check,
    )  # fmt: skip
    input, target, _, options, layout = unwrap(input, target, None, options)
    request = prepare(input, target, None, options, Outputs(entropy=entropy, argmax=argmax))
    stats, _, _, best = row_statistics(
        input, target, None, request, options.group, inplace_backward
    )
    shape = target.shape
    return TokenStatistics(
        log_prob=layout.rows(0.0 - stats[0].reshape(shape)),
        lse=layout.rows(stats[1].reshape(shape)),
        entropy=layout.rows(stats[2].reshape(shape)) if entropy else None,
        argmax=layout.rows(best.reshape(shape)) if argmax else None,
    )


def _loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: Options,
    request: RowRequest,
    layout: Layout,
    log_prob_out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, zloss, lse, m, s): the first two reduced, the others [N]."""
    stats, m, s, _ = row_statistics(
        input, target, weight, request, options.group, options.inplace_backward, log_prob_out
    )
    rows = row_losses(stats, target.reshape(-1), weight, request)
    loss, zloss = reduce_rows(rows, options.reduction, options.normalizer, layout.total)
    if options.reduction == "none":
        loss, zloss = loss.reshape(target.shape), zloss.reshape(target.shape)
    return loss, zloss, stats[1].reshape(target.shape), m, s
