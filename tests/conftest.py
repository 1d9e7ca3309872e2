"""Fixtures that every test may use."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from .device import DEVICE
from .quick import is_quick
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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The mark of `make quick`; it stands in one list, not in forty files."""
    for item in items:
        if is_quick(item.nodeid):
            item.add_marker(pytest.mark.quick)
