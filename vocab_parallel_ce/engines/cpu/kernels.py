"""The loops of the CPU engine over rows [begin, end) of one shard. Compiled by Numba at first use.

A row is read once from memory, in blocks of BLOCK elements. Its sums are kept in fp32 lanes inside
a block and in fp64 across blocks. The fast kernels work on contiguous logits where they lie and
take one pass a block: the sum of e^(x - base) is formed together with the block's maximum, where
``base`` is a maximum seen earlier. Only if the block rises above it is the block, still in the
first-level cache, summed again. The last columns, which fill no vector, go through a buffer.

The general kernels first copy each block, capped and times ``scale``, into a buffer on the stack,
whatever the strides, and then make one short pass over it for each thing that is wanted. All
gradient kernels read an element before they write it, so ``out`` may be the logits themselves.

Arrays arrive as an address and steps in bytes, so one compilation serves every layout. ``token``
tells how logits are stored (see lanes), ``scale`` has the arithmetic type and is its token. It is
the scale of every row, unless ``scales`` has one a row. ``cap`` is the softcap, 0 for none.
Scalars of a row are fp64 and hold fp32 values where the contract wants fp32.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from vocab_parallel_ce.engines.contract import IGNORED
from vocab_parallel_ce.engines.cpu.lanes import (
    BLOCK,
    LANES,
    PAIR,
    exp,
    helper,
    highest,
    kernel,
    lanes_of,
    larger,
    load,
    load_pair,
    multiply_add,
    number,
    quotient,
    read,
    scratch,
    size_of,
    store,
    store_pair,
    tanh,
    total,
    where_less,
    write,
)

Vector = tuple[int, int]  # address, step; address 0 where there is none
Matrix = tuple[int, int, int]  # address, step from row to row, step from column to column

SLACK = 1.0  # how far a maximum may rise above ``base``: below 1, x - base is as exact as x - m
INFINITY = math.inf
NAN = math.nan
INT32, INT64 = np.int32(0), np.int64(0)

# One block: ``address`` is contiguous, ``count`` a multiple of PAIR unless said otherwise


@helper
def block_max(address: int, count: int, token: Any) -> Any:
    """Largest of the elements that are not NaN; -inf if there is none."""
    a = lanes_of(-INFINITY, token)
    b = a
    for _ in range(count // PAIR):
        x, z = load_pair(address, token)
        a = larger(x, a)
        b = larger(z, b)
        address += PAIR * size_of(token)
    return highest(larger(a, b))


@helper
def block_max_sum(address: int, count: int, scale: float, base: float, token: Any) -> Any:
    """max x and sum e^(x - base)"""
    top = lanes_of(-INFINITY, token)
    a = lanes_of(0.0, token)
    b = a
    unscaled = scale == 1.0
    for _ in range(count // PAIR):
        x, z = load_pair(address, token)
        if not unscaled:
            x = x * scale
            z = z * scale
        top = larger(z, larger(x, top))
        a = a + exp(x - base, scale)
        b = b + exp(z - base, scale)
        address += PAIR * size_of(token)
    return np.float64(highest(top)), total(a) + total(b)


@helper
def block_entropy(address: int, count: int, m: float, token: Any) -> Any:
    """sum e^(x - m) and sum e^(x - m) (x - m)"""
    s = lanes_of(0.0, token)
    t = s
    s2, t2 = s, s
    for _ in range(count // PAIR):
        x, z = load_pair(address, token)
        d, d2 = x - m, z - m
        e, e2 = exp(d, token), exp(d2, token)
        s = s + e
        s2 = s2 + e2
        # Without a product where e is 0 (d may be -inf), with NaN where it is NaN.
        t = where_less(0.0, e, multiply_add(e, d, t), t + e)
        t2 = where_less(0.0, e2, multiply_add(e2, d2, t2), t2 + e2)
        address += PAIR * size_of(token)
    return total(s) + total(s2), total(t) + total(t2)


@helper
def block_squares(address: int, count: int, m: float, token: Any) -> Any:
    """sum e^(2 (x - m)).

    A few terms are nearly all of it, so each pair is added in fp64: in an fp32 lane they would
    swallow the rest. And the error of one exponential is half that of a squared one.
    """
    q = 0.0
    for _ in range(count // PAIR):
        x, z = load_pair(address, token)
        q += total(exp(2.0 * (x - m), token) + exp(2.0 * (z - m), token))
        address += PAIR * size_of(token)
    return q


@helper
def block_smooth(address: int, count: int, m: float, weight: int, token: Any) -> Any:
    """sum w (x - m) and sum w over any ``count`` columns; w = 1 where ``weight`` is 0."""
    size = size_of(token)
    step = LANES * size
    u = lanes_of(0.0, token)
    w = lanes_of(0.0, token)
    full = count // LANES
    rest, rest_weights = 0.0, 0.0
    if weight == 0:
        for _ in range(full):
            u = u + (load(address, token) - m)
            address += step
        for i in range(count - full * LANES):
            rest += read(address + i * size, token) - m
        return total(u) + rest, float(count)
    for _ in range(full):
        factor = load(weight, token)
        u = u + factor * (load(address, token) - m)
        w = w + factor
        address += step
        weight += step
    for i in range(count - full * LANES):
        one = np.float64(read(weight + i * size, token))
        rest += one * (read(address + i * size, token) - m)
        rest_weights += one
    return total(u) + rest, total(w) + rest_weights


@helper
def block_gradient(
    source: int, destination: int, count: int, scale: float, m: float, softmax: float, token: Any
) -> None:
    """softmax e^(x - m)"""
    step = PAIR * size_of(token)
    unscaled = scale == 1.0
    for _ in range(count // PAIR):
        x, z = load_pair(source, token)
        if not unscaled:
            x = x * scale
            z = z * scale
        store_pair(destination, exp(x - m, token) * softmax, exp(z - m, token) * softmax, token)
        source += step
        destination += step


@helper
def block_entropy_gradient(
    address: int, count: int, m: float, log_s: float, softmax: float, entropy: float, token: Any
) -> None:
    """e^(x - m) (softmax - entropy log p) in place, 0 where p is 0"""
    step = LANES * size_of(token)
    for _ in range(count // LANES):
        d = load(address, token) - m
        e = exp(d, token)
        store(address, where_less(0.0, e, e * (softmax - (d - log_s) * entropy), e), token)
        address += step


@helper
def subtract_smooth(address: int, count: int, weight: int, smooth: float, token: Any) -> None:
    """Subtract w smooth from any ``count`` columns; w = 1 where ``weight`` is 0."""
    size = size_of(token)
    step = LANES * size
    full = count // LANES
    same = number(smooth, token)
    for _ in range(full):
        x = load(address, token)
        if weight == 0:
            store(address, x - same, token)
        else:
            store(address, x - load(weight, token) * same, token)
            weight += step
        address += step
    for i in range(count - full * LANES):
        w = read(weight + i * size, token) if weight != 0 else number(1.0, token)
        write(address + i * size, read(address + i * size, token) - w * same, token)


# Between a row and a buffer


@helper
def gather(buffer: int, address: int, step: int, count: int, scale: float, token: Any) -> None:
    """Fill ``buffer`` with ``count`` columns times scale, and to a multiple of PAIR with -inf."""
    size = size_of(scale)
    done = 0
    if step == size_of(token):
        done = count // LANES * LANES
        for i in range(0, done, LANES):
            store(buffer + i * size, load(address + i * step, token) * scale, scale)
    for i in range(done, count):
        write(buffer + i * size, read(address + i * step, token) * scale, scale)
    for i in range(count, -(-count // PAIR) * PAIR):
        write(buffer + i * size, -INFINITY, scale)


@helper
def gather_x(
    buffer: int,
    slopes: int,
    address: int,
    step: int,
    count: int,
    scale: float,
    cap: float,
    token: Any,
) -> None:
    """``gather`` under a cap, if there is one; then ``slopes``, unless 0, gets that of each."""
    if cap == 0.0:
        gather(buffer, address, step, count, scale, token)
        return
    size = size_of(scale)
    gather(buffer, address, step, count, number(1.0, scale), token)
    cap_here = number(cap, scale)
    for i in range(0, count, LANES):
        t = tanh(quotient(load(buffer + i * size, scale), cap), scale)
        if slopes != 0:
            store(slopes + i * size, 1.0 - t * t, scale)
        store(buffer + i * size, t * cap_here * scale, scale)
    for i in range(count, -(-count // PAIR) * PAIR):  # the cap made -cap of them
        write(buffer + i * size, -INFINITY, scale)


@helper
def multiply_by_slopes(buffer: int, slopes: int, count: int, token: Any) -> None:
    """``count`` up to a multiple of LANES."""
    step = LANES * size_of(token)
    for _ in range(-(-count // LANES)):
        store(buffer, load(buffer, token) * load(slopes, token), token)
        buffer += step
        slopes += step


@helper
def scatter(
    address: int, step: int, buffer: int, count: int, arithmetic: float, token: Any
) -> None:
    """Write the first ``count`` numbers of ``buffer`` as columns of a row."""
    size = size_of(arithmetic)
    done = 0
    if step == size_of(token):
        done = count // LANES * LANES
        for i in range(0, done, LANES):
            store(address + i * step, load(buffer + i * size, arithmetic), token)
    for i in range(done, count):
        write(address + i * step, read(buffer + i * size, arithmetic), token)


@helper
def write_zeros(address: int, step: int, count: int, token: Any) -> None:
    """A row of zeros."""
    done = 0
    if step == size_of(token):
        done = count // LANES * LANES
        for i in range(0, done, LANES):
            store(address + i * step, lanes_of(0.0, token), token)
    for i in range(done, count):
        write(address + i * step, 0.0, token)


# One row


@helper
def item(vector: Vector, row: int, token: Any) -> Any:
    """One row's number as fp64."""
    return np.float64(read(vector[0] + row * vector[1], token))


