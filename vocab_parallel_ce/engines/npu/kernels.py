"""Triton kernels shaped for the vector cores of an Ascend A2 or A3: the loss in one read of a row.

They differ from the CUDA kernels (engines/triton) wherever such a core does:

    programs    as many as there are vector cores, each with a contiguous range of rows: a core
                runs one program, and a grid is limited to 65535
    blocks      a row is whole blocks without a mask, then one masked rest, compiled only where
                there is one: a mask, and ``other`` above all, costs the overlap of load and compute
    compares    of vectors are in fp32: those of integers run as a loop over elements. Columns are
                exact in fp32 below 2^24. The mask of a load or a store is the exception: only a
                comparison of integers is understood as a part of the block. Any other mask makes
                it read, and write back, what lies beyond the row, where another core is at work
    statistics  one scalar each a row: a core's vectors are reduced at once
    target      one scalar load before the row, one scalar store after it; nothing that was stored
                is loaded again
    e^x         as it is: 2^x would be computed by e^x there
    prefetch    none: the compiler's double buffers overlap a block with the next

Triton's interpreter checks them, triton-ascend compiles them and plans their buffers on chip. They
never ran on a card.
"""

# No `from __future__ import annotations`: Triton reads the annotations of its arguments.

import triton
import triton.language as tl

IGNORED = tl.constexpr(-2)
NOTHING = tl.constexpr(-3)  # no local_target
LOWEST = tl.constexpr(-3.4028234663852886e38)
NO_COLUMN = tl.constexpr(3e38)

# Numbers that differ from call to call: compiled once for all their values, not for some of them.
_NUMBERS = ["row_stride", "n_rows", "n_cols", "out_stride", "out_row_stride"]


@triton.jit
def _rows_of_program(n_rows):
    """(first, end) of this program's rows."""
    each = tl.cdiv(n_rows, tl.num_programs(0))
    first = tl.program_id(0) * each
    return first, tl.minimum(first + each, n_rows)


@triton.jit
def _steps(begin, lanes, stride, APART: tl.constexpr):
    """Distances of a block's columns in memory. Within a dense row, 32 bits hold them."""
    return (begin + lanes).to(tl.int64) * stride if APART else begin + lanes


@triton.jit
def _tanh(y):
    """tanh: y + y^3 P(y^2) below 0.625, as in Cephes, else by the exponential; NaN stays NaN."""
    e = tl.exp(tl.maximum(-2 * tl.abs(y), -60.0))
    far = 1 - 2 * e / (1 + e)
    far = tl.where(y < 0.0, -far, far)
    z = y * y
    p = (-5.70498872745e-3 * z + 2.06390887954e-2) * z - 5.37397155531e-2
    p = (p * z + 1.33314422036e-1) * z - 3.33332819422e-1
    return tl.where(tl.abs(y) > 0.625, far, y + y * z * p)


@triton.jit
def _bent(logits, cap, CAPPED: tl.constexpr):
    """tanh(logits / cap) in fp32, or the logits where there is no cap."""
    x = logits.to(tl.float32)
    if CAPPED:
        x = _tanh(x / cap)
    return x


@triton.jit
def _factor_of(scales, row, every_scale, cap, ROW_SCALE: tl.constexpr, CAPPED: tl.constexpr):
    """What makes x of ``_bent``."""
    factor = every_scale
    if ROW_SCALE:
        factor = tl.load(scales + row)
    if CAPPED:
        factor = factor * cap
    return factor


@triton.jit
def _add(
    m, s, u, t, w, q, best, x, inside, begin, weights,
    TAIL: tl.constexpr, SMOOTH: tl.constexpr, ENTROPY: tl.constexpr, SQUARES: tl.constexpr,
    ARGMAX: tl.constexpr,
):  # fmt: skip
    """Take a block x into a row's statistics; where it is the rest, what is not inside is -inf."""
    top = tl.maximum(m, tl.max(x, 0))
    shift = tl.maximum(m - top, LOWEST)
    keep = tl.exp(shift)
    d = x - top
    e = tl.exp(d)
    s *= keep
    if ENTROPY:
        # After s: shift * s may overflow where keep is 0.
        t = t * keep + shift * s + tl.sum(tl.where(e == 0.0, 0.0, e * d), 0)
    if SQUARES:
        q = q * keep * keep + tl.sum(e * e, 0)
    s += tl.sum(e, 0)
    if SMOOTH:
        weighted = weights * d
        if TAIL:
            weighted = tl.where(inside, weighted, 0.0)
        u += w * shift + tl.sum(weighted, 0)
        w += tl.sum(weights, 0)
    if ARGMAX:
        lanes = tl.arange(0, x.shape[0]).to(tl.float32)
        first = begin + tl.min(tl.where(x == top, lanes, NO_COLUMN), 0)
        best = tl.where(top > m, first, tl.minimum(best, first))
    return top, s, u, t, w, q, best


