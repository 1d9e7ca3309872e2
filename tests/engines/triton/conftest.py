"""Tests of the triton engine without a card: `make unit-triton` runs them, in an environment that
has Triton, under its interpreter. On a card those of its kernels run as they are compiled.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from ...device import DEVICE, INTERPRETED
from ...ranks import Pool

if not INTERPRETED:
    # A card has the loss's own tests, and compiles whatever they launch.
    collect_ignore_glob = ["test_compiled.py", "test_loss.py"] if DEVICE == "cuda" else ["*"]


@pytest.fixture(autouse=True)
def _on_the_device() -> Iterator[None]:
    with torch.device(DEVICE):
        yield


@pytest.fixture(scope="session")
def pair() -> Iterator[Pool]:
    """Two Gloo processes, whose Triton interprets kernels as well."""
    ranks = Pool(2).start()
    yield ranks
    ranks.stop()
