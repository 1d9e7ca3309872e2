"""Ranks agree: the same bits everywhere and every time, few collectives, and means that add up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from vocab_parallel_ce import cross_entropy, cross_entropy_loss, token_statistics
from vocab_parallel_ce.testing import Batch, assert_close, batch, even

from .cases import Findings, check_gradient, expected, gloo_events
from .ranks import Pool

VOCAB = 60
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


# Bits


def _bits(group: dist.ProcessGroup, dtype: torch.dtype, collective: str) -> list[Tensor]:
    """Losses of several functions and reductions, then this rank's gradients of them."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    sharding = even(VOCAB, world)
    data = batch(37, VOCAB, dtype, ignore_index=7, seed=world)
    losses: list[Tensor] = []
    gradients: list[Tensor] = []
    options: dict[str, Any] = {"ignore_index": 7, "group": group, "collective": collective}
    for reduction in ("none", "mean", "sum"):
        x = sharding.local(data.logits, rank).requires_grad_()
        loss = cross_entropy(
            x, data.target, data.weight, reduction,
            label_smoothing=0.1, lse_square_scale=0.01, **options,
        )  # fmt: skip
        losses.append(loss.detach())
        gradients += torch.autograd.grad(loss.sum(), x)
        out = cross_entropy_loss(x, data.target, None, reduction, **options)
        losses.append(out.loss.detach())
    x = sharding.local(data.logits, rank).requires_grad_()
    got = token_statistics(x, data.target, entropy=True, argmax=collective != "all_reduce",
                           **options)  # fmt: skip
    assert got.entropy is not None
    losses += [got.log_prob.detach(), got.lse.detach(), got.entropy.detach()]
    gradients += torch.autograd.grad((got.log_prob + got.lse + got.entropy).sum(), x)
    return [torch.stack([loss.sum() for loss in losses]), *losses, *gradients]


def _same_bits(group: dist.ProcessGroup, dtype: torch.dtype) -> list[list[float]]:
    first, second = (_bits(group, dtype, "all_gather") for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    losses = first[1:10]
    return [loss.double().flatten().tolist() for loss in losses]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("world", [2, 3, 4])
def test_gathered_losses_have_the_same_bits_on_every_rank_and_in_every_run(
    pool: Pool, world: int, dtype: torch.dtype
) -> None:
    first, again = (pool.run(_same_bits, world, (dtype,)) for _ in range(2))
    assert first == again
    for rank in range(1, world):
        assert first[rank] == first[0]


def _auto_is_a_gather(group: dist.ProcessGroup) -> bool:
    return all(
        torch.equal(a, b)
        for a, b in zip(
            _bits(group, torch.float32, "auto"),
            _bits(group, torch.float32, "all_gather"),
            strict=True,
        )
    )


def test_auto_has_the_bits_of_a_gather_while_it_is_small(pool: Pool) -> None:
    assert pool.run(_auto_is_a_gather, 3) == [True] * 3


# Collectives, counted by the profiler in the real backend


def _count(group: dist.ProcessGroup, collective: str, check: bool) -> list[list[str]]:
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    x = even(VOCAB, world).local(batch(5, VOCAB, torch.float32).logits, rank).requires_grad_()
    target = batch(5, VOCAB, torch.float32).target
    options: dict[str, Any] = {"group": group, "collective": collective, "check": check}
    out: list[list[str]] = []

    def forward_and_backward(forward: Callable[[], Tensor]) -> None:
        loss: list[Tensor] = []
        out.append(gloo_events(lambda: loss.append(forward())))
        out.append(gloo_events(loss[0].backward))

    forward_and_backward(
        lambda: cross_entropy(
            x, target, torch.ones(VOCAB), label_smoothing=0.1, lse_square_scale=0.1, **options
        )
    )
    forward_and_backward(
        lambda: cross_entropy_loss(x, target, return_zloss=True, **options).loss.sum()
    )
    forward_and_backward(lambda: token_statistics(x, target, entropy=True, **options).lse.sum())
    return out


GATHER, REDUCE = ["gloo:all_gather"], ["gloo:all_reduce"] * 2


def _kinds(events: list[str]) -> list[str]:
    """Backends name all_gather_into_tensor and its like differently."""
    return ["gloo:all_gather" if "gather" in event else event for event in events]


@pytest.mark.parametrize(
    ("collective", "check", "forward"),
    [
        ("all_gather", False, GATHER),
        ("auto", False, GATHER),
        ("all_reduce", False, REDUCE),
        ("all_gather", True, GATHER * 2),
        ("all_reduce", True, GATHER + REDUCE),
    ],
)
def test_collectives_in_forward_and_none_in_backward(
    pool: Pool, collective: str, check: bool, forward: list[str]
) -> None:
    for counted in pool.run(_count, 2, (collective, check)):
        assert [_kinds(events) for events in counted] == [forward, []] * 3


@pytest.mark.parametrize("collective", ["all_gather", "all_reduce", "auto"])
def test_one_rank_communicates_nothing(pool: Pool, collective: str) -> None:
    assert pool.run(_count, 1, (collective, True)) == [[[]] * 6]


def _count_big(group: dist.ProcessGroup, rows: int, argmax: bool) -> list[str]:
    x, target = torch.zeros(rows, 2), torch.zeros(rows, dtype=torch.int64)
    x += dist.get_rank(group)
    return gloo_events(lambda: token_statistics(x, target, argmax=argmax, group=group))


def test_auto_reduces_when_the_gather_would_be_large_but_argmax_always_gathers(
    pool: Pool,
) -> None:
    rows = 6_000_000 // (2 * 3 * 4)
    for rows_, argmax, want in ((rows, False, GATHER), (rows + 1, False, REDUCE),
                                (rows + 1, True, GATHER)):  # fmt: skip
        for events in pool.run(_count_big, 2, (rows_, argmax)):
            assert _kinds(events) == want


# Means over ranks and micro-batches that hold unequal numbers of ignored rows


MEAN: dict[str, Any] = {"ignore_index": 7, "label_smoothing": 0.1, "lse_square_scale": 0.01}


def _grid(group: dist.ProcessGroup) -> tuple[int, int, dist.ProcessGroup]:
    """(data-parallel rank, tensor-parallel rank, tensor-parallel group) of a 2 x 2 grid."""
    rank = dist.get_rank(group)
    pairs = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])]
    return rank // 2, rank % 2, pairs[rank // 2]


