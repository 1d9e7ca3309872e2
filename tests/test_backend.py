"""A group whose backend does not serve the logits' device: one clear error on every rank, at once.

A Gloo group made for CUDA tensors alone is such a group for the CPU tensors of the tests, and any
group is one for tensors on the meta device.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist

from vocab_parallel_ce import VocabShard, cross_entropy
from vocab_parallel_ce.collectives import backends_of, check_group_serves, communication_device

from .ranks import Pool, run_fresh

ROWS, COLUMNS = 4, 6


def _loss(group: dist.ProcessGroup, device: str = "cpu", **options: Any) -> torch.Tensor:
    logits = torch.zeros(ROWS, COLUMNS, device=device)
    target = torch.zeros(ROWS, dtype=torch.int64, device=device)
    loss: torch.Tensor = cross_entropy(logits, target, group=group, **options)
    return loss


@contextmanager
def _another_group(backend: str) -> Iterator[dist.ProcessGroup]:
    """All ranks of the pool; all of them must call."""
    group = dist.new_group(backend=backend)
    assert isinstance(group, dist.ProcessGroup)
    try:
        yield group
    finally:
        dist.destroy_process_group(group)


def _eager(
    group: dist.ProcessGroup, backend: str, device: str, collective: str, check: bool
) -> str:
    with _another_group(backend) as other, pytest.raises(ValueError, match="input is on") as caught:
        _loss(other, device, collective=collective, check=check)
    # Nothing was sent: the pool's own group is where it was.
    torch.testing.assert_close(_loss(group), torch.tensor(4.0 * COLUMNS).log())
    return str(caught.value)


@pytest.mark.parametrize("collective", ["all_gather", "all_reduce"])
def test_cpu_logits_and_a_group_for_cuda(pool: Pool, collective: str) -> None:
    said = pool.run(_eager, 4, args=("cuda:gloo", "cpu", collective, False))
    for rank, text in enumerate(said):
        assert text == (
            "input is on cpu, but group has backend 'gloo', which serves cuda (rank "
            f"{rank} of the group); pass tensors on cuda, or a group of backend 'gloo', or of "
            "both, as init_process_group('cuda:gloo,cpu:gloo') makes"
        )


@pytest.mark.parametrize("check", [False, True])
def test_logits_on_a_device_without_a_backend(pool: Pool, check: bool) -> None:
    said = pool.run(_eager, 4, args=("gloo", "meta", "auto", check))
    for rank, text in enumerate(said):
        # The preflight tells everyone what the first rank found.
        said_by, prefix = (0, "rank 0 of the group: ") if check and rank else (rank, "")
        assert re.fullmatch(
            rf"{prefix}input is on meta, but group has backend 'gloo', which serves cpu( and "
            rf"cuda)? \(rank {said_by} of the group\); pass tensors on cpu",
            text,
        )


def _compiled(group: dist.ProcessGroup, check: bool) -> str:
    loss = torch.compile(_loss, backend="aot_eager", fullgraph=True)
    with (
        _another_group("cuda:gloo") as other,
        pytest.raises(ValueError, match=r"input is on cpu, but .* serves cuda") as caught,
    ):
        loss(other, check=check)
    return str(caught.value)


@pytest.mark.parametrize("check", [False, True])
def test_a_compiled_call_says_the_same(pool: Pool, check: bool) -> None:
    said = pool.run(_compiled, 4, args=(check,))
    assert [f"(rank {rank} of the group)" in text for rank, text in enumerate(said)] == [True] * 4


def test_one_rank_sends_nothing_and_needs_no_backend() -> None:
    outcome = run_fresh(_one_rank, 1)[0]
    assert outcome.value == pytest.approx(math.log(COLUMNS)), outcome.error


def _one_rank(group: dist.ProcessGroup) -> float:
    with _another_group("cuda:gloo") as other:
        return _loss(other).item()


def _told(group: dist.ProcessGroup) -> tuple[bool, str, str, VocabShard]:
    same = backends_of(group) == backends_of(None)
    return (
        same,
        check_group_serves("cpu", group),
        str(communication_device(group)),
        VocabShard.from_group(dist.get_rank(group), group),
    )


def test_what_a_group_serves(pool: Pool) -> None:
    said = pool.run(_told, 3)
    shards = [VocabShard(0, 0, 3), VocabShard(0, 1, 3), VocabShard(1, 3, 3)]
    assert said == [(True, "gloo", "cpu", shard) for shard in shards]


def _destroyed(group: dist.ProcessGroup, check: bool) -> float:
    with _another_group("gloo") as other:
        _loss(other)
    return _loss(other, check=check).item()


@pytest.mark.parametrize("check", [False, True])
def test_a_group_that_was_destroyed(pool: Pool, check: bool) -> None:
    for outcome in pool.outcomes(_destroyed, pool.size, (check,)):
        assert outcome.kind == "ValueError", outcome.trace
        assert "was it destroyed?" in outcome.error
