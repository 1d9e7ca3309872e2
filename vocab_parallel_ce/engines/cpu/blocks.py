"""What is done to one block of a row: a short pass over each thing that is wanted of it.

``address`` is contiguous; ``count`` is a multiple of PAIR unless it says "any ``count``". A pass
that computes much also asks memory for the logits that will be wanted soon: ``stream`` is where the
block's own lie and ``stored`` their token, be the block a copy of them or not.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from vocab_parallel_ce.engines.cpu.compiling import helper
from vocab_parallel_ce.engines.cpu.exponential import add_exp, exp
from vocab_parallel_ce.engines.cpu.lanes import (
    LANES,
    highest,
    lanes_of,
    larger,
    multiply_add,
    number,
    total,
    where_less,
)
from vocab_parallel_ce.engines.cpu.memory import (
    PAIR,
    load,
    load_first,
    load_pair,
    prefetch,
    read,
    size_of,
    store,
    store_first,
    store_pair,
    write,
)

INFINITY = math.inf
CHAIN = 8  # numbers added up before their sum goes to the next: equal ones err to one side in fp32


@helper
def load_first_pair(address: int, count: int, token: Any) -> Any:
    """``load_first`` of a PAIR."""
    second = address + LANES * size_of(token)
    return load_first(address, count, token), load_first(second, count - LANES, token)


@helper
def block_max(address: int, count: int, token: Any) -> Any:
    """Largest of any ``count`` of elements but NaN; -inf if there is none."""
    a = lanes_of(-INFINITY, token)
    b = a
    for _ in range(count // PAIR):
        x, z = load_pair(address, token)
        a = larger(x, a)
        b = larger(z, b)
        address += PAIR * size_of(token)
    rest = count % PAIR
    if rest > 0:
        x, z = load_first_pair(address, rest, token)
        a = larger(x, a)
        b = larger(z, b)
    return highest(larger(a, b))


@helper
def block_max_sum(
    address: int, count: int, scale: float, base: float, token: Any, stream: int, stored: Any
) -> Any:
    """max x and sum e^(x - base) of any ``count``, scale > 0"""
    top = lanes_of(-INFINITY, token)
    a = lanes_of(0.0, token)
    b = a
    unscaled = scale == 1.0
    zero = a
    for start in range(0, count // PAIR, CHAIN):
        c, c2 = zero, zero
        for _ in range(min(CHAIN, count // PAIR - start)):
            prefetch(stream, stored)
            x, z = load_pair(address, token)
            if not unscaled:
                x = x * scale
                z = z * scale
            top = larger(z, larger(x, top))
            c = add_exp(c, x - base, scale)
            c2 = add_exp(c2, z - base, scale)
            address += PAIR * size_of(token)
            stream += PAIR * size_of(stored)
        a, b = a + c, b + c2
    rest = count % PAIR
    if rest > 0:
        x, z = load_first_pair(address, rest, token)
        x = x * scale
        z = z * scale
        top = larger(z, larger(x, top))
        a = add_exp(a, x - base, scale)
        b = add_exp(b, z - base, scale)
    return np.float64(highest(top)), total(a) + total(b)


@helper
def block_entropy(address: int, count: int, m: float, token: Any, stream: int, stored: Any) -> Any:
    """sum e^(x - m) and sum e^(x - m) (x - m)"""
    zero = lanes_of(0.0, token)
    s, s2, t, t2 = zero, zero, zero, zero
    for start in range(0, count, CHAIN * PAIR):
        a, a2, c, c2 = zero, zero, zero, zero
        for _ in range(min(CHAIN, (count - start) // PAIR)):
            prefetch(stream, stored)
            x, z = load_pair(address, token)
            d, d2 = x - m, z - m
            e, e2 = exp(d, token), exp(d2, token)
            a = a + e
            a2 = a2 + e2
            # Without a product where e is 0 (d may be -inf), with NaN where it is NaN.
            c = where_less(0.0, e, multiply_add(e, d, c), c + e)
            c2 = where_less(0.0, e2, multiply_add(e2, d2, c2), c2 + e2)
            address += PAIR * size_of(token)
            stream += PAIR * size_of(stored)
        s, s2, t, t2 = s + a, s2 + a2, t + c, t2 + c2
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
    zero = lanes_of(0.0, token)
    u, w = zero, zero
    full = count // LANES
    for start in range(0, full, CHAIN):
        c, c2 = zero, zero
        for _ in range(min(CHAIN, full - start)):
            d = load(address, token) - m
            if weight == 0:
                c = c + d
            else:
                factor = load(weight, token)
                c = multiply_add(factor, d, c)
                c2 = c2 + factor
                weight += step
            address += step
        u, w = u + c, w + c2
    rest, rest_weights = 0.0, 0.0
    for i in range(count - full * LANES):
        one = np.float64(read(weight + i * size, token)) if weight != 0 else 1.0
        rest += one * (read(address + i * size, token) - m)
        rest_weights += one
    if weight == 0:
        return total(u) + rest, float(count)
    return total(u) + rest, total(w) + rest_weights


@helper
def block_gradient(
    source: int,
    destination: int,
    count: int,
    scale: float,
    m: float,
    softmax: float,
    token: Any,
    stream: int,
    stored: Any,
) -> None:
    """softmax e^(x - m) of any ``count``"""
    step = PAIR * size_of(token)
    unscaled = scale == 1.0
    for _ in range(count // PAIR):
        prefetch(stream, stored)
        x, z = load_pair(source, token)
        if not unscaled:
            x = x * scale
            z = z * scale
        store_pair(destination, exp(x - m, token) * softmax, exp(z - m, token) * softmax, token)
        source += step
        destination += step
        stream += PAIR * size_of(stored)
    rest = count % PAIR
    if rest > 0:
        x, z = load_first_pair(source, rest, token)
        x = exp(x * scale - m, token) * softmax
        z = exp(z * scale - m, token) * softmax
        store_first(destination, x, rest, token)
        store_first(destination + LANES * size_of(token), z, rest - LANES, token)


@helper
def block_entropy_gradient(
    address: int,
    count: int,
    m: float,
    log_s: float,
    softmax: float,
    entropy: float,
    token: Any,
    stream: int,
    stored: Any,
) -> None:
    """e^(x - m) (softmax - entropy log p) in place; 0 where p is 0, NaN where softmax is"""
    step = PAIR * size_of(token)
    for _ in range(count // PAIR):
        prefetch(stream, stored)
        x, z = load_pair(address, token)
        d, d2 = x - m, z - m
        e, e2 = exp(d, token), exp(d2, token)
        a = where_less(0.0, e, e * (softmax - (d - log_s) * entropy), e * softmax)
        b = where_less(0.0, e2, e2 * (softmax - (d2 - log_s) * entropy), e2 * softmax)
        store_pair(address, a, b, token)
        address += step
        stream += PAIR * size_of(stored)


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
