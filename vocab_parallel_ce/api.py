"""The public functions on logits: check the arguments, call the primitive, reduce [N] to a loss.

Each docstring is complete by itself (shapes, dtypes, errors, communication), although they repeat
one another: a reader looks them up one function at a time.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from .arguments import Options, Outputs
from .checks import prepare
from .dtensor import Layout, unwrap
from .option_checks import is_number
from .primitive import Statistics, log_prob_space, row_statistics
from .primitive import log_prob as shard_log_prob
from .reduction import as_scalar, reduce_rows, row_losses
from .request import RowRequest, is_on
from .results import CrossEntropyLossOutput, TokenStatistics, named_statistics
from .scales import of_rows
from .selected import flat_ids
from .shard import VocabShard
from .together import raises_together


@overload
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    *,
    lse_square_scale: float = 0.0,
    return_zloss: Literal[False] = False,
    group: dist.ProcessGroup | None = None,
    shard: VocabShard | None = None,
    inplace_backward: bool = False,
    normalizer: Tensor | float | None = None,
    scale: Tensor | float = 1.0,
    softcap: float | None = None,
    engine: str = "auto",
    collective: str = "auto",
    check: bool | None = None,
    finite_logits: bool = False,
) -> Tensor: ...
@overload
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    *,
    lse_square_scale: float = 0.0,
    return_zloss: Literal[True],
    group: dist.ProcessGroup | None = None,
    shard: VocabShard | None = None,
    inplace_backward: bool = False,
    normalizer: Tensor | float | None = None,
    scale: Tensor | float = 1.0,
    softcap: float | None = None,
    engine: str = "auto",
    collective: str = "auto",
    check: bool | None = None,
    finite_logits: bool = False,
) -> tuple[Tensor, Tensor]: ...
@overload
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    *,
    lse_square_scale: float = 0.0,
    return_zloss: bool,
    group: dist.ProcessGroup | None = None,
    shard: VocabShard | None = None,
    inplace_backward: bool = False,
    normalizer: Tensor | float | None = None,
    scale: Tensor | float = 1.0,
    softcap: float | None = None,
    engine: str = "auto",
    collective: str = "auto",
    check: bool | None = None,
    finite_logits: bool = False,
) -> Tensor | tuple[Tensor, Tensor]: ...
@raises_together
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    *,
    lse_square_scale: float = 0.0,
    return_zloss: bool = False,
    group: dist.ProcessGroup | None = None,
    shard: VocabShard | None = None,
    inplace_backward: bool = False,
    normalizer: Tensor | float | None = None,
    scale: Tensor | float = 1.0,
    softcap: float | None = None,
    engine: str = "auto",
    collective: str = "auto",
    check: bool | None = None,
    finite_logits: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``torch.nn.functional.cross_entropy`` over logits whose vocabulary is split across ranks.

    Every rank of ``group`` calls it with its own shard of the logits and with the same target,
    weight and options. Every rank gets the same loss. Nobody sums the loss over ``group``, and
    every rank must pass the same gradient into it.

    Args:
        input: logits [..., C_r] of this rank's shard; fp16, bf16, fp32 or fp64, any strides. Or a
            DTensor sharded over its last dimension, which brings its group and shard with it. It is
            not modified, unless ``inplace_backward``.
        target: [...] int64 or int32 vocabulary ids (not columns), the same on every rank.
        weight: [vocab_size] floating point class weights, the full vector on every rank.
        reduction: "none", "sum" or "mean" (over the weights of the kept rows, as in PyTorch).
        ignore_index: rows with this target have loss 0 and gradient 0, whatever their logits hold.
        label_smoothing: in [0, 1], PyTorch's formula over the whole vocabulary.
        lse_square_scale: adds this times lse^2 to every kept row (the z-loss of PaLM, Chowdhery et
            al. 2022, section 5). "mean" divides it by the number of kept rows.
        return_zloss: return a pair (loss, zloss). ``zloss`` is the z-loss part of ``loss``, in the
            same dtype and shape, and 0 without ``lse_square_scale``. ``loss`` still contains it, so
            a gradient into ``zloss`` adds to the one through ``loss``.
        group: the tensor-parallel ``ProcessGroup`` over which the vocabulary is split. None means
            one rank, not the default group: where the process is one of several ranks, a call with
            neither ``group`` nor ``shard`` warns once.
        shard: which ids ``input`` holds, a ``VocabShard``. None means equal shards in rank order.
        inplace_backward: let the gradient overwrite the memory of ``input``: the loss then needs
            no memory of the size of the logits. Every later read of ``input`` sees the gradient, a
            second backward is refused, and so are leaves and tensors whose elements share memory.
        normalizer: a number or 0-d tensor that replaces the denominators of "mean", for example the
            number of kept rows over all data-parallel ranks or micro-batches. It divides the z-loss
            as well. No gradient flows into it.
        scale: multiplies the logits inside the kernels: 1 / temperature. A number, a 0-d tensor, or
            a tensor in the shape of ``target`` with one number for each row; the same on every
            rank. It must be finite: other values raise a ValueError, or in a tensor on an
            accelerator make their row NaN. No gradient flows into it.
        softcap: the logits become ``softcap * tanh(logits / softcap)`` inside the kernels, before
            ``scale`` (Gemma 2, 2024). None and 0 leave them as they are.
        engine: "auto" takes the fastest engine of the tensors' device; or "cpu", "npu", "triton",
            "eager".
        collective: "all_gather" (one collective; the result is bitwise the same on every rank
            and in every run), "all_reduce" (two collectives), or "auto", which gathers up to about
            6 MB.
        check: True adds a small exchange before the call, so that all ranks raise together: where
            one has a wrong argument, or where they disagree on the number of rows, the dtype or an
            option. An error in backward is not told to the other ranks. None follows the variable
            VOCAB_PARALLEL_CE_CHECK. It must be the same on every rank: if only some ranks check,
            the result is undefined (a hang, or a process that ends). Without the check, a
            disagreement on the number of rows, the dtype or the statistics that are computed is
            undefined as well.
        finite_logits: a promise of the caller: rows that get no gradient hold neither NaN nor +inf,
            also after ``scale`` (-inf is allowed). These are the rows with ``ignore_index``, and
            those whose loss nothing depends on. It saves a pass over the gradient on Ascend; other
            engines ignore it. While the promise holds, no result changes. If it does not hold, such
            a row may get a NaN gradient instead of 0. Each rank may promise it for its own shard.

    Returns:
        The loss in fp32 (fp64 for fp64 logits), [...] for "none", else 0-d; the same on every rank.
        Where all rows are ignored, "mean" is NaN with a gradient of 0, as in PyTorch. With
        ``return_zloss`` a pair of such tensors, (loss, zloss).

    Raises:
        TypeError, ValueError: for a wrong argument; the message names the argument, its value, the
            rank and the way out.
        ValueError: on every rank, on CPU and with ``check``: a target that is neither a class nor
            ``ignore_index``; ranks with different targets or options; shards that overlap or leave
            ids out; gathered logits where a shard belongs. On accelerators without ``check`` these
            make the result NaN instead, because reading a value would wait for the device.
        RuntimeError: an ``engine`` that is not available here; a second backward in place.

    Communication:
        One all_gather of 3 floats a row (4 with label smoothing) and a small header, or two
        all_reduces. Nothing in backward. With one rank, nothing at all.

    Example:
        ```python
        loss = cross_entropy(logits, target, label_smoothing=0.1, group=tp_group)
        loss.backward()
        ```
    """
    options = Options(
        reduction, ignore_index, label_smoothing, lse_square_scale, group, shard,
        inplace_backward, normalizer, scale, softcap, engine, collective, check, finite_logits,
    )  # fmt: skip
    input, target, weight, options, layout = unwrap(input, target, weight, options)
    request = prepare(input, target, weight, options, Outputs())
    loss, zloss, _ = _loss(input, target, weight, options, request, layout)
    wrap = layout.rows if reduction == "none" else layout.scalar
    if not return_zloss:
        return wrap(loss)
    return wrap(loss), wrap(torch.zeros_like(loss) if zloss is None else zloss)


