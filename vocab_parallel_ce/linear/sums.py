"""Where gradients are added up: the weight's over chunks of rows, the hidden states' over ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .call import is_narrow
from .kept import Rows

_BLOCK_BYTES = 4 << 20


class WeightSum:
    """The sum of x^T h over portions of rows: x [n, size] and h [n, H] -> [rows of weight, H].

    One portion is one product, as exact as its dtype. More are added up in fp32 where the dtype is
    narrower: in bf16 sixteen of them cost 2.6 times the error of one.
    """

    def __init__(self, like: Tensor, size: int, portions: int, keep_wide: bool = False) -> None:
        """``like`` is the weight [V_r, H], of which ``size`` rows are no padding."""
        self._dtype = like.dtype
        wide = is_narrow(like.dtype) and (portions > 1 or keep_wide)
        dtype = torch.float32 if wide else like.dtype
        self._total = torch.zeros(like.shape, dtype=dtype, device=like.device)
        self._used = self._total[:size]
        self._keep_wide = keep_wide

    def add(self, x: Tensor, hidden: Tensor) -> None:
        """One portion."""
        if self._used.dtype == x.dtype:
            self._used.addmm_(x.t(), hidden)
            return
        # In blocks: what a narrow product returns before it is added stays small.
        step = max(1, _BLOCK_BYTES // (hidden.shape[1] * x.element_size() + 1))
        for begin in range(0, self._used.shape[0], step):
            columns = slice(begin, begin + step)
            self._used[columns] += x[:, columns].t() @ hidden

    def result(self) -> Tensor:
        """In the weight's dtype, unless it was to be kept wide."""
        return self._total if self._keep_wide else self._total.to(self._dtype)


class BiasSum:
    """The sum of the columns of x [n, size] over portions of rows."""

    def __init__(self, like: Tensor, size: int) -> None:
        self._dtype = like.dtype
        dtype = torch.float32 if is_narrow(like.dtype) else like.dtype
        self._total = torch.zeros(like.shape, dtype=dtype, device=like.device)
        self._used = self._total[:size]

    def add(self, x: Tensor, columns: slice = slice(None)) -> None:
        """One portion of rows, of all columns or some."""
        self._used[columns] += x.sum(0, dtype=self._total.dtype)

    def result(self) -> Tensor:
        return self._total.to(self._dtype)


class HiddenSum:
    """The gradient [N, H] of the hidden states: parts of it are summed over the ranks of a group.

    A sum is started as soon as a part is known, and runs beside the products that come next. On a
    CPU narrow parts are summed in fp32, on accelerators in their own dtype.
    """

    def __init__(
        self,
        like: Tensor,
        group: dist.ProcessGroup | None,
        partial: bool = False,
        keep_wide: bool = False,
    ) -> None:
        wide = keep_wide and is_narrow(like.dtype)
        self.out = torch.zeros_like(like, dtype=torch.float32 if wide else like.dtype)
        self._group = None if partial or group is None or group.size() == 1 else group
        self._under_way: list[tuple[Any, Tensor, Rows]] = []

    def put(self, rows: Rows, values: Tensor) -> None:
        """This rank's share of the gradient of some rows; ``values`` [n, H] are used up."""
        if self._group is None or values.numel() == 0:
            self.out[rows] = values.to(self.out.dtype)
            return
        values = values.to(self._carried_in(values)).contiguous()
        work = dist.all_reduce(values, group=self._group, async_op=True)
        self._under_way.append((work, values, rows))
        while len(self._under_way) > 1:  # one at a time: the memory of two parts
            self._finish()

    def _carried_in(self, values: Tensor) -> torch.dtype:
        if not is_narrow(self.out.dtype):
            return self.out.dtype
        return torch.float32 if values.device.type == "cpu" else self.out.dtype

    def _finish(self) -> None:
        work, values, rows = self._under_way.pop(0)
        if work is not None:
            work.wait()
        self.out[rows] = values.to(self.out.dtype)

    def result(self) -> Tensor:
        """Waits for what is under way."""
        while self._under_way:
            self._finish()
        return self.out


def scale_(values: Tensor, factor: Tensor) -> None:
    """values * factor in place, with the product of narrow numbers formed in fp32."""
    if values.device.type == "cpu" and bool(factor == 1):
        return
    if not is_narrow(values.dtype):
        values.mul_(factor)
        return
    step = max(1, _BLOCK_BYTES // (values[:1].numel() * 4 + 1))
    if values.device.type != "cpu":
        step *= 64
    for block in values.split(step):
        block.copy_(block.float().mul_(factor))
