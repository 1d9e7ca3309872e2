"""What HCCL is told before ranks join."""

from __future__ import annotations

import os
from datetime import timedelta

import pytest

from vocab_parallel_ce.parallel.joining import prepare_hccl

HCCL = ("HCCL_CONNECT_TIMEOUT", "HCCL_EXEC_TIMEOUT", "HCCL_DETERMINISTIC")


@pytest.fixture(name="no_hccl_variables")
def _no_hccl_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in HCCL:
        monkeypatch.setenv(name, "")  # so that what the test sets is undone
        monkeypatch.delenv(name)


def _hccl() -> list[str | None]:
    return [os.environ.get(name) for name in HCCL]


@pytest.mark.usefixtures("no_hccl_variables")
@pytest.mark.parametrize(
    ("seconds", "deterministic", "expected", "watchdog"),
    [
        (600.0, False, ["600", "600", None], 660),
        (600.5, True, ["601", "601", "true"], 661),
        (5.0, False, ["120", "68", None], 128),
        (1e6, False, ["7200", "17340", None], 1e6 + 60),
    ],
)
def test_hccl_waits_as_long_as_the_groups(
    seconds: float, deterministic: bool, expected: list[str | None], watchdog: float
) -> None:
    assert prepare_hccl(seconds, deterministic) == timedelta(seconds=watchdog)
    assert _hccl() == expected


@pytest.mark.usefixtures("no_hccl_variables")
def test_what_the_user_has_set_for_hccl_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in zip(HCCL, ("300", "1000", "strict"), strict=True):
        monkeypatch.setenv(name, value)
    assert prepare_hccl(60.0, True) == timedelta(seconds=1060)
    assert _hccl() == ["300", "1000", "strict"]
    monkeypatch.setenv("HCCL_DETERMINISTIC", "false")
    with pytest.warns(UserWarning, match="HCCL_DETERMINISTIC='false' is set and stays"):
        prepare_hccl(60.0, True)
    monkeypatch.setenv("HCCL_EXEC_TIMEOUT", "soon")
    with pytest.raises(ValueError, match="HCCL_EXEC_TIMEOUT='soon' is not a number"):
        prepare_hccl(60.0, False)
