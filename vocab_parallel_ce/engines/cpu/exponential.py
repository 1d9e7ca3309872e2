"""e^d and tanh of lanes, as polynomials that LLVM vectorises."""

# Half of Numba's extension interface has no type hints.
# mypy: disallow-untyped-calls=False

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import overload

from vocab_parallel_ce.engines.cpu.compiling import fuses, helper, operation
from vocab_parallel_ce.engines.cpu.lanes import (
    F64,
    I32,
    LANES,
    call_llvm,
    larger,
    multiply_add,
    quotient,
    two_to,
    where_less,
)

# The exponential: d = k log 2 + f, k an integer, |f| <= log(2)/2; e^f is a minimax polynomial

_LOG2_E = 1.4426950408889634
_LN2 = 0.6931471805599453
_LN2_HIGH = 0.693359375  # ten bits: its product with an exponent is exact
_LN2_LOW = -2.1219444005469057e-4
_MAGIC = 1.5 * 2.0**23 + 127  # adding it rounds to an integer and leaves k + 127 in the low bits
_FLUSH = -87.33654  # just above -126 log 2: below it 2^k would be subnormal


def exp(d: Any, precision: Any) -> Any:
    """e^d of lanes with d <= 0, NaN kept, exactly 0 for -inf and below 2^-126.

    For fp32 (``precision``) the relative error is below 1e-7, for 16-bit results below 1e-5. fp64
    takes the C library's exponential lane by lane.
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
    return where_less(d, _FLUSH, 0.0, _exp_of_rest(f) * two_to(shifted))


def _exp_half(d: Any, precision: Any) -> Any:
    shifted = multiply_add(d, _LOG2_E, _MAGIC)
    f = multiply_add(shifted - _MAGIC, -_LN2, d)
    p = multiply_add(f, 4.15136832331e-2, 1.67875917475e-1)
    p = multiply_add(p, f, 5.00030197779e-1)
    p = multiply_add(p, f, 9.99966772704e-1)
    p = multiply_add(p, f, 1.0)
    return where_less(d, _FLUSH, 0.0, p * two_to(shifted))


def add_exp(total: Any, d: Any, precision: Any) -> Any:
    """total + e^d, where the largest term of the sum is near 1; fp64 or fp32, as ``precision`` is.

    One step of range reduction leaves an error of 2e-9 |k|: below 1e-7 where e^d > 1e-15, and what
    is smaller does not count. Where k log 2 is rounded it would be 5e-7 from k = 13 on.
    """
    raise NotImplementedError("compiled code only")


@overload(add_exp, jit_options={"forceinline": True, "error_model": "numpy"})
def _add_exp(total: Any, d: Any, precision: Any) -> Any:
    if precision == types.float64:
        return _add_exp_double
    return _add_exp_single if fuses() else _add_exp_apart


def _add_exp_double(total: Any, d: Any, precision: Any) -> Any:
    return total + _library_exp(d)


def _add_exp_single(total: Any, d: Any, precision: Any) -> Any:
    shifted = multiply_add(d, _LOG2_E, _MAGIC)
    f = multiply_add(shifted - _MAGIC, -_LN2, d)
    return where_less(d, _FLUSH, total, multiply_add(_exp_of_rest(f), two_to(shifted), total))


def _add_exp_apart(total: Any, d: Any, precision: Any) -> Any:
    return total + exp(d, precision)


@helper
def _exp_of_rest(f: Any) -> Any:
    """e^f to fp32."""
    p = multiply_add(f, 1.38145401034e-3, 8.36874513197e-3)
    p = multiply_add(p, f, 4.16683907869e-2)
    p = multiply_add(p, f, 1.66665203989e-1)
    p = multiply_add(p, f, 4.99999934321e-1)
    p = multiply_add(p, f, 1.0)
    return multiply_add(p, f, 1.0)


@operation
def _library_exp(typing: Any, value: Any) -> Any:
    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return call_llvm(builder, "exp", args)

    return value(value), codegen


# The hyperbolic tangent


def tanh(y: Any, precision: Any) -> Any:
    """tanh of lanes, NaN kept; ``precision`` is their own type.

    For fp32: y + y^3 P(y^2) up to 1, a minimax polynomial, else 1 - 2 e / (1 + e) with
    e = e^(-2 |y|); the relative error is below 1e-7. fp64 takes the C library's, lane by lane.
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
    p = multiply_add(z, -3.58451989155e-4, 2.30136454957e-3)
    p = multiply_add(p, z, -7.94610636786e-3)
    p = multiply_add(p, z, 2.14866575279e-2)
    p = multiply_add(p, z, -5.38798026960e-2)
    p = multiply_add(p, z, 1.33323445727e-1)
    p = multiply_add(p, z, -3.33332954319e-1)
    return where_less(1.0, a, far, multiply_add(p * z, y, y))


@operation
def _library_tanh(typing: Any, value: Any) -> Any:
    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        prototype = ir.FunctionType(F64, [F64])
        function = cgutils.get_or_insert_function(builder.module, prototype, "tanh")
        out = args[0]
        for lane in range(LANES):
            place = ir.Constant(I32, lane)
            one = builder.call(function, [builder.extract_element(args[0], place)])
            out = builder.insert_element(out, one, place)
        return out

    return value(value), codegen
