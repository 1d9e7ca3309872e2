"""Waiting for a quiet machine, on clock ticks given by hand."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from vocab_parallel_ce.launch.measuring import idle


def ticks(monkeypatch: pytest.MonkeyPatch, *told: tuple[int, int] | None) -> None:
    found: Iterator[tuple[int, int] | None] = iter(told)
    monkeypatch.setattr(idle, "_ticks", lambda: next(found))


def test_it_waits_until_the_cores_were_idle_for_a_window(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks(monkeypatch, (0, 0), (5, 20), (22, 40))  # 25% of the first window, 85% of the second
    assert idle.wait_until_idle(60, window=0.001) is True


def test_it_gives_up_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks(monkeypatch, (0, 0), (0, 20))
    assert idle.wait_until_idle(1e-9, window=0.001) is False


def test_what_cannot_be_told_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks(monkeypatch, None)
    assert idle.wait_until_idle(60) is None
    ticks(monkeypatch, (0, 0), None)
    assert idle.wait_until_idle(60, window=0.001) is None
    ticks(monkeypatch, (0, 0))
    assert idle.wait_until_idle(0) is None
