"""Where gradients of the weight and the bias are added up over portions of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from .kept import is_narrow

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
        self._total = torch.empty(like.shape, dtype=dtype, device=like.device)
        self._total[size:] = 0
        self._used = self._total[:size]
        self._begun = False
        self._keep_wide = keep_wide

    def add(self, x: Tensor, hidden: Tensor) -> None:
        """One portion."""
        begun, self._begun = self._begun, True
        if self._used.dtype == x.dtype:
            if begun:
                self._used.addmm_(x.t(), hidden)
            else:
                torch.mm(x.t(), hidden, out=self._used)
            return
        # In blocks: what a narrow product returns before it is added stays small.
        step = max(1, _BLOCK_BYTES // (hidden.shape[1] * x.element_size() + 1))
        for begin in range(0, self._used.shape[0], step):
            columns = slice(begin, begin + step)
            product = x[:, columns].t() @ hidden
            if begun:
                self._used[columns] += product
            else:
                self._used[columns] = product

    def add_product(self, product: Tensor) -> None:
        """One portion's x^T h [size, H], made elsewhere."""
        begun, self._begun = self._begun, True
        if begun:
            self._used += product
        else:
            self._used.copy_(product)

    def result(self) -> Tensor:
        """In the weight's dtype, unless it was to be kept wide."""
        if not self._begun:
            self._used.zero_()
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
        # In blocks: on a CPU a sum in a wider dtype widens all of x first.
        for block in x.split(_rows_of_a_block(x)):
            self._used[columns] += block.sum(0, dtype=self._total.dtype)

    def result(self) -> Tensor:
        return self._total.to(self._dtype)


def scale_(values: Tensor, factor: Tensor) -> None:
    """values * factor in place, with the product of narrow numbers formed in fp32."""
    if values.device.type == "cpu" and bool(factor == 1):
        return
    if not is_narrow(values.dtype):
        values.mul_(factor)
        return
    for block in values.split(_rows_of_a_block(values)):
        block.copy_(block.float().mul_(factor))


def _rows_of_a_block(values: Tensor) -> int:
    """How many rows of narrow ``values`` are widened at a time."""
    step = max(1, _BLOCK_BYTES // (values[:1].numel() * 4 + 1))
    return step if values.device.type == "cpu" else step * 64
