"""The loss of a causal language model, as Hugging Face's models call it: labels are shifted here.

A model of transformers calls ``model.loss_function(logits=, labels=, vocab_size=, ...)``, and
DeepSpeed sets the same hook. ``CausalLMLoss`` has that signature and computes what transformers'
own ``ForCausalLMLoss`` computes, from this rank's shard of the logits. How group and shard are
found in a model depends on the framework: see ``transformers.py`` and ``deepspeed.py``. Neither
framework is imported here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from vocab_parallel_ce import VocabShard, cross_entropy


def shifted(labels: Tensor, ignore_index: int) -> Tensor:
    """[..., S] -> [..., S]: each position's target is the next label; the last one has none."""
    return F.pad(labels, (0, 1), value=ignore_index)[..., 1:]


def targets_of(
    labels: Tensor | None, shift_labels: Tensor | None, ignore_index: int, where: str
) -> Tensor:
    """[..., S], from whichever of the two is given."""
    if shift_labels is not None:
        return shift_labels
    if labels is None:
        raise ValueError(f"{where}labels and shift_labels are both None; pass one of them")
    return shifted(labels, ignore_index)


@dataclass(frozen=True)
class CausalLMLoss:
    """A loss function for ``model.loss_function``, over vocab-parallel logits.

    Args:
        group: the ranks that split the vocabulary; None for one rank.
        shard: the ids of this rank's columns of the logits.
        label_smoothing: as in ``cross_entropy``, over the whole vocabulary. Leave the Trainer's
            ``label_smoothing_factor`` at 0: it computes a loss of its own from whole logits.
        lse_square_scale: adds this times lse squared to the loss of each kept token (z-loss).
        inplace_backward: the gradient overwrites the logits, ``outputs.logits`` included.

    Communication:
        None when it is made; a call costs what ``cross_entropy`` costs.

    Example:
        ```python
        model.loss_function = CausalLMLoss(tp_group, VocabShard.even(vocab_size, tp_group))
        ```
    """

    group: dist.ProcessGroup | None
    shard: VocabShard
    label_smoothing: float = 0.0
    lse_square_scale: float = 0.0
    inplace_backward: bool = False

    def __deepcopy__(self, memo: dict[int, Any]) -> CausalLMLoss:
        """Itself: a copy of a model shares the group, which cannot be copied."""
        return self

    @property
    def where(self) -> str:
        """How an error message begins: with this rank, or empty where there is only one."""
        return f"rank {dist.get_rank(self.group)} of the group: " if self.group else ""

    def check_vocabulary(self, vocab_size: int | None) -> None:
        """ValueError where a model tells another size than its head has."""
        if vocab_size is not None and vocab_size != self.shard.vocab_size:
            raise ValueError(
                f"{self.where}vocab_size={vocab_size} is not the {self.shard.vocab_size} of "
                f"{self.shard}"
            )

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor | None = None,
        vocab_size: int | None = None,
        num_items_in_batch: Tensor | float | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **others: Any,
    ) -> Tensor:
        """The mean over kept tokens, or their sum over num_items_in_batch; fp32, 0-d.

        Args:
            logits: [..., S, C_r], this rank's shard.
            labels: [..., S]; position s is to predict labels[s + 1]. Unused with shift_labels.
            vocab_size: what the model's configuration says; if given, it must equal the shard's.
            num_items_in_batch: the denominator, such as the kept tokens of all micro-batches.
            ignore_index: the label that does not count.
            shift_labels: [..., S]; the targets, for callers who have shifted the labels already.
            others: what models pass on (masks, positions); not used, as in transformers.

        Raises:
            ValueError: for logits that were gathered, for another vocabulary, without labels, and
                what ``cross_entropy`` raises.
        """
        self.check_vocabulary(vocab_size)
        if self.shard.size < self.shard.vocab_size == logits.shape[-1]:
            raise ValueError(
                f"{self.where}the logits were gathered: they have all {logits.shape[-1]} columns, "
                f"and this rank's shard is {self.shard}; keep the head's output split, in "
                'transformers by tp_plan={"lm_head": "colwise"}'
            )
        target = targets_of(labels, shift_labels, ignore_index, self.where)
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(logits.device)
        return cross_entropy(
            logits,
            target.to(logits.device),
            ignore_index=ignore_index,
            label_smoothing=self.label_smoothing,
            lse_square_scale=self.lse_square_scale,
            normalizer=num_items_in_batch,
            group=self.group,
            shard=self.shard,
            inplace_backward=self.inplace_backward,
        )
