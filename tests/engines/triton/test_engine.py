"""What the engine's kernels do beyond the contract, which tests/engines/test_contract.py checks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from vocab_parallel_ce.engines import ENGINES, select
from vocab_parallel_ce.engines.contract import IGNORED, Coefficients, Wanted
from vocab_parallel_ce.engines.triton import engine as triton
from vocab_parallel_ce.testing import assert_close as assert_close_on_host

from ...device import INTERPRETED


def assert_close(
    actual: Tensor, exact: Tensor, naive: Tensor, what: str, rows_error: float
) -> None:
    assert_close_on_host(actual, exact.cpu(), naive.cpu(), what, rows_error=rows_error)


ALL = Wanted(smooth=True, entropy=True, argmax=True, squares=True)


def _batch(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    target = torch.arange(rows) * 37 % columns
    target[1::3] = IGNORED
    return (3 * torch.randn(rows, columns)).to(dtype), target


def _results(logits: Tensor, target: Tensor, wanted: Wanted = ALL) -> list[Tensor]:
    """Partials, gradient and log-probabilities, for statistics that do not depend on the rows."""
    rows, columns = logits.shape
    weight = torch.linspace(0.5, 1.5, columns)
    out = torch.empty(len(wanted.rows), rows)
    triton.partials(logits, target, weight, 1.2, 0.0, wanted, out)
    m, s = torch.full((rows,), 9.0), torch.full((rows,), 3.0)
    c = Coefficients(*(torch.full((rows,), value) for value in (1.1, 0.9, 0.01, 0.2)))
    grad, log_prob = torch.empty_like(logits), torch.empty_like(logits)
    triton.gradient(logits, m, s, target, c, weight, 1.2, 0.0, grad)
    triton.log_prob(logits, m, s, 1.2, 0.0, log_prob)
    return [out, grad, log_prob]


def _same(first: list[Tensor], second: list[Tensor]) -> bool:
    """Bit for bit; argmax is stored as the bits of integers, which may read as NaN."""
    integers = {2: torch.int16, 4: torch.int32}
    return all(
        torch.equal(a.view(integers[a.itemsize]), b.view(integers[b.itemsize]))
        for a, b in zip(first, second, strict=True)
    )


@pytest.fixture
def small_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 64 to 256 columns: rows of a few hundred then take many steps and parts."""
    monkeypatch.setattr(triton, "_ELEMENTS_PER_THREAD", 1)
    monkeypatch.setattr(triton, "_PART_BLOCKS", 2)


@pytest.mark.parametrize("columns", [640, 999])
@pytest.mark.usefixtures("small_programs")
def test_rows_of_many_steps_and_parts(columns: int) -> None:
    logits, target = _batch(5, columns)
    out, grad, log_prob = _results(logits, target)
    kept = target != IGNORED
    x = logits.double() * 1.2
    m = x.amax(1)
    s = (x - m[:, None]).exp().sum(1)
    naive = (logits * 1.2 - (logits * 1.2).amax(1)[:, None]).exp().sum(1)
    assert torch.equal(out[0][kept], (logits * 1.2).amax(1)[kept])
    assert_close(out[1][kept], s[kept], naive[kept], "s", rows_error=2e-6 * float(s.max()))
    argmax = out[ALL.rows.index("argmax")].view(torch.int32)
    assert torch.equal(argmax[kept].long(), x.argmax(1)[kept])
    once = triton._shape(columns, torch.float32, 8)
    assert columns > 2 * once.block  # else this test would be the contract's
    monolith = _eager(logits, target)
    assert_close(grad, monolith[0], monolith[0].float(), "gradient", rows_error=1e-6)
    assert_close(log_prob, monolith[1], monolith[1].float(), "log_prob", rows_error=1e-6)


