"""VocabShard: three integers, their rules, and the two ways to make them for a group."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.distributed as dist

from vocab_parallel_ce import VocabShard

from .ranks import WORLDS, Pool


@pytest.mark.parametrize(
    ("start", "stop", "vocab_size"),
    [(-1, 2, 4), (3, 2, 4), (0, 0, 0)],
)
def test_ranges_must_be_ranges(start: int, stop: int, vocab_size: int) -> None:
    told = f"got start={start}, stop={stop}, vocab_size={vocab_size}"
    with pytest.raises(ValueError, match=told):
        VocabShard(start, stop, vocab_size)


@pytest.mark.parametrize(("start", "stop", "kept"), [(0, 4, 4), (2, 6, 2), (4, 8, 0), (6, 8, 0)])
def test_ids_from_vocab_size_on_are_padding(start: int, stop: int, kept: int) -> None:
    shard = VocabShard(start, stop, 4)
    assert shard == VocabShard(min(start, 4), min(stop, 4), 4)
    assert shard.size == kept


@pytest.mark.parametrize(
    ("name", "value"),
    [("start", 0.0), ("stop", True), ("vocab_size", "4"), ("stop", torch.tensor(2))],
)
def test_numbers_must_be_ints(name: str, value: object) -> None:
    numbers: dict[str, object] = {"start": 0, "stop": 2, "vocab_size": 4, name: value}
    with pytest.raises(TypeError, match=f"{name} must be an int, got "):
        VocabShard(**numbers)  # type: ignore[arg-type]


def test_a_shard_is_a_value() -> None:
    shard = VocabShard(3, 5, 9)
    assert shard == VocabShard(3, 5, 9)
    assert len({shard, VocabShard(3, 5, 9)}) == 1
    assert shard.size == 2
    assert VocabShard(9, 9, 9).size == 0
    with pytest.raises(dataclasses.FrozenInstanceError):
        shard.start = 0  # type: ignore[misc]


def _even(group: dist.ProcessGroup, vocab_size: int) -> tuple[int, int, int]:
    return dataclasses.astuple(VocabShard.even(vocab_size, group))


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("vocab_size", [1, 2, 5, 8, 9, 50257])
def test_even_divides_as_torch_chunk_does(pool: Pool, world: int, vocab_size: int) -> None:
    chunks = [(int(c[0]), int(c[-1]) + 1) for c in torch.arange(vocab_size).chunk(world)]
    chunks += [(vocab_size, vocab_size)] * (world - len(chunks))
    assert pool.run(_even, world, (vocab_size,)) == [(*chunk, vocab_size) for chunk in chunks]


def test_without_a_group_there_is_one_rank() -> None:
    assert VocabShard.even(7) == VocabShard(0, 7, 7)
    assert VocabShard.from_group(7) == VocabShard(0, 7, 7)


def _from_group(group: dist.ProcessGroup, sizes: tuple[int, ...]) -> VocabShard:
    return VocabShard.from_group(sizes[dist.get_rank(group)], group)


@pytest.mark.parametrize("sizes", [(4,), (3, 5), (2, 0, 7), (0, 0, 1, 0)])
def test_from_group_adds_sizes_up_in_rank_order(pool: Pool, sizes: tuple[int, ...]) -> None:
    starts = [sum(sizes[:r]) for r in range(len(sizes))]
    want = [VocabShard(a, a + n, sum(sizes)) for a, n in zip(starts, sizes, strict=True)]
    assert pool.run(_from_group, len(sizes), (sizes,)) == want


@pytest.mark.parametrize("size", [-1, 2.0, True, None])
def test_from_group_refuses_other_sizes(size: object) -> None:
    with pytest.raises(ValueError, match=f"local_size must be an int from 0 to .*, got {size!r}"):
        VocabShard.from_group(size)  # type: ignore[arg-type]
