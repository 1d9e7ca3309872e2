"""What a run proves of itself at its end: the loss is right, and what it costs.

Right: the logits of the last batch are gathered, some rows at a time, and the loss and its gradient
are compared with the unsharded fp64 reference. Cost: our loss and torch's F.cross_entropy on
gathered logits take turns on the same batch. Only here do logits ever leave their rank.
"""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from vocab_parallel_ce import VocabShard, cross_entropy, testing
from vocab_parallel_ce.launch.measuring.clock import wall_seconds
from vocab_parallel_ce.launch.measuring.logits import produced
from vocab_parallel_ce.launch.measuring.memory import PeakMemory
from vocab_parallel_ce.launch.measuring.rounds import in_turns, median_known
from vocab_parallel_ce.parallel.groups import ParallelGroups
from vocab_parallel_ce.parallel.layers import vocab_parallel_parameters
from vocab_parallel_ce.testing import Blocks

ROWS_AT_A_TIME = 128
# E is at least this many units in the last place of fp32 at the largest element: a model's own
# logits are of any size, and F.cross_entropy may be right by luck on a run's one last batch.
LEAST_ULPS = 8.0


@dataclass(frozen=True)
class LossCall:
    """One use of the loss on this rank: its shard of the logits and all it is called with."""

    logits: Tensor
    """[N, C_r]"""
    target: Tensor
    """[N] global ids"""
    shard: VocabShard
    normalizer: Tensor
    label_smoothing: float
    z_loss: float
    inplace: bool

    def loss(self, logits: Tensor, groups: ParallelGroups) -> Tensor:
        return cross_entropy(
            logits,
            self.target,
            label_smoothing=self.label_smoothing,
            lse_square_scale=self.z_loss,
            group=groups.tp_group,
            shard=self.shard,
            inplace_backward=self.inplace,
            normalizer=self.normalizer,
        )


def gather_columns(part: Tensor, groups: ParallelGroups, shard: VocabShard) -> Tensor:
    """[n, C_r] on each tensor-parallel rank -> [n, vocab_size] on all of them."""
    shards = [_shard_of(rank, groups.tp, shard.vocab_size) for rank in range(groups.tp)]
    widest = max(other.size for other in shards)
    padded = F.pad(part, (0, widest - part.shape[1])).contiguous()
    received = [torch.empty_like(padded) for _ in shards]
    dist.all_gather(received, padded, group=groups.tp_group)
    return torch.cat([r[:, : s.size] for r, s in zip(received, shards, strict=True)], dim=1)


