"""What else Megatron's two losses were seen to do, each with a test that it is not here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from vocab_parallel_ce import VocabShard, cross_entropy
from vocab_parallel_ce.testing import batch, even, sized

from .cases import check_gradient, expected
from .museum import COLLECTIVES, follows_the_oracle, full_batch
from .ranks import Pool


def _uneven(group: dist.ProcessGroup) -> None:
    full, target = full_batch()
    follows_the_oracle(group, full, target, sized("40 + 24", (40, 24)))


def test_megatron_uneven_shards(pool: Pool) -> None:
    """Shards of 40 and 24 ids: loss off by 4.36, silently."""
    pool.run(_uneven, 2)


def _poisoned(group: dist.ProcessGroup, poison: float) -> None:
    rank = dist.get_rank(group)
    full, _ = full_batch(3)
    target = torch.tensor([3, -100, 60])
    clean = full.clone()
    full[1] = poison
    full[1, ::3] = 1.0
    for engine in ("auto", "eager"):
        for collective in COLLECTIVES:
            options: dict[str, Any] = {
                "group": group, "collective": collective, "engine": engine,
                "label_smoothing": 0.1, "lse_square_scale": 0.1,
            }  # fmt: skip
            x = even(64, 2).local(full, rank).requires_grad_()
            loss = cross_entropy(x, target, **options)
            assert torch.equal(loss, cross_entropy(even(64, 2).local(clean, rank), target,
                                                   **options))  # fmt: skip
            (grad,) = torch.autograd.grad(loss, x)
            assert bool((grad[1] == 0).all())
            assert bool(grad.isfinite().all())


@pytest.mark.parametrize("poison", [torch.inf, -torch.inf, torch.nan])
def test_megatron_ignored_rows_may_hold_inf_and_nan(pool: Pool, poison: float) -> None:
    """A row of inf or NaN with mask 0: NaN gradient, because 0 * NaN is NaN."""
    pool.run(_poisoned, 2, (poison,))


def _strange_layouts(group: dist.ProcessGroup) -> None:
    rank = dist.get_rank(group)
    local = torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(rank))
    target = torch.randint(0, 16, (3, 4), generator=torch.Generator().manual_seed(9))
    plain = local.transpose(0, 1).contiguous().requires_grad_()
    loss = cross_entropy(plain, target, group=group)
    (want,) = torch.autograd.grad(loss, plain)

    leaf = local.clone().requires_grad_()
    transposed = cross_entropy(leaf.transpose(0, 1), target, group=group)
    (grad,) = torch.autograd.grad(transposed, leaf)
    assert torch.equal(transposed, loss)
    assert torch.equal(grad.transpose(0, 1), want)

    both = torch.cat([plain.detach(), torch.zeros_like(plain)], -1).requires_grad_()
    for inplace in (False, True):
        chunk, other = (both * 1.0 if inplace else both).chunk(2, -1)
        if inplace:
            chunk = chunk.clone()  # an output of chunk is one of several views of its base
        chunked = cross_entropy(chunk, target, group=group, inplace_backward=inplace)
        (grad,) = torch.autograd.grad(chunked + 0.0 * other.sum(), both)
        assert torch.equal(chunked, loss)
        assert torch.equal(grad[..., :8], want)


def test_megatron_transposed_logits_and_chunks(pool: Pool) -> None:
    """Transposed logits raise in view(); a chunk of a bigger tensor is modified in place."""
    pool.run(_strange_layouts, 2)


def _z_after(group: dist.ProcessGroup) -> None:
    full, target = full_batch()
    rank = dist.get_rank(group)
    x = even(64, 2).local(full, rank).requires_grad_()
    y = torch.tanh(x)  # an operation that saved its output
    want = y.detach().logsumexp(-1)
    loss = cross_entropy(y, target, group=group)
    after = y.logsumexp(-1)
    assert torch.equal(after, want)
    (loss + after.sum()).backward()
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())


def test_megatron_a_z_loss_after_the_loss_sees_the_logits(pool: Pool) -> None:
    """z-loss after the loss on fp32 logits: 17.36 instead of 21.61; before it, backward raises."""
    pool.run(_z_after, 2)


def _gathered(group: dist.ProcessGroup) -> list[str]:
    full, _ = full_batch()
    target = torch.tensor([3, 40, 12, 63, 0, 1])
    out = []
    for collective in COLLECTIVES:
        for shard in (None, VocabShard(32 * dist.get_rank(group), 32 * dist.get_rank(group) + 32,
                                       64)):  # fmt: skip
            try:
                out.append(str(cross_entropy(full, target, group=group, shard=shard,
                                             collective=collective)))  # fmt: skip
            except ValueError as problem:
                out.append(str(problem)[:20])
    return out


def test_megatron_gathered_logits_are_refused(pool: Pool) -> None:
    """parallel_output=False with labels: the loss is too large by log(TP), the gradients wrong."""
    assert pool.run(_gathered, 2) == [["input looks gathered"] * 4] * 2


def _precision(group: dist.ProcessGroup) -> None:
    for dtype in (torch.float32, torch.float16, torch.float64):
        data = batch(48, 64, dtype)
        x = even(64, 2).local(data.logits, dist.get_rank(group)).requires_grad_()
        loss = cross_entropy(x, data.target, group=group)
        (grad,) = torch.autograd.grad(loss, x)
        gradients = expected(data.logits, data.target).gradients(lambda r: r.loss)
        check_gradient(grad, gradients, even(64, 2), dist.get_rank(group), str(dtype))


def test_megatron_gradients_are_not_rounded_to_bf16(pool: Pool) -> None:
    """The fused loss casts every gradient to bf16, those of fp32 and fp16 logits included."""
    pool.run(_precision, 2)
