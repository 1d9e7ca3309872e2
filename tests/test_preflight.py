"""The preflight: one exchange of fixed size, after which all ranks raise or all go on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from vocab_parallel_ce.preflight import Plan, preflight
from vocab_parallel_ce.request import RowRequest

from .ranks import Pool


def _plan(rank: int, world: int, **change: Any) -> Plan:
    rows, dtype = change.pop("rows", 3), change.pop("dtype", torch.float32)
    request = RowRequest(4 * rank, 4 * rank + 4, 4 * world, False, **change)
    return Plan(request, torch.zeros(rows, 4, dtype=dtype), torch.zeros(rows, dtype=torch.int64))


def _raised(group: dist.ProcessGroup, plan: Plan | Exception) -> tuple[str, str, bool]:
    try:
        preflight(plan, group)
    except Exception as problem:
        return type(problem).__name__, str(problem), problem is plan
    return "", "", False


def _all_well(group: dist.ProcessGroup) -> tuple[str, str, bool]:
    return _raised(group, _plan(dist.get_rank(group), dist.get_world_size(group)))


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_that_agree_go_on(pool: Pool, world: int) -> None:
    assert pool.run(_all_well, world) == [("", "", False)] * world


def _differs(group: dist.ProcessGroup, bad: int, change: dict[str, Any]) -> tuple[str, str, bool]:
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    outcome = _raised(group, _plan(rank, world, **(change if rank == bad else {})))
    assert _all_well(group) == ("", "", False)
    return outcome


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": 4}, "ranks disagree on the number of rows: rank 0 .* has 3, rank 2 has 4"),
        ({"rows": 0}, "the number of rows: rank 0 .* has 3, rank 2 has 0"),
        (
            {"dtype": torch.bfloat16},
            "the dtype of input: rank 0 .* torch.float32, rank 2 has torch.bfloat16",
        ),
        ({"collective": "all_reduce"}, "collective: rank 0 .* auto, rank 2 has all_reduce"),
        ({"scale": 2.0}, "scale: rank 0 .* passed 1.0, rank 2 passed 2.0"),
        ({"argmax": True}, "argmax: rank 0 .* passed False, rank 2 passed True"),
    ],
)
def test_a_rank_that_differs_makes_all_raise(
    pool: Pool, change: dict[str, Any], message: str
) -> None:
    for kind, text, _ in pool.run(_differs, 3, (2, change)):
        assert kind == "ValueError"
        with pytest.raises(ValueError, match=message):
            raise ValueError(text)


ERRORS = [
    (ValueError("scale: bad"), "ValueError", "scale: bad"),
    (TypeError("weight: bad"), "TypeError", "weight: bad"),
    (RuntimeError("engine: bad"), "RuntimeError", "engine: bad"),
    (KeyError("lost"), "RuntimeError", "lost"),  # a kind that does not travel
    (ValueError("target " + "π" * 5000), "ValueError", "target π"),  # cut inside a character
]


def _fails(group: dist.ProcessGroup, bad: int, which: int) -> tuple[str, str, bool]:
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    outcome = _raised(group, ERRORS[which][0] if rank == bad else _plan(rank, world))
    assert _all_well(group) == ("", "", False)
    return outcome


@pytest.mark.parametrize("which", range(len(ERRORS)))
@pytest.mark.parametrize("bad", [0, 1])
def test_an_error_of_one_rank_reaches_all(pool: Pool, bad: int, which: int) -> None:
    _, kind, text = ERRORS[which]
    outcomes = pool.run(_fails, 2, (bad, which))
    assert outcomes[bad][2], "the rank that failed raises its own error"
    seen = outcomes[1 - bad]
    assert seen[0] == kind
    assert seen[1].startswith(f"rank {bad} of the group: ")
    assert text in seen[1]
    assert len(seen[1]) < 1100


def _all_fail(group: dist.ProcessGroup) -> tuple[str, str, bool]:
    return _raised(group, ValueError(f"mine is {dist.get_rank(group)}"))


def test_when_all_fail_all_raise(pool: Pool) -> None:
    outcomes = pool.run(_all_fail, 3)
    assert [kind for kind, _, _ in outcomes] == ["ValueError"] * 3
    assert all("mine is 0" in text for _, text, _ in outcomes)


def _default_device(group: dist.ProcessGroup) -> None:
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    alike = _plan(rank, world)._replace(normalizer=torch.tensor(3.0))
    other = _plan(rank, world, rows=3 + rank)
    with torch.device("meta"):
        preflight(alike, group)
        assert "the number of rows" in _raised(group, other)[1]


def test_the_default_device_does_not_matter(pool: Pool) -> None:
    pool.run(_default_device, 2)