@helper
def clean(value: float) -> float:
    """Any NaN becomes the one that ``store_pair`` may be given."""
    return value if value == value else NAN


@helper
def reference(m: float) -> float:
    """What columns are measured from: x - m would be NaN were both -inf, and hide a real NaN."""
    return m if m > -INFINITY else 0.0


@helper
def fold(
    m: float, base: float, s: float, address: int, count: int, scale: float, token: Any
) -> tuple[float, float, float]:
    """A row's maximum m, and its sum s of e^(x - base), after one more block."""
    if base == -INFINITY:
        base = np.float64(block_max(address, count, token) * scale)
    top, more = block_max_sum(address, count, scale, reference(base), token)
    if top > base + SLACK:
        s *= math.exp(base - top)
        base = top
        top, more = block_max_sum(address, count, scale, base, token)
    return max(m, top), base, s + more


@helper
def target_logit(address: int, step: int, columns: int, y: int, scale: float, token: Any) -> float:
    """x at the target, 0 when it lives elsewhere; without a cap."""
    return np.float64(read(address + y * step, token) * scale) if 0 <= y < columns else 0.0


@helper
def scale_of(scales: Vector, row: int, scale: float) -> Any:
    """One row's scale."""
    return read(scales[0] + row * scales[1], scale) if scales[0] != 0 else scale