def _eager(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient and log-probabilities of ``_results`` in fp64."""
    rows, columns = logits.shape
    x, weight = logits.double(), torch.linspace(0.5, 1.5, columns).double()
    m, s = (torch.full((rows,), value, dtype=torch.float64) for value in (9.0, 3.0))
    c = Coefficients(*(torch.full((rows,), value).double() for value in (1.1, 0.9, 0.01, 0.2)))
    eager, scale = select("eager", x), float(torch.tensor(1.2))
    grad, log_prob = torch.empty_like(x), torch.empty_like(x)
    eager.gradient(x, m, s, target, c, weight, scale, 0.0, grad)
    eager.log_prob(x, m, s, scale, 0.0, log_prob)
    return grad, log_prob


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_in_any_batch_and_run(dtype: torch.dtype) -> None:
    """As far as rows begin alike in 16-byte words: here columns are a multiple of 8."""
    logits, target = _batch(5, 1112, dtype)
    out, *others = together = _results(logits, target)
    assert _same(together, _results(logits, target))
    for row in range(5):
        this = slice(row, row + 1)
        alone = _results(logits[this].clone(), target[this])
        assert _same(alone, [out[:, this], *(other[this] for other in others)])


def test_a_grid_smaller_than_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs then loop, as they must where a grid is limited."""
    logits, target = _batch(7, 130)
    before = _results(logits, target)
    monkeypatch.setattr(triton, "_LARGEST_GRID", 2)
    assert _same(before, _results(logits, target))


@pytest.mark.parametrize("apart", [False, True], ids=["rows", "columns"])
def test_offsets_beyond_32_bits(apart: bool) -> None:
    """Strides fit 32 bits and offsets do not: 4.8 GB of addresses, a few pages of them in use."""
    far = 1_200_000_000
    memory = torch.empty(2 * far + 40, dtype=torch.bfloat16)
    logits = memory.as_strided((3, 40), (far, 1))
    logits.copy_(torch.randn(3, 40))
    if apart:
        logits = logits.t()
    dense, target = logits.clone(), torch.arange(len(logits)) % 3
    out, _, _ = _results(dense, target)
    wanted = [torch.empty_like(out)]
    triton.partials(
        logits, target, torch.linspace(0.5, 1.5, logits.shape[1]), 1.2, 0.0, ALL, wanted[0]
    )
    assert _same(wanted, [out])
    _check_in_place(logits, dense, target)


def _check_in_place(logits: Tensor, dense: Tensor, target: Tensor) -> None:
    rows = len(target)
    ones = torch.ones(rows)
    out = torch.empty_like(dense)
    for x, into in ((dense, out), (logits, logits)):
        triton.gradient(x, ones, ones, target, Coefficients(ones, ones), None, 1.0, 0.0, into)
    assert torch.equal(logits, out)


def test_what_is_read_has_the_type_that_the_kernels_expect() -> None:
    logits, target = _batch(2, 9)
    row = torch.ones(2)
    out = torch.empty(3, 2)
    with pytest.raises(TypeError, match=r"expected torch\.int64"):
        triton.partials(logits, target.int(), None, 1.0, 0.0, Wanted(), out)
    with pytest.raises(TypeError, match=r"expected torch\.float32"):
        triton.log_prob(logits, row, row.double(), 1.0, 0.0, logits)


# Which engine serves


@pytest.mark.skipif(not INTERPRETED, reason="a card's tensors are served by this engine")
def test_the_interpreter_serves_only_who_asks_for_it() -> None:
    x = torch.randn(2, 3)
    assert "triton" in ENGINES
    chosen: Any = select("triton", x)
    assert chosen is triton
    assert select("auto", x) is not triton


def test_fp64_is_left_to_eager() -> None:
    x = torch.randn(2, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"engine='triton' does not serve torch\.float64 logits"):
        select("triton", x)


@pytest.mark.parametrize("columns", [40, 999])
@pytest.mark.usefixtures("small_programs")
def test_a_gradient_narrower_than_the_logits(columns: int) -> None:
    """What the fused head asks for where its logits are fp32. (The interpreter cuts bf16 off.)"""
    logits, target = _batch(5, columns)
    m, s = logits.amax(1), torch.full((5,), 3.0)
    c = Coefficients(torch.full((5,), 1.1), torch.full((5,), 0.9))
    wide, narrow = torch.empty_like(logits), torch.empty(5, columns, dtype=torch.float16)
    for out in (wide, narrow):
        triton.gradient(logits, m, s, target, c, None, 1.2, 0.0, out)
    assert torch.equal(narrow, wide.half())