@raises_together
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
    scale: Tensor | float = 1.0,
    softcap: float | None = None,
    engine: str = "auto",
    collective: str = "auto",
    check: bool | None = None,
    finite_logits: bool = False,
) -> CrossEntropyLossOutput:
    """The fused operator ``torch_npu.npu_cross_entropy_loss``, sharded; every option trains.

    Names, order, shapes and dtypes are the operator's. Options that the operator does not support
    in training (z-loss; weight, ignore_index and label_smoothing with a gradient) are computed by
    this library, with gradients. A gradient into ``zloss`` adds to the one that flows through
    ``loss``.

    Args:
        input: logits [N, C_r] (or [..., C_r]) of this rank's shard; fp16, bf16, fp32 or fp64, any
            strides. Or a DTensor sharded over its last dimension.
        target: [N] (or [...]) int64 or int32 vocabulary ids, the same on every rank.
        weight: [vocab_size] floating point class weights, the full vector on every rank.
        reduction: "none", "sum" or "mean" (over the weights of the kept rows).
        ignore_index: rows with this target have loss 0 and gradient 0, whatever their logits hold.
        label_smoothing: in [0, 1], PyTorch's formula over the whole vocabulary.
        lse_square_scale_for_zloss: adds this times lse^2 to every kept row.
        return_zloss: also return the z-loss part of ``loss``, which still contains it.
        return_log_prob: False saves a tensor of the size of ``input`` and one pass over it.
        group: the tensor-parallel ``ProcessGroup`` over which the vocabulary is split. None means
            one rank, not the default group: where the process is one of several ranks, a call with
            neither ``group`` nor ``shard`` warns once.
        shard: which ids ``input`` holds, a ``VocabShard``. None means equal shards in rank order.
        inplace_backward: let the gradient overwrite the memory of ``input``: the loss then needs
            no memory of the size of the logits. Every later read of ``input`` sees the gradient, a
            second backward is refused, and so are leaves and tensors whose elements share memory.
        normalizer: a number or 0-d tensor that replaces the denominators of "mean". No gradient
            flows into it.
        scale: multiplies the logits inside the kernels: 1 / temperature. A number, a 0-d tensor, or
            a tensor in the shape of ``target`` with one number for each row; the same on every
            rank. It must be finite: other values raise a ValueError, or in a tensor on an
            accelerator make their row NaN. No gradient flows into it.
        softcap: the logits become ``softcap * tanh(logits / softcap)`` inside the kernels, before
            ``scale`` (Gemma 2, 2024). None and 0 leave them as they are.
        engine: "auto" takes the fastest engine of the tensors' device; or "cpu", "npu", "triton",
            "eager".
        collective: "all_gather" (one collective; the result is bitwise the same on every rank
            and in every run), "all_reduce" (two collectives), or "auto", which gathers up to about
            6 MB.
        check: True adds a small exchange before the call, so that all ranks raise together: where
            one has a wrong argument, or where they disagree on the number of rows, the dtype or an
            option. An error in backward is not told to the other ranks. None follows the variable
            VOCAB_PARALLEL_CE_CHECK. It must be the same on every rank: if only some ranks check,
            the result is undefined (a hang, or a process that ends). Without the check, a
            disagreement on the number of rows, the dtype or the statistics that are computed is
            undefined as well.
        finite_logits: a promise of the caller: rows that get no gradient hold neither NaN nor +inf,
            also after ``scale`` (-inf is allowed). These are the rows with ``ignore_index``, and
            those whose loss nothing depends on. It saves a pass over the gradient on Ascend; other
            engines ignore it. While the promise holds, no result changes. If it does not hold, such
            a row may get a NaN gradient instead of 0. Each rank may promise it for its own shard.

    Returns:
        A ``CrossEntropyLossOutput(loss, log_prob, zloss, lse_for_zloss)``. ``loss`` is in the dtype
        of ``input``: [N] for "none", else [1]. ``log_prob`` [N, C_r] holds every class of this
        shard.

    Raises:
        TypeError, ValueError: for a wrong argument; the message names the argument, its value, the
            rank and the way out.
        ValueError: on every rank, on CPU and with ``check``: a target that is neither a class nor
            ``ignore_index``; ranks with different targets or options; shards that overlap or leave
            ids out; gathered logits where a shard belongs. On accelerators without ``check`` these
            make the result NaN instead, because reading a value would wait for the device.
        RuntimeError: an ``engine`` that is not available here; a second backward in place.

    Communication:
        One all_gather of 3 floats a row (4 with label smoothing) and a small header, or two
        all_reduces. Nothing in backward. With one rank, nothing at all.

    Example:
        ```python
        loss, log_prob, zloss, lse = cross_entropy_loss(
            logits, target, lse_square_scale_for_zloss=1e-4, return_zloss=True, group=tp_group
        )
        loss.backward()
        ```
    """
    options = Options(
        reduction, ignore_index, label_smoothing, lse_square_scale_for_zloss, group, shard,
        inplace_backward, normalizer, scale, softcap, engine, collective, check, finite_logits,
    )  # fmt: skip
    input, target, weight, options, layout = unwrap(input, target, weight, options)
    z = lse_square_scale_for_zloss
    has_lse = not is_number(z) or is_on(z)  # what is no number is refused below
    # The operator answers for ignored rows too, where it hands out log_prob or lse.
    outputs = Outputs(ignored_rows=return_log_prob or has_lse)
    request = prepare(input, target, weight, options, outputs)
    log_prob = log_prob_space(input, request, options.group) if return_log_prob else None
    loss, zloss, found = _loss(input, target, weight, options, request, layout, log_prob)

    def in_its_dtype(value: Tensor) -> Tensor:
        if reduction == "none":
            return layout.rows(value.to(input.dtype))
        return layout.scalar(value.to(input.dtype).reshape(1))

    if return_log_prob and log_prob is None:
        scales = of_rows(options.scale, input, target)
        log_prob = shard_log_prob(input, found.m, found.s, request, scales)
    empty = input.new_empty(0)
    lse = found.stats[1].detach().reshape(target.shape) if has_lse else None
    if return_zloss and zloss is None:
        zloss = torch.zeros_like(loss)
    return CrossEntropyLossOutput(
        in_its_dtype(loss),
        empty if log_prob is None else layout.logits(log_prob),
        empty if zloss is None or not return_zloss else in_its_dtype(zloss),
        empty if lse is None else layout.rows(lse.to(input.dtype)),
    )


