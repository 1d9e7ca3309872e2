"""Between memory and lanes: what is stored becomes what is computed with, and back.

bf16 and fp16 are widened to fp32 in registers, and rounded to nearest even on the way back: fp16 by
the processor's own conversions, bf16 by integer operations. Addresses are integers, so one
compilation serves every layout.
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
    F16,
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
    if token == types.uint16:
        return _upper_half(builder, builder.zext(raw, like(raw.type, I32)))
    if token == types.int16:
        return builder.fpext(builder.bitcast(raw, like(raw.type, F16)), like(raw.type, F32))
    return raw


def _upper_half(builder: Any, bits: Any) -> Any:
    """fp32 from a bf16 in the lower half of 32 bits; what is above it is lost."""
    shifted = builder.shl(bits, constant(bits.type, 16))
    return builder.bitcast(shifted, like(bits.type, F32))


def _narrow(builder: Any, value: Any, token: Any) -> Any:
    if token == types.uint16:
        return builder.trunc(_rounded(builder, value), like(value.type, I16))
    if token == types.int16:
        return builder.bitcast(builder.fptrunc(value, like(value.type, F16)), like(value.type, I16))
    return value


def _rounded(builder: Any, value: Any, clean: bool = False) -> Any:
    """bf16 in the lower half of 32 bits. ``clean``: a NaN has zeros where bf16 has no bits."""
    integer = like(value.type, I32)

    def const(number: int) -> Any:
        return constant(integer, number)

    bits = builder.bitcast(value, integer)
    upper = builder.lshr(bits, const(16))
    odd = builder.and_(upper, const(1))
    rounded = builder.add(bits, builder.add(odd, const(0x7FFF)))
    rounded = builder.lshr(rounded, const(16))
    if clean:  # adding what rounds it leaves such a NaN as it is
        return rounded
    nan = builder.fcmp_unordered("uno", value, value)
    return builder.select(nan, builder.or_(upper, const(0x40)), rounded)


# Memory


def _pointer(builder: Any, address: Any, kind: Any) -> Any:
    return builder.inttoptr(address, kind.as_pointer())


def _load(builder: Any, address: Any, token: Any, wide: bool) -> Any:
    element, size = STORED[token]
    kind = vector(element) if wide else element
    return _widen(builder, builder.load(_pointer(builder, address, kind), align=size), token)


def _store(builder: Any, address: Any, value: Any, token: Any) -> None:
    raw = _narrow(builder, value, token)
    builder.store(raw, _pointer(builder, address, raw.type), align=STORED[token][1])


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
    """PAIR consecutive elements as two Lanes; bf16 in an order of its own.

    bf16 is read two to a 32-bit integer, which saves spreading and packing it.
    """
    lanes = Lanes(arithmetic_of(token))
    pair = types.UniTuple(lanes, 2)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        if token == types.uint16:
            both = builder.load(_pointer(builder, args[0], vector(I32)), align=2)
            upper = builder.lshr(both, constant(both.type, 16))
            values = [_upper_half(builder, half) for half in (both, upper)]
        else:
            values = [
                _load(builder, address, token, wide=True)
                for address in _of_pair(builder, args[0], token)
            ]
        return context.make_tuple(builder, pair, values)

    return pair(types.int64, token), codegen


def _of_pair(builder: Any, address: Any, token: Any) -> tuple[Any, Any]:
    """Addresses of the first and the second LANES of PAIR elements."""
    return address, builder.add(address, ir.Constant(address.type, LANES * STORED[token][1]))


@operation
def store_pair(typing: Any, address: Any, a: Any, b: Any, token: Any) -> Any:
    """Round and write what ``load_pair`` read. A bf16 NaN must be ``clean`` (see _rounded)."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        if token == types.uint16:
            low, high = (_rounded(builder, value, clean=True) for value in args[1:3])
            both = builder.or_(low, builder.shl(high, constant(high.type, 16)))
            builder.store(both, _pointer(builder, args[0], both.type), align=2)
        else:
            first, second = _of_pair(builder, args[0], token)
            _store(builder, first, args[1], token)
            _store(builder, second, args[2], token)
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
        return _widen(builder, raw, token)

    return Lanes(arithmetic_of(token))(types.int64, types.int64, token), codegen


@operation
def store_first(typing: Any, address: Any, value: Any, count: Any, token: Any) -> Any:
    """Round LANES elements and write the first ``count`` of them."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        size = STORED[token][1]
        raw = _narrow(builder, args[1], token)
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
