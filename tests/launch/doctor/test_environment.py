"""Devices that are not there, do not answer, or differ between ranks."""

from __future__ import annotations

import time

import pytest

from vocab_parallel_ce.launch.doctor import environment
from vocab_parallel_ce.launch.doctor.environment import collect
from vocab_parallel_ce.launch.doctor.results import compare_environments


def test_a_device_that_does_not_answer_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "DEVICE_SECONDS", 1.0)
    monkeypatch.setattr(environment, "_engines", lambda kind: time.sleep(30))
    found = collect("cpu", look_around=True)
    assert found.notes == ["asking the device: did not end within 1 s"]
    assert found.problem.startswith("device='cpu' does not work: asking the device: did not end")


def test_ranks_with_other_environments_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    one = collect("cpu", look_around=False)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "77")
    other = collect("cpu", look_around=False)
    assert compare_environments([one, one]) == []
    (line,) = compare_environments([one, other])
    assert line.startswith("OMP_NUM_THREADS differs: rank 0 has ")
    assert line.endswith("rank 1 has '77'")
