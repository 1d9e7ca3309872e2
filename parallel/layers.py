"""Embedding and output head whose weights are split over the vocabulary.

Each tensor-parallel rank owns the rows [start, stop) of a [vocab_size, width] weight. Between the
two layers every rank holds the same values and the same gradients. Two autograd functions see to
that; each is the mirror of the other:

    reduce_from_group    forward: sum over the group    backward: nothing    (after the embedding)
    copy_to_group        forward: nothing    backward: sum over the group    (before the head)

Initial weights do not depend on the number of ranks: every rank draws the full weight from the same
seeded generator and keeps its rows. While a layer is built, its full weight is in memory.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from vocab_parallel_ce import VocabShard, linear_cross_entropy
from vocab_parallel_ce.held_group import HoldsGroup


def _sum_over(group: dist.ProcessGroup, values: Tensor) -> Tensor:
    """A new tensor: the sum over the group, carried in fp32 where values are narrower."""
    narrow = values.dtype in (torch.float16, torch.bfloat16)
    total = values.to(torch.float32 if narrow else values.dtype, copy=True).contiguous()
    dist.all_reduce(total, group=group)
    return total.to(values.dtype)


class _ReduceFromGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, group: dist.ProcessGroup) -> Tensor:
        return _sum_over(group, values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class _CopyToGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _sum_over(ctx.group, gradients[0]), None


def reduce_from_group(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Partial sums on each rank -> their sum on every rank.

    Args:
        values: floats of any shape; fp16 and bf16 are summed in fp32.
        group: the ranks that each hold a part; None is one rank.

    Returns:
        A tensor like ``values``. Its gradient reaches each rank unchanged.

    Communication:
        One all_reduce in forward, none in backward; none at all with one rank.

    Example:
        ```python
        vectors = reduce_from_group(own_rows_of_the_embedding, tp_group)
        ```
    """
    if group is None or dist.get_world_size(group) == 1:
        return values
    result: Tensor = _ReduceFromGroup.apply(values, group)  # type: ignore[no-untyped-call]
    return result


