"""The tensors of a call against each other: dtypes, shapes, devices. No value is looked at."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LOGITS_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
TARGET_DTYPES = (torch.int64, torch.int32)
DEVICES_WITHOUT_FP64 = ("npu",)


def check_tensors(input: Tensor, target: Tensor, weight: Tensor | None, where: str) -> None:
    for name, value in (("input", input), ("target", target), ("weight", weight)):
        if not isinstance(value, Tensor) and not (name == "weight" and value is None):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}{where}")
    if input.dtype not in LOGITS_DTYPES:
        raise TypeError(f"input must be fp16, bf16, fp32 or fp64 logits, got {input.dtype}{where}")
    if input.dtype == torch.float64 and input.device.type in DEVICES_WITHOUT_FP64:
        raise ValueError(
            f"input is float64, which {input.device.type} devices do not compute in (torch takes "
            f"fp32 in its place, without a word){where}; use input.float(), or CPU tensors for "
            "fp64 checks"
        )
    if input.dim() < 1:
        raise ValueError(f"input must have shape [..., C_r], got a 0-d tensor{where}")
    if target.dtype not in TARGET_DTYPES:
        raise TypeError(
            f"target must hold class ids in int64 or int32, got {target.dtype}{where}; class "
            "probabilities are not supported"
        )
    if target.shape != input.shape[:-1]:
        raise ValueError(
            f"target has shape {tuple(target.shape)}, but input {tuple(input.shape)} needs "
            f"{tuple(input.shape[:-1])}{where}: one id for each row of logits, vocabulary last"
        )
    if target.device != input.device:
        raise ValueError(f"target is on {target.device}, input on {input.device}{where}")
    if weight is None:
        return
    if weight.dim() != 1 or weight.dtype not in LOGITS_DTYPES:
        raise ValueError(
            f"weight must be a floating point vector [vocab_size] (fp16, bf16, fp32 or fp64), got "
            f"{weight.dtype} of shape {tuple(weight.shape)}{where}"
        )
    if weight.device != input.device:
        raise ValueError(f"weight is on {weight.device}, input on {input.device}{where}")
    if weight.requires_grad:
        raise ValueError(f"weight gets no gradient: pass weight.detach(){where}")


def check_row_scale(scale: Any, input: Tensor, target: Tensor, where: str) -> None:
    if scale.dim() > 0 and scale.shape != target.shape:
        raise ValueError(
            f"scale has shape {tuple(scale.shape)}, but target {tuple(target.shape)}{where}: one "
            "number for each row of logits, or one for all"
        )
    if scale.device != input.device:
        raise ValueError(f"scale is on {scale.device}, input on {input.device}{where}")


def check_selected(selected: Any, input: Tensor, target: Tensor, where: str) -> None:
    if not isinstance(selected, Tensor):
        raise TypeError(f"selected must be a tensor or None, got {type(selected).__name__}{where}")
    if selected.dtype not in TARGET_DTYPES:
        raise TypeError(
            f"selected must hold class ids in int64 or int32, got {selected.dtype}{where}"
        )
    if selected.dim() != target.dim() + 1 or selected.shape[:-1] != target.shape:
        raise ValueError(
            f"selected has shape {tuple(selected.shape)}, but target {tuple(target.shape)}{where}: "
            "K ids for each row, in a last dimension of their own"
        )
    if selected.device != input.device:
        raise ValueError(f"selected is on {selected.device}, input on {input.device}{where}")