@helper
def write_target(
    address: int,
    d: float,
    s: float,
    softmax: float,
    target: float,
    smooth: float,
    entropy: float,
    slope: float,
    arithmetic: float,
    token: Any,
) -> None:
    """The gradient of the target's column, where x - m = d and the cap has this slope."""
    p = math.exp(d) / s
    value = p * softmax - target - smooth
    if entropy != 0.0 and not p <= 0.0:
        value -= p * (d - math.log(s)) * entropy
    write(address, number(value * slope, arithmetic), token)


# The kernels. ``out`` of the partials is the first statistic and the step to the next


@kernel
def partials_fast(
    begin: int,
    end: int,
    columns: int,
    logits: Matrix,
    target: Vector,
    ignored_rows: bool,
    scales: Vector,
    every_scale: float,
    token: Any,
    out: Vector,
) -> None:
    """m, s and x_y; contiguous columns, every scale > 0, no cap."""
    size = size_of(token)
    full = columns // PAIR * PAIR
    tail = scratch(every_scale)
    for row in range(begin, end):
        scale = scale_of(scales, row, every_scale)
        y = read(target[0] + row * target[1], INT64)
        m, base, s, x = -INFINITY, -INFINITY, 0.0, 0.0
        if y == IGNORED and not ignored_rows:
            m = 0.0
        else:
            address = logits[0] + row * logits[1]
            x = target_logit(address, size, columns, y, scale, token)
            for start in range(0, full, BLOCK):
                block, count = address + start * size, min(BLOCK, full - start)
                m, base, s = fold(m, base, s, block, count, scale, token)
            if full < columns:
                gather(tail, address + full * size, size, columns - full, scale, token)
                m, base, s = fold(m, base, s, tail, PAIR, number(1.0, scale), scale)
            if m > base:
                s *= math.exp(base - m)
        place = out[0] + row * size_of(scale)
        write(place, m, scale)
        write(place + out[1], s, scale)
        write(place + 2 * out[1], x, scale)


