"""One training run: model, data, optimizer and the step that joins them to the loss.

The loss of each micro-batch is divided by the number of targets in the whole global batch
(`normalizer`), so summing over micro-batches and over data-parallel ranks gives the mean over
all targets, however unevenly the ignored ones fall. That is why tp, dp and accumulation do not
change the curve.
"""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vocab_parallel_ce import VocabShard, cross_entropy
from vocab_parallel_ce.launch.measuring.in_step import LossTimer
from vocab_parallel_ce.launch.refusal import FAILED, Refusal
from vocab_parallel_ce.launch.train.checkpoint import Checkpoints, RunState
from vocab_parallel_ce.launch.train.gpt import GPT, GPTShape
from vocab_parallel_ce.launch.train.progress import StepMetrics, TrainingLog
from vocab_parallel_ce.launch.train.selfcheck import FusedDifference, LossCall, compare_fused
from vocab_parallel_ce.launch.train.text import IGNORE_INDEX, Batches, Corpus
from vocab_parallel_ce.linear.chunks import budget_bytes
from vocab_parallel_ce.parallel.groups import ParallelGroups
from vocab_parallel_ce.parallel.layers import vocab_parallel_parameters

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class TrainOptions:
    """Everything a run is told. Errors name the command-line option."""

    shape: GPTShape
    steps: int = 120
    batch: int = 16
    """Sequences in the global batch: over all data-parallel ranks and micro-batches."""
    accumulate: int = 1
    """Micro-batches a step."""
    lr: float = 1e-3
    warmup: int = 10
    """Steps over which lr rises linearly; constant afterwards, so that --steps can be raised."""
    clip: float = 1.0
    """Largest 2-norm of the gradient; 0 leaves it alone."""
    weight_decay: float = 0.01
    seed: int = 0
    dtype: str = "fp32"
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    inplace: bool = True
    fused_head: bool | None = None
    """Logits never exist whole; None: where those of a micro-batch exceed the fused head's budget.
    """
    out: Path = field(default_factory=lambda: Path("runs/train"))
    checkpoint_every: int = 50
    log_every: int = 10
    die_at_step: int = 0
    """For tests: the last rank exits hard before this step, once."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "accumulate", "checkpoint_every", "log_every"):
            if getattr(self, name) < 1:
                option = name.replace("_", "-")
                raise ValueError(f"--{option} {getattr(self, name)} must be at least 1")
        for name in ("warmup", "clip", "weight_decay", "z_loss", "die_at_step"):
            if not getattr(self, name) >= 0:
                option = name.replace("_", "-")
                raise ValueError(f"--{option} {getattr(self, name)} must not be negative")
        if not self.lr > 0:
            raise ValueError(f"--lr {self.lr} must be positive")
        if not 0.0 <= self.label_smoothing <= 1.0:
            raise ValueError(f"--label-smoothing {self.label_smoothing} must be in [0, 1]")
        if self.dtype not in DTYPES:
            raise ValueError(f"--dtype {self.dtype!r} is not one of {', '.join(DTYPES)}")

    def lr_at(self, done: int) -> float:
        """The learning rate of the step after `done` steps."""
        return self.lr * min(1.0, (done + 1) / max(1, self.warmup))

    def micro_batches(self, dp: int, dp_rank: int) -> list[slice]:
        """One rank's rows of the global batch, one slice a micro-batch."""
        pieces = dp * self.accumulate
        if self.batch % pieces:
            raise ValueError(
                f"--batch {self.batch} cannot be divided among dp={dp} ranks times "
                f"--accumulate {self.accumulate}; make it a multiple of {pieces}"
            )
        size = self.batch // pieces
        first = dp_rank * self.accumulate * size
        starts = [first + i * size for i in range(self.accumulate)]
        return [slice(start, start + size) for start in starts]

    def identity(self, corpus: Corpus) -> dict[str, Any]:
        """What makes two runs the same curve. How it is split, how long it runs and where it lies
        are left out: those may change when a run is resumed."""
        shape = {f"model.{name}": value for name, value in vars(self.shape).items()}
        names = (
            "batch",
            "lr",
            "warmup",
            "clip",
            "weight_decay",
            "seed",
            "dtype",
            "label_smoothing",
            "z_loss",
        )
        return shape | {name: getattr(self, name) for name in names} | {"text": corpus.fingerprint}

    @property
    def checkpoints(self) -> Path:
        return self.out / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.out / "metrics.jsonl"


def sum_of_squares(values: Tensor) -> Tensor:
    """0-d, by rows: over millions of fp32 values at once, torch's norm on a CPU loses up to 1e-2 of
    the result to rounding, which would make the curve depend on how the weights are split."""
    rows = torch.linalg.vector_norm(values.reshape(len(values), -1), dim=1)
    squares: Tensor = torch.linalg.vector_norm(rows).square()
    return squares


