"""Sixteen numbers at once: the vector type in which the CPU kernels are written, its arithmetic.

``Lanes`` is a Numba type that holds an LLVM vector of fixed width. LLVM maps it to whatever the
processor has (one zmm, two ymm, four xmm or NEON registers), so the kernels are vectorised by
construction, on every target alike, and the order of their sums does not depend on the machine.

Nothing here is specific to a processor. ``llvm.fmuladd`` is one instruction where there is a fused
multiply-add and two elsewhere, never a call.

A *token* is a scalar argument of which only the type counts. It says how an element is stored:
uint16 means bf16, int16 means fp16, float32 and float64 mean themselves.
"""

# Half of Numba's extension interface has no type hints.
# mypy: disallow-untyped-calls=False

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import lower_builtin, models, register_model

from vocab_parallel_ce.engines.cpu.compiling import operation

LANES = 16

I16, I32 = ir.IntType(16), ir.IntType(32)
F16, F32, F64 = ir.HalfType(), ir.FloatType(), ir.DoubleType()
STORED = {
    types.uint16: (I16, 2),
    types.int16: (I16, 2),
    types.float32: (F32, 4),
    types.float64: (F64, 8),
    types.int32: (I32, 4),
    types.int64: (ir.IntType(64), 8),
}


# The type


class Lanes(types.Type):
    """LANES numbers of one arithmetic type."""

    def __init__(self, scalar: Any) -> None:
        self.scalar = scalar
        super().__init__(name=f"Lanes({scalar})")


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, lanes: Lanes) -> None:
        super().__init__(manager, lanes, vector(STORED[lanes.scalar][0]))


def vector(element: Any) -> Any:
    return ir.VectorType(element, LANES)


def arithmetic_of(token: Any) -> Any:
    return types.float64 if token == types.float64 else types.float32


def common_lanes(*args: Any) -> Any:
    """The Lanes type among the arguments of an operation; scalars are spread over it."""
    return next((a for a in args if isinstance(a, Lanes)), None)


def spread(context: Any, builder: Any, value: Any, given: Any, lanes: Lanes) -> Any:
    if isinstance(given, Lanes):
        return value
    value = context.cast(builder, value, given, lanes.scalar)
    kind = vector(value.type)
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(I32, 0))
    zeros = ir.Constant(vector(I32), [ir.Constant(I32, 0)] * LANES)
    return builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), zeros)


def spread_all(context: Any, builder: Any, sig: Any, args: Any) -> list[Any]:
    lanes = common_lanes(*sig.args)
    return [spread(context, builder, v, t, lanes) for v, t in zip(args, sig.args, strict=True)]


def like(kind: Any, element: Any) -> Any:
    """``element`` as a vector if ``kind`` is one."""
    return vector(element) if isinstance(kind, ir.VectorType) else element


def constant(kind: Any, value: Any) -> Any:
    if isinstance(kind, ir.VectorType):
        return ir.Constant(kind, [ir.Constant(kind.element, value)] * LANES)
    return ir.Constant(kind, value)


# Arithmetic


class _Binary(AbstractTemplate):
    def generic(self, args: Any, kws: Any) -> Any:
        lanes = common_lanes(*args)
        return lanes and signature(lanes, *args)


for _operator in (operator.add, operator.sub, operator.mul):
    infer_global(_operator)(type(f"_{_operator.__name__}", (_Binary,), {}))


def _lower(op: Any, name: str) -> None:
    def lowering(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return getattr(builder, name)(*spread_all(context, builder, sig, args))

    for pair in ((Lanes, Lanes), (Lanes, types.Number), (types.Number, Lanes)):
        lower_builtin(op, *pair)(lowering)


_lower(operator.add, "fadd")
_lower(operator.sub, "fsub")
_lower(operator.mul, "fmul")


def call_llvm(builder: Any, name: str, args: Any) -> Any:
    kind = args[0].type
    suffix = f"v{LANES}f{64 if kind.element == F64 else 32}"
    prototype = ir.FunctionType(kind, [kind] * len(args))
    function = cgutils.get_or_insert_function(builder.module, prototype, f"llvm.{name}.{suffix}")
    return builder.call(function, args)


@operation
def lanes_of(typing: Any, value: Any, token: Any) -> Any:
    """The same number in every lane."""
    lanes = Lanes(arithmetic_of(token))

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return spread(context, builder, args[0], value, lanes)

    return lanes(value, token), codegen


@operation
def number(typing: Any, value: Any, token: Any) -> Any:
    """A scalar as the arithmetic type."""
    arithmetic = arithmetic_of(token)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return context.cast(builder, args[0], value, arithmetic)

    return arithmetic(value, token), codegen


@operation
def multiply_add(typing: Any, a: Any, b: Any, c: Any) -> Any:
    """a b + c, rounded once where the processor can."""
    lanes = common_lanes(a, b, c)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        values = spread_all(context, builder, sig, args)
        return call_llvm(builder, "fmuladd", values)

    return lanes(a, b, c), codegen


@operation
def quotient(typing: Any, a: Any, b: Any) -> Any:
    """a / b"""
    lanes = common_lanes(a, b)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.fdiv(*spread_all(context, builder, sig, args))

    return lanes(a, b), codegen


@operation
def larger(typing: Any, a: Any, b: Any) -> Any:
    """a where a > b, else b (also where either is NaN): one instruction on x86."""
    lanes = common_lanes(a, b)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        values = spread_all(context, builder, sig, args)
        return builder.select(builder.fcmp_ordered(">", *values), *values)

    return lanes(a, b), codegen


@operation
def where_less(typing: Any, a: Any, b: Any, then: Any, otherwise: Any) -> Any:
    """``then`` where a < b, ``otherwise`` elsewhere (also where a or b is NaN)."""
    lanes = common_lanes(a, b, then, otherwise)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        values = spread_all(context, builder, sig, args)
        # In this order LLVM joins the choice with what computes ``otherwise``.
        return builder.select(builder.fcmp_unordered(">=", *values[:2]), values[3], values[2])

    return lanes(a, b, then, otherwise), codegen


@operation
def two_to(typing: Any, biased: Any) -> Any:
    """2^k in fp32, where k + 127 is the integer in the low bits of ``biased`` and 2^k is normal."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        bits = builder.bitcast(args[0], vector(I32))
        return builder.bitcast(builder.shl(bits, constant(bits.type, 23)), args[0].type)

    return biased(biased), codegen


def _fold(builder: Any, value: Any, combine: Callable[[Any, Any], Any]) -> Any:
    """Combine the lanes in halves: the same tree on every machine."""
    width = LANES
    while width > 1:
        width //= 2
        halves = []
        for start in (0, width):
            index = [ir.Constant(I32, start + i) for i in range(width)]
            mask = ir.Constant(ir.VectorType(I32, width), index)
            halves.append(builder.shuffle_vector(value, value, mask))
        value = combine(*halves)
    return builder.extract_element(value, ir.Constant(I32, 0))


@operation
def total(typing: Any, value: Any) -> Any:
    """Sum of the lanes, in fp64."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        wide = args[0] if value.scalar == types.float64 else builder.fpext(args[0], vector(F64))
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