def _half(data: Batch, index: int) -> slice:
    """Unequal halves: a quarter of the rows and the rest."""
    cut = len(data.target) // 4
    return slice(0, cut) if index == 0 else slice(cut, None)


def _data_parallel(group: dist.ProcessGroup, weighted: bool) -> None:
    dp, tp, tp_group = _grid(group)
    try:
        data = batch(48, VOCAB, torch.float32, ignore_index=7, seed=1, ignored=0.5)
        rows = _half(data, dp)
        kept = data.target != 7
        assert kept[_half(data, 0)].float().mean() != kept[_half(data, 1)].float().mean()
        weight = data.weight if weighted else None
        options = dict(MEAN)
        if weighted:
            # One normalizer serves both denominators: with weights the z-loss has another one.
            options["lse_square_scale"] = 0.0
        shares = torch.ones(VOCAB) if weight is None else weight
        mine = shares[data.target[rows][kept[rows]]].sum()
        dist.all_reduce(mine, group=group)
        normalizer = mine / 2  # both tensor-parallel ranks counted the same rows
        x = even(VOCAB, 2).local(data.logits[rows], tp).requires_grad_()
        loss = cross_entropy(
            x, data.target[rows], weight, group=tp_group, normalizer=normalizer, **options
        )
        (grad,) = torch.autograd.grad(loss, x)
        total = loss.detach().clone()
        dist.all_reduce(total, group=group)
        total /= 2

        findings = Findings()
        want = expected(data.logits, data.target, weight, **options)
        with findings:
            assert_close(
                total, want.exact.loss, want.naive.loss, "loss", rows_error=want.rows_error
            )
        with findings:
            exact, plain = want.gradients(lambda r: r.loss)
            check_gradient(grad, (exact[rows], plain[rows]), even(VOCAB, 2), tp, "mean")
        findings.report()
    finally:
        dist.destroy_process_group(tp_group)


@pytest.mark.parametrize("weighted", [False, True])
def test_data_parallel_2_equals_data_parallel_1(pool: Pool, weighted: bool) -> None:
    pool.run(_data_parallel, 4, (weighted,))


def _micro_batches(group: dist.ProcessGroup) -> None:
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    data = batch(48, VOCAB, torch.float32, ignore_index=7, seed=1, ignored=0.5)
    x = even(VOCAB, world).local(data.logits, rank).requires_grad_()
    normalizer = (data.target != 7).sum()
    total = torch.zeros(())
    for index in (0, 1):
        rows = _half(data, index)
        for collective in ("all_gather", "all_reduce"):  # each counted half
            loss = cross_entropy(
                x[rows], data.target[rows], group=group, normalizer=2 * normalizer,
                collective=collective, **MEAN,
            )  # fmt: skip
            loss.backward()
            total += loss.detach()
    want = expected(data.logits, data.target, **MEAN)
    findings = Findings()
    with findings:
        assert_close(total, want.exact.loss, want.naive.loss, "loss", rows_error=want.rows_error)
    with findings:
        assert x.grad is not None
        gradients = want.gradients(lambda r: r.loss)
        check_gradient(x.grad, gradients, even(VOCAB, world), rank, "accumulated")
    findings.report()


@pytest.mark.parametrize("world", [1, 2])
def test_micro_batches_add_up_to_the_batch(pool: Pool, world: int) -> None:
    pool.run(_micro_batches, world)


def _normalizer_kinds(group: dist.ProcessGroup) -> None:
    rank = dist.get_rank(group)
    data = batch(9, VOCAB, torch.float32)
    x = even(VOCAB, 2).local(data.logits, rank)
    loss = cross_entropy(x, data.target, reduction="sum", group=group, lse_square_scale=0.1) / 8
    for normalizer in (8, 8.0, torch.tensor(8), torch.tensor([8.0]), torch.tensor(8.0).double()):
        got = cross_entropy(x, data.target, group=group, lse_square_scale=0.1,
                            normalizer=normalizer)  # fmt: skip
        assert got.shape == ()
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, loss, rtol=2**-22, atol=0)
    number = torch.tensor(8.0, requires_grad=True)
    x.requires_grad_()
    cross_entropy(x, data.target, group=group, normalizer=number).backward()
    assert number.grad is None


def test_normalizer_is_any_number_and_gets_no_gradient(pool: Pool) -> None:
    pool.run(_normalizer_kinds, 2)
