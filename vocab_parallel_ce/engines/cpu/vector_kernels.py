"""Loops over [N] vectors, one number a row: what surrounds those of the logits.

The formulas are those of the torch functions that ``contract.RowFunctions`` names, in fp64 and
rounded once; integers wrap as theirs do. Vectors arrive as an address, and a step in bytes where
their neighbours may lie apart. ``token`` has the arithmetic type (see lanes).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from vocab_parallel_ce.engines.contract import (
    CHECKSUM_ROUNDS,
    CHECKSUM_STEP,
    ELSEWHERE,
    IGNORED,
    NOTHING_FOUND,
)
from vocab_parallel_ce.engines.cpu.compiling import helper, kernel
from vocab_parallel_ce.engines.cpu.memory import read, size_of, write
from vocab_parallel_ce.engines.cpu.rows import reference

INT32, INT64 = np.int32(0), np.int64(0)
NOWHERE = -1
NO_ID = 2**63 - 1
STEP = CHECKSUM_STEP
(SHIFT_1, FACTOR_1), (SHIFT_2, FACTOR_2) = CHECKSUM_ROUNDS
LOWEST = float(np.finfo(np.float32).min)


@kernel
def locate_rows(
    begin: int,
    end: int,
    target: int,
    target_step: int,
    start: int,
    stop: int,
    vocab_size: int,
    ignore_index: int,
    out: int,
) -> int:
    """Where each target lives, into ``out``; the first row whose target is no class, or NOWHERE."""
    bad = NOWHERE
    for row in range(begin, end):
        y = read(target + row * target_step, INT64)
        place = ELSEWHERE
        if y == ignore_index:
            place = IGNORED
        elif start <= y < stop:
            place = y - start
        elif bad == NOWHERE and not 0 <= y < vocab_size:
            bad = row
        write(out + row * 8, place, INT64)
    return bad


@helper
def mixed(place: int, value: Any) -> Any:
    """One term of ``checksums.checksum``; ``place`` counts from 0."""
    term = (place + 1) * STEP + value
    term = (term ^ (term >> SHIFT_1)) * FACTOR_1
    return (term ^ (term >> SHIFT_2)) * FACTOR_2


@helper
def checksum(rows: int, address: int, step: int, words: int, word_step: int, token: Any) -> int:
    """``checksums.checksum`` of ``words`` vectors of ``rows`` integers, one behind the other."""
    total = 0
    for word in range(words):
        for row in range(rows):
            value = np.int64(read(address + word * word_step + row * step, token))
            total += mixed(word * rows + row, value)
    return total


@kernel
def sign_rows(
    targets: int,
    target: int,
    target_step: int,
    rows: int,
    parts: int,
    part_step: int,
    with_content: bool,
    token: Any,
    static: int,
    n_static: int,
    n_header: int,
    weight_checksum: int,
    scale_checksum: int,
    selected_checksum: int,
    normalizer_bits: int,
    shard_total: float,
    out: int,
) -> None:
    """A header of ``n_header`` int32, of which the first ``n_static`` are given, and W_r.

    ``targets`` may be more than the ``rows`` of the partials.
    """
    size = size_of(token)
    of_content = 0
    if with_content and size == 8:
        of_content = checksum(rows, parts, 8, 2, part_step, INT64)
    elif with_content:
        of_content = checksum(rows, parts, 4, 2, part_step, INT32)
    for slot in range(n_static):
        write(out + slot * 4, read(static + slot * 4, INT32), INT32)
    write(out + n_header * 4, shard_total, token)
    out += n_static * 4
    of_target = checksum(targets, target, target_step, 1, 0, INT64)
    for number in (of_target, of_content, weight_checksum, scale_checksum, selected_checksum):
        write(out, number, INT64)
        out += 8
    for number in NOTHING_FOUND:
        write(out, number, INT64)
        out += 8
    write(out, normalizer_bits, INT64)


@kernel
def headers_agree(
    ranks: int,
    headers: int,
    step: int,
    ints: int,
    start: int,
    stop: int,
    vocab_size: int,
    content: int,
    findings: int,
) -> bool:
    """``contract.RowFunctions.agree``; ``content`` and what follows are places of int64 values."""
    reached, varied, told = 0, ranks == 1, False
    for rank in range(ranks):
        header = headers + rank * step
        if read(header + start * 4, INT32) != reached:
            return False
        reached = read(header + stop * 4, INT32)
        for slot in range(ints):
            value = read(header + slot * 4, INT32)
            differs = value != read(headers + slot * 4, INT32)
            if content <= slot < content + 2:
                varied |= differs
                told |= value != 0
            elif differs and slot != start and slot != stop:
                return False
    for number in NOTHING_FOUND:
        if read(headers + findings * 4, INT64) != number:
            return False
        findings += 2
    return reached == read(headers + vocab_size * 4, INT32) and (varied or not told)


@kernel
def weigh_classes(classes: int, weight: int, token: Any) -> tuple[int, int]:
    """The first class whose weight is not finite, or NOWHERE; ``checksums.float_checksum``."""
    size = size_of(token)
    bad = NOWHERE
    for number in range(classes):
        value = np.float64(read(weight + number * size, token))
        if bad == NOWHERE and not abs(value) < math.inf:
            bad = number
    if size == 8:
        return bad, checksum(classes, weight, 8, 1, 0, INT64)
    return bad, checksum(classes, weight, 4, 1, 0, INT32)


@kernel
def conclude_rows(
    begin: int,
    end: int,
    parts: int,
    part_step: int,
    row_step: int,
    n_parts: int,
    weights: int,
    weights_step: int,
    starts: int,
    starts_step: int,
    target: int,
    target_step: int,
    ignore_index: int,
    classes: int,
    class_weight: int,
    class_step: int,
    total_weight: float,
    smooth: bool,
    entropy: bool,
    squares: bool,
    argmax: bool,
    ignored_rows: bool,
    token: Any,
    stats: int,
    stats_step: int,
    m_out: int,
    s_out: int,
    row_weight: int,
    argmax_out: int,
) -> None:
    """The statistics of rows from the partials of ``n_parts`` ranks, added up in their order."""
    size = size_of(token)
    lowest = LOWEST if size == 4 else -np.finfo(np.float64).max
    for row in range(begin, end):
        at = parts + row * size
        m: Any = np.float64(read(at, token))
        for _ in range(1, n_parts):
            at += part_step
            m_r = np.float64(read(at, token))
            if m_r > m or m_r != m_r:
                m = m_r
        base = reference(m)
        best: Any = NO_ID
        s, x, u, t, q = 0.0, 0.0, 0.0, 0.0, 0.0
        for part in range(n_parts):
            at = parts + part * part_step + row * size
            m_r = np.float64(read(at, token))
            # A shard that is all -inf adds 0: the shift stays finite, for 0 * -inf would be NaN.
            shift: Any = m_r - base
            if shift < lowest:
                shift = lowest
            keep = math.exp(shift) if shift != 0.0 else 1.0
            s_r = np.float64(read(at + row_step, token)) * keep
            s += s_r
            x += np.float64(read(at + 2 * row_step, token))
            at += 3 * row_step
            if smooth:
                u += np.float64(read(at, token))
                if n_parts > 1:
                    u += np.float64(read(weights + part * weights_step, token)) * shift
                at += row_step
            if entropy:
                t += np.float64(read(at, token)) * keep + shift * s_r
                at += row_step
            if squares:
                q += np.float64(read(at, token)) * keep * keep
                at += row_step
            if argmax and m_r == m:
                column = np.int64(read(at, INT32)) if size == 4 else read(at, INT64)
                if n_parts > 1:
                    column += np.int64(read(starts + part * starts_step, INT32))
                best = min(best, column)
        y = read(target + row * target_step, INT64)
        ignored = y == ignore_index
        w = 1.0
        if ignored:
            w = 0.0
        elif class_weight != 0:
            w = np.float64(read(class_weight + min(max(y, 0), classes - 1) * class_step, token))
        write(row_weight + row * size, w, token)
        place = stats + row * size
        write(m_out + row * size, m, token)
        write(s_out + row * size, s, token)
        log_s = math.log(s)
        write(place, 0.0 if ignored else log_s - (x - m), token)
        place += stats_step
        write(place, 0.0 if ignored and not ignored_rows else m + log_s, token)
        if smooth:
            place += stats_step
            write(place, 0.0 if ignored else log_s * total_weight - u, token)
        if entropy:
            place += stats_step
            write(place, 0.0 if ignored else log_s - t / s, token)
        if squares:
            place += stats_step
            write(place, 0.0 if ignored else q / s / s, token)
        if argmax:
            write(argmax_out + row * 8, -1 if ignored or s != s else best, INT64)
