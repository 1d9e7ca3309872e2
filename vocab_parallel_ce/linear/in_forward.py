"""A reduced loss and its gradients in one pass: three matrix products instead of four.

Chunk by chunk: logits, their statistics (one exchange), the chunk's losses and their derivative by
the [n] statistics, the gradient of the logits in their own place, and the two products with it.
Backward only multiplies by the gradient that comes in.

In fp16 the gradients are those of the sum, carried in fp32; the denominator comes in backward as
well. Else 1 / N would make zeros of them before a loss scale arrives.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..dtensor import PLAIN, Layout
from ..engines.contract import Engine, arithmetic_dtype
from ..passes import RowResult, compute_gradient, exchange_statistics
from ..preflight import preflight, together
from ..reduction import (
    RowLosses,
    denominators,
    reduce_rows,
    row_coefficients,
    row_losses,
    row_weights,
)
from ..request import is_on
from .backward import Gradients, Leaves, Needs, RowSums, rows_of
from .call import LinearCall
from .forward import HiddenFingerprint
from .hidden import HiddenRows, preflight_before_gathers
from .kept import Portion, Rows, kept_rows, masked, some_of


@dataclass
class LossAndGradients:
    """What the forward pass leaves."""

    loss: Tensor
    """0-d, with z"""
    zloss: Tensor
    gradients: Gradients
    factor: Tensor | None
    """0-d: multiplies the gradients, beside the gradient that comes in; None is 1"""


@dataclass
class _Pending:
    """A chunk whose statistics are known, and the gradient of whose logits is not yet made."""

    portion: Portion
    logits: Tensor
    hidden: Tensor
    result: RowResult
    coefficients: Tensor


def loss_with_gradients(
    call: LinearCall,
    leaves: Leaves,
    needs: Needs,
    layout: Layout = PLAIN,
) -> LossAndGradients:
    """The reduced loss of ``call`` and the gradients that ``needs`` asks for.

    ``layout`` knows the ranks that hold other rows of the same batch.
    """
    return _InForward(call, leaves, needs, layout).run()


class _InForward:
    def __init__(
        self,
        call: LinearCall,
        leaves: Leaves,
        needs: Needs,
        layout: Layout,
    ) -> None:
        self._call, self._request, self._layout = call, call.request, layout
        self._mean = call.request.reduction == "mean"
        self._postponed = self._mean and call.hidden.dtype == torch.float16
        self._chunk = call.chunk
        self._scratch = call.scratch(self._chunk, call.head.size)
        self._keep = call.target != call.request.ignore_index
        kept = kept_rows(self._keep) if call.leaves_out else None
        self._portions = call.portions(kept, self._chunk)
        # There is always one, for its header: that ranks differ must be told without any row, too.
        self._portions = self._portions or [Portion(slice(0, 0))]
        self._source = HiddenRows(call, self._portions)
        self._sums = RowSums(call, leaves, needs, len(self._portions), keep_wide=self._postponed)
        dtype = arithmetic_dtype(call.hidden.dtype)
        row_weight, keep = row_weights(call.target, call.weight, self._request, dtype)
        has_z = is_on(self._request.lse_square_scale)
        zeros = torch.zeros(keep.shape, dtype=dtype, device=keep.device)
        self._losses = RowLosses(
            zeros, torch.zeros_like(zeros) if has_z else None, row_weight, keep
        )
        self._agreed: Tensor | None = None
        self._denominators: tuple[Tensor, Tensor] | None = None
        self._pending: _Pending | None = None

    def run(self) -> LossAndGradients:
        call, layout = self._call, self._layout
        chunk, shares_rows = call.statics.chunk, layout.shares_rows
        preflight_before_gathers(call, self._scratch, chunk, shares_rows)
        layout.agree(more=True)
        self._count()
        for number, portion in enumerate(self._portions):
            with together(call.group, self._request.check):
                self._one(portion, first=number == 0)
        with together(call.group, self._request.check):
            self._finish()
            if self._request.checking and call.group is not None:
                preflight(call.plan(self._scratch, chunk), call.group)
        layout.agree()
        loss, of_z = reduce_rows(self._losses, self._request.reduction, self._agreed, layout.total)
        factor = self._factor_of_loss if self._postponed else None
        zloss = torch.zeros_like(loss) if of_z is None else of_z
        return LossAndGradients(loss, zloss, self._sums.result(), factor)

    def _one(self, portion: Portion, first: bool) -> None:
        """Statistics and losses of a chunk; the gradients of the one before it."""
        call, rows, n = self._call, portion.rows, portion.count
        target, announced = call.target[rows], None
        if first:
            # As many rows as every rank has, until the headers say that the targets are the same.
            missing = 0 if portion.own is not None else min(self._chunk, call.rows) - n
            blank = target.new_full((missing,), self._request.ignore_index)
            target, announced = torch.cat([target, blank]), call.target
        hidden, logits = self._source.take(portion), self._scratch[:n]
        if not call.leaves_out:  # NaN there would reach the weight's gradient
            hidden = masked(hidden, self._keep[rows])

        def fill(engine: Engine, parts: Tensor, local_target: Tensor) -> Tensor | None:
            self._finish()  # before its logits are overwritten
            call.head.logits(hidden, logits)
            if n < parts.shape[1]:
                parts.zero_()
            some, column = parts[:, :n], local_target[:n]
            call.fill(engine, some, rows, logits, column)
            seen = HiddenFingerprint(call)
            seen.add(hidden, self._keep[rows])
            return seen.bits()

        plan, scale = call.plan(self._scratch, call.statics.chunk), some_of(call.scale, rows)
        if not first:
            plan = plan._replace(normalizer=self._agreed, scale=scale)
        result = exchange_statistics(fill, plan, target, call.weight, call.group, announced)
        result = replace(result, scale=scale)
        if first:
            self._settle(result.normalizer)
        coefficients = self._coefficients(rows, result.stats[:, :n])
        self._pending = _Pending(
            portion, logits, hidden, rows_of(result, slice(0, n)), coefficients
        )

    def _count(self) -> None:
        """What a mean needs to know of all rows."""
        if not self._mean:
            return
        self._none = self._layout.total(self._keep.sum().to(self._losses.loss.dtype)) == 0
        if not self._request.normalized:
            self._denominators = self._denominators_for(None)

    def _denominators_for(self, normalizer: Tensor | None) -> tuple[Tensor, Tensor]:
        rows, has_z = self._losses, self._losses.zloss is not None
        dtype, total = rows.loss.dtype, self._layout.total
        return denominators(rows.row_weight, rows.kept, dtype, has_z, normalizer, total)

    def _settle(self, agreed: Tensor | None) -> None:
        """What the sums of losses are multiplied by, once the ranks agree on the normalizer."""
        self._agreed = agreed
        one = torch.ones((), dtype=self._losses.loss.dtype, device=self._losses.loss.device)
        self._factor_of_loss = self._factor_of_zloss = one
        if not self._mean:
            return
        of_loss, of_zloss = self._denominators or self._denominators_for(agreed)
        # Where no row counts every gradient is 0: divided by 1, not by 0.
        self._factor_of_loss = 1 / torch.where(self._none, one, of_loss)
        self._factor_of_zloss = 1 / torch.where(self._none, one, of_zloss)

    def _coefficients(self, rows: Rows, stats: Tensor) -> Tensor:
        """The losses of a chunk into their places; the derivative of their sum by ``stats``."""
        call, into = self._call, self._losses
        of_loss, of_zloss = self._factor_of_loss, self._factor_of_zloss
        if self._postponed:
            of_loss, of_zloss = torch.ones_like(of_loss), of_zloss / of_loss
        losses = row_losses(stats.unbind(0), call.target[rows], call.weight, self._request)
        into.loss[rows] = losses.loss
        if into.zloss is not None and losses.zloss is not None:
            into.zloss[rows] = losses.zloss
        return row_coefficients(stats, losses, self._request, of_loss, of_zloss)

    def _finish(self) -> None:
        """The gradients of the chunk that is pending."""
        if self._pending is None:
            return
        chunk, self._pending = self._pending, None
        with self._sums.joined_by_all(chunk.portion):
            x = self._call.room_for_gradient(chunk.logits)
            grads = chunk.coefficients.unbind(0)
            compute_gradient(chunk.logits, chunk.result, self._call.weight, grads, self._request, x)
            self._sums.add(chunk.portion, x, chunk.hidden)
