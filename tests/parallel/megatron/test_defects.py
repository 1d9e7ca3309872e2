"""Defects of the losses of megatron-core that are replaced, one test each: its result and ours.

Measured on 0.12.1 and 0.16.1, which compute alike. A test that fails on Megatron's side tells that
Megatron has mended it. What comes of overwriting the logits has a file of its own. Not here:
TransformerEngine's loss, which needs CUDA, and the fused linear loss of the development branch.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from vocab_parallel_ce import VocabShard
from vocab_parallel_ce.parallel.megatron import install

from ...ranks import Pool
from .cases import (
    LOSSES,
    THEIRS,
    Outcome,
    error,
    exact,
    loss_named,
    megatron,
    outcome,
    shard,
    tokens,
    whole,
)


def _every_loss(
    rank: dist.ProcessGroup, dtype: torch.dtype, edit: str = "", names: tuple[str, ...] = LOSSES
) -> dict[str, Outcome]:
    """Each loss on the same tokens; ``edit`` names what is done to them first."""
    with megatron(tp=2) as group:
        logits, target = _edited(*tokens(), edit)
        x = shard(logits.to(dtype), group)
        return {name: outcome(loss_named(name, group), x, target) for name in names}


def _edited(logits: Tensor, target: Tensor, edit: str) -> tuple[Tensor, Tensor]:
    if edit == "ignored":
        target[1, 2] = -100
    elif edit == "beyond":
        target[1, 2] = 64
    elif edit == "masked shard":
        logits[..., 32:] = -math.inf
        target = target % 32
    elif edit == "broken row":
        logits[1, 2, 5], logits[1, 2, 40] = math.inf, math.nan
    elif edit == "broken and ignored":
        logits, target = _edited(*_edited(logits, target, "ignored"), "broken row")
    return logits, target


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_loss_is_as_exact(pair: Pool, dtype: torch.dtype) -> None:
    """Not a defect: all compute in fp32."""
    ranks = pair.run(_every_loss, 2, (dtype,))
    logits, target = tokens()
    want = exact(logits.to(dtype), target)
    for rank in ranks:
        for name in LOSSES:
            assert rank[name]["loss"].dtype == torch.float32
            assert error(rank[name]["loss"], want.loss) < 1e-6
        want.check(rank["ours"]["loss"], whole(ranks, "ours"))
    assert torch.equal(ranks[0]["ours"]["loss"], ranks[1]["ours"]["loss"])


@pytest.mark.parametrize(
    ("dtype", "unfused"),
    [(torch.float32, 1e-6), (torch.float16, 5e-4), (torch.float64, 1e-6)],
    ids=str,
)
def test_the_fused_gradient_is_rounded_to_bf16_whatever_the_dtype(
    pair: Pool, dtype: torch.dtype, unfused: float
) -> None:
    """And fp64 logits are computed in fp32 by both of Megatron's."""
    ranks = pair.run(_every_loss, 2, (dtype,))
    logits, target = tokens()
    want = exact(logits.to(dtype), target)
    errors = {name: error(whole(ranks, name), want.grad) for name in THEIRS}
    assert errors["unfused"] < unfused
    assert 1e-3 < errors["fused"] < 3e-3
    for rank in ranks:
        want.check(rank["ours"]["loss"], whole(ranks, "ours"))
    if dtype == torch.float64:
        assert errors["unfused"] > 1e-9
        assert ranks[0]["ours"]["loss"].dtype == torch.float64


def test_label_minus_100_gets_a_loss_and_a_full_gradient(pair: Pool) -> None:
    """Megatron: lse - max, and the whole softmax: only the loss mask saves it."""
    ranks = pair.run(_every_loss, 2, (torch.float32, "ignored"))
    row = tokens()[0][1, 2]
    for name in THEIRS:
        assert ranks[0][name]["loss"][1, 2].item() == pytest.approx(
            (row.logsumexp(-1) - row.max()).item(), rel=1e-5
        )
        assert whole(ranks, name)[1, 2].abs().sum() == pytest.approx(1.0, rel=1e-2)
    assert ranks[0]["ours"]["loss"][1, 2] == 0
    assert bool((whole(ranks, "ours")[1, 2] == 0).all())


def test_a_label_beyond_the_vocabulary_is_silent(pair: Pool) -> None:
    """Megatron: a finite loss. Ours: an error on every rank, or loss and gradient 0 on demand."""
    ranks = pair.run(_every_loss, 2, (torch.float32, "beyond"))
    for rank in ranks:
        for name in THEIRS:
            assert 0 < rank[name]["loss"][1, 2] < 10
        assert "row 5 holds 64" in rank["ours"].problem
        assert "install(invalid_target='ignore')" in rank["ours"].problem
    for name in THEIRS:
        assert whole(ranks, name)[1, 2].abs().sum() == pytest.approx(1.0, rel=1e-2)


