"""The loss of Megatron-core models: in place of Megatron's own, or called by its names.

    from vocab_parallel_ce.parallel.megatron import install

    install(vocab_size=50257)        # on every rank, before or after the model is built

From then on every model of the process computes its loss here, whichever of Megatron's losses its
configuration asks for. ``uninstall()`` goes back. Importing this module imports no Megatron;
megatron-core 0.12.1 (which MindSpeed builds on), 0.16.1 and 0.19.2 are tested.

Three functions below have Megatron's names and signatures and can also be called directly; they use
the default options of ``install``. ``cross_entropy_target`` is the loss in the form that a model of
Megatron after 0.19 is given. Error messages call the logits ``input`` and the labels ``target``, as
those of ``vocab_parallel_ce.cross_entropy`` do.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from .cross_entropy import MegatronOptions, per_token_loss
from .fused_head import FusedHead, fuse_head, fused_head_loss, output_processor
from .installation import Installation, install, installed_loss, uninstall
from .loss_func import logits_loss_func, loss_func

__all__ = [
    "FusedHead",
    "Installation",
    "MegatronOptions",
    "cross_entropy_target",
    "fuse_head",
    "fused_head_loss",
    "fused_vocab_parallel_cross_entropy",
    "install",
    "logits_loss_func",
    "loss_func",
    "output_processor",
    "te_parallel_cross_entropy",
    "uninstall",
    "vocab_parallel_cross_entropy",
]

_DEFAULTS = MegatronOptions()


def cross_entropy_target(
    logits: Tensor,
    labels: Tensor,
    tp_group: dist.ProcessGroup | None = None,
    *,
    options: MegatronOptions | None = None,
) -> Tensor:
    """The loss as Megatron after 0.19 calls it: ``loss = target(logits, labels, tp_group)``.

    The signature is that of ``CrossEntropyTarget`` in Megatron's documentation of 0.20.0. Return it
    from the method ``vocab_parallel_cross_entropy`` of a ``BackendSpecProvider``, or set it on one
    model; then nothing of Megatron is replaced. Megatron allows such a loss to overwrite the
    logits. It does so only with ``inplace_backward``, in backward.

    Args:
        logits: [s, b, v/tp] this rank's shard, fp16, bf16, fp32 or fp64.
        labels: [s, b] int64 or int32 vocabulary ids, the same on every rank; -100 is ignored.
        tp_group: the ranks that hold the vocabulary. None: Megatron's tensor-parallel group, or
            one rank where Megatron has made no groups.
        options: the arguments of ``install``, as an object, for this call alone. None: the options
            of the latest ``install``, which also counts the call; without one, the defaults.

    Returns:
        [s, b] fp32 (fp64 for fp64 logits), the same on every rank. Its gradient has the logits'
        dtype.

    Raises:
        TypeError, ValueError: for wrong arguments; on every rank for wrong labels on CPU, where
            accelerators give NaN.

    Communication:
        One all_gather, or two all_reduces for large batches; none in backward.

    Example:
        ```python
        options = MegatronOptions(vocab_size=50257, inplace_backward=True)
        model.vocab_parallel_cross_entropy = partial(cross_entropy_target, options=options)
        ```
    """
    if options is None:
        return installed_loss(logits, labels, tp_group=tp_group)[0]
    return per_token_loss(logits, labels, 0.0, tp_group, options)[0]


def vocab_parallel_cross_entropy(
    vocab_parallel_logits: Tensor,
    target: Tensor,
    label_smoothing: float = 0.0,
    tp_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """The loss of every token, from this rank's shard of the logits.

    ``megatron.core.tensor_parallel.vocab_parallel_cross_entropy``, where the logits are not
    modified, smoothing is right on any number of ranks, ignore_index is honoured, and wrong input
    is an error instead of a number.

    Args:
        vocab_parallel_logits: [*, v/tp] (Megatron's is [s, b, v/tp]), fp16, bf16, fp32 or fp64, any
            strides; equal shards in rank order.
        target: [*] int64 or int32 vocabulary ids, the same on every rank; -100 is ignored.
        label_smoothing: in [0, 1), spread over the other classes as Megatron does on one rank (the
            formula of NeMo's SmoothedCrossEntropyLoss).
        tp_group: the ranks that hold the vocabulary. None: Megatron's tensor-parallel group, or
            one rank where Megatron has made no groups.

    Returns:
        [*] fp32 (fp64 for fp64 logits), the same on every rank. Its gradient has the logits' dtype.

    Raises:
        TypeError, ValueError: for wrong arguments; on every rank for wrong labels on CPU, where
            accelerators give NaN.

    Communication:
        One all_gather, or two all_reduces for large batches; none in backward.

    Example:
        ```python
        losses = vocab_parallel_cross_entropy(logits, labels, tp_group=tp_group)  # [s, b]
        ```
    """
    return per_token_loss(vocab_parallel_logits, target, label_smoothing, tp_group, _DEFAULTS)[0]


def fused_vocab_parallel_cross_entropy(
    vocab_parallel_logits: Tensor, target: Tensor, tp_group: dist.ProcessGroup | None = None
) -> Tensor:
    """``vocab_parallel_cross_entropy`` with the signature of Megatron's fused loss.

    That is the function of this name in ``megatron.core.fusions.fused_cross_entropy``.

    Args:
        vocab_parallel_logits: [*, v/tp] this rank's shard, fp16, bf16, fp32 or fp64.
        target: [*] int64 or int32 vocabulary ids, the same on every rank; -100 is ignored.
        tp_group: the ranks that hold the vocabulary. None: Megatron's tensor-parallel group, or
            one rank where Megatron has made no groups.

    Returns:
        [*] fp32 (fp64 for fp64 logits), the same on every rank.

    Raises:
        TypeError, ValueError: for wrong arguments; on every rank for wrong labels on CPU, where
            accelerators give NaN.

    Communication:
        One all_gather, or two all_reduces for large batches; none in backward.

    Example:
        ```python
        losses = fused_vocab_parallel_cross_entropy(logits, labels, tp_group)  # [s, b]
        ```
    """
    return per_token_loss(vocab_parallel_logits, target, 0.0, tp_group, _DEFAULTS)[0]


def te_parallel_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    tp_group: dist.ProcessGroup | None = None,
    is_cg_capturable: bool = False,
) -> Tensor:
    """``vocab_parallel_cross_entropy`` with the signature of Megatron's call to TransformerEngine.

    TransformerEngine is not needed.

    Args:
        logits: [*, v/tp] this rank's shard, fp16, bf16, fp32 or fp64.
        labels: [*] int64 or int32 vocabulary ids, the same on every rank; -100 is ignored.
        tp_group: the ranks that hold the vocabulary. None: Megatron's tensor-parallel group, or
            one rank where Megatron has made no groups.
        is_cg_capturable: accepted, and changes nothing.

    Returns:
        [*] fp32 (fp64 for fp64 logits), the same on every rank.

    Raises:
        TypeError, ValueError: for wrong arguments; on every rank for wrong labels on CPU, where
            accelerators give NaN.

    Communication:
        One all_gather, or two all_reduces for large batches; none in backward.

    Example:
        ```python
        losses = te_parallel_cross_entropy(logits, labels, tp_group)  # [s, b]
        ```
    """
    return per_token_loss(logits, labels, 0.0, tp_group, _DEFAULTS)[0]
