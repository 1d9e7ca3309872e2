"""Each kernel that a way is made of, alone: seconds, and the bytes of the engine's table a second.

What a table of a card's kernels cannot know and only a card says: the rate of each, what the cache
answers, what a launch costs, how exact the device's exponential is. A kernel that fails says so and
the others go on.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vocab_parallel_ce.engines.npu import max_sum, operator
from vocab_parallel_ce.engines.npu.traffic import Operand, UnknownTrafficError, moved
from vocab_parallel_ce.launch.doctor.worker import in_one_line
from vocab_parallel_ce.launch.measuring.clock import steps_seconds
from vocab_parallel_ce.launch.measuring.device import synchronize

MIB = 1 << 20
LAUNCHES = 200


@dataclass(frozen=True)
class Block:
    """One kernel, or one figure: what was found, or why nothing was."""

    what: str
    shape: str
    seconds: float | None = None
    bytes: int | None = None
    """by the table; None: unknown"""
    value: float | None = None
    """of what is no time"""
    problem: str = ""

    @property
    def bytes_per_s(self) -> float | None:
        return self.bytes / self.seconds if self.bytes and self.seconds else None


@dataclass(frozen=True)
class Sizes:
    rows: int = 2048
    columns: tuple[int, ...] = (16_384, 16_000)
    tiles: tuple[int, ...] = (16_000, 16_384, 19_000)
    """columns for the fused kernel, whose own tile is 16,000"""
    copies_mib: tuple[int, ...] = (64, 2048)
    """what fits a card's cache, and what does not"""
    repeats: int = 11


QUICK = Sizes(16, (256, 250), (250, 256), (1, 2), 2)


def measure(device: torch.device, sizes: Sizes) -> Iterator[Block]:
    """Everything, a block at a time."""
    yield from _launches(device)
    for mib in sizes.copies_mib:
        yield from _copy(device, mib, sizes.repeats)
    for dtype in (torch.bfloat16, torch.float32):
        for columns in sizes.columns:
            yield from _sweeps(device, sizes.rows, columns, dtype, sizes.repeats)
        for columns in sizes.tiles:
            yield from _fused(device, sizes.rows, columns, dtype, sizes.repeats)
    yield from _exactness(device)


def _time(device: torch.device, run: Callable[[], object], repeats: int) -> float:
    run()
    return statistics.median(steps_seconds(device, run)[0] for _ in range(repeats))


def _block(
    device: torch.device,
    what: str,
    shape: str,
    run: Callable[[], object],
    repeats: int,
    table: tuple[str, list[Tensor], list[Tensor]] | None,
) -> Block:
    """``table``: the operator's name, what it reads, what it writes; None: bytes unknown."""
    size = None
    if table is not None:
        name, reads, writes = table
        try:
            size = moved(name, _operands(reads), _operands(writes)).bytes
        except UnknownTrafficError:
            size = None
    try:
        return Block(what, shape, _time(device, run, repeats), size)
    except Exception as problem:  # a kernel that is not there, too little memory, anything
        return Block(what, shape, problem=in_one_line(problem))


def _operands(tensors: list[Tensor]) -> list[Operand]:
    return [Operand(t.numel(), t.itemsize, t.is_contiguous()) for t in tensors]


def _launches(device: torch.device) -> Iterator[Block]:
    """A kernel on one element, many times: on the host's clock while it queues, and to its end."""
    x = torch.zeros(1, device=device)
    x.add_(1.0)
    synchronize(device)
    started = time.perf_counter()
    for _ in range(LAUNCHES):
        x.add_(1.0)
    queued = time.perf_counter() - started
    synchronize(device)
    ended = time.perf_counter() - started
    yield Block("launch: host", "1", queued / LAUNCHES)
    yield Block("launch: host and device", "1", ended / LAUNCHES)


