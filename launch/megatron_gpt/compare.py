"""Megatron's two losses and ours on one batch of one model: what each says, and what it costs.

Loss and gradient norm come from whole steps without an update: the same batch, the same weights,
through Megatron's own schedule. Time, memory and collectives come from the loss alone, called as
the model calls it, on the logits of that batch; the contenders take turns. The gradient of the
logits is compared with fp64.
"""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from vocab_parallel_ce import VocabShard
from vocab_parallel_ce.launch.measuring.collectives import count_collectives
from vocab_parallel_ce.launch.measuring.device import MIB, synchronize
from vocab_parallel_ce.launch.measuring.logits import produced
from vocab_parallel_ce.launch.measuring.memory import exact_peaks, peak_extra
from vocab_parallel_ce.launch.measuring.passes import Pass, time_pass
from vocab_parallel_ce.launch.measuring.rounds import turns
from vocab_parallel_ce.launch.megatron_gpt.loss import LossChoice, loss_in_use
from vocab_parallel_ce.launch.megatron_gpt.model import has_compiler
from vocab_parallel_ce.launch.megatron_gpt.trainer import MegatronTrainer, MicroBatch
from vocab_parallel_ce.launch.terminal import Table, numbers, words
from vocab_parallel_ce.launch.train.selfcheck import Errors, LossCall, check_against_reference
from vocab_parallel_ce.launch.train.text import IGNORE_INDEX
from vocab_parallel_ce.launch.train.trainer import sum_of_squares
from vocab_parallel_ce.parallel.groups import ParallelGroups

ROUNDS = 7
ROWS_AGAINST_FP64 = 256


@dataclass(frozen=True)
class Contender:
    """A loss by name."""

    label: str
    choice: LossChoice
    inplace: bool = False


CONTENDERS = (
    Contender("Megatron-core, unfused", LossChoice.megatron),
    Contender("Megatron-core, fused", LossChoice.megatron_fused),
    Contender("ours, out of place", LossChoice.ours),
    Contender("ours, in place", LossChoice.ours, inplace=True),
)


@dataclass
class Result:
    """What was seen of one contender; times, memory and collectives of rank 0."""

    contender: Contender
    loss: float
    """Mean over the tokens of the global batch, z-loss included."""
    z_loss: float | None
    gradient_norm: float
    """2-norm over all parameters, before clipping."""
    errors: Errors
    """Of the gradient of the logits."""
    collectives: tuple[int | None, int | None] = (None, None)
    """Forward and backward of the loss."""
    passes: list[Pass] = field(default_factory=list)
    peak_bytes: int | None = None
    """Beyond what was there before the loss was called, its gradient included."""

    @property
    def milliseconds(self) -> tuple[float, float]:
        """Medians of forward and backward."""
        return (
            1000 * statistics.median(p.forward for p in self.passes),
            1000 * statistics.median(p.backward for p in self.passes),
        )


def gradient_norm(trainer: MegatronTrainer) -> float:
    """2-norm over all parameters of all tensor-parallel ranks, each counted once."""
    groups = trainer.groups
    squares = torch.zeros(2, device=groups.device)  # of split and of replicated parameters
    for parameter in trainer.model.parameters():
        split = getattr(parameter, "tensor_model_parallel", False)
        squares[0 if split else 1] += sum_of_squares(parameter.main_grad)
    if groups.tp > 1:
        dist.all_reduce(squares[:1], group=groups.tp_group)
    return math.sqrt(float(squares.sum()))


@dataclass(frozen=True)
class _ModelLossCall(LossCall):
    """The loss as the model calls it, whichever is in use, for the check against fp64."""

    trainer: MegatronTrainer

    def loss(self, logits: Tensor, groups: ParallelGroups) -> Tensor:
        target = self.target[None]
        batch = MicroBatch.of(target, target, groups.device)
        # A tensor of its own: Megatron's loss writes into its logits, which a view refuses.
        return _mean_loss(self.trainer, logits[:, None] * 1, batch)


def _mean_loss(trainer: MegatronTrainer, logits: Tensor, batch: MicroBatch) -> Tensor:
    """[s, b, C_r] -> 0-d; the loss as the model calls it, and nothing of Megatron around it."""
    losses: Tensor = trainer.meter.inner(batch.labels, logits)  # [b, s]
    return (losses * batch.mask).sum() / batch.mask.sum()


