"""What the fused backward lacks, added to its two results.

It knows one coefficient g a row, and gives the gradients of logits whose own is g (p - [c = y]).
What is wanted is a p - b [c = y] - w_c e, so that g = a and there remain

    (a - b) [c = y]    one element a row:   + (a - b) W[y]   and   + (a - b) h into row y
    - w_c e            of rank one:         - e v            and   - w_c r

with v = sum_c w_c W[c] and r = sum_n e_n h_n [H]. In fp32, a few rows at a time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..chunks import row_ranges

_BUFFERS = 2


def weighted_sum(matrix: Tensor, factors: Tensor | None) -> Tensor:
    """sum_n factors_n matrix_n [H] of [N, H], in fp32; no factors are ones."""
    total = torch.zeros(matrix.shape[1], dtype=torch.float32, device=matrix.device)
    for rows in row_ranges(matrix, _BUFFERS):
        block = matrix[rows]
        if factors is None:
            total += block.sum(0, dtype=torch.float32)
        else:
            total += torch.mul(block, factors[rows, None]).sum(0)
    return total


def products(matrix: Tensor, vector: Tensor) -> Tensor:
    """matrix [N, H] @ vector [H] -> [N] in fp32: a narrow product would round it."""
    out = torch.empty(matrix.shape[0], dtype=torch.float32, device=matrix.device)
    for rows in row_ranges(matrix, _BUFFERS):
        torch.sum(torch.mul(matrix[rows], vector), 1, out=out[rows])
    return out


def correct_hidden(
    grad: Tensor,
    weight: Tensor,
    column: Tensor,
    at_target: Tensor | None,
    smooth: Tensor | None,
    direction: Tensor | None,
) -> None:
    """grad [N, H] += at_target W[column] - smooth direction, in place, rounded once."""
    for rows in row_ranges(grad, _BUFFERS):
        block = grad[rows].float()
        if at_target is not None:
            block += torch.mul(F.embedding(column[rows], weight), at_target[rows, None])
        if smooth is not None and direction is not None:
            block -= torch.mul(smooth[rows, None], direction)
        grad[rows] = block


def corrected_weight(
    grad: Tensor,
    hidden: Tensor,
    column: Tensor,
    at_target: Tensor | None,
    smooth: Tensor | None,
    class_weight: Tensor | None,
) -> Tensor:
    """grad [V_r, H] + the rows at_target h at ``column`` - w r, summed in fp32, rounded once."""
    total = grad.float()
    if at_target is not None:
        for rows in row_ranges(hidden, _BUFFERS):
            total.index_add_(0, column[rows], torch.mul(hidden[rows], at_target[rows, None]))
    if smooth is not None:
        direction = weighted_sum(hidden, smooth)
        if class_weight is None:
            total -= direction
        else:
            total.addcmul_(class_weight[:, None], direction[None], value=-1)
    return total.to(grad.dtype)
