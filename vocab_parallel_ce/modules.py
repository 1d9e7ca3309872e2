"""The losses as nn.Modules."""

from __future__ import annotations

import inspect

import torch.distributed as dist
from torch import Tensor

from .api import cross_entropy
from .held_group import HoldsGroup
from .linear_api import linear_cross_entropy
from .shard import VocabShard


class VocabParallelCrossEntropyLoss(HoldsGroup):
    """``cross_entropy`` with its options fixed at construction, like ``nn.CrossEntropyLoss``.

    Args:
        weight: [vocab_size] class weights, the full vector on every rank. It becomes a buffer: it
            moves with the module and is saved with it.
        reduction: "none", "sum" or "mean".
        ignore_index: rows with this target have loss 0 and gradient 0.
        label_smoothing: in [0, 1], PyTorch's formula over the whole vocabulary.
        lse_square_scale: adds this times lse^2 to every kept row (z-loss).
        return_zloss: a call returns a pair (loss, zloss). ``zloss`` is the z-loss part of ``loss``,
            which still contains it.
        group: the tensor-parallel ``ProcessGroup`` over which the vocabulary is split. None means
            one rank, not the default group: where the process is one of several ranks, a call with
            neither ``group`` nor ``shard`` warns once.
        shard: which ids ``input`` holds, a ``VocabShard``. None means equal shards in rank order.
        inplace_backward: let the gradient overwrite the memory of ``input``: the loss then needs
            no memory of the size of the logits. Every later read of ``input`` sees the gradient, a
            second backward is refused, and so are leaves and tensors whose elements share memory.
        scale: multiplies the logits inside the kernels: 1 / temperature. A finite number.
        softcap: the logits become ``softcap * tanh(logits / softcap)`` before ``scale``. None and 0
            leave them as they are.
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

    A copy by ``copy.deepcopy`` (an average of weights, a reference model) shares the group object.
    ``pickle`` and ``torch.save`` of the whole module keep the group's name and its global ranks.

    Raises:
        As ``cross_entropy`` does, when the module is called.
        RuntimeError: at the first call after loading, where this process has no group of that name
            with exactly these ranks; ``module.group = ...`` says which one to use.

    Communication:
        None at construction; in a call that of ``cross_entropy``.

    Example:
        ```python
        criterion = VocabParallelCrossEntropyLoss(label_smoothing=0.1, group=tp_group)
        loss = criterion(logits, target)
        ```
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
        return_zloss: bool = False,
        group: dist.ProcessGroup | None = None,
        shard: VocabShard | None = None,
        inplace_backward: bool = False,
        scale: float = 1.0,
        softcap: float | None = None,
        engine: str = "auto",
        collective: str = "auto",
        check: bool | None = None,
        finite_logits: bool = False,
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.reduction = reduction
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.lse_square_scale = lse_square_scale
        self.return_zloss = return_zloss
        self.group = group
        self.shard = shard
        self.inplace_backward = inplace_backward
        self.scale = scale
        self.softcap = softcap
        self.engine = engine
        self.collective = collective
        self.check = check
        self.finite_logits = finite_logits

    def forward(
        self, input: Tensor, target: Tensor, normalizer: Tensor | float | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The loss of a batch.

        Args:
            input: logits [..., C_r] of this rank's shard.
            target: [...] vocabulary ids, the same on every rank.
            normalizer: replaces the denominators of "mean"; it changes with every batch.

        Returns:
            The loss in fp32 (fp64 for fp64 logits), [...] for "none", else 0-d. With
            ``return_zloss`` a pair of such tensors, (loss, zloss).
        """
        return cross_entropy(
            input,
            target,
            self.weight,
            self.reduction,
            self.ignore_index,
            self.label_smoothing,
            lse_square_scale=self.lse_square_scale,
            return_zloss=self.return_zloss,
            group=self.group,
            shard=self.shard,
            inplace_backward=self.inplace_backward,
            normalizer=normalizer,
            scale=self.scale,
            softcap=self.softcap,
            engine=self.engine,
            collective=self.collective,
            check=self.check,
            finite_logits=self.finite_logits,
        )

    def extra_repr(self) -> str:
        return _told(self)