def _invalid_ignored(rank: dist.ProcessGroup) -> list[Outcome]:
    with megatron(tp=2) as group:
        out = []
        for value in (64, -1, 10**9):
            logits, target = tokens()
            target[1, 2], target[0, 0] = value, -100
            with install(invalid_target="ignore"):
                out.append(outcome(loss_named("unfused", group), shard(logits, group), target))
        return out


def test_labels_that_are_no_class_can_be_ignored(pair: Pool) -> None:
    logits, target = tokens()
    target[1, 2] = target[0, 0] = -100
    want = exact(logits, target)
    for first, second in zip(*pair.run(_invalid_ignored, 2), strict=True):
        grad = torch.cat([first["grad"], second["grad"]], -1)
        want.check(first["loss"], grad)
        assert bool((first["loss"][target == -100] == 0).all())
        assert bool((grad[target == -100] == 0).all())


def _uneven(rank: dist.ProcessGroup) -> dict[str, Outcome]:
    with megatron(tp=2) as group:
        logits, target = tokens()
        bounds = [(0, 40), (40, 64)][dist.get_rank(group)]
        x = logits[..., slice(*bounds)].contiguous()
        out = {name: outcome(loss_named(name, group), x, target) for name in LOSSES}
        with install(shard=VocabShard(*bounds, 64)):
            out["told"] = outcome(loss_named("unfused", group), x, target)
        with install(vocab_size=64):
            out["untold"] = outcome(loss_named("unfused", group), x, target)
        return out


def test_uneven_shards_are_silently_wrong(pair: Pool) -> None:
    ranks = pair.run(_uneven, 2)
    want = exact(*tokens())
    for rank in ranks:
        for name in THEIRS:
            assert (rank[name]["loss"].double() - want.loss).abs().max() > 1
        assert "ranks disagree on vocab_size" in rank["ours"].problem
        assert "vocabulary shards overlap" in rank["untold"].problem
        want.check(rank["told"]["loss"], whole(ranks, "told"))


def test_a_shard_that_is_all_masked_is_finite(pair: Pool) -> None:
    """Not a defect of Megatron's."""
    ranks = pair.run(_every_loss, 2, (torch.float32, "masked shard"))
    want = exact(*_edited(*tokens(), "masked shard"))
    for name in THEIRS:
        assert error(ranks[0][name]["loss"], want.loss) < 1e-6
        assert bool(whole(ranks, name).isfinite().all())
    want.check(ranks[0]["ours"]["loss"], whole(ranks, "ours"))


def test_a_broken_row_under_a_mask_gives_nan(pair: Pool) -> None:
    """Logits of inf and NaN: 0 * NaN with a loss mask alone; exactly 0 where it is ignored."""
    ranks = pair.run(_every_loss, 2, (torch.float32, "broken and ignored"))
    want = exact(*_edited(*tokens(), "ignored"))
    for name in THEIRS:
        assert bool(ranks[0][name]["loss"][1, 2].isnan())
        assert bool((whole(ranks, name)[1, 2] * 0).isnan().any())
    assert ranks[0]["ours"]["loss"][1, 2] == 0
    want.check(ranks[0]["ours"]["loss"], whole(ranks, "ours"))


def _smoothed(rank: dist.ProcessGroup, tp: int, factor: float) -> dict[str, Outcome]:
    with megatron(tp=tp) as group:
        logits, target = tokens(spread=3.0 * factor)
        x = shard(logits, group)
        return {
            name: outcome(loss_named(name, group), x, target, label_smoothing=0.1)
            for name in ("unfused", "ours")
        }


def test_label_smoothing_is_right_on_one_rank_only(pair: Pool) -> None:
    """On two ranks Megatron's loss differs between them, and its gradient does not sum to 0."""
    one, two = pair.run(_smoothed, 2, (1, 1.0)), pair.run(_smoothed, 2, (2, 1.0))
    want = exact(*tokens(), label_smoothing=0.1 * 64 / 63)
    assert error(one[0]["unfused"]["loss"], want.loss) < 1e-6
    assert error(one[0]["unfused"]["grad"], want.grad) < 1e-6
    want.check(one[0]["ours"]["loss"], one[0]["ours"]["grad"])
    first, second = (rank["unfused"]["loss"] for rank in two)
    assert (first - second).abs().max() > 1e-2
    # On each rank K is the shard's 32, and the uniform part is spread over each shard in full.
    total = whole(two, "unfused").sum(-1)
    assert total.mean().item() == pytest.approx(-0.1 * 32 / 31, rel=1e-3)

    assert torch.equal(two[0]["ours"]["loss"], two[1]["ours"]["loss"])
    want.check(two[0]["ours"]["loss"], whole(two, "ours"))
    assert whole(two, "ours").sum(-1).abs().max() < 1e-6  # 64 roundings of numbers below 1


