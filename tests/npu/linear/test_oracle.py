"""The fused head by CANN's fused operators against whole logits in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from vocab_parallel_ce import linear_cross_entropy, linear_token_statistics
from vocab_parallel_ce.switches import LINEAR_VARIABLE
from vocab_parallel_ce.testing import Sharding
from vocab_parallel_ce.testing.shardings import even, sized

from ...cases import Findings
from ...linear.cases import check_head_gradients, close, expected_head, head_batch, rank_of
from ...ranks import Pool
from .calls import BF16, BOTH, FP16, ROWS, Calls, names_of, on_npu

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "weight, ignore 7": {"weight": True, "ignore_index": 7},
    "smoothing": {"label_smoothing": 0.3},
    "z-loss": {"lse_square_scale": 0.02},
    "scale 0.5": {"scale": 0.5},
    "all": {
        "weight": True,
        "ignore_index": 7,
        "label_smoothing": 0.1,
        "lse_square_scale": 0.01,
        "scale": 2.0,
    },
}


def _match(group: dist.ProcessGroup | None, sharding: Sharding, dtype: torch.dtype) -> list[int]:
    """Calls of the operators in each case."""
    from ...npu_sim.strict import calls

    rank, findings, counted = rank_of(group), Findings(), []
    for name, chosen in OPTIONS.items():
        options = dict(chosen)
        if dtype == FP16 and options.get("scale", 1) != 1:
            continue
        data = head_batch(ROWS, sharding.vocab_size, dtype, options.get("ignore_index", -100))
        given = dict(options)
        if options.pop("weight", False):
            options["weight"] = data.weight
            given["weight"] = data.weight.to("npu")
        for reduction in ("none", "mean"):
            want = expected_head(data, reduction=reduction, **options)
            mine = on_npu(data, sharding, rank)
            calls.clear()
            loss = linear_cross_entropy(
                mine.hidden, mine.head, data.target.to("npu"), reduction=reduction, group=group,
                shard=sharding.shard(rank), **given,
            )  # fmt: skip
            assert isinstance(loss, Tensor)
            up = data.upstream if reduction == "none" else data.upstream[0]
            got = torch.autograd.grad(loss, mine.leaves[:2], up.to("npu", loss.dtype))
            counted.append(len(names_of(calls)))
            exact, naive = want.losses
            wanted = want.gradients(lambda r, up=up: (r.loss * up.to(r.loss.dtype)).sum())  # type: ignore[misc]
            with findings:
                close(loss.cpu(), exact.loss, naive.loss, f"{name}, {reduction}")
                check_head_gradients(
                    (*(g.cpu() for g in got), None), wanted, sharding, rank, f"{name}, {reduction}"
                )
    findings.report()
    return counted


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_one_device(dtype: torch.dtype) -> None:
    assert set(_match(None, sized("padded", (300,), (5,)), dtype)) == {2}


@pytest.mark.parametrize("name", ["even", "padded", "one small"])
def test_two_devices(npu_pool: Pool, name: str) -> None:
    """A rank with fewer ids than the backward takes makes logits of them; the others do not."""
    plan = {
        "even": even(300, 2),
        "padded": sized("padded", (170, 130), (3, 4)),
        "one small": sized("one small", (100, 210)),
    }[name]
    first, second = npu_pool.run(_match, 2, (plan, BF16))
    assert set(first) == ({0} if name == "one small" else {2})
    assert set(second) == {2}


def _split(group: dist.ProcessGroup, sharding: Sharding) -> None:
    """A part of the sequence on each rank, three rows of each at a time."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    data = head_batch(20, sharding.vocab_size, BF16)
    want = expected_head(data, reduction="mean", label_smoothing=0.1, lse_square_scale=0.01)
    mine = on_npu(data, sharding, rank)
    part = mine.hidden.detach().chunk(world)[rank].clone().requires_grad_()
    loss = linear_cross_entropy(
        part, mine.head, data.target.to("npu"), group=group, sequence_parallel=True,
        label_smoothing=0.1, lse_square_scale=0.01, scratch_mib=6 * 150 * 2 / (1 << 20),
    )  # fmt: skip
    assert isinstance(loss, Tensor)
    of_part, of_head = torch.autograd.grad(loss, (part, mine.head))
    (of_hidden, naive), of_weight, _ = want.gradients(lambda r: r.loss)
    close(loss.cpu(), want.losses[0].loss, want.losses[1].loss, "loss")
    own = slice(rank * 10, rank * 10 + 10)
    close(of_part.cpu(), of_hidden[own], naive[own], "hidden states")
    check_head_gradients((None, of_head.cpu(), None), [of_weight] * 3, sharding, rank, "head")


