"""Ranks that disagree: each of them raises, and the message names who differs."""

from __future__ import annotations

import re

import pytest
import torch
import torch.distributed as dist

from vocab_parallel_ce import VocabShard, cross_entropy

from .calls import COLUMNS, ROWS, Call, assert_still_works, good_call, outcome_of
from .ranks import Pool


def _per_rank(rank: int) -> dict[str, tuple[Call, str]]:
    """What rank 1 is called with in place of a good call; without a check both can go on."""
    one = rank == 1
    full = torch.linspace(-2, 2, ROWS * COLUMNS).view(ROWS, COLUMNS)
    low = torch.tensor([0, 1, 5, 2])
    wide = torch.randn(ROWS, COLUMNS + 2)
    return {
        "reduction": (
            {"reduction": "none" if one else "sum"},
            "disagree on reduction: rank 0 .* passed 'sum', rank 1 passed 'none'",
        ),
        "ignore_index": (
            {"ignore_index": -1 if one else -100, "target": low},
            "disagree on ignore_index: rank 0 .* passed -100, rank 1 passed -1",
        ),
        "ignore_index, and rows that hold the other rank's": (
            {"ignore_index": -1 if one else -100},
            "disagree on ignore_index: rank 0 .* passed -100, rank 1 passed -1",
        ),
        "label_smoothing": (
            {"label_smoothing": 0.2 if one else 0.1},
            "disagree on label_smoothing: rank 0 .* passed 0.1, rank 1 passed 0.2",
        ),
        "lse_square_scale": (
            {"lse_square_scale": 0.2 if one else 0.1},
            "disagree on lse_square_scale: rank 0 .* passed 0.1, rank 1 passed 0.2",
        ),
        "scale": (
            {"scale": 0.5 if one else 1},
            "disagree on scale: rank 0 .* passed 1.0, rank 1 passed 0.5",
        ),
        "target": (
            {"target": torch.tensor([1, 0, 5, -100] if one else [0, 1, 5, -100])},
            "disagree on target: rank 0 and rank 1 .* must pass the same target",
        ),
        "weight": (
            {"weight": torch.full((2 * COLUMNS,), 1.0 + 2.0**-20 * one)},
            "disagree on weight: rank 0 and rank 1",
        ),
        "weight on one rank": (
            {"weight": torch.ones(2 * COLUMNS) if one else None},
            "disagree on weight: rank 0 and rank 1",
        ),
        "overlap": (
            {"shard": VocabShard(4 if one else 0, 10 if one else 6, 10), "target": low},
            r"overlap: rank 0 .* holds ids up to 6, rank 1 holds \[4, 10\)",
        ),
        "missing": (
            {"shard": VocabShard(6 if one else 0, 12 if one else 5, 12)},
            r"ids \[5, 6\) of vocab_size=12 are on no rank .*rank 0: \[0, 5\), rank 1: \[6, 12\)",
        ),
        "missing at the end": (
            {"shard": VocabShard(6 if one else 0, 11 if one else 6, 13)},
            r"ids \[11, 13\) of vocab_size=13 are on no rank",
        ),
        "shard on both for rank 0": (
            {"shard": VocabShard(0, 6, 12)},
            r"overlap: rank 0 .* rank 1 holds \[0, 6\)",
        ),
        "vocab_size": (
            {"shard": VocabShard(6 if one else 0, 12 if one else 6, 12 + one)},
            r"disagree on vocab_size: rank 0 .* has 12 .*rank 1 has 13",
        ),
        "unequal columns": (
            {"input": wide if one else full},
            r"disagree on vocab_size: .* 12 .*rank 1 has 16 .*VocabShard",
        ),
        "shard on one rank": (
            {"shard": VocabShard(6, 12, 12) if one else None},
            "disagree on shard .given on one rank only.",
        ),
        "gathered": (
            {"input": full, "target": low},
            "input looks gathered: all 2 ranks .* same logits of 6 columns",
        ),
        "gathered, with a shard": (
            {"input": torch.randn(ROWS, 12), "shard": VocabShard(6 * one, 6 + 6 * one, 12)},
            r"input looks gathered: it has all vocab_size=12 columns, but shard holds \[",
        ),
    }


def disagree(group: dist.ProcessGroup, collective: str, check: bool) -> list[tuple[str, str]]:
    out = []
    for replaced, _ in _per_rank(dist.get_rank(group)).values():
        call = {**good_call(group), **replaced, "collective": collective, "check": check}
        out.append(outcome_of(cross_entropy, **call))
    assert_still_works(group)
    return out


@pytest.mark.parametrize("collective", ["all_gather", "all_reduce"])
@pytest.mark.parametrize("check", [False, True])
def test_disagreement_raises_on_every_rank(pool: Pool, collective: str, check: bool) -> None:
    for outcomes in pool.run(disagree, 2, (collective, check)):
        for (name, (_, message)), got in zip(_per_rank(0).items(), outcomes, strict=True):
            assert got[0] == "ValueError", (name, got)
            assert re.search(message, got[1], re.DOTALL), (name, got)


def _third_rank_differs(group: dist.ProcessGroup) -> list[tuple[str, str]]:
    out = []
    rank = dist.get_rank(group)
    for collective in ("all_gather", "all_reduce"):
        call = {**good_call(group), "collective": collective, "scale": 2.0 - (rank == 2)}
        out.append(outcome_of(cross_entropy, **call))
        shard = VocabShard(6 * (rank % 2), 6 * (rank % 2) + 6, 12)
        call = {**good_call(group), "collective": collective, "shard": shard}
        call["target"] = call["target"].clamp(max=11)
        out.append(outcome_of(cross_entropy, **call))
    assert_still_works(group)
    return out


def test_the_rank_that_differs_is_named(pool: Pool) -> None:
    for outcomes in pool.run(_third_rank_differs, 3):
        for kind, text in outcomes[::2]:
            assert kind == "ValueError"
            assert "scale: rank 0 of the group passed 2.0, rank 2 passed 1.0" in text
        for kind, text in outcomes[1::2]:
            assert kind == "ValueError"
            assert re.search(r"overlap: rank 0 .* up to 6, rank 2 holds \[0, 6\)", text)
