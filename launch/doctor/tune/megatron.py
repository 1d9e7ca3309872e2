"""Megatron-core's eager loss as a sequence of torch calls, for one rank: what a way is beside.

The calls of megatron-core 0.16.1, core/tensor_parallel/cross_entropy.py, in their order and as much
in place as there; the collectives, which one rank does without, are left out. So it needs no
Megatron, which is not always importable where the doctor runs. A test compares it with Megatron's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Saved:
    """What Megatron keeps from forward to backward."""

    softmax: Tensor
    column: Tensor


def forward(logits: Tensor, target: Tensor) -> tuple[Tensor, Saved]:
    """The loss [N] in fp32. fp32 logits are overwritten, as Megatron overwrites them."""
    x = logits.float()
    x.sub_(x.max(1)[0][:, None])
    rows = torch.arange(len(x), device=x.device)
    predicted = x[rows, target].clone()
    torch.exp(x, out=x)
    total = x.sum(1)
    loss = total.log() - predicted
    x.div_(total[:, None])
    return loss, Saved(x, target)


def backward(saved: Saved, gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of the logits, of ``gradient`` [N], in their dtype."""
    dx = saved.softmax
    rows = torch.arange(len(dx), device=dx.device)
    dx[rows, saved.column] -= 1.0
    dx.mul_(gradient[:, None])
    return dx.to(dtype)
