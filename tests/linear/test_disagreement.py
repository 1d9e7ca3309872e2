"""Ranks of the fused head that disagree, or one of which fails: all raise, and nothing hangs."""

from __future__ import annotations

import math
import re
import warnings

import pytest
import torch
import torch.distributed as dist

from vocab_parallel_ce import VocabShard, repeated_head

from ..ranks import Pool
from .calls import H, N, V, said_of, sharded_call
from .cases import scratch_for


def _disagreement(group: dist.ProcessGroup, name: str, gradient: str) -> str:
    bad = dist.get_rank(group) == 1
    call = sharded_call(group, gradient=gradient)
    if name == "same head" and bad:
        first = torch.Generator().manual_seed(0)
        call["linear_weight"] = torch.randn(2 * V, H, generator=first)[:V].requires_grad_()
    if name == "same head":
        call["target"] = call["target"] % V
    if bad and name == "hidden":
        call["input"] = torch.randn(N, H, generator=torch.Generator().manual_seed(9))
        call["input"].requires_grad_()
    if name == "hidden chunks":
        call["scratch_mib"] = scratch_for(N // 2, V, torch.float32)
    if bad and name == "hidden chunks":  # two whole chunks in the other order
        call["input"] = call["input"].roll(N // 2, 0).detach().requires_grad_()
    if bad and name == "hidden sign":
        call["input"] = (-call["input"]).detach().requires_grad_()
    if bad and name == "hidden NaN":
        call["input"] = (call["input"] * math.nan).detach().requires_grad_()
    if bad and name == "target":
        call["target"] = call["target"].roll(1)
    if bad and name == "ignored":  # another number of kept rows: other chunks
        call["target"] = torch.where(torch.arange(N) < 9, -100, call["target"])
    if bad and name == "value":
        call["target"][11] = 2 * V
    if bad and name == "overlap":
        call["shard"] = VocabShard(V - 1, 2 * V - 1, 2 * V)
    if name == "overlap" and not bad:
        call["shard"] = VocabShard(0, V, 2 * V)
    if bad and name == "option":
        call["label_smoothing"] = 0.2
    if name == "option":
        call.setdefault("label_smoothing", 0.1)
    if bad and name == "bias":
        call["linear_bias"] = torch.zeros(V)
    if bad and name == "drop_ignored":
        call["drop_ignored"] = True
    first_try = said_of(call)
    assert said_of(sharded_call(group, gradient=gradient)) == "", "the next call is not disturbed"
    return first_try


DISAGREEMENTS = {
    "same head": "linear_weight looks gathered",
    "hidden": "ranks disagree on input: the hidden states of rank 0 and rank 1",
    "hidden chunks": "ranks disagree on input: the hidden states",
    "hidden sign": "ranks disagree on input: the hidden states",
    "hidden NaN": "ranks disagree on input: the hidden states",
    "target": "ranks disagree on target",
    "ignored": "ranks disagree on target",
    "value": "row 11 holds 20 on rank 1",
    "overlap": "vocabulary shards overlap",
    "option": "ranks disagree on label_smoothing",
    "bias": "ranks disagree on linear_bias (given on one rank only)",
    "drop_ignored": "ranks disagree on drop_ignored",
}


@pytest.mark.parametrize("gradient", ["forward", "recompute"])
@pytest.mark.parametrize("name", DISAGREEMENTS)
def test_ranks_that_disagree_raise_alike(pool: Pool, name: str, gradient: str) -> None:
    texts = pool.run(_disagreement, 2, (name, gradient))
    assert texts[0] == texts[1]
    assert DISAGREEMENTS[name] in texts[0]


def test_hidden_states_that_differ_by_rounding_are_fine(pool: Pool) -> None:
    assert pool.run(_by_rounding, 2) == ["", ""]


def _by_rounding(group: dist.ProcessGroup) -> str:
    call = sharded_call(group)
    noise = 1 + 1e-3 * dist.get_rank(group)  # more than layers that sum in another order make
    call["input"] = (call["input"] * noise).detach().requires_grad_()
    return said_of(call)


def _warnings(group: dist.ProcessGroup, head: str) -> list[str]:
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    call = sharded_call(group)
    if head == "repeated":
        first = torch.Generator().manual_seed(0)
        call["linear_weight"] = torch.randn(V, H, generator=first).requires_grad_()
    elif head == "zero":
        call["linear_weight"] = torch.zeros(V, H, requires_grad=True)
    call["shard"] = VocabShard(rank * V, (rank + 1) * V, world * V)
    repeated_head._warned = False
    with warnings.catch_warnings(record=True) as caught, pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_RANK", "0")  # the others leave it to the first of the host
        warnings.simplefilter("always")
        for _ in range(2):
            assert said_of(call) == ""
    return [str(one.message) for one in caught]


@pytest.mark.parametrize("head", ["repeated", "zero", "right"])
def test_a_head_that_is_the_same_on_every_rank_warns_once(pool: Pool, head: str) -> None:
    """With shards that were told: else it is an error, above."""
    for said in pool.run(_warnings, 2, (head,)):
        assert len(said) == (head == "repeated"), said
        assert all("linear_weight of all 2 ranks of the group give the same" in w for w in said)


def _own_mistake(group: dist.ProcessGroup, name: str) -> tuple[int, str]:
    """Of every rank alike; what it says of itself, with the budget that it asks for."""
    rank = dist.get_rank(group)
    call = sharded_call(group)
    if name == "row":
        call["scratch_mib"] = 1e-6
    elif name == "sequence":
        call |= {"input": call["input"][: N // 2], "sequence_parallel": True}
        call["scratch_mib"] = scratch_for(1, V, torch.float32)
    else:
        call |= {"gradient": "forward", "reduction": "none"}
    text = said_of(call)
    if name != "gradient":
        (least,) = re.findall(r"pass at least ([0-9.e-]+)", text)
        assert said_of({**call, "scratch_mib": float(least)}) == ""
    return rank, text


@pytest.mark.parametrize("name", ["row", "sequence", "gradient"])
def test_a_mistake_names_its_rank_and_the_way_out(pool: Pool, name: str) -> None:
    for rank, text in pool.run(_own_mistake, 2, (name,)):
        assert f"(rank {rank} of the group)" in text
        assert "use gradient=" in text or "or None for the default" in text
