"""Fixtures that every test may use."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from .ranks import Pool


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Four Gloo processes, started once; see ``ranks.Pool``."""
    ranks = Pool().start()
    yield ranks
    ranks.stop()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(1234)
