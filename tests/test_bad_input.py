"""Bad arguments: every rank raises, the message names argument, value and rank, and no rank hangs.

Several bad calls are made in one case, one after the other on the same group, and a good call
ends it: so every error is also shown to leave the group usable.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from vocab_parallel_ce import VocabShard, cross_entropy, cross_entropy_loss, token_statistics
from vocab_parallel_ce.collectives import check_backend_dtype
from vocab_parallel_ce.switches import CHECK_VARIABLE

from .ranks import Pool, run_fresh

ROWS, COLUMNS = 4, 6
Call = dict[str, Any]


def _good_call(group: dist.ProcessGroup | None) -> Call:
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


def _assert_still_works(group: dist.ProcessGroup | None) -> None:
    losses = [
        cross_entropy(**_good_call(group), collective=collective, check=check)
        for collective in ("all_gather", "all_reduce")
        for check in (False, True)
    ]
    for loss in losses:
        assert loss.isfinite()
        torch.testing.assert_close(loss, losses[0])


# Static arguments: (what is replaced in a good call, the error, what its message must hold)

_TENSOR = torch.zeros(ROWS, COLUMNS)
STATIC: dict[str, tuple[Call, type[Exception], str]] = {
    "input list": ({"input": [1.0]}, TypeError, "input must be a tensor, got list"),
    "input int": ({"input": _TENSOR.long()}, TypeError, "input must be .* got torch.int64"),
    "input 0-d": ({"input": torch.tensor(1.0)}, ValueError, "input must have shape .* 0-d"),
    "input empty": (
        {"input": torch.zeros(ROWS, 0)}, ValueError, "input has no columns.*VocabShard",
    ),
    "target list": ({"target": [0]}, TypeError, "target must be a tensor, got list"),
    "target float": (
        {"target": torch.zeros(ROWS)}, TypeError, "target must hold .* got torch.float32",
    ),
    "target int16": (
        {"target": torch.zeros(ROWS, dtype=torch.int16)}, TypeError, "target .* got torch.int16",
    ),
    "target shape": (
        {"target": torch.zeros(ROWS + 1, dtype=torch.int64)},
        ValueError,
        r"target has shape \(5,\), but input \(4, 6\) needs \(4,\)",
    ),
    "target probabilities": (
        {"target": torch.zeros(ROWS, COLUMNS, dtype=torch.int64)},
        ValueError,
        r"target has shape \(4, 6\)",
    ),
    "weight list": ({"weight": [1.0]}, TypeError, "weight must be a tensor, got list"),
    "weight length": (
        {"weight": torch.ones(5)}, ValueError, r"weight has 5 entries but vocab_size is \d+",
    ),
    "weight int": (
        {"weight": torch.ones(COLUMNS, dtype=torch.int64)},
        ValueError,
        "weight must be a floating point vector .* torch.int64",
    ),
    "weight 2-d": (
        {"weight": torch.ones(2, 3)}, ValueError, r"weight must be .* shape \(2, 3\)",
    ),
    "weight grad": (
        {"weight": torch.ones(COLUMNS, requires_grad=True)}, ValueError, "weight gets no gradient",
    ),
    "reduction": (
        {"reduction": "avg"}, ValueError, "reduction must be one of none, sum, mean, got 'avg'",
    ),
    "ignore_index": ({"ignore_index": 1.5}, TypeError, "ignore_index must be an int, got 1.5"),
    "ignore_index bool": ({"ignore_index": True}, TypeError, "ignore_index must .* got True"),
    "smoothing -0.1": ({"label_smoothing": -0.1}, ValueError, r"label_smoothing .* got -0.1"),
    "smoothing 1.1": ({"label_smoothing": 1.1}, ValueError, r"label_smoothing .* got 1.1"),
    "smoothing nan": ({"label_smoothing": float("nan")}, ValueError, "label_smoothing .* got nan"),
    "smoothing str": ({"label_smoothing": "0.1"}, ValueError, "label_smoothing .* got '0.1'"),
    "z inf": ({"lse_square_scale": float("inf")}, ValueError, r"lse_square_scale\) .* got inf"),
    "z str": ({"lse_square_scale": "0"}, ValueError, r"lse_square_scale\) .* got '0'"),
    "scale nan": ({"scale": float("nan")}, ValueError, "scale must be a finite number, got nan"),
    "scale None": ({"scale": None}, ValueError, "scale must be a finite number, got None"),
    "engine": ({"engine": "gpu"}, ValueError, "engine must be one of .* got 'gpu'"),
    "collective": ({"collective": "ring"}, ValueError, "collective must be one .* got 'ring'"),
    "check": ({"check": "yes"}, TypeError, "check must be True, False or None, got 'yes'"),
    "finite_logits": (
        {"finite_logits": 1}, TypeError, "finite_logits must be True or False, got 1",
    ),
    "normalizer sum": (
        {"normalizer": 3.0, "reduction": "sum"}, ValueError, "normalizer .* reduction='sum'",
    ),
    "normalizer shape": (
        {"normalizer": torch.ones(2)}, ValueError, r"normalizer must hold one .* \(2,\)",
    ),
    "normalizer str": ({"normalizer": "3"}, TypeError, "normalizer must be a .* got '3'"),
    "shard tuple": ({"shard": (0, 6)}, TypeError, "shard must be a VocabShard .* got tuple"),
    "shard wide": (
        {"shard": VocabShard(0, 9, 9)}, ValueError, r"6 columns but shard holds the 9 ids \[0, 9\)",
    ),
    "in place leaf": (
        {"input": torch.zeros(ROWS, COLUMNS, requires_grad=True), "inplace_backward": True},
        ValueError,
        "inplace_backward=True would overwrite input, which is a leaf",
    ),
    "in place view of a leaf": (
        {
            "input": torch.zeros(ROWS, 2 * COLUMNS, requires_grad=True)[:, :COLUMNS],
            "inplace_backward": True,
        },
        ValueError,
        "inplace_backward=True would overwrite the leaf that input is a view of",
    ),
    "in place overlap": (
        {
            "input": (torch.zeros(1, COLUMNS, requires_grad=True) * 1).expand(ROWS, COLUMNS),
            "inplace_backward": True,
        },
        ValueError,
        r"inplace_backward=True .* \(4, 6\) with strides \(0, 1\)",
    ),
}  # fmt: skip
# A group that is none cannot carry a preflight.
GROUPS: dict[str, tuple[Call, type[Exception], str]] = {
    "group str": ({"group": "tp"}, TypeError, "group must be a .*ProcessGroup.* got str"),
    "group int": ({"group": -100}, TypeError, "group must be a .*ProcessGroup.* got int"),
}


@pytest.mark.parametrize("name", [*STATIC, *GROUPS])
def test_static_arguments_on_one_rank(name: str) -> None:
    replaced, kind, message = {**STATIC, **GROUPS}[name]
    with pytest.raises(kind, match=message) as caught:
        cross_entropy(**{**_good_call(None), **replaced})
    assert not re.search(r"rank \d", str(caught.value))  # there is one only
    assert cross_entropy(**_good_call(None)).isfinite()


def _outcome(function: Callable[..., object], **call: Any) -> tuple[str, str]:
    try:
        value = function(**call)
    except Exception as problem:
        return type(problem).__name__, str(problem)
    return "", str(value)


def _static_everywhere(group: dist.ProcessGroup) -> list[tuple[str, str]]:
    out = []
    for replaced, _, _ in STATIC.values():
        call = {**_good_call(group), **replaced}
        out.append(_outcome(cross_entropy, **call))
    _assert_still_works(group)
    return out


@pytest.mark.parametrize("world", [2, 3])
def test_static_arguments_raise_without_a_check_and_name_the_rank(pool: Pool, world: int) -> None:
    results = pool.run(_static_everywhere, world)
    for rank, outcomes in enumerate(results):
        for (name, (_, kind, message)), got in zip(STATIC.items(), outcomes, strict=True):
            assert got[0] == kind.__name__, (name, got)
            assert re.search(message, got[1], re.DOTALL), (name, got)
            # Any ``check`` that is not False exchanges errors first: the first rank's is raised.
            where = 0 if name == "check" else rank
            assert f"rank {where} of the group" in got[1], (name, got)


def _static_on_one(group: dist.ProcessGroup, bad: int) -> list[tuple[str, str]]:
    out = []
    for replaced, _, _ in STATIC.values():
        call = {**_good_call(group), "check": True}
        if dist.get_rank(group) == bad:
            call.update(replaced)
        out.append(_outcome(cross_entropy, **call))
    _assert_still_works(group)
    return out


@pytest.mark.parametrize(("world", "bad"), [(2, 0), (3, 2)])
def test_with_check_all_ranks_raise_what_one_found(pool: Pool, world: int, bad: int) -> None:
    results = pool.run(_static_on_one, world, (bad,))
    for outcomes in results:
        for (name, (_, kind, message)), got in zip(STATIC.items(), outcomes, strict=True):
            assert got[0] == kind.__name__, (name, got)
            assert re.search(message, got[1], re.DOTALL), (name, got)
            assert f"rank {bad} of the group" in got[1], (name, got)


# Values of tensors: found after the exchange, so that all ranks raise together without a check


def _values(world: int) -> dict[str, tuple[Call, str]]:
    vocab = COLUMNS * world
    target = torch.tensor([0, 1, vocab - 1, -100])

    def with_target(value: int, dtype: torch.dtype = torch.int64) -> Tensor:
        changed = target.clone().to(dtype)
        changed[2] = value
        return changed

    def with_weight(value: float) -> Tensor:
        weight = torch.ones(vocab)
        weight[vocab - 2] = value
        return weight

    classes = rf"neither a class in \[0, {vocab}\) nor ignore_index=-100"
    not_fine = f"weight must be finite, .* holds NaN or inf for class {vocab - 2};"
    return {
        "target V": ({"target": with_target(vocab)}, f"row 2 holds {vocab}.*{classes}"),
        "target -1": ({"target": with_target(-1)}, f"row 2 holds -1.*{classes}"),
        "target int32": ({"target": with_target(-7, torch.int32)}, f"row 2 holds -7.*{classes}"),
        "target huge": ({"target": with_target(2**40)}, f"row 2 holds {2**40}.*{classes}"),
        "target -100, another ignore_index": (
            {"ignore_index": 0},
            rf"row 3 holds -100.*\[0, {vocab}\) nor ignore_index=0",
        ),
        "weight -inf": ({"weight": with_weight(-float("inf"))}, not_fine),
        "weight nan": ({"weight": with_weight(float("nan"))}, not_fine),
        "weight inf": ({"weight": with_weight(float("inf")).bfloat16()}, not_fine),
    }


@pytest.mark.parametrize("name", list(_values(1)))
@pytest.mark.parametrize("check", [False, True])
def test_values_on_one_rank(name: str, check: bool) -> None:
    replaced, message = _values(1)[name]
    with pytest.raises(ValueError, match=message):
        cross_entropy(**{**_good_call(None), **replaced}, check=check)


def _values_everywhere(
    group: dist.ProcessGroup, collective: str, check: bool, bad: int | None
) -> list[tuple[str, str]]:
    out = []
    for replaced, _ in _values(dist.get_world_size(group)).values():
        call = {**_good_call(group), "collective": collective, "check": check}
        if bad is None or "ignore_index" in replaced or bad == dist.get_rank(group):
            call.update(replaced)
        elif "target" in replaced:
            call["target"] = call["target"].to(replaced["target"].dtype)
        out.append(_outcome(cross_entropy, **call))
    _assert_still_works(group)
    return out


@pytest.mark.parametrize("collective", ["all_gather", "all_reduce"])
@pytest.mark.parametrize("check", [False, True])
@pytest.mark.parametrize(("world", "bad"), [(2, None), (2, 1), (3, 1)])
def test_values_raise_on_every_rank(
    pool: Pool, world: int, bad: int | None, collective: str, check: bool
) -> None:
    results = pool.run(_values_everywhere, world, (collective, check, bad))
    assert all(outcomes == results[0] for outcomes in results)
    for (name, (replaced, message)), got in zip(_values(world).items(), results[0], strict=True):
        assert got[0] == "ValueError", (name, got)
        assert re.search(message, got[1]), (name, got)
        where = 0 if bad is None or "ignore_index" in replaced else bad
        assert f"rank {where} of the group" in got[1], (name, got)


def _every_function(group: dist.ProcessGroup) -> list[tuple[str, str]]:
    call = {**_good_call(group), "target": torch.tensor([0, 1, 99, 2])}
    return [
        _outcome(cross_entropy, **call),
        _outcome(cross_entropy_loss, **call),
        _outcome(token_statistics, **call, entropy=True, argmax=True),
    ]


def test_every_public_function_refuses(pool: Pool) -> None:
    for outcomes in pool.run(_every_function, 2):
        for kind, text in outcomes:
            assert kind == "ValueError"
            assert re.search(r"target is out of range: row 2 holds 99 on rank 0", text)


# Ranks that disagree


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


def _disagree(group: dist.ProcessGroup, collective: str, check: bool) -> list[tuple[str, str]]:
    out = []
    for replaced, _ in _per_rank(dist.get_rank(group)).values():
        call = {**_good_call(group), **replaced, "collective": collective, "check": check}
        out.append(_outcome(cross_entropy, **call))
    _assert_still_works(group)
    return out


@pytest.mark.parametrize("collective", ["all_gather", "all_reduce"])
@pytest.mark.parametrize("check", [False, True])
def test_disagreement_raises_on_every_rank(pool: Pool, collective: str, check: bool) -> None:
    for outcomes in pool.run(_disagree, 2, (collective, check)):
        for (name, (_, message)), got in zip(_per_rank(0).items(), outcomes, strict=True):
            assert got[0] == "ValueError", (name, got)
            assert re.search(message, got[1], re.DOTALL), (name, got)


def _third_rank_differs(group: dist.ProcessGroup) -> list[tuple[str, str]]:
    out = []
    rank = dist.get_rank(group)
    for collective in ("all_gather", "all_reduce"):
        call = {**_good_call(group), "collective": collective, "scale": 2.0 - (rank == 2)}
        out.append(_outcome(cross_entropy, **call))
        shard = VocabShard(6 * (rank % 2), 6 * (rank % 2) + 6, 12)
        call = {**_good_call(group), "collective": collective, "shard": shard}
        call["target"] = call["target"].clamp(max=11)
        out.append(_outcome(cross_entropy, **call))
    _assert_still_works(group)
    return out


def test_the_rank_that_differs_is_named(pool: Pool) -> None:
    for outcomes in pool.run(_third_rank_differs, 3):
        for kind, text in outcomes[::2]:
            assert kind == "ValueError"
            assert "scale: rank 0 of the group passed 2.0, rank 2 passed 1.0" in text
        for kind, text in outcomes[1::2]:
            assert kind == "ValueError"
            assert re.search(r"overlap: rank 0 .* up to 6, rank 2 holds \[0, 6\)", text)


# Disagreement that changes what is sent: only the check can find it


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
        call = {**_good_call(group), **loss_args, **statistics_args, "check": True}
        if statistics_args:
            out.append(_outcome(token_statistics, **call))
        else:
            out.append(_outcome(cross_entropy, **call))
    _assert_still_works(group)
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


def _with_environment(group: dist.ProcessGroup, value: str, check: bool | None) -> tuple[str, str]:
    """Rank 1 is wrong by itself: without a check rank 0 would wait for it."""
    before = os.environ.get(CHECK_VARIABLE)
    os.environ[CHECK_VARIABLE] = value
    try:
        call = {**_good_call(group), "check": check}
        if dist.get_rank(group) == 1:
            call["label_smoothing"] = 7
        return _outcome(cross_entropy, **call)
    finally:
        os.environ.pop(CHECK_VARIABLE)
        if before is not None:
            os.environ[CHECK_VARIABLE] = before


@pytest.mark.parametrize("value", ["1", "true"])
def test_the_environment_switches_the_check_on(pool: Pool, value: str) -> None:
    outcomes = pool.run(_with_environment, 2, (value, None))
    for kind, text in outcomes:
        assert kind == "ValueError"
        assert "label_smoothing must lie in [0, 1], got 7 (rank 1 of the group)" in text


def _count_gathers(group: dist.ProcessGroup, value: str, check: bool | None) -> int:
    from torch.profiler import profile

    before = os.environ.get(CHECK_VARIABLE)
    os.environ[CHECK_VARIABLE] = value
    try:
        with profile() as events:
            cross_entropy(**_good_call(group), check=check, collective="all_gather")
    finally:
        os.environ.pop(CHECK_VARIABLE)
        if before is not None:
            os.environ[CHECK_VARIABLE] = before
    return sum(e.name.startswith("gloo:") for e in events.events() or [])


@pytest.mark.parametrize(
    ("value", "check", "collectives"),
    [("1", None, 2), ("1", False, 1), ("0", None, 1), ("off", None, 1), ("", None, 1)],
)
def test_an_argument_overrides_the_environment(
    pool: Pool, value: str, check: bool | None, collectives: int
) -> None:
    assert pool.run(_count_gathers, 2, (value, check)) == [collectives] * 2


# Without hanging: each kind of disagreement in processes that have nothing but this to do


def _fresh(group: dist.ProcessGroup) -> list[tuple[str, str]]:
    out = _payload_disagreement(group)
    for collective in ("all_gather", "all_reduce"):
        out += _disagree(group, collective, check=False)
    return out


def test_fresh_ranks_end_within_the_timeout() -> None:
    outcomes = run_fresh(_fresh, 2, timeout=60.0)
    assert [outcome.kind for outcome in outcomes] == ["", ""]
    results = [outcome.value for outcome in outcomes]
    count = len(_changes_the_payload(0))
    _assert_payload_errors([values[:count] for values in results])
    assert all(kind == "ValueError" for values in results for kind, _ in values)


# The rest


def test_hccl_does_not_carry_fp64() -> None:
    with pytest.raises(ValueError, match=r"input is float64, which the hccl .* \(rank 3\)"):
        check_backend_dtype("hccl", torch.float64, " (rank 3)")
    with pytest.raises(ValueError, match=r"use input\.float"):
        check_backend_dtype("cpu:gloo,npu:hccl", torch.float64)
    check_backend_dtype("hccl", torch.float32)
    check_backend_dtype("gloo", torch.float64)
    check_backend_dtype("nccl", torch.float64)


def _second_backward(group: dist.ProcessGroup) -> tuple[str, str]:
    loss = cross_entropy(**_good_call(group), inplace_backward=True)
    loss.backward(retain_graph=True)

    def again() -> Tensor:
        loss.backward()
        return loss

    outcome = _outcome(again)
    _assert_still_works(group)
    return outcome


@pytest.mark.parametrize("world", [1, 2])
def test_a_second_backward_in_place_is_refused(pool: Pool, world: int) -> None:
    for kind, text in pool.run(_second_backward, world):
        assert kind == "RuntimeError"
        assert "a second backward through a loss with inplace_backward=True" in text


def _empty_shard_needs_no_columns(group: dist.ProcessGroup) -> None:
    rank = dist.get_rank(group)
    x = torch.randn(ROWS, 6 if rank == 0 else 0, requires_grad=True)
    shard = VocabShard(0, 6, 6) if rank == 0 else VocabShard(6, 6, 6)
    loss = cross_entropy(x, torch.tensor([0, 1, 5, -100]), group=group, shard=shard)
    loss.backward()
    assert loss.isfinite()


def test_an_empty_shard_that_is_told_is_fine(pool: Pool) -> None:
    pool.run(_empty_shard_needs_no_columns, 2)


@pytest.mark.parametrize(
    ("shard", "message"),
    [
        (VocabShard(0, 6, 12), r"shard holds ids \[0, 6\) of vocab_size=12, but there is one rank"),
        (VocabShard(2, 6, 6), r"shard holds ids \[2, 6\) of vocab_size=6, but there is one rank"),
    ],
)
def test_one_rank_must_hold_all(shard: VocabShard, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cross_entropy(**_good_call(None), shard=shard)


def test_padding_ids_are_no_targets() -> None:
    call = {**_good_call(None), "shard": VocabShard(0, 4, 4), "target": torch.tensor([0, 1, 4, 2])}
    with pytest.raises(ValueError, match=r"row 2 holds 4.* class in \[0, 4\)"):
        cross_entropy(**call)
