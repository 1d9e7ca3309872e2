"""The fused head on NPU tensors: torch.mm on chunks, and the engine of the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from vocab_parallel_ce import linear_cross_entropy

from ..ranks import Pool

ROWS, WIDTH, VOCAB = 20, 16, 256
WAYS = ("forward", "recompute")


def _batch(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, WIDTH, generator=g).to(dtype)
    head = torch.randn(VOCAB, WIDTH, generator=g).to(dtype)
    target = torch.randint(VOCAB, (ROWS,), generator=g)
    target[::4] = -100
    return hidden, head, target


def _whole(dtype: torch.dtype, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradients of whole logits on the CPU in fp64."""
    hidden, head, target = _batch(dtype)
    leaves = [t.double().requires_grad_() for t in (hidden, head)]
    loss = F.cross_entropy(F.linear(leaves[0], leaves[1]), target, **options)
    of_hidden, of_head = torch.autograd.grad(loss, leaves)
    return loss.detach(), of_hidden, of_head


def _ours(
    dtype: torch.dtype, gradient: str, group: dist.ProcessGroup | None = None, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Chunks of seven rows; ignored rows hold NaN, which nobody is told to leave out here."""
    rank, world = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    hidden, head, target = _batch(dtype)
    hidden[target == -100] = torch.nan
    mine = head.chunk(world)[rank]
    leaves = [t.to("npu", copy=True).requires_grad_() for t in (hidden, mine)]
    loss = linear_cross_entropy(
        leaves[0], leaves[1], target.to("npu"), gradient=gradient, group=group,
        scratch_mib=7 * VOCAB // world * dtype.itemsize / (1 << 20), **options,
    )  # fmt: skip
    assert isinstance(loss, Tensor)
    of_hidden, of_head = torch.autograd.grad(loss, leaves)
    return loss.detach().cpu(), of_hidden.cpu(), of_head.cpu()


def _close(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    allowed = 1e-5 if dtype == torch.float32 else 1e-2
    assert float((got.double() - want).norm() / want.norm()) < allowed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gradient", WAYS)
def test_one_device(gradient: str, dtype: torch.dtype) -> None:
    options: dict[str, Any] = {"label_smoothing": 0.1}
    got = _ours(dtype, gradient, **options)
    for a, b in zip(got, _whole(dtype, **options), strict=True):
        _close(a, b, dtype)


def _on_ranks(group: dist.ProcessGroup, gradient: str) -> tuple[Tensor, Tensor, Tensor]:
    return _ours(torch.float32, gradient, group)


@pytest.mark.parametrize("gradient", WAYS)
def test_two_devices(pool: Pool, gradient: str) -> None:
    loss, of_hidden, of_head = _whole(torch.float32)
    ranks = pool.run(_on_ranks, 2, (gradient,))
    for rank, got in enumerate(ranks):
        for a, b in zip(got, (loss, of_hidden, of_head.chunk(2)[rank]), strict=True):
            _close(a, b, torch.float32)


def _split_sequence(group: dist.ProcessGroup, gradient: str) -> tuple[Tensor, Tensor, Tensor]:
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    hidden, head, target = _batch(torch.float32)
    part, mine = (
        t.chunk(world)[rank].to("npu", copy=True).requires_grad_() for t in (hidden, head)
    )
    loss = linear_cross_entropy(
        part, mine, target.to("npu"), gradient=gradient, group=group, sequence_parallel=True,
        scratch_mib=8 * VOCAB // world * 4 / (1 << 20),
    )  # fmt: skip
    assert isinstance(loss, Tensor)
    of_part, of_mine = torch.autograd.grad(loss, (part, mine))
    return loss.detach().cpu(), of_part.cpu(), of_mine.cpu()


@pytest.mark.parametrize("gradient", WAYS)
def test_a_split_sequence_on_two_devices(pool: Pool, gradient: str) -> None:
    """Gathered, and scattered as sums, by HCCL's own collectives."""
    loss, of_hidden, of_head = _whole(torch.float32)
    for rank, got in enumerate(pool.run(_split_sequence, 2, (gradient,))):
        wanted = (loss, of_hidden.chunk(2)[rank], of_head.chunk(2)[rank])
        for a, b in zip(got, wanted, strict=True):
            _close(a, b, torch.float32)
