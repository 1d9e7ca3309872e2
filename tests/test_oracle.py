"""The loss and its gradient against the fp64 oracle: every option, dtype, sharding and world."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from vocab_parallel_ce import (
    VocabParallelCrossEntropyLoss,
    cross_entropy,
    cross_entropy_loss,
    token_statistics,
)
from vocab_parallel_ce.testing import (
    ReferenceLoss,
    Sharding,
    assert_close,
    batch,
    even,
    naive_error,
    sized,
)

from .cases import SHARDINGS, Findings, check_gradient, expected
from .device import DEVICE, DTYPES, move
from .ranks import Pool

REDUCTIONS = ("none", "mean", "sum")
ROWS = 96  # the naive error of few rows may be small by luck

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "weight": {"weight": True},
    "ignore 0": {"ignore_index": 0},
    "ignore 7, weight": {"ignore_index": 7, "weight": True},
    "ignore -1": {"ignore_index": -1},
    "smoothing": {"label_smoothing": 0.3},
    "all smoothing": {"label_smoothing": 1.0},
    "z-loss": {"lse_square_scale": 0.02},
    "scale": {"scale": 0.37},
    "softcap": {"softcap": 3.0, "scale": 0.8},
    "scale of each row": {"scale": torch.linspace(0.25, 2.0, ROWS, dtype=torch.float64)},
    "all": {
        "weight": True,
        "ignore_index": 7,
        "label_smoothing": 0.1,
        "lse_square_scale": 0.01,
        "scale": 1.7,
        "softcap": 5.0,
    },
}


def _on_device(options: dict[str, Any]) -> dict[str, Any]:
    return {k: move(v) if isinstance(v, Tensor) else v for k, v in options.items()}


def _ways() -> Iterator[tuple[str, str]]:
    """(engine, collective) for ever, so that options meet every pair without the full product."""
    while True:
        yield "auto", "all_gather"
        yield "eager", "all_reduce"
        yield "auto", "all_reduce"
        yield "eager", "all_gather"
        yield "auto", "auto"


def _leaf(sharding: Sharding, logits: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    rank = 0 if group is None else dist.get_rank(group)
    return move(sharding.local(logits, rank)).requires_grad_()


def _losses_match(group: dist.ProcessGroup, sharding: Sharding, dtype: torch.dtype) -> int:
    rank, ways, done, findings = dist.get_rank(group), _ways(), 0, Findings()
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
            x = _leaf(sharding, data.logits, group)
            target = move(data.target.int() if done % 2 else data.target)
            loss = cross_entropy(
                x, target, None if weight is None else move(weight), reduction,
                group=group, shard=sharding.shard(rank), engine=engine, collective=collective,
                **_on_device(options),
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


def _operator_matches(group: dist.ProcessGroup, sharding: Sharding, dtype: torch.dtype) -> None:
    rank, ways, findings = dist.get_rank(group), _ways(), Findings()
    for name, chosen in OPTIONS.items():
        for reduction, return_zloss in (("none", True), ("mean", True), ("sum", False)):
            engine, collective = next(ways)
            what = f"{name}, {reduction}, {engine}, {collective}"
            with findings:  # the call itself is the first thing that can fail there
                _one_operator_call(
                    group, sharding, dtype, dict(chosen), reduction, return_zloss, engine,
                    collective, rank, what,
                )  # fmt: skip
    findings.report()


def _one_operator_call(
    group: dist.ProcessGroup,
    sharding: Sharding,
    dtype: torch.dtype,
    chosen: dict[str, Any],
    reduction: str,
    return_zloss: bool,
    engine: str,
    collective: str,
    rank: int,
    what: str,
) -> None:
    ignore_index = chosen.get("ignore_index", -100)
    data = batch(ROWS, sharding.vocab_size, dtype, ignore_index, seed=3, unreadable=True)
    weight = data.weight if chosen.pop("weight", False) else None
    want = expected(data.logits, data.target, weight, reduction=reduction, **chosen)
    z_scale = chosen.pop("lse_square_scale", 0.0)
    x = _leaf(sharding, data.logits, group)
    out = cross_entropy_loss(
        x, move(data.target), None if weight is None else move(weight), reduction,
        lse_square_scale_for_zloss=z_scale, return_zloss=return_zloss,
        group=group, shard=sharding.shard(rank), engine=engine, collective=collective,
        **_on_device(chosen),
    )  # fmt: skip

    shape = (ROWS,) if reduction == "none" else (1,)
    size = sharding.bounds[rank][1] - sharding.bounds[rank][0]
    assert {t.dtype for t in out} == {dtype}
    assert out.loss.shape == shape
    assert out.zloss.shape == (shape if return_zloss else (0,))
    assert out.lse_for_zloss.shape == ((ROWS,) if z_scale else (0,))
    assert out.log_prob.shape == x.shape
    assert not out.log_prob.requires_grad
    assert not out.lse_for_zloss.requires_grad

    exact, plain = want.exact, want.naive
    assert_close(
        out.loss, exact.loss.reshape(shape), plain.loss.reshape(shape), what,
        rows_error=want.rows_error,
    )  # fmt: skip
    if return_zloss:
        assert_close(
            out.zloss, exact.zloss.reshape(shape), plain.zloss.reshape(shape), f"zloss, {what}",
            rows_error=want.rows_error,
        )  # fmt: skip
    if z_scale:
        assert_close(out.lse_for_zloss, exact.lse, plain.lse, f"lse_for_zloss, {what}")
    assert_close(
        out.log_prob[..., :size],
        sharding.columns(exact.log_prob, rank),
        sharding.columns(plain.log_prob, rank),
        f"log_prob, {what}",
        rows_error=naive_error(exact.log_prob, plain.log_prob, dtype),
    )
    assert bool((out.log_prob[..., size:] == -torch.inf).all())

    up = data.upstream[: out.loss.numel()]
    total = (out.loss * up.to(DEVICE, dtype)).sum()
    if return_zloss:
        total = total + 0.5 * out.zloss.sum()

    def same(r: ReferenceLoss) -> Tensor:
        value = (r.loss * up.to(r.loss.dtype).reshape(r.loss.shape)).sum()
        return value + 0.5 * r.zloss.sum() if return_zloss else value

    (grad,) = torch.autograd.grad(total, x)
    check_gradient(grad, want.gradients(same), sharding, rank, what)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("world", "sharding"),
    [
        (1, even(60, 1)),
        (2, sized("padded", (35, 25), (1, 8))),
        (3, even(60, 3)),
        (4, sized("empty", (30, 0, 13, 17), (0, 4, 0, 2))),
    ],
    ids=["1", "2", "3", "4"],
)
def test_cross_entropy_loss(pool: Pool, world: int, sharding: Sharding, dtype: torch.dtype) -> None:
    pool.run(_operator_matches, world, (sharding, dtype))


def _no_log_prob(group: dist.ProcessGroup) -> None:
    data = batch(4, 6, torch.bfloat16)
    sharding = even(6, dist.get_world_size(group))
    x = move(sharding.local(data.logits, dist.get_rank(group)))
    out = cross_entropy_loss(x, move(data.target), return_log_prob=False, group=group)
    assert out.log_prob.shape == out.zloss.shape == out.lse_for_zloss.shape == (0,)


@pytest.mark.parametrize("world", [1, 3])
def test_cross_entropy_loss_leaves_log_prob_out(pool: Pool, world: int) -> None:
    pool.run(_no_log_prob, world)


def _statistics_match(group: dist.ProcessGroup, sharding: Sharding, dtype: torch.dtype) -> None:
    rank, ways, findings = dist.get_rank(group), _ways(), Findings()
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
            x = _leaf(sharding, data.logits, group)
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
        x = _leaf(sharding, data.logits, group)
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
        x = _leaf(sharding, data.logits, group)
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
