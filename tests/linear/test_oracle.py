"""The fused head against whole logits in fp64: every option, sharding, way and size of chunk."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from vocab_parallel_ce import linear_cross_entropy, linear_token_statistics
from vocab_parallel_ce.testing import ReferenceLoss, Sharding

from ..cases import SHARDINGS, Findings
from ..ranks import Pool
from .cases import (
    check_head_gradients,
    close,
    expected_head,
    head_batch,
    local_head,
    rank_of,
    scratch_for,
)

ROWS = 21
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"biased": True},
    "weight": {"weight": True},
    "ignore 7, weight": {"ignore_index": 7, "weight": True},
    "smoothing": {"label_smoothing": 0.3},
    "z-loss": {"lse_square_scale": 0.02},
    "scale": {"scale": 0.37},
    "softcap": {"softcap": 2.0, "scale": 0.7, "biased": True},
    "all": {
        "weight": True,
        "ignore_index": 7,
        "label_smoothing": 0.1,
        "lse_square_scale": 0.01,
        "scale": 1.7,
        "biased": True,
    },
}
# Of forward and backward by columns, of few rows, of one, and of all.
CHUNKS = (None, 4, 1, ROWS)
WAYS = (
    ("none", "auto"),
    ("mean", "forward"),
    ("mean", "recompute"),
    ("sum", "forward"),
    ("sum", "auto"),
)
ENGINES = ("auto", "eager")
COLLECTIVES = ("auto", "all_reduce", "all_gather")


def _weighed(up: Tensor) -> Callable[[ReferenceLoss], Tensor]:
    return lambda outcome: (outcome.loss * up.to(outcome.loss.dtype)).sum()


def _losses_match(group: dist.ProcessGroup, sharding: Sharding, dtype: torch.dtype) -> int:
    rank, findings, done = rank_of(group), Findings(), 0
    share = -(-sharding.vocab_size // dist.get_world_size(group))
    chunks, engines = itertools.cycle(CHUNKS), itertools.cycle(ENGINES)
    collectives = itertools.cycle(COLLECTIVES)
    for name, chosen in OPTIONS.items():
        options = dict(chosen)
        biased = options.pop("biased", False)
        data = head_batch(ROWS, sharding.vocab_size, dtype, options.get("ignore_index", -100))
        if options.pop("weight", False):
            options["weight"] = data.weight
        for reduction, gradient in WAYS:
            want = expected_head(data, reduction=reduction, biased=biased, **options)
            chunk, engine, collective = next(chunks), next(engines), next(collectives)
            what = f"{name}, {reduction}, {gradient}, chunk {chunk}, {engine}, {collective}"
            mine = local_head(data, sharding, rank)
            loss = linear_cross_entropy(
                mine.hidden, mine.head, data.target, reduction=reduction,
                linear_bias=mine.bias if biased else None, group=group,
                shard=sharding.shard(rank), engine=engine, collective=collective, gradient=gradient,
                scratch_mib=None if chunk is None else scratch_for(chunk, share, dtype), **options,
            )  # fmt: skip
            assert isinstance(loss, torch.Tensor)
            up = data.upstream if reduction == "none" else data.upstream[0]
            got = torch.autograd.grad(loss, mine.leaves, up.to(loss.dtype), allow_unused=True)
            with findings:
                assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
                exact, naive = want.losses
                close(loss, exact.loss, naive.loss, what)
                assert (got[2] is not None) == biased
                wanted = want.gradients(_weighed(up))
                check_head_gradients(got, wanted, sharding, rank, what)
            done += 1
    findings.report()
    return done


QUICK = {1: ("even", "padded"), 2: ("even", "padded", "all padding"), 3: ("backwards",)}
PLANS = [
    pytest.param(
        world, plan, torch.float64,
        marks=() if plan.name in QUICK.get(world, ()) else pytest.mark.full,
        id=f"{world} ranks {plan.name}",
    )
    for world, plan in SHARDINGS
]  # fmt: skip


@pytest.mark.parametrize(("world", "sharding", "dtype"), PLANS)
def test_loss_and_gradients(pool: Pool, world: int, sharding: Sharding, dtype: torch.dtype) -> None:
    done = pool.run(_losses_match, world, (sharding, dtype))
    assert done == [len(OPTIONS) * len(WAYS)] * world


NARROW = [
    pytest.param(world, plan, dtype, id=f"{world} ranks {plan.name} {dtype}")
    for world, plan in SHARDINGS
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    if (world, plan.name) == (2, "padded")
]


@pytest.mark.parametrize(("world", "sharding", "dtype"), NARROW)
def test_other_dtypes(pool: Pool, world: int, sharding: Sharding, dtype: torch.dtype) -> None:
    pool.run(_losses_match, world, (sharding, dtype))


def _statistics_match(group: dist.ProcessGroup, sharding: Sharding, chunk: int) -> None:
    rank, findings, dtype = rank_of(group), Findings(), torch.float64
    share = -(-sharding.vocab_size // dist.get_world_size(group))
    data = head_batch(ROWS, sharding.vocab_size, dtype)
    g = torch.Generator().manual_seed(3)
    scale = torch.rand(ROWS, generator=g) + 0.5
    selected = torch.randint(sharding.vocab_size, (ROWS, 3), generator=g)
    selected[:, 1] = data.target  # of an ignored row no class
    selected[::2, 2] = selected[::2, 0]
    want = expected_head(data, reduction="none", scale=scale, selected=selected)
    mine = local_head(data, sharding, rank)
    out = linear_token_statistics(
        mine.hidden, mine.head, data.target, entropy=True, argmax=True, sum_p_squared=True,
        selected=selected, scale=scale, group=group, shard=sharding.shard(rank),
        scratch_mib=scratch_for(chunk, share, dtype),
    )  # fmt: skip
    exact = want.losses[0]
    kept = data.target != -100
    assert out.entropy is not None
    with findings:
        close(out.log_prob, -exact.loss, -exact.loss, "log_prob")
        close(out.lse, exact.lse * kept, exact.lse, "lse")
        close(out.entropy, exact.entropy, exact.entropy, "entropy")
        for name in ("sum_p_squared", "selected_log_prob"):
            right = getattr(exact, name)
            close(getattr(out, name), right, right, name)
        assert out.argmax is not None
        assert torch.equal(out.argmax, exact.argmax)
    up = data.upstream.double()
    assert out.selected_log_prob is not None
    further, each = out.selected_log_prob, torch.tensor([1.0, -2.0, 0.5])
    total = ((out.log_prob + 2 * out.lse - 3 * out.entropy + (further * each).sum(-1)) * up).sum()
    got = (*torch.autograd.grad(total, mine.leaves[:2]), None)

    def same(r: ReferenceLoss) -> Tensor:
        rows = 2 * r.lse - 3 * r.entropy - r.loss + (r.selected_log_prob * each).sum(-1)
        return (rows * up * kept).sum()

    wanted = want.gradients(same)
    with findings:
        check_head_gradients(got, wanted, sharding, rank, "statistics")
    findings.report()


@pytest.mark.parametrize("chunk", [1, 5, ROWS])
@pytest.mark.parametrize(("world", "sharding", "_"), PLANS)
def test_token_statistics(pool: Pool, world: int, sharding: Sharding, chunk: int, _: Any) -> None:
    pool.run(_statistics_match, world, (sharding, chunk))


def _bits(group: dist.ProcessGroup, sharding: Sharding) -> list[bytes]:
    data = head_batch(ROWS, sharding.vocab_size, torch.float32)
    mine = local_head(data, sharding, rank_of(group))
    out = []
    for chunk in (None, 4):
        for reduction in ("none", "mean"):
            loss = linear_cross_entropy(
                mine.hidden, mine.head, data.target, reduction=reduction, label_smoothing=0.1,
                group=group, shard=sharding.shard(rank_of(group)), collective="all_gather",
                scratch_mib=None if chunk is None else scratch_for(chunk, 20, torch.float32),
            )  # fmt: skip
            assert isinstance(loss, torch.Tensor)
            (grad,) = torch.autograd.grad(loss.sum(), mine.hidden)
            out += [loss.detach().numpy().tobytes(), grad.numpy().tobytes()]
    return out


def test_the_same_bits_on_every_rank(pool: Pool) -> None:
    sharding = next(p for w, p in SHARDINGS if w == 3 and p.name == "padded")
    first, *others = pool.run(_bits, 3, (sharding,))
    assert all(other == first for other in others)
