"""The loops of the CPU engine over rows [begin, end) of one shard: the usual loss, nothing else.

A row is read once from memory, in blocks of BLOCK elements. Its sums are kept in fp32 lanes inside
a block and in fp64 across blocks. These kernels work on contiguous logits where they lie and take
one pass a block: the sum of e^(x - base) is formed together with the block's maximum, where
``base`` is a maximum seen earlier. Only if the block rises above it is the block, still in the
first-level cache, summed again. The last columns, which fill no vector, are read and written under
a mask. What they cannot serve takes ``general_kernels.py``.

A kernel is compiled by Numba at its first use. It works on pieces of rows: ``width`` columns each,
the last of a row fewer (``pieces.py``). Piece ``index`` of all is written there in the partials,
which ``merging.py`` makes those of rows. An element is read before it is written, so ``out`` may be
the logits themselves.

Arrays arrive as an address and steps in bytes, so one compilation serves every layout. ``token``
tells how logits are stored (see lanes), ``scale`` has the arithmetic type and is its token. It is
the scale of every row, unless ``scales`` has one a row. ``out`` of the partials is the first
statistic and the step to the next. Scalars of a row are fp64 and hold fp32 values where the
contract wants fp32.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from vocab_parallel_ce.engines.contract import IGNORED
from vocab_parallel_ce.engines.cpu.blocks import block_gradient
from vocab_parallel_ce.engines.cpu.compiling import kernel
from vocab_parallel_ce.engines.cpu.lanes import number
from vocab_parallel_ce.engines.cpu.memory import BLOCK, read, size_of, write
from vocab_parallel_ce.engines.cpu.rows import (
    Matrix,
    Vector,
    clean,
    column_of,
    fold,
    item,
    piece,
    scale_of,
    target_logit,
    write_target,
    write_zeros,
)

INFINITY = math.inf
INT64 = np.int64(0)


@kernel
def partials(
    begin: int,
    end: int,
    row_columns: int,
    width: int,
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
    for index in range(begin, end):
        row, first, columns = piece(index, row_columns, width)
        scale = scale_of(scales, row, every_scale)
        y = column_of(read(target[0] + row * target[1], INT64), first)
        m, base, s, x = -INFINITY, -INFINITY, 0.0, 0.0
        if y == IGNORED and not ignored_rows:
            m = 0.0
        else:
            address = logits[0] + row * logits[1] + first * size
            x = target_logit(address, size, columns, y, scale, token)
            for start in range(0, columns, BLOCK):
                block, count = address + start * size, min(BLOCK, columns - start)
                m, base, s = fold(m, base, s, block, count, scale, token)
            if m > base:
                s *= math.exp(base - m)
        place = out[0] + index * size_of(scale)
        write(place, m, scale)
        write(place + out[1], s, scale)
        write(place + 2 * out[1], x, scale)


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
    scales: Vector,
    every_scale: float,
    token: Any,
    out: Matrix,
) -> None:
    """Softmax and target parts only; contiguous columns of logits and out, no cap."""
    size = size_of(token)
    for index in range(begin, end):
        row, first, columns = piece(index, row_columns, width)
        scale = number(clean(np.float64(scale_of(scales, row, every_scale))), every_scale)
        source = logits[0] + row * logits[1] + first * size
        destination = out[0] + row * out[1] + first * size
        y = column_of(read(target[0] + row * target[1], INT64), first)
        row_softmax, row_target = item(softmax, row, scale), item(target_part, row, scale)
        if y == IGNORED or (row_softmax == 0.0 and row_target == 0.0):
            write_zeros(destination, size, columns, token)
            continue
        row_m, row_s = clean(item(m, row, scale)), item(s, row, scale)
        factor = clean(row_softmax / row_s)
        # Read before it is overwritten.
        x = target_logit(source, size, columns, y, scale, token)
        block_gradient(source, destination, columns, scale, row_m, factor, token, source, token)
        if 0 <= y < columns:
            place = destination + y * size
            write_target(
                place, x - row_m, row_s, row_softmax, row_target, 0.0, 0.0, 1.0, scale, token
            )
