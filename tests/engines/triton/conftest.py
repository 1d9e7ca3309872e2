"""Tests of the triton engine without a card: `make unit-triton` runs them, in an environment that
has Triton, under its interpreter.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ...device import INTERPRETED
from ...ranks import Pool

if not INTERPRETED:
    collect_ignore_glob = ["*"]


@pytest.fixture(scope="session")
def pair() -> Iterator[Pool]:
    """Two Gloo processes, whose Triton interprets kernels as well."""
    ranks = Pool(2).start()
    yield ranks
    ranks.stop()
