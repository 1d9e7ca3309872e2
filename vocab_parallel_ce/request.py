"""RowRequest: everything static about one call, checked, as plain numbers and strings.

It is what the api hands to the primitive, what a custom operator takes apart into scalars, and
what the header tells the other ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from .engines.contract import Wanted
from .switches import check_is_on


def is_on(value: float) -> bool:
    """value != 0, but so that the compiler does not take a value of 0 for the only one there is."""
    return value > 0 or value < 0


@dataclass(frozen=True)
class RowRequest:
    """One call's statics; every field is a scalar that a custom operator can take."""

    start: int
    stop: int
    vocab_size: int
    implicit_shard: bool
    """The shard was not told but follows from the rank: equal shards in rank order."""
    smooth: bool = False
    entropy: bool = False
    squares: bool = False
    argmax: bool = False
    ignored_rows: bool = False
    normalized: bool = False
    """The call was given a ``normalizer``."""
    row_scale: bool = False
    """The call was given a ``scale`` for each row, which then counts in place of ``scale``."""
    finite_logits: bool = False
    """A promise of this rank alone, that changes no number while it is kept: not in the header."""
    ignore_index: int = -100
    scale: float = 1.0
    label_smoothing: float = 0.0
    lse_square_scale: float = 0.0
    softcap: float = 0.0
    """0 where there is none"""
    reduction: str = "none"
    engine: str = "auto"
    collective: str = "auto"
    check: str = "environment"
    """"on", "off", or "environment": as VOCAB_PARALLEL_CE_CHECK says when the call runs."""

    @property
    def size(self) -> int:
        """Number of ids, and of columns that are not padding, on this rank."""
        return self.stop - self.start

    @property
    def wanted(self) -> Wanted:
        return Wanted(self.smooth, self.entropy, self.argmax, self.squares, self.ignored_rows)

    @property
    def checking(self) -> bool:
        return check_is_on(self.check)

    @property
    def waits(self) -> bool:
        """Whether values are looked at on an accelerator too."""
        return self.checking

    def scalars(self) -> tuple[Any, ...]:
        """The fields in order, for a custom operator; ``RowRequest(*scalars)`` restores it."""
        return tuple(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class LinearRequest(RowRequest):
    """A call of the fused head."""

    biased: bool = False
    """The call was given a bias."""
    sequence_parallel: bool = False
    """Each rank has its part of the hidden states."""
    drop_ignored: bool = False
    """Ignored rows are left out of the products, which an accelerator is waited for."""

    @property
    def waits(self) -> bool:
        return self.checking or self.drop_ignored
