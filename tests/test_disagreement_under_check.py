"""Disagreement that changes what is sent: only the check can find it, where it is switched on."""

from __future__ import annotations

import os
import re
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from vocab_parallel_ce import cross_entropy, token_statistics
from vocab_parallel_ce.switches import CHECK_VARIABLE

from .calls import COLUMNS, ROWS, Call, assert_still_works, good_call, outcome_of
from .cases import gloo_events
from .ranks import Pool, run_fresh
from .test_disagreement import disagree


def _changes_the_payload(rank: int) -> dict[str, tuple[Call, Call, str]]:
    """name -> (arguments of cross_entropy, of token_statistics instead, message)."""
    one = rank == 1
    rows = ROWS + one
    return {
        "N": (
            {"input": torch.randn(rows, COLUMNS), "target": torch.arange(rows)},
            {},
            "disagree on the number of rows: rank 0 of the group has 4, rank 1 has 5",
        ),
        "dtype": (
            {"input": torch.randn(ROWS, COLUMNS, dtype=torch.float64 if one else torch.float32)},
            {},
            "disagree on the dtype of input: rank 0 .* torch.float32, rank 1 has torch.float64",
        ),
        "half dtypes": (
            {"input": torch.randn(ROWS, COLUMNS).to(torch.half if one else torch.bfloat16)},
            {},
            "disagree on the dtype of input: rank 0 .* torch.bfloat16, rank 1 has torch.float16",
        ),
        "dtype of target": (
            {"target": torch.arange(ROWS, dtype=torch.int32 if one else torch.int64)},
            {},
            "disagree on the dtype of target: rank 0 .* torch.int64, rank 1 has torch.int32",
        ),
        "collective": (
            {"collective": "all_reduce" if one else "all_gather"},
            {},
            "disagree on collective: rank 0 of the group has all_gather, rank 1 has all_reduce",
        ),
        "smoothing on or off": (
            {"label_smoothing": 0.1 if one else 0.0},
            {},
            "disagree on label_smoothing: rank 0 .* passed 0.0, rank 1 passed 0.1",
        ),
        "entropy": ({}, {"entropy": one}, "disagree on entropy: rank 0 .* False, rank 1 .* True"),
        "argmax": ({}, {"argmax": one}, "disagree on argmax: rank 0 .* False, rank 1 .* True"),
    }


def _payload_disagreement(group: dist.ProcessGroup) -> list[tuple[str, str]]:
    out = []
    for loss_args, statistics_args, _ in _changes_the_payload(dist.get_rank(group)).values():
        call = {**good_call(group), **loss_args, **statistics_args, "check": True}
        if statistics_args:
            out.append(outcome_of(token_statistics, **call))
        else:
            out.append(outcome_of(cross_entropy, **call))
    assert_still_works(group)
    return out


def _assert_payload_errors(results: list[list[tuple[str, str]]]) -> None:
    for outcomes in results:
        for (name, (_, _, message)), got in zip(
            _changes_the_payload(0).items(), outcomes, strict=True
        ):
            assert got[0] == "ValueError", (name, got)
            assert re.search(message, got[1]), (name, got)


def test_check_finds_what_would_hang(pool: Pool) -> None:
    _assert_payload_errors(pool.run(_payload_disagreement, 2))


# Without hanging: each kind of disagreement in processes that have nothing but this to do


def _fresh(group: dist.ProcessGroup) -> list[tuple[str, str]]:
    out = _payload_disagreement(group)
    for collective in ("all_gather", "all_reduce"):
        out += disagree(group, collective, check=False)
    return out


def test_fresh_ranks_end_within_the_timeout() -> None:
    outcomes = run_fresh(_fresh, 2, timeout=60.0)
    assert [outcome.kind for outcome in outcomes] == ["", ""]
    results = [outcome.value for outcome in outcomes]
    count = len(_changes_the_payload(0))
    _assert_payload_errors([values[:count] for values in results])
    assert all(kind == "ValueError" for values in results for kind, _ in values)


# The variable


def _with_environment(group: dist.ProcessGroup, value: str, check: bool | None) -> tuple[str, str]:
    """Rank 1 is wrong by itself: without a check rank 0 would wait for it."""
    call = {**good_call(group), "check": check}
    if dist.get_rank(group) == 1:
        call["label_smoothing"] = 7
    with mock.patch.dict(os.environ, {CHECK_VARIABLE: value}):
        return outcome_of(cross_entropy, **call)


@pytest.mark.parametrize("value", ["1", "true"])
def test_the_environment_switches_the_check_on(pool: Pool, value: str) -> None:
    outcomes = pool.run(_with_environment, 2, (value, None))
    for kind, text in outcomes:
        assert kind == "ValueError"
        assert "label_smoothing must lie in [0, 1], got 7 (rank 1 of the group)" in text


def _count_gathers(group: dist.ProcessGroup, value: str, check: bool | None) -> int:
    call = {**good_call(group), "check": check, "collective": "all_gather"}
    with mock.patch.dict(os.environ, {CHECK_VARIABLE: value}):
        return len(gloo_events(lambda: cross_entropy(**call)))


@pytest.mark.parametrize(
    ("value", "check", "collectives"),
    [("1", None, 2), ("1", False, 1), ("0", None, 1), ("off", None, 1), ("", None, 1)],
)
def test_an_argument_overrides_the_environment(
    pool: Pool, value: str, check: bool | None, collectives: int
) -> None:
    assert pool.run(_count_gathers, 2, (value, check)) == [collectives] * 2
