"""The tolerance rule can fail, and knows the last place of every dtype."""

from __future__ import annotations

import pytest
import torch

from vocab_parallel_ce.testing import assert_close, ulp

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
