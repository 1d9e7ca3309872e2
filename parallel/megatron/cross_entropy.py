"""One call of Megatron's cross-entropy: its arguments and ``install``'s options -> loss per token.

Here Megatron's ways are put into this library's words: its group, its padded vocabulary, its
label smoothing, its labels that only a loss mask leaves out. Nothing here imports Megatron.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vocab_parallel_ce import VocabShard
from vocab_parallel_ce.arguments import Options, Outputs
from vocab_parallel_ce.checks import admit, prepare
from vocab_parallel_ce.kinds import without_numbers
from vocab_parallel_ce.option_checks import check_numbers, is_number
from vocab_parallel_ce.preflight import together
from vocab_parallel_ce.primitive import row_statistics
from vocab_parallel_ce.reduction import reduce_rows, row_losses
from vocab_parallel_ce.shard import group_rank_and_size
from vocab_parallel_ce.tensor_checks import TARGET_DTYPES

INVALID_TARGET = ("error", "ignore")
SMOOTHING_FORMULAS = ("megatron", "pytorch")

LOOKS_GATHERED = "looks gathered"
# What an error of the library says -> what mends it in a Megatron run.
_WAYS_OUT = {
    "target is out of range": "install(invalid_target='ignore') where loss_mask alone marks them",
    LOOKS_GATHERED: "in Megatron: GPTModel(parallel_output=True)",
}


@dataclass(frozen=True)
class MegatronOptions:
    """The arguments of ``install``, where they are documented; checked when made."""

    vocab_size: int | None = None
    shard: VocabShard | None = None
    ignore_index: int = -100
    invalid_target: str = "error"
    lse_square_scale: float = 0.0
    softcap: float | None = None
    inplace_backward: bool = False
    smoothing_formula: str = "megatron"
    engine: str = "auto"
    collective: str = "auto"
    check: bool | None = None
    finite_logits: bool = False

    def __post_init__(self) -> None:
        for name, allowed in (
            ("invalid_target", INVALID_TARGET),
            ("smoothing_formula", SMOOTHING_FORMULAS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}"
                )
        size = self.vocab_size
        if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
            raise ValueError(
                "vocab_size must be the number of ids without Megatron's padding, an int of at "
                f"least 1, or None, got {size!r}"
            )
        if self.shard is not None and not isinstance(self.shard, VocabShard):
            raise TypeError(f"shard must be a VocabShard or None, got {type(self.shard).__name__}")
        if self.shard is not None and size not in (None, self.shard.vocab_size):
            raise ValueError(
                f"vocab_size={size} and shard={self.shard} disagree; pass one of them: the shard "
                "tells the size as well"
            )
        check_numbers(self.for_group(None))

    def for_group(self, group: dist.ProcessGroup | None) -> Options:
        """In the words of the library, but for what follows from the logits."""
        return Options(
            ignore_index=self.ignore_index,
            lse_square_scale=self.lse_square_scale,
            softcap=self.softcap,
            group=group,
            inplace_backward=self.inplace_backward,
            engine=self.engine,
            collective=self.collective,
            check=self.check,
            finite_logits=self.finite_logits,
        )


def tensor_parallel_group() -> dist.ProcessGroup | None:
    """Megatron's tensor-parallel group; None, one rank, where Megatron has made no groups."""
    state: Any = sys.modules.get("megatron.core.parallel_state")
    if state is None:
        return None
    group: dist.ProcessGroup | None = state.get_tensor_model_parallel_group(check_initialized=False)
    return group


def process_group(tp_group: Any) -> dist.ProcessGroup | None:
    """Megatron asks a group for rank() and size() alone: whatever says that it is one rank does."""
    if tp_group is None:
        return tensor_parallel_group()
    if isinstance(tp_group, dist.ProcessGroup):
        return tp_group
    size = getattr(tp_group, "size", None)
    if callable(size) and size() == 1:
        return None
    raise TypeError(
        "tp_group must be a torch.distributed.ProcessGroup that this rank belongs to, None, or "
        f"something whose size() is 1, got {type(tp_group).__name__}"
    )


