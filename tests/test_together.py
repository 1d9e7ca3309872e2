"""check=True: whatever one rank raises before the exchange, and wherever, all ranks raise.

A pool answers only where every rank came back, so a rank that waits for another fails the test.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from vocab_parallel_ce import (
    VocabShard,
    api,
    cross_entropy,
    cross_entropy_loss,
    token_statistics,
)
from vocab_parallel_ce.engines import eager
from vocab_parallel_ce.parallel.megatron.cross_entropy import MegatronOptions, per_token_loss

from .ranks import Pool, no_group_stays

C = 6
Call = dict[str, Any]


def _good(group: dist.ProcessGroup) -> Call:
    world = dist.get_world_size(group)
    full = torch.randn(4, C * world, generator=torch.Generator().manual_seed(0))
    return {
        "input": full.chunk(world, -1)[dist.get_rank(group)],
        "target": torch.tensor([0, 1, C * world - 1, -100]),
        "group": group,
        "engine": "eager",
        "check": True,
    }


class _Broken(Tensor):
    """Raises at whatever is asked of it."""

    problem: Exception

    @classmethod
    def __torch_function__(cls, *_: Any, **__: Any) -> Any:
        raise cls.problem


def _broken(problem: Exception) -> Tensor:
    kind = type("Broken", (_Broken,), {"problem": problem})
    return torch.Tensor._make_subclass(kind, torch.zeros(4, C))


RAISED: tuple[Exception, ...] = (
    NotImplementedError("no such kernel"),
    OverflowError("too large"),
    struct.error("does not fit"),
    MemoryError("no room"),
    IndexError("beyond"),
    KeyError("lost"),
    AssertionError("not so"),
    torch.OutOfMemoryError("card full"),
)
WRONG: dict[str, tuple[Call, str]] = {
    "unknown argument": ({"redduction": "sum"}, "TypeError"),
    "huge scale": ({"scale": 10**400}, "ValueError"),
    "huge ignore_index": ({"ignore_index": 10**400}, "ValueError"),
    "sparse": ({"input": torch.zeros(4, C).to_sparse()}, ""),
    "check": ({"check": "yes"}, "TypeError"),
    **{type(p).__name__: ({"input": _broken(p)}, type(p).__name__) for p in RAISED},
}


def _outcome(function: Callable[..., object], call: Call) -> tuple[str, str]:
    try:
        function(**call)
    except Exception as problem:
        return type(problem).__name__, str(problem)
    return "", ""


def _still_works(group: dist.ProcessGroup) -> None:
    assert bool(cross_entropy(**_good(group)).isfinite())


def _told(group: dist.ProcessGroup, bad: int) -> dict[str, tuple[str, str]]:
    out = {}
    for function in (cross_entropy, cross_entropy_loss, token_statistics):
        for name, (replaced, _) in WRONG.items():
            call = _good(group) | (replaced if dist.get_rank(group) == bad else {})
            out[f"{function.__name__}, {name}"] = _outcome(function, call)
            _still_works(group)
    return out


@pytest.mark.parametrize(("world", "bad"), [(2, 0), (3, 2)])
def test_any_error_reaches_all_ranks(pool: Pool, world: int, bad: int) -> None:
    ranks = pool.run(_told, world, (bad,))
    for what, (kind, text) in ranks[bad].items():
        wanted = WRONG[what.split(", ")[1]][1]
        assert kind == wanted or (not wanted and kind), what
        for other in (r for r in range(world) if r != bad):
            theirs, message = ranks[other][what]
            named = "" if kind in ("ValueError", "TypeError", "RuntimeError") else f"{kind}: "
            assert theirs == (kind if not named else "RuntimeError"), what
            assert message == f"rank {bad} of the group: {named}{text}", what


def _normalizer(group: dist.ProcessGroup) -> tuple[str, str]:
    call = _good(group) | {"normalizer": 4 if dist.get_rank(group) else 10**400}
    outcome = _outcome(cross_entropy, call)
    _still_works(group)
    return outcome


def test_a_normalizer_that_is_no_float_reaches_all_ranks(pool: Pool) -> None:
    first, second = pool.run(_normalizer, 2)
    assert first[0] == "ValueError"
    assert first[1].startswith("normalizer is an int that no float can hold")
    assert second[1].startswith("rank 0 of the group: ")


def _without_numbers(group: dist.ProcessGroup, inside: bool) -> tuple[str, str]:
    mode = FakeTensorMode()
    x, y = mode.from_tensor(torch.randn(4, C)), mode.from_tensor(torch.arange(4))
    options: Call = {"group": group, "check": True}
    if dist.get_rank(group) == 1:
        options["reduction"] = "median"
    with mode if inside else nullcontext():
        return _outcome(cross_entropy, {"input": x, "target": y, **options})


@pytest.mark.parametrize("inside", [True, False])
def test_what_is_wrong_without_numbers_stays_where_it_is(pool: Pool, inside: bool) -> None:
    """Nothing is exchanged for shapes alone, so nobody would be there to be told."""
    good, bad = pool.run(_without_numbers, 2, (inside,))
    assert good == ("", "")
    assert bad[0] == "ValueError"
    assert "reduction must be one of none, sum, mean, got 'median'" in bad[1]


def _in_the_engine(group: dist.ProcessGroup, compiled: bool) -> tuple[str, str]:
    """The engine of rank 1 fails after it has begun."""
    usual = eager.partials

    def partials(*arguments: Any) -> None:
        usual(*arguments)
        raise MemoryError("no room")

    function: Any = torch.compile(cross_entropy, backend="eager") if compiled else cross_entropy
    bad = dist.get_rank(group) == 1
    with mock.patch.object(eager, "partials", partials if bad else usual):
        outcome = _outcome(function, _good(group))
    _still_works(group)
    return outcome


@pytest.mark.parametrize("compiled", [False, True])
def test_what_fails_in_the_engine_reaches_all_ranks(pool: Pool, compiled: bool) -> None:
    first, second = pool.run(_in_the_engine, 2, (compiled,))
    assert first[0] == "RuntimeError"
    assert "rank 1 of the group: MemoryError: no room" in first[1]
    assert second[0] == "MemoryError"


def _after(group: dist.ProcessGroup) -> tuple[str, str]:
    """The others have their loss by then, and listen no more."""
    failing = mock.patch.object(api, "reduce_rows", side_effect=MemoryError("no room"))
    with failing if dist.get_rank(group) == 1 else nullcontext():
        outcome = _outcome(cross_entropy, _good(group))
    _still_works(group)
    return outcome


def test_what_fails_after_the_exchange_stays_where_it_is(pool: Pool) -> None:
    assert pool.run(_after, 2) == [("", ""), ("MemoryError", "no room")]


def _dtensor(group: dist.ProcessGroup, replaced: Call) -> tuple[str, str]:
    mesh = DeviceMesh.from_group(group, "cpu")
    call = _good(group) | {"group": None}
    call["input"] = DTensor.from_local(call["input"], mesh, [Shard(-1)], run_check=False)
    if dist.get_rank(group) == 0:
        call.update(replaced or {"group": group})
    outcome = _outcome(cross_entropy, call)
    _still_works(group)
    return outcome


@pytest.mark.parametrize(
    "replaced", [{}, {"scale": "1"}, {"target": None}, {"weight": torch.zeros(1)}]
)
def test_the_ranks_of_a_dtensor_are_told(pool: Pool, replaced: Call) -> None:
    first, second = pool.run(_dtensor, 2, (replaced,))
    assert first[0]
    assert second[0] == first[0]
    assert second[1] in (f"rank 0: {first[1]}", f"rank 0 of the group: {first[1]}")


# On a mesh of several dimensions ranks wait for more than the preflight: all of it hears


def _on_a_mesh(group: dist.ProcessGroup) -> dict[str, tuple[str, str]]:
    rank, out = dist.get_rank(), {}
    full = torch.randn(6, 4 * C, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([0, 9, 23, -100, 3, 11])
    with no_group_stays():
        mesh = DeviceMesh("cpu", torch.arange(4).view(2, 2))
        sharded = distribute_tensor(full, mesh, [Shard(0), Shard(1)])
        rows = distribute_tensor(ids, mesh, [Shard(0), Replicate()])
        elsewhere = distribute_tensor(ids, mesh, [Replicate(), Shard(0)])
        bad = distribute_tensor(ids.clone().fill_(99), mesh, [Shard(0), Replicate()])
        one, first = torch.tensor(1.0), rank == 0
        partial = DTensor.from_local(one, mesh, [Partial(), Partial()], run_check=False)
        summed = DTensor.from_local(
            sharded.to_local(), mesh, [Replicate(), Partial()], run_check=False
        )
        calls: dict[str, Call] = {
            "a target that is none": {"target": "x"} if first else {"target": elsewhere},
            "a placement": {"input": summed} if first else {},
            "an option before a redistribution": {
                "target": elsewhere, "normalizer": partial, "group": group if first else None,
            },
            "an option after it": {
                "target": elsewhere, "normalizer": partial, "label_smoothing": 3.0 * first,
            },
            "an unknown argument": {"redduction": "sum"} if first else {"target": elsewhere},
            "values of some rows": {"target": bad if rank < 2 else rows},
            "values of some rows, none reduced": {
                "target": bad if rank < 2 else rows, "reduction": "none",
            },
        }  # fmt: skip
        for name, call in calls.items():
            out[name] = _outcome(
                cross_entropy, {"input": sharded, "target": rows, "check": True, **call}
            )
            loss: Any = cross_entropy(sharded, elsewhere, check=True)
            right = loss.to_local()
            torch.testing.assert_close(right, torch.nn.functional.cross_entropy(full, ids))
        statistics = {"input": sharded, "target": bad if rank < 2 else rows, "check": True}
        out["statistics"] = _outcome(token_statistics, statistics)
    return out


def test_all_ranks_of_a_mesh_are_told(pool: Pool) -> None:
    ranks = pool.run(_on_a_mesh, 4)
    for name, (kind, text) in ranks[0].items():
        assert kind, name
        for theirs, message in (outcomes[name] for outcomes in ranks[1:]):
            assert theirs == kind, name
            assert message.endswith(text), name


def _megatron(group: dist.ProcessGroup, wrong: str) -> tuple[str, str]:
    good = _good(group)
    logits, target = good["input"], good["target"]
    bad = dist.get_rank(group) == 1
    smoothing: Any = "0.1" if bad and wrong == "smoothing" else 0.1
    if bad and wrong == "target":
        target = None
    if bad and wrong == "logits":
        logits = _broken(IndexError("beyond"))
    options = MegatronOptions(check=True)
    outcome = _outcome(per_token_loss, {
        "logits": logits, "target": target, "label_smoothing": smoothing, "tp_group": group,
        "options": options,
    })  # fmt: skip
    _still_works(group)
    return outcome


@pytest.mark.parametrize("wrong", ["smoothing", "target", "logits"])
def test_the_ranks_of_megatron_are_told(pool: Pool, wrong: str) -> None:
    first, second = pool.run(_megatron, 2, (wrong,))
    assert second[0]
    assert first[1].startswith("rank 1 of the group: ")


def _from_group(group: dist.ProcessGroup, size: object) -> tuple[str, str]:
    mine = size if dist.get_rank(group) == 1 else 4
    return _outcome(VocabShard.from_group, {"local_size": mine, "group": group})


@pytest.mark.parametrize("size", [-1, 2.0, None, 2**70])
def test_a_bad_size_of_one_rank_reaches_all(pool: Pool, size: object) -> None:
    first, second = pool.run(_from_group, 2, (size,))
    assert first[0] == second[0] == "ValueError"
    assert "another on rank 1 of the group" in first[1]
    assert f"got {size!r}" in second[1]
