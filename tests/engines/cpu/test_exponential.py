"""The exponential of the kernels and their tanh against those of fp64."""

from __future__ import annotations

from typing import Any

import numba
import pytest
import torch
from torch import Tensor

from tests.engines.cpu.tokens import TOKENS
from vocab_parallel_ce.engines.contract import arithmetic_dtype
from vocab_parallel_ce.engines.cpu import memory
from vocab_parallel_ce.engines.cpu.exponential import exp, tanh
from vocab_parallel_ce.engines.cpu.lanes import LANES
from vocab_parallel_ce.testing import ulp


@numba.njit
def exponentials(source: int, result: int, count: int, stored: Any, precision: Any) -> None:
    for i in range(0, count, LANES):
        place = i * memory.size_of(stored)
        x = memory.load(source + place, stored)
        memory.store(result + place, exp(x, precision), stored)


@numba.njit
def tangents(source: int, result: int, count: int, token: Any) -> None:
    for i in range(0, count, LANES):
        place = i * memory.size_of(token)
        memory.store(result + place, tanh(memory.load(source + place, token), token), token)


def tangent(y: Tensor) -> Tensor:
    t = torch.empty_like(y)
    tangents(y.data_ptr(), t.data_ptr(), y.numel(), TOKENS[y.dtype])
    return t


def exponential(d: Tensor, precision: torch.dtype) -> Tensor:
    e = torch.empty_like(d)
    arguments = d.data_ptr(), e.data_ptr(), d.numel(), TOKENS[d.dtype], TOKENS[precision]
    exponentials(*arguments)
    return e


@pytest.mark.parametrize(
    ("precision", "largest"),
    [(torch.float32, 1e-7), (torch.bfloat16, 1e-5), (torch.float16, 1e-5)],
    ids=str,
)
def test_the_error_of_the_exponential(precision: torch.dtype, largest: float) -> None:
    """Every 61st float from -2^-30 to -2^7."""
    ends = torch.tensor([-(2.0**-30), -(2.0**7)]).view(torch.int32).tolist()
    d = torch.arange(ends[0], ends[1], 61).to(torch.int32).view(torch.float32)
    d = d[: d.numel() // 16 * 16]
    e, exact = exponential(d, precision).double(), d.double().exp()
    normal = exact >= 2.0**-126
    assert float(((e - exact) / exact)[normal].abs().max()) < largest
    # Either side of the smallest normal number, by the error that is allowed.
    assert bool((e[exact < 2.0**-126 * (1 - 1e-4)] == 0).all())


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_special_exponentials(precision: torch.dtype) -> None:
    d = torch.zeros(16, dtype=arithmetic_dtype(precision))
    d[1], d[2], d[3], d[4] = -torch.inf, torch.nan, -1e30, -0.0
    e = exponential(d, precision)
    assert e[0] == e[4] == 1
    assert e[1] == e[3] == 0
    assert bool(e[2].isnan())


def test_the_fp64_exponential_is_the_librarys() -> None:
    d = -torch.rand(1 << 12, dtype=torch.float64) * 700
    error = (exponential(d, torch.float64) - d.exp()).abs()
    assert bool((error <= ulp(d.exp(), torch.float64)).all())


@pytest.mark.parametrize("sign", [1, -1])
def test_the_error_of_tanh(sign: int) -> None:
    """Every 61st float from 2^-30 to 2^7."""
    ends = torch.tensor([2.0**-30, 2.0**7]).view(torch.int32).tolist()
    y = sign * torch.arange(ends[0], ends[1], 61).to(torch.int32).view(torch.float32)
    y = y[: y.numel() // LANES * LANES]
    exact = y.double().tanh()
    assert float(((tangent(y).double() - exact) / exact).abs().max()) < 1e-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_special_tangents(dtype: torch.dtype) -> None:
    y = torch.zeros(LANES, dtype=dtype)
    y[1], y[2], y[3], y[4], y[5] = torch.inf, -torch.inf, torch.nan, 1e30, -1e30
    t = tangent(y)
    assert t[:6].nan_to_num(7.0).tolist() == [0.0, 1.0, -1.0, 7.0, 1.0, -1.0]
