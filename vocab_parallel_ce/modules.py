"""The loss as an nn.Module."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor, nn

from .api import cross_entropy
from .shard import VocabShard


class VocabParallelCrossEntropyLoss(nn.Module):
    """``cross_entropy`` with its options fixed at construction, like ``nn.CrossEntropyLoss``.

    ``weight`` [vocab_size] is a buffer: it moves with the module and is saved with it. The call
    takes ``input`` [..., C_r] and ``target`` [...], and ``normalizer`` because it changes with
    every batch.
    """

    weight: Tensor | None

    def __init__(
        self,
        weight: Tensor | None = None,
        reduction: str = "mean",
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        *,
        lse_square_scale: float = 0.0,
        group: dist.ProcessGroup | None = None,
        shard: VocabShard | None = None,
        inplace_backward: bool = False,
        scale: float = 1.0,
        engine: str = "auto",
        collective: str = "auto",
        check: bool | None = None,
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.reduction = reduction
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.lse_square_scale = lse_square_scale
        self.group = group
        self.shard = shard
        self.inplace_backward = inplace_backward
        self.scale = scale
        self.engine = engine
        self.collective = collective
        self.check = check

    def forward(
        self, input: Tensor, target: Tensor, normalizer: Tensor | float | None = None
    ) -> Tensor:
        """See ``cross_entropy``."""
        return cross_entropy(
            input,
            target,
            self.weight,
            self.reduction,
            self.ignore_index,
            self.label_smoothing,
            lse_square_scale=self.lse_square_scale,
            group=self.group,
            shard=self.shard,
            inplace_backward=self.inplace_backward,
            normalizer=normalizer,
            scale=self.scale,
            engine=self.engine,
            collective=self.collective,
            check=self.check,
        )

    def extra_repr(self) -> str:
        return (
            f"reduction={self.reduction!r}, ignore_index={self.ignore_index}, "
            f"label_smoothing={self.label_smoothing}, lse_square_scale={self.lse_square_scale}, "
            f"scale={self.scale}, shard={self.shard}"
        )
