"""The Triton kernels of the triton engine: one read of a row forward, one read and write backward.

A row is cut where 16-byte words begin, whatever its stride and length (VEC elements each):

    | edge: head | body: whole words, read and written 128 bits at a time | edge: tail |

so that no alignment of the caller's decides the speed. Forward, every thread keeps statistics of
its own (LANES of them a program) and meets the others once a row: a block-wide maximum in every
step would cost two barriers each. They merge by the formulas of ``statistics``; the maximum of
a lane without columns is the lowest finite number, so that no difference is inf - inf. All sums are
in a fixed order, which follows from the row's length and alignment alone.

Arithmetic is fp32. x - m comes before the factor log2(e) of the exponential: folding that factor
into x would cost e^(x - m) four digits at logits near 1000.

Programs loop over rows because the grid may be smaller than N (Ascend takes at most 65535).
"""

# No `from __future__ import annotations`: Triton reads the annotations of its arguments.

import triton
import triton.language as tl

ELSEWHERE_OR_IGNORED = tl.constexpr(0)  # local_target is a column from here on
IGNORED = tl.constexpr(-2)
NOTHING = tl.constexpr(-3)  # no local_target
LOWEST = tl.constexpr(-3.4028234663852886e38)
NO_COLUMN = tl.constexpr(2**31 - 1)
LOG2_E = tl.constexpr(1.4426950408889634)
LN2_HIGH = tl.constexpr(0.693359375)  # ten bits: its product with an integer is exact
LN2_LOW = tl.constexpr(-2.1219444005469057e-4)

# Numbers that differ from call to call: compiled once for all their values, not for some of them.
_NUMBERS = ["phase", "row_stride", "n_rows", "n_cols"]


@triton.jit
def _edges(phase, offset, size, VEC: tl.constexpr):
    """(head, body): columns before the first whole word, and columns in whole words.

    ``phase`` is where the tensor begins in its word, ``offset`` where the row begins in the tensor.
    """
    head = (VEC - (phase + offset) % VEC) % VEC
    head = tl.minimum(head, size).to(tl.int32)
    return head, (size - head) // VEC * VEC


@triton.jit
def _edge_columns(head, body, size, VEC: tl.constexpr):
    """The columns of both edges, [2 VEC], and which of them exist."""
    i = tl.arange(0, 2 * VEC)
    column = tl.where(i < VEC, i, head + body + i - VEC)
    return column, tl.where(i < VEC, i < head, column < size)


@triton.jit
def _offset(row, row_stride, column, col_stride):
    return tl.cast(row, tl.int64) * row_stride + tl.cast(column, tl.int64) * col_stride


@triton.jit
def _steps(columns, stride, APART: tl.constexpr):
    """Distances in memory. Within a dense row, 32 bits hold them."""
    return columns.to(tl.int64) * stride if APART else columns


@triton.jit
def _words(source, columns, body, col_stride, APART: tl.constexpr):
    """Logits of these columns of the body; 0 beyond its end."""
    return tl.load(source + _steps(columns, col_stride, APART), mask=columns < body, other=0.0)


@triton.jit
def _exp(d):
    """e^d, which on a card is one instruction that flushes subnormals to 0."""
    return tl.exp2(d * LOG2_E)


@triton.jit
def _tanh(y):
    """tanh: y + y^3 P(y^2) below 0.625, as in Cephes, else by the exponential.

    d = k log 2 + f: of d log2(e) the rounding would be multiplied by the cap.
    """
    d = tl.maximum(-2 * tl.abs(y), -60.0)
    k = tl.floor(d * LOG2_E + 0.5)
    e = tl.exp2(k) * _exp(d - k * LN2_HIGH - k * LN2_LOW)
    far = 1 - 2 * e / (1 + e)
    far = tl.where(y < 0, -far, far)
    z = y * y
    p = (-5.70498872745e-3 * z + 2.06390887954e-2) * z - 5.37397155531e-2
    p = (p * z + 1.33314422036e-1) * z - 3.33332819422e-1
    return tl.where(tl.abs(y) > 0.625, far, y + y * z * p)


@triton.jit
def _x(logits, scale, cap, CAPPED: tl.constexpr):
    """x in fp32 of logits as they lie."""
    x = logits.to(tl.float32)
    if CAPPED:
        x = cap * _tanh(x / cap)
    return x * scale


@triton.jit
def _scale_of(scales, row, scale, ROW_SCALE: tl.constexpr):
    if ROW_SCALE:
        scale = tl.load(scales + row)
    return scale


