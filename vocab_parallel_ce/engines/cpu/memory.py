"""Between memory and lanes: what is stored becomes what is computed with, and back.

bf16 and fp16 are widened to fp32 in registers, and rounded to nearest even on the way back, by
integer operations. Addresses are integers, so one compilation serves every layout.
"""

# Half of Numba's extension interface has no type hints.
# mypy: disallow-untyped-calls=False

from __future__ import annotations

import math
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types

from vocab_parallel_ce.engines.cpu.compiling import operation
from vocab_parallel_ce.engines.cpu.lanes import (
    F32,
    F64,
    I16,
    I32,
    LANES,
    STORED,
    Lanes,
    arithmetic_of,
    constant,
    like,
    vector,
)

PAIR = 2 * LANES  # what load_pair reads
BLOCK = 1024  # elements worked on while they stay in the first-level cache
_MINUS_INFINITY = {types.uint16: 0xFF80, types.int16: 0xFC00}  # bits of bf16 and of fp16
CACHE_LINE = 64  # bytes, or a divisor of what the processor has
AHEAD = 4096  # bytes between what is computed and what is asked of memory: behind arithmetic alone
# the processor's own prefetcher is late. The next rows lie behind this one, so it spans their ends.

# Conversion between what is stored and what is computed with, for one element or for LANES


def _widen(builder: Any, raw: Any, token: Any) -> Any:
    if token not in (types.uint16, types.int16):
        return raw
    bits, integer, real = raw, raw.type, like(raw.type, F32)

    def const(value: int) -> Any:
        return constant(integer, value)

    if token == types.uint16:
        return builder.bitcast(builder.shl(bits, const(16)), real)
    sign = builder.shl(builder.and_(bits, const(0x8000)), const(16))
    magnitude = builder.shl(builder.and_(bits, const(0x7FFF)), const(13))
    normal = builder.add(magnitude, const((127 - 15) << 23))
    # 2^-14 (1 + f) - 2^-14 is exact, and no operand is subnormal in fp32.
    shifted = builder.bitcast(builder.add(magnitude, const((127 - 14) << 23)), real)
    tiny = builder.bitcast(builder.fsub(shifted, constant(real, 2.0**-14)), integer)
    endless = builder.add(magnitude, const((255 - 31) << 23))
    finite = builder.icmp_unsigned("<", magnitude, const(31 << 23))
    subnormal = builder.icmp_unsigned("<", magnitude, const(1 << 23))
    bits = builder.select(subnormal, tiny, builder.select(finite, normal, endless))
    return builder.bitcast(builder.or_(bits, sign), real)


def _narrow(builder: Any, value: Any, token: Any, clean: bool = False) -> Any:
    """The stored bits. ``clean``: a NaN has zeros where bf16 has no bits, and survives rounding."""
    if token not in (types.uint16, types.int16):
        return value
    integer, real = like(value.type, I32), value.type

    def const(number: int) -> Any:
        return constant(integer, number)

    bits = builder.bitcast(value, integer)
    nan = builder.fcmp_unordered("uno", value, value)

    def round_off(number: Any, dropped: int) -> Any:
        odd = builder.and_(builder.lshr(number, const(dropped)), const(1))
        half = builder.add(const((1 << (dropped - 1)) - 1), odd)
        return builder.lshr(builder.add(number, half), const(dropped))

    if token == types.uint16:
        if clean:
            return round_off(bits, 16)
        quiet = builder.or_(builder.lshr(bits, const(16)), const(0x40))
        return builder.select(nan, quiet, round_off(bits, 16))
    sign = builder.and_(builder.lshr(bits, const(16)), const(0x8000))
    magnitude = builder.and_(bits, const(0x7FFFFFFF))
    normal = round_off(builder.sub(magnitude, const((127 - 15) << 23)), 13)
    overflow = builder.icmp_unsigned(">", normal, const(0x7C00))
    normal = builder.select(overflow, const(0x7C00), normal)
    # One unit in the last place of 0.5 is the smallest fp16: the addition rounds to nearest even.
    shifted = builder.fadd(builder.bitcast(magnitude, real), constant(real, 0.5))
    tiny = builder.sub(builder.bitcast(shifted, integer), const(126 << 23))
    subnormal = builder.icmp_unsigned("<", magnitude, const((127 - 14) << 23))
    stored = builder.select(subnormal, tiny, normal)
    return builder.or_(builder.select(nan, const(0x7E00), stored), sign)


