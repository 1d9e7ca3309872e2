"""torchtitan: a loss for its configuration, over logits that stay split.

    from vocab_parallel_ce.parallel.torchtitan import VocabParallelCrossEntropyLoss

    trainer_config.loss = VocabParallelCrossEntropyLoss.Config(global_vocab_size=128_256)

torchtitan's trainer builds the loss that its configuration names, and calls it with logits, labels
and the number of valid tokens on all ranks. It expects the sum over the tokens, divided by that
number. Logits are DTensors that are split over "tp", or this rank's plain part of them. Both are
taken as they are, without an fp32 copy. The loss also works in
``ChunkedLossWrapper.Config(loss_fn=...)``.

The class inherits from torchtitan's ``BaseLoss``. torchtitan is imported only when the class is
first used. Read and run with torchtitan 0.3.0.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from vocab_parallel_ce import VocabShard, cross_entropy

KNOWN = "0.3.0"
IGNORE_INDEX = -100
"""torchtitan's too"""
TP = "tp"


def __getattr__(name: str) -> Any:
    if name == "VocabParallelCrossEntropyLoss":
        return _loss_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def summed_loss(
    pred: Tensor, labels: Tensor, *, global_vocab_size: int | None = None, **options: Any
) -> Tensor:
    """The sum of the losses of all tokens of this rank's rows; fp32, 0-d.

    Args:
        pred: logits [B, S, V] as a DTensor, split over the mesh dimension "tp" in its last one or
            not at all; or this rank's plain part [B, S, V / tp] under torchtitan's "spmd_types".
        labels: [B, S] ids, plain or a DTensor of the same mesh; -100 does not count.
        global_vocab_size: the size of the whole vocabulary; needed for plain parts.
        options: of ``cross_entropy``: label_smoothing, lse_square_scale, inplace_backward.

    Returns:
        A plain tensor. If ``labels`` is a DTensor, a DTensor: partial over mesh dimensions that
        split rows, replicated over the others.

    Raises:
        ValueError: for logits that are split otherwise, or parts without ``global_vocab_size``.

    Communication:
        That of ``cross_entropy`` over "tp".

    Example:
        ```python
        loss = summed_loss(pred, labels, label_smoothing=0.1) / global_valid_tokens
        ```
    """
    if not isinstance(pred, DTensor):
        group = _spmd_group()
        if group is not None and global_vocab_size is None:
            raise ValueError(
                "global_vocab_size is None: this rank holds a plain part of the logits, which does "
                "not tell the size of the whole; set it in the loss's Config"
            )
        return _of_part(pred, labels, group, global_vocab_size or pred.shape[-1], options)
    mesh, last = pred.device_mesh, pred.ndim - 1
    split = [d for d, p in enumerate(pred.placements) if isinstance(p, Shard) and p.dim == last]
    wrong = [p for p in pred.placements if p.is_partial()]
    if len(split) > 1 or wrong:
        raise ValueError(
            f"logits of placements {pred.placements} cannot be served: expected the vocabulary "
            "split over one mesh dimension at most, and no Partial"
        )
    group = mesh.get_group(split[0]) if split else None
    plain = labels.to_local() if isinstance(labels, DTensor) else labels
    loss = _of_part(pred.to_local(), plain, group, pred.shape[-1], options)
    if not isinstance(labels, DTensor):
        return loss
    rows = [
        Partial() if isinstance(p, Shard) and d not in split else Replicate()
        for d, p in enumerate(pred.placements)
    ]
    return DTensor.from_local(loss, mesh, rows, run_check=False)


def _of_part(
    part: Tensor, labels: Tensor, group: dist.ProcessGroup | None, size: int, options: Any
) -> Tensor:
    loss = cross_entropy(
        part,
        labels,
        reduction="sum",
        ignore_index=IGNORE_INDEX,
        group=group,
        shard=VocabShard.even(size, group),
        **options,
    )
    assert isinstance(loss, Tensor)
    return loss


def _spmd_group() -> dist.ProcessGroup | None:
    """The ranks that split plain logits; None where torchtitan does not split them."""
    from torchtitan.distributed.spmd_types import current_spmd_mesh, spmd_mesh_size
    from torchtitan.distributed.utils import get_spmd_backend

    if get_spmd_backend() != "spmd_types" or spmd_mesh_size(TP) <= 1:
        return None
    group: dist.ProcessGroup = current_spmd_mesh().get_group(TP)
    return group


@cache
def _loss_class() -> type:
    try:
        from spmd_types import no_typecheck
        from torchtitan.components.loss import BaseLoss
    except ImportError as problem:
        raise ImportError(
            f"torchtitan.components.loss.BaseLoss cannot be imported ({problem}); known to work: "
            f"torchtitan {KNOWN}"
        ) from problem

    class VocabParallelCrossEntropyLoss(BaseLoss):  # type: ignore[misc]
        """torchtitan's ``CrossEntropyLoss``, by this library.

        Its Config has ``global_vocab_size`` as torchtitan's, and ``label_smoothing``,
        ``lse_square_scale`` (z-loss) and ``inplace_backward`` of ``cross_entropy``.
        """

        @dataclass(kw_only=True, slots=True)
        class Config(BaseLoss.Config):  # type: ignore[misc]
            global_vocab_size: int | None = None
            label_smoothing: float = 0.0
            lse_square_scale: float = 0.0
            inplace_backward: bool = False

        def __init__(self, config: Any, *, compile_config: Any = None) -> None:
            self.fn = partial(
                summed_loss,
                global_vocab_size=config.global_vocab_size,
                label_smoothing=config.label_smoothing,
                lse_square_scale=config.lse_square_scale,
                inplace_backward=config.inplace_backward,
            )
            self._maybe_compile(compile_config)
            # torchtitan's checker of types (debug.spmd_typechecking) knows its own functions alone;
            # what BaseLoss says of the result still holds.
            self.fn = no_typecheck()(self.fn)

    VocabParallelCrossEntropyLoss.__module__ = __name__
    VocabParallelCrossEntropyLoss.__qualname__ = "VocabParallelCrossEntropyLoss"
    return VocabParallelCrossEntropyLoss
