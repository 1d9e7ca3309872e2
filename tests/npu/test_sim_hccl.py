"""The stand-in's collectives, called through the real ProcessGroupHCCL of torch_npu."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from ..ranks import WORLDS, Pool


def _all_reduce(group: dist.ProcessGroup, size: int) -> tuple[str, list[float]]:
    value = torch.arange(size, dtype=torch.float32, device="npu") + dist.get_rank(group)
    dist.all_reduce(value, group=group)
    return str(value.device), value.tolist()


@pytest.mark.parametrize("world", WORLDS)
def test_all_reduce(npu_pool: Pool, world: int) -> None:
    expected = [float(world * i + sum(range(world))) for i in range(7)]
    results = npu_pool.run(_all_reduce, world, args=(7,))
    assert results == [(f"npu:{rank}", expected) for rank in range(world)]
