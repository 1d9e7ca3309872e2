"""A training run of Megatron's own parts: GPTModel, schedule, gradient reduction, optimizer.

The batches, their order and the learning rate are those of ``trainer.py``. The loss of the whole
global batch is divided once, by its number of tokens (Megatron's ``calculate_per_token_loss``), so
that tp, dp and accumulation do not change the curve.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vocab_parallel_ce.launch.megatron_gpt.loss import LossChoice, LossMeter, loss_in_use
from vocab_parallel_ce.launch.megatron_gpt.model import (
    ModelOptions,
    build_gpt,
    build_optimizer,
    wrap,
)
from vocab_parallel_ce.launch.train.progress import StepMetrics, TrainingLog
from vocab_parallel_ce.launch.train.text import END_OF_TEXT_ID, IGNORE_INDEX, Batches, Corpus
from vocab_parallel_ce.launch.train.trainer import DTYPES, TrainOptions, require_finite
from vocab_parallel_ce.parallel.groups import ParallelGroups
from vocab_parallel_ce.parallel.megatron import loss_func


@dataclass(frozen=True)
class MegatronTrainOptions(TrainOptions):
    """What ``TrainOptions`` holds, and what is Megatron's."""

    out: Path = field(default_factory=lambda: Path("runs/megatron"))
    loss: LossChoice = LossChoice.ours
    sequence_parallel: bool = False
    divisible_by: int = 128
    """The vocabulary is padded to a multiple of this on each tensor-parallel rank."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.divisible_by < 1:
            raise ValueError(f"--divisible-by {self.divisible_by} must be at least 1")
        if self.z_loss and self.loss is not LossChoice.ours:
            raise ValueError(
                f"--z-loss {self.z_loss}: Megatron's own loss has none; use --loss ours, or 0"
            )

    @property
    def model(self) -> ModelOptions:
        return ModelOptions(
            self.shape,
            self.sequence_parallel,
            self.divisible_by,
            DTYPES[self.dtype],
        )


@dataclass(frozen=True)
class MegatronMetrics(StepMetrics):
    """One line of metrics.jsonl; `grad_norm` is Megatron's own."""

    milliseconds: float = 0.0
    """Of the whole step, rank 0."""
    loss_milliseconds: float = 0.0
    """Forward and backward of the loss, all micro-batches, rank 0."""
    loss_peak_bytes: int | None = None
    """Extra memory at the peak of the loss, rank 0; None where the system does not tell."""
    z_loss: float | None = None
    """The part of `loss` that is z-loss; None without."""

    def line(self, steps: int) -> str:
        z_loss = "" if self.z_loss is None else f" (z-loss {self.z_loss:.4f})"
        return (
            f"step {self.step:>{len(str(steps))}}/{steps}  loss {self.loss:.4f}{z_loss}  "
            f"gradient norm {self.grad_norm:.3f}  {self.milliseconds:.0f} ms; the loss: "
            f"{self.loss_milliseconds:.1f} ms, {mebibytes(self.loss_peak_bytes)}"
        )


def mebibytes(peak: int | None) -> str:
    return "peak memory not measurable here" if peak is None else f"+{peak / 2**20:.1f} MiB"


@dataclass(frozen=True)
class MicroBatch:
    """What Megatron's data loader would hand out; [b, s] each."""

    ids: Tensor
    labels: Tensor
    """Always a class: Megatron's loss knows no ignored label, the mask takes such rows out."""
    mask: Tensor
    """fp32; 1 where the label counts."""

    @classmethod
    def of(cls, ids: Tensor, target: Tensor, device: torch.device) -> MicroBatch:
        kept = target != IGNORE_INDEX
        labels = target.masked_fill(~kept, END_OF_TEXT_ID)
        return cls(ids.to(device), labels.to(device), kept.float().to(device))


