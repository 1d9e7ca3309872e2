"""Sixteen numbers at once: the vector type in which the CPU kernels are written.

``Lanes`` is a Numba type that holds an LLVM vector of fixed width. LLVM maps it to whatever the
processor has (one zmm, two ymm, four xmm or NEON registers), so the kernels are vectorised by
construction, on every target alike, and the order of their sums does not depend on the machine.

Nothing here is specific to a processor. ``llvm.fmuladd`` is one instruction where there is a fused
multiply-add and two elsewhere, never a call.

A *token* is a scalar argument of which only the type counts. It says how an element is stored:
uint16 means bf16, int16 means fp16, float32 and float64 mean themselves. bf16 and fp16 are widened
to fp32 in registers, and rounded to nearest even on the way back, by integer operations.
"""

# Half of Numba's extension interface has no type hints.
# mypy: disallow-untyped-calls=False

from __future__ import annotations

import operator
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
from llvmlite import ir
from numba.core import cgutils, types
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, overload, register_model

LANES = 16
PAIR = 2 * LANES  # what load_pair reads
BLOCK = 1024  # elements worked on while they stay in the first-level cache

Function = TypeVar("Function", bound=Callable[..., Any])

_I16, _I32 = ir.IntType(16), ir.IntType(32)
_F32, _F64 = ir.FloatType(), ir.DoubleType()
_STORED = {
    types.uint16: (_I16, 2),
    types.int16: (_I16, 2),
    types.float32: (_F32, 4),
    types.float64: (_F64, 8),
    types.int32: (_I32, 4),
    types.int64: (ir.IntType(64), 8),
}

# Numba's cache sees changes of the kernels' own file only; this makes it see changes of this one.
_REVISION = f"{zlib.crc32(Path(__file__).read_bytes()):08x}"

_njit: Any = numba.njit


def kernel(function: Function) -> Function:
    """Compile at first use, keep the machine code on disk if any place for it is writable."""
    function.__qualname__ += f"_{_REVISION}"
    try:
        return cast(Function, _njit(cache=True, nogil=True, error_model="numpy")(function))
    except RuntimeError:
        return cast(Function, _njit(nogil=True, error_model="numpy")(function))


def helper(function: Function) -> Function:
    """Compile a function that only kernels call."""
    return cast(Function, _njit(error_model="numpy", no_cpython_wrapper=True)(function))


def operation(function: Callable[..., Any]) -> Any:
    """Typed face of ``numba.extending.intrinsic``."""
    return intrinsic(function)


# The type


class Lanes(types.Type):
    """LANES numbers of one arithmetic type."""

    def __init__(self, scalar: Any) -> None:
        self.scalar = scalar
        super().__init__(name=f"Lanes({scalar})")


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, lanes: Lanes) -> None:
        super().__init__(manager, lanes, _vector(_STORED[lanes.scalar][0]))


def _vector(element: Any) -> Any:
    return ir.VectorType(element, LANES)


def _arithmetic(token: Any) -> Any:
    return types.float64 if token == types.float64 else types.float32


def _common(*args: Any) -> Any:
    """The Lanes type among the arguments of an operation; scalars are spread over it."""
    return next((a for a in args if isinstance(a, Lanes)), None)


def _spread(context: Any, builder: Any, value: Any, given: Any, lanes: Lanes) -> Any:
    if isinstance(given, Lanes):
        return value
    value = context.cast(builder, value, given, lanes.scalar)
    vector = _vector(value.type)
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(_I32, 0))
    zeros = ir.Constant(_vector(_I32), [ir.Constant(_I32, 0)] * LANES)
    return builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), zeros)


def _spread_all(context: Any, builder: Any, sig: Any, args: Any) -> list[Any]:
    lanes = _common(*sig.args)
    return [_spread(context, builder, v, t, lanes) for v, t in zip(args, sig.args, strict=True)]


def _as(kind: Any, element: Any) -> Any:
    """``element`` as a vector if ``kind`` is one."""
    return _vector(element) if isinstance(kind, ir.VectorType) else element


def _constant(kind: Any, value: Any) -> Any:
    if isinstance(kind, ir.VectorType):
        return ir.Constant(kind, [ir.Constant(kind.element, value)] * LANES)
    return ir.Constant(kind, value)


# Conversion between what is stored and what is computed with, for one element or for LANES


