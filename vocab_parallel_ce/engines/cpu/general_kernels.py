"""The loops of the CPU engine that serve everything: all options, any strides.

They first copy each block, capped and times ``scale``, into a buffer on the stack, whatever the
strides, and then make one short pass over it for each thing that is wanted. Sums, pieces and
arguments are as ``fast_kernels.py`` says. Beside those arguments, ``cap`` is the softcap, 0 for
none, and ``weight`` the address of the class weights, 0 for none.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from vocab_parallel_ce.engines.contract import IGNORED
from vocab_parallel_ce.engines.cpu.blocks import (
    block_entropy,
    block_entropy_gradient,
    block_gradient,
    block_max,
    block_max_sum,
    block_smooth,
    block_squares,
    subtract_smooth,
)
from vocab_parallel_ce.engines.cpu.compiling import kernel
from vocab_parallel_ce.engines.cpu.lanes import LANES, number
from vocab_parallel_ce.engines.cpu.memory import (
    BLOCK,
    PAIR,
    load,
    read,
    scratch,
    size_of,
    store,
    write,
)
from vocab_parallel_ce.engines.cpu.rows import (
    Matrix,
    Vector,
    column_of,
    gather_x,
    item,
    multiply_by_slopes,
    piece,
    reference,
    scale_of,
    scatter,
    write_target,
    write_zeros,
)

INFINITY = math.inf
INT32, INT64 = np.int32(0), np.int64(0)


@kernel
def partials(
    begin: int,
    end: int,
    row_columns: int,
    width: int,
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
    for index in range(begin, end):
        row, first, columns = piece(index, row_columns, width)
        scale = scale_of(scales, row, every_scale)
        y = column_of(read(target[0] + row * target[1], INT64), first)
        m, s, x, u, t, q, best = -INFINITY, 0.0, 0.0, 0.0, 0.0, 0.0, -1
        if y == IGNORED and not ignored_rows:
            m = 0.0
        else:
            address = logits[0] + row * logits[1] + first * step
            if 0 <= y < columns:
                gather_x(buffer, 0, address + y * step, step, 1, scale, cap, token)
                x = np.float64(read(buffer, scale))
            weights = 0.0
            for start in range(0, columns, BLOCK):
                count = min(BLOCK, columns - start)
                padded = -(-count // PAIR) * PAIR
                place = address + start * step
                gather_x(buffer, 0, place, step, count, scale, cap, token)
                stream = place if step == size_of(token) else buffer
                top = np.float64(block_max(buffer, padded, scale))
                if argmax and (top > m or best < 0):
                    for i in range(count):
                        if read(buffer + i * size, scale) == top:
                            best = first + start + i
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
                    more_s, more_t = block_entropy(buffer, padded, base, scale, stream, token)
                    t += more_t
                else:
                    _, more_s = block_max_sum(buffer, padded, one, base, scale, stream, token)
                s += more_s
                if squares:
                    q += block_squares(buffer, padded, base, scale)
                if smooth:
                    w = weight + (first + start) * size if weight != 0 else 0
                    more_u, more_w = block_smooth(buffer, count, base, w, scale)
                    u += more_u
                    weights += more_w
        place = out[0] + index * size
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
def gradient(
    begin: int,
    end: int,
    row_columns: int,
    width: int,
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
    for index in range(begin, end):
        row, first, columns = piece(index, row_columns, width)
        scale = scale_of(scales, row, every_scale)
        source = logits[0] + row * logits[1] + first * logits[2]
        destination = out[0] + row * out[1] + first * out[2]
        y = column_of(read(target[0] + row * target[1], INT64), first)
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
            stream = place if logits[2] == size_of(token) else buffer
            if entropy[0] != 0:
                block_entropy_gradient(
                    buffer, padded, row_m, log_s, factor, bend, scale, stream, token
                )
            else:
                block_gradient(buffer, buffer, padded, one, row_m, factor, scale, stream, token)
            if smooth[0] != 0:
                w = weight + (first + start) * size if weight != 0 else 0
                subtract_smooth(buffer, count, w, row_smooth, scale)
            if cap != 0.0:
                multiply_by_slopes(buffer, slopes, count, scale)
            scatter(destination + start * out[2], out[2], buffer, count, scale, token)
        if 0 <= y < columns:
            if weight != 0:
                row_smooth *= read(weight + (first + y) * size, scale)
            place, d = destination + y * out[2], x - row_m
            write_target(
                place, d, row_s, row_softmax, row_target, row_smooth, row_entropy, slope, scale,
                token,
            )  # fmt: skip


@kernel
def log_prob(
    begin: int,
    end: int,
    row_columns: int,
    width: int,
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
    for index in range(begin, end):
        row, first, columns = piece(index, row_columns, width)
        scale = scale_of(scales, row, every_scale)
        source = logits[0] + row * logits[1] + first * logits[2]
        destination = out[0] + row * out[1] + first * out[2]
        row_m, log_s = item(m, row, scale), math.log(item(s, row, scale))
        for start in range(0, columns, BLOCK):
            count = min(BLOCK, columns - start)
            address = source + start * logits[2]
            gather_x(buffer, 0, address, logits[2], count, scale, cap, token)
            for i in range(0, count, LANES):
                place = buffer + i * size
                store(place, load(place, scale) - row_m - log_s, scale)
            scatter(destination + start * out[2], out[2], buffer, count, scale, token)
