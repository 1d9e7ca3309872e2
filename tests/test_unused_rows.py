"""A row that nothing depends on gets gradient exactly 0, whatever its logits hold."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from vocab_parallel_ce import cross_entropy, token_statistics

from .device import ENGINES, move
from .ranks import Pool


def _gradient(
    group: dist.ProcessGroup | None, engine: str, inplace: bool, smoothing: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """With a mask as a factor, and by F.cross_entropy of the rows that count."""
    world = 1 if group is None else dist.get_world_size(group)
    rank = 0 if group is None else dist.get_rank(group)
    full = torch.randn(5, 8 * world, generator=torch.Generator().manual_seed(3))
    target, mask = torch.tensor([0, 3, 7, 1, 2]), torch.tensor([1.0, 0.0, 0.5, 0.0, 2.0])
    leaf = full.clone().requires_grad_()
    counted = torch.nn.functional.cross_entropy(
        leaf, target, reduction="none", label_smoothing=smoothing
    )
    (counted * mask).sum().backward()
    assert leaf.grad is not None
    want = leaf.grad.chunk(world, -1)[rank]
    full[1], full[3, 0] = torch.nan, torch.inf
    shard = move(full.chunk(world, -1)[rank].contiguous()).requires_grad_()
    losses = cross_entropy(
        shard * 1, move(target), reduction="none", label_smoothing=smoothing, group=group,
        engine=engine, inplace_backward=inplace,
    )  # fmt: skip
    torch.where(move(mask) != 0, losses * move(mask), 0.0).sum().backward()
    assert shard.grad is not None
    return shard.grad.cpu(), want


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("engine", ENGINES)
def test_nan_under_a_mask(engine: str, inplace: bool, smoothing: float) -> None:
    got, want = _gradient(None, engine, inplace, smoothing)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert bool((got[[1, 3]] == 0).all())


def test_nan_of_other_rows_in_batched_gradients() -> None:
    logits = torch.randn(3, 8)
    logits[1], logits[2, 0] = torch.nan, torch.inf
    leaf = move(logits).requires_grad_()
    losses = cross_entropy(leaf, move(torch.tensor([0, 3, 7])), reduction="none")
    each = [
        torch.autograd.grad(losses, leaf, up, retain_graph=True)[0] for up in move(torch.eye(3))
    ]
    (many,) = torch.autograd.grad(losses, leaf, move(torch.eye(3)), is_grads_batched=True)
    torch.testing.assert_close(many, torch.stack(each), equal_nan=True)
    assert bool((many[0, 1:] == 0).all())


@pytest.mark.parametrize("engine", ENGINES)
def test_nan_under_a_mask_on_two_ranks(pool: Pool, engine: str) -> None:
    for got, want in pool.run(_gradient, 2, (engine, True, 0.0)):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_nan_under_a_mask_with_a_z_loss() -> None:
    logits, target = torch.randn(4, 8), torch.tensor([1, 2, 3, 4])
    logits[0], logits[1], logits[2] = torch.nan, torch.inf, -torch.inf
    leaf = move(logits).requires_grad_()
    losses = cross_entropy(leaf, move(target), reduction="none", lse_square_scale=0.1)
    losses[3].backward()
    assert leaf.grad is not None
    assert bool((leaf.grad[:3] == 0).all())
    assert bool((leaf.grad[3] != 0).all())
    assert not losses[:3].isfinite().any()


def test_nan_in_a_row_whose_entropy_nobody_uses() -> None:
    """It has none: 0 times it would be NaN."""
    logits, target = torch.randn(3, 8), torch.tensor([1, 2, 3])
    logits[0, 2] = torch.nan
    leaf = move(logits).requires_grad_()
    out = token_statistics(leaf, move(target), entropy=True)
    assert out.entropy is not None
    (out.entropy[1:].sum() + out.log_prob[1:].sum()).backward()
    assert leaf.grad is not None
    assert bool((leaf.grad[0] == 0).all())
    assert bool(leaf.grad[1:].isfinite().all())


def test_a_statistic_that_is_used_is_not_cut_off() -> None:
    """One of several has a gradient of 0, another has not."""
    logits = move(torch.randn(3, 8)).requires_grad_()
    out = token_statistics(logits, move(torch.tensor([1, 2, 3])), entropy=True)
    assert out.entropy is not None
    (out.log_prob * 0 + out.entropy).sum().backward()
    assert logits.grad is not None
    assert bool((logits.grad != 0).all())