@triton.jit
def _add(
    m, s, u, t, w, q, best, x, columns, inside, weight,
    WEIGHTED: tl.constexpr, SMOOTH: tl.constexpr, ENTROPY: tl.constexpr, SQUARES: tl.constexpr,
    ARGMAX: tl.constexpr,
):  # fmt: skip
    """Take x [L, V] into the statistics of L lanes: one exponential an element and one a lane.

    ``inside`` says which elements exist; those that do not are -inf, or their lane is discarded.
    """
    top = tl.maximum(m, tl.max(x, 1))
    shift = tl.maximum(m - top, LOWEST)
    keep = _exp(shift)
    d = x - top[:, None]
    e = _exp(d)
    s *= keep
    if ENTROPY:
        # After s: shift * s may overflow where keep is 0.
        t = t * keep + shift * s + tl.sum(tl.where(e == 0, 0.0, e * d), 1)
    s += tl.sum(e, 1)
    if SQUARES:
        q = q * keep * keep + tl.sum(e * e, 1)
    if SMOOTH:
        here = tl.where(inside, 1.0, tl.zeros_like(x))
        if WEIGHTED:
            here = tl.load(weight + columns, mask=inside, other=0.0)
        u += w * shift + tl.sum(tl.where(inside, here * d, 0.0), 1)
        w += tl.sum(here, 1)
    if ARGMAX:
        first = tl.min(tl.where(x == top[:, None], columns, NO_COLUMN), 1)
        best = tl.where(top > m, first, tl.minimum(best, first))
    return top, s, u, t, w, q, best