def _widen(builder: Any, raw: Any, token: Any) -> Any:
    if token not in (types.uint16, types.int16):
        return raw
    bits, integer, real = raw, raw.type, _as(raw.type, _F32)

    def const(value: int) -> Any:
        return _constant(integer, value)

    if token == types.uint16:
        return builder.bitcast(builder.shl(bits, const(16)), real)
    sign = builder.shl(builder.and_(bits, const(0x8000)), const(16))
    magnitude = builder.shl(builder.and_(bits, const(0x7FFF)), const(13))
    normal = builder.add(magnitude, const((127 - 15) << 23))
    # 2^-14 (1 + f) - 2^-14 is exact, and no operand is subnormal in fp32.
    shifted = builder.bitcast(builder.add(magnitude, const((127 - 14) << 23)), real)
    tiny = builder.bitcast(builder.fsub(shifted, _constant(real, 2.0**-14)), integer)
    endless = builder.add(magnitude, const((255 - 31) << 23))
    finite = builder.icmp_unsigned("<", magnitude, const(31 << 23))
    subnormal = builder.icmp_unsigned("<", magnitude, const(1 << 23))
    bits = builder.select(subnormal, tiny, builder.select(finite, normal, endless))
    return builder.bitcast(builder.or_(bits, sign), real)


def _narrow(builder: Any, value: Any, token: Any, clean: bool = False) -> Any:
    """The stored bits. ``clean``: a NaN has zeros where bf16 has no bits, and survives rounding."""
    if token not in (types.uint16, types.int16):
        return value
    integer, real = _as(value.type, _I32), value.type

    def const(number: int) -> Any:
        return _constant(integer, number)

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
    shifted = builder.fadd(builder.bitcast(magnitude, real), _constant(real, 0.5))
    tiny = builder.sub(builder.bitcast(shifted, integer), const(126 << 23))
    subnormal = builder.icmp_unsigned("<", magnitude, const((127 - 14) << 23))
    stored = builder.select(subnormal, tiny, normal)
    return builder.or_(builder.select(nan, const(0x7E00), stored), sign)


# Memory


def _pointer(builder: Any, address: Any, kind: Any) -> Any:
    return builder.inttoptr(address, kind.as_pointer())


def _load(builder: Any, address: Any, token: Any, wide: bool) -> Any:
    element, size = _STORED[token]
    kind = _vector(element) if wide else element
    raw = builder.load(_pointer(builder, address, kind), align=size)
    if element == _I16:
        raw = builder.zext(raw, _as(kind, _I32))
    return _widen(builder, raw, token)


def _store(builder: Any, address: Any, value: Any, token: Any) -> None:
    element, size = _STORED[token]
    raw = _narrow(builder, value, token)
    if element == _I16:
        raw = builder.trunc(raw, _as(raw.type, _I16))
    builder.store(raw, _pointer(builder, address, raw.type), align=size)


@operation
def load(typing: Any, address: Any, token: Any) -> Any:
    """LANES consecutive elements."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _load(builder, args[0], token, wide=True)

    return Lanes(_arithmetic(token))(types.int64, token), codegen


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
    lanes = Lanes(_arithmetic(token))
    pair = types.UniTuple(lanes, 2)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        element, size = _STORED[token]
        kind = _vector(_I32 if size == 2 else element)
        raw = builder.load(_pointer(builder, args[0], kind), align=size)
        if size == 2:
            sixteen = _constant(kind, 16)
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
        size = _STORED[token][1]
        low, high = (_narrow(builder, value, token, clean=True) for value in args[1:3])
        kind = low.type
        if size == 2:
            low = builder.or_(low, builder.shl(high, _constant(kind, 16)))
        else:
            offset = ir.Constant(args[0].type, LANES * size)
            second = _pointer(builder, builder.add(args[0], offset), kind)
            builder.store(high, second, align=size)
        builder.store(low, _pointer(builder, args[0], kind), align=size)
        return context.get_dummy_value()

    return types.void(types.int64, a, b, token), codegen


@operation
def read(typing: Any, address: Any, token: Any) -> Any:
    """One element: as the arithmetic type, or as it is if the token is a wider integer."""
    result = token if token in (types.int32, types.int64) else _arithmetic(token)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _load(builder, args[0], token, wide=False)

    return result(types.int64, token), codegen


@operation
def write(typing: Any, address: Any, value: Any, token: Any) -> Any:
    """Round and write one element."""
    computed = token if token in (types.int32, types.int64) else _arithmetic(token)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        _store(builder, args[0], args[1], token)
        return context.get_dummy_value()

    return types.void(types.int64, computed, token), codegen


@operation
def size_of(typing: Any, token: Any) -> Any:
    """Bytes of one stored element."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return ir.Constant(ir.IntType(64), _STORED[token][1])

    return types.int64(token), codegen


