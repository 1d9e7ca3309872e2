"""What compiled loops are told of a tensor: where it lies, once its dtype is what they expect."""

from __future__ import annotations

import torch
from torch import Tensor


def vector(tensor: Tensor | None, dtype: torch.dtype) -> tuple[int, int]:
    """Address and step in bytes; zeros where there is none."""
    if tensor is None:
        return 0, 0
    if tensor.dtype != dtype:  # a wrong type would be read, or written, beyond its end
        raise TypeError(f"expected {dtype}, got {tensor.dtype}")
    return tensor.data_ptr(), tensor.stride(0) * dtype.itemsize


def matrix(tensor: Tensor, dtype: torch.dtype) -> tuple[int, int, int]:
    """Address, step from row to row and from column to column in bytes."""
    if tensor.dtype != dtype:
        raise TypeError(f"expected {dtype}, got {tensor.dtype}")
    row, column = tensor.stride()
    size = dtype.itemsize
    return tensor.data_ptr(), row * size, column * size