@pytest.mark.parametrize("tp", [1, 2])
def test_label_smoothing_of_wide_logits_is_infinite(pair: Pool, tp: int) -> None:
    """log(softmax) underflows, on one rank as well."""
    ranks = pair.run(_smoothed, 2, (tp, 60.0))
    want = exact(*tokens(spread=180.0), label_smoothing=0.1 * 64 / 63)
    for rank in ranks:
        assert bool(rank["unfused"]["loss"].isinf().any())
        want.check(rank["ours"]["loss"])


def _compiled(rank: dist.ProcessGroup) -> dict[str, float]:
    with megatron(tp=2) as group, torch.compiler.set_stance("default"):
        logits, target = tokens()
        x = shard(logits, group)
        out = {}
        for name in ("unfused", "ours"):
            loss = loss_named(name, group)
            call = torch.compile(loss, backend="aot_eager", fullgraph=True)
            out[name] = error(call(x.clone(), target), loss(x.clone(), target))
        with install():
            call = torch.compile(loss_named("unfused", group), backend="aot_eager", fullgraph=True)
            out["installed"] = error(call(x, target), loss_named("ours", group)(x, target))
        return out


def test_it_compiles_into_one_graph(pair: Pool) -> None:
    """Not a defect of Megatron's."""
    for rank in pair.run(_compiled, 2):
        assert rank == {"unfused": 0.0, "ours": 0.0, "installed": 0.0}


def _gathered(rank: dist.ProcessGroup, spread: float) -> dict[str, Outcome]:
    with megatron(tp=2) as group:
        logits, target = tokens(spread=spread)
        out = {name: outcome(loss_named(name, group), logits, target) for name in LOSSES}
        with install(vocab_size=64):
            out["size told"] = outcome(loss_named("unfused", group), logits, target)
        return out


@pytest.mark.parametrize("spread", [3.0, 1e-3, 1e-6])
def test_gathered_logits_give_the_loss_plus_log_tp(pair: Pool, spread: float) -> None:
    """parallel_output=False. As at the start of a training too, where all logits are nearly equal.

    The spread at which e^(x - m) is 1 in every column is the next test's.
    """
    want = exact(*tokens(spread=spread)).loss
    for rank in pair.run(_gathered, 2, (spread,)):
        for name in THEIRS:
            assert error(rank[name]["loss"], want + math.log(2)) < 1e-6
        for name in ("ours", "size told"):
            assert "looks gathered" in rank[name].problem
            assert "parallel_output=True" in rank[name].problem


def test_gathered_logits_that_are_all_equal_need_the_size(pair: Pool) -> None:
    """A head that is still zero looks the same gathered and sharded, but for its width."""
    want = exact(*tokens(spread=0.0)).loss
    for rank in pair.run(_gathered, 2, (0.0,)):
        assert error(rank["ours"]["loss"], want + math.log(2)) < 1e-6
        assert "looks gathered" in rank["size told"].problem


def _odd_shapes(rank: dist.ProcessGroup, shape: tuple[int, ...]) -> dict[str, Any]:
    with megatron(tp=2) as group:
        full = torch.randn(*shape, 64, generator=torch.Generator().manual_seed(1))
        target = torch.zeros(shape, dtype=torch.int64)
        return {
            name: outcome(loss_named(name, group), shard(full, group), target) for name in LOSSES
        }


@pytest.mark.parametrize("shape", [(), (0,), (0, 3)], ids=str)
def test_the_fused_loss_refuses_one_row_and_no_tokens(pair: Pool, shape: tuple[int, ...]) -> None:
    for rank in pair.run(_odd_shapes, 2, (shape,)):
        assert rank["fused"].problem
        assert rank["ours"]["loss"].shape == rank["unfused"]["loss"].shape == shape
        assert rank["ours"]["grad"].shape == (*shape, 32)


def _wide(rank: dist.ProcessGroup) -> dict[str, Tensor]:
    with megatron(tp=2) as group:
        logits, target = tokens(17, 13, 22, spread=1000.0)
        out = {}
        for name in ("unfused", "ours"):
            leaf = shard(logits, group).requires_grad_()
            loss_named(name, group)(leaf * 1, target).mean().backward()
            assert leaf.grad is not None
            out[name] = leaf.grad
        return out


def test_logits_near_1000_keep_their_gradient(pair: Pool) -> None:
    """e^(x - lse) would lose three digits: m and s are kept apart."""
    ranks = pair.run(_wide, 2)
    logits, target = tokens(17, 13, 22, spread=1000.0)
    want = exact(logits, target).grad / target.numel()
    for name in ("unfused", "ours"):
        whole = torch.cat([rank[name] for rank in ranks], -1)
        assert (whole.double() - want).abs().max() < 1e-9
    by_lse = (logits - logits.logsumexp(-1, keepdim=True)).exp() - F.one_hot(target, 22)
    assert (by_lse.double() / target.numel() - want).abs().max() > 1e-8
