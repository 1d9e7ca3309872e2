"""With check=True: what would hang otherwise raises on all ranks of the fused head."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from vocab_parallel_ce import linear_cross_entropy

from ..ranks import Pool
from .calls import H, N, V, said_of, sharded_call
from .cases import scratch_for


def _checked(group: dist.ProcessGroup, name: str, gradient: str) -> str:
    """With check=True: what would hang otherwise."""
    bad = dist.get_rank(group) == 1
    call = sharded_call(group, gradient=gradient, check=True)
    if bad:
        if name == "rows":
            call["input"] = torch.zeros(N - 2, H).requires_grad_()
            call["target"] = call["target"][2:]
        elif name == "more chunks":
            call["input"] = torch.zeros(2 * N, H).requires_grad_()
            call["target"] = call["target"].repeat(2)
        elif name == "width":
            call["input"] = torch.zeros(N, H + 1).requires_grad_()
            call["linear_weight"] = torch.zeros(V, H + 1).requires_grad_()
        elif name == "budget":
            call["scratch_mib"] = scratch_for(3, V, torch.float32)
        elif name == "frozen hidden":
            call["input"] = call["input"].detach()
        elif name == "partial":
            call["hidden_gradient"] = "partial"
        elif name == "grad mode":
            call["input"], call["linear_weight"] = torch.zeros(N, H), torch.zeros(V, H)
        elif name == "sequence":
            call["input"] = call["input"][N // 2 :].detach().requires_grad_()
            call["sequence_parallel"] = True
        elif name == "bias":
            call["linear_bias"] = torch.zeros(V)
        elif name == "argument":
            call["linear_weight"] = None
        elif name == "unknown":
            call["no_such_argument"] = 1
    first_try = said_of(call)
    assert said_of(sharded_call(group, gradient=gradient, check=True)) == ""
    return first_try


CHECKED = {
    "rows": "ranks disagree on the number of rows: rank 0 of the group has 12, rank 1 has 10",
    "more chunks": "ranks disagree on the number of rows: rank 0 of the group has 12, rank 1",
    "width": "ranks disagree on the width of input",
    "budget": "ranks disagree on the rows of an exchange",
    "grad mode": "ranks disagree on the rows of an exchange",
    "frozen hidden": "ranks disagree on the sum of the gradient of input",
    "partial": "ranks disagree on the sum of the gradient of input",
    "argument": "linear_weight must be a tensor",
    "unknown": "no_such_argument",
}


@pytest.mark.parametrize("name", CHECKED)
def test_with_check_nothing_hangs(pool: Pool, name: str) -> None:
    for text in pool.run(_checked, 2, (name, "forward")):
        assert CHECKED[name] in text, text


@pytest.mark.parametrize("name", ["frozen hidden", "partial", "grad mode"])
def test_a_sum_that_only_some_would_join_in_backward_is_told_in_forward(
    pool: Pool, name: str
) -> None:
    for text in pool.run(_checked, 2, (name, "recompute")):
        assert "ranks disagree on the sum of the gradient of input" in text, text


@pytest.mark.parametrize("gradient", ["forward", "recompute"])
@pytest.mark.parametrize("name", ["sequence", "bias"])
def test_what_one_rank_has_and_another_has_not(pool: Pool, name: str, gradient: str) -> None:
    """A sequence that only one rank splits is told before that rank gathers the others' parts."""
    said = {"sequence": "sequence_parallel", "bias": "linear_bias (given on one rank only)"}[name]
    texts = pool.run(_checked, 2, (name, gradient))
    assert texts[0] == texts[1]
    assert f"ranks disagree on {said}: rank 0 of the group passed False, rank 1" in texts[0]


def _in_a_late_chunk(
    group: dist.ProcessGroup, gradient: str, split: bool, step: str = "partials", at: int = 2
) -> str:
    """The engine of rank 1 fails in a chunk of six."""
    from unittest import mock

    from vocab_parallel_ce.engines import eager

    usual, calls = getattr(eager, step), []

    def fails(*arguments: Any) -> None:
        calls.append(1)
        if len(calls) == at:
            raise MemoryError("no room")
        usual(*arguments)

    rank = dist.get_rank(group)
    bad = rank == 1
    scratch = scratch_for(N // 6, V, torch.float32)
    call = sharded_call(group, gradient=gradient, check=True, engine="eager", scratch_mib=scratch)
    if split:
        call |= {"input": call["input"].chunk(2)[rank], "sequence_parallel": True}
    with mock.patch.object(eager, step, fails if bad else usual):
        try:
            linear_cross_entropy(**call)
        except (RuntimeError, MemoryError) as problem:
            return str(problem)
    return ""


@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
@pytest.mark.parametrize("gradient", ["forward", "recompute"])
def test_what_fails_in_a_late_chunk_reaches_all_ranks(
    pool: Pool, gradient: str, split: bool
) -> None:
    first, second = pool.run(_in_a_late_chunk, 2, (gradient, split))
    assert "rank 1 of the group: MemoryError: no room" in first
    assert second == "no room"


@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
@pytest.mark.parametrize("at", [2, 6])
def test_a_gradient_that_fails_in_forward_reaches_all_ranks(
    pool: Pool, at: int, split: bool
) -> None:
    """Others wait for its share of a sum; the last chunk's has no exchange after it."""
    first, second = pool.run(_in_a_late_chunk, 2, ("forward", split, "gradient", at))
    assert "rank 1 of the group: MemoryError: no room" in first
    assert second == "no room"
