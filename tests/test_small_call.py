"""What a call asks of torch, however few its logits: a count, which no machine is too slow for.

Each operation costs a microsecond or more of the host. Whoever adds one to the path of every call
raises a number here, and knows it.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from vocab_parallel_ce import cross_entropy
from vocab_parallel_ce.launch.measuring.host_side import Operations, triton_without_launches

from .ranks import Pool

pytest.importorskip("numba")

ONE_RANK = 15
TWO_RANKS = 23


def _operations(group: dist.ProcessGroup | None, inplace_backward: bool) -> list[str]:
    """Of forward and backward at N = 1, C = 8, whose logits have no gradient yet."""
    rank = 0 if group is None else dist.get_rank(group)
    logits = torch.full((1, 8), float(rank), requires_grad=True)
    target = torch.zeros(1, dtype=torch.int64)
    for _ in range(2):  # what the first call of a process does is not counted
        again = logits * 1
        with Operations() as operations:
            loss = cross_entropy(again, target, group=group, inplace_backward=inplace_backward)
            torch.autograd.grad(loss, again)
    return [str(function) for function in operations.seen]


@pytest.mark.parametrize("inplace_backward", [False, True])
def test_of_one_rank(inplace_backward: bool) -> None:
    names = _operations(None, inplace_backward)
    assert len(names) <= ONE_RANK, names


def test_of_two_ranks(pool: Pool) -> None:
    for names in pool.run(_operations, 2, (False,)):
        assert len(names) <= TWO_RANKS, names


def _launches_beside_triton(group: dist.ProcessGroup) -> tuple[int, int]:
    """Of torch, forward and backward, where the Triton engine serves: no views, no allocations."""
    logits = torch.zeros(1, 8, dtype=torch.bfloat16, requires_grad=True)
    target = torch.zeros(1, dtype=torch.int64)
    with triton_without_launches():
        again = logits * 1
        with Operations() as forward:
            loss = cross_entropy(again, target, group=group, engine="triton")
        with Operations() as backward:
            torch.autograd.grad(loss, again)
    return forward.launches(), backward.launches()


def test_of_two_ranks_beside_triton(pool: Pool) -> None:
    """docs/cuda.md tells these numbers: six operations and the gather, then two."""
    for counts in pool.run(_launches_beside_triton, 2):
        assert counts == (7, 2)