def _shard_of(rank: int, ranks: int, vocab_size: int) -> VocabShard:
    size = -(-vocab_size // ranks)
    start = min(rank * size, vocab_size)
    return VocabShard(start, min(start + size, vocab_size), vocab_size)


@dataclass(frozen=True)
class Errors:
    """Against fp64; the gradient's is relative to its largest element."""

    loss: float
    """Our loss."""
    reference: float
    loss_error: float
    """|loss - reference| / |reference|"""
    gradient_error: float
    plain_gradient_error: float
    """The same of F.cross_entropy on the gathered logits in fp32: what rounding alone does."""
    within: bool


def check_against_reference(call: LossCall, groups: ParallelGroups) -> Errors:
    """Every rank of a tensor-parallel group takes part and gets the same answer."""
    buffer = call.logits.clone()
    logits = produced(buffer)
    captured: list[Tensor] = []
    logits.register_hook(lambda gradient: captured.append(gradient))
    loss = call.loss(logits, groups)
    loss.backward()
    ours = captured.pop()

    denominator = float(call.normalizer)
    reference, plain_loss = 0.0, 0.0
    gradients = Blocks(call.logits.dtype)
    for begin in range(0, len(call.target), ROWS_AT_A_TIME):
        rows = slice(begin, begin + ROWS_AT_A_TIME)
        full = gather_columns(call.logits[rows], groups, call.shard).cpu()
        full_gradient = gather_columns(ours[rows], groups, call.shard).cpu()
        if groups.tp_rank != 0:
            continue
        target = call.target[rows].cpu()
        part, exact = _loss_and_gradient(full, target, call, denominator, torch.float64)
        plain_part, plain = _loss_and_gradient(full, target, call, denominator, torch.float32)
        reference, plain_loss = reference + part, plain_loss + plain_part
        gradients.add(full_gradient, exact, plain)
    value = Blocks(loss.dtype)
    truth = torch.tensor(reference, dtype=torch.float64)
    value.add(loss.detach().cpu(), truth, torch.tensor(plain_loss, dtype=torch.float64))
    scale = max(gradients.largest, 1e-300)
    errors = Errors(
        loss=float(loss.detach()),
        reference=reference,
        loss_error=value.error / max(abs(reference), 1e-300),
        gradient_error=gradients.error / scale,
        plain_gradient_error=gradients.naive_error / scale,
        within=value.within(least_ulps=LEAST_ULPS) and gradients.within(least_ulps=LEAST_ULPS),
    )
    return _from_first_rank(errors, groups)


def _loss_and_gradient(
    logits: Tensor, target: Tensor, call: LossCall, denominator: float, dtype: torch.dtype
) -> tuple[float, Tensor]:
    """Of some rows of the batch, unsharded; in fp32 these are the operations of F.cross_entropy."""
    leaf = logits.to(dtype, copy=True).requires_grad_()
    loss = testing.cross_entropy(
        leaf,
        target,
        label_smoothing=call.label_smoothing,
        lse_square_scale=call.z_loss,
        normalizer=denominator,
        dtype=dtype,
    ).loss
    (gradient,) = torch.autograd.grad(loss, leaf)
    return float(loss.detach()), gradient


def _from_first_rank(errors: Errors, groups: ParallelGroups) -> Errors:
    """The numbers of the group's first rank, the only one that computed them."""
    everyone: list[Any] = [None] * groups.world_size
    dist.all_gather_object(everyone, errors, group=groups.control)
    first: Errors = everyone[groups.dp_rank * groups.tp]
    return first


@dataclass(frozen=True)
class FusedDifference:
    """The fused head beside head and loss apart, relative to the largest element."""

    loss: float
    hidden_gradient: float
    within: bool


def compare_fused(
    fused: Callable[[Tensor], Tensor],
    apart: Callable[[Tensor], Tensor],
    hidden: Tensor,
    dtype: torch.dtype,
) -> FusedDifference:
    """Both losses of the same hidden states, and their gradients."""
    found = []
    for loss_of in (fused, apart):
        leaf = hidden.detach().clone().requires_grad_()
        loss = loss_of(leaf)
        (gradient,) = torch.autograd.grad(loss, leaf)
        found.append((loss.detach().double().cpu(), gradient.double().cpu()))
    (ours, gradient), (other, exact) = found
    off_loss = float((ours - other).abs() / other.abs().clamp(min=1e-300))
    off = float((gradient - exact).abs().max() / exact.abs().max().clamp(min=1e-300))
    # Products of other shapes sum in another order; some rows of a sum round another way.
    allowed = 256 * torch.finfo(torch.float32).eps if dtype == torch.float32 else 4e-2
    return FusedDifference(off_loss, off, off_loss <= allowed and off <= allowed)


def replicas_agree(model: nn.Module, groups: ParallelGroups) -> bool:
    """Whether every rank holds, bit for bit, the same parameters where it should."""
    split = vocab_parallel_parameters(model)
    whole, rows = hashlib.sha256(), hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest = rows if name in split else whole
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    everyone: list[Any] = [None] * groups.world_size
    mine = (groups.tp_rank, whole.hexdigest(), rows.hexdigest())
    dist.all_gather_object(everyone, mine, group=groups.control)
    wholes = {entry[1] for entry in everyone}
    rows_of_shard = {(entry[0], entry[2]) for entry in everyone}
    return len(wholes) == 1 and len(rows_of_shard) == groups.tp


@dataclass(frozen=True)
class Cost:
    """Medians of one rank for one batch, forward and backward."""

    name: str
    milliseconds: float
    peak_bytes: int | None
    """Beyond what was allocated before; None where the system does not tell."""

    def line(self) -> str:
        peak = "not measurable here"
        if self.peak_bytes is not None:
            peak = f"{self.peak_bytes / 2**20:9.1f} MiB"
        return f"  {self.name:<38} {self.milliseconds:9.1f} ms   peak extra memory {peak}"


def compare_cost(call: LossCall, groups: ParallelGroups, rounds: int = 5) -> list[Cost]:
    """Our loss, F.cross_entropy on gathered logits, and gathering them, in turns."""
    work = call.logits.clone()
    whole = gather_columns(call.logits, groups, call.shard)

    def ours() -> None:
        call.loss(produced(work), groups).backward()

    def gathered() -> None:
        logits = produced(whole)
        loss = F.cross_entropy(
            logits, call.target, reduction="sum", label_smoothing=call.label_smoothing
        )
        (loss / call.normalizer).backward()

    def gather() -> None:
        gather_columns(call.logits, groups, call.shard)

    contenders: list[tuple[str, Callable[[], None]]] = [
        ("vocab-parallel loss on the shard", ours),
        ("F.cross_entropy on gathered logits", gathered),
    ]
    if groups.tp > 1:
        contenders.append(("gathering them (comes on top)", gather))

    def measured(run: Callable[[], None]) -> tuple[float, int | None]:
        work.copy_(call.logits)  # in place, the loss has overwritten it
        memory = PeakMemory(groups.device)
        groups.barrier()
        memory.start()
        return wall_seconds(run, groups.device), memory.stop()

    found = in_turns({name: partial(measured, run) for name, run in contenders}, rounds)
    return [
        Cost(
            name,
            1000 * statistics.median(seconds for seconds, _ in runs),
            median_known([peak for _, peak in runs]),
        )
        for name, runs in found.items()
    ]
