"""What a reader calls the machine."""

from __future__ import annotations

import pytest
import torch

from vocab_parallel_ce.launch.measuring import device, machine


def test_a_processor_by_name_and_number(monkeypatch: pytest.MonkeyPatch) -> None:
    x86 = {"processor": "0", "cpu family": "25", "model": "17", "model name": "AMD EPYC"}
    monkeypatch.setattr(machine, "_cpuinfo", lambda: x86)
    assert machine.processor() == device.device_name(torch.device("cpu")) == "AMD EPYC"
    assert machine.processor_model() == "AMD EPYC, family 25, model 17"
    monkeypatch.setattr(
        machine, "_cpuinfo", lambda: {"CPU implementer": "0x48", "CPU part": "0xd01"}
    )
    assert machine.processor_model().endswith(", CPU implementer 0x48, CPU part 0xd01")
    monkeypatch.setattr(machine, "_cpuinfo", dict)
    assert machine.processor_model() == machine.processor() != ""