def _copy(device: torch.device, mib: int, repeats: int) -> Iterator[Block]:
    what, shape = "copy", f"{mib} MiB"
    try:
        source = torch.zeros(mib * MIB // 4, device=device)
        target = torch.empty_like(source)
    except Exception as problem:
        yield Block(what, shape, problem=in_one_line(problem))
        return
    table = ("copy_", [source], [target])
    yield _block(device, what, shape, lambda: target.copy_(source), repeats, table)


def _sweeps(
    device: torch.device, rows: int, columns: int, dtype: torch.dtype, repeats: int
) -> Iterator[Block]:
    """The torch calls of both ways, and those that they avoid."""
    x = torch.linspace(-8, 8, rows * columns).view(rows, columns).to(device, dtype)
    wide = torch.empty(rows, columns, device=device)
    vector, narrow = torch.ones(rows, 1, device=device), torch.empty_like(x)
    reduced = torch.empty(rows, device=device)
    index = (torch.arange(rows) * 7 % columns).to(device)
    flat = index + torch.arange(rows).to(device) * columns
    values = torch.zeros(rows, dtype=dtype, device=device)
    mask = (index % 2 == 0)[:, None]
    column, every = index[:, None], torch.arange(rows).to(device)
    where = torch.stack([every, index], 1)
    shape = f"[{rows}, {columns}] {str(dtype).removeprefix('torch.')}"

    def scatter_nd() -> object:
        import torch_npu

        return torch_npu.npu_scatter_nd_update_(narrow, where, values)

    def put_deterministic() -> object:
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            return narrow.view(-1).put_(flat, values)
        finally:
            torch.use_deterministic_algorithms(before)

    def the_operator() -> object:
        return operator.call(wide, index)

    few = [flat, values]
    runs: list[tuple[str, Callable[[], object], tuple[str, list[Tensor], list[Tensor]] | None]] = [
        ("amax", lambda: x.amax(1), ("amax", [x], [reduced])),
        ("max", lambda: x.max(1), ("max", [x], [reduced, index])),
        ("add, fp32 result", lambda: torch.add(x, vector), ("add", [x, vector], [wide])),
        ("sub, fp32 result", lambda: torch.sub(x, vector), ("sub", [x, vector], [wide])),
        ("cast from fp32", lambda: narrow.copy_(wide), ("copy_", [wide], [narrow])),
        ("exp_, fp32", lambda: wide.exp_(), ("exp_", [wide], [wide])),
        ("mul_, fp32", lambda: wide.mul_(vector), ("mul_", [wide, vector], [wide])),
        ("sum, fp32", lambda: wide.sum(1), ("sum", [wide], [reduced])),
        ("masked_fill_", lambda: narrow.masked_fill_(mask, 0.0),
         ("masked_fill_", [narrow, mask], [narrow])),
        ("gather", lambda: x.gather(1, column), ("gather", [x, index], [values])),
        ("scatter_", lambda: narrow.scatter_(1, column, 0.0),
         ("scatter_", [narrow, index], [narrow])),
        ("put_", lambda: narrow.view(-1).put_(flat, values), ("put_", [*few, narrow], [narrow])),
        ("put_, deterministic", put_deterministic, ("put_", [*few, narrow], [narrow])),
        ("index_put_", lambda: narrow.index_put_((every, index), values), None),
        ("npu_scatter_nd_update_", scatter_nd, None),
        ("npu_cross_entropy_loss, fp32", the_operator,
         ("npu_cross_entropy_loss", [wide, index], [wide, reduced])),
    ]  # fmt: skip
    for what, run, table in runs:
        wide.copy_(x)
        yield _block(device, what, shape, run, repeats, table)


def _fused(
    device: torch.device, rows: int, columns: int, dtype: torch.dtype, repeats: int
) -> Iterator[Block]:
    x = torch.zeros(rows, columns, dtype=dtype, device=device)
    wide, ones = torch.empty(rows, columns, device=device), torch.ones(rows, device=device)
    shape = f"[{rows}, {columns}] {str(dtype).removeprefix('torch.')}"
    if max_sum.operator() is None:
        yield Block("fused max_sum", shape, problem="torch_npu has it by neither name")
        return
    table = (max_sum.NAMES[0], [x, ones, ones, ones], [wide, ones])
    yield _block(
        device, "fused max_sum", shape, lambda: max_sum.fused(x, ones, ones), repeats, table
    )


def _exactness(device: torch.device) -> Iterator[Block]:
    """The largest errors of the device's own functions, in units in the last place of fp32."""
    x = torch.linspace(-80.0, 0.0, 100_001)
    eps = torch.finfo(torch.float32).eps
    for name, function in (("exp", torch.exp), ("1 / x", torch.reciprocal)):
        given = x if name == "exp" else x - 1.0
        exact = function(given.double())
        try:
            found = function(given.to(device)).cpu().double()
        except Exception as problem:
            yield Block(f"largest error of {name}", "fp32", problem=in_one_line(problem))
            continue
        off = float(((found - exact).abs() / exact.abs()).max()) / eps
        yield Block(f"largest error of {name}", "fp32, in eps", value=off)
