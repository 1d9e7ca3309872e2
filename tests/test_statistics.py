"""Partials of shards merge to what one pass over the whole row makes of it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vocab_parallel_ce.engines import eager
from vocab_parallel_ce.engines.contract import ELSEWHERE, IGNORED, Wanted
from vocab_parallel_ce.statistics import Merged, finish, merge, merge_single, rescale_, stat_names
from vocab_parallel_ce.testing import assert_close

ALL = Wanted(smooth=True, entropy=True, argmax=True, squares=True)
NO_ARGMAX = Wanted(smooth=True, entropy=True, squares=True)


def _partials(
    x: Tensor, target: Tensor, weight: Tensor, cuts: list[int], wanted: Wanted
) -> tuple[Tensor, Tensor, Tensor]:
    """([W, k, N] partials, [W] shard weights, [W] starts) of x cut into shards."""
    bounds = [0, *cuts, x.shape[1]]
    out = x.new_zeros(len(bounds) - 1, len(wanted.rows), x.shape[0])
    out[:, 0] = -torch.inf
    weights = []
    for part, start, stop in zip(out, bounds, bounds[1:], strict=False):
        weights.append(weight[start:stop].sum())
        if start == stop:
            continue
        local = target - start
        local = torch.where((local < 0) | (local >= stop - start), ELSEWHERE, local)
        local = torch.where(target == -100, IGNORED, local)
        eager.partials(x[:, start:stop], local, weight[start:stop], 1.0, 0.0, wanted, part)
    return out, torch.stack(weights), torch.tensor(bounds[:-1])


def _one_pass(x: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """The five statistics by the formulas of the design, [5, N], in the dtype of x."""
    kept = target != -100
    shifted = x - x.amax(1, keepdim=True)
    log_s = shifted.exp().sum(1, keepdim=True).log()
    log_p = shifted - log_s
    nll = -log_p.gather(1, torch.where(kept, target, 0)[:, None]).squeeze(1)
    smooth = torch.where(weight == 0, 0.0, -weight * log_p).sum(1)
    entropy = log_s[:, 0] - torch.where(log_p == -torch.inf, 0.0, log_p.exp() * shifted).sum(1)
    squares = log_p.exp().square().sum(1)
    return torch.where(kept, torch.stack([nll, x.logsumexp(1), smooth, entropy, squares]), 0.0)


def _by_reduce(parts: Tensor, shard_weight: Tensor, wanted: Wanted) -> Merged:
    """What two all_reduces make of the partials."""
    m = parts[:, 0].amax(0)
    sums: dict[str, Tensor] = {}
    for part, share in zip(parts.clone(), shard_weight, strict=True):
        named = dict(zip(wanted.rows, part.unbind(0), strict=True))
        rescale_(named, m, share[None])
        del named["m"]
        sums = {name: sums.get(name, 0.0) + term for name, term in named.items()}
    return Merged(m, **sums)


@given(data=st.data())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_merge_equals_one_pass(data: st.DataObject) -> None:
    columns = data.draw(st.integers(1, 40))
    world = data.draw(st.integers(1, 5))
    cuts = data.draw(st.lists(st.integers(0, columns), min_size=world - 1, max_size=world - 1))
    offset = data.draw(st.sampled_from([0.0, 30.0, -1e3, 1e4]))
    spread = data.draw(st.sampled_from([0.0, 1.0, 20.0, 1e3]))
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    # Many rows: the naive error of a few may be small by luck.
    x = torch.randn(64, columns, generator=g) * spread + offset
    target = torch.randint(0, columns, (64,), generator=g)
    target[1] = -100
    weight = torch.rand(columns, generator=g)

    shards = _partials(x, target, weight, sorted(cuts), ALL)
    exact = _one_pass(x.double(), target, weight.double())
    naive = _one_pass(x, target, weight)
    parts, shares, starts = shards
    by_reduce = _by_reduce(parts[:, :-1], shares, NO_ARGMAX)
    merged = merge(parts, ALL, shares, starts)
    assert merged.argmax is not None
    for way, result in (("gather", merged), ("reduce", by_reduce)):
        wanted = ALL if way == "gather" else NO_ARGMAX
        stats = finish(result, wanted, weight.sum(), target == -100)
        for name, row, want, plain in zip(stat_names(ALL), stats, exact, naive, strict=True):
            assert_close(row, want, plain, f"{way} {name}")
    assert torch.equal(merged.argmax, torch.where(target == -100, -1, x.argmax(1)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_rank_is_a_merge_of_one(dtype: torch.dtype) -> None:
    x = torch.randn(5, 8, dtype=dtype)
    target = torch.tensor([0, 7, -100, 3, 3])
    parts, shares, starts = _partials(x, target, torch.ones(8, dtype=dtype), [], ALL)
    single, merged = merge_single(parts[0].clone(), ALL), merge(parts, ALL, shares, starts)
    for name, value in vars(single).items():
        assert torch.equal(value, getattr(merged, name)), name


def test_all_minus_infinity_shards_change_nothing() -> None:
    x = torch.randn(4, 9)
    x[:, 3:6] = -torch.inf
    target = torch.tensor([0, 2, 6, 8])
    weight = torch.zeros(9)  # a weight would make the smoothing infinite, as it is in PyTorch
    parts, shares, starts = _partials(x, target, weight, [3, 6], ALL)
    without, *_ = _partials(x[:, [0, 1, 2, 6, 7, 8]], target, weight[:6], [3], ALL)
    merged = merge(parts, ALL, shares, starts)
    want = merge(without, ALL, shares[[0, 2]], torch.tensor([0, 6]))
    for name in ("m", "s", "t", "argmax"):
        assert torch.equal(getattr(merged, name), getattr(want, name)), name


def test_a_negligible_shard_adds_nothing_to_the_entropy() -> None:
    """e^z z -> 0 for z -> -inf: a shard far below the maximum must not give -inf * 0."""
    x = torch.tensor([[0.0, 0.0, -3e38, -3e38], [0.0, 0.0, -torch.inf, -torch.inf]])
    target = torch.tensor([0, 0])
    parts, shares, starts = _partials(x, target, torch.zeros(4), [2], ALL)
    for merged in (
        _by_reduce(parts[:, :-1], shares, NO_ARGMAX),
        merge(parts, ALL, shares, starts),
    ):
        wanted = ALL if merged.argmax is not None else NO_ARGMAX
        entropy = finish(merged, wanted, 0.0, target == -100)[3]
        assert_close(entropy, torch.full((2,), 2.0).double().log(), torch.full((2,), 2.0).log())


def test_the_order_of_ranks_decides_the_bits_and_nothing_else_does() -> None:
    x = torch.randn(64, 40) * 5
    target = torch.randint(0, 40, (64,))
    parts, shares, starts = _partials(x, target, torch.ones(40), [9, 11, 30], ALL)
    first, again = (merge(parts.clone(), ALL, shares, starts) for _ in range(2))
    assert torch.equal(first.s, again.s)
    # Any tile of the rows gives the same bits: the sum over ranks does not depend on N.
    some = merge(parts[:, :, 5:8].clone(), ALL, shares, starts)
    assert torch.equal(some.s, first.s[5:8])


def test_ranks_are_added_up_one_after_the_other() -> None:
    """1 + 2^-24 rounds to 1, twice; the two small ones added first would give 1 + 2^-23."""
    parts = torch.zeros(3, 3, 2)
    parts[:, 1] = torch.tensor([1.0, 2.0**-24, 2.0**-24])[:, None]
    zeros = torch.zeros(3)
    assert merge(parts.clone(), Wanted(), zeros, zeros.int()).s.tolist() == [1.0, 1.0]
    assert merge(parts.flip(0), Wanted(), zeros, zeros.int()).s.tolist() == [1.0 + 2.0**-23] * 2


def test_nan_has_no_maximum() -> None:
    x = torch.zeros(1, 4)
    x[0, 1] = torch.nan
    parts, shares, starts = _partials(x, torch.tensor([0]), torch.ones(4), [2], ALL)
    merged = merge(parts, ALL, shares, starts)
    assert finish(merged, ALL, 4.0, torch.tensor([False])).isnan().all()
    assert merged.argmax is not None
    assert merged.argmax.item() == -1


def test_ignored_rows_are_exactly_zero_unless_read() -> None:
    x = torch.full((1, 4), torch.nan)
    target = torch.tensor([-100])
    parts, shares, starts = _partials(x, target, torch.ones(4), [1], ALL)
    merged = merge(parts, ALL, shares, starts)
    assert (finish(merged, ALL, 4.0, target == -100) == 0).all()
    assert merged.argmax is not None
    assert merged.argmax.item() == -1
    reading = Wanted(ignored_rows=True)
    parts, shares, starts = _partials(torch.zeros(1, 4), target, torch.ones(4), [1], reading)
    nll, lse = finish(merge(parts, reading, shares, starts), reading, 4.0, target == -100)
    assert nll.item() == 0
    assert_close(lse, torch.tensor([4.0]).double().log(), torch.tensor([4.0]).log())
