"""Fixtures of the tests that need Megatron's process groups."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ..ranks import Pool


@pytest.fixture(scope="session")
def pair() -> Iterator[Pool]:
    """Two ranks and no more: Megatron makes its groups over all ranks of the process group."""
    ranks = Pool(2).start()
    yield ranks
    ranks.stop()
