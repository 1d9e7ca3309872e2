"""Batches: the same everywhere, with what nobody may read, and never vacuous."""

from __future__ import annotations

import pytest
import torch

from vocab_parallel_ce.testing import batch


def test_the_same_seed_gives_the_same_batch() -> None:
    one, same, other = (batch(9, 11, torch.bfloat16, seed=s) for s in (3, 3, 4))
    assert torch.equal(one.logits, same.logits)
    assert torch.equal(one.target, same.target)
    assert not torch.equal(one.logits, other.logits)


@pytest.mark.parametrize("ignore_index", [-100, 0, 7])
def test_the_first_row_is_kept_and_the_second_is_not(ignore_index: int) -> None:
    data = batch(40, 11, torch.float32, ignore_index)
    assert data.target[0] != ignore_index
    assert data.target[1] == ignore_index
    assert bool((batch(40, 11, torch.float32, ignored=0.0).target >= 0).all())


def test_ignored_rows_are_full_of_what_nobody_may_read() -> None:
    data = batch(40, 11, torch.float16, 7, unreadable=True)
    out = data.target == 7
    assert bool(data.logits[out, ::2].isnan().all())
    assert bool((data.logits[out, 1::2] == torch.inf).all())
    assert bool(data.logits[~out].isfinite().all())


def test_extreme_logits() -> None:
    data = batch(40, 100, torch.float32, extreme=True)
    assert float(data.logits[1].max()) > 9_900
    assert -10_100 < float(data.logits[2].max()) < -9_900
    masked = data.logits[0] == -torch.inf
    assert 5 < int(masked.sum()) < 50
    kept = data.target >= 0
    assert bool(data.logits[kept].gather(1, data.target[kept, None]).isfinite().all())


def test_the_gradient_of_the_first_row_is_never_zero() -> None:
    firsts = [float(batch(1, 3, torch.float32, seed=s).upstream[0]) for s in range(60)]
    assert all(firsts)
    assert len(set(firsts)) > 5
