"""The stand-in operator, called on device npu with CPU tensors."""

from __future__ import annotations

from typing import Any

import torch

N, C = 37, 53
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def some_logits(
    dtype: torch.dtype = torch.float32, rows: int = N, columns: int = C
) -> torch.Tensor:
    return (torch.randn(rows, columns) * 4).to(dtype)


def some_target(rows: int = N, columns: int = C) -> torch.Tensor:
    return torch.randint(0, columns, (rows,))


def forward(input: torch.Tensor, target: torch.Tensor, *args: Any, **options: Any) -> Any:
    """On device npu; results on the CPU."""
    operator = torch.ops.npu.npu_cross_entropy_loss.default
    args = tuple(a.to("npu") if isinstance(a, torch.Tensor) else a for a in args)
    results = operator(input.to("npu"), target.to("npu"), *args, **options)
    assert all(result.device.type == "npu" for result in results)
    return [result.cpu() for result in results]


def backward(
    grad_loss: torch.Tensor,
    log_prob: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    **options: Any,
) -> torch.Tensor:
    operator = torch.ops.npu.npu_cross_entropy_loss_backward.default
    weight = None if weight is None else weight.to("npu")
    inputs = (grad_loss.to("npu"), log_prob.to("npu"), target.to("npu"), weight)
    gradient: torch.Tensor = operator(*inputs, **options)
    return gradient.cpu()