def copy_to_group(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Returns ``values``; in backward their gradient is summed over the group.

    A head whose vocabulary is split needs it on its hidden states: every rank uses them for its own
    ids, and so has only a part of their gradient.

    Args:
        values: floats of any shape, the same on every rank.
        group: the ranks that use them; None is one rank.

    Returns:
        ``values``. Their gradient is the sum over the ranks, carried in fp32 for fp16 and bf16.

    Communication:
        None in forward, one all_reduce in backward; none at all with one rank.

    Example:
        ```python
        logits = F.linear(copy_to_group(hidden, tp_group), weight[shard.start : shard.stop])
        ```
    """
    if group is None or dist.get_world_size(group) == 1:
        return values
    result: Tensor = _CopyToGroup.apply(values, group)  # type: ignore[no-untyped-call]
    return result


class _VocabParallelWeight(HoldsGroup):
    """Rows [shard.start, shard.stop) of a [vocab_size, width] weight."""

    def __init__(
        self,
        shard: VocabShard,
        width: int,
        group: dist.ProcessGroup | None,
        generator: torch.Generator,
        std: float,
        weight: nn.Parameter | None,
    ) -> None:
        super().__init__()
        self.shard, self.group = shard, group
        if weight is None:
            full = torch.empty(shard.vocab_size, width).normal_(0.0, std, generator=generator)
            weight = nn.Parameter(full[shard.start : shard.stop].clone())
        elif tuple(weight.shape) != (shard.size, width):
            raise ValueError(
                f"weight of shape {tuple(weight.shape)} does not fit shard={shard}: "
                f"it must be [{shard.size}, {width}]"
            )
        self.weight = weight

    def extra_repr(self) -> str:
        shard = self.shard
        return f"rows {shard.start}:{shard.stop} of {shard.vocab_size}, {self.weight.shape[1]} wide"


class VocabParallelEmbedding(_VocabParallelWeight):
    """ids [...] -> vectors [..., width], the same on every rank of the group.

    Args:
        shard: the rows of the weight that live here.
        width: number of elements of a vector.
        group: the tensor-parallel group; None is one rank.
        generator: draws the whole weight; it must have the same seed on every rank.
        std: standard deviation of the initial weights, which are normal with mean 0.

    Raises:
        ValueError: on CPU, for an id outside the vocabulary.

    Communication:
        One all_reduce in forward.

    Example:
        ```python
        embedding = VocabParallelEmbedding(shard, 128, tp_group, generator=torch.Generator())
        ```
    """

    def __init__(
        self,
        shard: VocabShard,
        width: int,
        group: dist.ProcessGroup | None,
        *,
        generator: torch.Generator,
        std: float = 0.02,
    ) -> None:
        super().__init__(shard, width, group, generator, std, None)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] -> [..., width]. On a CPU an id outside the vocabulary is a ValueError.

        On an accelerator it gives a vector of zeros: a look at the ids would wait for the device.
        """
        shard = self.shard
        if ids.device.type == "cpu" and ids.numel():
            low, high = int(ids.min()), int(ids.max())
            if low < 0 or high >= shard.vocab_size:
                wrong = low if low < 0 else high
                raise ValueError(
                    f"ids contain {wrong}, which is not in the vocabulary [0, {shard.vocab_size})"
                )
        elsewhere = (ids < shard.start) | (ids >= shard.stop)
        if shard.size == 0:  # no rows: zeros that still belong to the weight's graph
            vectors = self.weight.sum() + self.weight.new_zeros(*ids.shape, self.weight.shape[1])
        else:
            vectors = F.embedding((ids - shard.start).masked_fill(elsewhere, 0), self.weight)
            vectors = vectors.masked_fill(elsewhere.unsqueeze(-1), 0.0)
        return reduce_from_group(vectors, self.group)


class VocabParallelHead(_VocabParallelWeight):
    """hidden [..., width] -> this rank's logits [..., stop - start].

    Args:
        shard: the rows of the weight that live here.
        width: number of elements of a hidden state.
        group: the tensor-parallel group; None is one rank.
        generator: draws the whole weight; it must have the same seed on every rank. Unused with
            ``weight``.
        std: standard deviation of the initial weights, which are normal with mean 0.
        weight: the weight of an embedding of the same shard, to tie the two.

    Raises:
        ValueError: for a ``weight`` that does not fit the shard.

    Communication:
        One all_reduce in backward: the gradient of the hidden states is summed.

    Example:
        ```python
        head = VocabParallelHead(shard, 128, tp_group, generator=g, weight=embedding.weight)
        loss = cross_entropy(head(hidden), target, group=tp_group, shard=shard)
        loss = head.loss(hidden, target)  # the same; logits never exist whole
        ```
    """

    def __init__(
        self,
        shard: VocabShard,
        width: int,
        group: dist.ProcessGroup | None,
        *,
        generator: torch.Generator,
        std: float = 0.02,
        weight: nn.Parameter | None = None,
    ) -> None:
        super().__init__(shard, width, group, generator, std, weight)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [..., width], the same on every rank -> this rank's logits [..., shard.size]."""
        return F.linear(copy_to_group(hidden, self.group), self.weight)

    def loss(self, hidden: Tensor, target: Tensor, **options: Any) -> Any:
        """The loss of ``self(hidden)``, without whole logits.

        Args:
            hidden: [..., width], the same on every rank; with ``sequence_parallel=True`` this
                rank's part of the sequence.
            target: [...] vocabulary ids, the same on every rank.
            options: all options of ``linear_cross_entropy`` but ``group`` and ``shard``.

        Returns:
            What ``linear_cross_entropy`` returns.

        Communication:
            That of ``linear_cross_entropy``, which also sums the gradient of the hidden states.
        """
        return linear_cross_entropy(
            hidden, self.weight, target, group=self.group, shard=self.shard, **options
        )


def vocab_parallel_parameters(model: nn.Module) -> dict[str, VocabShard]:
    """Name of each parameter that is split over the vocabulary -> the rows that live here.

    Args:
        model: with layers of this file anywhere inside.

    Returns:
        For example {"head.weight": VocabShard(0, 500, 1000)}. Communicates nothing.

    Example:
        ```python
        split = vocab_parallel_parameters(model)
        ```
    """
    return {
        f"{name}.weight" if name else "weight": module.shard
        for name, module in model.named_modules()
        if isinstance(module, _VocabParallelWeight)
    }
