"""What one call of the loss does to memory and to the wire, way by way.

Notation: N rows, C the columns of a rank's shard, W ranks, k = 3 floats a row that are exchanged,
b bytes an element of the logits. A sweep touches all N * C elements once; what is of size [N] is
left out of the time (it is 4 k of b C bytes a row) and counted in the memory.

**ours** (engines/contract.py): statistics in one read, the gradient in one read and one write:

    bytes an element    b + 2 b       held  16 a row (m, s, the target's column)
    at peak             64 + 4 k (W + 1) a row, and b N C for the gradient unless it is in place
    collectives         one all_gather of 4 (k N + header), or two all_reduces above the limit of
                        collectives.py

The npu engine makes more sweeps over chunks of rows, with scratch memory of its own. Its ways list
their kernels (``FORWARD`` and ``BACKWARD`` in engines/npu/max_sum.py and operator.py), and
engines/npu/traffic.py says what each of them reads and writes; the tests count the same on a
stand-in. How many of the bytes the card's cache answers was never seen, so max_sum is given twice:
as if none were, and, named "all in cache", as if every chunk were read and written once. The truth
lies between. The operator is what a CANN before 8.5.0 leaves.

**Megatron unfused** (megatron-core 0.16.1, core/tensor_parallel/cross_entropy.py), one eager
kernel after another. The logits are widened to fp32 unless they are fp32, in which case they are
overwritten; that copy becomes the softmax, is kept for backward, and is the gradient there:

    forward, bytes      widen b + 4; max 4; subtract 8; exp 8; sum 4; divide 8
    backward            multiply 8; autograd narrows the gradient, 4 + b
    held                4 N C + 9 a row; at peak 2 N C more        (fp32: nothing but the rows)
    collectives         three all_reduces of 4 N

**Megatron fused** (core/fusions/fused_cross_entropy.py), the same functions through torch.compile.
Sweeps are those of the code that inductor of torch 2.13 generates for logits [s, b, v], which is
what Megatron passes (for [N, v] it finds that it needs no copy of the softmax):

    forward, bytes      widen b + 4 (nothing for fp32); max 4; subtract, exp and sum 8; divide 8
    backward            copy the softmax 8; multiply, narrow to bf16 whatever the logits are, and
                        write back 10; autograd casts 2 + b unless they are bf16
    held                4 N C + 9 a row (fp32: the rows); at peak the copy and the bf16 gradient
                        beside it, 6 N C
    collectives         two all_reduces, of 4 N and of 8 N

Where no compiler serves the device (on NPUs jit_fuser is assumed to be off), the eager sweeps with
the explicit cast, and no copy of the softmax.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from vocab_parallel_ce.collectives import GATHER_LIMIT_BYTES
from vocab_parallel_ce.engines.npu import max_sum, operator
from vocab_parallel_ce.engines.npu.traffic import Step, of_step
from vocab_parallel_ce.header import HEADER_INTS
from vocab_parallel_ce.launch.bench.rank import DTYPES
from vocab_parallel_ce.launch.measuring.collectives import PARTIALS
from vocab_parallel_ce.launch.plan.devices import MIB
from vocab_parallel_ce.switches import SCRATCH_MIB

Kind = Literal["all_gather", "all_reduce"]
ROW_SCRATCH = 64  # bytes a row of [N] vectors at peak, whoever computes the loss


@dataclass(frozen=True)
class Case:
    """One call: N rows, the vocabulary of all ranks, how many they are, and the logits' dtype."""

    rows: int
    vocab: int
    ranks: int
    dtype: str

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype].itemsize

    @property
    def elements(self) -> int:
        """of one rank's shard"""
        return self.rows * (self.vocab // self.ranks)


@dataclass(frozen=True)
class Sweep:
    """Every element of the shard once: bytes an element, and what bounds it beside memory."""

    what: str
    read: int
    written: int
    fresh: int = 0
    """of the written, to memory that was just allocated"""
    rate: str = ""
    """the name of the rate (``Device.rates``) at which it can compute"""


@dataclass(frozen=True)
class Collective:
    kind: Kind
    bytes: int
    """that each rank contributes"""


@dataclass(frozen=True)
class Way:
    """One way to compute the loss of a case. ``name`` is the benchmark's name of it."""

    name: str
    label: str
    forward: tuple[Sweep, ...]
    backward: tuple[Sweep, ...]
    collectives: tuple[Collective, ...]
    """all of them in forward"""
    held: int
    """bytes of one rank beside the logits, from forward to backward"""
    peak: int
    """the same at the highest point"""


def ways(case: Case, engine: str, compiles: bool) -> tuple[Way, ...]:
    """Ours in place and out of place, Megatron unfused and fused."""
    ours = [_ours(case, engine, inplace) for inplace in (True, False)]
    if engine == "npu":
        ours = [row for way in ours for row in (way, _all_in_cache(way, case))]
        ours.append(_by_operator(_ours(case, engine, inplace=True), case))
    return (*ours, _unfused(case), _fused(case, compiles))


# --- ours -------------------------------------------------------------------------------------


def _ours(case: Case, engine: str, inplace: bool) -> Way:
    b, n = case.itemsize, case.rows
    fresh = 0 if inplace else b
    forward: tuple[Sweep, ...] = (Sweep("statistics", b, 0, rate="partials"),)
    backward: tuple[Sweep, ...] = (Sweep("gradient", b, b, fresh, rate="gradient"),)
    scratch = 0
    if engine == "npu":
        forward, backward = _sweeps(max_sum.FORWARD, b), _sweeps(max_sum.BACKWARD, b)
        scratch = SCRATCH_MIB * MIB
    row_bytes = ROW_SCRATCH + 4 * PARTIALS * (case.ranks + 1)
    return Way(
        "ours-inplace" if inplace else "ours",
        "ours, in place" if inplace else "ours, out of place",
        forward,
        backward,
        _our_collectives(case),
        held=16 * n,
        peak=row_bytes * n + fresh * case.elements + scratch,
    )


def _sweeps(steps: tuple[Step, ...], b: int) -> tuple[Sweep, ...]:
    """What the kernels of an npu way move."""
    moved = [(step.operator, of_step(step, b)) for step in steps]
    return tuple(Sweep(name, m.read, m.written) for name, m in moved if m.bytes)


def _by_operator(way: Way, case: Case) -> Way:
    return replace(
        way,
        name=f"{way.name}-operator",
        label=f"{way.label}, way operator",
        forward=_sweeps(operator.FORWARD, case.itemsize),
        backward=_sweeps(operator.BACKWARD, case.itemsize),
    )


def _all_in_cache(way: Way, case: Case) -> Way:
    b = case.itemsize
    return replace(
        way,
        name=f"{way.name}-cached",
        label=f"{way.label}, all in cache",
        forward=(Sweep("statistics", b, 0),),
        backward=(Sweep("gradient", b, b),),
    )


def _our_collectives(case: Case) -> tuple[Collective, ...]:
    if case.ranks == 1:
        return ()
    vectors = 4 * PARTIALS * case.rows
    if case.ranks * vectors <= GATHER_LIMIT_BYTES:
        return (Collective("all_gather", vectors + 4 * (HEADER_INTS + 1)),)
    headers = 4 * case.ranks * 2 * HEADER_INTS
    return (
        Collective("all_reduce", 4 * case.rows),
        Collective("all_reduce", 4 * (PARTIALS - 1) * case.rows + headers),
    )


# --- Megatron's -------------------------------------------------------------------------------

_EAGER = (
    Sweep("max", 4, 0, rate="max"),
    Sweep("subtract", 4, 4),
    Sweep("exp", 4, 4, rate="exp"),
    Sweep("sum", 4, 0),
    Sweep("divide", 4, 4),
)
_MULTIPLY = Sweep("multiply", 4, 4)
_SAVED_ROWS = 9  # bytes a row: the mask and the masked target


def _widen(b: int) -> tuple[Sweep, ...]:
    return () if b == 4 else (Sweep("widen", b, 4, fresh=4),)


def _reduces(case: Case, *floats: int) -> tuple[Collective, ...]:
    """On a group of one rank too: Megatron does not ask."""
    return tuple(Collective("all_reduce", 4 * count * case.rows) for count in floats)


def _unfused(case: Case) -> Way:
    b, n, e = case.itemsize, case.rows, case.elements
    narrow = () if b == 4 else (Sweep("narrow", 4, b, fresh=b),)
    softmax = 0 if b == 4 else 4
    return Way(
        "megatron",
        "Megatron-core unfused",
        (*_widen(b), *_EAGER),
        (_MULTIPLY, *narrow),
        _reduces(case, 1, 1, 1),
        held=softmax * e + _SAVED_ROWS * n,
        peak=(softmax + (0 if b == 4 else b)) * e + ROW_SCRATCH * n,
    )


def _fused(case: Case, compiles: bool) -> Way:
    b, n, e = case.itemsize, case.rows, case.elements
    bf16 = case.dtype == "bf16"
    cast = () if bf16 else (Sweep("cast by autograd", 2, b, fresh=b),)
    softmax = 0 if b == 4 else 4
    if compiles:
        forward = (
            *_widen(b),
            Sweep("max", 4, 0),
            Sweep("subtract, exp and sum", 4, 4),
            Sweep("divide", 4, 4),
        )
        backward = (
            Sweep("copy the softmax", 4, 4, fresh=4),
            Sweep("multiply and narrow", 4, 2 + 4, fresh=2),
            *cast,
        )
        # The copy is gone when autograd casts the bf16 gradient.
        beside = max(4 + 2, 0 if bf16 else 2 + b)
    else:
        forward = (*_widen(b), *_EAGER)
        backward = (_MULTIPLY, Sweep("narrow", 4, 2, fresh=2), *cast)
        beside = 2 if bf16 else 2 + b
    return Way(
        "megatron-fused",
        "Megatron-core fused",
        forward,
        backward,
        _reduces(case, 1, 2),
        held=softmax * e + _SAVED_ROWS * n,
        peak=(softmax + beside) * e + ROW_SCRATCH * n,
    )