class VocabParallelLinearCrossEntropyLoss(HoldsGroup):
    """``linear_cross_entropy`` with its options fixed at construction.

    The module does not own the head: hidden states and the head's weight are passed to each call,
    so tied weights and wrapped parameters stay as they are.

    Args:
        weight: [vocab_size] class weights, the full vector on every rank. It becomes a buffer: it
            moves with the module and is saved with it.
        reduction: "none", "sum" or "mean".
        ignore_index: rows with this target have loss 0 and gradient 0.
        label_smoothing: in [0, 1], PyTorch's formula over the whole vocabulary.
        lse_square_scale: adds this times lse^2 to every kept row (z-loss).
        return_zloss: a call returns a pair (loss, zloss). ``zloss`` is the z-loss part of ``loss``,
            which still contains it.
        group: the tensor-parallel ``ProcessGroup`` over which the vocabulary is split. None means
            one rank, not the default group: where the process is one of several ranks, a call with
            neither ``group`` nor ``shard`` warns once.
        shard: which ids ``linear_weight`` holds, a ``VocabShard``. None means equal shards in rank
            order.
        scale: multiplies the logits inside the kernels: 1 / temperature. A finite number.
        softcap: the logits become ``softcap * tanh(logits / softcap)`` before ``scale``. None and 0
            leave them as they are.
        engine: "auto" takes the fastest engine of the tensors' device; or "cpu", "npu", "triton",
            "eager".
        collective: "all_gather" (one collective; the loss is bitwise the same on every rank),
            "all_reduce" (two collectives), or "auto", which gathers up to about 6 MB.
        check: True adds a small exchange before each call, so that all ranks raise together where
            one has a wrong argument or where they disagree. An error in backward is not told to the
            other ranks. None follows the variable VOCAB_PARALLEL_CE_CHECK. It must be the same on
            every rank.
        gradient: "forward", "recompute" or "auto": when gradients are computed.
        hidden_gradient: "summed" over the group, or "partial": this rank's share.
        sequence_parallel: dimension 0 of ``input`` is this rank's part of the sequence.
        scratch_mib: memory for the chunk of logits, in MiB. None: at most 128 on a CPU, 256
            elsewhere.
        drop_ignored: leave ignored rows out of the matrix products on an accelerator too, at the
            price of waiting for the device.

    ``linear_cross_entropy`` documents the last five in full.

    A copy by ``copy.deepcopy`` shares the group object. ``pickle`` and ``torch.save`` of the whole
    module keep the group's name and its global ranks.

    Raises:
        As ``linear_cross_entropy`` does, when the module is called.
        RuntimeError: at the first call after loading, where this process has no group of that name
            with exactly these ranks; ``module.group = ...`` says which one to use.

    Communication:
        None at construction; in a call that of ``linear_cross_entropy``.

    Example:
        ```python
        criterion = VocabParallelLinearCrossEntropyLoss(label_smoothing=0.1, group=tp_group)
        loss = criterion(hidden, head.weight, target)
        ```
    """

    weight: Tensor | None

    def __init__(
        self,
        *,
        weight: Tensor | None = None,
        reduction: str = "mean",
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        lse_square_scale: float = 0.0,
        return_zloss: bool = False,
        group: dist.ProcessGroup | None = None,
        shard: VocabShard | None = None,
        scale: float = 1.0,
        softcap: float | None = None,
        engine: str = "auto",
        collective: str = "auto",
        check: bool | None = None,
        gradient: str = "auto",
        hidden_gradient: str = "summed",
        sequence_parallel: bool = False,
        scratch_mib: float | None = None,
        drop_ignored: bool = False,
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.reduction = reduction
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.lse_square_scale = lse_square_scale
        self.return_zloss = return_zloss
        self.group = group
        self.shard = shard
        self.scale = scale
        self.softcap = softcap
        self.engine = engine
        self.collective = collective
        self.check = check
        self.gradient = gradient
        self.hidden_gradient = hidden_gradient
        self.sequence_parallel = sequence_parallel
        self.scratch_mib = scratch_mib
        self.drop_ignored = drop_ignored

    def forward(
        self,
        input: Tensor,
        linear_weight: Tensor,
        target: Tensor,
        linear_bias: Tensor | None = None,
        normalizer: Tensor | float | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The loss of a batch.

        Args:
            input: hidden states [..., H], the same on every rank.
            linear_weight: [V_r, H] this rank's rows of the head.
            target: [...] vocabulary ids, the same on every rank.
            linear_bias: [V_r] this rank's part of the head's bias, or None.
            normalizer: replaces the denominators of "mean"; it changes with every batch.

        Returns:
            The loss in fp32 (fp64 for fp64 hidden states), [...] for "none", else 0-d. With
            ``return_zloss`` a pair of such tensors, (loss, zloss).
        """
        return linear_cross_entropy(
            input,
            linear_weight,
            target,
            linear_bias=linear_bias,
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            lse_square_scale=self.lse_square_scale,
            return_zloss=self.return_zloss,
            group=self.group,
            shard=self.shard,
            normalizer=normalizer,
            scale=self.scale,
            softcap=self.softcap,
            engine=self.engine,
            collective=self.collective,
            check=self.check,
            gradient=self.gradient,
            hidden_gradient=self.hidden_gradient,
            sequence_parallel=self.sequence_parallel,
            scratch_mib=self.scratch_mib,
            drop_ignored=self.drop_ignored,
        )

    def extra_repr(self) -> str:
        return _told(self)


def _told(module: HoldsGroup) -> str:
    """What ``print(module)`` shows: the reduction, and every other option that was changed."""
    told = []
    for name, parameter in inspect.signature(type(module).__init__).parameters.items():
        if name in ("self", "weight", "group"):
            continue
        value = getattr(module, name)
        if name == "reduction" or value != parameter.default:
            told.append(f"{name}={value!r}")
    return ", ".join(told)
