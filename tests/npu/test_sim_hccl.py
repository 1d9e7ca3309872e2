"""The stand-in's collectives, called through the real ProcessGroupHCCL of torch_npu."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ..ranks import WORLDS, HungError, Pool, run_fresh

DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
)
# Nothing, less than a word, odd, more than the 512 bytes torch_npu pads to, more than one slot.
SIZES = (0, 1, 7, 129, 300_001)


def _values(rank: int, size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """What a rank has: small whole numbers, exact in every dtype, sums of four included."""
    return ((torch.arange(size) * 7 + 3 * rank) % 13 - 6 + rank).to(dtype)


def _all(world: int, size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.stack([_values(rank, size, dtype) for rank in range(world)])


def _place(group: dist.ProcessGroup) -> tuple[int, int]:
    return dist.get_rank(group), dist.get_world_size(group)


def _same(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    rank = dist.get_rank()
    assert actual.device == torch.device("npu", rank)
    return actual.dtype == expected.dtype and torch.equal(actual.cpu(), expected)


def _all_reduce(group: dist.ProcessGroup, dtype: torch.dtype) -> None:
    rank, world = _place(group)
    for size in SIZES:
        every = _all(world, size, dtype)
        for operation, expected in (
            (dist.ReduceOp.SUM, every.sum(0, dtype=dtype)),
            (dist.ReduceOp.MAX, every.amax(0)),
            (dist.ReduceOp.MIN, every.amin(0)),
        ):
            value = _values(rank, size, dtype).to("npu")
            dist.all_reduce(value, operation, group=group)
            assert _same(value, expected), (size, operation)


def _gathers(group: dist.ProcessGroup, dtype: torch.dtype) -> None:
    rank, world = _place(group)
    for size in SIZES:
        every, mine = _all(world, size, dtype), _values(rank, size, dtype).to("npu")
        parts = [torch.full_like(mine, 99) for _ in range(world)]
        dist.all_gather(parts, mine, group=group)
        assert _same(torch.stack(parts), every), ("list", size)
        flat = torch.full((world * size,), 99, dtype=dtype, device="npu")
        dist.all_gather_into_tensor(flat, mine, group=group)
        assert _same(flat, every.flatten()), ("tensor", size)
        if hasattr(dist, "all_gather_single"):
            dist.all_gather_single(flat.fill_(99), mine, group=group)
            assert _same(flat, every.flatten()), ("single", size)


def _all_gather_uneven(group: dist.ProcessGroup) -> None:
    rank, world = _place(group)
    parts = [torch.full((other + 1,), 99.0, device="npu") for other in range(world)]
    dist.all_gather(parts, _values(rank, rank + 1).to("npu"), group=group)
    assert all(_same(part, _values(other, other + 1)) for other, part in enumerate(parts))


def _from_and_to_one(group: dist.ProcessGroup) -> None:
    rank, world = _place(group)
    root = world - 1
    for size in SIZES:
        every, mine = _all(world, size), _values(rank, size).to("npu")
        value = mine.clone()
        dist.broadcast(value, root, group=group)
        assert _same(value, every[root]), ("broadcast", size)
        value = mine.clone()
        dist.reduce(value, root, group=group)
        assert rank != root or _same(value, every.sum(0)), ("reduce", size)
        parts = list(every.to("npu")) if rank == root else None
        dist.scatter(value, parts, root, group=group)
        assert _same(value, every[rank]), ("scatter", size)
        parts = [torch.full_like(mine, 99) for _ in range(world)] if rank == root else None
        dist.gather(mine, parts, root, group=group)
        assert parts is None or _same(torch.stack(parts), every), ("gather", size)


def _reduce_scatter(group: dist.ProcessGroup) -> None:
    rank, world = _place(group)
    for size in SIZES:
        every = _all(world, world * size)
        expected = every.sum(0).view(world, size)[rank]
        result = torch.full((size,), 99.0, device="npu")
        dist.reduce_scatter_tensor(result, every[rank].to("npu"), group=group)
        assert _same(result, expected), ("tensor", size)
        parts = list(every[rank].view(world, size).to("npu"))
        dist.reduce_scatter(result.fill_(99.0), parts, group=group)
        assert _same(result, expected), ("list", size)


def _all_to_all(group: dist.ProcessGroup) -> None:
    rank, world = _place(group)
    for size in SIZES:
        sent = _values(rank, world * size).to("npu")
        received = torch.full((world * size,), 99.0, device="npu")
        dist.all_to_all_single(received, sent, group=group)
        every = _all(world, world * size).view(world, world, size)
        assert _same(received, every[:, rank].flatten()), size
    # Rank r sends s + 1 elements to rank s.
    total = world * (world + 1) // 2
    received = torch.full((world * (rank + 1),), 99.0, device="npu")
    dist.all_to_all_single(
        received,
        _values(rank, total).to("npu"),
        [rank + 1] * world,
        [other + 1 for other in range(world)],
        group=group,
    )
    start = rank * (rank + 1) // 2
    expected = [_values(other, total)[start : start + rank + 1] for other in range(world)]
    assert _same(received, torch.cat(expected))


def _point_to_point(group: dist.ProcessGroup) -> None:
    rank, world = _place(group)
    following, previous = (rank + 1) % world, (rank - 1) % world
    for size in SIZES[1:]:
        received = torch.full((size,), 99.0, device="npu")
        if rank == 0:
            dist.send(_values(rank, size).to("npu"), following, group=group)
        dist.recv(received, previous, group=group)
        if rank:
            dist.send(_values(rank, size).to("npu"), following, group=group)
        assert _same(received, _values(previous, size)), size


def _objects(group: dist.ProcessGroup) -> None:
    rank, world = _place(group)
    results: list[Any] = [None] * world
    dist.all_gather_object(results, {"rank": rank, "text": "x" * (100 * rank)}, group=group)
    assert [len(result["text"]) for result in results] == [100 * r for r in range(world)]
    work = dist.all_reduce(value := torch.ones(3, device="npu"), group=group, async_op=True)
    assert work is not None
    work.wait()
    dist.barrier(group=group)
    assert value.tolist() == [world] * 3
    # The shared memory has no name that could be left behind, and no file that stays open.
    links = [os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd") if _open(n)]
    assert not [link for link in links if "npu_sim" in link]


def _open(number: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{number}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("world", WORLDS)
def test_reductions(npu_pool: Pool, world: int, dtype: torch.dtype) -> None:
    npu_pool.run(_all_reduce, world, args=(dtype,))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.uint8], ids=str)
@pytest.mark.parametrize("world", WORLDS)
def test_all_gather_in_every_form(npu_pool: Pool, world: int, dtype: torch.dtype) -> None:
    npu_pool.run(_gathers, world, args=(dtype,))


@pytest.mark.parametrize(
    "case", [_all_gather_uneven, _from_and_to_one, _reduce_scatter, _all_to_all, _objects]
)
@pytest.mark.parametrize("world", WORLDS)
def test_other_collectives(npu_pool: Pool, world: int, case: Callable[..., None]) -> None:
    npu_pool.run(case, world)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_point_to_point(npu_pool: Pool, world: int) -> None:
    npu_pool.run(_point_to_point, world)


def _halves(group: dist.ProcessGroup, dtype: torch.dtype) -> tuple[list[float], list[float]]:
    rank, _ = _place(group)
    generator = torch.Generator().manual_seed(rank)
    mine = (torch.randn(1000, generator=generator) * 100).to(dtype)
    value = mine.to("npu")
    dist.all_reduce(value, group=group)
    return mine.float().tolist(), value.float().tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_halves_are_rounded_as_torch_rounds(npu_pool: Pool, dtype: torch.dtype) -> None:
    results = npu_pool.run(_halves, 3, args=(dtype,))
    total = torch.tensor(results[0][0], dtype=dtype)
    for mine, _ in results[1:]:
        total = total + torch.tensor(mine, dtype=dtype)
    assert [result for _, result in results] == [total.float().tolist()] * 3


def _nan_and_infinity(group: dist.ProcessGroup) -> list[list[float]]:
    rank, _ = _place(group)
    nan, inf = float("nan"), float("inf")
    mine = torch.tensor([[nan, 1.0, -inf, inf], [1.0, nan, -inf, -inf]][rank], device="npu")
    results = []
    for operation in (dist.ReduceOp.MAX, dist.ReduceOp.SUM):
        value = mine.clone()
        dist.all_reduce(value, operation, group=group)
        results.append(value.tolist())
    return results


def test_nan_and_infinity_survive(npu_pool: Pool) -> None:
    nan, inf = float("nan"), float("inf")
    for largest, total in npu_pool.run(_nan_and_infinity, 2):
        assert str(largest) == str([nan, nan, -inf, inf])
        assert str(total) == str([nan, nan, -inf, nan])


def _refused(group: dist.ProcessGroup, dtype: torch.dtype, operation: str) -> None:
    value = torch.ones(3, dtype=dtype).to("npu")
    assert value.dtype == dtype
    dist.all_reduce(value, getattr(dist.ReduceOp, operation), group=group)


@pytest.mark.parametrize(
    ("dtype", "operation", "message"),
    [
        (torch.bfloat16, "PRODUCT", "all_reduce does not reduce bfloat16 with prod"),
        (torch.int16, "PRODUCT", "all_reduce does not reduce int16 with prod"),
        (torch.float32, "BAND", "Cannot use ReduceOp.BAND with HCCL"),
    ],
)
def test_what_hccl_does_not_reduce(
    npu_pool: Pool, dtype: torch.dtype, operation: str, message: str
) -> None:
    for outcome in npu_pool.outcomes(_refused, 2, args=(dtype, operation)):
        assert outcome.kind == "RuntimeError"
        assert message in outcome.error


def _refused_fp64(group: dist.ProcessGroup) -> None:
    dist.all_reduce(torch.ones(3, dtype=torch.float64, device="npu"), group=group)


def test_fp64_is_refused(npu_pool: Pool) -> None:
    for outcome in npu_pool.outcomes(_refused_fp64, 2):
        assert "Unsupported data type at::kDouble" in outcome.error


def _disagree(group: dist.ProcessGroup, what: str) -> None:
    odd = dist.get_rank(group) == 1
    value = torch.ones(
        4 if odd and what == "count" else 3,
        dtype=torch.int32 if odd and what == "dtype" else torch.float32,
        device="npu",
    )
    if odd and what == "collective":
        dist.broadcast(value, 0, group=group)
    elif odd and what == "operation":
        dist.all_reduce(value, dist.ReduceOp.MAX, group=group)
    else:
        dist.all_reduce(value, group=group)


@pytest.mark.parametrize(
    ("what", "second"),
    [
        ("count", "all_reduce(count=4, float32, sum)"),
        ("dtype", "all_reduce(count=3, int32, sum)"),
        ("operation", "all_reduce(count=3, float32, max)"),
        ("collective", "broadcast(count=3, float32, root=0)"),
    ],
)
def test_ranks_that_disagree_are_told(npu_pool: Pool, what: str, second: str) -> None:
    line = (
        "npu_sim: ranks disagree: rank 0 called all_reduce(count=3, float32, sum), "
        f"rank 1 called {second}"
    )
    outcomes = npu_pool.outcomes(_disagree, 3, args=(what,))
    assert [line in outcome.error for outcome in outcomes] == [True] * 3


def _leave_early(group: dist.ProcessGroup, how: str) -> float:
    dist.all_reduce(torch.ones(3, device="npu"), group=group)
    if dist.get_rank(group) == 1:
        if how == "dies":
            os._exit(3)
        return 0.0
    start = time.monotonic()
    try:
        dist.all_reduce(torch.ones(3, device="npu"), group=group)
    except RuntimeError as problem:
        raise RuntimeError(f"after {time.monotonic() - start:.1f} s: {problem}") from None
    raise AssertionError("the other rank never came")


def test_a_rank_that_dies_is_noticed_at_once() -> None:
    with pytest.raises(HungError, match="rank 1 died") as caught:
        run_fresh(_leave_early, 2, ("dies",), device_type="npu")
    assert "all_reduce: rank 1 of 2 (process " in str(caught.value)
    assert ") is gone" in str(caught.value)
    assert "after 0." in str(caught.value)


def test_a_rank_that_never_comes_is_waited_for_in_vain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NPU_SIM_HCCL_TIMEOUT", "1.5")
    waiting, absent = run_fresh(_leave_early, 2, ("stays away",), device_type="npu")
    assert not absent.kind
    assert "all_reduce: rank 1 of 2 did not come within 1.5 s" in waiting.error
    assert "after 1." in waiting.error