def test_a_split_sequence(npu_pool: Pool) -> None:
    npu_pool.run(_split, 2, (even(300, 2),))


def _statistics(group: dist.ProcessGroup | None, sharding: Sharding) -> None:
    """A gradient of lse alone, and of log_prob alone: two coefficients a row."""
    rank = rank_of(group)
    data = head_batch(ROWS, sharding.vocab_size, BF16)
    want = expected_head(data, reduction="none")
    mine = on_npu(data, sharding, rank)
    out = linear_token_statistics(
        mine.hidden, mine.head, data.target.to("npu"), group=group, shard=sharding.shard(rank)
    )
    up, kept = data.upstream, data.target != -100
    close(out.lse.cpu(), want.losses[0].lse * kept, want.losses[1].lse, "lse")
    total = (out.lse * up.to("npu") - 2 * out.log_prob).sum()
    got = torch.autograd.grad(total, mine.leaves[:2])
    wanted = want.gradients(lambda r: (r.lse * kept * up + 2 * r.loss).sum())
    check_head_gradients((*(g.cpu() for g in got), None), wanted, sharding, rank, "statistics")


def test_statistics() -> None:
    _statistics(None, even(300, 1))


@pytest.mark.parametrize("way", ["fused", "recompute by chunks", "forward by chunks"])
def test_ignored_rows_are_dropped_on_request(
    way: str, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = head_batch(64, 300, BF16, ignored=0.7)
    kept = int((data.target != -100).sum())
    want = expected_head(data, reduction="mean")
    mine = on_npu(data, even(300, 1), 0)
    monkeypatch.setenv(LINEAR_VARIABLE, "fused" if way == "fused" else "chunks")
    rows = []
    for drop in (False, True):
        calls.clear()
        loss = linear_cross_entropy(
            mine.hidden, mine.head, data.target.to("npu"), drop_ignored=drop,
            gradient="forward" if "forward" in way else "recompute",
        )  # fmt: skip
        assert isinstance(loss, Tensor)
        got = torch.autograd.grad(loss, mine.leaves[:2])
        rows.append({call.rows for call in calls if call.columns == 300})
        close(loss.cpu(), want.losses[0].loss, want.losses[1].loss, way)
        wanted = want.gradients(lambda r: r.loss)
        check_head_gradients((*(g.cpu() for g in got), None), wanted, even(300, 1), 0, way)
    assert rows == [{64}, {kept}]


@pytest.mark.usefixtures("fresh")
def test_a_bad_target_is_nan_and_with_check_an_error() -> None:
    data = head_batch(6, 300, BF16, ignored=0.0)
    data.target[4] = 300
    mine = on_npu(data, even(300, 1), 0)
    loss = linear_cross_entropy(mine.hidden, mine.head, data.target.to("npu"), reduction="none")
    assert isinstance(loss, Tensor)
    assert loss.isnan().cpu().tolist() == [False] * 4 + [True, False]
    with pytest.raises(ValueError, match="row 4 holds 300"):
        linear_cross_entropy(mine.hidden, mine.head, data.target.to("npu"), check=True)


@pytest.mark.usefixtures("fresh")
def test_compiled(calls: Calls) -> None:
    """The device is asked while the compiler looks on."""
    torch._dynamo.reset()
    data = head_batch(ROWS, 300, BF16)
    mine, target = on_npu(data, even(300, 1), 0), data.target.to("npu")

    def loss(hidden: Tensor, head: Tensor) -> Tensor:
        out = linear_cross_entropy(hidden, head, target, label_smoothing=0.1)
        assert isinstance(out, Tensor)
        return out

    got = torch.compile(loss, fullgraph=True, backend="aot_eager")(mine.hidden, mine.head)
    gradients = torch.autograd.grad(got, mine.leaves[:2])
    assert names_of(calls) == BOTH
    want = loss(mine.hidden, mine.head)
    assert torch.equal(got, want)
    for a, b in zip(gradients, torch.autograd.grad(want, mine.leaves[:2]), strict=True):
        assert torch.equal(a, b)
