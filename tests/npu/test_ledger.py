"""What each way makes a card read, write and launch, counted on the stand-in by the table."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from vocab_parallel_ce import cross_entropy, token_statistics
from vocab_parallel_ce.engines import select
from vocab_parallel_ce.engines.contract import ELSEWHERE, IGNORED, Coefficients, Wanted
from vocab_parallel_ce.engines.npu import engine, max_sum, operator
from vocab_parallel_ce.engines.npu.traffic import UnknownTrafficError, of_step

from ..npu_sim import ledger

N, C = 48, 16_001
BF16, FP32 = torch.bfloat16, torch.float32
# Bytes an element of what is of size [N]: some forty vectors of 4 and 8 bytes
VECTORS = 0.05
PLAIN = Wanted()
Entries = list[ledger.Entry]


def _both(
    way: ModuleType,
    logits: Tensor,
    wanted: Wanted = PLAIN,
    scale: float = 1.0,
    finite: bool = False,
) -> tuple[Entries, Entries]:
    """What the forward and the backward pass of a way enter; the gradient goes in place."""
    select("auto", logits)  # which tries the operators once
    target = torch.arange(len(logits)) * 333 % logits.shape[1]
    target[1::4], target[2::4] = ELSEWHERE, IGNORED
    y = target.to("npu")
    out = torch.empty(len(wanted.rows), len(logits), device="npu")
    g = torch.ones(len(logits), device="npu")
    c = Coefficients(g, g, g if wanted.smooth else None, g if wanted.entropy else None)
    with ledger.recording() as forward:
        way.partials(logits, y, None, scale, wanted, out)
    with ledger.recording() as backward:
        way.gradient(logits, out[0], out[1], y, c, None, scale, logits, finite)
    return forward, backward


def _logits(dtype: torch.dtype, rows: int = N, columns: int = C) -> Tensor:
    return torch.randn(rows, columns).to("npu", dtype)


# The budgets


@pytest.mark.parametrize(
    ("way", "dtype", "finite", "forward", "backward"),
    [
        (max_sum, BF16, False, 12, 16),
        (max_sum, BF16, True, 12, 12),
        (max_sum, FP32, False, 16, 24),
        (max_sum, FP32, True, 16, 16),
        (operator, BF16, False, 24, 32),
        (operator, BF16, True, 24, 28),
        (operator, FP32, False, 28, 32),
        (operator, FP32, True, 28, 24),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)).rpartition(".")[2],
)
def test_bytes_an_element(
    way: ModuleType, dtype: torch.dtype, finite: bool, forward: int, backward: int
) -> None:
    """Zeroing of ignored rows included, unless logits are promised finite; and the plan counts the
    very kernels that ran.
    """
    x = _logits(dtype)
    passes = _both(way, x, finite=finite)
    for entries, budget, steps in zip(
        passes, (forward, backward), (way.FORWARD, way.BACKWARD), strict=True
    ):
        assert budget <= ledger.bytes_per_element(entries, x) <= budget + VECTORS
        assert sum(of_step(step, dtype.itemsize, finite).bytes for step in steps) == budget
        ran = [name for name in ledger.sweeps(entries, x) if name not in ("gather", "put_")]
        launched = [s.operator for s in steps if of_step(s, dtype.itemsize, finite).bytes]
        assert ran == launched


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_at_most_four_calls_a_chunk(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of max_sum, each way; everything else is once a call, however many chunks there are."""
    columns = 4096
    counts = []
    for mib, chunks in (("1", 6), ("6", 1)):
        monkeypatch.setenv("VOCAB_PARALLEL_CE_NPU_SCRATCH_MIB", mib)
        passes = _both(max_sum, _logits(dtype, 64 * 6, columns))
        assert [e.operator for e in passes[0]].count("amax") == chunks
        counts.append([len(entries) for entries in passes])
    several, one = counts
    assert (several[0] - one[0]) / 5 <= 4
    assert (several[1] - one[1]) / 5 <= 4
    assert one[0] <= 24
    assert one[1] <= 30


@pytest.mark.parametrize("way", [max_sum, operator], ids=["max_sum", "operator"])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_strided_logits_are_made_dense_once_a_chunk(way: ModuleType, dtype: torch.dtype) -> None:
    """One copy a pass; the strided result costs a copy of its own, and its kernels none."""
    b = dtype.itemsize
    dense = _both(way, _logits(dtype))
    strided = _both(way, _logits(dtype, columns=C + 7)[:, :C])
    x = _logits(dtype)
    for entries, before in zip(strided, dense, strict=True):
        names = ledger.sweeps(entries, x)
        assert names.count("clone") == 1
        more = ledger.bytes_per_element(entries, x) - ledger.bytes_per_element(before, x)
        # read and written once; backward, in fp32 zeroed and narrowed into place
        assert more <= 2 * b + VECTORS + (0 if entries is strided[0] else 12)


@pytest.mark.parametrize("way", [max_sum, operator], ids=["max_sum", "operator"])
def test_whole_rows_are_never_written_for_one_element(way: ModuleType) -> None:
    wanted = Wanted(smooth=True, entropy=True, argmax=True)
    for scale in (1.0, 0.7):
        for entries in _both(way, _logits(BF16), wanted, scale):
            names = {entry.operator for entry in entries}
            assert not names & {"scatter_", "scatter_add_", "scatter_reduce_", "index_put_"}


