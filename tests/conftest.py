"""Fixtures that every test may use."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from .device import DEVICE
from .ranks import Pool


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Four processes on the device and backend under test, started once; see ``ranks.Pool``."""
    ranks = Pool(device_type=DEVICE).start()
    yield ranks
    ranks.stop()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(1234)
