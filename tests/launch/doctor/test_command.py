"""The report on a machine, and options and devices that cannot be served."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from tests.forks import run_forked
from tests.launch.doctor.asking import DTYPES, MODULE, SMALL, invoke, read
from tests.launch.running import ROOT, launch, one_line


def test_report_says_what_is_here_and_nothing_of_whose(tmp_path: Path) -> None:
    home = tmp_path / "homes" / "gwendolyn"
    (home / "cann" / "x86_64-linux").mkdir(parents=True)
    info = home / "cann" / "x86_64-linux" / "ascend_toolkit_install.info"
    info.write_text("package_name=Ascend-cann-toolkit\nversion=8.5.0\ninnerversion=V1\n")
    secret = {
        "USER": "gwendolyn",
        "LOGNAME": "gwendolyn",
        "HOME": str(home),
        "HOSTNAME": "rack7.example.net",
        "HCCL_IF_IP": "10.3.2.1",
        "ASCEND_HOME_PATH": str(home / "cann"),
        "HCCL_DETERMINISTIC": "maybe",
    }
    out = tmp_path / "report.json"
    done = run_forked(*MODULE, "--device", "cpu", "--json", str(out), environ=secret)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    found = read(out)["environment"]
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["versions"]["torch"].startswith(torch.__version__)
    assert found["versions"]["vocab_parallel_ce"].startswith("0.")
    assert found["cann"].startswith("8.5.0 (~/cann/")
    assert (found["device"], found["backend"], found["problem"]) == ("cpu", "gloo", "")
    assert {name: choice["engine"] for name, choice in found["engines"].items()} == dict.fromkeys(
        DTYPES, "cpu"
    )
    (device,) = found["devices"]
    assert device["name"]
    variables = {v["name"]: v for v in found["variables"]}
    assert variables["OMP_NUM_THREADS"]["value"] == "1"
    assert variables["VOCAB_PARALLEL_CE_CHECK"]["verdict"] == "ok"
    # Set, but nothing to a CPU: shown and not judged.
    assert variables["HCCL_DETERMINISTIC"] == {
        "name": "HCCL_DETERMINISTIC",
        "value": "maybe",
        "default": "false",
        "verdict": "ok",
        "word": "",
    }
    for secret_word in ("gwendolyn", "rack7", "10.3.2.1", str(home)):
        assert secret_word not in out.read_text()
    for said in ("torch", "CANN", "8.5.0", "driver", "backend", "gloo", "engine, bf16"):
        assert said in done.stdout


MISSING = "libhccl.so: cannot open shared object file: No such file or directory"


def broken_torch_npu(folder: Path) -> str:
    """A torch_npu as one finds it where CANN is missing; the path to import it from."""
    package, about = folder / "torch_npu", folder / "torch_npu-2.13.0.dist-info"
    package.mkdir()
    about.mkdir()
    (package / "__init__.py").write_text(f"raise ImportError({MISSING!r})\n")
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: torch_npu\nVersion: 2.13.0\n")
    return os.pathsep.join([str(folder), str(ROOT)])


def test_torch_npu_without_cann_is_explained(tmp_path: Path) -> None:
    environ = {"PYTHONPATH": broken_torch_npu(tmp_path), "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    out = tmp_path / "report.json"
    done = launch(*MODULE, "--device", "npu", "--json", str(out), environ=environ)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    problem = line.removeprefix("vocab-parallel-ce doctor: ")
    assert problem.startswith("device='npu', but torch_npu")
    assert "CANN" in line
    assert done.stdout.startswith("Problem: device='npu', but torch_npu")
    found = read(out)["environment"]
    assert found["versions"]["torch_npu"].startswith("2.13.0, does not import: ")
    assert "libhccl.so" in found["versions"]["torch_npu"]
    assert found["problem"] == problem
    assert found["engines"] == {}
    words = {v["name"]: v["word"] for v in found["variables"]}
    assert "import torch_npu itself" in words["TORCH_DEVICE_BACKEND_AUTOLOAD"]


def test_a_device_that_is_not_here_is_said_once_for_a_host() -> None:
    options = ("--device", "cuda", "--selftest")
    done = run_forked(*MODULE, *options, ranks=2, environ={"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 2
    line = "vocab-parallel-ce doctor: device='cuda', but this machine shows none; use --device cpu"
    said = [text for text in done.stderr.splitlines() if "device='cuda'" in text]
    assert said.count(line) == 1
    # Where the first rank is late, another has waited for it in vain: it then gives its number.
    assert all(text == line or ": rank 1: " in text for text in said)


def test_a_launcher_that_is_half_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("KINETO_LOG_LEVEL", "99")
    line = one_line(invoke(*SMALL, "--json", os.devnull), "doctor")
    assert "RANK=0 is set but MASTER_ADDR and MASTER_PORT not" in line