@kernel
def gradient_fast(
    begin: int,
    end: int,
    columns: int,
    logits: Matrix,
    target: Vector,
    m: Vector,
    s: Vector,
    softmax: Vector,
    target_part: Vector,
    scales: Vector,
    every_scale: float,
    token: Any,
    out: Matrix,
) -> None:
    """Softmax and target parts only; contiguous columns of logits and out, no cap."""
    size = size_of(token)
    full = columns // PAIR * PAIR
    rest = columns - full
    tail = scratch(every_scale)
    one = number(1.0, every_scale)
    for row in range(begin, end):
        scale = scale_of(scales, row, every_scale)
        source = logits[0] + row * logits[1]
        destination = out[0] + row * out[1]
        y = read(target[0] + row * target[1], INT64)
        row_softmax, row_target = item(softmax, row, scale), item(target_part, row, scale)
        if y == IGNORED or (row_softmax == 0.0 and row_target == 0.0):
            write_zeros(destination, size, columns, token)
            continue
        row_m, row_s = clean(item(m, row, scale)), item(s, row, scale)
        factor = clean(row_softmax / row_s)
        # Read before it is overwritten.
        x = target_logit(source, size, columns, y, scale, token)
        block_gradient(source, destination, full, scale, row_m, factor, token)
        if rest > 0:
            gather(tail, source + full * size, size, rest, scale, token)
            block_gradient(tail, tail, PAIR, one, row_m, factor, scale)
            scatter(destination + full * size, size, tail, rest, scale, token)
        if 0 <= y < columns:
            place = destination + y * size
            write_target(
                place, x - row_m, row_s, row_softmax, row_target, 0.0, 0.0, 1.0, scale, token
            )


