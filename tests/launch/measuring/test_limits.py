"""The reference loops, and what follows from their seconds."""

from __future__ import annotations

import re

import pytest
import torch

from vocab_parallel_ce.launch.measuring import limits
from vocab_parallel_ce.launch.measuring.limits import Limit, Loops, limit, run_loops


def test_the_larger_of_memory_and_arithmetic_by_hand() -> None:
    """1000 elements; a multiply-add takes 1 ms: 12 s and 12 s, or 12 s and 9 s."""
    slow, fast = Loops(5.0, 10.0, 30.0, 1e-3), Loops(5.0, 10.0, 30.0, 1e-6)
    assert limit(slow, 1000, torch.float32, inplace=True) == Limit(11.0, 12.0)
    assert limit(slow, 1000, torch.bfloat16, inplace=True) == Limit(11.0, 10.0)
    assert limit(slow, 1000, torch.float16, inplace=False) == Limit(11.0, 30.0)
    assert limit(fast, 1000, torch.float32, inplace=True) == Limit(5.0, 10.0)
    assert limit(fast, 1000, torch.float32, inplace=False).total == 35.0


def test_ranks_wait_for_the_slowest_and_runs_are_judged_by_a_quartile() -> None:
    one, other = Loops(1.0, 2.0, 3.0, 4.0), Loops(2.0, 1.0, 4.0, 3.0)
    assert Loops.slowest([one, other]) == Loops(2.0, 2.0, 4.0, 4.0)
    assert Loops.usual([one, other]) == Loops(1.0, 1.0, 3.0, 3.0)


@pytest.mark.parametrize("dtype", limits.MULTIPLY_ADDS)
def test_the_loops_run_over_any_logits_and_change_none(dtype: torch.dtype) -> None:
    source = torch.randn(3, 5).to(dtype)  # 30 bytes in bf16: not a multiple of four
    source[0, 0] = torch.nan
    before, buffer = source.clone(), torch.zeros_like(source)
    found = run_loops(source, buffer)
    for tensor in (source, buffer):
        assert torch.equal(tensor.view(torch.uint8), before.view(torch.uint8))
    assert min(found.read, found.copy, found.fresh_copy) > 0


def test_more_bytes_take_longer() -> None:
    """Loose on purpose: only that the loops do the work that they are said to do."""
    runs: list[list[Loops]] = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # nobody waits for a thread that a busy machine does not run
    for size in (1 << 16, 1 << 24):  # 256 times the bytes
        source = torch.zeros(size)
        buffer = source.clone()
        runs.append([run_loops(source, buffer) for _ in range(5)])
    torch.set_num_threads(threads)
    for name in ("read", "copy", "fresh_copy"):
        few, many = (min(getattr(one, name) for one in loops) for loops in runs)
        assert many > 4 * few, name


def test_multiply_adds_are_vectors_and_fused() -> None:
    chains = limits._compiled()
    if chains is None:
        pytest.skip("Numba compiles them")
    run_loops(torch.zeros(8), torch.zeros(8))
    (code,) = chains.inspect_llvm().values()
    assert re.search(r"fmul contract <\d+ x float>", code)
    assert re.search(r"fadd contract <\d+ x float>", code)


def test_without_numba_arithmetic_limits_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_compiled", lambda: None)
    found = run_loops(torch.zeros(8), torch.zeros(8))
    assert found.multiply_add == 0
    assert limit(found, 8, torch.float32, inplace=True) == Limit(found.read, found.copy)
