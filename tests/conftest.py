"""Fixtures that every test may use.

Torch is imported where it is used: the process that hands tests out to workers needs none.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .longest import place
from .quick import is_quick
from .ranks import Pool


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Four processes on the device and backend under test, started once; see ``ranks.Pool``."""
    from .device import DEVICE

    ranks = Pool(device_type=DEVICE).start()
    yield ranks
    ranks.stop()


@pytest.fixture(autouse=True)
def _seed() -> None:
    import torch

    torch.manual_seed(1234)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The mark of `make quick`, and the order: each stands in one list, not in forty files."""
    items.sort(key=lambda item: place(item.nodeid))
    for item in items:
        if is_quick(item.nodeid):
            item.add_marker(pytest.mark.quick)