@raises_together
def token_statistics(
    input: Tensor,
    target: Tensor | None = None,
    *,
    entropy: bool = False,
    argmax: bool = False,
    sum_p_squared: bool = False,
    selected: Tensor | None = None,
    ignore_index: int = -100,
    group: dist.ProcessGroup | None = None,
    shard: VocabShard | None = None,
    inplace_backward: bool = False,
    scale: Tensor | float = 1.0,
    softcap: float | None = None,
    engine: str = "auto",
    collective: str = "auto",
    check: bool | None = None,
    finite_logits: bool = False,
) -> TokenStatistics:
    """Log-probability of each target, lse, entropy and argmax, in one pass and one exchange.

    These are the quantities that reinforcement learning needs of a policy. All of them can be
    differentiated but ``argmax`` and ``sum_p_squared``.

    Args:
        input: logits [..., C_r] of this rank's shard; fp16, bf16, fp32 or fp64, any strides. Or a
            DTensor sharded over its last dimension.
        target: [...] int64 or int32 vocabulary ids, the same on every rank. None: ``log_prob`` is
            None, and no row is ignored.
        entropy: return the entropy of each row.
        argmax: return the id of the largest logit of each row.
        sum_p_squared: return the sum of the squared probabilities of each row (the collision
            probability; optimal baselines of policy gradients use it).
        selected: [..., K] int64 or int32 vocabulary ids, K for each row, the same on every rank:
            return the log-probability of each, whatever rank holds its logit. An id may occur
            twice in a row, and K may be 0. In ignored rows the ids are not looked at. In all other
            rows each id must be a class; ``ignore_index`` has no meaning here.
        ignore_index: rows with this target hold 0 (argmax -1) and have gradient 0.
        group: the tensor-parallel ``ProcessGroup`` over which the vocabulary is split. None means
            one rank, not the default group: where the process is one of several ranks, a call with
            neither ``group`` nor ``shard`` warns once.
        shard: which ids ``input`` holds, a ``VocabShard``. None means equal shards in rank order.
        inplace_backward: let the gradient overwrite the memory of ``input``: the loss then needs
            no memory of the size of the logits. Every later read of ``input`` sees the gradient, a
            second backward is refused, and so are leaves and tensors whose elements share memory.
        scale: multiplies the logits inside the kernels: 1 / temperature. A number, a 0-d tensor, or
            a tensor in the shape of ``target`` with one number for each row; the same on every
            rank. It must be finite: other values raise a ValueError, or in a tensor on an
            accelerator make their row NaN. No gradient flows into it.
        softcap: the logits become ``softcap * tanh(logits / softcap)`` inside the kernels, before
            ``scale`` (Gemma 2, 2024). None and 0 leave them as they are.
        engine: "auto" takes the fastest engine of the tensors' device; or "cpu", "npu", "triton",
            "eager".
        collective: "all_gather" (one collective; the result is bitwise the same on every rank
            and in every run), "all_reduce" (two collectives), or "auto", which gathers up to about
            6 MB.
        check: True adds a small exchange before the call, so that all ranks raise together: where
            one has a wrong argument, or where they disagree on the number of rows, the dtype or an
            option. An error in backward is not told to the other ranks. None follows the variable
            VOCAB_PARALLEL_CE_CHECK. It must be the same on every rank: if only some ranks check,
            the result is undefined (a hang, or a process that ends). Without the check, a
            disagreement on the number of rows, the dtype or the statistics that are computed is
            undefined as well.
        finite_logits: a promise of the caller: rows that get no gradient hold neither NaN nor +inf,
            also after ``scale`` (-inf is allowed). These are the rows with ``ignore_index``, and
            those whose loss nothing depends on. It saves a pass over the gradient on Ascend; other
            engines ignore it. While the promise holds, no result changes. If it does not hold, such
            a row may get a NaN gradient instead of 0. Each rank may promise it for its own shard.

    Returns:
        A ``TokenStatistics(log_prob, lse, entropy, argmax, sum_p_squared, selected_log_prob)``, the
        same on every rank. Each has the shape of ``target``; ``selected_log_prob`` is [..., K].
        ``log_prob`` is the log-probability of each row's target. What was not asked for is None.

    Raises:
        TypeError, ValueError: for a wrong argument; the message names the argument, its value, the
            rank and the way out.
        ValueError: on every rank, on CPU and with ``check``: a target that is neither a class nor
            ``ignore_index``; a selected id that is no class; ranks with different targets, selected
            ids or options; shards that overlap or leave ids out; gathered logits where a shard
            belongs. On accelerators without ``check`` these make the result NaN instead, because
            reading a value would wait for the device.
        RuntimeError: an ``engine`` that is not available here; a second backward in place.

    Communication:
        One all_gather of 3 floats a row (one more each for entropy, argmax and sum_p_squared, K for
        selected) and a small header, or two all_reduces (argmax always gathers). Nothing in
        backward. With one rank, nothing at all.

    Example:
        ```python
        new = token_statistics(logits, tokens, entropy=True, scale=1 / temperature, group=tp_group)
        ratio = (new.log_prob - old_log_prob).exp()
        ```

        The share of tokens whose largest logit is the target's (top-1 accuracy):
        ```python
        best = token_statistics(logits, tokens, argmax=True, group=tp_group).argmax
        kept = tokens != -100
        accuracy = ((best == tokens) & kept).sum() / kept.sum()
        ```
    """
    ids = _no_target(input) if target is None else target
    if target is None:
        ignore_index = -100
    options = Options(
        "none", ignore_index, 0.0, 0.0, group, shard,
        inplace_backward, None, scale, softcap, engine, collective, check, finite_logits,
        selected,
    )  # fmt: skip
    input, ids, _, options, layout = unwrap(input, ids, None, options)
    outputs = Outputs(entropy=entropy, argmax=argmax, squares=sum_p_squared)
    request = prepare(input, ids, None, options, outputs)
    found = row_statistics(
        input, ids, None, request, options.group, inplace_backward,
        scale=of_rows(options.scale, input, ids), selected=flat_ids(options.selected),
    )  # fmt: skip
    layout.agree()
    log_prob, further = target is not None, selected is not None
    return named_statistics(
        found.stats, found.argmax, ids.shape, layout, outputs, log_prob, further
    )


def _no_target(input: Tensor) -> Tensor:
    """Stand-in targets where a caller gave none: class 0, whose log-probability is not returned."""
    if not isinstance(input, Tensor) or input.dim() == 0:
        return input  # for ``prepare`` to refuse
    local = input.to_local() if isinstance(input, DTensor) else input
    return local.new_zeros(local.shape[:-1], dtype=torch.int64)


def _loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: Options,
    request: RowRequest,
    layout: Layout,
    log_prob_out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Statistics]:
    """(loss, zloss, statistics); loss and zloss are reduced, zloss is None where it is 0."""
    found = row_statistics(
        input, target, weight, request, options.group, options.inplace_backward, log_prob_out,
        as_scalar(options.normalizer, input), of_rows(options.scale, input, target),
    )  # fmt: skip
    layout.agree()
    rows = row_losses(found.stats, target, weight, request, found.row_weight)
    given = found.normalizer if request.normalized else None
    loss, zloss = reduce_rows(rows, options.reduction, given, layout.total)
    if options.reduction == "none":
        loss = loss.reshape(target.shape)
        zloss = None if zloss is None else zloss.reshape(target.shape)
    return loss, zloss, found
