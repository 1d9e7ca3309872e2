"""Every 16-bit number widened, and fp32 rounded to 16 bits: what torch does, bit by bit."""

from __future__ import annotations

from typing import Any

import numba
import pytest
import torch
from torch import Tensor

from tests.engines.cpu.tokens import TOKENS
from vocab_parallel_ce.engines.cpu import memory
from vocab_parallel_ce.engines.cpu.lanes import LANES

every_half = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@numba.njit
def convert(source: int, result: int, count: int, stored: Any, wanted: Any) -> None:
    for i in range(0, count, LANES):
        x = memory.load(source + i * memory.size_of(stored), stored)
        memory.store(result + i * memory.size_of(wanted), x, wanted)


@numba.njit
def convert_one_by_one(source: int, result: int, count: int, stored: Any, wanted: Any) -> None:
    for i in range(count):
        x = memory.read(source + i * memory.size_of(stored), stored)
        memory.write(result + i * memory.size_of(wanted), x, wanted)


@numba.njit
def copy_in_pairs(source: int, result: int, count: int, stored: Any, _: Any) -> None:
    for i in range(0, count, memory.PAIR):
        a, b = memory.load_pair(source + i * memory.size_of(stored), stored)
        memory.store_pair(result + i * memory.size_of(stored), a, b, stored)


@numba.njit
def copy_first(source: int, result: int, count: int, stored: Any, _: Any) -> None:
    memory.store_first(result, memory.load_first(source, count, stored), count, stored)


@numba.njit
def load_first(source: int, result: int, count: int, stored: Any, wanted: Any) -> None:
    memory.store(result, memory.load_first(source, count, stored), wanted)


def converted(function: Any, values: Tensor, dtype: torch.dtype) -> Tensor:
    result = torch.empty(values.shape, dtype=dtype)
    tokens = TOKENS[values.dtype], TOKENS[dtype]
    function(values.data_ptr(), result.data_ptr(), values.numel(), *tokens)
    return result


def assert_same_bits(got: Tensor, want: Tensor) -> None:
    """-0 is not 0; a NaN is a NaN."""
    nan = want.isnan()
    assert torch.equal(got.isnan(), nan)
    integer = torch.int16 if got.element_size() == 2 else torch.int32
    assert torch.equal(got.view(integer)[~nan], want.view(integer)[~nan])


@every_half
@pytest.mark.parametrize("function", [convert, convert_one_by_one], ids=["lanes", "scalar"])
def test_every_16_bit_pattern_widens(function: Any, dtype: torch.dtype) -> None:
    patterns = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    assert_same_bits(converted(function, patterns, torch.float32), patterns.float())


@every_half
def test_every_16_bit_pattern_survives_a_pair(dtype: torch.dtype) -> None:
    patterns = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    assert_same_bits(converted(copy_in_pairs, patterns, dtype), patterns)


@every_half
@pytest.mark.parametrize("function", [convert, convert_one_by_one], ids=["lanes", "scalar"])
def test_rounding_is_that_of_torch(function: Any, dtype: torch.dtype) -> None:
    """Four million random patterns, and every 16-bit number with what lies halfway to the next."""
    patterns = torch.randint(-(2**31), 2**31, (1 << 22,)).to(torch.int32).view(torch.float32)
    halves = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype).float()
    halves = halves.view(torch.int32)[:, None]
    dropped = 16 if dtype == torch.bfloat16 else 13
    near = torch.tensor([-1, 0, 1, *((1 << (dropped - 1)) + i for i in (-1, 0, 1))])
    edges = (halves + near.to(torch.int32)).flatten().view(torch.float32)
    tiny = torch.linspace(-7e-5, 7e-5, 1 << 16)  # subnormal fp16
    for values in (patterns, edges, tiny):
        assert_same_bits(converted(function, values, dtype), values.to(dtype))


@pytest.mark.parametrize("count", [-1, 0, 1, 7, 15, 16, 17])
@pytest.mark.parametrize("dtype", TOKENS, ids=str)
def test_the_first_elements_and_nothing_behind_them(dtype: torch.dtype, count: int) -> None:
    values = torch.randn(LANES, dtype=torch.float64).to(dtype)
    there = min(max(count, 0), LANES)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    read, written = torch.zeros(LANES, dtype=wide), torch.full((LANES,), 7.0).to(dtype)
    load_first(values.data_ptr(), read.data_ptr(), count, TOKENS[dtype], TOKENS[wide])
    copy_first(values.data_ptr(), written.data_ptr(), count, TOKENS[dtype], TOKENS[dtype])
    assert torch.equal(read[:there], values[:there].to(wide))
    assert bool((read[there:] == -torch.inf).all())
    assert torch.equal(written[:there], values[:there])
    assert bool((written[there:] == 7.0).all())


@every_half
def test_every_16_bit_pattern_survives_a_mask(dtype: torch.dtype) -> None:
    patterns = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    result = torch.empty_like(patterns)
    for one, place in zip(patterns.split(LANES), result.split(LANES), strict=True):
        copy_first(one.data_ptr(), place.data_ptr(), LANES, TOKENS[dtype], TOKENS[dtype])
    assert_same_bits(result, patterns)
