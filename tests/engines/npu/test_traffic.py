"""The table of what a card's kernels move, and the scratch that fits its cache: arithmetic."""

from __future__ import annotations

import pytest

from vocab_parallel_ce.engines.npu import chunks, max_sum, operator
from vocab_parallel_ce.engines.npu.traffic import (
    Operand,
    Step,
    UnknownTrafficError,
    moved,
    of_step,
)
from vocab_parallel_ce.switches import SCRATCH_MIB

MIB = 1 << 20


def test_the_table_by_hand() -> None:
    """A million elements: reads and writes in MB."""
    million = 10**6
    bf16, fp32, rows = Operand(million, 2), Operand(million, 4), Operand(1000, 4)
    strided = Operand(million, 2, dense=False)

    def megabytes(name: str, reads: list[Operand], writes: list[Operand]) -> tuple[int, int]:
        found = moved(name, reads, writes)
        return round(found.read / million), round(found.written / million)

    assert megabytes("add", [bf16, rows], [fp32]) == (2, 4)
    assert megabytes("sub", [bf16, rows], [fp32]) == (6, 8)
    assert megabytes("npu_cross_entropy_loss", [fp32, rows], [rows, fp32]) == (12, 4)
    assert megabytes("scatter_", [rows, bf16], [bf16]) == (2, 2)
    assert megabytes("put_", [rows, rows, bf16], [bf16]) == (0, 0)
    assert megabytes("gather", [bf16, rows], [rows]) == (0, 0)
    assert megabytes("amax", [strided], [rows]) == (4, 2)
    assert megabytes("clone", [strided], [bf16]) == (2, 2)
    assert megabytes("copy_", [fp32], [strided]) == (6, 4)
    assert of_step(Step("copy_", "fp32", "logits", unless_fp32=True), 4).bytes == 0


@pytest.mark.parametrize("name", ["no_such_operator", "index_put_", "logsumexp"])
def test_what_is_unknown_is_said(name: str) -> None:
    with pytest.raises(UnknownTrafficError, match=name):
        moved(name, [], [])


@pytest.mark.parametrize("way", [max_sum, operator], ids=["max_sum", "operator"])
def test_the_steps_of_a_way_are_in_the_table(way: object) -> None:
    for step in (*way.FORWARD, *way.BACKWARD):  # type: ignore[attr-defined]
        assert of_step(step, 2).bytes > 0
        assert step.operator not in ("scatter_", "index_put_")


@pytest.mark.parametrize(
    ("cache", "mib"), [(192, 88), (168, 76), (96, 40), (16, 16), (1, 16), (None, SCRATCH_MIB)]
)
def test_scratch_follows_the_card(cache: int | None, mib: int) -> None:
    assert chunks.scratch_for_cache(None if cache is None else cache * MIB) == mib * MIB
