"""The loops of the CPU engine over rows [begin, end) of one shard. Compiled by Numba at first use.

A row is read once from memory, in blocks of BLOCK elements that stay in the first-level cache: the
largest of a block, a rescaling of the row's sums when the maximum rises, then the block's sum of
exponentials. Sums are kept in fp32 lanes inside a block and in fp64 across blocks.

The fast kernels take contiguous columns and work on the logits where they lie; only the last
columns of a row that fill no vector go through a small buffer. The general ones first copy each
block, times ``scale``, into a buffer on the stack, whatever the strides. A block is read entirely
before it is written, so ``out`` may be the logits themselves.

Arrays arrive as an address and a step in bytes, so one compilation serves every layout. ``token``
tells how logits are stored (see cpu_lanes), ``scale`` has the arithmetic type and is its token.
Scalars of a row are fp64 and hold fp32 values where the contract wants fp32.
"""

from __future__ import annotations

import math

import numpy as np

from vocab_parallel_ce.engines.contract import IGNORED
from vocab_parallel_ce.engines.cpu_lanes import (
    BLOCK,
    LANES,
    exp,
    helper,
    highest,
    kernel,
    lanes_of,
    larger,
    load,
    load_any,
    number,
    read,
    scratch,
    size_of,
    store,
    store_any,
    total,
    where_less,
    write,
)

INFINITY = math.inf
SLACK = 1.0
INT32, INT64 = np.int32(0), np.int64(0)

# One block: ``address`` is contiguous, ``count`` a multiple of LANES unless said otherwise


