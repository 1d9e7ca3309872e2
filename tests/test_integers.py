"""Integers of every width: targets against values that they cannot hold, and NumPy's numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vocab_parallel_ce import VocabParallelCrossEntropyLoss, VocabShard, cross_entropy

ROWS, VOCAB = 4, 7
ENDS = [2**31, -(2**31) - 1, 2**32 - 100, 2**32 + 3, 2**63 - 1, -(2**63)]


def _batch() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(ROWS, VOCAB, generator=g), torch.tensor([3, 0, 6, 3])


@pytest.mark.parametrize("ignore_index", ENDS)
def test_an_int32_target_never_equals_an_ignore_index_that_wraps_to_it(ignore_index: int) -> None:
    """2^32 + 3 is 3 in 32 bits: the rows of class 3 must count."""
    logits, target = _batch()
    want = F.cross_entropy(logits, target, reduction="none")
    for ids in (target, target.int()):
        loss = cross_entropy(logits, ids, reduction="none", ignore_index=ignore_index)
        torch.testing.assert_close(loss, want)


@pytest.mark.parametrize("ignore_index", [2**31, 2**63 - 1, -(2**63)])
def test_an_ignore_index_at_the_ends_of_int64_is_found(ignore_index: int) -> None:
    logits, target = _batch()
    target[1] = ignore_index
    loss = cross_entropy(logits, target, reduction="none", ignore_index=ignore_index)
    assert loss[1] == 0
    assert bool((loss[[0, 2, 3]] > 0).all())


@pytest.mark.parametrize("ignore_index", [2**63, -(2**63) - 1, 2**80])
def test_an_ignore_index_beyond_int64_is_refused(ignore_index: int) -> None:
    with pytest.raises(ValueError, match=f"ignore_index must be an int64, got {ignore_index}"):
        cross_entropy(*_batch(), ignore_index=ignore_index)


@pytest.mark.parametrize("wrong", [-(2**31), 2**31 - 1, -7])
def test_an_int32_target_out_of_range_is_named(wrong: int) -> None:
    logits, target = _batch()
    target[2] = wrong
    with pytest.raises(ValueError, match=f"row 2 holds {wrong},"):
        cross_entropy(logits, target.int())


@pytest.mark.parametrize("dtype", [torch.int16, torch.int8, torch.uint8, torch.bool, torch.float32])
def test_other_dtypes_of_target_are_refused(dtype: torch.dtype) -> None:
    logits, target = _batch()
    with pytest.raises(TypeError, match="target must hold class ids in int64 or int32"):
        cross_entropy(logits, target.to(dtype))


@pytest.mark.parametrize("vocab_size", [2**31, 2**40])
def test_a_vocabulary_that_32_bits_cannot_count_is_refused(vocab_size: int) -> None:
    with pytest.raises(ValueError, match=f"vocab_size={vocab_size} is more than 2147483647"):
        VocabShard(0, 5, vocab_size)
    assert VocabShard(0, 5, 2**31 - 1).vocab_size == 2**31 - 1


NUMPY: list[dict[str, Any]] = [
    {"ignore_index": np.int64(3)},
    {"ignore_index": np.int32(3)},
    {"label_smoothing": np.float32(0.5)},
    {"lse_square_scale": np.float16(0.25)},
    {"scale": np.float64(2.0)},
    {"scale": np.int64(2)},
    {"normalizer": np.int64(3)},
    {"normalizer": np.float32(3)},
]


@pytest.mark.parametrize("option", NUMPY, ids=repr)
def test_numbers_of_numpy_are_numbers(option: dict[str, Any]) -> None:
    batch = _batch()
    plain = {name: value.item() for name, value in option.items()}
    want = cross_entropy(*batch, **plain)
    assert torch.equal(cross_entropy(*batch, **option), want)
    if "normalizer" not in option:
        assert torch.equal(VocabParallelCrossEntropyLoss(**option)(*batch), want)


def test_shards_of_numpy_integers() -> None:
    shard = VocabShard(np.int64(1), np.int32(5), np.int64(9))  # type: ignore[arg-type]
    assert shard == VocabShard(1, 5, 9)
    assert {type(n) for n in (shard.start, shard.stop, shard.vocab_size)} == {int}
    assert VocabShard.from_group(np.int64(7)) == VocabShard(0, 7, 7)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="start must be an int"):
        VocabShard(np.float64(1), 5, 9)  # type: ignore[arg-type]
