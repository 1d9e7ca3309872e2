"""The pool itself: real ranks, real groups, and errors and hangs that are noticed."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist

from .ranks import WORLDS, HungError, Pool, run_fresh


def _sum_of_ranks(group: dist.ProcessGroup) -> tuple[str, float]:
    value = torch.tensor(float(dist.get_rank(group)))
    dist.all_reduce(value, group=group)
    return dist.get_backend(group), value.item()


def _raise_on_last(group: dist.ProcessGroup) -> int:
    if dist.get_rank(group) == dist.get_world_size(group) - 1:
        raise ValueError("the last rank")
    return dist.get_rank(group)


def _sleep(group: dist.ProcessGroup) -> None:
    time.sleep(60)


@pytest.mark.parametrize("world", WORLDS)
def test_ranks_talk_over_gloo(pool: Pool, world: int) -> None:
    total = float(sum(range(world)))
    assert pool.run(_sum_of_ranks, world) == [("gloo", total)] * world


def test_errors_come_back(pool: Pool) -> None:
    outcomes = pool.outcomes(_raise_on_last, 3)
    assert [o.kind for o in outcomes] == ["", "", "ValueError"]
    assert outcomes[2].error == "the last rank"
    with pytest.raises(AssertionError, match="rank 2 of 3 raised"):
        pool.run(_raise_on_last, 3)


def test_a_hang_is_noticed() -> None:
    with pytest.raises(HungError, match=r"(?s)no answer within .*rank 1 is in.* in _sleep"):
        run_fresh(_sleep, 2, timeout=2.0)