@kernel
def partials_general(
    begin: int,
    end: int,
    columns: int,
    logits: Matrix,
    target: Vector,
    weight: int,
    smooth: bool,
    entropy: bool,
    squares: bool,
    argmax: bool,
    ignored_rows: bool,
    scales: Vector,
    every_scale: float,
    cap: float,
    token: Any,
    out: Vector,
) -> None:
    """Any statistics, any strides."""
    size = size_of(every_scale)
    step = logits[2]
    buffer = scratch(every_scale)
    one = number(1.0, every_scale)
    for row in range(begin, end):
        scale = scale_of(scales, row, every_scale)
        y = read(target[0] + row * target[1], INT64)
        m, s, x, u, t, q, best = -INFINITY, 0.0, 0.0, 0.0, 0.0, 0.0, -1
        if y == IGNORED and not ignored_rows:
            m = 0.0
        else:
            address = logits[0] + row * logits[1]
            if 0 <= y < columns:
                gather_x(buffer, 0, address + y * step, step, 1, scale, cap, token)
                x = np.float64(read(buffer, scale))
            weights = 0.0
            for start in range(0, columns, BLOCK):
                count = min(BLOCK, columns - start)
                padded = -(-count // PAIR) * PAIR
                gather_x(buffer, 0, address + start * step, step, count, scale, cap, token)
                top = np.float64(block_max(buffer, padded, scale))
                if argmax and (top > m or best < 0):
                    for i in range(count):
                        if read(buffer + i * size, scale) == top:
                            best = start + i
                            break
                if top > m:
                    u += weights * (reference(m) - top)
                    if m > -INFINITY:
                        shrink = math.exp(m - top)
                        t = shrink * (t + s * (m - top))
                        s *= shrink
                        q *= shrink * shrink
                    m = top
                base = reference(m)
                if entropy:
                    more_s, more_t = block_entropy(buffer, padded, base, scale)
                    t += more_t
                else:
                    _, more_s = block_max_sum(buffer, padded, one, base, scale)
                s += more_s
                if squares:
                    q += block_squares(buffer, padded, base, scale)
                if smooth:
                    w = weight + start * size if weight != 0 else 0
                    more_u, more_w = block_smooth(buffer, count, base, w, scale)
                    u += more_u
                    weights += more_w
        place = out[0] + row * size
        write(place, m, scale)
        write(place + out[1], s, scale)
        write(place + 2 * out[1], x, scale)
        place += 3 * out[1]
        if smooth:
            write(place, u, scale)
            place += out[1]
        if entropy:
            write(place, t, scale)
            place += out[1]
        if squares:
            write(place, q, scale)
            place += out[1]
        if argmax and size == 4:
            write(place, max(best, 0), INT32)
        elif argmax:
            write(place, max(best, 0), INT64)


@kernel
def gradient_general(
    begin: int,
    end: int,
    columns: int,
    logits: Matrix,
    target: Vector,
    m: Vector,
    s: Vector,
    softmax: Vector,
    target_part: Vector,
    smooth: Vector,
    entropy: Vector,
    weight: int,
    scales: Vector,
    every_scale: float,
    cap: float,
    token: Any,
    out: Matrix,
) -> None:
    """Any parts, any strides."""
    size = size_of(every_scale)
    buffer, slopes = scratch(every_scale), scratch(every_scale)
    one = number(1.0, every_scale)
    for row in range(begin, end):
        scale = scale_of(scales, row, every_scale)
        source = logits[0] + row * logits[1]
        destination = out[0] + row * out[1]
        y = read(target[0] + row * target[1], INT64)
        row_softmax, row_target = item(softmax, row, scale), item(target_part, row, scale)
        row_smooth = item(smooth, row, scale) if smooth[0] != 0 else 0.0
        row_entropy = item(entropy, row, scale) if entropy[0] != 0 else 0.0
        unused = row_softmax == 0.0 and row_target == 0.0
        if y == IGNORED or (unused and row_smooth == 0.0 and row_entropy == 0.0):
            write_zeros(destination, out[2], columns, token)
            continue
        row_m, row_s = item(m, row, scale), item(s, row, scale)
        factor, bend, log_s = row_softmax / row_s, row_entropy / row_s, math.log(row_s)
        # Read before it is overwritten.
        x, slope = 0.0, 1.0
        if 0 <= y < columns:
            gather_x(buffer, slopes, source + y * logits[2], logits[2], 1, scale, cap, token)
            x = np.float64(read(buffer, scale))
            if cap != 0.0:
                slope = np.float64(read(slopes, scale))
        for start in range(0, columns, BLOCK):
            count = min(BLOCK, columns - start)
            padded = -(-count // PAIR) * PAIR
            place = source + start * logits[2]
            gather_x(buffer, slopes, place, logits[2], count, scale, cap, token)
            if entropy[0] != 0:
                block_entropy_gradient(buffer, padded, row_m, log_s, factor, bend, scale)
            else:
                block_gradient(buffer, buffer, padded, one, row_m, factor, scale)
            if smooth[0] != 0:
                w = weight + start * size if weight != 0 else 0
                subtract_smooth(buffer, count, w, row_smooth, scale)
            if cap != 0.0:
                multiply_by_slopes(buffer, slopes, count, scale)
            scatter(destination + start * out[2], out[2], buffer, count, scale, token)
        if 0 <= y < columns:
            if weight != 0:
                row_smooth *= read(weight + y * size, scale)
            place, d = destination + y * out[2], x - row_m
            write_target(
                place, d, row_s, row_softmax, row_target, row_smooth, row_entropy, slope, scale,
                token,
            )  # fmt: skip


@kernel
def log_prob(
    begin: int,
    end: int,
    columns: int,
    logits: Matrix,
    m: Vector,
    s: Vector,
    scales: Vector,
    every_scale: float,
    cap: float,
    token: Any,
    out: Matrix,
) -> None:
    """x - m - log s; any strides."""
    size = size_of(every_scale)
    buffer = scratch(every_scale)
    for row in range(begin, end):
        scale = scale_of(scales, row, every_scale)
        source = logits[0] + row * logits[1]
        destination = out[0] + row * out[1]
        row_m, log_s = item(m, row, scale), math.log(item(s, row, scale))
        for start in range(0, columns, BLOCK):
            count = min(BLOCK, columns - start)
            address = source + start * logits[2]
            gather_x(buffer, 0, address, logits[2], count, scale, cap, token)
            for i in range(0, count, LANES):
                place = buffer + i * size
                store(place, load(place, scale) - row_m - log_s, scale)
            scatter(destination + start * out[2], out[2], buffer, count, scale, token)
