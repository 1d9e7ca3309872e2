"""ParallelGroups: the grid of ranks, and the errors that say what to change."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from vocab_parallel_ce.parallel.groups import ParallelGroups, grid_size

from ..ranks import Pool

REPOSITORY = Path(__file__).resolve().parents[2]


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
        world = dist.group.WORLD
        seen["new"] = [g is not world for g in (groups.tp_group, groups.dp_group, groups.control)]
        assert groups.mesh.get_group("tp") is groups.tp_group
        assert groups.mesh.get_group("dp") is groups.dp_group
        assert list(groups.mesh.get_coordinate() or ()) == [groups.dp_rank, groups.tp_rank]
        tp_group = groups.tp_group
    try:
        dist.get_backend(tp_group)
        seen["tp ended"] = False
    except (ValueError, TypeError):  # torch 2.13, torch 2.5
        seen["tp ended"] = True
    seen["alive"] = dist.is_initialized()
    return seen


def test_tensor_parallel_ranks_are_adjacent(pool: Pool) -> None:
    seen = pool.run(_grid, 4, args=(2, None))
    assert [s["rank"] for s in seen] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert [s["tp"] for s in seen] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [s["dp"] for s in seen] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert all(s["control"] == (4, "gloo") for s in seen)
    assert all(s["new"] == [True, True, False] for s in seen)
    assert all(s["tp ended"] for s in seen)


@pytest.mark.parametrize(("tp", "new"), [(4, [False, True, False]), (1, [True, False, False])])
def test_no_second_group_of_all_ranks(pool: Pool, tp: int, new: list[bool]) -> None:
    """Each would cost 200 MB on an NPU. The other group has one rank and never communicates."""
    seen = pool.run(_grid, 4, args=(tp, None))
    assert all(s["new"] == new for s in seen)
    assert all(len(s["dp" if tp == 4 else "tp"]) == 1 for s in seen)


def test_groups_that_someone_else_made_survive(pool: Pool) -> None:
    seen = pool.run(_grid, 4, args=(None, None))
    assert [s["rank"] for s in seen] == [(0, 0), (1, 0), (2, 0), (3, 0)]
    assert all(s["alive"] and not s["tp ended"] for s in seen)


def _wait_for_nobody(group: dist.ProcessGroup) -> float:
    with ParallelGroups.open("cpu", tp=2, timeout_seconds=1.5) as groups:
        begin = time.monotonic()
        if groups.tp_rank == 0:
            with pytest.raises(RuntimeError, match=r"[Tt]imed out"):
                dist.all_reduce(torch.zeros(1), group=groups.tp_group)
        waited = time.monotonic() - begin
    return waited


def test_the_timeout_holds_in_every_group(pool: Pool) -> None:
    """init_device_mesh would give them 30 minutes, whatever the world's."""
    waited = pool.run(_wait_for_nobody, 4)
    assert all(1.0 < seconds < 20.0 for seconds in waited[::2]), waited


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


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
def test_a_timeout_is_a_positive_number(seconds: float) -> None:
    with pytest.raises(ValueError, match=rf"timeout_seconds={seconds} must be a positive number"):
        ParallelGroups.open("cpu", timeout_seconds=seconds)
    assert not dist.is_initialized()


def test_a_rank_that_fails_does_not_wait_for_the_others() -> None:
    """Rank 0 sits in a collective of the default timeout; torchrun ends it once rank 1 is gone."""
    code = """
import torch, torch.distributed as dist
from vocab_parallel_ce.parallel.groups import ParallelGroups
with ParallelGroups.open("cpu") as groups:
    if groups.rank == 1:
        raise RuntimeError("rank 1 is through")
    dist.all_reduce(torch.zeros(1), group=groups.tp_group)
"""
    launcher = "-m torch.distributed.run --standalone --nproc-per-node 2 --no-python"
    begin = time.monotonic()
    process = subprocess.run(
        [sys.executable, *launcher.split(), sys.executable, "-c", code],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode != 0
    assert "RuntimeError: rank 1 is through" in process.stderr
    assert time.monotonic() - begin < 60