PAGE = (Path(__file__).resolve().parents[2] / "docs" / "ascend.md").read_text("utf-8")


def _told(what: str, bf16: tuple[int, int], fp32: tuple[int, int]) -> bool:
    """Whether the page has these numbers in its table of options."""
    return f"| {what} | {bf16[0]} + {bf16[1]} | {fp32[0]} + {fp32[1]} |" in PAGE


@pytest.mark.parametrize(
    ("what", "wanted", "scale", "bf16", "fp32"),
    [
        ("no option", Wanted(), 1.0, (12, 16), (16, 24)),
        ("a scale", Wanted(), 0.7, (22, 24), (24, 32)),
        ("label smoothing", Wanted(smooth=True), 1.0, (22, 24), (28, 32)),
        ("entropy", Wanted(entropy=True), 1.0, (38, 46), (48, 60)),
        ("argmax", Wanted(argmax=True), 1.0, (24, 16), (30, 24)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bytes_of_options(
    what: str, wanted: Wanted, scale: float, bf16: tuple[int, int], fp32: tuple[int, int]
) -> None:
    """Of max_sum; argmax numbers the columns once a call."""
    assert _told(what, bf16, fp32)
    for dtype, budgets in ((BF16, bf16), (FP32, fp32)):
        x = _logits(dtype)
        for entries, budget in zip(_both(max_sum, x, wanted, scale), budgets, strict=True):
            assert ledger.bytes_per_element(entries, x) <= budget + VECTORS + 8 * wanted.argmax / N


ROWS = torch.linspace(0.5, 2, N)


@pytest.mark.parametrize(
    ("what", "scale", "softcap", "squares", "bf16", "fp32"),
    [
        ("a scale for each row", ROWS, 0.0, False, (22, 32), (24, 40)),
        ("softcap", 1.0, 20.0, False, (38, 72), (40, 80)),
        ("softcap and a scale for each row", ROWS, 20.0, False, (38, 72), (40, 80)),
        ("sum of squares", 1.0, 0.0, True, (38, 16), (44, 24)),
        ("sum of squares and a scale", 0.5, 0.0, True, (50, 24), (52, 32)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bytes_of_what_no_kernel_has(
    what: str,
    scale: float | Tensor,
    softcap: float,
    squares: bool,
    bf16: tuple[int, int],
    fp32: tuple[int, int],
) -> None:
    """As extra.py says, with max_sum; and a promise saves the last pass of it."""
    assert _told(what, bf16, fp32)
    scale = scale.to("npu") if isinstance(scale, Tensor) else scale
    wanted = Wanted(squares=squares)
    for dtype, (forward, backward) in ((BF16, bf16), (FP32, fp32)):
        x = _logits(dtype)
        y = torch.where(torch.arange(N) % 4 == 2, IGNORED, torch.arange(N)).to("npu")
        select("auto", x)
        engine.partials(x[:1], y[:1], None, 1.0, softcap, PLAIN, torch.empty(3, 1, device="npu"))
        out, g = torch.empty(len(wanted.rows), N, device="npu"), torch.ones(N, device="npu")
        with ledger.recording() as entries:
            engine.partials(x, y, None, scale, softcap, wanted, out)
        assert forward <= ledger.bytes_per_element(entries, x) <= forward + VECTORS
        for finite in (False, True):
            c = Coefficients(g, g)
            with ledger.recording() as entries:
                engine.gradient(x, out[0], out[1], y, c, None, scale, softcap, x, finite)
            budget = backward - 2 * dtype.itemsize * finite
            assert budget <= ledger.bytes_per_element(entries, x) <= budget + VECTORS


@pytest.mark.parametrize(("finite", "backward"), [(False, 16), (True, 12)])
def test_a_whole_call_adds_little(finite: bool, backward: int) -> None:
    """Loss and gradient as a user asks for them: no operator beyond the table or on all logits."""
    x = _logits(BF16).requires_grad_()
    y = (torch.arange(N) % C).to("npu")
    select("auto", x)
    with ledger.recording() as entries:
        cross_entropy(x, y, lse_square_scale=1e-4, finite_logits=finite).backward()
        token_statistics(x.detach(), y)
    assert ledger.bytes_per_element(entries, x) <= 12 + backward + 12 + 4 * VECTORS


# The ledger itself


def test_an_operator_that_is_not_in_the_table_is_an_error() -> None:
    x = _logits(FP32, 2, 5)
    with ledger.recording(), pytest.raises(UnknownTrafficError, match="erfinv is not in the table"):
        torch.erfinv(x)
    with ledger.recording(), pytest.raises(UnknownTrafficError, match=r"softmax .* is unknown"):
        x.softmax(1)
    torch.erfinv(x)  # nobody records


def test_a_whole_row_scatter_is_counted_as_one() -> None:
    x = _logits(BF16)
    index = torch.zeros(N, 1, dtype=torch.int64, device="npu")
    with ledger.recording() as entries:
        x.scatter_(1, index, 0.0)
    assert 4 <= ledger.bytes_per_element(entries, x) <= 4 + VECTORS
