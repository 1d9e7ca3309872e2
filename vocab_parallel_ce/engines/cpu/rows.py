"""One row of a matrix: between its columns and a buffer, and what is formed of it once.

Arrays arrive as an address and steps in bytes.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from vocab_parallel_ce.engines.contract import ELSEWHERE
from vocab_parallel_ce.engines.cpu.blocks import block_max, block_max_sum
from vocab_parallel_ce.engines.cpu.compiling import helper
from vocab_parallel_ce.engines.cpu.exponential import tanh
from vocab_parallel_ce.engines.cpu.lanes import (
    LANES,
    lanes_of,
    number,
    quotient,
)
from vocab_parallel_ce.engines.cpu.memory import (
    PAIR,
    load,
    read,
    size_of,
    store,
    write,
)

Vector = tuple[int, int]  # address, step; address 0 where there is none
Matrix = tuple[int, int, int]  # address, step from row to row, step from column to column

SLACK = 1.0  # how far a maximum may rise above ``base``: below 1, x - base is as exact as x - m
INFINITY = math.inf
NAN = math.nan

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


# What is formed once


@helper
def piece(index: int, columns: int, width: int) -> tuple[int, int, int]:
    """Of which row a piece is, its first column, and how many it has."""
    pieces = -(-columns // width)
    row = index // pieces
    first = (index - row * pieces) * width
    return row, first, min(width, columns - first)


@helper
def column_of(target: int, first: int) -> int:
    """A row's target, counted from the ``first`` column of a piece."""
    return target if target < 0 else max(target - first, ELSEWHERE)


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
    top, more = block_max_sum(address, count, scale, reference(base), token, address, token)
    if top > base + SLACK:
        s *= math.exp(base - top)
        base = top
        top, more = block_max_sum(address, count, scale, base, token, address, token)
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
