"""Tests of the triton engine without a card: `make unit-triton` runs them, in an environment that
has Triton, under its interpreter.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from ...ranks import Pool

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["*"]


@pytest.fixture(scope="session")
def pair() -> Iterator[Pool]:
    """Two Gloo processes, whose Triton interprets kernels as well."""
    ranks = Pool(2).start()
    yield ranks
    ranks.stop()
