"""Compiling where machine code cannot be kept, and for a processor that lacks an instruction."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numba
import pytest
from llvmlite import binding

from vocab_parallel_ce.engines.cpu import compiling


def test_a_kernel_is_compiled_without_a_place_to_keep_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def njit(cache: bool = False, **options: Any) -> Any:
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return numba.njit(**options)

    def double(x: float) -> float:
        return 2 * x

    monkeypatch.setattr(compiling, "_njit", njit)
    assert compiling.kernel(double)(4.0) == 8.0


_OLD_PROCESSOR = """
import torch
from vocab_parallel_ce import cross_entropy
from vocab_parallel_ce.engines import select
from vocab_parallel_ce.engines.contract import ELSEWHERE, Wanted
from vocab_parallel_ce.engines.cpu import engine
from vocab_parallel_ce.testing.engine import Shard, Subject

logits, target = torch.randn(5, 40), torch.randint(40, (5,))
for dtype in (torch.float16, torch.bfloat16):
    x = logits.to(dtype).requires_grad_()
    loss = cross_entropy(x, target)
    loss.backward()
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(x.float(), target))
    print(select("auto", x.detach()).__name__.rsplit("vocab_parallel_ce.engines.")[-1])
try:
    zeros = torch.zeros(5, dtype=torch.int64)
    engine.partials(logits.half(), zeros, None, 1.0, 0.0, Wanted(), torch.empty(3, 5))
except TypeError as error:
    print(error)
# Nearly all of a sum lies about 2^-13, where 13 log 2 is badly rounded.
columns = 1 << 17
far = -9.01 + 0.5 * (torch.rand(64, columns) - 0.5)
far[:, 0] = 0.0
shard = Shard(far.bfloat16(), torch.full((64,), ELSEWHERE), torch.ones(columns))
Subject(engine).check_partials(shard, wanted=Wanted())
"""


@pytest.mark.skipif("f16c" not in binding.get_host_cpu_features(), reason="an x86-64 matter")
def test_a_processor_that_neither_converts_fp16_nor_fuses_multiply_and_add() -> None:
    """fp16 is left to the eager engine, and sums are as exact as elsewhere."""
    features = binding.get_host_cpu_features()
    # What is built on them would bring them back.
    for name in features:
        if name in ("f16c", "fma") or name.startswith("avx512"):
            features[name] = False
    settings = {"NUMBA_CPU_NAME": "x86-64-v2", "NUMBA_CPU_FEATURES": features.flatten()}
    done = subprocess.run(
        [sys.executable, "-c", _OLD_PROCESSOR], env=os.environ | settings, capture_output=True,
        text=True, check=False, timeout=240,
    )  # fmt: skip
    *engines, refusal = done.stdout.splitlines() or [""]
    assert engines == ["eager", "cpu.engine"], done.stderr
    assert "torch.float16 needs a processor" in refusal, done.stderr
    assert done.returncode == 0, done.stderr
