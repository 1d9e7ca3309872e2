"""Ranks of the fused head: one gather, the same bits, and what is told where they disagree."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from vocab_parallel_ce import linear_cross_entropy
from vocab_parallel_ce.launch.measuring.collectives import count_collectives
from vocab_parallel_ce.testing.shardings import even

from ...linear.cases import head_batch
from ...ranks import Pool
from .calls import BF16, ROWS, on_npu


def _bits(group: dist.ProcessGroup, reduction: str) -> tuple[bytes, tuple[int | None, ...]]:
    data = head_batch(ROWS, 300, BF16)
    mine = on_npu(data, even(300, 2), dist.get_rank(group))
    loss, sent = count_collectives(
        lambda: linear_cross_entropy(
            mine.hidden, mine.head, data.target.to("npu"), group=group, reduction=reduction
        )
    )
    _, back = count_collectives(loss.sum().backward)
    return loss.detach().cpu().numpy().tobytes(), (sent, back)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_one_gather_and_the_same_bits(npu_pool: Pool, reduction: str) -> None:
    first, second = npu_pool.run(_bits, 2, (reduction,))
    assert first == second
    assert first[1] == (1, 1)


def _other_hidden(group: dist.ProcessGroup, check: bool) -> str:
    data = head_batch(ROWS, 300, BF16, seed=0)
    mine = on_npu(data, even(300, 2), dist.get_rank(group))
    hidden = (mine.hidden.detach() * (1 + dist.get_rank(group))).requires_grad_()
    try:
        linear_cross_entropy(hidden, mine.head, data.target.to("npu"), group=group, check=check)
    except ValueError as problem:
        return str(problem)
    return ""


def test_hidden_states_are_compared_with_check(npu_pool: Pool) -> None:
    """Without it nobody would wait for the answer."""
    for text in npu_pool.run(_other_hidden, 2, (True,)):
        assert "ranks disagree on input: the hidden states of rank 0 and rank 1" in text
    assert npu_pool.run(_other_hidden, 2, (False,)) == ["", ""]


def _dropped(group: dist.ProcessGroup) -> str:
    """Another number of kept rows would mean other chunks: told instead."""
    data = head_batch(ROWS, 300, BF16)
    mine = on_npu(data, even(300, 2), dist.get_rank(group))
    target = data.target.clone()
    if dist.get_rank(group) == 1:
        target[:9] = -100
    try:
        linear_cross_entropy(
            mine.hidden, mine.head, target.to("npu"), group=group, drop_ignored=True,
            gradient="forward", scratch_mib=4 * 150 * 2 / (1 << 20),
        )  # fmt: skip
    except ValueError as problem:
        return str(problem)
    return ""


def test_other_targets_where_rows_are_dropped_raise_together(npu_pool: Pool) -> None:
    first, second = npu_pool.run(_dropped, 2)
    assert first == second
    assert "ranks disagree on target" in first
