"""The tolerance rule can fail, and knows the last place of every dtype."""

from __future__ import annotations

import pytest
import torch

from vocab_parallel_ce.testing import (
    Blocks,
    assert_close,
    compare,
    error_with_device,
    naive_error,
    ulp,
)

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [1.0, -1.5, 3.0e-3, 4096.0, 0.0])
def test_ulp_is_the_distance_to_the_next_number(dtype: torch.dtype, value: float) -> None:
    here = torch.tensor([value], dtype=dtype).abs()
    next_up = torch.nextafter(here, torch.full_like(here, torch.inf))
    assert ulp(here.double(), dtype).item() == (next_up.double() - here.double()).item()


def test_one_ulp_passes_and_two_do_not() -> None:
    exact = torch.tensor([1.0, 1e-3], dtype=torch.float64)
    assert_close((exact + ulp(exact, torch.bfloat16)).bfloat16(), exact, exact)
    with pytest.raises(AssertionError, match=r"loss: 2 of 2 elements are off"):
        assert_close((exact + 2 * ulp(exact, torch.bfloat16)).bfloat16(), exact, exact, "loss")


def test_twice_the_naive_error_passes() -> None:
    exact = torch.tensor([1.0, 2.0], dtype=torch.float64)
    naive = torch.tensor([1.0, 2.25])
    assert_close(torch.tensor([1.5, 2.0]), exact, naive)
    with pytest.raises(AssertionError, match="element 0"):
        assert_close(torch.tensor([1.75, 2.0]), exact, naive)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_infinities_and_nan_must_be_the_same(value: float) -> None:
    exact = torch.tensor([value, 0.0], dtype=torch.float64)
    assert_close(exact.float(), exact, exact.float())
    for other in (0.0, 1e30, -value if value == value else torch.inf):
        with pytest.raises(AssertionError, match="infinities"):
            assert_close(torch.tensor([other, 0.0]), exact, exact.float())


def test_nan_where_a_number_belongs_fails() -> None:
    exact = torch.tensor([1.0, 2.0], dtype=torch.float64)
    with pytest.raises(AssertionError, match="element 1 is nan"):
        assert_close(torch.tensor([1.0, torch.nan]), exact, exact)


def test_fp64_is_held_to_the_naive_fp32_error_in_units_of_fp64() -> None:
    exact = torch.tensor([1.0, 1.0], dtype=torch.float64)
    for naive_units, allowed in ((8, 1.5 * 2 * 8 + 1), (0, 1.5 * 2 * 2 + 1)):
        naive = torch.tensor([1.0, 1.0 + naive_units * 2.0**-23])
        assert_close(exact + allowed * 2.0**-52, exact, naive)
        with pytest.raises(AssertionError, match="2 of 2"):
            assert_close(exact + (allowed + 1) * 2.0**-52, exact, naive)


# For reports


def test_slack_is_granted_where_it_is_asked_for() -> None:
    exact = torch.tensor([1.0, 4.0], dtype=torch.float64)
    assert naive_error(exact, exact.float(), torch.float32) == 0
    assert naive_error(exact, exact.float(), torch.bfloat16, least_ulps=2) == 2 * 4 * 2.0**-23
    naive = exact.float() + torch.tensor([0.0, 2.0**-10])
    assert naive_error(exact, naive, torch.float32, least_ulps=2) == 2.0**-10
    assert naive_error(exact, naive, torch.float64, fp64_allowance=4) == 4 * 2.0**-39
    assert naive_error(exact[:0], exact[:0], torch.float32, least_ulps=2) == 0


def test_a_device_counts_for_eight_hosts_at_most() -> None:
    assert error_with_device(1.0, 0.5) == 1.0
    assert error_with_device(1.0, 3.0) == 3.0
    assert error_with_device(1.0, 30.0) == 8.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_blocks_judge_as_the_whole_would(dtype: torch.dtype) -> None:
    exact = torch.randn(40, dtype=torch.float64)
    naive = exact.float() * (1 + 2.0**-18 * torch.randn(40))
    largest = naive_error(exact, naive, dtype)
    verdicts = []
    for factor in (0.4, 0.8, 1.2, 3.0):
        error = factor * (2 * largest + ulp(exact, dtype))
        actual = (exact + error).to(dtype)
        whole = compare("x", actual, exact, largest)
        blocks = Blocks(dtype)
        for rows in (slice(0, 7), slice(7, 7), slice(7, 40)):
            blocks.add(actual[rows], exact[rows], naive[rows])
        assert blocks.within() == (whole.ratio <= 1)
        assert blocks.within(rows_error=float(error.max()))
        assert blocks.largest == exact.abs().max().item()
        verdicts.append(blocks.within())
    assert (verdicts[0], verdicts[-1]) == (True, False)


def test_blocks_notice_nan_and_grant_slack() -> None:
    exact = torch.ones(2, dtype=torch.float64)
    blocks = Blocks(torch.float32)
    blocks.add(torch.ones(2) + 10 * 2.0**-23, exact, exact.float())
    assert not blocks.within()
    assert blocks.within(least_ulps=8)
    blocks.add(torch.tensor([1.0, torch.nan]), exact, exact.float())
    assert not blocks.within(least_ulps=8)
    assert blocks.error == torch.inf
