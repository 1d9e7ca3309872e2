"""Every engine keeps the contract: the checks of ``testing.check_engine``, one test each.

They run on the eager engine and on that of the device, so the two agree; under Triton's interpreter
on the triton engine alone.
"""

from __future__ import annotations

import pytest
import torch

from vocab_parallel_ce.engines import eager
from vocab_parallel_ce.engines.contract import IGNORED, Coefficients, Engine
from vocab_parallel_ce.engines.cpu import engine as cpu
from vocab_parallel_ce.engines.npu import engine as npu
from vocab_parallel_ce.engines.triton import engine as triton
from vocab_parallel_ce.switches import WAY_VARIABLE
from vocab_parallel_ce.testing.engine import EngineCheck, Subject, engine_checks, random_shard

from ..device import DEVICE, DTYPES, ENGINES, INTERPRETED

MODULES: dict[str, Engine] = {"eager": eager, "cpu": cpu, "npu": npu, "triton": triton}
SUBJECTS = {
    name: Subject(
        MODULES[name],
        DEVICE,
        rows=8 if INTERPRETED else 64,
        exponential="2" if name == "triton" else "e",
    )
    for name in ENGINES
}
if DEVICE == "npu":  # beside the way that the engine chooses there, which is max_sum
    SUBJECTS["npu, operator"] = Subject(npu, DEVICE, sums_as_logs=True)
CHECKS = engine_checks(DTYPES, many_rows=not INTERPRETED)


def _left_to_the_grids(engine: str, check: EngineCheck) -> bool:
    """The stand-in device computes by the CPU's kernels, where the eager engine is tested already,
    and its operator way works in fp32 whatever the logits are."""
    if DEVICE != "npu":
        return False
    return engine == "eager" or (engine == "npu, operator" and "float32" not in check.name)


CASES = [
    pytest.param(
        check,
        engine,
        marks=pytest.mark.full if _left_to_the_grids(engine, check) else (),
        id=f"{check.name}-{engine}",
    )
    for check in CHECKS
    for engine in SUBJECTS
]


@pytest.mark.parametrize(("check", "engine"), CASES)
def test_engine(check: EngineCheck, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if engine == "npu, operator":
        monkeypatch.setenv(WAY_VARIABLE, "operator")
    check.run(SUBJECTS[engine])


@pytest.mark.skipif("cpu" not in ENGINES, reason="the cpu engine's threads")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_do_not_depend_on_threads(dtype: torch.dtype) -> None:
    """A row is never split: the cpu engine gives the same bits on one thread and on four."""
    shard = random_shard(300, 1100, dtype)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 4):
            torch.set_num_threads(threads)
            got = SUBJECTS["cpu"].partials(shard)
            read = shard.target != IGNORED
            m, s = torch.where(read, got["m"], 0.0), torch.where(read, got["s"], 1.0)
            c = Coefficients(m, s, s, m)
            out = SUBJECTS["cpu"].gradient(shard, m, s, c, shard.weight)
            results.append((*got.values(), out))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
