"""Hidden states of a portion of rows: those that every rank holds, or of every rank's part.

With ``sequence_parallel`` each rank holds a part of the sequence. A portion is rows [a, b) of every
part: they are gathered as they are needed, which makes the operand of the product, and the gradient
of a portion is scattered back. The hidden states are never whole. The gather of the next portion
runs beside the work on this one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..collectives import all_gather_flat, backends_of, check_group_serves, sum_and_scatter
from ..preflight import preflight
from .call import LinearCall
from .kept import Portion, Rows, count, is_narrow


def preflight_before_gathers(
    call: LinearCall, like: Tensor, chunk: int, shared: bool = False
) -> None:
    """With check, and parts of a sequence: ranks compare notes before the first of them is sent.

    Else a rank that holds whole hidden states would meet a gather with its preflight. ``shared``:
    sums over other rows come first, too, and would be met in the same way.
    """
    split = call.request.sequence_parallel or shared
    if split and call.request.checking and call.group is not None:
        preflight(call.plan(like, chunk), call.group)


class HiddenRows:
    """Portions of the hidden states, in order."""

    def __init__(self, call: LinearCall, portions: list[Portion]) -> None:
        self._call, self._portions = call, portions
        self._ahead: tuple[Any, Tensor] | None = None
        self._next = 0

    def take(self, portion: Portion) -> Tensor:
        """[n, H] of the next portion."""
        if portion.own is None or self._call.group is None:
            return self._call.hidden[portion.rows]
        work, gathered = self._ahead or self._gather(portion)
        self._next += 1
        more = self._next < len(self._portions)
        if work is not None:
            work.wait()
        self._ahead = self._gather(self._portions[self._next]) if more else None
        return gathered

    @contextmanager
    def sent_to_the_end(self) -> Iterator[None]:
        """With check: who fails inside still sends the rest of its part, which others wait for.

        Else they would meet its error in a gather, and not where they compare notes.
        """
        try:
            yield
        except Exception:
            if self._call.request.sequence_parallel and self._call.request.checking:
                for portion in self._portions[self._next :]:
                    self.take(portion)
            raise

    def _gather(self, portion: Portion) -> tuple[Any, Tensor]:
        call = self._call
        assert call.group is not None
        check_group_serves(call.hidden.device.type, call.group)
        mine = call.hidden[portion.own].contiguous()
        out = mine.new_empty(portion.count, mine.shape[1])
        return all_gather_flat(_bytes(out), _bytes(mine), call.group, async_op=True), out


class HiddenSum:
    """The gradient of the hidden states: shares of it are summed over the ranks of a group.

    A sum is started as soon as a portion is known, and runs beside the products that come next. On
    a CPU narrow shares are summed in fp32, on accelerators in their own dtype.
    """

    def __init__(self, call: LinearCall, keep_wide: bool = False) -> None:
        like, group = call.hidden, call.group
        wide = keep_wide and is_narrow(like.dtype)
        self._like, self._dtype = like, torch.float32 if wide else like.dtype
        self._out: Tensor | None = None
        alone = call.statics.partial or group is None or group.size() == 1
        self._group = None if alone else group
        self._checking = call.request.checking
        self._under_way: list[tuple[Any, Tensor, Portion]] = []

    def put(self, portion: Portion, values: Tensor) -> None:
        """This rank's share of the gradient of some rows; ``values`` [n, H] are used up."""
        if self._group is None or values.numel() == 0:
            self._write(portion.rows, values)
            return
        values = values.to(self._carried_in(values)).contiguous()
        if portion.own is not None and not _is_gloo(values, self._group):
            mine = values.new_empty(values.shape[0] // self._group.size(), values.shape[1])
            work, values = sum_and_scatter(mine, values, self._group), mine
        else:
            work = dist.all_reduce(values, group=self._group, async_op=True)
        self._under_way.append((work, values, portion))
        while len(self._under_way) > 1:  # one at a time: the memory of two portions
            self._finish()

    @contextmanager
    def joined_by_all(self, portion: Portion) -> Iterator[None]:
        """With check: who fails inside still joins the sum of ``portion``, which others wait for.

        Else they would meet its error in that sum, and not where they compare notes.
        """
        try:
            yield
        except Exception:
            joined = self._under_way and self._under_way[-1][2] is portion
            if self._checking and self._group is not None and not joined:
                self.put(portion, self._zeros(portion.count))
            raise

    def _carried_in(self, values: Tensor) -> torch.dtype:
        if not is_narrow(self._dtype):
            return self._dtype
        return torch.float32 if values.device.type == "cpu" else self._dtype

    def _finish(self) -> None:
        work, values, portion = self._under_way.pop(0)
        if work is not None:
            work.wait()
        if portion.own is None:
            self._write(portion.rows, values)
            return
        assert self._group is not None
        if values.shape[0] == portion.count:  # the sum of every part: this rank's rows of it
            values = values.chunk(self._group.size())[dist.get_rank(self._group)]
        self._room()[portion.own] = values.to(self._dtype)

    def _write(self, rows: Rows, values: Tensor) -> None:
        """Where all rows come at once their memory is the result."""
        values = values.to(self._dtype)
        if isinstance(rows, slice) and count(rows) == self._like.shape[0]:
            self._out = values.contiguous()
        else:
            self._room()[rows] = values

    def _room(self) -> Tensor:
        if self._out is None:
            self._out = self._zeros(self._like.shape[0])
        return self._out

    def _zeros(self, rows: int) -> Tensor:
        # Not zeros_like: hidden states may lie in any order, and the operators promise one.
        shape = rows, self._like.shape[1]
        return torch.zeros(shape, dtype=self._dtype, device=self._like.device)

    def result(self) -> Tensor:
        """Waits for what is under way."""
        while self._under_way:
            self._finish()
        return self._room()


def _bytes(values: Tensor) -> Tensor:
    """A contiguous tensor as bytes: not every backend carries every dtype."""
    # Of a single element torch says contiguous whatever the stride, and makes no bytes of others.
    return values.as_strided((values.numel(),), (1,)).view(torch.uint8)


def _is_gloo(values: Tensor, group: dist.ProcessGroup) -> bool:
    """Gloo reduces and scatters in new versions only, and then as a whole sum."""
    return backends_of(group).get(values.device.type) == "gloo"
