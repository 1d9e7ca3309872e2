"""Compiles what the engine launches, for a card that is not there, and prints what came out.

    python -m tests.engines.triton.compiler            one JSON object a line, see ``Compiled``

A driver that only knows its target takes the place of Triton's; the engine is called as always, and
its launches become compilations, through the very code that specialises and compiles on a card.
In a process of its own, since Triton decides at import whether kernels are interpreted.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import torch

from vocab_parallel_ce.engines.contract import Coefficients, Gathered, Wanted
from vocab_parallel_ce.engines.triton import engine
from vocab_parallel_ce.header import HEADER_LAYOUT

CAPABILITIES = (90, 80)
DTYPES = ("bfloat16", "float32", "float16")
COLUMNS = (16384, 5000, 1000)  # one for each shape of the engine's
ROWS = 3


@dataclass(frozen=True)
class Variant:
    """How the engine was called."""

    capability: int
    dtype: str
    columns: int
    smooth: bool = False
    weight: bool = False
    entropy: bool = False
    argmax: bool = False
    ignored_rows: bool = False
    squares: bool = False
    row_scale: bool = False
    capped: bool = False
    apart: bool = False
    """columns that are no neighbours in memory"""

    def __str__(self) -> str:
        flags = [name for name, value in asdict(self).items() if value is True]
        return " ".join([f"sm_{self.capability}", self.dtype, str(self.columns), *flags])


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of one kernel."""

    kernel: str
    variant: Variant
    warps: int
    registers: int
    spills: int
    """bytes of registers that went to memory, read and written"""
    shared: int
    """bytes of shared memory"""
    loads: int
    stores: int
    """instructions that move 128 bits of global memory"""
    atomics: int
    fused: int
    """multiplications and additions in one instruction, whose product is not rounded"""

    @property
    def threads_per_multiprocessor(self) -> int:
        """As far as registers decide: a multiprocessor has 65536, handed out by 8 a thread."""
        block = 32 * self.warps
        return 65536 // (-(-self.registers // 8) * 8 * block) * block


def variants() -> Iterator[Variant]:
    """Every combination of options on one card and two dtypes; none and all of them elsewhere."""
    for capability, dtype, columns in product(CAPABILITIES, DTYPES, COLUMNS):
        base = capability, dtype, columns
        if base[:2] == (CAPABILITIES[0], DTYPES[0]) or columns == COLUMNS[0]:
            yield Variant(*base)
            yield Variant(*base, smooth=True, weight=True, entropy=True, argmax=True)
            yield Variant(*base, capped=True, row_scale=True)
    for dtype in DTYPES[:2]:
        base = CAPABILITIES[0], dtype, COLUMNS[0]
        yield Variant(*base, apart=True)
        yield Variant(*base, ignored_rows=True)
        yield Variant(*base, entropy=True, squares=True)
        smoothing = ((False, False), (True, False), (True, True))
        for (smooth, weight), entropy, argmax in product(smoothing, (False, True), (False, True)):
            more = smooth, weight, entropy, argmax
            if any(more) and not all(more):
                yield Variant(*base, *more)


class _Target:
    """What Triton asks of a driver before it launches."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # kernels are remembered by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def _call_engine(v: Variant) -> None:
    logits = torch.zeros(ROWS, v.columns, dtype=getattr(torch, v.dtype))
    if v.apart:
        logits = logits.t().contiguous().t()
    target = torch.zeros(ROWS, dtype=torch.int64)
    weight = torch.ones(v.columns) if v.weight else None
    wanted = Wanted(v.smooth, v.entropy, v.argmax, v.squares, v.ignored_rows)
    row = torch.ones(ROWS)
    scale, cap = row if v.row_scale else 1.0, 30.0 if v.capped else 0.0
    engine.partials(logits, target, weight, scale, cap, wanted, torch.empty(len(wanted.rows), ROWS))
    if v.dtype == DTYPES[0] and v.columns == COLUMNS[0]:
        _call_row_functions(v, target, wanted)
    if v.ignored_rows or v.squares or (v.argmax and not v.entropy):
        return  # the other kernels know nothing of these
    parts = Coefficients(row, row, row if v.smooth else None, row if v.entropy else None)
    engine.gradient(logits, row, row, target, parts, weight, scale, cap, logits)
    if not v.smooth and not v.entropy:
        engine.log_prob(logits, row, row, scale, cap, logits)


def _call_row_functions(v: Variant, target: torch.Tensor, wanted: Wanted) -> None:
    """As on rank 0 of two."""
    rows = engine.ROW_FUNCTIONS
    assert rows is not None
    rows.locate(target, 0, v.columns, 2 * v.columns, -100)
    headers = torch.zeros(2, HEADER_LAYOUT.ints, dtype=torch.int32)
    buffer = torch.zeros(HEADER_LAYOUT.ints + 1, dtype=torch.int32)
    checksum = torch.zeros((), dtype=torch.int64) if v.weight else 0
    scales = torch.zeros((), dtype=torch.int64) if v.row_scale else None
    parts, shares = torch.ones(2, len(wanted.rows), ROWS), torch.ones(2)
    excuse = rows.sign(
        buffer, buffer[: HEADER_LAYOUT.static], HEADER_LAYOUT, target, parts[0], True,
        float(v.columns), checksum, None, scales, scales, v.columns, -100,
    )  # fmt: skip
    gathered = Gathered(parts, shares, headers[:, 0], headers)
    total = torch.ones(()) if v.weight else float(2 * v.columns)
    rows.conclude(gathered, wanted, target, 2 * v.columns, -100, None, total, HEADER_LAYOUT, excuse)


def _report(kernel: str, made: Any, variant: Variant, told: str) -> Compiled:
    ptx = made.asm["ptx"]

    def numbers(pattern: str) -> int:
        found = re.findall(pattern, told)
        assert found, told
        return sum(map(int, found))

    return Compiled(
        kernel,
        variant,
        made.metadata.num_warps,
        numbers(r"Used (\d+) registers"),
        numbers(r"(\d+) bytes spill"),
        made.metadata.shared,
        len(re.findall(r"ld\.global\.v4\.b32", ptx)),
        len(re.findall(r"st\.global\.v4\.b32", ptx)),
        len(re.findall(r"\b(?:atom|red)\.", ptx)),
        len(re.findall(r"\bfma\.", ptx)),
    )


def compile_all() -> Iterator[Compiled]:
    """Compile every variant."""
    import triton
    from triton import knobs
    from triton.runtime.driver import driver

    knobs.nvidia.dump_ptxas_log = True  # it prints what the assembler says of a kernel
    made: list[tuple[str, Any]] = []
    told: dict[str, str] = {}  # by the kernel's hash: one that was compiled before says nothing

    def compile_instead(kernel: Any, grid: Any) -> Any:
        def launch(*args: Any, **options: Any) -> None:
            with redirect_stdout(io.StringIO()) as said:
                compiled = kernel.warmup(*args, grid=grid, **options)
            told.setdefault(compiled.hash, said.getvalue())
            made.append((kernel.__name__, compiled))

        return launch

    triton.JITFunction.__getitem__ = compile_instead
    for variant in variants():
        driver.set_active(_Target(variant.capability))
        made.clear()
        _call_engine(variant)
        for name, result in made:
            yield _report(name, result, variant, told[result.hash])


if __name__ == "__main__":
    for compiled in compile_all():
        print(json.dumps(asdict(compiled)), flush=True)
