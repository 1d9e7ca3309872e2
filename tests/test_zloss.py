"""cross_entropy(return_zloss=True): the z part of the loss beside it, in the loss's own dtype."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from vocab_parallel_ce import VocabParallelCrossEntropyLoss, cross_entropy, cross_entropy_loss
from vocab_parallel_ce.testing import cross_entropy as reference

from .device import DEVICE, DTYPES, move
from .ranks import Pool

Z, C = 0.01, 8


def _batch(dtype: torch.dtype, world: int = 1) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(2, 3, C * world, generator=g)).to(dtype)
    return logits, torch.tensor([[0, 1, -100], [C - 1, 2, 3]])


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_z_part_has_the_losss_dtype_and_a_gradient(dtype: torch.dtype, reduction: str) -> None:
    logits, target = _batch(dtype)
    leaf = move(logits).detach().requires_grad_()
    options: dict[str, Any] = {"reduction": reduction, "lse_square_scale": Z}
    loss, zloss = cross_entropy(leaf, move(target), return_zloss=True, **options)
    want = reference(logits.double(), target, **options)
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    assert loss.dtype == zloss.dtype == precise
    assert loss.shape == zloss.shape == (target.shape if reduction == "none" else ())
    torch.testing.assert_close(zloss.cpu().double(), want.zloss, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(loss.cpu().double(), want.loss, rtol=1e-6, atol=1e-6)
    assert torch.equal(loss, cross_entropy(leaf, move(target), **options))
    (gradient,) = torch.autograd.grad(zloss.sum(), leaf)
    exact = logits.detach().double().requires_grad_()
    reference(exact, target, **options).zloss.sum().backward()
    assert exact.grad is not None
    tolerance = 1e-6 if precise == dtype else 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(gradient.cpu().double(), exact.grad, rtol=tolerance, atol=tolerance)


def test_it_is_not_rounded_to_the_inputs_dtype() -> None:
    logits, target = _batch(torch.bfloat16)
    _, precise = cross_entropy(
        move(logits), move(target), lse_square_scale=Z, return_zloss=True, reduction="none"
    )
    rounded = cross_entropy_loss(
        move(logits).view(6, C), move(target).view(6), None, "none",
        lse_square_scale_for_zloss=Z, return_zloss=True,
    ).zloss  # fmt: skip
    assert torch.equal(precise.view(6).bfloat16(), rounded)
    assert bool((precise.view(6) != rounded.float()).any())


def test_without_a_z_loss_it_is_0() -> None:
    logits, target = _batch(torch.float32)
    for reduction, shape in (("none", (2, 3)), ("mean", ())):
        loss, zloss = cross_entropy(
            move(logits), move(target), reduction=reduction, return_zloss=True
        )
        assert zloss.shape == shape
        assert zloss.dtype == loss.dtype
        assert not zloss.any()


def test_the_module_returns_it_too() -> None:
    logits, target = map(move, _batch(torch.float32))
    pair = VocabParallelCrossEntropyLoss(lse_square_scale=Z, return_zloss=True)(logits, target, 5.0)
    want = cross_entropy(logits, target, lse_square_scale=Z, return_zloss=True, normalizer=5.0)
    assert isinstance(pair, tuple)
    assert all(torch.equal(got, told) for got, told in zip(pair, want, strict=True))


def _on_ranks(group: dist.ProcessGroup, reduction: str, wrapped: bool) -> tuple[Tensor, Tensor]:
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    logits, target = _batch(torch.float32, world)
    shard = move(logits.chunk(world, -1)[rank].contiguous())
    options: dict[str, Any] = {"reduction": reduction, "lse_square_scale": Z, "return_zloss": True}
    if not wrapped:
        loss, zloss = cross_entropy(shard, move(target), group=group, **options)
        return loss.cpu(), zloss.cpu()
    mesh = DeviceMesh.from_group(group, DEVICE)
    whole = DTensor.from_local(shard, mesh, [Shard(-1)], run_check=False)
    loss, zloss = cross_entropy(whole, move(target), **options)
    assert isinstance(loss, DTensor)
    assert isinstance(zloss, DTensor)
    assert loss.placements == zloss.placements
    return loss.full_tensor().cpu(), zloss.full_tensor().cpu()


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "DTensor"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_it_is_the_same_on_every_rank(pool: Pool, reduction: str, wrapped: bool) -> None:
    logits, target = _batch(torch.float32, 2)
    want = reference(logits.double(), target, reduction=reduction, lse_square_scale=Z)
    for loss, zloss in pool.run(_on_ranks, 2, (reduction, wrapped)):
        torch.testing.assert_close(loss.double(), want.loss, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(zloss.double(), want.zloss, rtol=1e-6, atol=1e-7)


def test_while_compiling() -> None:
    logits, target = map(move, _batch(torch.float32))
    options: dict[str, Any] = {"lse_square_scale": Z, "return_zloss": True}
    compiled = torch.compile(cross_entropy, fullgraph=True, backend="aot_eager")
    for got, want in zip(
        compiled(logits, target, **options), cross_entropy(logits, target, **options), strict=True
    ):
        torch.testing.assert_close(got, want)
