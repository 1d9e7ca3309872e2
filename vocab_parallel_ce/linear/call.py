"""One call of the fused head, after its arguments were checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..engines.contract import Engine
from ..passes import fill_partials
from ..preflight import Plan
from ..request import LinearRequest, RowRequest
from .chunks import at_most_half, columns_of_a_block
from .head import Head
from .kept import Portion, Rows, is_narrow, portions, portions_of_parts, some_of


@dataclass(frozen=True)
class Statics:
    """What autograd and the custom operators carry beside tensors."""

    request: LinearRequest
    chunk: int
    """rows of logits that the budget has room for"""
    scratch_mib: float | None = None
    partial: bool = False
    """the gradient of the hidden states is left unsummed"""
    wide: bool = False
    """logits are fp32, their gradient is not"""
    straight: bool = False
    """no logits are made, see ``straight``"""
    sums_hidden: bool = False
    """the gradient of the hidden states will be summed over ranks: they must agree on it"""

    def scalars(self) -> tuple[Any, ...]:
        """For a custom operator, behind those of the request."""
        return self.chunk, self.scratch_mib, self.partial, self.wide, self.straight


@dataclass(frozen=True)
class LinearCall:
    """The tensors of one call, plain and without a tape."""

    hidden: Tensor
    """[N, H], or this rank's part of them"""
    head: Head
    target: Tensor
    """[N] int64"""
    weight: Tensor | None
    """[vocab_size] class weights"""
    statics: Statics
    group: dist.ProcessGroup | None
    normalizer: Tensor | None = None
    scale: Tensor | None = None
    """[N] where each row has its own; counts in place of the request's"""
    selected: Tensor | None = None
    """[N, K] int64 ids whose log-probabilities are asked for"""

    @property
    def request(self) -> LinearRequest:
        return self.statics.request

    @property
    def rows(self) -> int:
        return self.target.shape[0]

    @property
    def chunk(self) -> int:
        """Rows of logits that exist at a time; at least 1."""
        return max(1, self._at_most_half(min(self.statics.chunk, self.rows), self.rows))

    def _at_most_half(self, count: int, whole: int) -> int:
        return at_most_half(count, whole, self.statics.scratch_mib, is_narrow(self.hidden.dtype))

    @property
    def leaves_out(self) -> bool:
        """Whether ignored rows are left out of the products."""
        asked = self.hidden.device.type == "cpu" or self.request.drop_ignored
        return asked and not self.request.sequence_parallel

    def portions(self, kept: Tensor | None, size: int) -> list[Portion]:
        """Of all rows, or of those that are kept, so many at a time."""
        if not self.request.sequence_parallel:
            return portions(self.rows, kept, size)
        world = 1 if self.group is None else self.group.size()
        return portions_of_parts(self.rows, world, size, self.hidden.device)

    def scratch(self, rows: int, columns: int) -> Tensor:
        """Room for logits."""
        dtype = torch.float32 if self.statics.wide else self.hidden.dtype
        return self.hidden.new_empty(rows, columns, dtype=dtype)

    def room_for_gradient(self, logits: Tensor) -> Tensor:
        """The logits' own memory, unless it is wider than what the products take."""
        if logits.dtype == self.hidden.dtype:
            return logits
        return torch.empty_like(logits, dtype=self.hidden.dtype)

    def plan(self, like: Tensor, chunk: int) -> Plan:
        """What the preflight tells; ``like`` has the logits' dtype and device."""
        return Plan(
            self.request, like, self.target, self.normalizer, width=self.hidden.shape[1],
            chunk=chunk, scale=self.scale, sums_hidden=self.statics.sums_hidden,
            selected=self.selected,
        )  # fmt: skip

    def fill(self, engine: Engine, parts: Tensor, rows: Rows, logits: Tensor, at: Tensor) -> None:
        """The partials of ``rows`` from their logits; ``at`` [n] are columns of their targets."""
        fill_partials(
            engine, parts, logits, at, self.weight, self.request, scale=some_of(self.scale, rows),
            selected=some_of(self.selected, rows),
        )  # fmt: skip

    def block_columns(self, rows: int) -> int | None:
        """Columns of logits that exist at a time in backward; None: go by rows."""
        if self.request.sequence_parallel:  # all rows at once are what nobody holds
            return None
        itemsize = bytes_of_a_logit(self.hidden.dtype, self.statics.wide)
        device, size = self.hidden.device.type, self.head.size
        columns = columns_of_a_block(rows, itemsize, device, self.statics.scratch_mib)
        return None if columns is None else self._at_most_half(columns, size)


def linear_call(
    hidden: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    normalizer: Tensor | None,
    scale: Tensor | None,
    selected: Tensor | None,
    statics: Statics,
    group: dist.ProcessGroup | None,
) -> LinearCall:
    """From tensors as a caller has them: [..., H], [V_r, H], [V_r], [...]; scale is [N]."""
    head = plain_head(head_weight, head_bias, statics.request)
    ids = target.reshape(-1).long()  # kernels read them so, where they are announced as well
    return LinearCall(flat(hidden), head, ids, weight, statics, group, normalizer, scale, selected)


def plain_head(weight: Tensor, bias: Tensor | None, request: RowRequest) -> Head:
    """The rows of a weight [V_r, H] that are ids, without a tape."""
    size = request.size
    return Head(weight.detach()[:size], None if bias is None else bias.detach()[:size])


def flat(hidden: Tensor) -> Tensor:
    """[..., H] -> [N, H]"""
    return hidden.detach().reshape(hidden.shape[:-1].numel(), hidden.shape[-1])


def bytes_of_a_logit(dtype: torch.dtype, wide: bool) -> int:
    """With its gradient, where that lies beside it."""
    return dtype.itemsize + (4 if wide else 0)
