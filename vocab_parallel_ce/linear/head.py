"""This rank's part of the output head, and its matrix products."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .wide import wide_product


@dataclass(frozen=True)
class Head:
    """Rows of the head's weight that are no padding."""

    weight: Tensor
    """[size, H]"""
    bias: Tensor | None = None
    """[size]"""

    @property
    def size(self) -> int:
        return self.weight.shape[0]

    def part(self, begin: int, end: int) -> Head:
        """Ids [begin, end) of this shard."""
        bias = None if self.bias is None else self.bias[begin:end]
        return Head(self.weight[begin:end], bias)

    def logits(self, hidden: Tensor, out: Tensor) -> Tensor:
        """hidden [n, H] -> logits [n, size], in ``out``, which may be wider: see ``wide``."""
        if out.dtype != hidden.dtype:
            wide_product(hidden, self.weight.t(), out)
            return out if self.bias is None else out.add_(self.bias)
        if self.bias is None:
            return torch.mm(hidden, self.weight.t(), out=out)
        return torch.addmm(self.bias, hidden, self.weight.t(), out=out)
