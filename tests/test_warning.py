"""Warnings: once for a host, and of the line that called the library."""

from __future__ import annotations

from pathlib import Path

import pytest

from vocab_parallel_ce.warning import is_first_of_host, warn

from .forks import run_forked

PROGRAM = """
import torch
from vocab_parallel_ce import cross_entropy
from vocab_parallel_ce.engines import cpu
from vocab_parallel_ce.engines.cpu import engine
engine.unavailable = lambda: "no compiler"
from vocab_parallel_ce.parallel import devices
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: name == "torch_npu" or found(name, *rest)
devices.npu_problem = lambda: "no card"
for _ in range(2):
    cross_entropy(torch.zeros(2, 8), torch.zeros(2).long())  # called here
    devices.default_device_type()  # and here
"""


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_warning_names_the_callers_line_once(rank: str, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(PROGRAM)
    done = run_forked(str(tmp_path / "script.py"), environ={"LOCAL_RANK": rank})
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if "script.py" in line or "#" in line]
    if rank == "1":
        assert lines == []
        return
    engine, engine_line, device, device_line = lines
    assert "script.py:13: UserWarning: vocab_parallel_ce: the cpu engine is not" in engine
    assert engine_line.endswith("# called here")
    assert "script.py:14: UserWarning: running on the CPU: no card" in device
    assert device_line.endswith("# and here")


def test_the_first_rank_of_a_host(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert is_first_of_host()
    monkeypatch.setenv("RANK", "8")
    assert not is_first_of_host()
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert is_first_of_host()
    with pytest.warns(UserWarning, match="hello") as caught:
        warn("hello")
    assert caught[0].filename == __file__
