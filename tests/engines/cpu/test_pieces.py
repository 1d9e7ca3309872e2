"""Few long rows are cut into pieces: the same statistics and gradients, shared by the cores."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.engines.cpu.test_engine import (
    ALL,
    DTYPES,
    ENGINE,
    Case,
    case,
    check,
    run_gradient,
    run_partials,
)
from vocab_parallel_ce.engines.contract import IGNORED, arithmetic_dtype
from vocab_parallel_ce.engines.cpu import engine as cpu
from vocab_parallel_ce.engines.cpu import pieces, threads
from vocab_parallel_ce.testing.engine import Shard

COLUMNS = 5000  # three pieces: 2048, 2048 and 904

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def short_pieces(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(pieces, "SHORTEST", 1 << 10)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_cut_depends_on_the_shape() -> None:
    assert pieces.piece_width(1, COLUMNS) == 2048
    assert pieces.piece_width(pieces.MANY_ROWS, COLUMNS) == COLUMNS
    assert pieces.piece_width(1, 1500) == 1500
    for rows in (1, 2, 3, 7, 40, 63, 1000):
        for columns in (1, 1023, 1024, 2048, 4097, 131_072):
            width = pieces.piece_width(rows, columns)
            assert width == columns or width % pieces.MULTIPLE == 0
            assert 0 < width <= columns


@every_dtype
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_as_the_contract_says(rows: int, dtype: torch.dtype) -> None:
    check(case(rows, COLUMNS, dtype))


@every_dtype
def test_a_target_at_every_end_of_a_piece(dtype: torch.dtype) -> None:
    c = case(8, COLUMNS, dtype)
    c.logits.copy_(torch.randn(8, COLUMNS))
    c.target[:] = torch.tensor([0, 2047, 2048, 2049, 4095, 4096, 4999, 1])
    check(c)


@pytest.mark.parametrize("offset", [0.0, -1e4])
def test_a_piece_of_minus_infinity_and_a_row_of_it(offset: float) -> None:
    c = case(4, COLUMNS, torch.float32)
    c.logits.copy_(torch.randn(4, COLUMNS) + offset)
    c.target[:] = torch.tensor([3000, 1, 4999, 7])
    c.logits[0, :2048] = c.logits[1, 2048:] = -torch.inf
    finite = Shard(c.logits[:2], c.target[:2], c.weight)
    ENGINE.check_partials(finite, 1.0, ALL)
    c.logits[3] = -torch.inf
    got = run_partials(c)
    assert float(got["m"][3]) == -torch.inf
    assert float(got["s"][3]) == 0.0
    c.logits[2, 4500] = torch.nan
    assert bool(run_partials(c)["s"][2].isnan())


def test_the_smallest_id_of_a_tie_over_pieces() -> None:
    c = case(2, COLUMNS, torch.float32)
    c.logits[:] = 0.0
    c.logits[0, 4000] = c.logits[0, 2100] = 9.0
    c.logits[1, 4999] = 9.0
    assert run_partials(c)["argmax"].view(torch.int32).tolist() == [2100, 4999]


@every_dtype
def test_the_same_bits_on_any_number_of_threads(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "SEQUENTIAL_BELOW", 1)
    c = case(3, COLUMNS, dtype)
    answers = []
    for number in (1, 2, 5):
        torch.set_num_threads(number)
        got = run_partials(c)
        m, s = got["m"], got["s"]
        answers.append([*got.values(), *gradients(c, m, s)])
    for other in answers[1:]:
        assert all(torch.equal(a, b) for a, b in zip(answers[0], other, strict=True))


def gradients(c: Case, m: torch.Tensor, s: torch.Tensor) -> list[torch.Tensor]:
    """Out of place and in place, fast and general: all the same."""
    apart = [run_gradient(c, m, s, torch.empty_like(c.logits), 1.0, n) for n in (2, 4)]
    for n, want in zip((2, 4), apart, strict=True):
        inside = c._replace(logits=c.logits.clone())
        assert torch.equal(run_gradient(inside, m, s, inside.logits, 1.0, n), want)
    return apart


def test_one_row_is_work_for_several_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each piece is an item that a thread may draw."""
    seen: list[int] = []

    def run(kernel: Any, items: int, elements: int, *args: Any) -> None:
        seen.append(items)
        kernel(0, items, *args)

    monkeypatch.setattr(threads, "run", run)
    c = case(1, COLUMNS, torch.float32)
    out = torch.empty(len(ALL.rows), 1, dtype=arithmetic_dtype(torch.float32))
    cpu.partials(c.logits, c.target, c.weight, 1.0, 0.0, ALL, out)
    assert seen == [3]
    assert int(c.target) != IGNORED