def require_finite(loss: float, step: int, lr: float) -> None:
    """Refusal, on every rank, where the loss is NaN or infinite: no later step would mean anything.

    ``loss`` is the sum over all ranks, so they all end here or none does.
    """
    if not math.isfinite(loss):
        raise Refusal(
            f"the loss is {loss} at step {step}; start again with a lower --lr (now {lr:g}) and "
            "another --out",
            FAILED,
        )


class Trainer:
    """The state of a run on this rank."""

    def __init__(self, options: TrainOptions, groups: ParallelGroups, corpus: Corpus) -> None:
        self.options, self.groups = options, groups
        self.micro_batches = options.micro_batches(groups.dp, groups.dp_rank)
        self.shard = VocabShard.even(options.shape.vocab_size, groups.tp_group)
        self.batches = Batches(corpus, options.shape.context, options.seed)
        # Dropout draws from the global generator: alike on the ranks of one model copy, whose
        # bodies must stay equal, and different on each copy.
        torch.manual_seed(options.seed + groups.dp_rank)
        self.model = GPT(options.shape, self.shard, groups.tp_group, options.seed)
        self.model.to(groups.device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=options.lr,
            betas=(0.9, 0.95),
            weight_decay=options.weight_decay,
            fused=groups.device.type in ("cpu", "cuda"),
        )
        self.checkpoints = Checkpoints(options.checkpoints, groups, options.identity(corpus))
        self.timer = LossTimer(groups.device)
        self.fused = self._is_fused()
        self.state = RunState()

    def _is_fused(self) -> bool:
        if self.options.fused_head is not None:
            return self.options.fused_head
        sequences = self.micro_batches[0]
        rows = (sequences.stop - sequences.start) * self.options.shape.context
        columns = -(-self.options.shape.vocab_size // self.groups.tp)  # alike on every rank
        logits = rows * columns * DTYPES[self.options.dtype].itemsize
        return bool(logits > budget_bytes(self.groups.device.type, None))

    def resume(self) -> None:
        """Continues from the latest checkpoint, if there is one."""
        self.state = self.checkpoints.load(self.model, self.optimizer)

    def warm_up(self) -> None:
        """A tiny loss of the run's own kind: a process's first call compiles the kernels, or loads
        them from the disk, and no step should seem to take that long."""
        dtype = DTYPES[self.options.dtype]
        logits = torch.zeros(1, 2, dtype=dtype, device=self.groups.device, requires_grad=True)
        loss = cross_entropy(
            logits * 1,
            torch.zeros(1, dtype=torch.int64, device=self.groups.device),
            label_smoothing=self.options.label_smoothing,
            lse_square_scale=self.options.z_loss,
            inplace_backward=self.options.inplace,
        )
        loss.backward()

    def train(self, log: TrainingLog | None) -> None:
        """Runs to the last step; `log` is None on ranks that stay silent."""
        while self.state.step < self.options.steps:
            self._die_if_told()
            metrics = self._step()
            if log is not None:
                log.step(metrics)
            done = self.state.step
            if done % self.options.checkpoint_every == 0 or done == self.options.steps:
                self.checkpoints.save(self.model, self.optimizer, self.state)

    def _step(self) -> StepMetrics:
        begin = time.perf_counter()
        options, device = self.options, self.groups.device
        # Every rank reads the whole global batch: so it knows the number of targets without asking.
        ids, target = self.batches.read(self.state.position, options.batch)
        normalizer = (target != IGNORE_INDEX).sum().float().to(device)
        loss = torch.zeros((), device=device)
        self.optimizer.zero_grad(set_to_none=True)
        for rows in self.micro_batches:
            loss += self._forward_backward(ids[rows], target[rows], normalizer)
        self._sum_over_data_parallel(loss)
        norm = self._clip()
        lr = options.lr_at(self.state.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.state = RunState(self.state.step + 1, self.state.position + options.batch)

        loss_seconds = self.timer.take()  # waits for the device, so the clock below is honest
        seconds = time.perf_counter() - begin
        value = loss.item()
        require_finite(value, self.state.step, options.lr)
        return StepMetrics(
            step=self.state.step,
            loss=value,
            lr=lr,
            grad_norm=float(norm),
            tokens=target.numel(),
            tokens_per_second=target.numel() / seconds,
            loss_share=loss_seconds / seconds,
        )

    def _autocast(self) -> torch.autocast:
        """For bf16, over fp32 weights."""
        dtype = DTYPES[self.options.dtype]
        return torch.autocast(self.groups.device.type, dtype, enabled=dtype != torch.float32)

    def _logits(self, ids: Tensor) -> Tensor:
        """[B, T] -> [B * T, C_r]"""
        with self._autocast():
            logits: Tensor = self.model(ids.to(self.groups.device))
        return logits.view(-1, self.shard.size)

    def _hidden(self, ids: Tensor) -> Tensor:
        """[B, T] -> [B * T, width]"""
        with self._autocast():
            return self.model.hidden(ids.to(self.groups.device)).flatten(0, 1)

    def _fused_loss(self, hidden: Tensor, target: Tensor, normalizer: Tensor) -> Tensor:
        with self._autocast():  # it converts hidden states and head
            loss: Tensor = self.model.head.loss(
                hidden,
                target,
                ignore_index=IGNORE_INDEX,
                label_smoothing=self.options.label_smoothing,
                lse_square_scale=self.options.z_loss,
                normalizer=normalizer,
            )
        return loss

    def _forward_backward(self, ids: Tensor, target: Tensor, normalizer: Tensor) -> Tensor:
        """Adds to the gradients; returns this micro-batch's part of the loss."""
        if self.fused:
            hidden, target = self._hidden(ids), target.reshape(-1).to(self.groups.device)
            with self.timer.forward():
                loss = self._fused_loss(hidden, target, normalizer)
            self.timer.watch_backward(loss, hidden)
            loss.backward()
            return loss.detach()
        logits = self._logits(ids)
        target = target.reshape(-1).to(self.groups.device)
        with self.timer.forward():
            loss = cross_entropy(
                logits,
                target,
                ignore_index=IGNORE_INDEX,
                label_smoothing=self.options.label_smoothing,
                lse_square_scale=self.options.z_loss,
                group=self.groups.tp_group,
                shard=self.shard,
                inplace_backward=self.options.inplace,
                normalizer=normalizer,
            )
        self.timer.watch_backward(loss, logits)
        loss.backward()
        return loss.detach()

    def _sum_over_data_parallel(self, loss: Tensor) -> None:
        if self.groups.dp == 1:
            return
        tensors = [loss, *(p.grad for p in self.model.parameters() if p.grad is not None)]
        works = [dist.all_reduce(t, group=self.groups.dp_group, async_op=True) for t in tensors]
        for work in works:
            assert work is not None
            work.wait()

    def _clip(self) -> Tensor:
        """The gradient's 2-norm over the whole model, after which it is at most `clip`."""
        split = vocab_parallel_parameters(self.model)
        named = [(name, p.grad) for name, p in self.model.named_parameters() if p.grad is not None]
        squares = torch.zeros(2, device=self.groups.device)  # of split and of replicated parameters
        for name, gradient in named:
            squares[0 if name in split else 1] += sum_of_squares(gradient)
        if self.groups.tp > 1:
            dist.all_reduce(squares[:1], group=self.groups.tp_group)
        norm = squares.sum().sqrt()
        if self.options.clip > 0:
            factor = (self.options.clip / (norm + 1e-6)).clamp(max=1.0)
            for _, gradient in named:
                gradient.mul_(factor)
        return norm

    def last_loss_call(self) -> LossCall:
        """The loss on this rank's last micro-batch under the present weights."""
        position = max(0, self.state.position - self.options.batch)
        ids, target = self.batches.read(position, self.options.batch)
        rows = self.micro_batches[-1]
        self.model.eval()
        with torch.no_grad():
            logits = self._logits(ids[rows])
        return LossCall(
            logits=logits,
            target=target[rows].reshape(-1).to(self.groups.device),
            shard=self.shard,
            normalizer=(target != IGNORE_INDEX).sum().float().to(self.groups.device),
            label_smoothing=self.options.label_smoothing,
            z_loss=self.options.z_loss,
            inplace=self.options.inplace,
        )

    def fused_difference(self) -> FusedDifference:
        """The fused head beside head and loss apart, on this rank's last micro-batch."""
        position = max(0, self.state.position - self.options.batch)
        ids, target = self.batches.read(position, self.options.batch)
        normalizer = (target != IGNORE_INDEX).sum().float().to(self.groups.device)
        rows = self.micro_batches[-1]
        self.model.eval()
        with torch.no_grad():
            hidden = self._hidden(ids[rows])
        target = target[rows].reshape(-1).to(self.groups.device)

        def apart(hidden: Tensor) -> Tensor:
            with self._autocast():
                logits = self.model.head(hidden)
            return cross_entropy(
                logits,
                target,
                ignore_index=IGNORE_INDEX,
                label_smoothing=self.options.label_smoothing,
                lse_square_scale=self.options.z_loss,
                group=self.groups.tp_group,
                shard=self.shard,
                normalizer=normalizer,
            )

        return compare_fused(
            lambda hidden: self._fused_loss(hidden, target, normalizer),
            apart,
            hidden,
            DTYPES[self.options.dtype],
        )

    def _die_if_told(self) -> None:
        last = self.groups.rank == self.groups.world_size - 1
        first_attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        if last and first_attempt and self.state.step + 1 == self.options.die_at_step:
            os._exit(1)
