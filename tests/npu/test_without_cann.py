"""torch-npu installed and no CANN: what a user sees whose shell has not sourced set_env.sh."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ..npu_sim import libraries

REPOSITORY = Path(__file__).resolve().parents[2]
REASON = "torch_npu is installed but does not load because CANN is not found (lib"
WAY_OUT = "set TORCH_DEVICE_BACKEND_AUTOLOAD=0 or uninstall torch-npu"


def _run(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Without everything that `python -m tests.npu_sim` adds."""
    gone = ("LD_LIBRARY_PATH", "PYTHONPATH", "NPU_SIM_DEVICES", "ASCEND_HOME_PATH",
            "ASCEND_OPP_PATH", "TORCH_DEVICE_BACKEND_AUTOLOAD")  # fmt: skip
    clean = {name: value for name, value in os.environ.items() if name not in gone}
    return subprocess.run(
        command,
        env=clean | {"PYTHONPATH": str(REPOSITORY), "PYTHON": sys.executable} | variables,
        cwd="/",
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_torch_itself_cannot_be_imported() -> None:
    """Otherwise the stand-in is still there and the tests below show nothing."""
    process = _run(sys.executable, "-c", "import torch")
    assert process.returncode == 1
    assert "Failed to load the backend extension: torch_npu" in process.stderr
    assert libraries.HERE.name not in process.stderr


@pytest.mark.parametrize(
    "command",
    [
        [sys.executable, "-m", "vocab_parallel_ce.launch.train"],
        [str(REPOSITORY / "launch" / "ascend" / "run.sh"), "--tp", "2"],
        [str(REPOSITORY / "launch" / "ascend" / "run.sh"), "--device", "cpu"],
    ],
    ids=["train", "script", "script on cpu"],
)
def test_every_command_ends_in_one_line(command: list[str]) -> None:
    process = _run(*command)
    assert process.returncode != 0
    assert process.stdout == ""
    assert len(process.stderr.splitlines()) == 1, process.stderr
    for part in (REASON, "source /usr/local/Ascend/ascend-toolkit/set_env.sh", WAY_OUT):
        assert part in process.stderr


def test_the_doctor_reports_it(tmp_path: Path) -> None:
    file = tmp_path / "doctor.json"
    process = _run(sys.executable, "-m", "vocab_parallel_ce.launch.doctor", "--json", str(file))
    assert process.returncode == 2
    assert len(process.stderr.splitlines()) == 1, process.stderr
    assert process.stdout.startswith(f"Problem: torch cannot be imported: {REASON}")
    found = json.loads(file.read_text())["environment"]
    assert REASON in found["problem"]
    assert found["versions"]["torch_npu"].startswith("2.")
    assert found["cann"] == "not found"
    assert any(v["name"] == "ASCEND_HOME_PATH" for v in found["variables"])


def test_the_package_can_be_imported_and_a_use_raises_that_line_alone() -> None:
    process = _run(sys.executable, "-c", "import vocab_parallel_ce as v; v.cross_entropy")
    assert process.returncode == 1
    assert process.stderr.count("Traceback") == 1
    assert process.stderr.splitlines()[-1].startswith(
        f"ImportError: torch cannot be imported: {REASON}"
    )


def test_the_cpu_works_without_autoload_and_the_npu_is_refused() -> None:
    code = """
import os, torch, vocab_parallel_ce
from vocab_parallel_ce.parallel.devices import default_device_type, local_device
from vocab_parallel_ce.parallel.groups import ParallelGroups
with ParallelGroups.open() as groups:
    print(groups.device, default_device_type())
print(vocab_parallel_ce.cross_entropy(torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64)).item())
print(os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"])
for _ in range(2):
    try:
        local_device("npu")
    except ValueError as error:
        print(error)
"""
    process = _run(sys.executable, "-c", code, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert process.returncode == 0, process.stderr
    device, loss, autoload, first, second = process.stdout.splitlines()
    assert (device, autoload) == ("cpu cpu", "0")
    assert float(loss) == pytest.approx(1.3862944)
    assert first == second
    assert first.startswith(f"device='npu', but {REASON}")
    assert process.stderr.count(f"UserWarning: running on the CPU: {REASON}") == 1
