"""What is found out without torch: CANN, and drivers that may not answer."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from vocab_parallel_ce.launch.doctor import software


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("aarch64-linux/ascend_toolkit_install.info", "package_name=x\nversion=8.0.RC3\n"),
        ("version.cfg", "# version: 1.0\nruntime_running_version=[7.3:8.0.RC3]\n"),
        ("compiler/version.info", "Version=8.0.RC3\nversion_dir=x\n"),
    ],
)
def test_cann_is_found_wherever_it_says_its_version(
    file: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path))
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    found = software.cann_version()
    assert found.endswith(f" ({path})")
    assert "8.0.RC3" in found


def fake_tool(folder: Path, name: str, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = folder / name
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_drivers_are_asked_and_never_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if Path("/usr/local/Ascend/driver/version.info").exists():
        pytest.skip("this machine has a driver of its own")
    fake_tool(tmp_path, "npu-smi", "echo '| npu-smi 24.1.rc2   Version: 24.1.rc2 |'", monkeypatch)
    fake_tool(tmp_path, "nvidia-smi", "echo 535.104.05; echo 535.104.05", monkeypatch)
    assert software.driver_version(("npu", "cuda")) == "npu 24.1.rc2, cuda 535.104.05"
    assert software.driver_version(("cpu",)) == "none needed"
    monkeypatch.setattr(software, "TOOL_SECONDS", 0.2)
    fake_tool(tmp_path, "npu-smi", "exec sleep 30", monkeypatch)
    started = time.monotonic()
    assert software.driver_version(("npu",)) == "npu not found"
    assert time.monotonic() - started < 5
