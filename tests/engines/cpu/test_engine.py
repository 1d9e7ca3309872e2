"""What only the cpu engine has: blocks, far addresses, threads, one compilation, availability.

What the contract asks of every engine is in test_eager, which runs on this engine too.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import warnings
from importlib import metadata
from typing import Any, NamedTuple

import numba
import pytest
import torch
from torch import Tensor

from vocab_parallel_ce.engines.contract import (
    ELSEWHERE,
    IGNORED,
    Coefficients,
    Wanted,
    arithmetic_dtype,
)
from vocab_parallel_ce.engines.cpu import engine as cpu
from vocab_parallel_ce.engines.cpu import threads as pool
from vocab_parallel_ce.testing.engine import Shard, Subject

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
HALVES = (torch.bfloat16, torch.float16)
# Around the vectors of 16, the pairs of 32 and the blocks of 1024
COLUMNS = (1, 2, 15, 17, 31, 33, 1000, 1023, 1025, 1055, 5000)
ALL = Wanted(smooth=True, entropy=True, argmax=True, squares=True)
ENGINE = Subject(cpu)

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_half = pytest.mark.parametrize("dtype", HALVES, ids=str)


@pytest.fixture(autouse=True)
def _threads(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Small cases are work for several threads, too."""
    monkeypatch.setattr(pool, "SEQUENTIAL_BELOW", 1 << 16)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# By the formulas of the contract


class Case(NamedTuple):
    logits: Tensor
    target: Tensor
    weight: Tensor
    coefficients: Coefficients


def case(rows: int, columns: int, dtype: torch.dtype, spread: float = 3.0) -> Case:
    """Targets here, elsewhere and ignored, in turn; nothing in an ignored row may be read."""
    logits = (spread * torch.randn(rows, columns)).to(dtype)
    target = torch.randint(columns, (rows,))
    target[1::4], target[2::4] = ELSEWHERE, IGNORED
    logits[2::4, ::2], logits[2::4, 1::2] = torch.nan, torch.inf
    arithmetic = arithmetic_dtype(dtype)
    parts = [torch.randn(rows, dtype=arithmetic) for _ in range(4)]
    weight = torch.rand(columns, dtype=arithmetic) + 0.25
    return Case(logits, target, weight, Coefficients(*parts))


def run_partials(c: Case, scale: float = 1.0, wanted: Wanted = ALL) -> dict[str, Tensor]:
    dtype = arithmetic_dtype(c.logits.dtype)
    out = torch.full((len(wanted.rows), len(c.target)), 123.25, dtype=dtype)
    cpu.partials(c.logits, c.target, c.weight, scale, 0.0, wanted, out)
    return dict(zip(wanted.rows, out.unbind(0), strict=True))


def run_gradient(
    c: Case, m: Tensor, s: Tensor, out: Tensor, scale: float | Tensor = 1.0, parts: int = 4
) -> Tensor:
    softmax, target, smooth, entropy = c.coefficients
    plain = parts == 2
    coefficients = Coefficients(softmax, target, *((None, None) if plain else (smooth, entropy)))
    cpu.gradient(c.logits, m, s, c.target, coefficients, c.weight, scale, 0.0, out)
    return out


def check(c: Case, scale: float = 1.0) -> None:
    """Both kernels of both directions, and log_prob, by the contract's formulas."""
    shard = Shard(c.logits, c.target, c.weight)
    for wanted in (Wanted(), ALL):
        ENGINE.check_partials(shard, scale, wanted)
    ENGINE.check_gradient(shard, scale)
    ENGINE.check_gradient(shard, scale, smooth=True, entropy=True)
    ENGINE.check_log_prob(shard, scale)


@every_dtype
@pytest.mark.parametrize("columns", COLUMNS)
def test_sizes(columns: int, dtype: torch.dtype) -> None:
    check(case(64, columns, dtype))


@every_dtype
@pytest.mark.parametrize("scale", [0.37, -1.0])
def test_scale(scale: float, dtype: torch.dtype) -> None:
    check(case(64, 1055, dtype), scale)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_a_scale_that_is_0_in_fp32(dtype: torch.dtype) -> None:
    """0 of what lies behind the last column would be 0 * -inf."""
    check(case(64, 17, dtype), 1e-50)


