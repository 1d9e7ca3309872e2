"""The doctor in this process, and what its file says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.launch.running import Ended
from tests.launch.running import invoke as invoke_job

MODULE = ("-m", "vocab_parallel_ce.launch.doctor")
DTYPES = ["fp32", "bf16", "fp16", "fp64"]
SMALL = ("--device", "cpu", "--selftest", "--quick", "--rows", "8", "--vocab", "64")


def invoke(*options: object) -> Ended:
    return invoke_job("doctor", *options)


def read(path: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(path.read_text(), parse_constant=pytest.fail)
    return report