@triton.jit(do_not_specialize=_NUMBERS)
def row_partials(
    logits, row_stride, col_stride, local_target, weight, out, out_bits, out_stride,
    n_rows, n_cols, scales, every_scale, cap,
    BLOCK: tl.constexpr, HAS_TAIL: tl.constexpr, APART: tl.constexpr, WEIGHTED: tl.constexpr,
    SMOOTH: tl.constexpr, ENTROPY: tl.constexpr, SQUARES: tl.constexpr, ARGMAX: tl.constexpr,
    IGNORED_ROWS: tl.constexpr, ROW_SCALE: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """``partials`` of the contract: out[i, row] = out + i * out_stride + row; grid (cores,)."""
    UNREAD: tl.constexpr = NOTHING if IGNORED_ROWS else IGNORED
    lanes = tl.arange(0, BLOCK)
    whole = n_cols // BLOCK * BLOCK
    first, end = _rows_of_program(n_rows)
    for row in range(first, end):
        target = tl.load(local_target + row)
        x_y, m_row, s_row, u_row, t_row, q_row = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
        best_row = 0
        if target != UNREAD:
            source = logits + tl.cast(row, tl.int64) * row_stride
            factor = _factor_of(scales, row, every_scale, cap, ROW_SCALE, CAPPED)
            if target >= 0:
                x_y = _bent(tl.load(source + target * col_stride), cap, CAPPED) * factor
            m, s, u, t, w, q = tl.cast(LOWEST, tl.float32), 0.0, 0.0, 0.0, 0.0, 0.0
            best = tl.cast(NO_COLUMN, tl.float32)
            for begin in range(0, whole, BLOCK):
                z = tl.load(source + _steps(begin, lanes, col_stride, APART))
                x = _bent(z, cap, CAPPED) * factor
                if WEIGHTED:
                    weights = tl.load(weight + begin + lanes)
                else:
                    weights = tl.full([BLOCK], 1.0, tl.float32)
                m, s, u, t, w, q, best = _add(
                    m, s, u, t, w, q, best, x, x, tl.cast(begin, tl.float32), weights,
                    False, SMOOTH, ENTROPY, SQUARES, ARGMAX,
                )  # fmt: skip
            if HAS_TAIL:
                inside = lanes < n_cols - whole
                place = source + _steps(whole, lanes, col_stride, APART)
                x = _bent(tl.load(place, mask=inside, other=0.0), cap, CAPPED) * factor
                here = lanes.to(tl.float32) < tl.cast(n_cols - whole, tl.float32)
                x = tl.where(here, x, -float("inf"))
                if WEIGHTED:
                    weights = tl.load(weight + whole + lanes, mask=inside, other=0.0)
                else:
                    weights = tl.where(here, 1.0, 0.0)
                m, s, u, t, w, q, best = _add(
                    m, s, u, t, w, q, best, x, here, tl.cast(whole, tl.float32), weights,
                    True, SMOOTH, ENTROPY, SQUARES, ARGMAX,
                )  # fmt: skip
            s_row, u_row, t_row, q_row = s, u, t, q
            m_row = tl.where(s == 0.0, -float("inf"), m)
            if ARGMAX:
                best_row = tl.where(best >= NO_COLUMN, 0.0, best).to(tl.int32)
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
def _gradient(
    z, factor, cap, m, weights, log_s, softmax, target_part, smooth, entropy,
    SMOOTH: tl.constexpr, ENTROPY: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """dx of columns that hold the logits z, or of one, of which ``target_part`` goes off.

    ``softmax`` and ``entropy`` come divided by s.
    """
    bent = _bent(z, cap, CAPPED)
    d = bent * factor - m
    e = tl.exp(d)
    if ENTROPY:
        # A column without probability adds 0, never 0 * -inf.
        softmax = softmax - tl.where(e == 0.0, 0.0, entropy * (d - log_s))
    dx = e * softmax
    if SMOOTH:
        dx -= smooth * weights
    dx -= target_part
    if CAPPED:
        dx *= 1 - bent * bent
    return dx


@triton.jit(do_not_specialize=_NUMBERS)
def row_gradient(
    logits, row_stride, col_stride, m, s, local_target, softmax, target_part, smooth, entropy,
    weight, out, out_row_stride, out_col_stride, n_rows, n_cols, scales, every_scale, cap,
    BLOCK: tl.constexpr, HAS_TAIL: tl.constexpr, APART: tl.constexpr, WEIGHTED: tl.constexpr,
    SMOOTH: tl.constexpr, ENTROPY: tl.constexpr, ROW_SCALE: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """``gradient`` of the contract; grid (cores,). ``out`` may be the logits."""
    lanes = tl.arange(0, BLOCK)
    whole = n_cols // BLOCK * BLOCK
    first, end = _rows_of_program(n_rows)
    for row in range(first, end):
        source = logits + tl.cast(row, tl.int64) * row_stride
        goal = out + tl.cast(row, tl.int64) * out_row_stride
        target = tl.load(local_target + row)
        softmax_row, target_row = tl.load(softmax + row), tl.load(target_part + row)
        smooth_row, entropy_row = 0.0, 0.0
        if SMOOTH:
            smooth_row = tl.load(smooth + row)
        if ENTROPY:
            entropy_row = tl.load(entropy + row)
        unused = (softmax_row == 0) & (target_row == 0) & (smooth_row == 0) & (entropy_row == 0)
        if (target == IGNORED) | unused:
            # Of such a row everything may be NaN: its zeros are written, not multiplied.
            zeros = tl.zeros([BLOCK], tl.float32).to(goal.dtype.element_ty)
            for begin in range(0, whole, BLOCK):
                tl.store(goal + _steps(begin, lanes, out_col_stride, APART), zeros)
            if HAS_TAIL:
                inside = lanes < n_cols - whole
                tl.store(goal + _steps(whole, lanes, out_col_stride, APART), zeros, mask=inside)
        else:
            factor = _factor_of(scales, row, every_scale, cap, ROW_SCALE, CAPPED)
            s_row, m_row = tl.load(s + row), tl.load(m + row)
            log_s = tl.log(s_row)
            softmax_row, entropy_row = softmax_row / s_row, entropy_row / s_row
            dx_y = 0.0
            if target >= 0:
                w = 1.0
                if WEIGHTED:
                    w = tl.load(weight + target)
                dx_y = _gradient(
                    tl.load(source + target * col_stride), factor, cap, m_row, w, log_s,
                    softmax_row, target_row, smooth_row, entropy_row, SMOOTH, ENTROPY, CAPPED,
                )  # fmt: skip
            for begin in range(0, whole, BLOCK):
                z = tl.load(source + _steps(begin, lanes, col_stride, APART))
                weights = 1.0
                if WEIGHTED:
                    weights = tl.load(weight + begin + lanes)
                dx = _gradient(
                    z, factor, cap, m_row, weights, log_s, softmax_row, 0.0, smooth_row,
                    entropy_row, SMOOTH, ENTROPY, CAPPED,
                )  # fmt: skip
                place = goal + _steps(begin, lanes, out_col_stride, APART)
                tl.store(place, dx.to(goal.dtype.element_ty))
            if HAS_TAIL:
                inside = lanes < n_cols - whole
                place = source + _steps(whole, lanes, col_stride, APART)
                z = tl.load(place, mask=inside, other=0.0)
                weights = 1.0
                if WEIGHTED:
                    weights = tl.load(weight + whole + lanes, mask=inside, other=0.0)
                dx = _gradient(
                    z, factor, cap, m_row, weights, log_s, softmax_row, 0.0, smooth_row,
                    entropy_row, SMOOTH, ENTROPY, CAPPED,
                )  # fmt: skip
                place = goal + _steps(whole, lanes, out_col_stride, APART)
                tl.store(place, dx.to(goal.dtype.element_ty), mask=inside)
            if target >= 0:
                tl.store(goal + target * out_col_stride, tl.cast(dx_y, goal.dtype.element_ty))


@triton.jit(do_not_specialize=_NUMBERS)
def row_log_prob(
    logits, row_stride, col_stride, m, s, out, out_row_stride, out_col_stride,
    n_rows, n_cols, scales, every_scale, cap,
    BLOCK: tl.constexpr, HAS_TAIL: tl.constexpr, APART: tl.constexpr, ROW_SCALE: tl.constexpr,
    CAPPED: tl.constexpr,
):  # fmt: skip
    """``log_prob`` of the contract; grid (cores,)."""
    lanes = tl.arange(0, BLOCK)
    whole = n_cols // BLOCK * BLOCK
    first, end = _rows_of_program(n_rows)
    for row in range(first, end):
        source = logits + tl.cast(row, tl.int64) * row_stride
        goal = out + tl.cast(row, tl.int64) * out_row_stride
        m_row, log_s = tl.load(m + row), tl.log(tl.load(s + row))
        factor = _factor_of(scales, row, every_scale, cap, ROW_SCALE, CAPPED)
        for begin in range(0, whole, BLOCK):
            z = tl.load(source + _steps(begin, lanes, col_stride, APART))
            x = _bent(z, cap, CAPPED) * factor
            place = goal + _steps(begin, lanes, out_col_stride, APART)
            tl.store(place, (x - m_row - log_s).to(goal.dtype.element_ty))
        if HAS_TAIL:
            inside = lanes < n_cols - whole
            place = source + _steps(whole, lanes, col_stride, APART)
            x = _bent(tl.load(place, mask=inside, other=0.0), cap, CAPPED) * factor
            place = goal + _steps(whole, lanes, out_col_stride, APART)
            tl.store(place, (x - m_row - log_s).to(goal.dtype.element_ty), mask=inside)
