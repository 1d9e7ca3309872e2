"""ParallelGroups: the grid of ranks, and the errors that say what to change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from vocab_parallel_ce.parallel.groups import ParallelGroups, grid_size, local_device

from ..ranks import Pool


@pytest.mark.parametrize(
    ("world_size", "tp", "dp", "expected"),
    [
        (1, None, None, (1, 1)),
        (4, None, None, (4, 1)),
        (4, 2, None, (2, 2)),
        (4, None, 4, (1, 4)),
        (6, 3, 2, (3, 2)),
    ],
)
def test_the_size_left_open_is_what_remains(
    world_size: int, tp: int | None, dp: int | None, expected: tuple[int, int]
) -> None:
    assert grid_size(world_size, tp, dp) == expected


@pytest.mark.parametrize(
    ("world_size", "tp", "dp", "message"),
    [
        (4, 3, None, r"tp=3 times dp=1 is 3, but the number of processes is 4.*per-node 3"),
        (4, 2, 3, r"tp=2 times dp=3 is 6, but the number of processes is 4.*per-node 6"),
        (1, 2, 1, r"tp=2 times dp=1 is 2, but the number of processes is 1.*per-node 2"),
        (4, 0, None, r"tp=0 must be at least 1"),
        (4, None, -1, r"dp=-1 must be at least 1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(
    world_size: int, tp: int | None, dp: int | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        grid_size(world_size, tp, dp)


def _grid(group: dist.ProcessGroup, tp: int | None, dp: int | None) -> dict[str, Any]:
    with ParallelGroups.open("cpu", tp=tp, dp=dp) as groups:
        seen: dict[str, Any] = {"rank": (groups.tp_rank, groups.dp_rank)}
        for name, members in (("tp", groups.tp_group), ("dp", groups.dp_group)):
            ranks = [torch.zeros((), dtype=torch.int64) for _ in range(members.size())]
            dist.all_gather(ranks, torch.tensor(groups.rank), group=members)
            seen[name] = [int(rank) for rank in ranks]
        seen["control"] = (groups.control.size(), dist.get_backend(groups.control))
    seen["alive"] = dist.is_initialized()
    return seen


def test_tensor_parallel_ranks_are_adjacent(pool: Pool) -> None:
    seen = pool.run(_grid, 4, args=(2, None))
    assert [s["rank"] for s in seen] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert [s["tp"] for s in seen] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [s["dp"] for s in seen] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert all(s["control"] == (4, "gloo") for s in seen)


def test_groups_that_someone_else_made_survive(pool: Pool) -> None:
    seen = pool.run(_grid, 4, args=(None, None))
    assert [s["rank"] for s in seen] == [(0, 0), (1, 0), (2, 0), (3, 0)]
    assert all(s["alive"] for s in seen)


def test_one_process_needs_no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with ParallelGroups.open("cpu") as groups:
        assert (groups.rank, groups.world_size, groups.tp, groups.dp) == (0, 1, 1, 1)
        value = torch.tensor(3.0)
        dist.all_reduce(value, group=groups.tp_group)
        assert value.item() == 3.0
    assert not dist.is_initialized()


def test_groups_are_closed_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(RuntimeError, match="in the body"), ParallelGroups.open("cpu"):
        raise RuntimeError("in the body")
    assert not dist.is_initialized()


def test_bad_environment_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(ValueError, match="WORLD_SIZE='two' is not a number"):
        ParallelGroups.open("cpu")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    with pytest.raises(ValueError, match="RANK=1 is set but MASTER_ADDR and MASTER_PORT not"):
        ParallelGroups.open("cpu", tp=2)


def test_devices_that_are_not_there_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="device='tpu' is not one of npu, cuda, cpu"):
        local_device("tpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device='cuda', but this machine shows none"):
        local_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match=r"LOCAL_RANK=2 has no cuda device.*shows 2"):
        local_device("cuda")
