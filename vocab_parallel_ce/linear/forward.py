"""Statistics of all rows: logits by chunks of rows, partials into one payload, one exchange.

Where an engine has functions of its own that go straight from hidden states, there are no chunks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..checksums import fingerprint, fingerprint_bits
from ..engines.contract import IGNORED, Engine
from ..passes import RowResult, exchange_statistics
from ..preflight import together
from .call import LinearCall
from .hidden import HiddenRows, preflight_before_gathers
from .kept import Portion, Rows, count, kept_rows, masked
from .straight import class_weight, functions_of


def linear_statistics(call: LinearCall) -> RowResult:
    """The forward pass. Nothing of the size of the logits outlives a chunk."""
    functions = functions_of(call)
    at_once = functions is not None and not call.request.sequence_parallel
    chunk = max(1, call.rows) if at_once else call.chunk
    scratch = call.scratch(chunk if functions is None else 0, call.head.size)

    def fill(engine: Engine, parts: Tensor, local_target: Tensor) -> Tensor | None:
        keep = local_target != IGNORED
        kept = kept_rows(keep) if call.leaves_out else None
        seen = HiddenFingerprint(call)
        if kept is not None:
            parts.zero_()
        portions = call.portions(kept, chunk)
        source = HiddenRows(call, portions)

        def one(portion: Portion) -> None:
            hidden, column = source.take(portion), local_target[portion.rows]
            seen.add(hidden, keep[portion.rows])
            with rows_of_parts(parts, portion.rows) as some:
                if functions is None:
                    logits = call.head.logits(hidden, scratch[: portion.count])
                    call.fill(engine, some, portion.rows, logits, column)
                else:
                    functions.partials(
                        hidden, call.head.weight, column, class_weight(call), call.request.scale,
                        call.request.wanted, some,
                    )  # fmt: skip

        with source.sent_to_the_end():
            for portion in portions:
                one(portion)
        return seen.bits()

    preflight_before_gathers(call, scratch, 0)
    with together(call.group, call.request.check):
        return exchange_statistics(
            fill, call.plan(scratch, 0), call.target, call.weight, call.group
        )


@contextmanager
def rows_of_parts(parts: Tensor, rows: Rows) -> Iterator[Tensor]:
    """Some rows of ``parts`` [k, N], to be filled."""
    if isinstance(rows, slice):
        yield parts[:, rows]
        return
    some = parts.new_empty(parts.shape[0], count(rows))
    yield some
    parts[:, rows] = some


class HiddenFingerprint:
    """The fingerprint of the hidden states for the header, so that ranks can compare theirs.

    None where that is of no use: with one rank, with a split sequence (all ranks gather the same
    rows), and on an accelerator without ``check``, where nobody would read it.
    """

    def __init__(self, call: LinearCall) -> None:
        several = call.group is not None and call.group.size() > 1
        several &= not call.request.sequence_parallel  # what was gathered is the same
        on_host = call.hidden.device.type == "cpu" or call.request.checking
        self._rows = 0
        self._sum = torch.zeros(2, device=call.hidden.device) if several and on_host else None

    def add(self, hidden: Tensor, keep: Tensor) -> None:
        """Add rows [n, H] of a portion; only those in ``keep`` [n] count."""
        if self._sum is not None:
            self._sum += fingerprint(masked(hidden, keep), self._rows)
            self._rows += hidden.shape[0]

    def bits(self) -> Tensor | None:
        return None if self._sum is None else fingerprint_bits(self._sum)
