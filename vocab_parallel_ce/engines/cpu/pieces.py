"""Few long rows are cut into pieces, so that every core has one.

How depends on the shape alone: the same bits come out on any number of threads.
"""

from __future__ import annotations

MANY_ROWS = 64  # that many, and no thread waits long for the last
SHORTEST = 1 << 14  # columns of a piece
MULTIPLE = 1024  # columns that a kernel takes at once


def piece_width(rows: int, columns: int) -> int:
    """Columns of a piece; all of them where rows are many, or short."""
    pieces = min(columns // SHORTEST, -(-MANY_ROWS // rows))
    if pieces <= 1:
        return columns
    return -(-columns // (pieces * MULTIPLE)) * MULTIPLE
