"""Where torch, typer or rich are missing the doctor runs all the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.launch.doctor.asking import SMALL, invoke
from tests.launch.running import ROOT
from tests.test_import import MISSING_LIBRARY, WAY_OUT, _backend
from vocab_parallel_ce.launch import terminal

ALWAYS = {"date", "command", "python", "platform", "processor", "cores", "versions", "cann",
          "driver", "device", "problem", "notes", "devices", "backend", "engines",
          "variables"}  # fmt: skip


def _doctor(
    folder: Path, *before: str, path: str = "", **environ: str
) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    clean = {k: v for k, v in os.environ.items() if k != "TORCH_DEVICE_BACKEND_AUTOLOAD"}
    done = subprocess.run(
        [sys.executable, *before, "-m", "vocab_parallel_ce.launch.doctor"],
        env=clean | {"PYTHONPATH": os.pathsep.join([str(ROOT), path])} | environ,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )
    report: dict[str, Any] = json.loads((folder / "runs" / "doctor.json").read_text())
    assert set(report["environment"]) == ALWAYS
    return done, report["environment"]


def test_without_torch_typer_and_rich(tmp_path: Path) -> None:
    done, found = _doctor(tmp_path, "-S")  # -S: no site-packages
    problem = "torch is not installed; pip install torch (2.5 or newer)"
    assert done.returncode == 2
    assert done.stderr == f"vocab-parallel-ce doctor: {problem}\n"
    first, *others = done.stdout.splitlines()
    assert first == f"Problem: {problem}"
    assert others[-1] == "Written to runs/doctor.json"
    assert "┃" not in done.stdout
    assert found["problem"] == problem
    assert "torch" not in found["versions"]
    assert found["variables"]


def test_torch_npu_without_cann(tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    site = _backend(tmp_path / "site", "torch_npu", f"ImportError({MISSING_LIBRARY!r})")
    info = site / "torch_npu-2.13.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torch_npu\nVersion: 2.13.0\n")
    done, found = _doctor(tmp_path, path=str(site))
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    for part in ("torch_npu is installed but does not load because CANN is not found",
                 MISSING_LIBRARY, WAY_OUT):  # fmt: skip
        assert part in line
        assert part in found["problem"]
    assert done.stdout.startswith("Problem: torch cannot be imported: torch_npu is installed but ")
    assert found["versions"]["torch_npu"].startswith("2.13.0, does not import: ")
    variables = {v["name"]: v for v in found["variables"]}
    assert variables["ASCEND_HOME_PATH"]["value"] is None  # an NPU was meant
    assert variables["TORCH_DEVICE_BACKEND_AUTOLOAD"]["value"] is None  # the failed import set it


WITHOUT_THE_EXTRA = """
import sys
sys.modules |= dict.fromkeys(("typer", "rich", "matplotlib", "tokenizers"))
from vocab_parallel_ce.launch.jobs import run
run("doctor", sys.argv[1:])
"""


# The selftest begins with all that a plain call does.
@pytest.mark.parametrize(
    "options", [pytest.param((), marks=pytest.mark.full), SMALL], ids=["plain", "selftest"]
)
def test_a_fresh_process_without_the_launch_extra(options: tuple[str, ...], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_THE_EXTRA, *options, "--json", tmp_path / "doctor.json"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "┃" not in done.stdout
    assert "\nprocessor " in done.stdout
    assert done.stdout.endswith(f"Written to {tmp_path / 'doctor.json'}\n")


@pytest.mark.parametrize("rich", [True, False])
def test_80_columns_show_everything(rich: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("HCCL_CONNECT_TIMEOUT", "60")
    if not rich:
        monkeypatch.setattr(terminal, "has_rich", lambda: False)
    said = invoke("--device", "cpu").stdout
    assert max(map(len, said.splitlines())) <= 80
    assert "…" not in said
    for name in ("VOCAB_PARALLEL_CE_CHECK", "HCCL_CONNECT_TIMEOUT", "verdict"):
        assert name in said
