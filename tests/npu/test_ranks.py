"""Several ranks over ProcessGroupHCCL: what is sent, how often, and what disagreement looks like.

An accelerator cannot raise without waiting for the device, so a wrong call gives NaN on every
rank; with ``check=True`` it is the same ValueError as on the CPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from vocab_parallel_ce import VocabShard, cross_entropy, cross_entropy_loss, token_statistics
from vocab_parallel_ce.launch.measuring.collectives import count_collectives
from vocab_parallel_ce.switches import WAY_VARIABLE
from vocab_parallel_ce.testing import cross_entropy as reference

from ..npu_sim import operators
from ..ranks import Pool

ROWS, VOCAB = 24, 60


def _batch(rows: int = ROWS) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    logits = 3 * torch.randn(rows, VOCAB, generator=generator)
    target = torch.randint(VOCAB, (rows,), generator=generator)
    target[1::5] = -100
    return logits, target


def _shard(logits: Tensor, group: dist.ProcessGroup) -> Tensor:
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    return logits.tensor_split(world, 1)[rank].to("npu").requires_grad_()


# What is sent


def _counts(group: dist.ProcessGroup) -> list[int | None]:
    logits, target = _batch()
    x, y = _shard(logits, group), target.to("npu")
    cross_entropy(x, y, group=group)  # the first call tries the operator
    counted: list[int | None] = []
    for collective in ("all_gather", "all_reduce", "auto"):
        operators.calls.clear()
        loss, sent = count_collectives(
            lambda c=collective: cross_entropy(  # type: ignore[misc]
                x, y, group=group, collective=c, label_smoothing=0.1, lse_square_scale=0.01
            )
        )
        assert [call.name for call in operators.calls] == [operators.FUSED_NAMES[0]]
        _, sent_back = count_collectives(loss.backward)
        assert [call.name for call in operators.calls] == [operators.FUSED_NAMES[0]] * 2
        counted += [sent, sent_back]
    return counted


@pytest.mark.parametrize("world", [2, 3, 4])
def test_one_collective_forward_or_two_none_backward(pool: Pool, world: int) -> None:
    assert pool.run(_counts, world) == [[1, 0, 2, 0, 1, 0]] * world


def _loss_bits(group: dist.ProcessGroup, dtype: torch.dtype) -> tuple[list[float], list[float]]:
    logits, target = _batch()
    x, y = _shard(logits.to(dtype), group), target.to("npu")
    both = [
        cross_entropy(x, y, reduction="none", group=group, collective="all_gather").tolist()
        for _ in range(2)
    ]
    return both[0], both[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_same_bits_on_every_rank_and_in_every_run(pool: Pool, dtype: torch.dtype) -> None:
    seen = pool.run(_loss_bits, 4, (dtype,))
    assert all(first == seen[0][0] and second == seen[0][0] for first, second in seen)


def _many_rows(group: dist.ProcessGroup, rows: int) -> float:
    """Uneven shards, more rows than the operator takes, in place; each rank takes another way."""
    way = ("max_sum", "operator")[dist.get_rank(group)]
    os.environ[WAY_VARIABLE] = way
    try:
        return _many_rows_by(way, group, rows)
    finally:
        del os.environ[WAY_VARIABLE]


def _many_rows_by(way: str, group: dist.ProcessGroup, rows: int) -> float:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(rows, 7, generator=generator)
    target = torch.randint(7, (rows,), generator=generator)
    start, stop = ((0, 5), (5, 7))[dist.get_rank(group)]
    x = logits[:, start:stop].to("npu").requires_grad_()
    operators.calls.clear()
    loss = cross_entropy(
        x * 1, target.to("npu"), group=group, shard=VocabShard(start, stop, 7),
        inplace_backward=True,
    )  # fmt: skip
    taken = [call.rows for call in operators.calls if call.columns == stop - start]
    assert taken == ([rows] if way == "max_sum" else [199_999, rows - 199_999])
    loss.backward()
    exact = logits.double().requires_grad_()
    wanted = reference(exact, target).loss
    wanted.backward()
    assert x.grad is not None
    assert exact.grad is not None
    assert float((x.grad.cpu() - exact.grad[:, start:stop]).abs().max()) < 1e-11
    return abs(loss.item() - wanted.item())


def test_more_rows_than_the_operator_takes(pool: Pool) -> None:
    assert max(pool.run(_many_rows, 2, (250_001,))) < 1e-6


def _one_shard_of_masks(group: dist.ProcessGroup) -> None:
    logits, target = _batch()
    target %= 30
    logits[:, 30:] = -torch.inf
    exact = logits.double().requires_grad_()
    wanted = reference(exact, target)
    (gradient,) = torch.autograd.grad(wanted.loss, exact)
    x = _shard(logits, group)
    out = cross_entropy_loss(x, target.to("npu"), group=group)
    out.loss.backward()
    first = 30 * dist.get_rank(group)
    assert x.grad is not None
    assert abs(out.loss.item() - wanted.loss.item()) < 1e-5
    assert float((x.grad.cpu() - gradient[:, first : first + 30]).abs().max()) < 1e-7
    mine = wanted.log_prob[:, first : first + 30].detach().float()
    assert torch.allclose(out.log_prob.cpu(), mine, rtol=1e-5, atol=1e-5)


def test_a_shard_that_is_all_masked(pool: Pool) -> None:
    pool.run(_one_shard_of_masks, 2)


def _dtensor(group: dist.ProcessGroup) -> tuple[float, float]:
    logits, target = _batch()
    mesh = DeviceMesh.from_group(group, "npu")
    local = _shard(logits, group)
    x = DTensor.from_local(local, mesh, [Shard(1)])
    loss = cross_entropy(x, target.to("npu"), label_smoothing=0.1)
    loss.backward()
    assert local.grad is not None
    assert local.grad.device.type == "npu"
    assert isinstance(loss, DTensor)
    wanted = torch.nn.functional.cross_entropy(logits, target, label_smoothing=0.1)
    return loss.to_local().item(), wanted.item()


def test_dtensor(pool: Pool) -> None:
    for got, wanted in pool.run(_dtensor, 2):
        assert got == pytest.approx(wanted, abs=1e-6)


# Wrong calls

Change = Callable[[Tensor, Tensor, dist.ProcessGroup, dict[str, Any]], tuple[Tensor, Tensor]]


def _bad_target(x: Tensor, y: Tensor, group: dist.ProcessGroup, _: Any) -> tuple[Tensor, Tensor]:
    y[3] = VOCAB
    return x, y


def _another_target(
    x: Tensor, y: Tensor, group: dist.ProcessGroup, _: Any
) -> tuple[Tensor, Tensor]:
    return x, y.roll(dist.get_rank(group))


def _another_option(
    x: Tensor, y: Tensor, group: dist.ProcessGroup, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    options["label_smoothing"] = 0.1 + 0.1 * dist.get_rank(group)
    return x, y


def _overlap(
    x: Tensor, y: Tensor, group: dist.ProcessGroup, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    start = 0 if dist.get_rank(group) == 0 else 29
    options["shard"] = VocabShard(start, start + 30, VOCAB)
    return x, y


def _gathered(x: Tensor, y: Tensor, group: dist.ProcessGroup, _: Any) -> tuple[Tensor, Tensor]:
    return _batch()[0].to("npu").requires_grad_(), y


WRONG: dict[str, tuple[Change, str]] = {
    "target out of range": (_bad_target, "target is out of range: row 3 holds 60"),
    "another target": (_another_target, "ranks disagree on target"),
    "another option": (_another_option, "ranks disagree on label_smoothing"),
    "overlap": (_overlap, "vocabulary shards overlap"),
    "gathered": (_gathered, "input looks gathered"),
}


def _wrong(
    group: dist.ProcessGroup, name: str, collective: str, check: bool
) -> tuple[int, int, int]:
    """How many rows of the loss and of the gradient are NaN, and of how many."""
    logits, target = _batch()
    options: dict[str, Any] = {"collective": collective, "check": check}
    x, y = WRONG[name][0](_shard(logits, group), target.to("npu"), group, options)
    loss = cross_entropy(x, y, reduction="none", group=group, **options)
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    kept = y != -100
    lost = int(loss[kept].isnan().sum())
    return lost, int(gradient[kept].isnan().all(1).sum()), int(kept.sum())


@pytest.mark.parametrize("collective", ["all_gather", "all_reduce"])
@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_nan_on_every_rank(pool: Pool, name: str, collective: str) -> None:
    for loss, gradient, kept in pool.run(_wrong, 2, (name, collective, False)):
        expected = 1 if name == "target out of range" else kept
        assert (loss, gradient) == (expected, expected)


@pytest.mark.parametrize("collective", ["all_gather", "all_reduce"])
@pytest.mark.parametrize("name", WRONG)
def test_with_check_it_is_an_error_on_every_rank(pool: Pool, name: str, collective: str) -> None:
    outcomes = pool.outcomes(_wrong, 2, (name, collective, True))
    assert [outcome.kind for outcome in outcomes] == ["ValueError"] * 2
    assert all(WRONG[name][1] in outcome.error for outcome in outcomes)


def _rows_differ(group: dist.ProcessGroup) -> None:
    logits, target = _batch(ROWS + dist.get_rank(group))
    cross_entropy(_shard(logits, group), target.to("npu"), group=group, check=True)


def test_another_number_of_rows_is_an_error_with_check(pool: Pool) -> None:
    outcomes = pool.outcomes(_rows_differ, 3)
    assert [outcome.kind for outcome in outcomes] == ["ValueError"] * 3
    assert all("ranks disagree on the number of rows" in outcome.error for outcome in outcomes)


def _fp64(group: dist.ProcessGroup, check: bool) -> None:
    x = torch.zeros(2, 3, dtype=torch.float64, device="npu")
    token_statistics(x, torch.zeros(2, dtype=torch.int64, device="npu"), group=group, check=check)


@pytest.mark.parametrize("check", [False, True])
def test_fp64_is_refused(pool: Pool, check: bool) -> None:
    outcomes = pool.outcomes(_fp64, 2, (check,))
    assert [outcome.kind for outcome in outcomes] == ["ValueError"] * 2
    assert all("input is float64, which npu devices do not compute in" in o.error for o in outcomes)
    assert all("input.float()" in o.error for o in outcomes)


def _bad_setting(group: dist.ProcessGroup) -> None:
    if dist.get_rank(group) == 1:
        os.environ["VOCAB_PARALLEL_CE_NPU_SCRATCH_MIB"] = "many"
    try:
        logits, target = _batch()
        cross_entropy(_shard(logits, group), target.to("npu"), group=group, check=True)
    finally:
        os.environ.pop("VOCAB_PARALLEL_CE_NPU_SCRATCH_MIB", None)


def test_a_setting_that_is_wrong_on_one_rank(pool: Pool) -> None:
    outcomes = pool.outcomes(_bad_setting, 2)
    assert [outcome.kind for outcome in outcomes] == ["ValueError"] * 2
    assert all("SCRATCH_MIB='many' must be a whole number" in o.error for o in outcomes)
    assert "rank 1 of the group" in outcomes[0].error