@helper
def block_max(address, count, token):
    """Largest of the elements that are not NaN; -inf if there is none."""
    step = LANES * size_of(token)
    a = lanes_of(-INFINITY, token)
    b, c, d = a, a, a
    quads = count // (4 * LANES)
    for _ in range(quads):
        a = larger(load_any(address, token), a)
        b = larger(load_any(address + step, token), b)
        c = larger(load_any(address + 2 * step, token), c)
        d = larger(load_any(address + 3 * step, token), d)
        address += 4 * step
    for _ in range(count // LANES - 4 * quads):
        a = larger(load_any(address, token), a)
        address += step
    return highest(larger(larger(a, b), larger(c, d)))


@helper
def block_max_sum(address, count, scale, base, token):
    """max x and sum e^(x - base)"""
    step = LANES * size_of(token)
    top = lanes_of(-INFINITY, token)
    s = lanes_of(0.0, token)
    unit = scale == 1.0
    for _ in range(count // LANES):
        x = load_any(address, token)
        if not unit:
            x = x * scale
        top = larger(x, top)
        s = s + exp(x - base, scale)
        address += step
    return np.float64(highest(top)), total(s)


@helper
def block_entropy(address, count, m, token):
    """sum e^(x - m) and sum e^(x - m) (x - m)"""
    step = LANES * size_of(token)
    s = lanes_of(0.0, token)
    t = lanes_of(0.0, token)
    for _ in range(count // LANES):
        d = load(address, token) - m
        e = exp(d, token)
        s = s + e
        t = t + where_less(0.0, e, e * d, e)
        address += step
    return total(s), total(t)


@helper
def block_smooth(address, count, m, weight, token):
    """sum w (x - m) and sum w over any ``count`` columns; w = 1 where ``weight`` is 0."""
    step = LANES * size_of(token)
    u = lanes_of(0.0, token)
    w = lanes_of(0.0, token)
    full = count // LANES
    if weight == 0:
        for _ in range(full):
            u = u + (load(address, token) - m)
            address += step
        rest, weights = 0.0, float(count)
        for _ in range(count - full * LANES):
            rest += read(address, token) - m
            address += size_of(token)
        return total(u) + rest, weights
    for _ in range(full):
        factor = load(weight, token)
        u = u + factor * (load(address, token) - m)
        w = w + factor
        address += step
        weight += step
    rest, weights = 0.0, total(w)
    for _ in range(count - full * LANES):
        factor = np.float64(read(weight, token))
        rest += factor * (read(address, token) - m)
        weights += factor
        address += size_of(token)
        weight += size_of(token)
    return total(u) + rest, weights


@helper
def block_gradient(source, destination, count, scale, m, softmax, token):
    """softmax e^(x - m)"""
    step = LANES * size_of(token)
    unit = scale == 1.0
    for _ in range(count // LANES):
        x = load_any(source, token)
        if not unit:
            x = x * scale
        e = exp(x - m, token)
        store_any(destination, e * softmax, token)
        source += step
        destination += step


@helper
def block_entropy_gradient(address, count, m, log_s, softmax, entropy, token):
    """e^(x - m) (softmax - entropy log p), 0 where p is"""
    step = LANES * size_of(token)
    for _ in range(count // LANES):
        d = load(address, token) - m
        e = exp(d, token)
        store(address, where_less(0.0, e, e * (softmax - (d - log_s) * entropy), e), token)
        address += step


@helper
def subtract_smooth(address, count, weight, smooth, token):
    """Subtract w smooth from any ``count`` columns; w = 1 where ``weight`` is 0."""
    step = LANES * size_of(token)
    full = count // LANES
    if weight == 0:
        # The padding behind the last column may be changed as well.
        for _ in range(full + 1 if count > full * LANES else full):
            store(address, load(address, token) - smooth, token)
            address += step
        return
    for _ in range(full):
        store(address, load(address, token) - load(weight, token) * smooth, token)
        address += step
        weight += step
    for _ in range(count - full * LANES):
        write(address, read(address, token) - read(weight, token) * number(smooth, token), token)
        address += size_of(token)
        weight += size_of(token)


# Between a row and a buffer, or zeros


@helper
def gather(buffer, address, step, count, scale, token):
    """Fill ``buffer`` with ``count`` columns times scale, and to a multiple of LANES with -inf."""
    done = 0
    if step == size_of(token):
        done = count // LANES * LANES
        for i in range(0, done, LANES):
            store(buffer + i * size_of(scale), load(address + i * step, token) * scale, scale)
    for i in range(done, count):
        write(buffer + i * size_of(scale), read(address + i * step, token) * scale, scale)
    for i in range(count, -(-count // LANES) * LANES):
        write(buffer + i * size_of(scale), -INFINITY, scale)


@helper
def scatter(address, step, buffer, count, arithmetic, token):
    """Write ``count`` elements of ``buffer`` as columns of a row."""
    done = 0
    if step == size_of(token):
        done = count // LANES * LANES
        for i in range(0, done, LANES):
            store(address + i * step, load(buffer + i * size_of(arithmetic), arithmetic), token)
    for i in range(done, count):
        write(address + i * step, read(buffer + i * size_of(arithmetic), arithmetic), token)


@helper
def zeros(address, step, count, token):
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
def reference(m):
    """What columns are measured from: x - m would be NaN were both -inf, and hide a real NaN."""
    return m if m > -INFINITY else 0.0


@helper
def fold(m, base, s, address, count, scale, token):
    """The running maximum of a row and its sum of e^(x - base) after one more block.

    ``base`` is any earlier maximum not more than SLACK below m: a block is read twice only when
    it rises above that, and x - base is as exact as x - m.
    """
    if base == -INFINITY:
        base = np.float64(block_max(address, count, token) * scale)
    top, more = block_max_sum(address, count, scale, reference(base), token)
    if top > base + SLACK:
        s *= math.exp(base - top)
        base = top
        top, more = block_max_sum(address, count, scale, base, token)
    return max(m, top), base, s + more


@helper
def target_logit(address, step, columns, y, scale, token):
    """x at the target, 0 when it lives elsewhere."""
    return np.float64(read(address + y * step, token) * scale) if 0 <= y < columns else 0.0


@helper
def write_target(address, x, m, s, softmax, target, smooth, entropy, arithmetic, token):
    """The gradient of the target's column."""
    d = x - m
    p = math.exp(d) / s
    value = p * softmax - target - smooth
    if entropy != 0.0 and not p <= 0.0:
        value -= p * (d - math.log(s)) * entropy
    write(address, number(value, arithmetic), token)


# The kernels


@kernel
def partials_fast(
    begin, end, columns, logits, row_step, target, target_step,
    ignored_rows, scale, token, out, out_step,
):  # fmt: skip
    size = size_of(token)
    full = columns // LANES * LANES
    tail = scratch(scale)
    for row in range(begin, end):
        result = out + row * size_of(scale)
        y = read(target + row * target_step, INT64)
        m, base, s, x = -INFINITY, -INFINITY, 0.0, 0.0
        if y == IGNORED and not ignored_rows:
            m = 0.0
        else:
            address = logits + row * row_step
            x = target_logit(address, size, columns, y, scale, token)
            for start in range(0, full, BLOCK):
                count = min(BLOCK, full - start)
                block = address + start * size
                m, base, s = fold(m, base, s, block, count, scale, token)
            if full < columns:
                gather(tail, address + full * size, size, columns - full, scale, token)
                m, base, s = fold(m, base, s, tail, LANES, number(1.0, scale), scale)
            if m > base:
                s *= math.exp(base - m)
        write(result, m, scale)
        write(result + out_step, s, scale)
        write(result + 2 * out_step, x, scale)


@kernel
def gradient_fast(
    begin, end, columns, logits, row_step, target, target_step, m, m_step, s, s_step,
    softmax, softmax_step, correct, correct_step, scale, token, out, out_row_step,
):  # fmt: skip
    size = size_of(token)
    full = columns // LANES * LANES
    tail = scratch(scale)
    for row in range(begin, end):
        source = logits + row * row_step
        destination = out + row * out_row_step
        y = read(target + row * target_step, INT64)
        if y == IGNORED:
            zeros(destination, size, columns, token)
            continue
        row_m = np.float64(read(m + row * m_step, scale))
        row_s = np.float64(read(s + row * s_step, scale))
        row_softmax = np.float64(read(softmax + row * softmax_step, scale))
        # Read before it is overwritten.
        x = target_logit(source, size, columns, y, scale, token)
        factor = row_softmax / row_s
        block_gradient(source, destination, full, scale, row_m, factor, token)
        if full < columns:
            rest = columns - full
            gather(tail, source + full * size, size, rest, scale, token)
            block_gradient(tail, tail, LANES, number(1.0, scale), row_m, factor, scale)
            scatter(destination + full * size, size, tail, rest, scale, token)
        if 0 <= y < columns:
            row_target = np.float64(read(correct + row * correct_step, scale))
            address = destination + y * size
            write_target(address, x, row_m, row_s, row_softmax, row_target, 0.0, 0.0, scale, token)


@kernel
def partials_general(
    begin, end, columns, logits, row_step, column_step, target, target_step, weight,
    smooth, entropy, argmax, ignored_rows, scale, token, out, out_step,
):  # fmt: skip
    size = size_of(scale)
    buffer = scratch(scale)
    one = number(1.0, scale)
    for row in range(begin, end):
        address = logits + row * row_step
        y = read(target + row * target_step, INT64)
        m, s, x, u, t, best = -INFINITY, 0.0, 0.0, 0.0, 0.0, -1
        if y == IGNORED and not ignored_rows:
            m = 0.0
        else:
            x = target_logit(address, column_step, columns, y, scale, token)
            weights = 0.0
            for start in range(0, columns, BLOCK):
                count = min(BLOCK, columns - start)
                padded = -(-count // LANES) * LANES
                gather(buffer, address + start * column_step, column_step, count, scale, token)
                top = np.float64(block_max(buffer, padded, scale))
                if argmax and (top > m or best < 0):
                    for i in range(count):
                        if read(buffer + i * size, scale) == top:
                            best = start + i
                            break
                if top > m:
                    fall = m - top
                    u += weights * (reference(m) - top)
                    if m > -INFINITY:
                        t = math.exp(fall) * (t + s * fall)
                        s *= math.exp(fall)
                    m = top
                if entropy:
                    more_s, more_t = block_entropy(buffer, padded, reference(m), scale)
                    t += more_t
                else:
                    _, more_s = block_max_sum(buffer, padded, one, reference(m), scale)
                s += more_s
                if smooth:
                    w = weight + start * size if weight != 0 else 0
                    more_u, more_w = block_smooth(buffer, count, reference(m), w, scale)
                    u += more_u
                    weights += more_w
        result = out + row * size
        write(result, m, scale)
        write(result + out_step, s, scale)
        write(result + 2 * out_step, x, scale)
        result += 3 * out_step
        if smooth:
            write(result, u, scale)
            result += out_step
        if entropy:
            write(result, t, scale)
            result += out_step
        if argmax:
            if size == 4:
                write(result, max(best, 0), INT32)
            else:
                write(result, max(best, 0), INT64)


@kernel
def gradient_general(
    begin, end, columns, logits, row_step, column_step, target, target_step, m, m_step, s, s_step,
    softmax, softmax_step, correct, correct_step, smooth, smooth_step, entropy, entropy_step,
    weight, scale, token, out, out_row_step, out_column_step,
):  # fmt: skip
    size = size_of(scale)
    buffer = scratch(scale)
    one = number(1.0, scale)
    for row in range(begin, end):
        source = logits + row * row_step
        destination = out + row * out_row_step
        y = read(target + row * target_step, INT64)
        if y == IGNORED:
            zeros(destination, out_column_step, columns, token)
            continue
        row_m = np.float64(read(m + row * m_step, scale))
        row_s = np.float64(read(s + row * s_step, scale))
        row_softmax = np.float64(read(softmax + row * softmax_step, scale))
        row_smooth, row_entropy = 0.0, 0.0
        if smooth != 0:
            row_smooth = np.float64(read(smooth + row * smooth_step, scale))
        if entropy != 0:
            row_entropy = np.float64(read(entropy + row * entropy_step, scale))
        # Read before it is overwritten.
        x = target_logit(source, column_step, columns, y, scale, token)
        for start in range(0, columns, BLOCK):
            count = min(BLOCK, columns - start)
            padded = -(-count // LANES) * LANES
            gather(buffer, source + start * column_step, column_step, count, scale, token)
            factor = row_softmax / row_s
            if entropy != 0:
                log_s = math.log(row_s)
                per_s = row_entropy / row_s
                block_entropy_gradient(buffer, padded, row_m, log_s, factor, per_s, scale)
            else:
                block_gradient(buffer, buffer, padded, one, row_m, factor, scale)
            if smooth != 0:
                w = weight + start * size if weight != 0 else 0
                subtract_smooth(buffer, count, w, row_smooth, scale)
            place = destination + start * out_column_step
            scatter(place, out_column_step, buffer, count, scale, token)
        if 0 <= y < columns:
            row_target = np.float64(read(correct + row * correct_step, scale))
            if weight != 0:
                row_smooth *= read(weight + y * size, scale)
            place = destination + y * out_column_step
            write_target(
                place, x, row_m, row_s, row_softmax, row_target,
                row_smooth, row_entropy, scale, token,
            )  # fmt: skip


@kernel
def log_prob(
    begin, end, columns, logits, row_step, column_step, m, m_step, s, s_step,
    scale, token, out, out_row_step, out_column_step,
):  # fmt: skip
    buffer = scratch(scale)
    for row in range(begin, end):
        source = logits + row * row_step
        destination = out + row * out_row_step
        row_m = np.float64(read(m + row * m_step, scale))
        log_s = math.log(np.float64(read(s + row * s_step, scale)))
        for start in range(0, columns, BLOCK):
            count = min(BLOCK, columns - start)
            gather(buffer, source + start * column_step, column_step, count, scale, token)
            for i in range(0, count, LANES):
                place = buffer + i * size_of(scale)
                store(place, load(place, scale) - row_m - log_s, scale)
            place = destination + start * out_column_step
            scatter(place, out_column_step, buffer, count, scale, token)
