"""How many logits exist at a time: rows of a chunk in forward, columns of a block in backward.

A budget of bytes divided by those of a row, because few rows starve the matrix products: of a chunk
of n rows the product that makes the weight's gradient reads and writes [V_r, H] for 2 n V_r H
operations. All ranks must come to the same number, so a row is that of an even share of the
vocabulary; a rank that holds more takes more in proportion.

By default no more than half of the logits exist at a time, however few there are: the second half
costs no memory, and two products of half the rows take as long as one.
"""

from __future__ import annotations

import math

LEAST = 128
"""rows, or columns, below which a default budget does not go"""
MIB = 1 << 20
_BUDGET_MIB = {"cpu": 128}
_BUDGET_MIB_ACCELERATOR = 256


def budget_bytes(device_type: str, scratch_mib: float | None) -> int:
    """What logits may take at a time."""
    default = _BUDGET_MIB.get(device_type, _BUDGET_MIB_ACCELERATOR)
    # Whatever is passed, a number of rows fits into the integers of operators.
    return int(min((default if scratch_mib is None else scratch_mib) * MIB, 2.0**62))


def rows_of_a_chunk(
    columns: int, itemsize: int, device_type: str, scratch_mib: float | None = None, where: str = ""
) -> int:
    """At least 128, or what an explicit ``scratch_mib`` allows.

    Raises:
        ValueError: ``scratch_mib`` has no room for one row.
    """
    row = max(1, columns) * itemsize
    rows = budget_bytes(device_type, scratch_mib) // row
    if scratch_mib is None:
        return max(LEAST, rows)
    if rows < 1:
        raise ValueError(
            f"scratch_mib={scratch_mib} has no room for one row of logits: {columns} columns of "
            f"{itemsize} bytes{where}; pass at least {least_mib(row)}, or None for the default"
        )
    return rows


def at_most_half(count: int, whole: int, scratch_mib: float | None, summed_wide: bool) -> int:
    """``count`` of ``whole`` rows or columns, or half of them where that needs less memory.

    ``summed_wide``: what the parts are added up in is wider than one part's result would be, so
    that a second part would cost memory.
    """
    if scratch_mib is not None or summed_wide:
        return count
    return min(count, max(LEAST, -(-whole // 2)))


def least_mib(size: int) -> float:
    """``scratch_mib`` with room for so many bytes, in few digits."""
    return math.ceil(size / MIB * 1e6) / 1e6


def columns_of_a_block(
    rows: int, itemsize: int, device_type: str, scratch_mib: float | None = None
) -> int | None:
    """Columns of [rows, columns] logits within the budget; None where they would be too few."""
    columns = budget_bytes(device_type, scratch_mib) // (max(1, rows) * itemsize)
    return columns if columns >= LEAST else None
