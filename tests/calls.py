"""A good call of the loss, what became of a bad one, and whether the group is usable after it.

Several bad calls are made in one case, one after the other on the same group, and a good call
ends it: so every error is also shown to leave the group usable.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from vocab_parallel_ce import cross_entropy

ROWS, COLUMNS = 4, 6
Call = dict[str, Any]


def good_call(group: dist.ProcessGroup | None) -> Call:
    rank = 0 if group is None else dist.get_rank(group)
    world = 1 if group is None else dist.get_world_size(group)
    full = torch.randn(
        ROWS, COLUMNS * world, generator=torch.Generator().manual_seed(0)
    ).requires_grad_()
    return {
        "input": full[:, rank * COLUMNS : (rank + 1) * COLUMNS] * 1.0,
        "target": torch.tensor([0, 1, COLUMNS * world - 1, -100]),
        "group": group,
    }


def outcome_of(function: Callable[..., object], **call: Any) -> tuple[str, str]:
    try:
        value = function(**call)
    except Exception as problem:
        return type(problem).__name__, str(problem)
    return "", str(value)


def assert_still_works(group: dist.ProcessGroup | None) -> None:
    losses = [
        cross_entropy(**good_call(group), collective=collective, check=check)
        for collective in ("all_gather", "all_reduce")
        for check in (False, True)
    ]
    for loss in losses:
        assert loss.isfinite()
        torch.testing.assert_close(loss, losses[0])
