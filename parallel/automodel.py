"""NeMo-Automodel: a loss for its recipe, over logits that stay split.

    loss_fn:
      _target_: vocab_parallel_ce.parallel.automodel.VocabParallelCrossEntropy

A recipe builds the loss that its YAML names, and calls it with logits, labels and the number of
tokens on all ranks. Automodel's own plans for tensor parallelism leave the logits of most models
split, as DTensors; its ``MaskedCrossEntropy`` then gathers them whole, in fp32. The loss here takes
the split logits as they are.

The class inherits from Automodel's ``MaskedCrossEntropy``: where a model does not know
``logits_to_keep``, a recipe puts that one in the place of any other loss. Automodel is imported
only when the class is first used. Read and run with Automodel 0.7.0.
"""

from __future__ import annotations

from functools import cache
from typing import Any, cast

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from vocab_parallel_ce import VocabShard, cross_entropy

KNOWN = "0.7.0"
IGNORED = -100
"""what Automodel's data sets write, whatever the loss calls it"""


def __getattr__(name: str) -> Any:
    if name == "VocabParallelCrossEntropy":
        return _loss_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def masked_loss(
    logits: Tensor,
    labels: Tensor,
    mask: Tensor | None = None,
    num_label_tokens: Tensor | int | None = None,
    loss_weights: Tensor | None = None,
    *,
    reduction: str = "sum",
    ignore_index: int = IGNORED,
    tp_group: dist.ProcessGroup | None = None,
    **options: Any,
) -> Tensor:
    """What Automodel's ``MaskedCrossEntropy`` computes, without whole logits; fp32.

    Args:
        logits: [B, S, V] as a DTensor, its last dimension split over at most one mesh dimension.
            Or a plain tensor: whole logits, or with ``tp_group`` this rank's equal part of them.
        labels: [B, S] ids. -100 and ``ignore_index`` do not count. Not modified.
        mask: [B, S], 0 where a label does not count.
        num_label_tokens: divides the sum; with 0 the loss and its gradient are 0.
        loss_weights: [B, S], one factor for each token; only with reduction "sum".
        reduction: "sum", "mean" or "none".
        ignore_index: the label that does not count, beside -100.
        tp_group: the ranks that hold the parts of plain logits.
        options: of ``cross_entropy``: label_smoothing, lse_square_scale, inplace_backward.

    Returns:
        A plain tensor, 0-d, or [B, S] for "none".

    Raises:
        ValueError: where ``num_label_tokens`` or ``loss_weights`` is given with another reduction
            than "sum"; and what ``cross_entropy`` raises, for example for labels beyond the
            vocabulary, Partial logits, whole logits with ``tp_group``, or parts of unequal size.

    Communication:
        That of ``cross_entropy``.

    Example:
        ```python
        loss = masked_loss(logits, labels, num_label_tokens=tokens)
        ```
    """
    for name, value in (("num_label_tokens", num_label_tokens), ("loss_weights", loss_weights)):
        if value is not None and reduction != "sum":
            raise ValueError(f"{name} goes with reduction='sum', got reduction={reduction!r}")
    if loss_weights is not None and loss_weights.shape != labels.shape:
        raise ValueError(
            f"loss_weights has shape {tuple(loss_weights.shape)}, labels {tuple(labels.shape)}"
        )
    labels = labels.to(logits.device)
    dropped = labels == IGNORED
    if mask is not None:
        dropped = dropped | (mask.to(labels.device).reshape(labels.shape) == 0)
    split = isinstance(logits, DTensor)
    # Equal parts are not named: then whole logits in their place are found by their contents.
    whole = not split and tp_group is None
    shard = VocabShard(0, logits.shape[-1], logits.shape[-1]) if whole else None
    loss = cross_entropy(
        logits,
        labels.masked_fill(dropped, ignore_index),
        reduction="none" if loss_weights is not None else reduction,
        ignore_index=ignore_index,
        group=tp_group if not split else None,
        shard=shard,
        **options,
    )
    if isinstance(loss, DTensor):
        loss = loss.full_tensor()
    if loss_weights is not None:
        loss = (loss * loss_weights.to(loss)).sum()
    if num_label_tokens is None:
        return cast(Tensor, loss)
    return cast(Tensor, loss * 0.0 if num_label_tokens == 0 else loss / num_label_tokens)


@cache
def _loss_class() -> type:
    try:
        from nemo_automodel.components.loss.masked_ce import MaskedCrossEntropy
    except ImportError as problem:
        raise ImportError(
            "nemo_automodel.components.loss.masked_ce.MaskedCrossEntropy cannot be imported "
            f"({problem}); known to work: NeMo-Automodel {KNOWN}"
        ) from problem

    class VocabParallelCrossEntropy(MaskedCrossEntropy):  # type: ignore[misc]
        """Automodel's ``MaskedCrossEntropy``, by this library; its arguments, and four more.

        ``label_smoothing``, ``lse_square_scale`` (z-loss) and ``inplace_backward`` are those of
        ``cross_entropy``; ``tp_group`` is for logits that are a plain part.
        """

        def __init__(
            self,
            ignore_index: int = IGNORED,
            reduction: str = "sum",
            label_smoothing: float = 0.0,
            lse_square_scale: float = 0.0,
            inplace_backward: bool = False,
            tp_group: dist.ProcessGroup | None = None,
        ) -> None:
            super().__init__(ignore_index=ignore_index, reduction=reduction)
            self.tp_group = tp_group
            self.options = {
                "label_smoothing": label_smoothing,
                "lse_square_scale": lse_square_scale,
                "inplace_backward": inplace_backward,
            }

        def forward(
            self,
            logits: Tensor,
            labels: Tensor,
            mask: Tensor | None = None,
            num_label_tokens: int | None = None,
            loss_weights: Tensor | None = None,
        ) -> Tensor:
            return masked_loss(
                logits,
                labels,
                mask,
                num_label_tokens,
                loss_weights,
                reduction=self.reduction,
                ignore_index=self.ignore_index,
                tp_group=self.tp_group,
                **self.options,
            )

    VocabParallelCrossEntropy.__module__ = __name__
    VocabParallelCrossEntropy.__qualname__ = "VocabParallelCrossEntropy"
    return VocabParallelCrossEntropy
