"""``cross_entropy_loss`` against the fp64 oracle: all four results and the gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from vocab_parallel_ce import cross_entropy_loss
from vocab_parallel_ce.testing import (
    ReferenceLoss,
    Sharding,
    assert_close,
    batch,
    even,
    naive_error,
    sized,
)

from .cases import Findings, check_gradient, expected
from .device import DEVICE, DTYPES, move
from .options import OPTIONS, ROWS, all_ways, local_leaf, on_device
from .ranks import Pool


def _operator_matches(group: dist.ProcessGroup, sharding: Sharding, dtype: torch.dtype) -> None:
    rank, ways, findings = dist.get_rank(group), all_ways(), Findings()
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
    x = local_leaf(sharding, data.logits, group)
    out = cross_entropy_loss(
        x, move(data.target), None if weight is None else move(weight), reduction,
        lse_square_scale_for_zloss=z_scale, return_zloss=return_zloss,
        group=group, shard=sharding.shard(rank), engine=engine, collective=collective,
        **on_device(chosen),
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
