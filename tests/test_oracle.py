"""The loss and its gradient against the fp64 oracle: every option, dtype, sharding and world."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from vocab_parallel_ce import VocabParallelCrossEntropyLoss, cross_entropy
from vocab_parallel_ce.testing import Sharding, assert_close, batch, even, sized

from .cases import SHARDINGS, Findings, check_gradient, expected
from .device import DEVICE, DTYPES, move
from .options import OPTIONS, REDUCTIONS, ROWS, all_ways, local_leaf, on_device
from .ranks import Pool


def _losses_match(group: dist.ProcessGroup, sharding: Sharding, dtype: torch.dtype) -> int:
    rank, ways, done, findings = dist.get_rank(group), all_ways(), 0, Findings()
    for name, chosen in OPTIONS.items():
        ignore_index = chosen.get("ignore_index", -100)
        data = batch(
            ROWS, sharding.vocab_size, dtype, ignore_index, seed=len(name), unreadable=True
        )
        options = {k: v for k, v in chosen.items() if k != "weight"}
        weight = data.weight if "weight" in chosen else None
        for reduction in REDUCTIONS:
            engine, collective = next(ways)
            what = f"{name}, {reduction}, {engine}, {collective}"
            want = expected(data.logits, data.target, weight, reduction=reduction, **options)
            x = local_leaf(sharding, data.logits, group)
            target = move(data.target.int() if done % 2 else data.target)
            loss = cross_entropy(
                x, target, None if weight is None else move(weight), reduction,
                group=group, shard=sharding.shard(rank), engine=engine, collective=collective,
                **on_device(options),
            )  # fmt: skip
            with findings:
                assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
                assert_close(
                    loss, want.exact.loss, want.naive.loss, what, rows_error=want.rows_error
                )
                up = data.upstream if reduction == "none" else data.upstream[0]
                up = up.to(loss.dtype)
                (grad,) = torch.autograd.grad(loss, x, up.to(DEVICE))
                assert grad.dtype == dtype
                gradients = want.gradients(lambda r, up=up: (r.loss * up.to(r.loss.dtype)).sum())
                check_gradient(grad, gradients, sharding, rank, what)
            done += 1
    findings.report()
    return done


# fp32 on every sharding; the other dtypes on the one with empty shards and padding at once.
PLANS = [(world, plan, torch.float32) for world, plan in SHARDINGS] + [
    (world, plan, dtype)
    for world, plan in SHARDINGS
    for dtype in DTYPES[1:]
    if plan.name == ("padded" if world == 1 else "all padding")
]

# On the stand-in each plan takes five times as long: those that differ least are left for test-all.
THIN = ("even", "padded", "all padding") if DEVICE == "npu" else tuple(p.name for _, p in SHARDINGS)


@pytest.mark.parametrize(
    ("world", "sharding", "dtype"),
    [pytest.param(*plan, marks=() if plan[1].name in THIN else pytest.mark.full) for plan in PLANS],
    ids=[f"{w} ranks {p.name} {d}" for w, p, d in PLANS],
)
def test_cross_entropy(pool: Pool, world: int, sharding: Sharding, dtype: torch.dtype) -> None:
    done = pool.run(_losses_match, world, (sharding, dtype))
    assert done == [len(OPTIONS) * len(REDUCTIONS)] * world


def _module_matches(group: dist.ProcessGroup, sharding: Sharding) -> None:
    rank = dist.get_rank(group)
    data = batch(ROWS, sharding.vocab_size, torch.float32, ignore_index=3)
    options: dict[str, Any] = {
        "ignore_index": 3, "label_smoothing": 0.1, "lse_square_scale": 0.01, "scale": 0.5,
    }  # fmt: skip
    for reduction in REDUCTIONS:
        module = VocabParallelCrossEntropyLoss(
            move(data.weight), reduction, group=group, shard=sharding.shard(rank), **options
        )
        assert module.state_dict().keys() == {"weight"}
        want = expected(data.logits, data.target, data.weight, reduction=reduction, **options)
        x = local_leaf(sharding, data.logits, group)
        loss = module(x, move(data.target))
        assert_close(loss, want.exact.loss, want.naive.loss, rows_error=want.rows_error)
        (grad,) = torch.autograd.grad(loss.sum(), x)
        check_gradient(grad, want.gradients(lambda r: r.loss.sum()), sharding, rank, reduction)


@pytest.mark.parametrize("world", [1, 2])
def test_module(pool: Pool, world: int) -> None:
    pool.run(_module_matches, world, (even(60, world),))


def _wide_rows_match(group: dist.ProcessGroup, dtype: torch.dtype) -> None:
    """Rows longer than any block of an engine, shapes of more than two dimensions."""
    rank = dist.get_rank(group)
    sharding = sized("wide", (2300, 1501), (0, 7))
    data, findings = batch(6, sharding.vocab_size, dtype), Findings()
    for engine in ("auto", "eager"):
        want = expected(data.logits, data.target, reduction="none", label_smoothing=0.1)
        x = local_leaf(sharding, data.logits, group)
        y = x.view(2, 3, -1).transpose(0, 1)
        target = move(data.target.view(2, 3).t())
        loss = cross_entropy(
            y, target, reduction="none", label_smoothing=0.1,
            group=group, shard=sharding.shard(rank), engine=engine,
        )  # fmt: skip
        with findings:
            assert loss.shape == (3, 2)
            assert_close(loss.t().reshape(-1), want.exact.loss, want.naive.loss, engine)
            (grad,) = torch.autograd.grad(loss.sum(), x)
            check_gradient(grad, want.gradients(lambda r: r.loss.sum()), sharding, rank, engine)
    findings.report()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_wide_rows_and_leading_dimensions(pool: Pool, dtype: torch.dtype) -> None:
    pool.run(_wide_rows_match, 2, (dtype,))


def _no_rows(group: dist.ProcessGroup) -> None:
    size = 3
    x = torch.empty(2, 0, size, requires_grad=True, device=DEVICE)
    target = torch.empty(2, 0, dtype=torch.int64, device=DEVICE)
    for collective in ("all_gather", "all_reduce"):
        loss = cross_entropy(x, target, reduction="sum", group=group, collective=collective)
        assert loss.item() == 0.0
        assert torch.autograd.grad(loss, x)[0].shape == x.shape
        none = cross_entropy(x, target, reduction="none", group=group, collective=collective)
        assert none.shape == (2, 0)
        mean = cross_entropy(x, target, group=group, collective=collective)
        assert mean.isnan()  # as in PyTorch


@pytest.mark.parametrize("world", [1, 2])
def test_no_rows_at_all(pool: Pool, world: int) -> None:
    pool.run(_no_rows, world)
