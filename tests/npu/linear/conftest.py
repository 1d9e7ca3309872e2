"""A device that is asked anew."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from vocab_parallel_ce.engines.npu import choice as npu_choice
from vocab_parallel_ce.engines.npu.linear import choice


@pytest.fixture
def fresh() -> Iterator[None]:
    """The device is asked anew, and again after the test."""
    asked = (choice.problem, npu_choice.why_not)
    for answers in asked:
        answers.cache_clear()
    yield
    for answers in asked:
        answers.cache_clear()