@operation
def scratch(typing: Any, token: Any) -> Any:
    """Address of a block of numbers on the stack of the calling kernel."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        array = cgutils.alloca_once(builder, ir.ArrayType(_STORED[token][0], BLOCK))
        return builder.ptrtoint(array, ir.IntType(64))

    return types.int64(token), codegen


# Arithmetic


class _Binary(AbstractTemplate):
    def generic(self, args: Any, kws: Any) -> Any:
        lanes = _common(*args)
        return lanes and signature(lanes, *args)


for _operator in (operator.add, operator.sub, operator.mul):
    infer_global(_operator)(type(f"_{_operator.__name__}", (_Binary,), {}))


def _lower(op: Any, name: str) -> None:
    def lowering(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return getattr(builder, name)(*_spread_all(context, builder, sig, args))

    for pair in ((Lanes, Lanes), (Lanes, types.Number), (types.Number, Lanes)):
        lower_builtin(op, *pair)(lowering)


_lower(operator.add, "fadd")
_lower(operator.sub, "fsub")
_lower(operator.mul, "fmul")


def _call_llvm(builder: Any, name: str, args: Any) -> Any:
    kind = args[0].type
    suffix = f"v{LANES}f{64 if kind.element == _F64 else 32}"
    prototype = ir.FunctionType(kind, [kind] * len(args))
    function = cgutils.get_or_insert_function(builder.module, prototype, f"llvm.{name}.{suffix}")
    return builder.call(function, args)


@operation
def lanes_of(typing: Any, value: Any, token: Any) -> Any:
    """The same number in every lane."""
    lanes = Lanes(_arithmetic(token))

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _spread(context, builder, args[0], value, lanes)

    return lanes(value, token), codegen


@operation
def number(typing: Any, value: Any, token: Any) -> Any:
    """A scalar as the arithmetic type."""
    arithmetic = _arithmetic(token)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return context.cast(builder, args[0], value, arithmetic)

    return arithmetic(value, token), codegen


@operation
def multiply_add(typing: Any, a: Any, b: Any, c: Any) -> Any:
    """a b + c, rounded once where the processor can."""
    lanes = _common(a, b, c)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        values = _spread_all(context, builder, sig, args)
        return _call_llvm(builder, "fmuladd", values)

    return lanes(a, b, c), codegen


@operation
def quotient(typing: Any, a: Any, b: Any) -> Any:
    """a / b"""
    lanes = _common(a, b)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.fdiv(*_spread_all(context, builder, sig, args))

    return lanes(a, b), codegen


@operation
def larger(typing: Any, a: Any, b: Any) -> Any:
    """a where a > b, else b (also where either is NaN): one instruction on x86."""
    lanes = _common(a, b)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        values = _spread_all(context, builder, sig, args)
        return builder.select(builder.fcmp_ordered(">", *values), *values)

    return lanes(a, b), codegen


@operation
def where_less(typing: Any, a: Any, b: Any, then: Any, otherwise: Any) -> Any:
    """``then`` where a < b, ``otherwise`` elsewhere (also where a or b is NaN)."""
    lanes = _common(a, b, then, otherwise)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        values = _spread_all(context, builder, sig, args)
        return builder.select(builder.fcmp_ordered("<", *values[:2]), *values[2:])

    return lanes(a, b, then, otherwise), codegen


@operation
def times_two_to(typing: Any, value: Any, shifted: Any) -> Any:
    """value 2^k in fp32, where k is the integer in the low bits of ``shifted``; both normal."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        bits, k = (builder.bitcast(arg, _vector(_I32)) for arg in args)
        exponent = builder.shl(k, _constant(k.type, 23))
        return builder.bitcast(builder.add(bits, exponent), args[0].type)

    return value(value, shifted), codegen


def _fold(builder: Any, value: Any, combine: Callable[[Any, Any], Any]) -> Any:
    """Combine the lanes in halves: the same tree on every machine."""
    width = LANES
    while width > 1:
        width //= 2
        halves = []
        for start in (0, width):
            index = [ir.Constant(_I32, start + i) for i in range(width)]
            mask = ir.Constant(ir.VectorType(_I32, width), index)
            halves.append(builder.shuffle_vector(value, value, mask))
        value = combine(*halves)
    return builder.extract_element(value, ir.Constant(_I32, 0))


@operation
def total(typing: Any, value: Any) -> Any:
    """Sum of the lanes, in fp64."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        wide = args[0] if value.scalar == types.float64 else builder.fpext(args[0], _vector(_F64))
        return _fold(builder, wide, builder.fadd)

    return types.float64(value), codegen


@operation
def highest(typing: Any, value: Any) -> Any:
    """Largest lane; no lane may be NaN."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _fold(
            builder, args[0], lambda a, b: builder.select(builder.fcmp_ordered(">", a, b), a, b)
        )

    return value.scalar(value), codegen