class _Comparison:
    """One micro-batch of the next step, its logits, and what is done with them."""

    def __init__(self, trainer: MegatronTrainer) -> None:
        self.trainer, self.groups = trainer, trainer.groups
        self.micro_batches = trainer.read()
        self.batch = self.micro_batches[0]
        positions = trainer.positions.expand_as(self.batch.ids)
        with torch.no_grad():
            logits = trainer.gpt(self.batch.ids, positions, trainer.attention_mask)
        self.logits: Tensor = logits.transpose(0, 1).contiguous()  # [s, b, C_r], as in training
        self.buffer = torch.empty_like(self.logits)

    def use(self, contender: Contender) -> AbstractContextManager[None]:
        options = self.trainer.options
        return loss_in_use(
            contender.choice,
            self.trainer.gpt,
            vocab_size=options.shape.vocab_size,
            inplace=contender.inplace,
            z_loss=options.z_loss,
        )

    def judge(self, contender: Contender) -> Result:
        """Everything that one run tells; leaves the contender warm."""
        with self.use(contender):
            report = self.trainer.forward_backward(self.micro_batches)
            norm = gradient_norm(self.trainer)
            self.trainer.meter.take()
            errors = check_against_reference(self._call(contender), self.groups)
            logits = self._fresh_logits()
            loss, forward = count_collectives(lambda: _mean_loss(self.trainer, logits, self.batch))
            _, backward = count_collectives(loss.backward)
        return Result(
            contender, report["lm loss"], report.get("z loss"), norm, errors, (forward, backward)
        )

    def time(self, contender: Contender) -> Pass:
        with self.use(contender):
            logits = self._fresh_logits()
            return time_pass(
                lambda: _mean_loss(self.trainer, logits, self.batch), self.groups.device
            )

    def peak(self, contender: Contender) -> int | None:
        with self.use(contender):
            logits = self._fresh_logits()
            return peak_extra(
                lambda: _mean_loss(self.trainer, logits, self.batch).backward(),
                self.groups.device,
            )

    def _fresh_logits(self) -> Tensor:
        """As the head had just made them: a non-leaf whose gradient is dropped when it arrives."""
        self.buffer.copy_(self.logits)  # the last contender may have written into them
        logits = produced(self.buffer)
        self.groups.barrier()
        synchronize(self.groups.device)
        return logits

    def _call(self, contender: Contender) -> _ModelLossCall:
        """Rows of the batch for the check. Padding takes part in Megatron's softmax, not in ours:
        each is held to the truth about what it computes."""
        trainer, groups = self.trainer, self.groups
        columns, ours = self.logits.shape[-1], contender.choice is LossChoice.ours
        start = groups.tp_rank * columns
        rows = self.logits.flatten(0, 1)[:ROWS_AGAINST_FP64].clone()
        if ours:
            rows[:, max(0, trainer.options.shape.vocab_size - start) :] = -torch.inf
        labels = self.batch.labels.masked_fill(self.batch.mask == 0, IGNORE_INDEX)
        target = labels.transpose(0, 1).flatten()[:ROWS_AGAINST_FP64]
        return _ModelLossCall(
            logits=rows,
            target=target,
            shard=VocabShard(start, start + columns, columns * groups.tp),
            normalizer=(target != IGNORE_INDEX).sum().float(),
            label_smoothing=0.0,
            z_loss=trainer.options.z_loss if ours else 0.0,
            inplace=contender.inplace,
            trainer=trainer,
        )


def compare(trainer: MegatronTrainer, rounds: int = ROUNDS) -> list[Result]:
    """All contenders on the next batch of the run; the weights stay as they are.

    All ranks take part; takes three times the memory of this rank's logits beside what the losses
    take.
    """
    comparison = _Comparison(trainer)
    results = [comparison.judge(contender) for contender in CONTENDERS]
    gc.collect()
    for _, result in turns(results, rounds):
        result.passes.append(comparison.time(result.contender))
    with exact_peaks():  # afterwards: times need another setting of malloc
        for result in results:
            comparison.peak(result.contender)  # warms up under the new setting
            result.peak_bytes = comparison.peak(result.contender)
    return results


def table(results: Sequence[Result], trainer: MegatronTrainer) -> Table:
    """What ``compare`` found, for a reader."""
    shape = [trainer.options.shape.context, len(trainer.read()[0].ids), trainer.columns]
    caption = (
        "Gradient error: of the logits, against fp64, relative to the largest element. Times: "
        f"medians of {len(results[0].passes)}, the loss alone. Peak: extra memory while it runs, "
        "its gradient included. Times, memory and collectives (forward + backward) of rank 0."
    )
    if trainer.groups.device.type == "cpu" and not has_compiler():
        caption += " Megatron's fused loss is not compiled here, for want of a C++ compiler."
    has_z = any(result.z_loss is not None for result in results)
    out = Table(
        f"The next batch of this run, the same weights; logits {shape} "
        f"{trainer.options.dtype} on each rank, tp {trainer.groups.tp}",
        [
            *words("loss of"),
            *numbers(
                "loss", *["of it z"] * has_z, "gradient\nnorm", "gradient\nerror", "forward\nms",
                "backward\nms", "peak\nMiB", "collectives",
            ),
        ],
        caption=caption,
    )  # fmt: skip
    for result in results:
        forward, backward = result.milliseconds
        z_loss = "none" if result.z_loss is None else f"{result.z_loss:.6f}"
        out.add(
            result.contender.label,
            f"{result.loss:.6f}",
            *[z_loss] * has_z,
            f"{result.gradient_norm:.6f}",
            f"{result.errors.gradient_error:.1e}",
            f"{forward:.1f}",
            f"{backward:.1f}",
            "?" if result.peak_bytes is None else f"{result.peak_bytes / MIB:.1f}",
            " + ".join("?" if n is None else str(n) for n in result.collectives),
        )
    return out