# Memory


def _pointer(builder: Any, address: Any, kind: Any) -> Any:
    return builder.inttoptr(address, kind.as_pointer())


def _load(builder: Any, address: Any, token: Any, wide: bool) -> Any:
    element, size = STORED[token]
    kind = vector(element) if wide else element
    raw = builder.load(_pointer(builder, address, kind), align=size)
    if element == I16:
        raw = builder.zext(raw, like(kind, I32))
    return _widen(builder, raw, token)


def _store(builder: Any, address: Any, value: Any, token: Any) -> None:
    element, size = STORED[token]
    raw = _narrow(builder, value, token)
    if element == I16:
        raw = builder.trunc(raw, like(raw.type, I16))
    builder.store(raw, _pointer(builder, address, raw.type), align=size)


@operation
def load(typing: Any, address: Any, token: Any) -> Any:
    """LANES consecutive elements."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _load(builder, args[0], token, wide=True)

    return Lanes(arithmetic_of(token))(types.int64, token), codegen


@operation
def store(typing: Any, address: Any, value: Any, token: Any) -> Any:
    """Round and write LANES consecutive elements."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        _store(builder, args[0], args[1], token)
        return context.get_dummy_value()

    return types.void(types.int64, value, token), codegen


@operation
def load_pair(typing: Any, address: Any, token: Any) -> Any:
    """PAIR consecutive elements as two Lanes, in an order of its own.

    16-bit elements are read two to a 32-bit integer, which saves widening and packing them.
    """
    lanes = Lanes(arithmetic_of(token))
    pair = types.UniTuple(lanes, 2)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        element, size = STORED[token]
        kind = vector(I32 if size == 2 else element)
        raw = builder.load(_pointer(builder, args[0], kind), align=size)
        if size == 2:
            sixteen = constant(kind, 16)
            low = builder.lshr(builder.shl(raw, sixteen), sixteen)
            halves = [low, builder.lshr(raw, sixteen)]
        else:
            offset = ir.Constant(args[0].type, LANES * size)
            second = _pointer(builder, builder.add(args[0], offset), kind)
            halves = [raw, builder.load(second, align=size)]
        values = [_widen(builder, half, token) for half in halves]
        return context.make_tuple(builder, pair, values)

    return pair(types.int64, token), codegen


@operation
def store_pair(typing: Any, address: Any, a: Any, b: Any, token: Any) -> Any:
    """Round and write what ``load_pair`` read. A bf16 NaN must be ``clean`` (see _narrow)."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        size = STORED[token][1]
        low, high = (_narrow(builder, value, token, clean=True) for value in args[1:3])
        kind = low.type
        if size == 2:
            low = builder.or_(low, builder.shl(high, constant(kind, 16)))
        else:
            offset = ir.Constant(args[0].type, LANES * size)
            second = _pointer(builder, builder.add(args[0], offset), kind)
            builder.store(high, second, align=size)
        builder.store(low, _pointer(builder, args[0], kind), align=size)
        return context.get_dummy_value()

    return types.void(types.int64, a, b, token), codegen


def _first_lanes(builder: Any, count: Any) -> Any:
    """Which lanes are the first ``count``: all, some or none."""
    kind = vector(I32)
    number = builder.trunc(count, I32)
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), number, ir.Constant(I32, 0))
    zeros = ir.Constant(kind, [ir.Constant(I32, 0)] * LANES)
    counts = builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), zeros)
    places = ir.Constant(kind, [ir.Constant(I32, lane) for lane in range(LANES)])
    return builder.icmp_signed("<", places, counts)


def _masked(builder: Any, operation: str, result: Any, kind: Any, args: list[Any]) -> Any:
    """Call llvm.masked.load or .store of vectors of this ``kind``."""
    element = kind.element
    width = element.width if isinstance(element, ir.IntType) else {F32: 32, F64: 64}[element]
    letter = "i" if isinstance(element, ir.IntType) else "f"
    # LLVM puts the name right where pointers have types, and drops the alignment after version 21.
    name = f"llvm.masked.{operation}.v{LANES}{letter}{width}.p0"
    prototype = ir.FunctionType(result, [arg.type for arg in args])
    function = cgutils.get_or_insert_function(builder.module, prototype, name)
    return builder.call(function, args)


@operation
def load_first(typing: Any, address: Any, count: Any, token: Any) -> Any:
    """The first ``count`` of LANES elements, -inf behind them; what is there is not touched."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        element, size = STORED[token]
        kind = vector(element)
        nothing = constant(kind, _MINUS_INFINITY.get(token, -math.inf))
        place, mask = _pointer(builder, args[0], kind), _first_lanes(builder, args[1])
        raw = _masked(builder, "load", kind, kind, [place, ir.Constant(I32, size), mask, nothing])
        if element == I16:
            raw = builder.zext(raw, vector(I32))
        return _widen(builder, raw, token)

    return Lanes(arithmetic_of(token))(types.int64, types.int64, token), codegen


