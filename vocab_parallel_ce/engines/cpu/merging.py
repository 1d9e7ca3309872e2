"""The partials of rows from those of their pieces, in order."""

from __future__ import annotations

import math

import numpy as np

from vocab_parallel_ce.engines.cpu.compiling import kernel
from vocab_parallel_ce.engines.cpu.memory import read, size_of, write
from vocab_parallel_ce.engines.cpu.rows import Vector, reference

INFINITY = math.inf
INT32, INT64 = np.int32(0), np.int64(0)


@kernel
def merge(
    begin: int,
    end: int,
    row_columns: int,
    width: int,
    parts: Vector,
    weights: int,
    smooth: bool,
    entropy: bool,
    squares: bool,
    argmax: bool,
    scale: float,
    out: Vector,
) -> None:
    """The partials of rows from those of their pieces, in order.

    ``weights`` has the W of each piece; it is 0 where every class counts 1.
    """
    size = size_of(scale)
    pieces = -(-row_columns // width)
    for row in range(begin, end):
        source, place = parts[0] + row * pieces * size, out[0] + row * size
        m, best = -INFINITY, 0
        for i in range(pieces):
            m_i = np.float64(read(source + i * size, scale))
            if i == 0 or m_i > m:
                m, best = m_i, i
        base = reference(m)
        s, x, u, t, q = 0.0, 0.0, 0.0, 0.0, 0.0
        for i in range(pieces):
            at = source + i * size
            shift = reference(np.float64(read(at, scale))) - base
            keep = math.exp(min(shift, 0.0))  # above 0 where a piece is all -inf: 0 * inf is NaN
            s_i = np.float64(read(at + parts[1], scale)) * keep
            s += s_i
            x += np.float64(read(at + 2 * parts[1], scale))
            at += 3 * parts[1]
            if smooth:
                w = np.float64(min(width, row_columns - i * width))
                if weights != 0:
                    w = np.float64(read(weights + i * size, scale))
                u += np.float64(read(at, scale)) + w * shift
                at += parts[1]
            if entropy:
                t += np.float64(read(at, scale)) * keep + shift * s_i
                at += parts[1]
            if squares:
                q += np.float64(read(at, scale)) * keep * keep
        write(place, m, scale)
        write(place + out[1], s, scale)
        write(place + 2 * out[1], x, scale)
        place, source = place + 3 * out[1], source + best * size + 3 * parts[1]
        for wanted, value in ((smooth, u), (entropy, t), (squares, q)):
            if wanted:
                write(place, value, scale)
                place += out[1]
                source += parts[1]
        # A token's type is fixed when it is compiled: one variable for both would be an int64.
        if argmax and size == 4:
            write(place, read(source, INT32), INT32)
        elif argmax:
            write(place, read(source, INT64), INT64)
