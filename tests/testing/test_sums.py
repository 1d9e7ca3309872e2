"""Sums of shards against the oracle: the same loss, gradient norm and log-sum-exp."""

from __future__ import annotations

import pytest
import torch

from vocab_parallel_ce.testing import (
    Sharding,
    batch,
    cross_entropy,
    merge_sums,
    shard_sums,
    shardings,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("world", "plan"),
    [(w, p) for w in (1, 2, 3) for p in shardings(w) if all(a < b for a, b in p.bounds)],
    ids=lambda value: value.name if isinstance(value, Sharding) else str(value),
)
def test_the_oracle_agrees(world: int, plan: Sharding, dtype: torch.dtype) -> None:
    data = batch(10, plan.vocab_size, dtype, ignored=0.0, spread=5.0)
    x = data.logits.double().requires_grad_()
    want = cross_entropy(x, data.target)
    (gradient,) = torch.autograd.grad(want.loss, x)
    blocks = [slice(0, 4), slice(4, 8), slice(8, 10)]
    parts = [
        shard_sums(plan.columns(data.logits, r), data.target - start, blocks, torch.device("cpu"))
        for r, (start, _) in enumerate(plan.bounds)
    ]
    found = merge_sums(torch.stack(parts))
    assert found.loss == pytest.approx(want.loss.item(), rel=1e-14)
    assert found.gradient_norm == pytest.approx(gradient.norm().item(), rel=1e-13)
    torch.testing.assert_close(found.lse, want.lse.detach(), rtol=1e-14, atol=0)


def test_logits_are_only_read() -> None:
    logits = torch.randn(3, 5, dtype=torch.float64)
    before = logits.clone()
    shard_sums(logits, torch.tensor([0, 1, 9]), [slice(0, 3)], logits.device)
    assert torch.equal(logits, before)
