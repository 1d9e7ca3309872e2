"""The kernels for Ascend against the contract, on CPU tensors, run by Triton's interpreter."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from vocab_parallel_ce.engines.contract import IGNORED, Coefficients, Wanted
from vocab_parallel_ce.engines.npu import choice, engine, triton_way
from vocab_parallel_ce.testing.engine import EngineCheck, Subject, engine_checks, random_shard

from ..ascend import Variant, shape_problem

# The engine that would take this way on a card.
WAY: Any = SimpleNamespace(
    partials=engine.partials,
    gradient=engine.gradient,
    log_prob=engine.log_prob,
    ROW_FUNCTIONS=None,
    LEAVES_LOG_PROB=True,
    supports=lambda logits: logits.dtype != torch.float64,
)
SUBJECT = Subject(WAY, rows=8)
FP32, BF16 = torch.float32, torch.bfloat16
ALL = Wanted(smooth=True, entropy=True, argmax=True, squares=True)


def _is_quick(check: EngineCheck) -> bool:
    """All in fp32 but most widths; of bf16 what depends on the dtype."""
    if check.dtype == BF16:
        return "rounded once" in check.name or "poisoned" in check.name or "1100" in check.name
    return not any(f" {n} columns" in check.name for n in (1, 15, 16, 100, 1024, 1040))


CHECKS = [
    check if _is_quick(check) else pytest.param(check, marks=pytest.mark.full)
    for check in engine_checks((FP32, BF16), many_rows=False)
]


@pytest.fixture(autouse=True)
def takes_this_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "way_for", lambda dtype: triton_way)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 64 columns and 3 cores: many blocks a row and several rows a program."""
    monkeypatch.setattr(triton_way, "block_of", lambda kernel, itemsize, options, capped: 64)
    monkeypatch.setattr(triton_way, "vector_cores", lambda: 3)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_contract(check: EngineCheck) -> None:
    check.run(SUBJECT)


@pytest.mark.parametrize("columns", [64, 65, 127, 320, 333])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.usefixtures("small")
def test_rows_of_many_blocks(dtype: torch.dtype, columns: int) -> None:
    """With a rest and without one, with every option and with none."""
    torch.manual_seed(columns)
    shard = random_shard(8, columns, dtype)
    shard.logits[3, 5:200] = -torch.inf
    for wanted in (Wanted(), ALL):
        SUBJECT.check_partials(shard, wanted=wanted)
    for on in (False, True):
        SUBJECT.check_gradient(shard, scale=0.7, smooth=on, entropy=on)
    SUBJECT.check_log_prob(random_shard(8, columns, dtype), scale=0.3)


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 9])
@pytest.mark.usefixtures("small")
def test_every_row_is_some_programs(rows: int) -> None:
    shard = random_shard(rows, 70, FP32)
    subject = Subject(WAY, rows=rows)
    got = subject.partials(shard, wanted=Wanted(ignored_rows=True))
    x = shard.logits
    assert torch.equal(got["m"], x.amax(1))
    torch.testing.assert_close(got["s"], (x - x.amax(1)[:, None]).exp().sum(1))


@pytest.mark.usefixtures("small")
def test_ties_across_blocks_take_the_first() -> None:
    shard = random_shard(3, 333, FP32)
    shard.target[:] = 0
    shard.logits[0, [70, 71, 300, 332]] = 50.0
    shard.logits[1, [332]] = 50.0
    shard.logits[2, :] = -torch.inf
    got = SUBJECT.partials(shard, wanted=ALL)
    assert got["argmax"].tolist() == [70, 332, 0]


@pytest.mark.parametrize("far", [False, True], ids=["rows", "columns"])
def test_offsets_beyond_32_bits(far: bool) -> None:
    """Strides fit 32 bits and offsets do not: 4.8 GB of addresses, a few pages of them in use."""
    step = 1_200_000_000
    memory = torch.empty(2 * step + 40, dtype=BF16)
    logits = memory.as_strided((3, 40), (step, 1))
    logits.copy_(torch.randn(3, 40))
    if far:
        logits = logits.t()
    target = torch.arange(len(logits)) % 3
    target[1] = IGNORED
    outs: list[Tensor] = []
    for x in (logits, logits.clone()):
        out = torch.empty(3, len(x))
        triton_way.partials(x, target, None, 1.0, 0.0, Wanted(), out)
        outs.append(out)
    assert torch.equal(*outs)
    ones = torch.ones(len(logits))
    dense = torch.empty(logits.shape, dtype=BF16)
    c = Coefficients(ones, ones)
    triton_way.gradient(logits.clone(), ones, ones, target, c, None, 1.0, 0.0, dense)
    triton_way.gradient(logits, ones, ones, target, c, None, 1.0, 0.0, logits)
    assert torch.equal(logits, dense)


def test_what_would_be_slow_or_wrong_on_a_core_is_found_in_the_lowered_kernel() -> None:
    """Lines of kernels whose mask was a comparison of fp32, and that compared columns as ints."""
    kernel = Variant("row_gradient", "bf16", False)
    beyond = "%44 = arith.select %20, %42, %43 : tensor<8192xi1>, tensor<8192xbf16>"
    slow = "%31 = arith.cmpi eq, %3, %30 : tensor<8192xi32>"
    good = "%30 = arith.cmpi slt, %29, %c8192 : index"
    assert shape_problem(kernel, good) == ""
    assert "memory beyond the row is read and written" in shape_problem(
        kernel, good + "\n" + beyond
    )
    assert "element by element" in shape_problem(kernel, slow)


def test_the_interpreter_is_no_card() -> None:
    """Triton without its backend for Ascend says for what it is here."""
    assert "not for Ascend" in str(triton_way.unavailable(FP32))