@triton.jit(do_not_specialize=[*_NUMBERS, "out_stride"])
def row_partials(
    logits, phase, row_stride, col_stride, local_target, weight, out, out_bits, out_stride,
    n_rows, n_cols, scales, every_scale, cap,
    LANES: tl.constexpr, VEC: tl.constexpr, APART: tl.constexpr, WEIGHTED: tl.constexpr,
    SMOOTH: tl.constexpr, ENTROPY: tl.constexpr, SQUARES: tl.constexpr, ARGMAX: tl.constexpr,
    IGNORED_ROWS: tl.constexpr, ROW_SCALE: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """``partials`` of the contract: out[i, row] = out + i * out_stride + row; grid (rows,)."""
    UNREAD: tl.constexpr = NOTHING if IGNORED_ROWS else IGNORED
    lane = tl.arange(0, LANES)
    in_lane = lane[:, None] * VEC + tl.arange(0, VEC)[None, :]
    for row in range(tl.program_id(0), n_rows, tl.num_programs(0)):
        target = tl.load(local_target + row)
        scale = _scale_of(scales, row, every_scale, ROW_SCALE)
        x_y = 0.0
        m_row, s_row, u_row, t_row, q_row = 0.0, 0.0, 0.0, 0.0, 0.0
        best_row = 0
        if target != UNREAD:
            offset = _offset(row, row_stride, 0, 0)
            head, body = _edges(phase, offset, n_cols, VEC)
            here = target >= ELSEWHERE_OR_IGNORED
            z_y = tl.load(
                logits + offset + tl.where(here, target, 0) * col_stride, mask=here, other=0.0
            )
            x_y = tl.where(here, _x(z_y, scale, cap, CAPPED), 0.0)

            m = tl.full([LANES], LOWEST, tl.float32)
            s, u, t = tl.zeros_like(m), tl.zeros_like(m), tl.zeros_like(m)
            w, q = tl.zeros_like(m), tl.zeros_like(m)
            best = tl.full([LANES], NO_COLUMN, tl.int32)
            if body < n_cols:
                # The edges are one more lane, which then begins as lane 0.
                columns, inside = _edge_columns(head, body, n_cols, VEC)
                columns, inside = columns[None, :], inside[None, :]
                source = logits + offset + _steps(columns, col_stride, APART)
                x = _x(tl.load(source, mask=inside, other=0.0), scale, cap, CAPPED)
                x = tl.where(inside, x, -float("inf"))
                one = tl.full([1], LOWEST, tl.float32)
                zero = tl.zeros_like(one)
                none = tl.full([1], NO_COLUMN, tl.int32)
                m1, s1, u1, t1, w1, q1, b1 = _add(
                    one, zero, zero, zero, zero, zero, none, x, columns, inside, weight,
                    WEIGHTED, SMOOTH, ENTROPY, SQUARES, ARGMAX,
                )  # fmt: skip
                m, s = tl.where(lane == 0, m1, m), tl.where(lane == 0, s1, s)
                u, t = tl.where(lane == 0, u1, u), tl.where(lane == 0, t1, t)
                w, best = tl.where(lane == 0, w1, w), tl.where(lane == 0, b1, best)
                q = tl.where(lane == 0, q1, q)

            source = logits + offset + head * col_stride
            if not APART:
                source = tl.multiple_of(source, 16)
            ahead = _words(source, in_lane, body, col_stride, APART)
            for begin in range(0, body, LANES * VEC):
                # The next words are on their way while these are worked on.
                words, columns = ahead, begin + in_lane
                ahead = _words(source, columns + LANES * VEC, body, col_stride, APART)
                inside = begin + lane * VEC < body  # all of a word or none of it
                m2, s2, u2, t2, w2, q2, b2 = _add(
                    m, s, u, t, w, q, best, _x(words, scale, cap, CAPPED), head + columns,
                    inside[:, None], weight, WEIGHTED, SMOOTH, ENTROPY, SQUARES, ARGMAX,
                )  # fmt: skip
                m, s = tl.where(inside, m2, m), tl.where(inside, s2, s)
                u, t = tl.where(inside, u2, u), tl.where(inside, t2, t)
                w, best = tl.where(inside, w2, w), tl.where(inside, b2, best)
                q = tl.where(inside, q2, q)

            top = tl.max(m, 0)
            shift = tl.maximum(m - top, LOWEST)
            s *= _exp(shift)
            s_row = tl.sum(s, 0)
            m_row = tl.where(s_row == 0, -float("inf"), top)
            if SMOOTH:
                u_row = tl.sum(u + w * shift, 0)
            if ENTROPY:
                t_row = tl.sum(t * _exp(shift) + shift * s, 0)
            if SQUARES:
                q_row = tl.sum(q * _exp(shift) * _exp(shift), 0)
            if ARGMAX:
                best_row = tl.min(tl.where(m == top, best, NO_COLUMN), 0)
                best_row = tl.where(best_row == NO_COLUMN, 0, best_row)
        place = out + row
        tl.store(place, m_row)
        tl.store(place + out_stride, s_row)
        tl.store(place + 2 * out_stride, x_y)
        if SMOOTH:
            tl.store(place + 3 * out_stride, u_row)
        if ENTROPY:
            tl.store(place + (3 + SMOOTH) * out_stride, t_row)
        if SQUARES:
            tl.store(place + (3 + SMOOTH + ENTROPY) * out_stride, q_row)
        if ARGMAX:
            tl.store(out_bits + row + (3 + SMOOTH + ENTROPY + SQUARES) * out_stride, best_row)


@triton.jit
def _gradient_block(
    source, goal, columns, inside, weight, scale, cap, m, log_s, softmax, target, target_part,
    smooth, entropy, SMOOTH: tl.constexpr, ENTROPY: tl.constexpr, WEIGHTED: tl.constexpr,
    CAPPED: tl.constexpr,
):  # fmt: skip
    """Some columns of a row; ``softmax`` and ``entropy`` come divided by s."""
    read = tl.where(target == IGNORED, False, inside)
    z = tl.load(source, mask=read, other=0.0)
    d = _x(z, scale, cap, CAPPED) - m
    e = _exp(d)
    if ENTROPY:
        # A column without probability adds 0, never 0 * -inf.
        softmax -= tl.where(e == 0, 0.0, entropy * (d - log_s))
    dx = e * softmax
    dx = tl.where(columns == target, dx - target_part, dx)
    if SMOOTH:
        if WEIGHTED:
            dx -= smooth * tl.load(weight + columns, mask=read, other=0.0)
        else:
            dx -= smooth
    if CAPPED:
        bent = _tanh(z.to(tl.float32) / cap)
        dx *= 1 - bent * bent
    # Of an ignored row everything may be NaN, so its zeros are chosen, not multiplied.
    dx = tl.where(target == IGNORED, 0.0, dx)
    tl.store(goal, dx.to(goal.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=[*_NUMBERS, "out_row_stride", "part_columns"])
def row_gradient(
    logits, phase, row_stride, col_stride, m, s, local_target,
    softmax, target_part, smooth, entropy, weight,
    out, out_row_stride, out_col_stride, n_rows, n_cols, part_columns, scales, every_scale, cap,
    BLOCK: tl.constexpr, VEC: tl.constexpr, APART: tl.constexpr, OUT_ALIGNED: tl.constexpr,
    ROW_SCALE: tl.constexpr, CAPPED: tl.constexpr, SMOOTH: tl.constexpr, ENTROPY: tl.constexpr,
    WEIGHTED: tl.constexpr,
):  # fmt: skip
    """``gradient`` of the contract; grid (rows, parts of ``part_columns`` columns).

    OUT_ALIGNED: the words of ``out`` begin at the same columns as those of ``logits``.
    """
    begin = tl.program_id(1) * part_columns
    size = tl.minimum(part_columns, n_cols - begin)
    for row in range(tl.program_id(0), n_rows, tl.num_programs(0)):
        offset = _offset(row, row_stride, begin, col_stride)
        out_offset = _offset(row, out_row_stride, begin, out_col_stride)
        head, body = _edges(phase, offset, size, VEC)
        target = tl.load(local_target + row).to(tl.int32)
        scale = _scale_of(scales, row, every_scale, ROW_SCALE)
        s_row = tl.load(s + row)
        m_row, log_s = tl.load(m + row), tl.log(s_row)
        softmax_row, target_row = tl.load(softmax + row), tl.load(target_part + row)
        smooth_row, entropy_row = 0.0, 0.0
        if SMOOTH:
            smooth_row = tl.load(smooth + row)
        if ENTROPY:
            entropy_row = tl.load(entropy + row)
        unused = (softmax_row == 0) & (target_row == 0) & (smooth_row == 0) & (entropy_row == 0)
        target = tl.where(unused, IGNORED, target)
        softmax_row, entropy_row = softmax_row / s_row, entropy_row / s_row
        if body < size:
            columns, inside = _edge_columns(head, body, size, VEC)
            _gradient_block(
                logits + offset + _steps(columns, col_stride, APART),
                out + out_offset + _steps(columns, out_col_stride, APART),
                begin + columns, inside, weight, scale, cap, m_row, log_s, softmax_row, target,
                target_row, smooth_row, entropy_row, SMOOTH, ENTROPY, WEIGHTED, CAPPED,
            )  # fmt: skip
        source = logits + offset + head * col_stride
        goal = out + out_offset + head * out_col_stride
        if not APART:
            source = tl.multiple_of(source, 16)
        if OUT_ALIGNED:
            goal = tl.multiple_of(goal, 16)
        for start in range(0, body, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            _gradient_block(
                source + _steps(columns, col_stride, APART),
                goal + _steps(columns, out_col_stride, APART),
                begin + head + columns, columns < body, weight, scale, cap, m_row, log_s,
                softmax_row, target, target_row, smooth_row, entropy_row, SMOOTH, ENTROPY, WEIGHTED,
                CAPPED,
            )  # fmt: skip


@triton.jit
def _log_prob_block(source, goal, inside, scale, cap, m, log_s, CAPPED: tl.constexpr):
    x = _x(tl.load(source, mask=inside, other=0.0), scale, cap, CAPPED)
    tl.store(goal, (x - m - log_s).to(goal.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=[*_NUMBERS, "out_row_stride", "part_columns"])
def row_log_prob(
    logits, phase, row_stride, col_stride, m, s,
    out, out_row_stride, out_col_stride, n_rows, n_cols, part_columns, scales, every_scale, cap,
    BLOCK: tl.constexpr, VEC: tl.constexpr, APART: tl.constexpr, OUT_ALIGNED: tl.constexpr,
    ROW_SCALE: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """``log_prob`` of the contract; grid and OUT_ALIGNED as in ``row_gradient``."""
    begin = tl.program_id(1) * part_columns
    size = tl.minimum(part_columns, n_cols - begin)
    for row in range(tl.program_id(0), n_rows, tl.num_programs(0)):
        offset = _offset(row, row_stride, begin, col_stride)
        out_offset = _offset(row, out_row_stride, begin, out_col_stride)
        head, body = _edges(phase, offset, size, VEC)
        m_row, log_s = tl.load(m + row), tl.log(tl.load(s + row))
        scale = _scale_of(scales, row, every_scale, ROW_SCALE)
        if body < size:
            columns, inside = _edge_columns(head, body, size, VEC)
            source = logits + offset + _steps(columns, col_stride, APART)
            goal = out + out_offset + _steps(columns, out_col_stride, APART)
            _log_prob_block(source, goal, inside, scale, cap, m_row, log_s, CAPPED)
        source = logits + offset + head * col_stride
        goal = out + out_offset + head * out_col_stride
        if not APART:
            source = tl.multiple_of(source, 16)
        if OUT_ALIGNED:
            goal = tl.multiple_of(goal, 16)
        for start in range(0, body, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            _log_prob_block(
                source + _steps(columns, col_stride, APART),
                goal + _steps(columns, out_col_stride, APART),
                columns < body, scale, cap, m_row, log_s, CAPPED,
            )  # fmt: skip
