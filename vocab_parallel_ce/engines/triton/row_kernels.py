"""Kernels on [N] vectors: what torch would do in a hundred launches around those of the logits.

The formulas, and the order of every sum, are those of the torch functions that ``RowFunctions``
names; integers wrap as theirs do.
"""

# No `from __future__ import annotations`: Triton reads the annotations of its arguments.

import triton
import triton.language as tl

from ..contract import CHECKSUM_ROUNDS, CHECKSUM_STEP

ELSEWHERE = tl.constexpr(-1)
IGNORED = tl.constexpr(-2)
LOWEST = tl.constexpr(-3.4028234663852886e38)
NO_ID = tl.constexpr(2**63 - 1)
HEADER_BLOCK = tl.constexpr(64)
STEP = tl.constexpr(CHECKSUM_STEP)
SHIFT_1, FACTOR_1 = (tl.constexpr(number) for number in CHECKSUM_ROUNDS[0])
SHIFT_2, FACTOR_2 = (tl.constexpr(number) for number in CHECKSUM_ROUNDS[1])


@triton.jit
def _mixed(place, value):
    """One term of ``checksums.checksum``; ``place`` counts from 0."""
    mixed = (place + 1) * STEP + value
    mixed = (mixed ^ (mixed >> SHIFT_1)) * FACTOR_1
    return (mixed ^ (mixed >> SHIFT_2)) * FACTOR_2