# The exponential

_LOG2_E = 1.4426950408889634
_LN2_HIGH = 0.693359375  # ten bits: its product with an exponent is exact
_LN2_LOW = -2.1219444005469057e-4
_LN2 = 0.6931471805599453
_MAGIC = 1.5 * 2.0**23  # adding it rounds to an integer, left in the low bits of the sum
_FLUSH = -87.33654  # just above -126 log 2: below it the result would be subnormal


def exp(d: Any, precision: Any) -> Any:
    """e^d of lanes with d <= 0, NaN kept, exactly 0 for -inf and below 2^-126.

    d = k log 2 + f with k an integer and |f| <= log(2)/2; e^f is a minimax polynomial. For fp32
    (``precision``) the relative error is below 1e-7, for 16-bit results below 1e-5. fp64 takes the
    C library's exponential lane by lane.
    """
    raise NotImplementedError("compiled code only")


@overload(exp, jit_options={"forceinline": True, "error_model": "numpy"})
def _exp(d: Any, precision: Any) -> Any:
    if precision == types.float64:
        return _exp_double
    return _exp_single if precision == types.float32 else _exp_half


def _exp_double(d: Any, precision: Any) -> Any:
    return _library_exp(d)


def _exp_single(d: Any, precision: Any) -> Any:
    shifted = multiply_add(d, _LOG2_E, _MAGIC)
    k = shifted - _MAGIC
    f = multiply_add(k, -_LN2_HIGH, d)
    f = multiply_add(k, -_LN2_LOW, f)
    p = multiply_add(f, 1.38145401034e-3, 8.36874513197e-3)
    p = multiply_add(p, f, 4.16683907869e-2)
    p = multiply_add(p, f, 1.66665203989e-1)
    p = multiply_add(p, f, 4.99999934321e-1)
    p = multiply_add(p, f, 1.0)
    p = multiply_add(p, f, 1.0)
    return where_less(_FLUSH, d, times_two_to(p, shifted), larger(0.0, d))


def _exp_half(d: Any, precision: Any) -> Any:
    # NaNs that come of 16-bit numbers have no low bits: times_two_to adds 0 to them.
    shifted = multiply_add(d, _LOG2_E, _MAGIC)
    f = multiply_add(shifted - _MAGIC, -_LN2, d)
    p = multiply_add(f, 4.15136832331e-2, 1.67875917475e-1)
    p = multiply_add(p, f, 5.00030197779e-1)
    p = multiply_add(p, f, 9.99966772704e-1)
    p = multiply_add(p, f, 1.0)
    return where_less(d, _FLUSH, 0.0, times_two_to(p, shifted))


@operation
def _library_exp(typing: Any, value: Any) -> Any:
    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _call_llvm(builder, "exp", args)

    return value(value), codegen


# The hyperbolic tangent


def tanh(y: Any, precision: Any) -> Any:
    """tanh of lanes, NaN kept; ``precision`` is their own type.

    For fp32: y + y^3 P(y^2) below 0.625, as in Cephes (Moshier 1989), else 1 - 2 e / (1 + e) with
    e = e^(-2 |y|); the relative error is below 2e-7. fp64 takes the C library's, lane by lane.
    """
    raise NotImplementedError("compiled code only")


@overload(tanh, jit_options={"forceinline": True, "error_model": "numpy"})
def _tanh(y: Any, precision: Any) -> Any:
    return _tanh_double if precision == types.float64 else _tanh_single


def _tanh_double(y: Any, precision: Any) -> Any:
    return _library_tanh(y)


def _tanh_single(y: Any, precision: Any) -> Any:
    a = larger(y, 0.0 - y)
    e = exp(-2.0 * a, precision)
    far = 1.0 - quotient(2.0 * e, 1.0 + e)
    far = where_less(y, 0.0, 0.0 - far, far)
    z = y * y
    p = multiply_add(z, -5.70498872745e-3, 2.06390887954e-2)
    p = multiply_add(p, z, -5.37397155531e-2)
    p = multiply_add(p, z, 1.33314422036e-1)
    p = multiply_add(p, z, -3.33332819422e-1)
    return where_less(0.625, a, far, multiply_add(p * z, y, y))


@operation
def _library_tanh(typing: Any, value: Any) -> Any:
    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        prototype = ir.FunctionType(_F64, [_F64])
        function = cgutils.get_or_insert_function(builder.module, prototype, "tanh")
        out = args[0]
        for lane in range(LANES):
            place = ir.Constant(_I32, lane)
            one = builder.call(function, [builder.extract_element(args[0], place)])
            out = builder.insert_element(out, one, place)
        return out

    return value(value), codegen
