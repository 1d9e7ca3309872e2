"""A CPU, where accelerators need waiting for."""

from __future__ import annotations

import torch

from vocab_parallel_ce.launch.measuring import device


def test_a_cpu_is_not_waited_for() -> None:
    device.synchronize(torch.device("cpu"))
    device.hold(torch.device("cpu"))
    assert device.cache_bytes(torch.device("cpu")) == 192 * device.MIB
