"""ParallelGroups on npu: what can be refused, what HCCL is told, and how many communicators exist.

Communicators of the stand-in are blocks of shared memory, so the operating system counts them.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from vocab_parallel_ce.parallel.devices import default_device_type, local_device, npu_problem
from vocab_parallel_ce.parallel.groups import ParallelGroups

from ..forks import run_forked
from ..ranks import Pool

CARDS = int(os.environ.get("NPU_SIM_DEVICES", "8"))


def test_the_cards_are_there() -> None:
    assert npu_problem() is None
    assert default_device_type() == "npu"
    assert local_device("npu") == local_device() == torch.device("npu", 0)


def test_more_processes_than_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(CARDS + 1))
    with pytest.raises(ValueError, match=rf"shows {CARDS} npu devices; start at most {CARDS}"):
        local_device("npu")
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    monkeypatch.setenv("LOCAL_RANK", str(CARDS))
    with pytest.raises(ValueError, match=rf"LOCAL_RANK={CARDS} has no npu device"):
        ParallelGroups.open("npu")
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({}, "if npu-smi info lists none either, the driver is missing"),
        ({"ASCEND_RT_VISIBLE_DEVICES": "9"}, "no card under ASCEND_RT_VISIBLE_DEVICES='9'; name"),
    ],
)
def test_no_visible_card(variables: dict[str, str], reason: str) -> None:
    code = """
from vocab_parallel_ce.parallel.devices import default_device_type
from vocab_parallel_ce.parallel.groups import ParallelGroups
print(default_device_type())
ParallelGroups.open("npu")
"""
    process = run_forked("-c", code, environ={"NPU_SIM_DEVICES": "0"} | variables)
    assert process.returncode == 1
    assert process.stdout.splitlines()[0] == "cpu"  # torch_npu adds a line of its own at exit
    last = process.stderr.splitlines()[-1]
    assert last.startswith("ValueError: device='npu', but torch_npu sees no card")
    assert reason in last
    assert (
        f"UserWarning: running on the CPU: {last[len('ValueError: device=npu, but ') + 2 :]}"
        in (process.stderr)
    )


def _communicators() -> int:
    maps = Path("/proc/self/maps").read_text().splitlines()
    return sum("memfd:npu_sim_hccl" in line for line in maps)


def _sums(group: dist.ProcessGroup, tp: int) -> dict[str, Any]:
    """Groups beside those of the pool, which are HCCL and stay."""
    before = _communicators()
    with ParallelGroups.open("npu", tp=tp) as groups:
        opened = _communicators() - before
        device = torch.device("npu", dist.get_rank())
        assert groups.mesh.device_type == "npu"
        total = torch.ones(3, device=device)
        if groups.tp > 1:
            dist.all_reduce(total, group=groups.tp_group)
        if groups.dp > 1:
            dist.all_reduce(total, group=groups.dp_group)
        new = groups.tp_group is not dist.group.WORLD and groups.dp_group is not dist.group.WORLD
        seen = {
            "total": total.tolist(),
            "backends": [dist.get_backend(g) for g in (groups.tp_group, groups.dp_group)],
            "control": dist.get_backend(groups.control),
            "device": groups.device.index,
            "opened": opened,
            "used": _communicators() - before if new else None,
        }
    seen["left"] = _communicators() - before if new else None
    return seen


def test_a_grid_of_hccl_groups(npu_pool: Pool) -> None:
    for rank, seen in enumerate(npu_pool.run(_sums, 4, args=(2,))):
        assert seen["device"] == rank
        assert seen["total"] == [4.0] * 3
        assert seen["backends"] == ["hccl", "hccl"]
        assert seen["control"] == "gloo"
        assert (seen["opened"], seen["used"], seen["left"]) == (0, 2, 0)


_COUNT = """
import json, os, sys, torch, torch.distributed as dist
from tests.npu.test_groups import _communicators
from vocab_parallel_ce.parallel.groups import ParallelGroups
tp, dp = int(sys.argv[1]), int(sys.argv[2])
with ParallelGroups.open("npu", tp=tp, dp=dp, timeout_seconds=90, deterministic=True) as groups:
    for size, group in ((tp, groups.tp_group), (dp, groups.dp_group)):
        if size > 1:
            dist.all_reduce(torch.ones(1, device=groups.device), group=group)
    groups.barrier()
    hccl = {k: v for k, v in os.environ.items() if k.startswith("HCCL_")}
    line = json.dumps([groups.rank, str(groups.device), _communicators(), hccl]) + "\\n"
    os.write(1, line.encode())  # at once, or lines of ranks mix
"""


@pytest.mark.parametrize(
    ("tp", "dp", "expected"),
    [
        (2, 1, 1),
        pytest.param(1, 2, 1, marks=pytest.mark.full),
        pytest.param(1, 1, 0, marks=pytest.mark.full),
        (2, 2, 2),
    ],
)
def test_no_communicator_that_is_not_needed(tp: int, dp: int, expected: int) -> None:
    process = run_forked("-c", _COUNT, str(tp), str(dp), ranks=tp * dp)
    assert process.returncode == 0, process.stderr
    seen = sorted(json.loads(line) for line in process.stdout.splitlines())
    assert [(rank, device) for rank, device, _, _ in seen] == [
        (rank, f"npu:{rank}") for rank in range(tp * dp)
    ]
    for _, _, communicators, hccl in seen:
        assert communicators == expected
        assert hccl == {
            "HCCL_CONNECT_TIMEOUT": "120",
            "HCCL_EXEC_TIMEOUT": "90",
            "HCCL_DETERMINISTIC": "true",
        }
    assert "watchdog timeout" not in process.stderr  # torch_npu's complaint of a wrong order


_FAIL = """
import sys, torch, torch.distributed as dist
from vocab_parallel_ce.parallel.groups import ParallelGroups
with ParallelGroups.open("npu") as groups:
    x = torch.ones(1, device=groups.device)
    dist.all_reduce(x, group=groups.tp_group)
    if groups.rank == 1:
        raise RuntimeError("rank 1 is through")
    dist.all_reduce(x, group=groups.tp_group)
    x.item()
"""


def test_a_rank_that_fails_ends_all() -> None:
    begin = time.monotonic()
    process = run_forked("-c", _FAIL, ranks=2)
    assert process.returncode != 0
    assert "RuntimeError: rank 1 is through" in process.stderr
    assert time.monotonic() - begin < 60


_REFUSED = """
import os
from vocab_parallel_ce.parallel.groups import ParallelGroups
try:
    ParallelGroups.open("npu")
except ValueError as error:
    os.write(1, f"{error}\\n".encode())
"""


def test_all_ranks_are_told_of_missing_cards() -> None:
    process = run_forked("-c", _REFUSED, ranks=3, environ={"NPU_SIM_DEVICES": "2"})
    assert process.returncode == 0, process.stderr
    assert (
        process.stdout.splitlines()
        == [
            "device='npu', but LOCAL_WORLD_SIZE=3 processes were started on this machine, which "
            "shows 2 npu devices; start at most 2 (torchrun --nproc-per-node 2)"
        ]
        * 3
    )
