"""Calls that end in time, raise, or are late."""

from __future__ import annotations

import time

import pytest

from vocab_parallel_ce.launch.doctor.worker import LateError, Worker


def test_a_worker_leaves_a_late_call_behind() -> None:
    worker = Worker()
    assert worker.call(lambda: 3, 10) == 3
    with pytest.raises(ValueError, match="no number"):
        worker.call(lambda: int("no number"), 10)
    with pytest.raises(LateError, match=r"did not end within 0.1 s"):
        worker.call(lambda: time.sleep(5), 0.1)
