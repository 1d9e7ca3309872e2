"""Bad values in tensors: found after the exchange, so all ranks raise together without a check."""

from __future__ import annotations

import re

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from vocab_parallel_ce import VocabShard, cross_entropy, cross_entropy_loss, token_statistics

from .calls import COLUMNS, Call, assert_still_works, good_call, outcome_of
from .ranks import Pool


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
        cross_entropy(**{**good_call(None), **replaced}, check=check)


def _values_everywhere(
    group: dist.ProcessGroup, collective: str, check: bool, bad: int | None
) -> list[tuple[str, str]]:
    out = []
    for replaced, _ in _values(dist.get_world_size(group)).values():
        call = {**good_call(group), "collective": collective, "check": check}
        if bad is None or "ignore_index" in replaced or bad == dist.get_rank(group):
            call.update(replaced)
        elif "target" in replaced:
            call["target"] = call["target"].to(replaced["target"].dtype)
        out.append(outcome_of(cross_entropy, **call))
    assert_still_works(group)
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
    call = {**good_call(group), "target": torch.tensor([0, 1, 99, 2])}
    return [
        outcome_of(cross_entropy, **call),
        outcome_of(cross_entropy_loss, **call),
        outcome_of(token_statistics, **call, entropy=True, argmax=True),
    ]


def test_every_public_function_refuses(pool: Pool) -> None:
    for outcomes in pool.run(_every_function, 2):
        for kind, text in outcomes:
            assert kind == "ValueError"
            assert re.search(r"target is out of range: row 2 holds 99 on rank 0", text)


def test_padding_ids_are_no_targets() -> None:
    call = {**good_call(None), "shard": VocabShard(0, 4, 4), "target": torch.tensor([0, 1, 4, 2])}
    with pytest.raises(ValueError, match=r"row 2 holds 4.* class in \[0, 4\)"):
        cross_entropy(**call)
