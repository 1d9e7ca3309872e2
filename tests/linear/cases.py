"""Batches of hidden states and heads, and what the fused head must make of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from vocab_parallel_ce.testing import ReferenceLoss, Sharding, assert_close
from vocab_parallel_ce.testing import cross_entropy as reference

WIDTH = 8
IGNORED = -100


@dataclass(frozen=True)
class HeadBatch:
    """What a fused head is called with, unsharded, from a seed: the same on every rank."""

    hidden: Tensor
    """[N, H]; ignored rows hold NaN and infinity where ``unreadable``"""
    head: Tensor
    """[V, H]"""
    bias: Tensor
    """[V]"""
    target: Tensor
    weight: Tensor
    """[V] class weights, some of them 0"""
    upstream: Tensor
    """[N]"""


def head_batch(
    rows: int,
    vocab_size: int,
    dtype: torch.dtype,
    ignore_index: int = IGNORED,
    *,
    width: int = WIDTH,
    ignored: float = 0.3,
    unreadable: bool = True,
    seed: int = 0,
) -> HeadBatch:
    """The first row is kept, the second is not."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=g)
    head = torch.randn(vocab_size, width, generator=g) * (6 / width**0.5)
    target = torch.randint(vocab_size, (rows,), generator=g)
    out = torch.rand(rows, generator=g) < ignored
    out[:1], out[1:2] = False, ignored > 0
    target[:1] = 1 if ignore_index == 0 else 0
    target = torch.where(out, ignore_index, target)
    weight = torch.rand(vocab_size, generator=g) + 0.25
    weight[2::5] = 0.0
    upstream = torch.randint(-8, 9, (rows,), generator=g) / 8
    upstream[:1] = 0.75
    if unreadable:
        hidden[target == ignore_index] = torch.nan
        hidden[(target == ignore_index) & (torch.arange(rows) % 2 == 0)] = torch.inf
    bias = torch.randn(vocab_size, generator=g)
    return HeadBatch(hidden.to(dtype), head.to(dtype), bias.to(dtype), target, weight, upstream)


@dataclass(frozen=True)
class ExpectedHead:
    """Loss and gradients of whole logits, in fp64 and as plain torch computes them."""

    losses: tuple[ReferenceLoss, ReferenceLoss]
    _leaves: tuple[tuple[Tensor, ...], tuple[Tensor, ...]]

    def gradients(self, scalar: Callable[[ReferenceLoss], Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Of hidden states, head and bias: each exact and naive."""
        exact, naive = (
            torch.autograd.grad(scalar(loss), leaves, retain_graph=True)
            for loss, leaves in zip(self.losses, self._leaves, strict=True)
        )
        return list(zip(exact, naive, strict=True))


def expected_head(data: HeadBatch, **options: Any) -> ExpectedHead:
    """``options`` are those of ``testing.cross_entropy``, and ``biased``."""
    biased = options.pop("biased", False)
    ignored = data.target == options.get("ignore_index", IGNORED)
    # The oracle's where() keeps NaN out of logits, but a product would bring it back.
    clean = torch.where(ignored[:, None], 0.0, data.hidden)
    losses, leaves = [], []
    for dtype in (torch.float64, data.hidden.dtype):
        mine = [t.to(dtype).requires_grad_() for t in (clean, data.head, data.bias)]
        logits = F.linear(mine[0], mine[1], mine[2] if biased else mine[2] * 0)
        arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
        losses.append(reference(logits, data.target, dtype=arithmetic, **options))
        leaves.append(tuple(mine))
    return ExpectedHead((losses[0], losses[1]), (leaves[0], leaves[1]))


@dataclass(frozen=True)
class LocalHead:
    """One rank's leaves; the padding of the head holds NaN and infinity."""

    hidden: Tensor
    head: Tensor
    bias: Tensor

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.hidden, self.head, self.bias


def local_head(data: HeadBatch, sharding: Sharding, rank: int) -> LocalHead:
    head = sharding.local(data.head.t(), rank).t().contiguous()
    bias = sharding.local(data.bias, rank)
    tensors = (data.hidden.clone(), head, bias)
    return LocalHead(*(t.requires_grad_() for t in tensors))


def check_head_gradients(
    gradients: tuple[Tensor | None, ...],
    wanted: list[tuple[Tensor, Tensor]],
    sharding: Sharding,
    rank: int,
    what: str,
) -> None:
    """A rank's gradients of hidden states, head and bias; exactly 0 in the padding."""
    start, stop = sharding.bounds[rank]
    for name, grad, (exact, naive) in zip(
        ("hidden states", "head", "bias"), gradients, wanted, strict=True
    ):
        if grad is None:
            continue
        size = stop - start
        if name != "hidden states":
            assert bool((grad[size:] == 0).all()), f"{name}, {what}: padding is not exactly 0"
            grad, exact, naive = grad[:size], exact[start:stop], naive[start:stop]
        assert grad.dtype == naive.dtype or naive.dtype == torch.float64
        close(grad, exact, naive, f"gradient of {name}, {what}")


def close(actual: Tensor, exact: Tensor, naive: Tensor, what: str) -> None:
    """The rule of ``testing``; in fp64 both are exact, and a product may sum in another order."""
    if actual.dtype == torch.float64:
        torch.testing.assert_close(
            actual, exact, rtol=1e-12, atol=1e-12, msg=lambda m: f"{what}: {m}"
        )
        return
    assert_close(actual, exact, naive, what)


def rank_of(group: dist.ProcessGroup | None) -> int:
    return 0 if group is None else dist.get_rank(group)


def scratch_for(rows: int, columns: int, dtype: torch.dtype) -> float:
    """A ``scratch_mib`` that has room for so many rows of logits."""
    return (rows * max(1, columns) * dtype.itemsize + 1) / (1 << 20)
