"""Statistics of all rows: logits by chunks of rows, partials into one payload, one exchange."""

from __future__ import annotations

import torch
from torch import Tensor

from ..engines.contract import IGNORED, Engine
from ..header import fingerprint, fingerprint_bits
from ..passes import RowResult, exchange_statistics, fill_partials
from .call import LinearCall
from .hidden import HiddenRows
from .kept import Rows, count, kept_rows, masked


def linear_statistics(call: LinearCall) -> RowResult:
    """The forward pass. Nothing of the size of the logits outlives a chunk."""
    chunk = min(call.statics.chunk, call.rows)
    scratch = call.scratch(chunk, call.head.size)

    def fill(engine: Engine, parts: Tensor, local_target: Tensor) -> Tensor | None:
        keep = local_target != IGNORED
        kept = kept_rows(keep) if call.leaves_out else None
        told = Told(call)
        if kept is not None:
            parts.zero_()
        portions = call.portions(kept, max(1, chunk))
        source = HiddenRows(call, portions)
        for portion in portions:
            hidden = source.take(portion)
            told.add(hidden, keep[portion.rows])
            logits = call.head.logits(hidden, scratch[: portion.count])
            fill_rows(engine, parts, portion.rows, logits, local_target, call)
        return told.bits()

    return exchange_statistics(fill, call.plan(scratch, 0), call.target, call.weight, call.group)


def fill_rows(
    engine: Engine,
    parts: Tensor,
    rows: Rows,
    logits: Tensor,
    local_target: Tensor,
    call: LinearCall,
) -> None:
    """The partials of some rows into their places in ``parts`` [k, N]."""
    if isinstance(rows, slice):
        fill_partials(engine, parts[:, rows], logits, local_target[rows], call.weight, call.request)
        return
    some = parts.new_empty(parts.shape[0], count(rows))
    fill_partials(engine, some, logits, local_target[rows], call.weight, call.request)
    parts[:, rows] = some


class Told:
    """What the header tells of the hidden states: where others can compare, and where it is seen.

    Not on an accelerator that nobody waits for: nobody would read it.
    """

    def __init__(self, call: LinearCall) -> None:
        several = call.group is not None and call.group.size() > 1
        several &= not call.statics.sequence_parallel  # what was gathered is the same
        on_host = call.hidden.device.type == "cpu" or call.request.checking
        self._sum = torch.zeros(2, device=call.hidden.device) if several and on_host else None

    def add(self, hidden: Tensor, keep: Tensor) -> None:
        """Some rows [n, H], of which those in ``keep`` [n] count."""
        if self._sum is not None:
            self._sum += fingerprint(masked(hidden, keep))

    def bits(self) -> Tensor | None:
        return None if self._sum is None else fingerprint_bits(self._sum)
