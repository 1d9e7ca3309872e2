"""Ways to lay a vocabulary on ranks: they tile it, and each is what its name says."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from vocab_parallel_ce import VocabShard
from vocab_parallel_ce.testing import KINDS, even, sharding, shardings, sized


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("share", [3, 8, 100])
def test_shards_tile_the_vocabulary(kind: str, world: int, share: int) -> None:
    plan = sharding(kind, share * world, world)
    assert (plan.name, plan.vocab_size) == (kind, share * world)
    assert len(plan.bounds) == len(plan.padding) == world
    cut = sorted(plan.bounds)
    assert (cut[0][0], cut[-1][1]) == (0, share * world)
    assert all(one[1] == other[0] for one, other in pairwise(cut))


@pytest.mark.parametrize("world", [2, 3, 8])
def test_each_kind_is_what_its_name_says(world: int) -> None:
    def sizes(kind: str) -> list[int]:
        return [stop - start for start, stop in sharding(kind, 8 * world, world).bounds]

    assert set(sizes("even")) == {8}
    assert sharding("even", 8 * world, world).shard(0) is None
    assert len(set(sizes("uneven"))) > 1
    assert all(sharding("padded", 8 * world, world).padding)
    assert sizes("empty")[-1] == sizes("all padding")[0] == 0
    assert sharding("all padding", 8 * world, world).padding[0] > 0
    backwards = sharding("backwards", 8 * world, world)
    assert all(one[0] == other[1] for one, other in pairwise(backwards.bounds))
    assert {plan.name for plan in shardings(world, 8 * world)} == set(KINDS)


def test_one_rank_has_two_ways() -> None:
    whole, padded = shardings(1)
    assert (whole.padding, padded.padding) == ((0,), (7,))


def test_padding_is_what_nobody_may_read() -> None:
    plan = sized("two", (3, 1), padding=(0, 2))
    logits = torch.arange(8.0).view(2, 4)
    assert torch.equal(plan.local(logits, 0), logits[:, :3])
    local = plan.local(logits, 1)
    assert torch.equal(local[:, :1], logits[:, 3:])
    assert bool((local[:, 1] == torch.inf).all())
    assert bool(local[:, 2].isnan().all())
    assert plan.shard(1) == VocabShard(3, 4, 4)
    assert torch.equal(plan.columns(logits, 1), logits[:, 3:])


def test_what_cannot_be_split_is_refused() -> None:
    with pytest.raises(ValueError, match="vocab_size=7 is no multiple of world=2"):
        even(7, 2)
    with pytest.raises(ValueError, match="kind='odd'"):
        sharding("odd", 8, 2)
    with pytest.raises(ValueError, match="less than 3 columns"):
        sharding("uneven", 8, 4)