class MegatronTrainer:
    """The state of a run on this rank. The context ``model.megatron`` must be entered."""

    def __init__(
        self, options: MegatronTrainOptions, groups: ParallelGroups, corpus: Corpus
    ) -> None:
        self.options, self.groups = options, groups
        self.micro_batches = options.micro_batches(groups.dp, groups.dp_rank)
        self.batches = Batches(corpus, options.shape.context, options.seed)
        self.gpt = build_gpt(options.model, groups)
        self.model = wrap(self.gpt)
        self.optimizer = build_optimizer(self.model, options.lr, options.weight_decay, options.clip)
        self.meter = LossMeter(self.gpt, groups.device)
        length = options.shape.context
        self.positions = torch.arange(length, device=groups.device)[None]
        future = torch.ones(1, 1, length, length, dtype=torch.bool, device=groups.device)
        self.attention_mask = future.triu(1)  # True: may not be looked at
        self.step = 0

    @property
    def columns(self) -> int:
        """Columns of this rank's logits, padding included."""
        columns: int = self.gpt.vocab_size // self.groups.tp
        return columns

    def warm_up(self) -> None:
        """The loss once on logits of the run's shape: what it compiles, it compiles now."""
        rows = self.micro_batches[0]
        shape = (self.options.shape.context, rows.stop - rows.start)
        logits = torch.zeros(
            *shape, self.columns, dtype=DTYPES[self.options.dtype], device=self.groups.device
        ).requires_grad_()
        labels = torch.zeros(shape[::-1], dtype=torch.int64, device=self.groups.device)
        losses = self.gpt.compute_language_model_loss(labels, logits * 1)
        loss_func(torch.ones_like(losses), losses)[0].backward()
        self.meter.take()

    def train(self, log: TrainingLog | None) -> None:
        """Runs all steps; `log` is None on ranks that stay silent."""
        options = self.options
        with loss_in_use(
            options.loss,
            self.gpt,
            vocab_size=options.shape.vocab_size,
            inplace=options.inplace,
            z_loss=options.z_loss,
        ):
            self.warm_up()
            while self.step < options.steps:
                metrics = self._step()
                if log is not None:
                    log.step(metrics)

    def read(self) -> list[MicroBatch]:
        """This rank's micro-batches of the next step."""
        ids, target = self.batches.read(self.step * self.options.batch, self.options.batch)
        device = self.groups.device
        return [MicroBatch.of(ids[rows], target[rows], device) for rows in self.micro_batches]

    def _step(self) -> MegatronMetrics:
        begin = time.perf_counter()
        options = self.options
        lr = options.lr_at(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        report = self.forward_backward(self.read())
        _, norm, _ = self.optimizer.step()
        loss_seconds, peak = self.meter.take()  # waits for the device
        seconds = time.perf_counter() - begin
        self.step += 1
        require_finite(report["lm loss"], self.step, options.lr)
        tokens = options.batch * options.shape.context
        return MegatronMetrics(
            step=self.step,
            loss=report["lm loss"],
            lr=lr,
            grad_norm=float(norm),
            tokens=tokens,
            tokens_per_second=tokens / seconds,
            loss_share=loss_seconds / seconds,
            milliseconds=1000 * seconds,
            loss_milliseconds=1000 * loss_seconds,
            loss_peak_bytes=peak,
            z_loss=report.get("z loss"),
        )

    def forward_backward(self, batches: list[MicroBatch]) -> dict[str, float]:
        """Gradients of one global batch, ready for the optimizer; means of what was reported."""
        from megatron.core.pipeline_parallel import get_forward_backward_func

        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        reports = get_forward_backward_func()(
            forward_step_func=self._forward_step,
            data_iterator=iter(batches),
            model=[self.model],
            num_microbatches=len(batches),
            seq_length=self.options.shape.context,
            micro_batch_size=len(batches[0].ids),
            forward_only=False,
        )
        return {name: self._mean([report[name] for report in reports]) for name in reports[0]}

    def _forward_step(self, batches: Iterator[MicroBatch], model: Any) -> tuple[Tensor, Any]:
        """What Megatron's schedule calls for each micro-batch."""
        batch = next(batches)
        positions = self.positions.expand_as(batch.ids)
        losses = model(batch.ids, positions, self.attention_mask, labels=batch.labels)
        return losses, partial(loss_func, batch.mask, model=model)

    def _mean(self, sums: list[Any]) -> float:
        """What loss_func reported of each micro-batch -> the mean over all data-parallel ranks."""
        summed = not isinstance(sums[0], Tensor)  # before megatron-core 0.13: pairs, over all ranks
        pairs = [torch.stack(value) if summed else value for value in sums]
        total = torch.stack([pair.detach().float() for pair in pairs]).sum(0)
        if self.groups.dp > 1 and not summed:
            dist.all_reduce(total, group=self.groups.dp_group)
        return float(total[0] / total[1])