def per_token_loss(
    logits: Tensor,
    target: Tensor,
    label_smoothing: float,
    tp_group: dist.ProcessGroup | None,
    options: MegatronOptions,
    trust_shards: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Logits [*, v/tp] and target [*] -> loss [*] with z, and the z part of it where it is on.

    ``trust_shards``: equal shards in rank order, whatever they hold; else logits that all ranks
    hold alike are an error that says ``LOOKS_GATHERED``, where nothing is known of the vocabulary.

    fp32, fp64 for fp64 logits; the same on every rank. One or two collectives, none in backward.
    """
    group = process_group(tp_group)
    arguments = (logits, target, label_smoothing, group, options, trust_shards)
    if without_numbers(logits):
        return _per_token_loss(*arguments)
    with together(group, options.check):
        return _per_token_loss(*arguments)


def _per_token_loss(
    logits: Tensor,
    target: Tensor,
    label_smoothing: float,
    group: dist.ProcessGroup | None,
    options: MegatronOptions,
    trust_shards: bool,
) -> tuple[Tensor, Tensor | None]:
    call = options.for_group(group)
    logits, target, _, _ = admit(logits, target, None, call)
    shard = shard_of(logits, call, options, trust_shards)
    classes = shard.vocab_size if shard is not None else _columns(logits) * _world(group)
    smoothing = pytorch_smoothing(label_smoothing, classes, options.smoothing_formula)
    if options.invalid_target == "ignore":
        target = without_invalid(target, classes, options.ignore_index)
    # Beyond 1 it is still a distribution (see below), but the library's own argument ends there.
    call = call._replace(shard=shard, label_smoothing=min(smoothing, 1.0))
    try:
        request = prepare(logits, target, None, call, Outputs())
        request = replace(request, label_smoothing=smoothing)
        stats, *_ = row_statistics(logits, target, None, request, group, options.inplace_backward)
    except ValueError as problem:
        for sign, way_out in _WAYS_OUT.items():
            if sign in str(problem):
                raise ValueError(f"{problem}; {way_out}") from problem
        raise
    loss, zloss = reduce_rows(row_losses(stats, target.reshape(-1), None, request), "none")
    shape = target.shape
    return loss.view(shape), None if zloss is None else zloss.view(shape)


def _columns(logits: Tensor) -> int:
    # What is no tensor, or has no dimension, is left for ``prepare`` to refuse.
    return logits.shape[-1] if isinstance(logits, Tensor) and logits.dim() else 1


def _world(group: dist.ProcessGroup | None) -> int:
    return group_rank_and_size(group)[1]


def shard_of(
    logits: Tensor, call: Options, options: MegatronOptions, trust_shards: bool
) -> VocabShard | None:
    """The ids of this rank: as told, or Megatron's equal shards cut to the true vocabulary.

    None where nothing is known of the vocabulary: the library then infers equal shards, and looks
    for gathered logits by their contents. Not where shards are trusted.
    """
    size = options.vocab_size
    if options.shard is not None:
        return options.shard
    rank, world = group_rank_and_size(call.group)
    columns = _columns(logits)
    if size is None:
        if not trust_shards or columns == 0:
            return None
        return VocabShard(rank * columns, (rank + 1) * columns, world * columns)
    if world > 1 and columns >= size:
        raise ValueError(
            f"input looks gathered: it has {columns} columns on rank {rank} of the {world} of the "
            f"group, and vocab_size={size} fits into one rank; pass this rank's shard (in Megatron:"
            " GPTModel(parallel_output=True)), or, for a vocabulary so small that whole ranks are "
            "padding, install(shard=VocabShard(start, stop, vocab_size))"
        )
    return VocabShard(rank * columns, (rank + 1) * columns, size)


def pytorch_smoothing(label_smoothing: float, classes: int, formula: str) -> float:
    """PyTorch's label_smoothing that gives what ``formula`` means by it.

    PyTorch spreads s over all K classes, the target included. Megatron (after NeMo's
    SmoothedCrossEntropyLoss) spreads it over the K - 1 others, which is PyTorch's formula at
    s K / (K - 1): above 1 for s > (K - 1) / K, where the target gets less than any other class.
    """
    if formula == "pytorch":
        check_numbers(Options(label_smoothing=label_smoothing))
        return label_smoothing
    if not is_number(label_smoothing) or not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must lie in [0, 1), got {label_smoothing!r}")
    if label_smoothing == 0:
        return 0.0
    if classes < 2:
        raise ValueError(
            f"label_smoothing={label_smoothing!r} needs at least two classes to spread over, got "
            f"{classes}; use smoothing_formula='pytorch', or no smoothing"
        )
    return label_smoothing * classes / (classes - 1)


def without_invalid(target: Tensor, classes: int, ignore_index: int) -> Tensor:
    """Labels that are no class become ``ignore_index``; nothing is read on the host."""
    if not isinstance(target, Tensor) or target.dtype not in TARGET_DTYPES:
        return target  # for ``prepare`` to refuse
    target = target.long()  # ignore_index may be an int that int32 cannot hold
    return torch.where((target >= 0) & (target < classes), target, ignore_index)