@triton.jit(do_not_specialize=["n_rows", "start", "stop", "ignore_index"])
def locate_rows(target, out, n_rows, start, stop, ignore_index, BLOCK: tl.constexpr):
    """One program a block of rows."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < n_rows
    y = tl.load(target + row, mask=inside, other=0).to(tl.int64)
    local = tl.where((y >= start) & (y < stop), y - start, ELSEWHERE)
    tl.store(out + row, tl.where(y == ignore_index, IGNORED, local), mask=inside)


@triton.jit(do_not_specialize=["n_rows", "size", "ignore_index"])
def sign_rows(
    slots, excuse, target, content, content_bits, weight_checksum, normalizer_bits, scale_checksum,
    selected_checksum, n_targets, n_rows, size, ignore_index, BLOCK: tl.constexpr,
    CONTENT: tl.constexpr, WEIGHTED: tl.constexpr, NORMALIZED: tl.constexpr,
    ROW_SCALE: tl.constexpr, SELECTED: tl.constexpr,
):  # fmt: skip
    """One program in all, which adds up in a fixed order and needs no atomics.

    The targets may be more than the rows of the content.
    """
    lane = tl.arange(0, BLOCK)
    of_target = tl.zeros([BLOCK], tl.int64)
    of_content = tl.zeros([BLOCK], tl.int64)
    varied = tl.zeros([BLOCK], tl.int32)
    beyond = tl.zeros([BLOCK], tl.int32)
    for begin in range(0, n_targets, BLOCK):
        row = begin + lane
        inside = row < n_targets
        place = row.to(tl.int64)
        y = tl.load(target + row, mask=inside, other=0).to(tl.int64)
        of_target += tl.where(inside, _mixed(place, y), 0)
        if CONTENT:
            here = row < n_rows
            m = tl.load(content_bits + row, mask=here, other=0).to(tl.int64)
            s = tl.load(content_bits + n_rows + row, mask=here, other=0).to(tl.int64)
            term = _mixed(place, m) + _mixed(place + n_rows, s)
            of_content += tl.where(here, term, 0)
            s = tl.load(content + n_rows + row, mask=here, other=0.0)
            counts = inside & (y != ignore_index)
            varied |= (counts & here & (s != size)).to(tl.int32)
            beyond |= (counts & (y >= size)).to(tl.int32)
    tl.store(slots, tl.sum(of_target, 0))
    tl.store(slots + 1, tl.sum(of_content, 0))
    checksum = tl.zeros([], tl.int64)
    if WEIGHTED:
        checksum = tl.load(weight_checksum)
    tl.store(slots + 2, checksum)
    checksum = tl.zeros([], tl.int64)
    if ROW_SCALE:
        checksum = tl.load(scale_checksum)
    tl.store(slots + 3, checksum)
    checksum = tl.zeros([], tl.int64)
    if SELECTED:
        checksum = tl.load(selected_checksum)
    tl.store(slots + 4, checksum)
    # No value of this rank's was looked at: no bad row, no bad target, no bad class, no bad scale,
    # no row with a bad id among those selected, and no such id.
    tl.store(slots + 5, tl.full([], -1, tl.int64))
    tl.store(slots + 6, tl.full([], 0, tl.int64))
    tl.store(slots + 7, tl.full([], -1, tl.int64))
    tl.store(slots + 8, tl.full([], -1, tl.int64))
    tl.store(slots + 9, tl.full([], -1, tl.int64))
    tl.store(slots + 10, tl.full([], 0, tl.int64))
    bits = tl.zeros([], tl.int64)
    if NORMALIZED:
        bits = tl.load(normalizer_bits).to(tl.int64)
    tl.store(slots + 11, bits)
    tl.store(excuse, 1 - (tl.max(varied, 0) & (1 - tl.max(beyond, 0))))


@triton.jit
def _disagree(
    headers, header_stride, n_ranks, excuse,
    RANKS: tl.constexpr, INTS: tl.constexpr, COMPARED: tl.constexpr, START: tl.constexpr,
    STOP: tl.constexpr, VOCAB: tl.constexpr, FLAGS: tl.constexpr, IMPLICIT_BIT: tl.constexpr,
    CONTENT: tl.constexpr, NORMALIZER: tl.constexpr, TOLERANCE: tl.constexpr,
):  # fmt: skip
    """1 if the headers do not fit together, else 0."""
    rank, slot = tl.arange(0, RANKS), tl.arange(0, HEADER_BLOCK)
    here = rank < n_ranks
    place = rank.to(tl.int64) * header_stride
    there = here[:, None] & (slot < INTS)[None, :]
    header = tl.load(headers + place[:, None] + slot[None, :], mask=there, other=0)
    first = tl.load(headers + slot, mask=slot < INTS, other=0)
    differs = there & (header != first[None, :])
    compared = (slot < 31) & (((COMPARED >> tl.minimum(slot, 31)) & 1) != 0)
    bad = tl.max(tl.max((differs & compared[None, :]).to(tl.int32), 1), 0)

    numbers = headers + place + NORMALIZER
    given = tl.load(numbers, mask=here, other=0).to(tl.float32, bitcast=True)
    ours = tl.load(numbers - place, mask=here, other=0).to(tl.float32, bitcast=True)
    close = tl.abs(given - ours) < TOLERANCE * tl.maximum(tl.abs(given), tl.abs(ours))
    both_nan = (given != given) & (ours != ours)
    apart = here & (given != ours) & (close == 0) & (both_nan == 0)
    bad |= tl.max(apart.to(tl.int32), 0)

    start = tl.load(headers + place + START, mask=here, other=0)
    stop = tl.load(headers + place + STOP, mask=here, other=0)
    held = tl.sum((stop - start).to(tl.int64), 0)  # shards that overlap may add up beyond int32
    bad |= (held != tl.load(headers + VOCAB)).to(tl.int32)
    # Sizes that add up to the vocabulary without any pair that overlaps tile it.
    holds = stop > start
    overlap = (start[:, None] < stop[None, :]) & (start[None, :] < stop[:, None])
    overlap &= holds[:, None] & holds[None, :]
    pairs = tl.sum(tl.sum(overlap.to(tl.int32), 1), 0)
    bad |= (pairs != tl.sum(holds.to(tl.int32), 0)).to(tl.int32)  # each one overlaps itself

    of_content = (slot == CONTENT) | (slot == CONTENT + 1)
    other = tl.max(tl.max((differs & of_content[None, :]).to(tl.int32), 1), 0)
    implicit = (tl.load(headers + FLAGS) >> IMPLICIT_BIT) & 1
    gathered = implicit & (1 - other) & (1 - tl.load(excuse))
    return bad | (gathered & (n_ranks > 1).to(tl.int32))


@triton.jit(do_not_specialize=[
    "part_stride", "stat_stride", "n_parts", "header_stride", "n_ranks", "stats_stride", "n_rows",
    "vocab_size", "ignore_index",
])  # fmt: skip
def conclude_rows(
    parts, parts_bits, part_stride, stat_stride, n_parts, shard_weight, weight_stride, starts,
    starts_stride, headers, header_stride, n_ranks, excuse, target, total_weight_at, total_weight,
    stats, stats_stride, m_out, s_out, argmax_out, n_rows, vocab_size, ignore_index,
    BLOCK: tl.constexpr, WEIGHTED: tl.constexpr, SMOOTH: tl.constexpr, ENTROPY: tl.constexpr,
    SQUARES: tl.constexpr, ARGMAX: tl.constexpr, IGNORED_ROWS: tl.constexpr, JUDGE: tl.constexpr,
    RANKS: tl.constexpr, INTS: tl.constexpr, COMPARED: tl.constexpr, START: tl.constexpr,
    STOP: tl.constexpr, VOCAB: tl.constexpr, FLAGS: tl.constexpr, IMPLICIT_BIT: tl.constexpr,
    CONTENT: tl.constexpr, NORMALIZER: tl.constexpr, TOLERANCE: tl.constexpr,
):  # fmt: skip
    """One program a block of rows; each judges the headers for itself, which are few numbers."""
    bad = tl.zeros([], tl.int32)
    if JUDGE:
        bad = _disagree(
            headers, header_stride, n_ranks, excuse, RANKS, INTS, COMPARED, START, STOP, VOCAB,
            FLAGS, IMPLICIT_BIT, CONTENT, NORMALIZER, TOLERANCE,
        )  # fmt: skip
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < n_rows

    m = tl.load(parts + row, mask=inside, other=0.0)
    for part in range(1, n_parts):
        m = tl.maximum(m, tl.load(parts + tl.cast(part, tl.int64) * part_stride + row, inside, 0.0))
    shift_to = tl.where(m == -float("inf"), 0.0, m)
    s, x_y, u, t = tl.zeros_like(m), tl.zeros_like(m), tl.zeros_like(m), tl.zeros_like(m)
    q = tl.zeros_like(m)
    best = tl.full([BLOCK], NO_ID, tl.int64)
    for part in range(0, n_parts):
        at = parts + tl.cast(part, tl.int64) * part_stride + row
        m_part = tl.load(at, mask=inside, other=0.0)
        # An all -inf shard adds 0: the shift stays finite, for 0 * -inf would be NaN.
        shift = tl.maximum(m_part - shift_to, LOWEST)
        keep = tl.exp(shift)
        s_part = tl.load(at + stat_stride, mask=inside, other=0.0) * keep
        s += s_part
        x_y += tl.load(at + 2 * stat_stride, mask=inside, other=0.0)
        if SMOOTH:
            # What is merged already is shifted by 0, and a rank alone has not told its weight.
            w = tl.load(shard_weight + part * weight_stride, mask=n_parts > 1, other=0.0)
            u += tl.load(at + 3 * stat_stride, mask=inside, other=0.0) + w * shift
        if ENTROPY:
            # After s: shift * s may overflow where keep is 0.
            t_part = tl.load(at + (3 + SMOOTH) * stat_stride, mask=inside, other=0.0)
            t += t_part * keep + shift * s_part
        if SQUARES:
            q_part = tl.load(at + (3 + SMOOTH + ENTROPY) * stat_stride, mask=inside, other=0.0)
            q += q_part * keep * keep
        if ARGMAX:
            bits = parts_bits + tl.cast(part, tl.int64) * part_stride + row
            place = (3 + SMOOTH + ENTROPY + SQUARES) * stat_stride
            column = tl.load(bits + place, mask=inside, other=0)
            id_of_column = column.to(tl.int64)
            if JUDGE:
                id_of_column += tl.load(starts + part * starts_stride)
            best = tl.minimum(best, tl.where(m_part == m, id_of_column, NO_ID))

    y = tl.load(target + row, mask=inside, other=0).to(tl.int64)
    ignored = y == ignore_index
    allowed = ignored | ((y >= 0) & (y < vocab_size))
    # One NaN here makes the loss and the whole gradient of the row NaN, on every rank.
    s = tl.where(allowed & (bad == 0), s, float("nan"))
    tl.store(m_out + row, m, mask=inside)
    tl.store(s_out + row, s, mask=inside)
    log_s = tl.log(s)
    tl.store(stats + row, tl.where(ignored, 0.0, log_s - (x_y - m)), mask=inside)
    lse = m + log_s
    if not IGNORED_ROWS:
        lse = tl.where(ignored, 0.0, lse)
    tl.store(stats + stats_stride + row, lse, mask=inside)
    if SMOOTH:
        total = total_weight
        if WEIGHTED:
            total = tl.load(total_weight_at)
        smooth = tl.where(ignored, 0.0, log_s * total - u)
        tl.store(stats + 2 * stats_stride + row, smooth, mask=inside)
    if ENTROPY:
        entropy = tl.where(ignored, 0.0, log_s - t / s)
        tl.store(stats + (2 + SMOOTH) * stats_stride + row, entropy, mask=inside)
    if SQUARES:
        squares = tl.where(ignored, 0.0, q / s / s)
        tl.store(stats + (2 + SMOOTH + ENTROPY) * stats_stride + row, squares, mask=inside)
    if ARGMAX:
        tl.store(argmax_out + row, tl.where(ignored | (s != s), -1, best), mask=inside)
