"""``token_statistics`` against the fp64 oracle, and ties of argmax."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from vocab_parallel_ce import token_statistics
from vocab_parallel_ce.testing import ReferenceLoss, Sharding, assert_close, batch, even, sized

from .cases import Findings, check_gradient, expected
from .device import DEVICE, DTYPES, move
from .options import ROWS, all_ways, local_leaf
from .ranks import Pool


def _statistics_match(group: dist.ProcessGroup, sharding: Sharding, dtype: torch.dtype) -> None:
    rank, ways, findings = dist.get_rank(group), all_ways(), Findings()
    for ignore_index in (-100, 0, 7, -1):
        for scale in (1.0, 2.5):
            engine, collective = next(ways)
            what = f"ignore {ignore_index}, scale {scale}, {engine}, {collective}"
            data = batch(ROWS, sharding.vocab_size, dtype, ignore_index, seed=5)
            kept = data.target != ignore_index
            softcap = 4.0 if ignore_index == 7 else 0.0
            want = expected(
                data.logits, data.target, ignore_index=ignore_index, reduction="none", scale=scale,
                softcap=softcap,
            )  # fmt: skip
            x = local_leaf(sharding, data.logits, group)
            # argmax always gathers: without it, so that the all_reduce carries entropy as well.
            for argmax in (False, True):
                got = token_statistics(
                    x, move(data.target), entropy=True, argmax=argmax, sum_p_squared=True,
                    ignore_index=ignore_index, group=group, shard=sharding.shard(rank), scale=scale,
                    softcap=softcap, engine=engine, collective="auto" if argmax else collective,
                )  # fmt: skip
                with findings:
                    squares = want.exact.sum_p_squared, want.naive.sum_p_squared
                    pairs = {
                        "sum_p_squared": (got.sum_p_squared, *squares),
                        "log_prob": (got.log_prob, -want.exact.loss, -want.naive.loss),
                        "lse": (
                            got.lse,
                            torch.where(kept, want.exact.lse, 0.0),
                            torch.where(kept, want.naive.lse, 0.0),
                        ),
                        "entropy": (got.entropy, want.exact.entropy, want.naive.entropy),
                    }
                    for name, (actual, exact, plain) in pairs.items():
                        assert actual is not None
                        assert_close(actual, exact, plain, f"{name}, {what}")
                    if argmax:
                        assert got.argmax is not None
                        assert got.argmax.dtype == torch.int64
                        assert torch.equal(got.argmax.cpu(), want.exact.argmax)
                    else:
                        assert got.argmax is None
                    up = data.upstream.to(got.lse.dtype)
                    assert got.entropy is not None
                    there = up.to(DEVICE)
                    total = there * got.log_prob + there.flip(0) * got.lse + 0.5 * got.entropy

                    def same(r: ReferenceLoss, kept: Tensor = kept, up: Tensor = up) -> Tensor:
                        up = up.to(r.loss.dtype)
                        lse = torch.where(kept, r.lse, 0.0)
                        return (up * -r.loss + up.flip(0) * lse + 0.5 * r.entropy).sum()

                    (grad,) = torch.autograd.grad(total.sum(), x)
                    check_gradient(grad, want.gradients(same), sharding, rank, what)
    findings.report()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("world", "sharding"),
    [
        (1, sized("padded", (53,), (7,))),
        (2, even(60, 2)),
        (3, sized("empty", (25, 0, 35), (1, 1, 0))),
        (4, sized("uneven", (3, 30, 12, 15))),
    ],
    ids=["1", "2", "3", "4"],
)
def test_token_statistics(pool: Pool, world: int, sharding: Sharding, dtype: torch.dtype) -> None:
    pool.run(_statistics_match, world, (sharding, dtype))


def _statistics_not_asked_for(group: dist.ProcessGroup) -> None:
    x = even(6, dist.get_world_size(group)).local(batch(4, 6, torch.float32).logits, 0)
    x = move(x + dist.get_rank(group))
    got = token_statistics(x, move(torch.tensor([1, 2, 5, 0])), group=group)
    assert got.entropy is None
    assert got.argmax is None
    assert got.sum_p_squared is None


def test_statistics_that_nobody_asked_for_are_none(pool: Pool) -> None:
    pool.run(_statistics_not_asked_for, 2)


# argmax


def _ties(group: dist.ProcessGroup, sharding: Sharding, dtype: torch.dtype) -> list[int]:
    rank = dist.get_rank(group)
    full = torch.zeros(5, 12, dtype=dtype)
    full[0, [3, 5, 11]] = 4.0  # inside a shard and across shards
    full[1, [7, 11]] = 4.0
    full[2] = -torch.inf
    full[2, [9, 10]] = -1e4
    full[3] = 2.0  # everything ties
    full[4, 4] = torch.inf
    target = torch.tensor([0, 0, 9, 0, -100])
    x = move(sharding.local(full, rank))
    got = token_statistics(x, move(target), argmax=True, group=group, shard=sharding.shard(rank))
    assert got.argmax is not None
    return got.argmax.tolist()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "sharding",
    [even(12, 3), sized("uneven", (4, 0, 8), (1, 2, 3)), sized("last first", (5, 6, 1))],
    ids=lambda s: s.name,
)
def test_argmax_ties_go_to_the_smallest_id(
    pool: Pool, sharding: Sharding, dtype: torch.dtype
) -> None:
    assert pool.run(_ties, 3, (sharding, dtype)) == [[3, 7, 9, 0, -1]] * 3


def test_argmax_ties_with_shards_out_of_rank_order(pool: Pool) -> None:
    bounds = ((8, 12), (0, 5), (5, 8))
    sharding = Sharding("backwards", 12, bounds, (0, 0, 0))
    assert pool.run(_ties, 3, (sharding, torch.float32)) == [[3, 7, 9, 0, -1]] * 3
