"""Seconds of a pass, of a copy and of a call."""

from __future__ import annotations

import gc
import time
from typing import Any

import torch
from torch import Tensor

from vocab_parallel_ce.launch.measuring.calls import first_call_seconds, fixed_costs
from vocab_parallel_ce.launch.measuring.clock import steps_seconds, wall_seconds
from vocab_parallel_ce.launch.measuring.passes import time_copy, time_pass

CPU = torch.device("cpu")


class _Slow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        assert not gc.isenabled()
        time.sleep(0.02)
        return values.sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        time.sleep(0.05)
        return gradients[0].expand(3)


def test_forward_and_backward_are_told_apart() -> None:
    values = torch.ones(3, requires_grad=True)

    def forward() -> Tensor:
        loss: Tensor = _Slow.apply(values)  # type: ignore[no-untyped-call]
        return loss

    found = time_pass(forward, CPU)
    assert found.forward >= 0.02
    assert found.backward >= 0.05
    assert found.total == found.forward + found.backward
    assert found.faults >= 0
    assert gc.isenabled()


def test_steps_and_the_wall() -> None:
    waits = (0.01, 0.03)
    found = steps_seconds(CPU, *(lambda wait=wait: time.sleep(wait) for wait in waits))
    assert all(seconds >= wait for seconds, wait in zip(found, waits, strict=True))
    assert steps_seconds(CPU) == []
    assert wall_seconds(lambda: time.sleep(0.01), CPU) >= 0.01


def test_a_copy_copies() -> None:
    source, destination = torch.randn(100), torch.zeros(100)
    assert time_copy(destination, source) > 0
    assert torch.equal(source, destination)


def test_fixed_costs_are_of_one_call() -> None:
    calls: list[str] = []
    steps = {name: lambda name=name: calls.append(name) for name in ("a", "b")}
    found = fixed_costs(steps, rounds=3, calls=5)
    assert set(found) == {"a", "b"}
    assert calls.count("a") == calls.count("b") == (3 + 1) * 5
    slow = fixed_costs({"sleep": lambda: time.sleep(1e-3)}, rounds=1, calls=2)
    assert slow["sleep"] >= 1e3  # microseconds


def test_a_first_call_is_in_a_process_with_its_own_cache() -> None:
    program = "import os, sys; print(float(os.environ['NUMBA_CACHE_DIR'] == sys.argv[1]))"
    assert first_call_seconds(program, "place", "place") == 1.0
