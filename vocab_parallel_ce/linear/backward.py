"""Gradients of the fused head from logits that are computed again.

Straight from hidden states where the engine has functions for that, which make the logits
themselves. Else by blocks of columns: every row at once, so a block's rows of the weight's gradient
are one exact product, and only the gradient of the hidden states is added up. Where a budget would
leave few columns (very many rows), by portions of rows.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..engines.contract import ELSEWHERE, IGNORED, LinearFunctions
from ..passes import RowResult, compute_gradient, gradient_coefficients
from ..request import RowRequest, is_on
from ..statistics import apart
from .call import LinearCall
from .hidden import HiddenRows, HiddenSum
from .kept import Portion, Rows, is_narrow, kept_rows, masked, some_of
from .straight import class_weight, functions_of
from .sums import BiasSum, WeightSum


@dataclass(frozen=True)
class Needs:
    """Whose gradients are asked for."""

    hidden: bool
    weight: bool
    bias: bool

    @property
    def any(self) -> bool:
        return self.hidden or self.weight or self.bias


@dataclass
class Gradients:
    """None where it was not asked for."""

    hidden: Tensor | None = None
    """[N, H]"""
    weight: Tensor | None = None
    """[V_r, H]; exactly 0 in padding"""
    bias: Tensor | None = None

    def all(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.hidden, self.weight, self.bias


@dataclass(frozen=True)
class Leaves:
    """What gradients are shaped like."""

    weight: Tensor
    bias: Tensor | None


def linear_gradient(
    call: LinearCall, leaves: Leaves, result: RowResult, grad_stats: Tensor, needs: Needs
) -> Gradients:
    """The backward pass of ``linear_statistics``; sums the gradient of the hidden states."""
    # A row that nothing depends on is left out as an ignored one is.
    alive = (result.local_target != IGNORED) & (grad_stats != 0).any(0)
    kept = kept_rows(alive) if call.leaves_out else None
    functions = functions_of(call)
    if functions is not None:
        return _straight(call, functions, leaves, result, grad_stats, needs, kept)
    rows = call.rows if kept is None else kept.shape[0]
    columns = call.block_columns(rows)
    if call.statics.straight and not call.request.sequence_parallel:
        columns = max(1, call.head.size)  # few, and one sum of hidden gradients as on other ranks
    if columns is None:
        return by_rows(call, leaves, result, grad_stats, needs, alive, kept)
    return _by_columns(call, leaves, result, grad_stats, needs, alive, kept, columns)


def _straight(
    call: LinearCall,
    functions: LinearFunctions,
    leaves: Leaves,
    result: RowResult,
    grad_stats: Tensor,
    needs: Needs,
    kept: Tensor | None,
) -> Gradients:
    size = call.statics.chunk if call.request.sequence_parallel else call.rows
    portions = call.portions(kept, max(1, size))
    source = HiddenRows(call, portions)
    total = HiddenSum(call) if needs.hidden else None
    weight = WeightSum(leaves.weight, call.head.size, len(portions)) if needs.weight else None
    for portion in portions:
        some = rows_of(result, portion.rows)
        grads = apart(grad_stats[:, portion.rows], call.request.wanted, call.selected)
        coefficients = gradient_coefficients(some, call.weight, grads, call.request)
        of_hidden, of_weight = functions.gradients(
            source.take(portion), call.head.weight, some.m, some.s, some.local_target, coefficients,
            class_weight(call), call.request.scale, _has_one_coefficient(call.request),
        )  # fmt: skip
        if total is not None:
            total.put(portion, of_hidden)
        if weight is not None:
            weight.add_product(of_weight)
    return Gradients(
        None if total is None else total.result(), None if weight is None else weight.result()
    )


def _has_one_coefficient(request: RowRequest) -> bool:
    """Whether the gradient of every row is a number times (p - [target])."""
    reduced = request.reduction != "none"  # else whoever gets lse may give it a gradient
    return reduced and not request.smooth and not is_on(request.lse_square_scale)


def _by_columns(
    call: LinearCall,
    leaves: Leaves,
    result: RowResult,
    grad_stats: Tensor,
    needs: Needs,
    alive: Tensor,
    kept: Tensor | None,
    columns: int,
) -> Gradients:
    portion = Portion(slice(0, call.rows) if kept is None else kept)
    every = portion.rows
    hidden = call.hidden[every]
    if not call.leaves_out and needs.weight:
        hidden = masked(hidden, alive)
    result, grad_stats = rows_of(result, every), grad_stats[:, every]
    size, rows = call.head.size, hidden.shape[0]
    out = Gradients()
    if needs.weight:
        out.weight = _like(leaves.weight, size)
    bias = BiasSum(leaves.bias, size) if needs.bias and leaves.bias is not None else None
    total = HiddenSum(call) if needs.hidden else None
    share = _Share(hidden, one_block=columns >= size) if needs.hidden else None
    scratch = call.scratch(rows * min(columns, size), 1).view(-1)
    for begin in range(0, size, columns):
        end = min(begin + columns, size)
        head, place = call.head.part(begin, end), slice(begin, end)
        logits = head.logits(hidden, scratch[: rows * (end - begin)].view(rows, end - begin))
        x = _gradient_of_block(call, result, grad_stats, logits, begin, end)
        if share is not None and total is not None:
            share.add(x, head.weight)
            if end == size:  # the sum over ranks runs beside the last product
                total.put(portion, share.value)
        if out.weight is not None:
            torch.mm(x.t(), hidden, out=out.weight[place])
        if bias is not None:
            bias.add(x, place)
    if size == 0 and share is not None and total is not None:  # the other ranks have some
        total.put(portion, share.value)
    out.hidden = None if total is None else total.result()
    out.bias = None if bias is None else bias.result()
    return out


def _gradient_of_block(
    call: LinearCall, result: RowResult, grad_stats: Tensor, logits: Tensor, begin: int, end: int
) -> Tensor:
    """Logits of ids [begin, end) of this shard -> their gradient, in place where it fits."""
    request = call.request
    of_block = replace(request, start=request.start + begin, stop=request.start + end)
    column = result.local_target
    here = (column >= begin) & (column < end)
    shifted = torch.where(here, column - begin, torch.where(column >= 0, ELSEWHERE, column))
    of_rows = replace(result, local_target=shifted)
    x = call.room_for_gradient(logits)
    grads = apart(grad_stats, of_block.wanted, call.selected)
    compute_gradient(logits, of_rows, call.weight, grads, of_block, x)
    return x


class _Share:
    """This rank's share of the hidden states' gradient, added up over blocks of columns."""

    def __init__(self, hidden: Tensor, one_block: bool) -> None:
        narrow = is_narrow(hidden.dtype) and not one_block
        dtype = torch.float32 if narrow else hidden.dtype
        self.value = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)

    def add(self, x: Tensor, weight: Tensor) -> None:
        if self.value.dtype == x.dtype:
            self.value.addmm_(x, weight)  # of zeros at first: small beside the products
        else:
            self.value += x @ weight


def by_rows(
    call: LinearCall,
    leaves: Leaves,
    result: RowResult,
    grad_stats: Tensor,
    needs: Needs,
    alive: Tensor,
    kept: Tensor | None,
) -> Gradients:
    """The same by portions of rows."""
    chunk = call.chunk
    scratch = call.scratch(chunk, call.head.size)
    portions = call.portions(kept, chunk)
    sums, source = RowSums(call, leaves, needs, len(portions)), HiddenRows(call, portions)
    for portion in portions:
        hidden, rows = source.take(portion), portion.rows
        if not call.leaves_out and needs.weight:
            hidden = masked(hidden, alive[rows])
        logits = call.head.logits(hidden, scratch[: portion.count])
        x, some = call.room_for_gradient(logits), rows_of(result, rows)
        grads = apart(grad_stats[:, rows], call.request.wanted, call.selected)
        compute_gradient(logits, some, call.weight, grads, call.request, x)
        sums.add(portion, x, hidden)
    return sums.result()


class RowSums:
    """Gradients from portions of rows: the gradient of their logits, and their hidden states."""

    def __init__(
        self,
        call: LinearCall,
        leaves: Leaves,
        needs: Needs,
        portions: int,
        keep_wide: bool = False,
    ) -> None:
        size = call.head.size
        self._head = call.head
        self._weight = WeightSum(leaves.weight, size, portions, keep_wide) if needs.weight else None
        self._bias = BiasSum(leaves.bias, size) if needs.bias and leaves.bias is not None else None
        self._hidden = HiddenSum(call, keep_wide) if needs.hidden else None

    def joined_by_all(self, portion: Portion) -> AbstractContextManager[None]:
        """See ``HiddenSum``."""
        return nullcontext() if self._hidden is None else self._hidden.joined_by_all(portion)

    def add(self, portion: Portion, x: Tensor, hidden: Tensor) -> None:
        """x [n, size] is the gradient of the logits of ``hidden`` [n, H]."""
        if self._hidden is not None:  # first: its sum over ranks runs beside the next product
            self._hidden.put(portion, x @ self._head.weight)
        if self._weight is not None:
            self._weight.add(x, hidden)
        if self._bias is not None:
            self._bias.add(x)

    def result(self) -> Gradients:
        return Gradients(
            None if self._hidden is None else self._hidden.result(),
            None if self._weight is None else self._weight.result(),
            None if self._bias is None else self._bias.result(),
        )


def rows_of(result: RowResult, rows: Rows) -> RowResult:
    """Some rows of it, as a gradient needs them."""
    return RowResult(
        result.stats[:, rows], result.m[rows], result.s[rows], result.local_target[rows],
        result.argmax, result.normalizer, some_of(result.scale, rows),
        some_of(result.selected, rows),
    )  # fmt: skip


def _like(weight: Tensor, size: int) -> Tensor:
    """Room for its gradient: zeros in padding."""
    out = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    out[size:] = 0
    return out
