"""What the two museums share: one batch, and one way to hold a loss against the oracle."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vocab_parallel_ce import cross_entropy
from vocab_parallel_ce.testing import Sharding, assert_close, batch, even

from .cases import Findings, check_gradient, expected

COLLECTIVES = ("all_gather", "all_reduce")


def follows_the_oracle(
    group: dist.ProcessGroup,
    full: Tensor,
    target: Tensor,
    sharding: Sharding | None = None,
    weight: Tensor | None = None,
    **options: Any,
) -> list[float]:
    """Loss and gradient, rows and mean, both collectives and engines; returns the row losses."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    sharding = sharding or even(full.shape[-1], world)
    findings = Findings()
    out: list[float] = []
    for engine in ("auto", "eager"):
        for collective in COLLECTIVES:
            for reduction in ("none", "mean"):
                x = sharding.local(full, rank).requires_grad_()
                loss = cross_entropy(
                    x, target, weight, reduction, group=group, shard=sharding.shard(rank),
                    engine=engine, collective=collective, **options,
                )  # fmt: skip
                want = expected(full, target, weight, reduction=reduction, **options)
                what = f"{engine}, {collective}, {reduction}"
                with findings:
                    assert_close(
                        loss, want.exact.loss, want.naive.loss, what, rows_error=want.rows_error
                    )
                with findings:
                    (grad,) = torch.autograd.grad(loss.sum(), x)
                    gradients = want.gradients(lambda r: r.loss.sum())
                    check_gradient(grad, gradients, sharding, rank, what)
                if reduction == "none":
                    out = loss.tolist()
    findings.report()
    return out


def full_batch(rows: int = 6, columns: int = 64, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    data = batch(rows, columns, torch.float32)
    return data.logits * factor, data.target
