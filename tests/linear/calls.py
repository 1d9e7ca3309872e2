"""A good call of the fused head, on one rank and on several."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from vocab_parallel_ce import linear_cross_entropy

from .cases import scratch_for

N, H, V = 12, 4, 10


def a_call(**replaced: Any) -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    return {
        "input": torch.randn(N, H, generator=g).requires_grad_(),
        "linear_weight": torch.randn(V, H, generator=g).requires_grad_(),
        "target": torch.randint(V, (N,), generator=g),
        **replaced,
    }


def sharded_call(group: dist.ProcessGroup, **replaced: Any) -> dict[str, Any]:
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    g = torch.Generator().manual_seed(0)
    head = torch.randn(V * world, H, generator=g)
    return {
        "input": torch.randn(N, H, generator=g).requires_grad_(),
        "linear_weight": head.chunk(world)[rank].clone().requires_grad_(),
        "target": torch.randint(V * world, (N,), generator=g),
        "group": group,
        "scratch_mib": scratch_for(5, V, torch.float32),
        **replaced,
    }


def said_of(call: dict[str, Any]) -> str:
    try:
        linear_cross_entropy(**call)
    except (ValueError, TypeError, RuntimeError) as problem:
        return str(problem)
    return ""