@operation
def store_first(typing: Any, address: Any, value: Any, count: Any, token: Any) -> Any:
    """Round LANES elements and write the first ``count`` of them."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        element, size = STORED[token]
        raw = _narrow(builder, args[1], token)
        if element == I16:
            raw = builder.trunc(raw, vector(I16))
        place, mask = _pointer(builder, args[0], raw.type), _first_lanes(builder, args[2])
        _masked(
            builder, "store", ir.VoidType(), raw.type,
            [raw, place, ir.Constant(I32, size), mask],
        )  # fmt: skip
        return context.get_dummy_value()

    return types.void(types.int64, value, types.int64, token), codegen


@operation
def prefetch(typing: Any, address: Any, token: Any) -> Any:
    """Ask for the PAIR elements that lie AHEAD of ``address``; no fault wherever that is."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        byte = ir.IntType(8)
        # LLVM puts the name right where pointers have types (before its version 15).
        numbers = [I32] * 3  # read or write, how near to the processor, data or instructions
        prototype = ir.FunctionType(ir.VoidType(), [byte.as_pointer(), *numbers])
        function = cgutils.get_or_insert_function(builder.module, prototype, "llvm.prefetch.p0")
        for offset in range(0, PAIR * STORED[token][1], CACHE_LINE):
            place = builder.add(args[0], ir.Constant(args[0].type, AHEAD + offset))
            builder.call(
                function,
                [_pointer(builder, place, byte), *(ir.Constant(I32, n) for n in (0, 3, 1))],
            )
        return context.get_dummy_value()

    return types.void(types.int64, token), codegen


@operation
def read(typing: Any, address: Any, token: Any) -> Any:
    """One element: as the arithmetic type, or as it is if the token is a wider integer."""
    result = token if token in (types.int32, types.int64) else arithmetic_of(token)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _load(builder, args[0], token, wide=False)

    return result(types.int64, token), codegen


@operation
def write(typing: Any, address: Any, value: Any, token: Any) -> Any:
    """Round and write one element."""
    computed = token if token in (types.int32, types.int64) else arithmetic_of(token)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        _store(builder, args[0], args[1], token)
        return context.get_dummy_value()

    return types.void(types.int64, computed, token), codegen


@operation
def size_of(typing: Any, token: Any) -> Any:
    """Bytes of one stored element."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return ir.Constant(ir.IntType(64), STORED[token][1])

    return types.int64(token), codegen


@operation
def scratch(typing: Any, token: Any) -> Any:
    """Address of a block of numbers on the stack of the calling kernel."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        array = cgutils.alloca_once(builder, ir.ArrayType(STORED[token][0], BLOCK))
        return builder.ptrtoint(array, ir.IntType(64))

    return types.int64(token), codegen
