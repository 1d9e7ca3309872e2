"""The doctor on an NPU, alone and on ranks: what an owner of cards runs first."""

from __future__ import annotations

import json
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from ..forks import run_forked

MODULE = "vocab_parallel_ce.launch.doctor"


def _run(ranks: int, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return run_forked(
        "-m", MODULE, *arguments, ranks=ranks if ranks > 1 else 0, environ=environment, timeout=300
    )


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_selftest_passes(ranks: int, tmp_path: Path) -> None:
    file = tmp_path / "doctor.json"
    done = _run(ranks, "--device", "npu", "--selftest", "--quick", "--json", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Selftest passed." in done.stdout
    report: dict[str, Any] = json.loads(file.read_text())
    environment = report["environment"]
    assert environment["backend"] == "hccl"
    assert environment["versions"]["torch_npu"].startswith(metadata.version("torch_npu"))
    engines = {dtype: choice["engine"] for dtype, choice in environment["engines"].items()}
    assert engines == {"fp32": "npu", "bf16": "npu", "fp16": "npu", "fp64": "none"}


def test_tune(tmp_path: Path) -> None:
    """Every way that is there at every scratch, every kernel, and what to keep."""
    file = tmp_path / "tune.json"
    done = _run(1, "--device", "npu", "--tune", "--quick", "--json", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "this is the stand-in for CANN, on the host's processor: times mean" in done.stdout
    report: dict[str, Any] = json.loads(file.read_text())["tune"]
    ran = [(one["way"], one["scratch_mib"]) for one in report["ways"] if not one["problem"]]
    assert ran[1:] == [(way, mib) for way in ("max_sum", "operator") for mib in (1, 64)]
    (left,) = (one for one in report["ways"] if one["problem"])
    assert left["way"] == "triton"
    assert "triton" in left["problem"]
    heads = [(one["way"], one["loss"]) for one in report["fused_head"] if not one["problem"]]
    losses = ("mean", "a loss per token")
    assert heads[1:] == [(way, loss) for way in ("chunks", "fused") for loss in losses]
    failed = {one["what"]: one["problem"] for one in report["kernels"] if one["problem"]}
    assert set(failed) <= {"npu_scatter_nd_update_"}  # which the stand-in does not have
    for line in report["exports"]:
        assert line in done.stdout
    assert len(report["exports"]) == 3


def test_the_doctor_names_the_way() -> None:
    done = _run(1, "--device", "npu", COLUMNS="200", VOCAB_PARALLEL_CE_NPU_WAY="operator")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "npu: way operator, by VOCAB_PARALLEL_CE_NPU_WAY" in done.stdout
    assert done.stdout.count("the fused head by fused operators") == 2  # bf16, fp16
    done = _run(1, "--device", "npu", COLUMNS="300", NPU_SIM_CANN="8.3.0")
    assert "npu: way operator; not max_sum: bfloat16: " in done.stdout
    assert "is not in libopapi.so of CANN 8.3.0" in done.stdout


def test_more_ranks_than_cards_is_one_line() -> None:
    done = _run(3, "--device", "npu", "--selftest", "--quick", NPU_SIM_DEVICES="2")
    assert done.returncode != 0
    assert done.stderr.count("shows 2 npu devices") == 1
    assert "launch/doctor" not in done.stderr  # no traceback of ours


def test_no_visible_card() -> None:
    done = _run(1, "--device", "npu", NPU_SIM_DEVICES="0")
    assert done.returncode == 2
    assert "torch_npu sees no card" in done.stdout + done.stderr
