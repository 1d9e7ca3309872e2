"""Tests of the Ascend engine, on the real torch_npu package over tests/npu_sim: `make unit-npu`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from ..ranks import Pool

if TYPE_CHECKING:
    from ..npu_sim.operators import OperatorCall

# Collected only under `python -m tests.npu_sim`, in an environment of its own: torch_npu cannot be
# imported beside another accelerator, nor without CANN. `make test` runs both halves.
if "NPU_SIM_DEVICES" not in os.environ:
    collect_ignore_glob = ["*"]


@pytest.fixture(scope="session")
def npu_pool(pool: Pool) -> Pool:
    """Four HCCL processes, each with a device of its own: those that every test shares."""
    assert pool.device_type == "npu"
    return pool


@pytest.fixture
def calls() -> Iterator[list[OperatorCall]]:
    """What the operator was called with in this process, from here on."""
    from ..npu_sim import operators

    operators.calls.clear()
    yield operators.calls
    operators.calls.clear()