@every_dtype
@pytest.mark.parametrize("step", [0.9, 1.1, 30.0, 200.0])
@pytest.mark.parametrize("falling", [False, True], ids=["rising", "falling"])
def test_a_maximum_that_moves_from_block_to_block(
    falling: bool, step: float, dtype: torch.dtype
) -> None:
    """Below, at and above the rise at which a block is summed again."""
    c = case(64, 3100, dtype, spread=1.0)
    rise = step * (torch.arange(3100) // 1024)
    c.logits.add_(rise.flip(0) if falling else rise)
    check(c)


@every_dtype
@pytest.mark.parametrize("gap", [0.0, 0.3, 0.5, 1.0, 2.0])
def test_equal_logits_do_not_err_to_one_side(gap: float, dtype: torch.dtype) -> None:
    """As of a head that knows nothing yet. In one long chain, sums of equal numbers drift."""
    c = case(64, 4096, dtype)
    c.logits.copy_(torch.zeros(()))
    c.logits[:, 5] = gap
    check(c)
    check(c._replace(weight=torch.full_like(c.weight, 0.3)))


# In place, threads


@every_dtype
@pytest.mark.parametrize("parts", [2, 4], ids=["fast", "general"])
def test_in_place_is_the_same_bits(parts: int, dtype: torch.dtype) -> None:
    c = case(64, 1055, dtype)
    got = run_partials(c)
    apart = run_gradient(c, got["m"], got["s"], torch.empty_like(c.logits), 0.8, parts)
    assert torch.equal(run_gradient(c, got["m"], got["s"], c.logits, 0.8, parts), apart)


@every_dtype
def test_any_number_of_threads_is_the_same_bits(dtype: torch.dtype) -> None:
    c = case(301, 1055, dtype)
    assert c.logits.numel() > 2 * pool.SEQUENTIAL_BELOW
    answers = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        got = [*run_partials(c, wanted=Wanted()).values(), *run_partials(c).values()]
        m, s = got[:2]
        got += [run_gradient(c, m, s, torch.empty_like(c.logits), 1.0, n) for n in (2, 4)]
        log_prob = torch.empty_like(c.logits)
        cpu.log_prob(c.logits, m, s, 1.0, 0.0, log_prob)
        got.append(log_prob[c.target != IGNORED])
        answers.append(got)
        assert torch.get_num_threads() == threads
    for other in answers[1:]:
        assert all(torch.equal(a, b) for a, b in zip(answers[0], other, strict=True))


def test_several_threads_may_call_at_once() -> None:
    """As autograd does; and the number of threads changes meanwhile."""
    cases = [case(301, 1055, torch.float32) for _ in range(4)]
    want = [run_partials(c, wanted=Wanted())["s"] for c in cases]
    wrong: list[int] = []

    def call(i: int) -> None:
        for _ in range(20):
            torch.set_num_threads(2 + i % 2)
            if not torch.equal(run_partials(cases[i], wanted=Wanted())["s"], want[i]):
                wrong.append(i)

    threads = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_makes_its_own_threads() -> None:
    torch.set_num_threads(2)
    c = case(301, 1055, torch.float32)
    want = run_partials(c, wanted=Wanted())["s"].numpy().tobytes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of threads
        child = os.fork()
    if child == 0:
        got = run_partials(c, wanted=Wanted())["s"].numpy().tobytes()
        os._exit(0 if got == want else 1)
    done = threading.Timer(60, os.kill, (child, 9))
    done.start()
    status = os.waitpid(child, 0)[1]
    done.cancel()
    assert status == 0


# Memory


@pytest.mark.skipif(sys.maxsize < 2**32, reason="needs 64-bit addresses")
def test_rows_and_columns_more_than_2_to_the_31_apart() -> None:
    """Of eight GiB that are reserved, a few pages are touched."""
    try:
        memory = torch.empty(2**32 + 4096, dtype=torch.bfloat16)
    except RuntimeError:
        pytest.skip("no such address range to be had")
    c = case(2, 1055, torch.bfloat16)
    c.target[:] = torch.tensor([1054, 7])
    for shape, stride in (((2, 1055), (2**31 + 1, 1)), ((2, 2), (5, 2**32))):
        far = memory.as_strided(shape, stride)
        far.copy_(c.logits[:, : shape[1]])
        target = c.target.clamp(max=shape[1] - 1)
        near = c._replace(logits=far.clone(memory_format=torch.contiguous_format), target=target)
        got = run_partials(near._replace(logits=far), wanted=ALL)
        want = run_partials(near, wanted=ALL)
        assert all(torch.equal(got[name], want[name]) for name in got if name != "argmax")
        m, s = want["m"], want["s"]
        run_gradient(near._replace(logits=far), m, s, far)
        assert torch.equal(far, run_gradient(near, m, s, torch.empty_like(near.logits)))


def test_a_wrong_dtype_is_refused_not_read() -> None:
    c = case(4, 20, torch.bfloat16)
    m = s = torch.ones(4)
    with pytest.raises(TypeError, match=r"expected torch\.float32, got torch\.bfloat16"):
        cpu.partials(c.logits, c.target, None, 1.0, 0.0, Wanted(), torch.empty(3, 4).bfloat16())
    with pytest.raises(TypeError, match=r"expected torch\.int64, got torch\.int32"):
        cpu.partials(c.logits, c.target.int(), None, 1.0, 0.0, Wanted(), torch.empty(3, 4))
    with pytest.raises(TypeError, match=r"expected torch\.bfloat16, got torch\.float32"):
        run_gradient(c, m, s, torch.empty(4, 20))


def test_a_nan_of_any_bits_stays_one_in_a_bf16_gradient() -> None:
    """Rounding 0x7fffffff as if it were a number would make -0 of it."""
    c = case(6, 64, torch.bfloat16)
    c.target[:] = ELSEWHERE
    c.logits.nan_to_num_(0.0, posinf=0.0)
    bits = torch.tensor([0x7FFFFFFF, -1, 0x7F800001, 0x7FC00001, -(0x7FFFFF), 0x7FFF8000])
    nan = bits.to(torch.int32).view(torch.float32)
    assert bool(nan.isnan().all())
    ones = torch.ones(6)
    for m, s, softmax in ((nan, ones, ones), (ones, nan, ones), (ones, ones, nan)):
        d = c._replace(coefficients=Coefficients(softmax, ones))
        assert bool(run_gradient(d, m, s, torch.empty_like(c.logits), 1.0, 2).isnan().all())
    d = c._replace(coefficients=Coefficients(ones, ones))
    assert bool(run_gradient(d, ones, ones, torch.empty_like(c.logits), nan, 2).isnan().all())
    c.logits.view(torch.int16)[:, 5] = torch.tensor(
        [0x7FFF, -1, 0x7F81, 0x7FC0, -1, 0x7FC1]
    ).short()
    dx = run_gradient(d, ones, ones, torch.empty_like(c.logits), 1.0, 2)
    assert torch.equal(dx.isnan(), c.logits.isnan())


# The compiler and what may be missing


def test_one_compilation_serves_every_layout() -> None:
    from vocab_parallel_ce.engines.cpu import fast_kernels, general_kernels

    kernels = [
        fast_kernels.partials,
        general_kernels.partials,
        fast_kernels.gradient,
        general_kernels.gradient,
        general_kernels.log_prob,
    ]
    check(case(64, 33, torch.float32))
    before = [len(kernel.signatures) for kernel in kernels]  # type: ignore[attr-defined]
    c = case(64, 66, torch.float32)
    check(c, 2)
    check(c._replace(logits=c.logits[:, :-1], weight=c.weight[:-1], target=c.target.clamp(max=3)))
    wide = case(64, 33, torch.float32)
    check(wide._replace(logits=c.logits[:, ::2], target=c.target.clamp(max=3)))
    check(wide._replace(logits=wide.logits.t().contiguous().t()))
    assert before == [len(kernel.signatures) for kernel in kernels]  # type: ignore[attr-defined]


def test_importing_the_package_does_not_import_numba() -> None:
    code = (
        "import sys, vocab_parallel_ce, vocab_parallel_ce.engines.cpu; "
        "sys.exit(any(name in sys.modules for name in ('numba', 'llvmlite')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize(
    ("version", "reason"),
    [
        ("0.57.1", "numba 0.57.1 is older than 0.60"),
        ("0.60.0", None),
        ("0.61rc1", None),
        ("1.0", None),
    ],
)
def test_versions_of_numba(
    version: str, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: version)
    assert cpu.unavailable.__wrapped__() == reason


def test_numba_missing_broken_or_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    version = metadata.version("numba")

    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    def broken() -> None:
        raise ImportError("Numba needs NumPy 2.2 or less")

    with monkeypatch.context() as patch:
        patch.setattr(metadata, "version", missing)
        assert cpu.unavailable.__wrapped__() == "numba is not installed"
    with monkeypatch.context() as patch:
        patch.setattr(cpu, "_kernels", broken)
        reason = cpu.unavailable.__wrapped__()
        assert reason == f"numba {version} cannot be used here: Numba needs NumPy 2.2 or less"
    monkeypatch.setattr(numba.config, "DISABLE_JIT", 1)
    assert cpu.unavailable.__wrapped__() == "numba is switched off by NUMBA_DISABLE_JIT"
